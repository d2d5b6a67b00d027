"""The operators under torch.ops.moa one by one, and the layer under PyTorch's transforms: compile, vmap, grad, forward
mode and double backward. What a transform can't do must raise: a tangent that is dropped is a wrong answer.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import harness
import pytest
import torch
from harness import HALF, check_identical
from runs import baseline_layer, compare, oracle_layer, run_layer
from strategies import LayerCase, draw, draw_mask, generator, lay_out
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import optimized
import reference
from optimized import ops

# --- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Arguments of an operator. n = 0 and batch = 0 are legal in the layer, and so here, but a top-k needs a token."""

    dtype: torch.dtype = torch.float64
    masked: bool = False
    layout: str = "contiguous"
    batch: int = 2
    n: int = 6
    experts: int = 3

    def floats(self, *shape: int, seed: int = 0) -> Tensor:
        return lay_out(draw(shape, "normal", seed).to(self.dtype), self.layout)

    def token_mask(self) -> Tensor | None:
        if not self.masked:
            return None
        mask = draw_mask(self.batch, self.n, "random", 5)
        return mask.T.contiguous().T if self.layout != "contiguous" else mask

    def routing(self) -> tuple[Tensor, Tensor, Tensor]:
        """indices and mask (B, E, K), inverse (B, E, N)."""
        k = min(4, self.n)
        rows = [torch.randperm(self.n, generator=generator(r))[:k] for r in range(self.batch * self.experts)]
        indices = torch.stack(rows) if rows else torch.empty(0, k, dtype=torch.int64)
        indices = indices.view(self.batch, self.experts, k)
        mask = torch.ones_like(indices, dtype=torch.bool)
        if self.masked:
            mask = torch.rand(indices.shape, generator=generator(9)) < 0.6
        inverse = ops.inverse_map(indices, mask, self.n)
        if self.layout != "contiguous":
            indices, mask, inverse = (t.mT.contiguous().mT for t in (indices, mask, inverse))
        return indices, mask, inverse


DESCENT = (3.375, 6, 0.1, 4.0, 0.7)  # k, n_iters, eps, eps_init, eps_decay


def sample_descent(s: Sample) -> tuple[Any, ...]:
    return (s.floats(s.batch, s.experts, s.n), s.token_mask(), *DESCENT, s.masked)  # masked ones by Triton


def sample_descent_backward(s: Sample) -> tuple[Any, ...]:
    logits, mask, k, _, *epsilons = sample_descent(s)
    saved = torch.ops.moa.coordinate_descent(logits, mask, *DESCENT)  # epsilons end with who computes
    return (s.floats(s.batch, s.experts, s.n, seed=1), logits, mask, *saved, k, *epsilons)


def sample_capped(s: Sample) -> tuple[Any, ...]:
    return s.floats(s.batch, s.experts, s.n), s.token_mask(), 3.375, 0.5, s.masked


def sample_capped_backward(s: Sample) -> tuple[Any, ...]:
    logits, mask, k, eps, triton = sample_capped(s)
    saved = torch.ops.moa.capped_simplex(logits, mask, k, eps)
    return (s.floats(s.batch, s.experts, s.n, seed=1), logits, mask, *saved, eps, triton)


def sample_select(s: Sample) -> tuple[Any, ...]:
    return s.floats(s.batch, s.experts, s.n), s.token_mask(), min(4, s.n), s.masked


def sample_dispatch(s: Sample) -> tuple[Any, ...]:
    return (s.floats(s.batch, s.n, 5), *s.routing())


def sample_collect(s: Sample) -> tuple[Any, ...]:
    routing = s.routing()
    return (s.floats(s.experts, s.batch, routing[0].shape[-1], 5), *routing)


def routing_tokens(s: Sample, seed: int) -> Tensor:
    """Of every item its own if masked."""
    return s.floats(*((s.batch, s.experts) if s.masked else (s.experts,)), 5, seed=seed)


def sample_logits(s: Sample) -> tuple[Any, ...]:
    return s.floats(s.batch, s.n, 5), routing_tokens(s, 1), s.token_mask(), 8.0


def sample_logits_backward(s: Sample) -> tuple[Any, ...]:
    x, tokens, mask, scale = sample_logits(s)
    wide = torch.promote_types(s.dtype, torch.float32)
    factors = scale / tokens.to(wide).norm(dim=-1).expand(s.batch, -1)
    logits = s.floats(s.batch, s.experts, s.n, seed=3).to(wide).contiguous()
    saved = logits, x.to(wide).norm(dim=-1).contiguous(), factors.contiguous()
    return (s.floats(s.batch, s.experts, s.n, seed=2), x, tokens, mask, *saved)


def sample_gather(s: Sample) -> tuple[Any, ...]:
    return (s.floats(s.batch, s.n, 5), s.floats(s.experts, 5, seed=1)[..., None], *s.routing())


def sample_gather_backward(s: Sample) -> tuple[Any, ...]:
    arguments = sample_gather(s)
    norms = arguments[0].to(torch.promote_types(s.dtype, torch.float32)).norm(dim=-1).contiguous()
    return (s.floats(s.experts, s.batch, arguments[2].shape[-1], 5, seed=2), *arguments, norms)


def sample_rotary(s: Sample) -> tuple[Any, ...]:
    angles = draw((7, 4), "normal", 3)
    wide = torch.promote_types(s.dtype, torch.float32)
    positions = torch.randint(7, (s.batch * s.experts, s.n), generator=generator(4))
    tables = (angles.cos().to(wide), angles.sin().to(wide))
    return (s.floats(s.batch * s.experts, s.n, 3, 4), *tables, positions, False)


