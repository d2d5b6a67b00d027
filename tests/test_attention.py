"""The attention operator over every backend: bare kernels, lengths, windows, the merged null slot, and dropout.

The oracle is the definition: one softmax over the null slot and all visible keys, in float64, by autograd.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from harness import (
    DEVICE,
    DTYPES,
    EVERY_KERNEL,
    HALF,
    KERNELS,
    attention_backends,
    check_identical,
    counted,
    interpreted,
)
from hypothesis import example, given
from hypothesis import strategies as st
from runs import BASELINE_OF, compare
from strategies import SEEDS, draw, generator, lay_out
from torch import Tensor
from torch.utils._pytree import tree_leaves

import optimized
from optimized import ops
from optimized.attention import Adapter, Attended, Setting, adapter, calls, torch_cudnn, torch_flash
from optimized.kernels.null_slot import ROWS
from optimized.ops import null_slot
from optimized.plan import Request, obstacle

LENGTHS = ("none", "random", "some_empty", "full")
HALF_LENGTHS = ("none", "long", "full")  # a row with few keys, some dropped, has gradients that are all cancellation


@dataclass(frozen=True)
class Case:
    """One call: R = groups * per_group rows. lengths: of the keys; window -1: none."""

    groups: int = 2
    per_group: int = 2
    queries: int = 9
    keys: int = 12
    heads: int = 2
    dim_head: int = 8
    lengths: str = "none"
    null: bool = True
    window: int = -1
    causal: bool = False
    values: str = "normal"
    layout: str = "contiguous"
    seed: int = 0

    def leaves(self) -> dict[str, Tensor]:
        rows, tail = self.groups * self.per_group, (self.heads, self.dim_head)
        shapes = {"q": (rows, self.queries, *tail), "k": (rows, self.keys, *tail), "v": (rows, self.keys, *tail)}
        if self.null:
            shapes |= {"null_k": (self.groups, *tail), "null_v": (self.groups, *tail)}
        return {name: draw(shape, self.values, self.seed + i) for i, (name, shape) in enumerate(shapes.items())}

    def key_lengths(self) -> Tensor | None:
        rows = self.groups * self.per_group
        if self.lengths == "none":
            return None
        if self.lengths == "full":
            return torch.full((rows,), self.keys, dtype=torch.int32)
        least = self.keys // 2 if self.lengths == "long" else 0
        counts = torch.randint(least, self.keys + 1, (rows,), generator=generator(self.seed + 7), dtype=torch.int32)
        if self.lengths == "some_empty" and rows:
            counts[0] = 0
        return counts


@dataclass
class Run:
    out: Tensor
    grads: dict[str, Tensor]
    logit_size: float


def cotangent(case: Case) -> Tensor:
    rows = case.groups * case.per_group
    return torch.randn(
        rows, case.queries, case.heads, case.dim_head, generator=generator(case.seed + 9), dtype=torch.float64
    )


def probabilities(s: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """A softmax of logits, then with the factors of dropout; without a null slot a row may be empty."""
    p = torch.where((s > -math.inf).any(-1, keepdim=True), s.softmax(-1), 0)
    return p, p if factors is None else p * factors


def attend_by_definition(s: Tensor, v: Tensor, factors: Tensor | None) -> Tensor:
    return probabilities(s, factors)[1] @ v


class FromRoundedOutput(torch.autograd.Function):
    """The same with a gradient that takes sum_j p_j dp_j as the product of the output that was returned with its
    gradient, as every flash attention does (Dao et al. 2022, "FlashAttention: Fast and
    Memory-Efficient Exact Attention with IO-Awareness", algorithm 4).

    The output is rounded, and where few keys cancel in a gradient this rounding is most of its error: one case in
    some thousands in half precision. Autograd sums the probabilities instead, and would be no measure of it.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, v: Tensor, factors: Tensor | None) -> Tensor:
        p, kept = probabilities(s, factors)
        out = kept @ v
        ctx.save_for_backward(p, kept, v, out)
        ctx.factors = factors
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        p, kept, v, out = ctx.saved_tensors
        dp = g @ v.mT if ctx.factors is None else g @ v.mT * ctx.factors
        return p * (dp - (g * out).sum(-1, keepdim=True)), kept.mT @ g, None


