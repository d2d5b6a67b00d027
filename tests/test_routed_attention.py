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

import numpy as np
import pytest
import torch
from harness import (
    BOTH,
    DTYPES,
    EVERY_KERNEL,
    HALF,
    attention_backends,
    check,
    check_identical,
    counted,
    expectation,
    interpreted,
)
from hypothesis import given
from hypothesis import strategies as st
from runs import BASELINE_OF, cast, compare, token_gain, watch_attention
from strategies import COTANGENTS, LAYOUTS, SEEDS, VALUES, cotangent, draw, generator, lay_out
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import optimized
import reference
from optimized import ops
from optimized.ops.expert_attention import _scale_backward, scale
from reference import oracle

ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
    with watch_attention() as sizes:
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


def sized_for_half(case: AttentionCase) -> AttentionCase:
    """Enough elements for the baseline's error to be typical, and attention logits that 8 bits can hold.

    For the reasons see `sized_for_half` in test_mixture.py: constant and tiny values, and one-hot cotangents, leave
    gradients that are nothing but cancellation.
    """
    m = None if case.m is None else case.m + 16
    return replace(
        case,
        batch=max(case.batch, 1),
        n=case.n + 16,
        m=m,
        k_q=case.k_q + 8,
        k_kv=case.k_kv + 6,
        dim=max(case.dim, 16),
        dim_context=16,
        heads=max(case.heads, 2),
        dim_head=max(case.dim_head, 8),
        rotary=case.rotary and m is None,
        slots="random" if case.slots == "one" else case.slots,
        norm=case.norm if case.values == "normal" else "both",
        values="normal" if case.values in ("constant", "tiny") else case.values,
        cotangent="dense" if case.cotangent == "one_hot" else case.cotangent,
    )


@EVERY_KERNEL
@pytest.mark.parametrize(("backend", "dtype"), attention_backends("routed_attention", masked=True))
@given(case=attention_cases())
@counted
def test_optimized_matches(
    kernels: str, backend: str, case: AttentionCase, dtype: torch.dtype, device: torch.device
) -> None:
    """Output and the gradient of every differentiable input, in hostile layouts, NaN wherever nothing valid reads."""
    case = sized_for_half(case) if dtype in HALF else case
    exact = run(reference, case, dtype, device, dtype=torch.float64)
    baseline = run(reference, case, dtype, device, dtype=BASELINE_OF.get(dtype, dtype))
    with optimized.use_backends(routed_attention=backend):
        actual = run(optimized, case, dtype, device, hostile=True)
    assert actual.out.dtype == dtype
    gain = token_gain(*(t for name, t in case.inputs(device).items() if name in ("x", "context") and t is not None))
    compare(actual, exact, baseline, stage="routed_attention", dtype=dtype, token_gain=gain)


@given(case=attention_cases(values=("normal", "tiny", "integer", "ties")))
@counted
def test_reference_matches_the_oracle(case: AttentionCase, device: torch.device) -> None:
    actual = run(reference, case, torch.float64, device, hostile=True)
    t = {n: v.detach().cpu().numpy() if isinstance(v, Tensor) else v for n, v in case.inputs(device).items()}
    context = t["x"] if t.get("context") is None else t["context"]
    sides = [
        oracle.Routes(t[f"{s}_indices"], t[f"{s}_mask"], t[f"{s}_scores"], np.zeros((*t[f"{s}_mask"].shape[:2], n)))
        for s, n in (("q", t["x"].shape[1]), ("kv", context.shape[1]))
    ]
    weights = {n: t[n] for n in ("w_q", "w_kv", "w_out", "null_kv", "gamma", "context_gamma", "rotary_emb")}
    exact = torch.as_tensor(oracle.routed_attention(t["x"], context, *sides, **weights), device=device)
    baseline = run(reference, case, torch.float64, device, dtype=torch.float32).out
    scale = (1 + actual.logit_size) * exact.abs().max().item() if exact.numel() else 0.0
    expect = expectation(exact)
    check(actual.out, exact, baseline, stage="routed_attention", backend="reference", expect=expect, scale=scale)