def sample_rows(s: Sample) -> tuple[Any, ...]:
    """By the exact solver, whose scores are handed on, if masked; by the iterative one, straight-through, if not."""
    tokens = (routing_tokens(s, i) for i in (1, 2))
    gammas = (s.floats(s.experts, 5, seed=i)[..., None] for i in (3, 4))
    slots = min(4, s.n), min(3, s.n)
    epsilons = DESCENT[2:]
    return (
        s.floats(s.batch, s.n, 5),
        *tokens,
        *gammas,
        s.token_mask(),
        *slots,
        3.375,
        2.25,
        8.0,
        not s.masked,
        s.masked,
        6,
        *epsilons,
    )


def sample_rows_backward(s: Sample) -> tuple[Any, ...]:
    arguments = tuple(to(harness.DEVICE, a) for a in sample_rows(s))  # what is saved comes from a kernel of ours
    rows, kv_rows, q_picked, kv_picked, *saved = torch.ops.moa.routed_rows(*arguments)
    outputs = rows, kv_rows, q_picked, kv_picked, saved[0]
    grads = [draw(tuple(t.shape), "normal", i).to(t.device, t.dtype) for i, t in enumerate(outputs)]
    return *grads, *arguments[:6], *saved, *arguments[8:]


def sample_experts(s: Sample) -> tuple[Any, ...]:
    """With rotation and lengths if masked."""
    batch, experts, n = s.batch, s.experts, s.n
    rows = s.floats(experts, batch, n, 5), s.floats(experts, batch, n, 6, seed=1)
    weights = (
        s.floats(experts * 8, 5, 1, seed=2),
        s.floats(experts * 16, 6, 1, seed=3),
        s.floats(experts * 5, 8, 1, seed=4),
    )
    wide = torch.promote_types(s.dtype, torch.float32)
    scores = draw((batch, experts, n), "normal", 5).to(wide)
    angles = draw((7, 4), "normal", 6)
    positions = torch.randint(7, (batch * experts, n), generator=generator(7))
    lengths = torch.randint(n + 1, (batch * experts,), generator=generator(8), dtype=torch.int32)
    tables = (angles.cos().to(wide), angles.sin().to(wide), positions, positions.flip(-1)) if s.masked else (None,) * 4
    hidden = lengths if s.masked else None
    return *rows, scores, *weights, s.floats(2, experts, 2, 1, 4, seed=9), hidden, *tables, 0.0, False, "math", s.masked


def sample_experts_backward(s: Sample) -> tuple[Any, ...]:
    arguments = sample_experts(s)
    y, *saved = torch.ops.moa.expert_attention(*arguments[:-1], False)
    return draw(tuple(y.shape), "normal", 10).to(s.dtype), *arguments[:12], *saved, *arguments[12:]


def sample_combine(s: Sample) -> tuple[Any, ...]:
    routing = s.routing()
    k = routing[0].shape[-1]
    scores = draw((s.batch, s.experts, k), "normal", 1).to(torch.promote_types(s.dtype, torch.float32))
    local = s.floats(s.batch, s.n, 5, seed=2) if s.masked else None
    null = None if s.masked else draw((5,), "normal", 3).to(s.dtype)
    dtype = torch.bfloat16 if s.dtype == torch.float32 else s.dtype  # of the result, as under autocast
    return (s.floats(s.experts, s.batch, k, 5), scores, *routing, local, null, s.token_mask(), s.masked, dtype)


def sample_combine_backward(s: Sample) -> tuple[Any, ...]:
    return (s.floats(s.batch, s.n, 5, seed=4), *sample_combine(s))


def sample_attention(s: Sample) -> tuple[Any, ...]:
    rows = s.batch * s.experts
    q, k, v = (s.floats(rows, s.n, 2, 4, seed=i) for i in range(3))
    lengths = torch.randint(s.n + 1, (rows,), generator=generator(6), dtype=torch.int32) if s.masked else None
    null = (s.floats(s.experts, 2, 4, seed=3), s.floats(s.experts, 2, 4, seed=4))
    return (q, k, v, *null, lengths, 0.0, -1, False, "math", s.masked)


def sample_attention_backward(s: Sample) -> tuple[Any, ...]:
    arguments = sample_attention(s)
    saved = torch.ops.moa.attention(*arguments[:-1], False)
    return (s.floats(s.batch * s.experts, s.n, 2, 4, seed=5), *arguments[:6], *saved, *arguments[6:])


def sample_window(s: Sample) -> tuple[Any, ...]:
    weights = s.floats(24, 5, seed=1), s.floats(5, 8, seed=2)
    return s.floats(s.batch, s.n, 5), *weights, 2, 2, s.masked, "math", s.masked


def sample_window_backward(s: Sample) -> tuple[Any, ...]:
    arguments = sample_window(s)
    y, *saved = torch.ops.moa.window_attention(*arguments[:-1], False)
    return s.floats(*y.shape, seed=4), *arguments[:3], *saved, *arguments[3:]


SAMPLES = {
    "router_logits": sample_logits,
    "router_logits_backward": sample_logits_backward,
    "gather_norm": sample_gather,
    "gather_norm_backward": sample_gather_backward,
    "rotary": sample_rotary,
    "routed_rows": sample_rows,
    "routed_rows_backward": sample_rows_backward,
    "expert_attention": sample_experts,
    "expert_attention_backward": sample_experts_backward,
    "combine": sample_combine,
    "combine_backward": sample_combine_backward,
    "attention": sample_attention,
    "attention_backward": sample_attention_backward,
    "window_attention": sample_window,
    "window_attention_backward": sample_window_backward,
    "coordinate_descent": sample_descent,
    "coordinate_descent_backward": sample_descent_backward,
    "capped_simplex": sample_capped,
    "capped_simplex_backward": sample_capped_backward,
    "select": sample_select,
    "dispatch": sample_dispatch,
    "collect": sample_collect,
}
TRITON = ("router_logits", "gather_norm", "rotary", "routed_rows", "combine")  # by kernels of ours alone
DIFFERENTIABLE = (
    "coordinate_descent",
    "capped_simplex",
    "dispatch",
    "collect",
    "attention",
    "expert_attention",
    *TRITON,
)
MOVES = ("dispatch", "collect")


