"""Run a case on an implementation in a dtype, with gradients; shared by the tests of all stages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from harness import check, expectation
from strategies import LayerCase, RouterCase, cotangent, lay_out
from torch import Tensor

import reference

BASELINE_OF = {torch.float64: torch.float32}  # float64 has no lower baseline but the scaled float32 one


def cast(t: Tensor, under_test: torch.dtype, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rounded to the dtype under test, then held in `dtype`; masks stay bool."""
    return t.to(device) if not t.is_floating_point() else t.to(under_test).to(dtype).to(device)


@dataclass
class LayerRun:
    """Output, gradients by name (x, context, parameters, and the scores of injected routes), and the routes."""

    out: Tensor
    grads: dict[str, Tensor | None]
    routes: tuple[Any, Any]
    logit_size: float  # |q| |k| / sqrt(d) at its largest (of the reference; see `watch_attention`)


@contextmanager
def watch_attention() -> Iterator[list[float]]:
    """Sizes of the attention logits of the reference, max |q| max |k| / sqrt(d) in each head.

    exp makes the relative error of a logit |logit| times as large. The norms bound the logits, also where a product
    that happens to be orthogonal hides how large its terms are. The reference computes them by `@`, then softmax.
    """
    sizes, last = [0.0], [0.0]
    matmul, softmax = Tensor.__matmul__, Tensor.softmax

    def watching_matmul(a: Tensor, b: Tensor) -> Tensor:
        if a.numel() and b.numel():
            norms = (t.detach().nan_to_num(0.0, 0.0, 0.0).double().norm(dim=-1).amax(-1) for t in (a, b.mT))
            last[0] = math.prod(norms).max().item() * a.shape[-1] ** -0.5
        return matmul(a, b)

    def watching_softmax(t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(last[0])
        return softmax(t, *args, **kwargs)

    with (
        mock.patch.object(Tensor, "__matmul__", watching_matmul),
        mock.patch.object(Tensor, "softmax", watching_softmax),
    ):
        yield sizes


def run_layer(
    implementation: ModuleType,
    case: LayerCase,
    under_test: torch.dtype,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    routes: tuple[Any, Any] | None = None,
    layout: bool = False,
    **forward: Any,
) -> LayerRun:
    """Forward and backward of the layer in `dtype` (default: under_test) on data rounded to under_test.

    routes: a pair whose decisions are injected; their scores become leaves, so that their gradient is seen.
    """
    dtype = dtype or under_test
    layer = implementation.MixtureOfAttention(**case.arguments(), device=device, dtype=dtype)
    state = {name: cast(t, under_test, dtype, device) for name, t in case.state().items()}
    layer.load_state_dict(state)
    layer.eval()
    inputs = {}
    leaves: dict[str, Tensor] = {}
    for name, t in case.inputs().items():
        t = t.to(device) if name == "rotary_emb" else cast(t, under_test, dtype, device)
        if name in ("x", "context"):
            if case.layout == "expanded":
                t = t[:1].expand_as(t).clone()
            t = lay_out(t, case.layout) if layout else t
            t = leaves[name] = t.detach().requires_grad_()
        inputs[name] = t
    if routes is not None:
        wide = torch.promote_types(dtype, torch.float32)
        pair = []
        for side, r in zip(("q_scores", "kv_scores"), routes):
            scores = r.scores.detach().to(under_test).to(wide).to(device).requires_grad_()
            leaves[side] = scores
            fields = {f: getattr(r, f).to(device) for f in ("indices", "mask", "logits")}
            pair.append(implementation.Routes(fields["indices"], fields["mask"], scores, fields["logits"].detach()))
        inputs["routes"] = tuple(pair)
    with watch_attention() as sizes:
        out, found = layer(**inputs, return_routes=True, **forward)
    g = cotangent(tuple(out.shape), case.cotangent, case.seed)
    g = (
        g.to(under_test).to(dtype).to(device)
        if case.cotangent != "sum"
        else torch.ones((), dtype=dtype, device=device).expand(out.shape)
    )
    names = dict(leaves) | dict(layer.named_parameters())
    grads = torch.autograd.grad(out, list(names.values()), g, allow_unused=True)
    return LayerRun(out.detach(), dict(zip(names, grads)), found, max(sizes))


def router_tensors(
    case: RouterCase, under_test: torch.dtype, dtype: torch.dtype, device: torch.device, *, layout: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, tokens, mask = case.tensors()
    if case.layout == "expanded":
        x = x[:1].expand_as(x).clone()
    x, tokens = cast(x, under_test, dtype, device), cast(tokens, under_test, dtype, device)
    x = lay_out(x, case.layout) if layout else x
    return x.detach().requires_grad_(), tokens.requires_grad_(), None if mask is None else mask.to(device)


def oracle_layer(case: LayerCase, under_test: torch.dtype, device: torch.device, **kwargs: Any) -> LayerRun:
    """The reference in float64 on the rounded data."""
    return run_layer(reference, case, under_test, device, dtype=torch.float64, **kwargs)


def baseline_layer(case: LayerCase, under_test: torch.dtype, device: torch.device, **kwargs: Any) -> LayerRun:
    """The reference in the dtype under test (float32 on float64 data, whose error is then scaled)."""
    return run_layer(reference, case, under_test, device, dtype=BASELINE_OF.get(under_test, under_test), **kwargs)


def token_gain(*tensors: Tensor) -> float:
    """A norm makes the gradient of a token 1 / rms times as large; at least 1."""
    sizes = [t.norm(dim=-1) / t.shape[-1] ** 0.5 for t in tensors if t.numel()]
    return max([1.0, *(1 / s[s > 0].min().item() for s in sizes if (s > 0).any())])


def compare(
    actual: Any,
    exact: Any,
    baseline: Any,
    *,
    stage: str,
    dtype: torch.dtype,
    backend: str | None = None,
    amplification: float = 1.0,
    token_gain: float = 1.0,
    soft: float = 0.0,
) -> None:
    """Output (`.out`) and gradients (`.grads`, by name) of a run in `dtype` against those of the oracle.

    amplification: by how much a relative rounding error of the routing logits grows on its way into the gradients.
    Attention logits (`exact.logit_size`) do the same to everything, and a saturated softmax cancels to almost nothing.
    In half precision this would leave no bound worth the name; there the cases keep the attention logits small instead.
    token_gain: the same for a norm, see the function; of gradients that cancel only. soft: amplification in the output,
    on its way through soft scores.
    """
    precise = dtype in (torch.float64, torch.float32)
    amplification += exact.logit_size if precise else 0.0
    largest = max((g.abs().max().item() for g in exact.grads.values() if g is not None and g.numel()), default=0.0)
    scale = (1 + soft + exact.logit_size) * exact.out.abs().max().item() if precise and exact.out.numel() else 0.0
    check(
        actual.out,
        exact.out,
        baseline.out,
        stage=stage,
        name="out",
        backend=backend,
        expect=expectation(exact.out),
        scale=scale,
    )
    for name, got in actual.grads.items():
        gradient, base = exact.grads[name], baseline.grads[name]
        if gradient is None or got is None:
            given = got if gradient is None else gradient
            assert given is None or not given.any(), f"{name}: one has a gradient, the other has none"
            continue
        expect = expectation(gradient)
        terms = largest * amplification * token_gain
        eps = torch.finfo(dtype).eps
        vanishes = expect == "zeros" or (expect is None and gradient.abs().max().item() <= eps**2 * terms)
        if vanishes and got.any():
            # Softmax over one key alone: its gradient is zero by cancellation, up to rounding.
            assert got.abs().max().item() <= 8 * eps * terms, f"{name}: should cancel"
            continue
        check(
            got,
            gradient,
            base,
            stage=f"{stage}_gradient",
            name=name,
            backend=backend,
            expect=expect,
            scale=amplification * largest if precise else 0.0,
            precision=dtype,
        )


# --- kinks of the solvers --------------------------------------------------------------------------------------------


def degenerate_rows(scores: Tensor, k: float, mask: Tensor | None, tolerance: float = 1e-9) -> Tensor:
    """(B, E): rows where, up to rounding, a token is just about to saturate, so that it may count as either."""
    valid = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask[:, None].expand_as(scores)
    full = (scores >= 1 - tolerance) & valid
    all_full = full.sum(-1) == valid.sum(-1)
    touching = ((scores < 1) & full).any(-1) | ((full.sum(-1) - k).abs() <= tolerance * scores.shape[-1])
    return touching & ~(all_full & (valid.sum(-1) <= k))


def kink_free(routes: Any, case: RouterCase, mask: Tensor | None) -> bool:
    """Mass below the number of valid tokens of every row: in the band above it the iterates sit on their kinks. For
    the exact solver, no mass that the saturated tokens alone amount to: ties may then count as saturated or not.
    """
    width = case.options.get("route_block_size") or case.n
    blocks = math.ceil(case.n / width)
    k_block = math.ceil(case.k / blocks)
    mass = k_block * case.options.get("fetch_k_ratio", 9 / 8)
    valid = torch.ones(case.batch, case.n, dtype=torch.bool) if mask is None else mask.cpu()
    shown = valid.split(width, dim=-1)
    counts = torch.stack([block.sum(-1) for block in shown])
    if case.options.get("solver") == "exact":
        eps = case.options.get("eps", 0.03)
        for logits, block in zip(routes.logits.detach().double().cpu().split(width, dim=-1), shown):
            scores = reference.capped_simplex(logits, mass, block, eps=eps)
            if block.shape[-1] > k_block and degenerate_rows(scores, mass, block).any():
                return False
    return bool(((counts > mass) | (counts == 0)).all())