class InHalf(torch.autograd.Function):
    """What flash attention makes of logits in float32: weights, output and logits' gradient rounded to half precision.

    For logits of thousands, which half precision itself knows to a dozen.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, v: Tensor, half: torch.dtype) -> Tensor:
        p = probabilities(s, None)[0]
        out = (p.to(half).to(s.dtype) @ v).to(half).to(s.dtype)
        ctx.save_for_backward(p, v, out)
        ctx.half = half
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        p, v, out = ctx.saved_tensors
        ds = (p * (g @ v.mT - (g * out).sum(-1, keepdim=True))).to(ctx.half).to(g.dtype)
        return ds, p.to(ctx.half).to(g.dtype).mT @ g, None


def definition(
    case: Case,
    dtype: torch.dtype,
    under_test: torch.dtype,
    device: torch.device,
    keep: Tensor | None = None,
    attend: Callable[..., Tensor] | None = None,
) -> Run:
    """keep (R, H, L, 1 + S): factors on the probabilities, the null slot's first. attend: from logits and values."""
    t = {n: x.to(under_test).to(dtype).to(device).requires_grad_() for n, x in case.leaves().items()}
    q, k, v = t["q"], t["k"], t["v"]
    visible = torch.ones(q.shape[0], case.queries, case.keys, dtype=torch.bool, device=device)
    lengths = case.key_lengths()
    if lengths is not None:
        visible &= (torch.arange(case.keys) < lengths[:, None]).to(device)[:, None]
    if case.window >= 0:
        distance = torch.arange(case.queries, device=device)[:, None] - torch.arange(case.keys, device=device)
        visible &= (distance <= case.window) & (distance >= (0 if case.causal else -case.window))
    if case.null:
        k, v = (torch.cat((t[f"null_{n}"].repeat_interleave(case.per_group, 0)[:, None], t[n]), 1) for n in "kv")
        visible = F.pad(visible, (1, 0), value=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    s = (q @ k.mT * case.dim_head**-0.5).masked_fill(~visible[:, None], -math.inf)
    factors = None if keep is None else (keep if case.null else keep[..., 1:]).to(dtype)
    if attend is None:
        attend = attend_by_definition if dtype == torch.float64 else FromRoundedOutput.apply
    out = attend(s, v, factors).transpose(1, 2)
    size = math.prod(x.detach().norm(dim=-1).max().item() if x.numel() else 0.0 for x in (q, k)) * case.dim_head**-0.5
    size += math.log(1 + case.keys)  # exp(s - lse) makes an absolute error of the lse a relative one
    g = cotangent(case).to(under_test).to(dtype).to(device)
    return Run(out.detach(), dict(zip(t, torch.autograd.grad(out, list(t.values()), g, allow_unused=True))), size)


def operator(
    case: Case, backend: str, kernels: str, dtype: torch.dtype, device: torch.device, dropout: float = 0.0
) -> tuple[Run, Tensor]:
    """The run, and the null slot's draws."""
    t = {n: lay_out(x.to(dtype).to(device), case.layout).requires_grad_() for n, x in case.leaves().items()}
    lengths = case.key_lengths()
    lengths = None if lengths is None else lengths.to(device)
    arguments = (t["q"], t["k"], t["v"], t.get("null_k"), t.get("null_v"), lengths, None)
    out, _, keep, _ = ops.attention(*arguments, dropout, case.window, case.causal, backend, kernels == "triton")
    g = cotangent(case).to(dtype).to(device)
    return Run(out.detach(), dict(zip(t, torch.autograd.grad(out, list(t.values()), g))), 0.0), keep


def compare_with_the_definition(
    case: Case, backend: str, kernels: str, dtype: torch.dtype, device: torch.device
) -> None:
    exact = definition(case, torch.float64, dtype, device)
    baseline = definition(case, BASELINE_OF.get(dtype, dtype), dtype, device)
    actual, _ = operator(case, backend, kernels, dtype, device)
    assert actual.out.dtype == dtype
    compare(actual, exact, baseline, stage="routed_attention", dtype=dtype)


@st.composite
def cases(draw_: st.DrawFn) -> Case:
    return Case(
        groups=draw_(st.integers(1, 3)),
        per_group=draw_(st.sampled_from((1, 2, 3))),
        # Around the queries of one program of the merge, and the blocks of flash kernels.
        queries=draw_(st.sampled_from((1, 2, 9, 17, ROWS - 1, ROWS, ROWS + 1, 129))),
        keys=draw_(st.sampled_from((1, 2, 9, 32, 33, 63, 65, 130))),
        heads=draw_(st.integers(1, 3)),
        dim_head=draw_(st.sampled_from((1, 2, 8, 10, 16, 64))),
        values=draw_(st.sampled_from(("normal", "integer", "ties", "outlier", "tiny"))),
        layout=draw_(st.sampled_from(("contiguous", "transposed", "sliced", "unaligned"))),
        seed=draw_(SEEDS),
    )


def merged_by(**request: Any) -> list[Any]:
    """Every backend with the null slot merged by PyTorch, and by the kernel; interpreted, that is run with one."""
    every = attention_backends("routed_attention", **request)
    merged = [(k, p) for k in KERNELS for p in every if k == "torch" or DEVICE.type == "cuda" or p.values[0] == "math"]
    return [pytest.param(k, *p.values, id=f"{k}-{p.id}") for k, p in merged]


def affordable(case: Case, kernels: str) -> Case:
    """An interpreted program takes milliseconds, and there is one for every row, head and 64 queries."""
    if kernels == "torch" or DEVICE.type == "cuda":
        return case
    return replace(case, groups=min(case.groups, 2), per_group=1, heads=min(case.heads, 2))


def for_half(case: Case, dtype: torch.dtype) -> Case:
    """Half precision: enough elements for a typical error, and attention logits that 8 bits can hold."""
    if dtype not in HALF:
        return case
    return replace(
        case,
        queries=case.queries + 16,
        keys=case.keys + 16,
        heads=max(case.heads, 2),
        dim_head=max(case.dim_head, 8),
        values="normal" if case.values in ("tiny", "outlier") else case.values,
    )


@pytest.mark.parametrize(("kernels", "backend", "dtype"), merged_by())
@given(case=cases(), null=st.booleans())
@example(case=Case(groups=1, per_group=1, queries=1, keys=1, heads=1, dim_head=1, values="outlier"), null=True)
@counted
def test_every_key(
    kernels: str, backend: str, case: Case, null: bool, dtype: torch.dtype, device: torch.device
) -> None:
    case = replace(affordable(for_half(case, dtype), kernels), null=null)
    compare_with_the_definition(case, backend, kernels, dtype, device)


@pytest.mark.parametrize(("kernels", "backend", "dtype"), merged_by(masked=True))
@given(case=cases(), lengths=st.sampled_from(LENGTHS))
@example(case=Case(keys=0, lengths="full"), lengths="full")
@example(case=Case(per_group=0), lengths="random")
# Four keys of 17, of which a query's gradient cancels: by flash in float16 it was beyond a budget measured by autograd.
@example(case=Case(groups=1, keys=1, heads=3, dim_head=1, seed=1048575), lengths="random")
@counted
def test_lengths(
    kernels: str, backend: str, case: Case, lengths: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Rows without any key included: they see the null slot alone."""
    if case.keys and case.per_group:
        case = affordable(for_half(case, dtype), kernels)
    compare_with_the_definition(replace(case, lengths=lengths), backend, kernels, dtype, device)


@EVERY_KERNEL
def test_queries_beyond_a_program(kernels: str, device: torch.device) -> None:
    """The last program of the merge has a few of its queries."""
    case = Case(per_group=1, queries=ROWS + 5, keys=3, heads=1)
    compare_with_the_definition(case, "math", kernels, torch.float64, device)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "unaligned", "gapped"])
def test_a_backend_is_handed_rows_that_it_can_load(
    layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 bytes at a time, as the flash kernels do; a row that starts elsewhere ends their process, or is read askew."""
    backend, handed = adapter("math"), []
    monkeypatch.setattr(backend, "alignment", Adapter.alignment)  # as of a flash kernel, of which the CPU has none

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*given: Any) -> Any:
            handed.append([t for t in tree_leaves(given) if isinstance(t, Tensor) and t.ndim == 4])
            return call(*given)

        return made

    for direction in ("forward", "backward"):
        monkeypatch.setattr(backend, direction, noted(getattr(backend, direction)))
    case = Case(dim_head=8, null=False)
    t = {n: lay_out(x.float().to(device), layout).requires_grad_() for n, x in case.leaves().items()}
    out = ops.attention(*t.values(), None, None, None, None, 0.0, -1, False, "math", False)[0]
    torch.autograd.grad(out, list(t.values()), lay_out(cotangent(case).float().to(device), layout))
    assert [len(tensors) for tensors in handed] == [3, 7]  # q, k, v; dout, q, k, v, out, dk, dv
    for tensor in (tensor for tensors in handed for tensor in tensors):
        assert tensor.stride(-1) == 1
        assert tensor.data_ptr() % 16 == 0
        assert all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])