def samples() -> Iterator[Any]:
    # Every pair of dtype, mask and layout; and every layout and dtype by either kind of kernels.
    every = [
        Sample(),
        Sample(torch.float32, True),
        Sample(torch.float32, False, "transposed"),
        Sample(torch.float64, True, "transposed"),
        Sample(torch.float64, False, "sliced"),
        Sample(torch.float32, True, "sliced"),
    ]
    # These run in the dtype of the model, the solvers and the selection in float32 at least.
    half = [Sample(torch.bfloat16, True, "transposed"), Sample(torch.float16, True, "sliced")]
    edges = [Sample(batch=0, masked=True), Sample(n=0), Sample(n=0, masked=True), Sample(n=1, masked=True)]
    for name in SAMPLES:
        low = half * (name in (*MOVES, "attention")) + [Sample(torch.float16)] * name.startswith("combine")
        for s in every + edges + low:
            if name == "select" and s.n == 0:
                continue
            size = "" if s.batch and s.n > 1 else f"-B{s.batch}-N{s.n}"
            label = f"{name}-{str(s.dtype)[6:]}-{'masked' if s.masked else 'plain'}-{s.layout}{size}"
            yield pytest.param(name, s, id=label)


EVERY_SAMPLE = pytest.mark.parametrize(("name", "sample"), list(samples()))


def arguments_of(name: str, sample: Sample, device: torch.device) -> tuple[Any, ...]:
    """On the device, in the strides that they have."""
    return tuple(to(device, a) for a in SAMPLES[name](sample))


def to(device: torch.device, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.device == device:
        return value
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return moved.copy_(value)


# --- the operators ---------------------------------------------------------------------------------------------------


def test_no_operator_is_missed() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("moa::")}
    assert registered == set(SAMPLES)


@EVERY_SAMPLE
def test_opcheck(name: str, sample: Sample, device: torch.device) -> None:
    """Schema, autograd registration, fake kernel (strides too), and eager against AOTAutograd with dynamic shapes.

    AOTAutograd knows dtypes and strides from the fake kernel alone, which every sample compares with the real one.
    """
    arguments = arguments_of(name, sample, device)
    if name in DIFFERENTIABLE:
        arguments = (arguments[0].requires_grad_(), *arguments[1:])
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # Of whole stages fewer, whose kernels take long when interpreted.
    layouts = ("contiguous",) if name.removesuffix("_backward") in STAGES else ("contiguous", "transposed")
    if sample.dtype != torch.float32 and sample.layout in layouts:
        checks.append("test_aot_dispatch_dynamic")
    result = opcheck(getattr(torch.ops.moa, name).default, arguments, test_utils=checks)
    assert result == dict.fromkeys(checks, "SUCCESS")


@EVERY_SAMPLE
def test_operators_leave_their_inputs_alone(name: str, sample: Sample, device: torch.device) -> None:
    arguments = arguments_of(name, sample, device)
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    first, second = (getattr(torch.ops.moa, name)(*arguments) for _ in range(2))
    for a, b in zip(arguments, before):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a is b
    for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (first, second))):
        check_identical(a, b)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("layout", ["transposed", "sliced"])
@pytest.mark.parametrize("name", list(SAMPLES))
def test_layout_changes_nothing(name: str, layout: str, masked: bool, device: torch.device) -> None:
    """f(view) = f(contiguous), also of masks and maps."""
    samples = (Sample(masked=masked), Sample(masked=masked, layout=layout))
    plain, strided = (getattr(torch.ops.moa, name)(*arguments_of(name, sample, device)) for sample in samples)
    torch.testing.assert_close(strided, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "sample", [Sample(experts=2), Sample(masked=True, experts=2), Sample(batch=0)], ids=["plain", "masked", "empty"]
)
@pytest.mark.parametrize("name", list(SAMPLES))
def test_batching_rules(name: str, sample: Sample, device: torch.device) -> None:
    """vmap of an operator equals a loop, with the new dimension first or last, and with every other argument shared."""
    op = getattr(torch.ops.moa, name)
    calls = [arguments_of(name, sample, device)]
    tensors = [i for i, a in enumerate(calls[0]) if isinstance(a, Tensor)]
    for step in (1, 2):  # other values: along the batch, and another sign
        calls.append(tuple(a.roll(step, 0) if i in tensors else a for i, a in enumerate(calls[0])))
    halves = (tensors[::2], tensors[1::2]) if len(tensors) > 1 else ()
    for batched, places in ((tensors, (0, -1)), *((half, (0,)) for half in halves)):
        loop = [op(*(call[i] if i in batched else a for i, a in enumerate(calls[0]))) for call in calls]
        expected = (
            torch.stack(loop) if isinstance(loop[0], Tensor) else tuple(torch.stack(outputs) for outputs in zip(*loop))
        )
        for place in places:
            in_dims = tuple(place if i in batched else None for i in range(len(calls[0])))
            stacked = [
                torch.stack([call[i] for call in calls], place) if i in batched else a for i, a in enumerate(calls[0])
            ]
            torch.testing.assert_close(vmap(op, in_dims=in_dims)(*stacked), expected, rtol=1e-12, atol=1e-12)


# --- gradients -------------------------------------------------------------------------------------------------------


