"""Routed attention: values and gradients against the oracles, what must hold without one, and dropout.

Routes are built here, not by a router: distinct tokens in random order, scores in (0, 1), any slots masked. Whatever
no valid slot reads is NaN for the implementation under test: unrouted tokens, tokens of masked slots, the routes'
logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from harness import DTYPES, check, check_identical, counted
from hypothesis import example, given
from hypothesis import strategies as st
from runs import BASELINE_OF, cast, watch_softmax
from strategies import COTANGENTS, LAYOUTS, SEEDS, VALUES, cotangent, draw, generator, lay_out
from torch import Tensor

import optimized
import reference
from reference import oracle

BOTH = pytest.mark.parametrize("implementation", [reference, optimized], ids=["reference", "optimized"])
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
HALF = (torch.bfloat16, torch.float16)
SCORES = ("q_scores", "kv_scores")
NAMES = ("x", "context", "w_q", "w_kv", "w_out", "null_kv", "gamma", "context_gamma", *SCORES)
NORMS = ("both", "none", "queries", "context")
SLOTS = ("all", "random", "none_valid", "one")  # which are valid

Inputs = dict[str, Any]  # of one call: tensors by name, None where absent


@dataclass(frozen=True)
class AttentionCase:
    """One call of `routed_attention`. m: None where x is its own context. norm: which side has a gamma."""

    batch: int = 2
    n: int = 13
    m: int | None = None
    dim: int = 16
    dim_context: int = 16
    experts: int = 2
    heads: int = 2
    dim_head: int = 8
    k_q: int = 5
    k_kv: int = 7
    slots: str = "random"
    rotary: bool = False
    norm: str = "both"
    values: str = "normal"
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    cotangent: str = "dense"
    cotangent_layout: str = "contiguous"
    needs_grad: tuple[str, ...] = NAMES
    seed: int = 0

    def layout_of(self, name: str) -> str:
        return self.layout if name in ("x", "context", *SCORES) else self.weight_layout

    def leaves(self) -> Inputs:
        """Differentiable inputs in float64, clean."""
        b, e, h, d, hd = self.batch, self.experts, self.heads, self.dim_head, self.heads * self.dim_head
        dim_context = self.dim if self.m is None else self.dim_context
        g = generator(self.seed + 11)
        shapes = {
            "w_q": ((e, hd, self.dim), self.dim**-0.5),
            "w_kv": ((e, 2 * hd, dim_context), dim_context**-0.5),
            "w_out": ((e, self.dim, hd), hd**-0.5),
            "null_kv": ((2, e, h, d), 1.0),
            "gamma": ((e, self.dim), 1.0),
            "context_gamma": ((e, dim_context), 1.0),
        }
        t: Inputs = {n: torch.randn(shape, generator=g, dtype=torch.float64) * s for n, (shape, s) in shapes.items()}
        t["x"] = tokens((b, self.n, self.dim), self.values, self.seed)
        if self.m is not None:
            t["context"] = tokens((b, self.m, dim_context), self.values, self.seed + 3)
        for name, k in zip(SCORES, (self.k_q, self.k_kv)):
            t[name] = 0.05 + 0.9 * torch.rand(b, e, k, generator=g, dtype=torch.float64)
        for name, sides in (("gamma", ("both", "queries")), ("context_gamma", ("both", "context"))):
            if self.norm not in sides:
                del t[name]
        return {n: v[:1].expand_as(v).clone() if self.layout_of(n) == "expanded" else v for n, v in t.items()}

    def decisions(self) -> Inputs:
        """Indices, slot masks, rotary angles."""
        g = generator(self.seed + 13)
        out: Inputs = {"rotary_emb": 10 * torch.randn(self.n, self.dim_head, generator=g) if self.rotary else None}
        for side, k, size in (("q", self.k_q, self.n), ("kv", self.k_kv, self.n if self.m is None else self.m)):
            rows = self.batch * self.experts
            out[f"{side}_indices"] = (
                torch.rand(rows, size, generator=g).argsort(-1)[:, :k].view(self.batch, self.experts, k)
            )
            out[f"{side}_mask"] = slot_mask((self.batch, self.experts, k), self.slots, g)
        return out

    def inputs(
        self,
        device: torch.device,
        under_test: torch.dtype = torch.float64,
        dtype: torch.dtype | None = None,
        *,
        hostile: bool = False,
    ) -> Inputs:
        """Leaves rounded to under_test and held in dtype (scores in float32 at least), with decisions.

        hostile: in the case's layouts, and NaN wherever nothing valid reads.
        """
        dtype = dtype or under_test
        wide = torch.promote_types(dtype, torch.float32)
        clean = self.leaves()
        decisions = {name: None if t is None else t.to(device) for name, t in self.decisions().items()}
        out: Inputs = {name: None for name in NAMES if name != "context"} | decisions
        unread = self.unread()
        for name, t in clean.items():
            t = cast(t, under_test, wide if name in SCORES else dtype, device)
            if hostile and name in unread:
                t = t.masked_fill(unread[name][..., None].to(device), math.nan)
            t = lay_out(t, self.layout_of(name)) if hostile else t
            out[name] = t.detach().requires_grad_()
        if hostile and self.layout != "contiguous":
            for name in ("q_indices", "q_mask", "kv_indices", "kv_mask"):
                out[name] = lay_out(out[name], "transposed")
        return out

    def unread(self) -> dict[str, Tensor]:
        """(B, N) of x, (B, M) of context: True for a token that no valid slot holds."""
        d = self.decisions()
        reads = {"x": [("q", self.n)]}
        reads["x" if self.m is None else "context"] = [
            *(reads["x"] if self.m is None else []),
            ("kv", self.n if self.m is None else self.m),
        ]
        out = {}
        for name, sides in reads.items():
            read = torch.zeros(self.batch, sides[0][1], dtype=torch.bool)
            for side, _ in sides:
                for b in range(self.batch):
                    read[b, d[f"{side}_indices"][b][d[f"{side}_mask"][b]]] = True
            if self.layout == "expanded":
                read = read.any(0, keepdim=True).expand_as(read) if self.batch else read
            out[name] = ~read
        return out


def tokens(shape: tuple[int, ...], values: str, seed: int) -> Tensor:
    """As `draw`, without all-zero tokens: there RMSNorm has a gradient of about 1e12 (a test of its own)."""
    t = draw(shape, values, seed)
    t[..., 0] = torch.where((t == 0).all(-1), 1.0, t[..., 0])
    return t


def slot_mask(shape: tuple[int, ...], kind: str, g: torch.Generator) -> Tensor:
    """none_valid: no slot in one row (b, e), random elsewhere; one: a single slot of each row."""
    if kind == "all":
        return torch.ones(shape, dtype=torch.bool)
    if kind == "one":
        first = torch.randint(max(shape[-1], 1), shape[:-1], generator=g)
        return torch.arange(shape[-1]) == first[..., None]
    mask = torch.rand(shape, generator=g) < 0.7
    if kind == "none_valid" and mask.numel():
        mask.view(-1, shape[-1])[int(torch.randint(shape[0] * shape[1], (1,), generator=g))] = False
    return mask


def call(implementation: ModuleType, t: Inputs, **options: Any) -> Tensor:
    context = t["x"] if t.get("context") is None else t["context"]
    routes = []
    for side, source in (("q", t["x"]), ("kv", context)):
        indices = t[f"{side}_indices"]
        logits = torch.full((*indices.shape[:2], source.shape[1]), math.nan, device=source.device)
        routes.append(implementation.Routes(indices, t[f"{side}_mask"], t[f"{side}_scores"], logits))
    weights = {n: t[n] for n in ("w_q", "w_kv", "w_out", "null_kv", "gamma", "context_gamma", "rotary_emb")}
    return implementation.routed_attention(t["x"], context, *routes, **weights, **options)


@dataclass
class Run:
    out: Tensor
    grads: dict[str, Tensor]
    logit_size: float


def run(
    implementation: ModuleType,
    case: AttentionCase,
    under_test: torch.dtype,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    hostile: bool = False,
    **options: Any,
) -> Run:
    """Forward and backward in `dtype` (default: under_test) on data rounded to under_test.

    hostile: layouts, poison and requires_grad subset of the case; without it, everything clean and every gradient.
    """
    t = case.inputs(device, under_test, dtype, hostile=hostile)
    leaves = {n: t[n] for n in NAMES if t.get(n) is not None}
    if hostile:
        for n in leaves.keys() - set(case.needs_grad):
            leaves.pop(n).requires_grad_(False)
    with watch_softmax() as sizes:
        out = call(implementation, t, **options)
    assert out.requires_grad == bool(leaves)
    if not leaves:
        return Run(out, {}, max(sizes))
    g = cotangent(tuple(out.shape), case.cotangent, case.seed)
    if case.cotangent == "sum":
        g = torch.ones((), dtype=out.dtype, device=device).expand(out.shape)
    else:
        g = g[:1].expand_as(g).clone() if case.cotangent_layout == "expanded" else g
        g = cast(g, under_test, out.dtype, device)
        g = lay_out(g, case.cotangent_layout) if hostile else g
    return Run(out.detach(), dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), g))), max(sizes))


def expectation(exact: Tensor) -> str | None:
    """What the comparator must be told of a degenerate but legitimate oracle."""
    if exact.numel() == 0:
        return "empty"
    if not exact.any():
        return "zeros"
    return "constant" if exact.numel() > 1 and bool((exact == exact.flatten()[0]).all()) else None


def compare(actual: Run, exact: Run, baseline: Run, dtype: torch.dtype, backend: str = "torch") -> None:
    out = exact.out
    check(actual.out, out, baseline.out, stage="routed_attention", backend=backend, expect=expectation(out))
    for name, got in actual.grads.items():
        gradient = exact.grads[name]
        check(
            got,
            gradient,
            baseline.grads[name],
            stage="routed_attention_gradient",
            name=name,
            backend=backend,
            expect=expectation(gradient),
            precision=dtype,
        )


@st.composite
def attention_cases(
    draw_: st.DrawFn, *, values: tuple[str, ...] = VALUES, slots: tuple[str, ...] = SLOTS
) -> AttentionCase:
    n = draw_(st.sampled_from((1, 2, 3, 5, 8, 13, 17, 33)))
    m = draw_(st.sampled_from((None, n, 1, 4, 21)))
    size = n if m is None else m
    return AttentionCase(
        batch=draw_(st.sampled_from((1, 2, 3, 0))),
        n=n,
        m=m,
        dim=draw_(st.sampled_from((4, 16, 19))),
        dim_context=draw_(st.sampled_from((3, 16))),
        experts=draw_(st.integers(1, 3)),
        heads=draw_(st.integers(1, 3)),
        dim_head=draw_(st.sampled_from((2, 8, 10))),
        k_q=draw_(st.sampled_from(sorted({1, n // 2, n - n // 4, n}))),
        k_kv=draw_(st.sampled_from(sorted({0, 1, size // 2, size - size // 4, size}))),
        slots=draw_(st.sampled_from(slots)),
        rotary=n == size and draw_(st.booleans()),
        norm=draw_(st.sampled_from(NORMS)),
        values=draw_(st.sampled_from(values)),
        layout=draw_(st.sampled_from(LAYOUTS)),
        weight_layout=draw_(st.sampled_from(LAYOUTS)),
        cotangent=draw_(st.sampled_from(COTANGENTS)),
        cotangent_layout=draw_(st.sampled_from(LAYOUTS)),
        needs_grad=draw_(st.one_of(st.just(NAMES), st.sets(st.sampled_from(NAMES)).map(lambda s: tuple(sorted(s))))),
        seed=draw_(SEEDS),
    )


@ALL_DTYPES
@given(case=attention_cases())
@counted
def test_optimized_matches(case: AttentionCase, dtype: torch.dtype, device: torch.device) -> None:
    """Output and the gradient of every differentiable input."""
    exact = run(reference, case, dtype, device, dtype=torch.float64)
    baseline = run(reference, case, dtype, device, dtype=BASELINE_OF.get(dtype, dtype))
    actual = run(optimized, case, dtype, device, hostile=True)
    assert actual.out.dtype == dtype
    compare(actual, exact, baseline, dtype)