def test_a_backend_is_handed_lengths_side_by_side(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn 4 refuses others. One row of a transposed table has the stride of its columns."""
    backend, strides = adapter("math"), []

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*given: Any) -> Any:
            strides.extend(s.visible.lengths.stride() for s in given if isinstance(s, Setting))
            return call(*given)

        return made

    for direction in ("forward", "backward"):
        monkeypatch.setattr(backend, direction, noted(getattr(backend, direction)))
    case = Case(dim_head=8, null=False)
    t = {n: x.float().to(device).requires_grad_() for n, x in case.leaves().items()}
    lengths = torch.ones(len(t["q"]), 3, dtype=torch.int32, device=device)[:, 1]
    out = ops.attention(*t.values(), None, None, lengths, None, 0.0, -1, False, "math", False)[0]
    torch.autograd.grad(out, list(t.values()), cotangent(case).float().to(device))
    assert strides == [(1,), (1,)]


@EVERY_KERNEL
def test_rows_without_keys_are_the_null_value(kernels: str, device: torch.device) -> None:
    """Whatever a kernel leaves in their output and log-sum-exp."""
    case = Case(groups=1, per_group=3, queries=5)
    t = {n: x.to(device) for n, x in case.leaves().items()}
    lengths = torch.tensor([0, 4, 0], dtype=torch.int32, device=device)
    out = t["q"].clone()
    lse = torch.zeros(3, case.heads, case.queries, dtype=torch.float64, device=device)
    null = t["null_k"], t["null_v"]
    expected = null_slot.merge(t["q"], null, out, lse, None, lengths, kernels == "triton")
    out[0], out[2], lse[0], lse[2] = math.nan, math.inf, -math.inf, 7.0
    merged = null_slot.merge(t["q"], null, out, lse, None, lengths, kernels == "triton")
    for actual, clean in zip(merged, expected):
        check_identical(actual, clean)
    check_identical(merged[0][::2], t["null_v"].expand(2, case.queries, -1, -1))


@EVERY_KERNEL
def test_gradient_of_the_null_slot_rounds_once(kernels: str, device: torch.device) -> None:
    """It is a sum over rows and queries: in float32, whatever the dtype of these."""
    case = Case(per_group=3, queries=ROWS + 5)
    half = [x.half().to(device) for x in case.leaves().values()]
    setting = (0.0, -1, False, "math", kernels == "triton")
    out, lse, *rest = ops.attention(*half, None, None, *setting)
    g = cotangent(case).half().to(device)
    runs, all_of_them = [], 2**5 - 1
    for dtype in (torch.float16, torch.float32):
        leaves, sent, seen = [x.to(dtype) for x in half], g.to(dtype), out.to(dtype)
        saved = *leaves, None, None, seen, lse, *rest
        runs.append(ops.attention.backward(sent, *saved, *setting, all_of_them)[3:])
    for low, once in zip(*runs):
        check_identical(low, once.half())


@pytest.mark.parametrize(("backend", "dtype"), attention_backends("routed_attention", masked=True))
def test_hidden_keys_reach_nothing(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Other finite values behind the length change no bit, and their gradients are 0."""
    case = Case(queries=20, keys=33, dim_head=16, lengths="some_empty", layout="contiguous")
    runs = []
    for shift in (0.0, 3.0, 3e4):  # logits beyond any finite sentinel
        t = {n: x.to(dtype).to(device) for n, x in case.leaves().items()}
        lengths = case.key_lengths().to(device)
        hidden = torch.arange(case.keys, device=device) >= lengths[:, None]
        for name in ("k", "v"):
            t[name] = t[name] + shift * hidden[..., None, None].to(dtype)
        t = {n: x.detach().requires_grad_() for n, x in t.items()}
        rest = (None, 0.0, -1, False, backend, False)
        out = ops.attention(t["q"], t["k"], t["v"], t["null_k"], t["null_v"], lengths, *rest)[0]
        grads = torch.autograd.grad(out, list(t.values()), cotangent(case).to(dtype).to(device))
        assert not grads[1][hidden].any()
        assert not grads[2][hidden].any()
        runs.append(out.detach())
    for other in runs[1:]:
        check_identical(other, runs[0])


@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
def test_null_slot_takes_queries_in_any_order_of_memory(triton: bool, device: torch.device) -> None:
    """A projection that was called as a module leaves them in another, where rows of a group are no view."""
    case = Case(groups=2, per_group=2, queries=3, keys=2, dim_head=8, layout="contiguous")
    t = {name: x.to(device) for name, x in case.leaves().items()}
    q, null, dq = t["q"], (t["null_k"], t["null_v"]), torch.zeros_like(t["q"])
    out, g = torch.ones_like(q), cotangent(case).to(device)
    lse = torch.ones(q.shape[0], q.shape[2], q.shape[1], dtype=q.dtype, device=device)
    for order in itertools.permutations(range(4)):
        back = [order.index(i) for i in range(4)]
        stored = q.permute(order).contiguous().permute(back)
        runs = [null_slot.merge_backward(x, null, out, lse, None, g, dq.clone(), triton) for x in (stored, q)]
        for other, plain in zip(*runs):
            torch.testing.assert_close(other, plain, rtol=1e-12, atol=1e-12)


# In half precision a logit of hundreds has no digit left.
@pytest.mark.parametrize(("kernels", "backend", "dtype"), [p for p in merged_by() if p.values[2] not in HALF])
@pytest.mark.parametrize("seed", range(3))
def test_saturated_softmax_cancels(
    kernels: str, backend: str, seed: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Logits in the hundreds: one weight is 1, and its dP - delta is 0 only if the weights of the output sum to 1.

    Weights exp(s - lse) are off by |lse| eps, which the gradient of a saturated row has nothing to hide behind.
    """
    case = Case(queries=9, keys=12, per_group=1, values="large", seed=seed)
    compare_with_the_definition(case, backend, kernels, dtype, device)


# --- logits far from 0, and the last tile of keys --------------------------------------------------------------------

TILE = torch_cudnn.TILE
# All that a tile can hold; of libraries for the CPU, which know no tile: around their vectors, and beyond.
EVERY = range(1, TILE + 3 if DEVICE.type == "cuda" else 19)
NUMBERS_OF_KEYS = {*EVERY, TILE // 2, TILE + TILE // 2, 2 * TILE + TILE // 2}
OFFSETS = (-3000.0, -300.0, -90.0, -30.0, 30.0, 300.0, 3000.0)


@dataclass(frozen=True)
class Shifted(Case):
    """A channel of all queries and keys makes every logit, the null slot's too, about `offset`.

    A key that is hidden by zeros has the logit 0 then: exp(0 - lse) overflows where the log-sum-exp is far below.
    """

    offset: float = 0.0

    @property
    def root(self) -> float:
        """In few enough digits for half precision."""
        return float(torch.tensor((abs(self.offset) * self.dim_head**0.5) ** 0.5, dtype=torch.bfloat16))

    def leaves(self) -> dict[str, Tensor]:
        t = super().leaves()
        t["q"][..., 0] = self.root
        for name in {"k", "null_k"} & t.keys():
            t[name][..., 0] = math.copysign(self.root, self.offset)
        return t


def check_shifted(case: Shifted, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    actual, _ = operator(case, backend, "torch", dtype, device)
    for name, t in {"out": actual.out, **actual.grads}.items():
        assert t.isfinite().all(), name
    exact = definition(case, torch.float64, dtype, device)
    if dtype not in HALF:
        baseline = definition(case, BASELINE_OF.get(dtype, dtype), dtype, device)
        compare(actual, exact, baseline, stage="routed_attention", dtype=dtype)
        return
    baseline = definition(case, torch.float32, dtype, device, attend=lambda s, v, _: InHalf.apply(s, v, dtype))
    baseline = Run(baseline.out.to(dtype), {n: g.to(dtype) for n, g in baseline.grads.items()}, 0.0)
    # To the first channel of q the gradient comes by root times the sum of the logits' gradients, which is 0: what is
    # left are the roundings of the weights, |lse| eps in float32, and of delta. No statistic, but bounded.
    first = [run.grads["q"][..., 0].clone() for run in (actual, exact)]
    for run in (actual, exact, baseline):
        run.grads["q"][..., 0] = 0
    terms = case.root * largest_logit_gradient(case)
    rounding = torch.finfo(dtype).eps + abs(case.offset) * torch.finfo(torch.float32).eps
    assert (first[0] - first[1]).abs().max() <= 8 * rounding * terms
    compare(actual, exact, baseline, stage="routed_attention", dtype=dtype, amplification=case.root)


def largest_logit_gradient(case: Case) -> float:
    """At most, added up over the keys of a query: |g| |v| / sqrt(d), whatever the weights are."""
    v = max(t.norm(dim=-1).max() for name, t in case.leaves().items() if name in ("v", "null_v"))
    return (2 * cotangent(case).norm(dim=-1).max() * v / case.dim_head**0.5).item()


@pytest.mark.parametrize(("backend", "dtype"), attention_backends("routed_attention"))
@given(
    keys=st.integers(1, 4 * TILE),
    offset=st.sampled_from(OFFSETS),
    null=st.booleans(),
    dim_head=st.sampled_from((8, 64)),
    seed=SEEDS,
)
@example(keys=26, offset=-3000.0, null=False, dim_head=8, seed=0)
@counted
def test_logits_far_from_zero(
    backend: str,
    keys: int,
    offset: float,
    null: bool,
    dim_head: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Of either sign: gradients are finite, and within the budget of the definition in float64."""
    case = Shifted(queries=25, keys=keys, dim_head=dim_head, null=null, per_group=1, seed=seed, offset=offset)
    check_shifted(case, backend, dtype, device)


@pytest.mark.parametrize("null", [True, False])
@pytest.mark.parametrize(("backend", "dtype"), attention_backends("routed_attention"))
def test_negative_logits_and_every_last_tile(
    backend: str, null: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Of cuDNN's own backward dq was NaN where 64 keys are left over by 128 and a log-sum-exp is below -88.7."""
    for keys in NUMBERS_OF_KEYS:
        case = Shifted(groups=1, per_group=1, queries=9, keys=keys, null=null, seed=keys, offset=-300.0)
        check_shifted(case, backend, dtype, device)


@pytest.mark.parametrize("keys", [TILE // 2, TILE, TILE + TILE // 2])
@pytest.mark.parametrize(("backend", "dtype"), attention_backends("routed_attention"))
def test_negative_logits_of_a_layer(backend: str, dtype: torch.dtype, keys: int, device: torch.device) -> None:
    """All about -1000: gradients of the tokens and of the projection of queries are finite, and not all 0."""
    arguments = {"num_routed_queries": 20, "num_routed_key_values": keys, "num_experts": 2, "heads": 2, "dim_head": 8}
    layer = optimized.MixtureOfAttention(
        16, **arguments, prenorm=False, dropout=0.0, cosine_sim_routing=True, device=device, dtype=dtype
    )
    root = (1000 * 8**0.5) ** 0.5
    with torch.no_grad():  # the first channel of every head is the first of a token, which is 1, times this
        q, k = layer.attn.to_q.weight.view(2, 2, 8, 16), layer.attn.to_kv.weight.view(2, 2, 2, 8, 16)[:, 0]
        for weight, factor in ((q, root), (k, -root)):
            weight[..., 0, :] = 0
            weight[..., 0, 0] = factor
        layer.attn.null_kv[0, ..., 0] = -root
    x = draw((2, keys + 30, 16), "normal", keys)
    x[..., 0] = 1
    x = x.to(dtype).to(device).requires_grad_()
    with optimized.use_backends(routed_attention=backend), log_sum_exps() as logits:
        layer(x).backward(draw(tuple(x.shape), "normal", 1).to(dtype).to(device))
    assert max(logits) < -500
    for gradient in (x.grad, layer.attn.to_q.weight.grad):
        assert gradient.isfinite().all()
        assert gradient.any()


@contextmanager
def log_sum_exps() -> Iterator[list[float]]:
    """Of each call of a library, the largest that it returned."""
    found: list[float] = []

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any) -> Any:
            out, lse, *rest = call(*given)
            found.append(lse.max().item())
            return out, lse, *rest

        return noted

    own = adapter("triton_kernel")  # which has the null slot inside
    with (
        mock.patch.object(calls, "forward", noting(calls.forward)),
        mock.patch.object(own, "attend", noting(own.attend)),
    ):
        yield found


def test_cudnn_hands_over_where_it_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """To `torch_flash`, with all that it was given, and nowhere else."""
    called: list[tuple[str, int]] = []
    dout = torch.ones(1, 2, 3, 8)
    kv = torch.zeros(1, 4 * TILE, 3, 8)
    lse, state = torch.zeros(1, 3, 2), torch.zeros(0, dtype=torch.int64)

    def of_flash(*handed: Any) -> Any:
        called.append(("flash", handed[1].k.shape[1]))
        assert len(handed) == 4
        assert all(mine is theirs for mine, theirs in zip((dout, done, setting, into), handed))
        return handed[1][:3]

    def of_cudnn(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float) -> Any:
        called.append(("cudnn", k.shape[2]))
        assert scale == setting.scale
        return q, k, v

    setting = Setting(scale=0.5)
    monkeypatch.setattr(torch_flash.ADAPTER, "backward", of_flash)
    monkeypatch.setattr(torch_cudnn, "aten", SimpleNamespace(_scaled_dot_product_cudnn_attention_backward=of_cudnn))
    for keys in range(1, 4 * TILE + 1):
        k, v = (t[:, :keys] for t in (kv, kv))
        into = torch.empty_like(k), torch.empty_like(v)
        done = Attended(torch.zeros_like(dout), k, v, dout, lse, state)
        found = torch_cudnn.ADAPTER.backward(dout, done, setting, into)
        assert [t.shape for t in found] == [dout.shape, k.shape, v.shape]
    assert called == [("flash" if k % 128 == 64 else "cudnn", k) for k in range(1, 4 * TILE + 1)]


WINDOWED = [
    p for p in attention_backends("local_attention") if not p.values[0].startswith(("banded", "flex", "triton"))
]


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "dtype"), WINDOWED)
@given(case=cases(), window=st.sampled_from((0, 1, 5, 31, 64, 200)), causal=st.booleans())
@counted
def test_windows(backend: str, case: Case, window: int, causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    case = for_half(case, dtype)
    case = replace(case, keys=case.queries, window=min(window, case.queries - 1), causal=causal, null=False)
    compare_with_the_definition(case, backend, "torch", dtype, device)


# --- dropout ---------------------------------------------------------------------------------------------------------


def kept_keys(case: Case, backend: str, dtype: torch.dtype, device: torch.device, dropout: float, seed: int) -> Tensor:
    """(R, H, L, S) bool: the kernel's own draw after a seed.

    Drawn again with equal logits, so that every probability is the same, and values that are the rows of an identity:
    a channel of the output is positive exactly where its key is kept.
    """
    t = {n: x.to(dtype).to(device) for n, x in case.leaves().items()}
    lengths = case.key_lengths()
    lengths = None if lengths is None else lengths.to(device)
    parts = []
    for start in range(0, case.keys, case.dim_head):
        v = torch.zeros_like(t["v"])
        for c in range(min(case.dim_head, case.keys - start)):
            v[:, start + c, :, c] = 1
        torch.manual_seed(seed)
        rest = (lengths, None, dropout, -1, False, backend, False)
        parts.append(ops.attention(torch.zeros_like(t["q"]), t["k"], v, None, None, *rest)[0])
    return torch.cat(parts, -1)[..., : case.keys].transpose(1, 2) > 0


DROPPING = attention_backends("routed_attention", masked=True, dropout=0.4)


def dropout_cases() -> Iterator[Any]:
    for p in DROPPING:
        half = p.values[1] in HALF
        for lengths in HALF_LENGTHS if half else LENGTHS:
            for keys in (40, 150) if half else (7, 40, 150):
                yield pytest.param(*p.values, lengths, keys, id=f"{p.id}-{lengths}-{keys}")


@EVERY_KERNEL
@pytest.mark.parametrize(("backend", "dtype", "lengths", "keys"), [*dropout_cases()])
def test_dropout_given_the_kernels_own_draw(
    kernels: str, backend: str, lengths: str, keys: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Output and every gradient as by the definition with the extracted mask, the null slot's draw included."""
    dropout = 0.4
    case = Case(queries=25, keys=keys, dim_head=16, lengths=lengths, seed=3)
    kept = kept_keys(case, backend, dtype, device, dropout, seed=11)
    torch.manual_seed(11)
    actual, null = operator(case, backend, kernels, dtype, device, dropout)
    assert ((null == 0) | ((null - 1 / (1 - dropout)).abs() < 1e-6)).all()
    assert 0.4 < (null > 0).double().mean() < 0.8, "about 60 % are kept"
    if lengths in ("none", "full"):
        assert 0.5 < kept.double().mean() < 0.7
    keep = torch.cat((null[..., None].double(), kept.double() / (1 - dropout)), -1)
    exact = definition(case, torch.float64, dtype, device, keep)
    baseline = definition(case, BASELINE_OF.get(dtype, dtype), dtype, device, keep)
    compare(actual, exact, baseline, stage="routed_attention", dtype=dtype)


@pytest.fixture
def three_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of 65535, beyond which a backend's grid ends: 70,000 items of a batch were refused on a GPU."""
    monkeypatch.setattr(calls, "MOST_ROWS", 3)


@pytest.mark.usefixtures("three_rows_at_a_time")
@pytest.mark.parametrize("lengths", ["none", "some_empty"])
@pytest.mark.parametrize(("backend", "dtype"), attention_backends("routed_attention", masked=True))
def test_more_rows_than_a_backend_takes(backend: str, dtype: torch.dtype, lengths: str, device: torch.device) -> None:
    case = Case(groups=2, per_group=5, queries=25, keys=40, dim_head=16, lengths=lengths)
    compare_with_the_definition(for_half(case, dtype), backend, "torch", dtype, device)


@pytest.mark.usefixtures("three_rows_at_a_time")
@pytest.mark.parametrize(("backend", "dtype"), DROPPING)
def test_dropout_of_more_rows_than_a_backend_takes(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Each part has a draw of its own, and its backward the same."""
    test_dropout_given_the_kernels_own_draw("torch", backend, "full", 40, dtype, device)


@pytest.mark.parametrize(("backend", "dtype"), DROPPING)
def test_every_call_draws_anew(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(queries=25, keys=40, dim_head=16)
    torch.manual_seed(5)
    first, _ = operator(case, backend, "torch", dtype, device, 0.4)
    second, _ = operator(case, backend, "torch", dtype, device, 0.4)
    assert not torch.equal(first.out, second.out)
    torch.manual_seed(5)
    again, _ = operator(case, backend, "torch", dtype, device, 0.4)
    check_identical(again.out, first.out)


@pytest.mark.parametrize(("backend", "dtype"), DROPPING)
def test_every_weight_has_its_own_draw(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Rows, heads, queries and keys: none shares a draw with its neighbour; likewise the null slot's."""
    case = Case(queries=25, keys=40, dim_head=16)
    kept = kept_keys(case, backend, dtype, device, 0.4, seed=5).float()
    null = operator(case, backend, "torch", dtype, device, 0.4)[1].sign()
    for draws in (kept, null):
        for dim in range(draws.ndim):
            agreement = (draws == draws.roll(1, dim)).double().mean()
            assert agreement < 0.7, f"neighbours in dimension {dim}: independent draws agree in 52 %"


# --- what the layer promises -----------------------------------------------------------------------------------------


@EVERY_KERNEL
@pytest.mark.parametrize("lengths", ["none", "some_empty"])
@pytest.mark.parametrize("null", [True, False])
def test_gradcheck(kernels: str, lengths: str, null: bool, device: torch.device) -> None:
    """The null slot's terms by finite differences in float64; the kernels themselves, not a fallback."""
    case = Case(queries=2, keys=3, per_group=1, heads=1, dim_head=2, lengths=lengths, null=null)
    leaves = {n: x.to(device).requires_grad_() for n, x in case.leaves().items()}
    counts = case.key_lengths()
    counts = None if counts is None else counts.to(device)

    def f(*given: Tensor) -> Tensor:
        t: dict[str, Any] = dict(zip(leaves, given))
        arguments = (t["q"], t["k"], t["v"], t.get("null_k"), t.get("null_v"), counts, None)
        return ops.attention(*arguments, 0.0, -1, False, "math", kernels == "triton")[0]

    assert torch.autograd.gradcheck(f, tuple(leaves.values()), fast_mode=interpreted())


@EVERY_KERNEL
def test_only_the_output_is_differentiable(kernels: str, device: torch.device) -> None:
    """A loss on the log-sum-exp would get a gradient of zero without a word."""
    case = Case(queries=2, keys=3)
    t = {n: x.to(device).requires_grad_() for n, x in case.leaves().items()}
    for attend in (ops.attention, torch.ops.moa.attention):
        out, *rest = attend(*t.values(), None, None, 0.0, -1, False, "math", kernels == "triton")
        assert out.requires_grad
        assert not any(other.requires_grad for other in rest)


@pytest.mark.parametrize(("backend", "dtype"), attention_backends("routed_attention"))
def test_bitwise_run_to_run(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """The forward always; the backward in PyTorch's deterministic mode."""
    case = Case(queries=300, keys=700, heads=4, dim_head=64)
    if device.type == "cpu":  # a few blocks of its kernels; a GPU has to be full
        case = replace(case, per_group=1, queries=70, heads=2, dim_head=16)
    plain, _ = operator(case, backend, "torch", dtype, device)
    check_identical(operator(case, backend, "torch", dtype, device)[0].out, plain.out)
    torch.use_deterministic_algorithms(True)
    try:
        refused = obstacle("routed_attention", backend, Request(device, dtype, case.dim_head))
        assert refused is None or (backend == "torch_cudnn" and "deterministic" in refused)
        if refused:
            return
        runs = [operator(case, backend, "torch", dtype, device)[0] for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    check_identical(plain.out, runs[0].out)
    for other in runs[1:]:
        check_identical(other.out, runs[0].out)
        for name, g in other.grads.items():
            check_identical(g, runs[0].grads[name])


def test_every_dtype_has_a_backend() -> None:
    """With dropout and with lengths; every cell of the matrix in the documentation is served."""
    for dropout in (0.0, 0.1):
        for masked in (False, True):
            served = {p.values[1] for p in attention_backends("routed_attention", masked=masked, dropout=dropout)}
            assert served == set(DTYPES)