def away_from_kinks(solver: str, mask: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    """float64 logits (2, 2, 7) of which none lies within 1e-3 of a comparison, some saturated and some not."""
    for seed in range(200):
        logits = draw((2, 2, 7), "normal", seed)
        valid = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask[:, None].expand_as(logits)
        if solver == "coordinate_descent":
            scores, a, _ = torch.ops.moa.coordinate_descent(logits, mask, *options)
            margin = (logits + a[..., None]).abs()[valid.expand(len(a), -1, -1, -1)].min()
            # The counts are read from a_0 on; a row may saturate for some steps only.
        else:
            scores, threshold = torch.ops.moa.capped_simplex(logits, mask, *options)
            free = valid & (logits <= threshold[..., None])
            a = (options[1] * scores.log() - logits).masked_fill(~free, -math.inf).amax(-1, keepdim=True)
            margin = (logits + a).abs()[valid].min()
        saturated = ((scores == 1) & valid).sum(-1)
        if margin > 1e-3 and saturated.any() and (saturated < valid.sum(-1)).any():
            return logits
    raise AssertionError("no such logits")


MASK = torch.tensor([[True, False, True, True, True, True, False], [True, True, True, False, True, True, True]])
DESCENTS = {
    "one step": (3.375, 1, 1.0, 0.7, 0.7),
    "two steps": (3.375, 2, 0.3, 1.0, 0.7),
    "ten steps": (3.375, 10, 0.3, 2.0, 0.7),
    "constant eps": (2.5, 6, 0.5, 0.5, 1.0),
    "defaults": (3.375, 20, 0.03, 4.0, 0.7),
}


def check_both_forms(
    function: Callable[..., Any], operator: Any, logits: Tensor, mask: Tensor | None, options: tuple[Any, ...]
) -> None:
    """gradcheck of a solver as called here (which torch.func can batch) and as registered, in two layouts."""
    for call, batched in ((function, True), (operator, False)):
        for layout in ("contiguous", "transposed"):
            leaf = lay_out(logits, layout).detach().requires_grad_()
            assert gradcheck(
                lambda s, call=call: call(s, mask, *options)[0],
                leaf,
                check_grad_dtypes=True,
                check_batched_grad=batched,
                rtol=1e-4,
                atol=1e-6,
            )


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("options", DESCENTS.values(), ids=DESCENTS)
def test_gradcheck_of_coordinate_descent(options: tuple[Any, ...], masked: bool, device: torch.device) -> None:
    mask = MASK if masked else None
    logits = away_from_kinks("coordinate_descent", mask, options).to(device)
    mask = None if mask is None else mask.to(device)
    check_both_forms(ops.descend, torch.ops.moa.coordinate_descent, logits, mask, options)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("options", [(3.375, 0.5), (2.0, 0.3), (1.5, 1.0)], ids=str)
def test_gradcheck_of_capped_simplex(options: tuple[Any, ...], masked: bool, device: torch.device) -> None:
    mask = MASK if masked else None
    logits = away_from_kinks("capped_simplex", mask, options).to(device)
    mask = None if mask is None else mask.to(device)
    check_both_forms(ops.cap, torch.ops.moa.capped_simplex, logits, mask, options)


STAGES = {  # operator: its differentiable arguments, and how many of its results are
    "router_logits": ((0, 1), 1),
    "gather_norm": ((0, 1), 1),
    "routed_rows": ((0, 1, 2, 3, 4), 5),
    "combine": ((0, 1, 5, 6), 1),
    "expert_attention": ((0, 1, 2, 3, 4, 5, 6), 1),
    "window_attention": ((0, 1, 2), 1),
}
EITHER = ("expert_attention", "window_attention")  # by PyTorch too, as their last argument says


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    ("name", "kernels"), [*((name, "triton") for name in STAGES), *((name, "torch") for name in EITHER)]
)
def test_gradcheck_of_whole_stages(name: str, kernels: str, masked: bool, device: torch.device) -> None:
    """In float64, all differentiable arguments at once; scores are handed on as they are, not straight-through."""
    arguments = list(arguments_of(name, Sample(masked=masked), device))
    if name == "routed_rows":
        arguments[11] = False  # straight_through
    if name in EITHER:
        arguments[-1] = kernels == "triton"
    places, results = STAGES[name]
    places = [i for i in places if arguments[i] is not None]

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(places, leaves))
        found = getattr(torch.ops.moa, name)(*(given.get(i, a) for i, a in enumerate(arguments)))
        return (found,) if isinstance(found, Tensor) else found[:results]

    leaves = [arguments[i].detach().requires_grad_() for i in places]
    # Where its fast mode fails, gradcheck goes on to the slow one for the message: minutes of interpreted kernels.
    module = sys.modules["torch.autograd.gradcheck"]
    with mock.patch.object(module, "_run_slow_mode_and_get_error", create=True, return_value=""):
        assert gradcheck(call, leaves, fast_mode=True, eps=1e-7, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("name", MOVES)
def test_gradcheck_of_the_moves(name: str, masked: bool, device: torch.device) -> None:
    """Linear, and differentiable twice."""
    tokens, *routing = arguments_of(name, Sample(masked=masked, n=6, experts=2), device)
    for call in (ops.gather_tokens if name == "dispatch" else ops.scatter_tokens, getattr(torch.ops.moa, name)):
        for leaf in (tokens.clone(), lay_out(tokens, "transposed").detach()):
            leaf.requires_grad_()
            move = lambda t, call=call: call(t, *routing)  # noqa: E731
            assert gradcheck(move, leaf, check_grad_dtypes=True)
            assert gradgradcheck(move, leaf)


@pytest.mark.parametrize("sample", [Sample(), Sample(masked=True), Sample(batch=0), Sample(n=0)], ids=repr)
def test_dispatch_and_collect_are_transposed(sample: Sample, device: torch.device) -> None:
    """<dispatch(x), y> == <x, collect(y)>, exactly: the numbers are integers. What no valid slot holds may be NaN."""
    x, *routing = arguments_of("dispatch", sample, device)
    y = arguments_of("collect", sample, device)[0]
    _, mask, inverse = routing
    x, y = (10 * x).round(), (10 * y).round()
    slots = mask.transpose(0, 1)[..., None]
    held = (inverse >= 0).any(1)[..., None]
    there = ops.gather_tokens(x.masked_fill(~held, math.nan), *routing)
    back = ops.scatter_tokens(y.masked_fill(~slots, math.nan), *routing)
    assert (there * y).sum() == (x * back).sum()
    assert not there.masked_fill(slots, 0).any()
    assert not back.masked_fill(held, 0).any()
    if x.numel():
        assert there.any()
        assert back.any()
    for call, other, leaf, cotangent in (
        (ops.gather_tokens, back, x, y.masked_fill(~slots, math.nan)),
        (ops.scatter_tokens, there, y, x.masked_fill(~held, math.nan)),
    ):
        leaf = leaf.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(call(leaf, *routing), leaf, cotangent)
        check_identical(gradient, other)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_collect_rounds_once(dtype: torch.dtype, device: torch.device) -> None:
    """Three experts' rows are added up in float32."""
    y, *routing = arguments_of("collect", Sample(dtype), device)
    check_identical(torch.ops.moa.collect(y, *routing), torch.ops.moa.collect(y.float(), *routing).to(dtype))


@pytest.mark.parametrize(("name", "call"), [("coordinate_descent", ops.descend), ("capped_simplex", ops.cap)])
def test_solvers_refuse_higher_derivatives(name: str, call: Any, device: torch.device) -> None:
    """By name, whichever way they are asked; the operator itself refuses double backward too."""
    logits, mask, *options = arguments_of(name, Sample(), device)
    tangent = torch.ones_like(logits)

    def soft(s: Tensor) -> Tensor:
        return call(s, mask, *options)[0]

    def twice(f: Any) -> None:
        leaf = logits.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(leaf, mask, *options)[0].square().sum(), leaf, create_graph=True)
        torch.autograd.grad(g.square().sum(), leaf)

    refused = pytest.raises(RuntimeError, match=rf"^moa::{name}: double backward is not supported")
    for f in (call, getattr(torch.ops.moa, name)):
        with refused:
            twice(f)
    with refused:
        grad(lambda s: grad(lambda t: soft(t).square().sum())(s).square().sum())(logits)
    refused = pytest.raises(RuntimeError, match=rf"^moa::{name}: forward-mode differentiation is not supported")
    with refused:
        jvp(soft, (logits,), (tangent,))
    with refused, forward_ad.dual_level():
        soft(forward_ad.make_dual(logits, tangent))
    with forward_ad.dual_level():
        check_identical(soft(logits), soft(logits.clone()))