@BOTH
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(n=5, k_q=3, k_kv=4, dim=3, dim_head=2, rotary=True),
        AttentionCase(n=5, m=4, k_q=3, k_kv=3, dim=3, dim_context=2, dim_head=2, norm="none"),
    ],
    ids=["self", "cross"],
)
def test_gradcheck(implementation: ModuleType, case: AttentionCase, device: torch.device) -> None:
    t = case.inputs(device)
    names = [n for n in NAMES if t.get(n) is not None]

    def f(*leaves: Tensor) -> Tensor:
        return call(implementation, t | dict(zip(names, leaves)))

    assert torch.autograd.gradcheck(f, [t[n] for n in names], fast_mode=interpreted())


# --- what must hold without an oracle --------------------------------------------------------------------------------

CASE = AttentionCase(n=20, k_q=6, k_kv=9, rotary=True)


@BOTH
def test_probabilities_sum_to_one(implementation: ModuleType, device: torch.device) -> None:
    """All values 1 and the null value 1: every head returns 1, whatever the keys and the mask."""
    t = CASE.inputs(device)
    inner = CASE.heads * CASE.dim_head
    with torch.no_grad():
        t["kv_scores"] = torch.ones_like(t["kv_scores"])
        # An equal first channel in every token, read by the value rows alone.
        t["x"][..., 0] = 1.0
        t["gamma"] = t["context_gamma"] = None
        t["w_kv"][:, inner:] = 0
        t["w_kv"][:, inner:, 0] = 1
        t["null_kv"][1] = 1
        out = call(implementation, t)
    expected = t["w_out"].sum(-1)[None, :, None] * t["q_scores"][..., None] * t["q_mask"][..., None]
    torch.testing.assert_close(out, expected.detach(), rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.parametrize("side", ["q", "kv"])
def test_scores_of_masked_slots_are_not_read(implementation: ModuleType, side: str, device: torch.device) -> None:
    """They may be NaN: output, gradients, and 0 as their own gradient."""
    t = CASE.inputs(device)
    hidden = ~t[f"{side}_mask"]
    assert hidden.any()
    dirty = t[f"{side}_scores"].detach().masked_fill(hidden, math.nan).requires_grad_()
    found = []
    for inputs in (t, t | {f"{side}_scores": dirty}):
        out = call(implementation, inputs)
        leaves = [inputs[name] for name in NAMES if inputs.get(name) is not None]
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for clean, other in zip(*found):
        check_identical(other, clean)
    assert not found[0][0][~t["q_mask"]].any()


@BOTH
def test_masked_query_slots_are_zero_beside_nan(implementation: ModuleType, device: torch.device) -> None:
    """Where every weight is NaN, too."""
    t = CASE.inputs(device)
    out = call(implementation, t | {"null_kv": torch.full_like(t["null_kv"], math.nan)})
    assert out[t["q_mask"]].isnan().all()
    assert not out[~t["q_mask"]].any()


@BOTH
@pytest.mark.parametrize("k_kv", [0, 4])
def test_null_slot_alone(implementation: ModuleType, k_kv: int, device: torch.device) -> None:
    """No valid key, or none at all: the output is the null value, projected."""
    t = replace(CASE, k_kv=k_kv).inputs(device)
    t["kv_mask"] = torch.zeros_like(t["kv_mask"])
    out = call(implementation, t)
    null = torch.einsum("ei,eoi->eo", t["null_kv"][1].flatten(1), t["w_out"])
    expected = null[None, :, None] * (t["q_scores"] * t["q_mask"])[..., None]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@BOTH
def test_linear_in_the_values(implementation: ModuleType, device: torch.device) -> None:
    t = CASE.inputs(device)
    inner = CASE.heads * CASE.dim_head
    doubled = dict(t)
    doubled["w_kv"] = torch.cat((t["w_kv"][:, :inner], 2 * t["w_kv"][:, inner:]), 1)
    doubled["null_kv"] = torch.stack((t["null_kv"][0], 2 * t["null_kv"][1]))
    torch.testing.assert_close(call(implementation, doubled), 2 * call(implementation, t), rtol=1e-12, atol=1e-12)
    halved = t | {"q_scores": t["q_scores"] / 2}
    torch.testing.assert_close(call(implementation, halved), call(implementation, t) / 2, rtol=1e-12, atol=1e-12)


@BOTH
def test_order_of_the_slots(implementation: ModuleType, device: torch.device) -> None:
    """Permuting key slots changes nothing; permuting query slots permutes the output."""
    t = CASE.inputs(device)
    out = call(implementation, t)
    for side in ("q", "kv"):
        order = torch.randperm(t[f"{side}_mask"].shape[-1], generator=generator(1)).to(device)
        names = [f"{side}_{part}" for part in ("indices", "mask", "scores")]
        permuted = call(implementation, t | {n: t[n][..., order] for n in names})
        torch.testing.assert_close(permuted, out[:, :, order] if side == "q" else out, rtol=1e-11, atol=1e-12)


@BOTH
def test_rotation_depends_on_differences(implementation: ModuleType, device: torch.device) -> None:
    """Angles linear in the position: moving all positions changes nothing but the weight of the null key.

    The null key is not rotated, so it is made negligible here by a null key of 0 and a null value of 0 in both runs,
    and compared through the ratio of heads: without it the softmax is shift invariant.
    """
    t = CASE.inputs(device)
    frequency = torch.rand(CASE.dim_head // 2, generator=generator(2), dtype=torch.float64).repeat(2).to(device)
    position = torch.arange(CASE.n, dtype=torch.float64, device=device)[:, None]
    null = torch.zeros_like(t["null_kv"])  # logit 0 at every shift
    outs = [
        call(implementation, t | {"null_kv": null, "rotary_emb": (position + shift) * frequency})
        for shift in (0.0, 3.0, 500.0)
    ]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(outs[2], outs[0], rtol=1e-9, atol=1e-11)
    # The rotation does something: other frequencies give another output.
    assert not torch.allclose(
        call(implementation, t | {"null_kv": null, "rotary_emb": position * 2 * frequency}), outs[0]
    )


@EVERY_KERNEL
def test_value_scores(kernels: str, device: torch.device) -> None:
    """In place as beside, of more slots than a program looks at and more heads than a tile holds: 1, 0 and NaN too."""
    v, g = (draw((4, 40, 40, 64), "normal", i).to(device) for i in (1, 2))
    scores = draw((2, 2, 40), "normal", 3).to(device)
    scores[..., ::3], scores[..., 1::7], scores[..., 2::7] = 1, 0, math.nan
    by_row = scores.transpose(0, 1).reshape(4, 40, 1, 1)
    for unit in (False, True):
        scaled = scale(v.clone(), scores, unit, kernels == "triton")
        assert torch.equal(scaled.isnan(), by_row.isnan().expand_as(v))
        check_identical(scaled.nan_to_num(), (v * by_row).nan_to_num())
    scores, by_row = scores.nan_to_num(0.5), by_row.nan_to_num(0.5)
    dv = g.clone()
    dk = torch.zeros_like(dv)
    dscores = _scale_backward((dk, dv), (dk, dv), v, scores, kernels == "triton")
    check_identical(dv, g * by_row)
    sums = ((g.to(dtype) * v.to(dtype)).sum((-1, -2)).view(2, 2, 40) for dtype in (torch.float64, torch.float32))
    exact, single = (t.transpose(0, 1) for t in sums)
    check(dscores, exact, single, stage="routed_attention_gradient", name="scores")


@EVERY_KERNEL
def test_rotation_rounds_once(kernels: str, device: torch.device) -> None:
    """Tables and products stay in float32 where float16 is rotated (the interpreter would cut bfloat16 off)."""
    t = draw((2, 9, 3, 8), "normal", 1).half().to(device)
    angles = 10 * draw((9, 8), "normal", 2).to(device)
    tables = angles.cos(), angles.sin()
    once = ops.rotary(t.float(), *tables, None, False, kernels == "triton").half()
    check_identical(ops.rotary(t, *tables, None, False, kernels == "triton"), once)


class Tables(TorchDispatchMode):
    """Dtypes of the cosines and sines that operators of ours are handed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moa":
            named = zip((argument.name for argument in func._schema.arguments), args)
            self.seen |= {arg.dtype for name, arg in named if name in ("cos", "sin") and arg is not None}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "modules"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float64], ids=str)
def test_tables_are_never_in_half_precision(hooked: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Their roundings would scale all logits, which no comparison of single numbers tells from the model's own."""
    sizes = {"num_routed_queries": 3, "num_routed_key_values": 4, "num_experts": 2, "heads": 2, "dim_head": 8}
    layer = optimized.MixtureOfAttention(16, **sizes, dtype=dtype, device=device)
    if hooked:
        layer.attn.to_q.register_forward_hook(lambda *given: None)
    angles = draw((9, 8), "normal", 1).to(device, dtype)
    with Tables() as tables:
        layer(draw((1, 9, 16), "normal", 2).to(device, dtype), rotary_emb=angles)
    assert tables.seen == {torch.promote_types(dtype, torch.float32)}


@EVERY_KERNEL
def test_rotation_by_positions(kernels: str, device: torch.device) -> None:
    """Each row by the angles of its own positions, in any order and more than once."""
    t = draw((3, 5, 2, 8), "normal", 1).float().to(device)
    angles = 10 * draw((9, 8), "normal", 2).to(device)
    positions = torch.randint(9, (3, 5), generator=generator(3)).to(device)
    together = ops.rotary(t, angles.cos(), angles.sin(), positions, False, kernels == "triton")
    for row, own, turned in zip(t, angles[positions], together):
        check_identical(ops.rotary(row[None], own.cos(), own.sin(), None, False, kernels == "triton")[0], turned)


@BOTH
def test_expert_sees_its_own_parameters_only(implementation: ModuleType, device: torch.device) -> None:
    t = CASE.inputs(device)
    out = call(implementation, t)
    with torch.no_grad():
        for name in ("w_q", "w_kv", "w_out", "gamma", "context_gamma"):
            t[name][1] += 1.0
        t["null_kv"][:, 1] += 1.0
    changed = call(implementation, t)
    check_identical(changed[:, 0].detach().clone(), out[:, 0].detach().clone())
    assert not torch.equal(changed[:, 1], out[:, 1])


@BOTH
def test_all_zero_token(implementation: ModuleType, device: torch.device) -> None:
    """Finite: the floor of the norm is 1e-12, so the gradient there is about sqrt(D) * 1e12 times the incoming one."""
    t = replace(CASE, slots="all").inputs(device)
    with torch.no_grad():
        t["x"][:, 3] = 0.0
    out = call(implementation, t)
    assert out.isfinite().all()
    (gradient,) = torch.autograd.grad(out.square().sum(), t["x"])
    assert gradient.isfinite().all()


# --- dropout ---------------------------------------------------------------------------------------------------------


def kept_slots(case: AttentionCase, t: Inputs, p: float, seed: int) -> Tensor:
    """(B, E, H, Kq, 1 + Kkv) bool: which weights the optimized layer keeps under a seed, the null slot first.

    Read off the layer itself: with one-hot values for a block of d slots, the outputs are those slots' weights.
    """
    d, heads, slots = case.dim_head, case.heads, 1 + case.k_kv
    device = t["x"].device
    eye = torch.eye(heads * d, dtype=torch.float64, device=device).expand(case.experts, -1, -1)
    # Token n carries a one-hot of n in extra channels, which the value rows pick out.
    tokens = torch.eye(case.n, dtype=torch.float64, device=device).expand(case.batch, -1, -1)
    x = torch.cat((t["x"].detach(), tokens), -1)
    zeros = torch.zeros(case.experts, heads * d, case.n, dtype=torch.float64, device=device)
    w_q = torch.cat((t["w_q"], zeros), -1)
    kept = torch.zeros(case.batch, case.experts, heads, case.k_q, slots, dtype=torch.bool, device=device)
    columns = [-1, *range(case.n)]  # the null value, then tokens
    for start in range(0, len(columns), d):
        block = columns[start : start + d]
        w_v = torch.zeros(case.experts, heads, d, case.dim + case.n, dtype=torch.float64, device=device)
        null_v = torch.zeros(case.experts, heads, d, dtype=torch.float64, device=device)
        for channel, n in enumerate(block):
            if n < 0:
                null_v[..., channel] = 1
            else:
                w_v[:, :, channel, case.dim + n] = 1
        w_kv = torch.cat((torch.cat((t["w_kv"][:, : heads * d], zeros), -1), w_v.flatten(1, 2)), 1)
        probe = t | {"x": x, "w_q": w_q, "w_kv": w_kv, "gamma": None, "context_gamma": None}
        probe |= {"null_kv": torch.stack((t["null_kv"][0], null_v))}
        w_out = torch.cat((eye, torch.zeros(case.experts, case.dim + case.n - heads * d, heads * d).to(eye)), 1)
        torch.manual_seed(seed)
        out = call(optimized, probe | {"w_out": w_out}, dropout=p)[..., : heads * d]
        out = (out / t["q_scores"][..., None]).unflatten(-1, (heads, d)).transpose(2, 3)
        for channel, n in enumerate(block):
            if n < 0:
                kept[..., 0] = out[..., channel] > 0
                continue
            slot = (t["kv_indices"] == n).int().argmax(-1)
            held = (t["kv_indices"] == n).any(-1)
            for b in range(case.batch):
                for e in range(case.experts):
                    if held[b, e]:
                        kept[b, e, :, :, 1 + slot[b, e]] = out[b, e, :, :, channel] > 0
    return kept


def test_dropout_equals_the_reference_given_its_mask(device: torch.device) -> None:
    """The null slot's draw included. Norms are off, so that the probing channels do not change the logits."""
    case = AttentionCase(n=12, k_q=4, k_kv=7, dim=16, heads=2, dim_head=4, norm="none", slots="all")
    t = case.inputs(device)
    p = 0.4
    kept = kept_slots(case, t, p, seed=11)
    share = kept.double().mean().item()
    assert 0.5 < share < 0.7, "about 60 % are kept"
    assert not kept[..., 0].all(), "the null slot is dropped too"
    torch.manual_seed(11)
    actual = call(optimized, t, dropout=p)
    expected = call(reference, t, dropout=p, dropout_mask=kept)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    names = ("x", "w_q", "w_kv", "w_out", "null_kv", *SCORES)
    g = torch.randn(actual.shape, generator=generator(1), dtype=torch.float64).to(device)
    for name, a, e in zip(
        names,
        torch.autograd.grad(actual, [t[n] for n in names], g),
        torch.autograd.grad(expected, [t[n] for n in names], g),
    ):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@BOTH
def test_dropout_is_unbiased_and_fresh(implementation: ModuleType, device: torch.device) -> None:
    t = {n: v.detach() if isinstance(v, Tensor) else v for n, v in replace(CASE, batch=1).inputs(device).items()}
    plain = call(implementation, t)
    check_identical(call(implementation, t, dropout=0.0), plain.clone())
    torch.manual_seed(1)
    count = 60 if interpreted() else 400
    draws = torch.stack([call(implementation, t, dropout=0.3) for _ in range(count)])
    assert not torch.equal(draws[0], draws[1])
    torch.manual_seed(1)
    check_identical(call(implementation, t, dropout=0.3), draws[0].clone())
    error = draws.mean(0) - plain
    z = error / (draws.std(0) / count**0.5 + 1e-12)
    # Of hundreds of correlated normal deviates none should reach 6.
    assert z.abs().max() < 6