@pytest.mark.parametrize("heads", [2, 5], ids=["few", "many"])
@pytest.mark.parametrize("placed", [False, True], ids=["in order", "placed"])
def test_rotation_by_hand(placed: bool, heads: int, device: torch.device) -> None:
    """Rows at positions of their own; many: more heads than a program of the kernel turns at a time."""
    t = draw((3, 2, heads, 1024), "normal", 1).to(device)
    angles = draw((4, 1024), "normal", 2).to(device)  # unlike in both halves
    positions = torch.tensor([[1, 0], [3, 2], [0, 3]], device=device) if placed else None
    at = angles[torch.arange(2, device=device).expand(3, 2) if positions is None else positions][:, :, None]
    first, second = t.chunk(2, -1)
    expected = t * at.cos() + torch.cat((-second, first), -1) * at.sin()
    leaf = t.clone().requires_grad_()
    actual = ops.turn(leaf, angles.cos(), angles.sin(), positions, False)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    g = draw(tuple(t.shape), "normal", 3).to(device)
    (gradient,) = torch.autograd.grad(actual, leaf, g)
    turned = (g * at.sin()).chunk(2, -1)
    torch.testing.assert_close(gradient, g * at.cos() + torch.cat((turned[1], -turned[0]), -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("rest", ["null", "local"])
@pytest.mark.parametrize("dim", [3, 5000], ids=["few", "many"])
def test_combination_and_its_gradients(dim: int, rest: str, average: bool, device: torch.device) -> None:
    """Against the sum over a dense map of slots to tokens. Many: more channels than a program holds at a time.

    Masked slots hold NaN, and so do the cotangents of masked tokens; many tokens are taken by nobody.
    """
    sample = Sample(masked=True, n=40)
    indices, slots, inverse = (t.to(device) for t in sample.routing())
    mask = sample.token_mask().to(device)
    y = draw((3, 2, 4, dim), "normal", 1).to(device).masked_fill(~slots.transpose(0, 1)[..., None], math.nan)
    scores = draw((2, 3, 4), "normal", 2).to(device)
    other = draw((dim,) if rest == "null" else (2, 40, dim), "normal", 3).to(device)
    leaves = [t.requires_grad_() for t in (y, scores, other)]
    local, null = (None, other) if rest == "null" else (other, None)
    actual = ops.merge_experts(y, scores, indices, slots, inverse, local, null, mask, average, y.dtype)

    place = torch.nn.functional.one_hot(indices, 40) * slots[..., None]
    shown = y.masked_fill(~slots.transpose(0, 1)[..., None], 0)
    expected = torch.einsum("bekn,bek,ebkd->bnd", place.to(y.dtype), scores, shown)
    count = place.sum((1, 2))[..., None]
    if rest == "local":
        expected, count = expected + other, count + 1
    if average:
        expected = expected / count.clamp_min(1)
    if rest == "null":
        expected = torch.where(count == 0, other, expected)
    expected = expected.masked_fill(~mask[..., None], 0)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    g = draw((2, 40, dim), "normal", 4).to(device).masked_fill(~mask[..., None], math.nan)
    for a, e in zip(torch.autograd.grad(actual, leaves, g), torch.autograd.grad(expected, leaves, g)):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


# --- the layer under transforms --------------------------------------------------------------------------------------


BASE = LayerCase(n=20, options={"cosine_sim_routing": True})
LAYERS = {
    "self": BASE,
    "mask": replace(BASE, mask="random", average=True),
    "cross": replace(BASE, context=13, dim_context=6, mask="random"),
    "local": replace(BASE, window=3, mask="random"),
    "exact": replace(BASE, options={"solver": "exact", "straight_through": False}),
    "blocks": replace(BASE, mask="random", options={"route_block_size": 7}),
    "learned": replace(BASE, options={"learned_routing_tokens": True}),
    "rotary": replace(BASE, rotary=True, prenorm=False),
    "all taken": replace(BASE, k_q=40, k_kv=40),
}


def build(
    implementation: ModuleType, case: LayerCase, device: torch.device, dtype: torch.dtype = torch.float64
) -> torch.nn.Module:
    layer = implementation.MixtureOfAttention(**case.arguments(), device=device, dtype=dtype)
    held = layer.state_dict()
    layer.load_state_dict({name: t.to(dtype) for name, t in case.state().items() if name in held})
    return layer.eval()


def inputs_of(case: LayerCase, device: torch.device, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    inputs = {
        name: t.to(device) if t.dtype in (torch.bool, torch.float32) else t.to(device, dtype)
        for name, t in case.inputs().items()
    }
    if case.options.get("learned_routing_tokens"):
        inputs["query_routing_tokens"] = draw((case.experts, case.dim), "normal", case.seed + 20).to(device, dtype)
        shape = (case.batch, case.experts, case.dim_context or case.dim)
        inputs["key_value_routing_tokens"] = draw(shape, "normal", case.seed + 21).to(device, dtype)
    return inputs


def leaves_of(inputs: dict[str, Any]) -> list[Tensor]:
    """Those that can require a gradient, which they do from here on."""
    return [
        t.requires_grad_()
        for name, t in inputs.items()
        if isinstance(t, Tensor) and t.dtype != torch.bool and name != "rotary_emb"
    ]


def outcome(layer: Any, inputs: dict[str, Any], parameters: list[Tensor], injected: bool) -> dict[str, Tensor | None]:
    """Output, routes and gradients by name."""
    if injected:
        out, routes = layer(**inputs), ()
    else:
        out, routes = layer(**inputs, return_routes=True)
    found: dict[str, Tensor | None] = {"out": out.detach()}
    for side, r in zip(("query", "key_value"), routes):
        found |= {f"{side}.{field}": t.detach() for field, t in r._asdict().items()} | {f"{side}.load": r.load}
    wrt = [*leaves_of(inputs), *parameters]
    gradients = torch.autograd.grad(out, wrt, draw(tuple(out.shape), "normal", 99).to(out), allow_unused=True)
    return found | {f"gradient {i}": g for i, g in enumerate(gradients)}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", [*LAYERS, "injected"])
def test_compiled_layer_equals_eager(name: str, device: torch.device) -> None:
    """Without graph breaks, forward and backward, bit for bit; for other values and other sizes too."""
    injected = name == "injected"
    case = LAYERS["mask" if injected else name]
    layer = build(optimized, case, device, torch.float32)
    parameters = list(layer.parameters())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    before = counters["stats"]["unique_graphs"]
    # Other sizes cost seconds where the compiler unrolls: once each with them, and for the simplest one twice.
    lengths = {"self": (27, 30), "cross": (24,), "injected": (23,)}.get(name, ())
    for step, n in enumerate((case.n, case.n, *lengths)):
        now = replace(case, seed=step, n=n, context=case.context and n - 5)
        results = []
        for call in (layer, compiled):
            inputs = inputs_of(now, device, torch.float32)
            if injected:
                _, routes = layer(**inputs, return_routes=True)
                inputs["routes"] = tuple(
                    optimized.Routes(r.indices, r.mask, r.scores.detach(), r.logits.detach()) for r in routes
                )
            results.append(outcome(call, inputs, parameters, injected))
        eager, actual = results
        assert eager.keys() == actual.keys()
        for key, expected in eager.items():
            assert (expected is None) == (actual[key] is None), key
            if expected is not None:
                check_identical(actual[key], expected, key)
        if step == 1:
            assert counters["stats"]["unique_graphs"] - before == 1
    # The first new size compiles once more, for any size; a later one finds that graph.
    assert counters["stats"]["unique_graphs"] - before == 1 + bool(lengths)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor(device: torch.device) -> None:
    """One graph, compiled to machine code: it sums in another order, so it gets the comparator's budget."""

    def construct(**arguments: Any) -> torch.nn.Module:
        layer = optimized.MixtureOfAttention(**arguments)
        layer.compile(fullgraph=True)
        return layer

    before = counters["stats"]["unique_graphs"]
    compiled = SimpleNamespace(MixtureOfAttention=construct, Routes=optimized.Routes)
    for seed in (0, 1):
        case = replace(BASE, seed=seed)
        routes = oracle_layer(case, torch.float32, device).routes
        exact = oracle_layer(case, torch.float32, device, routes=routes)
        baseline = baseline_layer(case, torch.float32, device, routes=routes)
        actual = run_layer(compiled, case, torch.float32, device, routes=routes)
        compare(actual, exact, baseline, stage="mixture", dtype=torch.float32, backend="inductor")
    assert counters["stats"]["unique_graphs"] - before <= 2


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "learned"])
def test_vmap_over_inputs(name: str, device: torch.device) -> None:
    """x, and the mask beside it, in a batch of batches."""
    case = LAYERS[name]
    layer = build(optimized, case, device)
    calls = [inputs_of(replace(case, seed=seed), device) for seed in range(3)]
    batched = [key for key in calls[0] if key != "rotary_emb"]
    shared = {key: value for key, value in calls[0].items() if key not in batched}

    def call(*values: Tensor) -> Tensor:
        return layer(**dict(zip(batched, values)), **shared)

    out = vmap(call)(*(torch.stack([c[key] for c in calls]) for key in batched))
    loop = torch.stack([call(*(c[key] for key in batched)) for c in calls])
    torch.testing.assert_close(out, loop, rtol=1e-11, atol=1e-12)
    assert not torch.equal(out[0], out[1])
    # Shared masks, and the new dimension last.
    x = torch.stack([c["x"] for c in calls], -1)
    rest = {key: value for key, value in calls[0].items() if key != "x"}
    out = vmap(lambda t: layer(t, **rest), in_dims=-1, out_dims=-1)(x)
    loop = torch.stack([layer(c["x"], **rest) for c in calls], -1)
    torch.testing.assert_close(out, loop, rtol=1e-11, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["mask", "local", "exact"])
def test_vmap_over_parameters(name: str, device: torch.device) -> None:
    """An ensemble of layers in one call."""
    case = LAYERS[name]
    layers = [build(optimized, replace(case, seed=seed), device) for seed in range(3)]
    inputs = inputs_of(case, device)
    parameters, _ = stack_module_state(layers)
    out = vmap(lambda p: functional_call(layers[0], p, (), inputs))(parameters)
    loop = torch.stack([layer(**inputs) for layer in layers])
    torch.testing.assert_close(out, loop, rtol=1e-11, atol=1e-12)
    assert not torch.equal(out[0], out[1])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("learned", "rotary")])
def test_gradients_per_sample(name: str, device: torch.device) -> None:
    """vmap(grad) over samples, of every parameter and of x, equals a loop of backward passes."""
    case = LAYERS[name]
    layer = build(optimized, case, device)
    parameters = {key: p.detach() for key, p in layer.named_parameters()}
    calls = [inputs_of(replace(case, seed=seed), device) for seed in range(3)]
    xs = torch.stack([c.pop("x") for c in calls])

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,), calls[0]).pow(3).sum()

    of_parameters, of_x = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        leaves = {key: p.clone().requires_grad_() for key, p in parameters.items()}
        x = x.clone().requires_grad_()
        expected = torch.autograd.grad(loss(leaves, x), [x, *leaves.values()], allow_unused=True)
        actual = [of_x[i], *(of_parameters[key][i] for key in leaves)]
        for key, a, e in zip(("x", *leaves), actual, expected):
            e = torch.zeros_like(a) if e is None else e
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


def primals(case: LayerCase, layer: torch.nn.Module, device: torch.device) -> dict[str, Tensor]:
    inputs = inputs_of(case, device)
    given = {name: t for name, t in inputs.items() if name in ("x", "context")}
    return given | {name: p.detach() for name, p in layer.named_parameters()}


def call_with(layer: torch.nn.Module, case: LayerCase, values: dict[str, Tensor], device: torch.device) -> Tensor:
    inputs = inputs_of(case, device) | {name: t for name, t in values.items() if name in ("x", "context")}
    parameters = {name: t for name, t in values.items() if name not in inputs}
    return functional_call(layer, parameters, (), inputs)


AHEAD = ["self", "cross", "local", "exact", "all taken"]
BACKENDS = pytest.mark.parametrize("backend", [None, "math"], ids=["auto", "math"])


@BACKENDS
@pytest.mark.parametrize("name", AHEAD)
def test_forward_mode_is_refused_or_right(name: str, backend: str | None, device: torch.device) -> None:
    """For each input and parameter on its own: a tangent that agrees with the reference's, or an error that names the
    operator. The reference supports it: its tangents are the transpose of its gradients.
    """
    case = LAYERS[name]
    layer, other = build(optimized, case, device), build(reference, case, device)
    values = primals(case, layer, device)
    refused = set()
    for key, value in values.items():
        tangent = draw(tuple(value.shape), "normal", 31).to(device)
        with forward_ad.dual_level():
            moved = values | {key: forward_ad.make_dual(value, tangent)}
            expected = forward_ad.unpack_dual(call_with(other, case, moved, device)).tangent
            cotangent = draw(tuple(values["x"].shape), "normal", 32).to(device)
        leaf = value.clone().requires_grad_()
        out = call_with(other, case, values | {key: leaf}, device)
        (gradient,) = torch.autograd.grad(out, leaf, cotangent, allow_unused=True) if out.requires_grad else (None,)
        if gradient is None:
            assert expected is None, key
            expected = torch.zeros_like(out)
        else:
            torch.testing.assert_close((expected * cotangent).sum(), (gradient * tangent).sum(), rtol=1e-8, atol=1e-9)
        local = None if backend is None or case.window is None else f"banded_{backend}"
        try:
            with optimized.use_backends(routed_attention=backend, local_attention=local), forward_ad.dual_level():
                moved = values | {key: forward_ad.make_dual(value, tangent)}
                actual = forward_ad.unpack_dual(call_with(layer, case, moved, device)).tangent
        except RuntimeError as error:
            assert "moa::" in str(error) or "_scaled_dot_product" in str(error), error  # noqa: PT017
            assert "forward" in str(error), error  # noqa: PT017
            refused.add(key)
        else:
            actual = torch.zeros_like(out) if actual is None else actual
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")
    # They reach our operators whatever the backend.
    assert {"x", "attn.to_out.weight"} <= refused
    # On a GPU the combination is a kernel of ours too.
    assert ("null_routed_token" in refused) == (device.type == "cuda" and "null_routed_token" in values)


@BACKENDS
@pytest.mark.parametrize("name", AHEAD)
def test_double_backward_is_refused_or_right(name: str, backend: str | None, device: torch.device) -> None:
    """As above. The reference's second derivatives agree with differences of its gradients (not straight-through, where
    the gradient is that of another function than the one computed).
    """
    case = LAYERS[name]
    case = replace(case, options={**case.options, "straight_through": False})
    layer, other = build(optimized, case, device), build(reference, case, device)
    values = primals(case, layer, device)
    local = None if backend is None or case.window is None else f"banded_{backend}"

    def gradient(f: torch.nn.Module, key: str, value: Tensor, create_graph: bool = False) -> Tensor | None:
        """Of a cubic loss with respect to one value."""
        out = call_with(f, case, values | {key: value}, device)
        if not out.requires_grad:
            return None
        return torch.autograd.grad(out.pow(3).sum(), value, create_graph=create_graph, allow_unused=True)[0]

    def product(f: torch.nn.Module, key: str, direction: Tensor) -> Tensor | None:
        """Second derivative times a direction."""
        leaf = values[key].clone().requires_grad_()
        g = gradient(f, key, leaf, create_graph=True)
        if g is None or not g.requires_grad:
            return None
        return torch.autograd.grad((g * direction).sum(), leaf, allow_unused=True)[0]

    refused = set()
    for key, value in values.items():
        direction = draw(tuple(value.shape), "normal", 31).to(device)
        expected = product(other, key, direction)
        if expected is not None:
            h = 1e-6
            ends = [gradient(other, key, (value + s * h * direction).requires_grad_()) for s in (1, -1)]
            difference = (ends[0] - ends[1]) / (2 * h)
            scale = expected.abs().max().item()
            torch.testing.assert_close(expected, difference, rtol=1e-4, atol=1e-4 * scale + 1e-6)
        try:
            with optimized.use_backends(routed_attention=backend, local_attention=local):
                actual = product(layer, key, direction)
        except RuntimeError as error:
            text = str(error)
            ours = text.startswith("moa::") and "double backward is not supported" in text
            assert ours or ("_scaled_dot_product" in text and "not implemented" in text), error  # noqa: PT017
            refused.add(key)
        else:
            assert (actual is None) == (expected is None), key
            if expected is not None:
                torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())
    assert {"x", "attn.to_out.weight"} <= refused  # by the solver and by the attention of the experts
    if device.type == "cpu":  # on a GPU the combination is a kernel of ours, which refuses too
        assert "null_routed_token" not in refused


@pytest.mark.usefixtures("fresh_compiler")
def test_forward_mode_within_compiled_code_is_refused(device: torch.device) -> None:
    """A transform that is compiled together with the layer drops no tangent either."""
    case = LAYERS["self"]
    layer = build(optimized, case, device)
    x = inputs_of(case, device)["x"]

    @torch.compile(backend="aot_eager")
    def push(x: Tensor, tangent: Tensor) -> Tensor:
        return jvp(layer, (x,), (tangent,))[1]

    with optimized.use_backends(routed_attention="math"), pytest.raises(RuntimeError, match=r"moa::\w+: forward-mode"):
        push(x, torch.ones_like(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_layer_refuses_forward_mode(device: torch.device) -> None:
    layer = build(optimized, LAYERS["self"], device)
    x = inputs_of(LAYERS["self"], device)["x"]
    compiled = torch.compile(layer, backend="aot_eager")
    check_identical(compiled(x).detach(), layer(x).detach())
    with optimized.use_backends(routed_attention="math"):
        with pytest.raises(RuntimeError, match=r"jvp|forward-mode"), forward_ad.dual_level():
            compiled(forward_ad.make_dual(x, torch.ones_like(x)))
        with pytest.raises(RuntimeError, match=r"moa::\w+: forward-mode"):
            jvp(compiled, (x,), (torch.ones_like(x),))


class _Seen(TorchDispatchMode):
    """Names of the operators that the dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_plain_call_is_the_operator() -> None:
    """Values, gradients and layout; and a mode that looks on sees the operators, forward and backward."""
    logits = torch.randn(2, 3, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.arange(17.0, dtype=torch.float64)
    found, names = [], []
    for mode in (contextlib.nullcontext(), _Seen()):
        s = logits.clone().requires_grad_()
        with mode:
            scores, a, counts = ops.descend(s, None, 5.0, 20, 0.03, 4.0, 0.7)
            (scores * weights).sum().backward()
        assert scores.requires_grad
        assert not a.requires_grad
        assert not counts.requires_grad
        found.append((scores.detach(), a, counts, s.grad))
        names.append(getattr(mode, "names", []))
    for plain, seen in zip(*found):
        check_identical(plain, seen)
    assert {"moa::coordinate_descent", "moa::coordinate_descent_backward"} <= set(names[1])


def test_the_threshold_is_not_differentiable() -> None:
    """A loss on it would get a gradient of zero without a word."""
    logits = torch.linspace(0, 1, 4, dtype=torch.float64).view(1, 1, 4).requires_grad_()
    for call in (ops.cap, torch.ops.moa.capped_simplex):
        scores, threshold = call(logits, None, 2.0, 0.1)
        assert scores.requires_grad
        assert not threshold.requires_grad


def test_a_plain_call_without_gradients_records_nothing() -> None:
    with torch.no_grad():
        scores = ops.cap(torch.zeros(1, 1, 4, requires_grad=True), None, 2.0, 0.1)[0]
    assert scores.grad_fn is None
    assert ops.cap(torch.zeros(1, 1, 4), None, 2.0, 0.1)[0].grad_fn is None
