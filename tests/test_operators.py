"""The operators under torch.ops.moa one by one, and the layer under PyTorch's transforms: compile, vmap, grad, forward
mode and double backward. What a transform can't do must raise: a tangent that is dropped is a wrong answer.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import stages
import torch
from benchmarks import flops
from benchmarks.shapes import Case
from harness import HALF, check_identical
from runs import baseline_layer, compare, oracle_layer, run_layer
from samples import (
    DIM,
    SAMPLES,
    VARIANTS,
    Sample,
    arguments_of,
    backward_arguments,
    forward_of,
    named_arguments,
    run,
    to,
)
from strategies import LayerCase, draw, lay_out
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.autograd import forward_ad, gradcheck
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.library import opcheck
from torch.testing._internal.optests import aot_autograd_check
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from zones import new_memory_in_zones

import optimized
import reference
from optimized import ops
from optimized.ops.operator import OPERATORS, Operator

CPU = torch.device("cpu")
DIFFERENTIABLE = [name for name in SAMPLES if OPERATORS[name].wrt]
# Whose kernels take long when interpreted.
STAGES = ("router_logits", "gather_norm", "routed_rows", "combine", "expert_attention", "window", "window_attention")
SOLVERS = ("coordinate_descent", "capped_simplex")
LOGITS = (*SOLVERS, "select", "pick", "candidates", "memory")  # computed of logits, in float32 at least
MODEL_DTYPE = ("gather_norm", "attention", "combine")  # kernels of ours on rows of the model's dtype
MASK_NAMES = ("plain", "masked")
MASKED = pytest.mark.parametrize("masked", [False, True], ids=MASK_NAMES)


def every_sample() -> Iterator[Any]:
    """Every pair of dtype, mask and layout, and every variant; the kernels, which take long where they are interpreted,
    on contiguous float32, on half precision in the other layouts, and where there is nothing to compute. By day every
    dtype, mask and layout, not every pair.
    """
    pairs = [
        Sample(torch.float32, False, "transposed"),
        Sample(torch.float64, True, "transposed", triton=False),
        Sample(torch.float64, False, "sliced"),
        Sample(torch.float16, True, "sliced", triton=True),
        Sample(n=0),
    ]
    every = [
        Sample(),
        Sample(torch.float32, True, experts=2),
        *pairs[:3],
        Sample(torch.float32, True, "sliced", triton=False),
    ]
    edges = [Sample(batch=0, masked=True), pairs[4], Sample(n=0, masked=True)]
    edges.append(Sample(n=1, masked=True, triton=False))
    small = [Sample(n=n, variant="blocks", masked=n > 0, triton=False) for n in (0, 1)]
    for name in OPERATORS:
        of = forward_of(name)
        half = [] if of in LOGITS else [Sample(torch.bfloat16, True, "transposed", triton=of in MODEL_DTYPE)]
        half += [Sample(torch.float16, of == "gather_norm", "sliced", triton=True)] * (of in MODEL_DTYPE)
        variants = [Sample(variant=v, masked=i % 2 == 1, triton=False) for i, v in enumerate(VARIANTS.get(of, {}))]
        for s in every + half + edges + variants:
            if of == "select" and s.n == 0:  # takes k of at least as many tokens
                continue
            thorough = s in pairs or replace(s, masked=True) == pairs[3]
            yield pytest.param(name, s, id=f"{name}-{label(s)}", marks=pytest.mark.thorough if thorough else ())
        for s in small if "blocks" in VARIANTS.get(of, {}) else []:
            yield pytest.param(name, s, id=f"{name}-{label(s)}")


def label(s: Sample) -> str:
    size = [] if s.batch and s.n > 1 else [f"B{s.batch}-N{s.n}"]
    kind = "masked" if s.masked else "plain"
    return "-".join([str(s.dtype)[6:], kind, s.layout, *size, *([s.variant] if s.variant else [])])


EVERY_SAMPLE = pytest.mark.parametrize(("name", "sample"), list(every_sample()))


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def seeded(call: Callable[..., Any], *arguments: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return outputs(call(*arguments))


# --- the operators ---------------------------------------------------------------------------------------------------


def test_no_operator_is_missed() -> None:
    """By what the dispatcher knows: every forward has samples, every backward is that of a forward."""
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("moa::")}
    assert registered == set(OPERATORS)
    backwards = {f"{name}_backward" for name in DIFFERENTIABLE}
    assert registered == {*SAMPLES, *backwards}
    assert all(OPERATORS[name].backward is OPERATORS[f"{name}_backward"] for name in DIFFERENTIABLE)


@EVERY_SAMPLE
def test_opcheck(name: str, sample: Sample, device: torch.device) -> None:
    """Schema, autograd registration, and fake kernel (strides too). Who computes is nothing to the registration."""
    checks = ["test_schema", "test_faketensor"]
    if not sample.by_triton or device.type != "cpu":
        checks.insert(1, "test_autograd_registration")
    check_operator(name, sample, device, checks)


def check_operator(name: str, sample: Sample, device: torch.device, checks: list[str]) -> None:
    arguments, operator = arguments_of(name, sample, device), OPERATORS[name]
    if operator.wrt:
        arguments[operator.names.index(operator.wrt[0])].requires_grad_()
    if name == "pick" and checks == TRACED:  # opcheck adds all results to the first, which holds integers
        aot_autograd_check(lambda *given: operator.op(*given)[::-1], arguments, {}, dynamic=True)
        return
    result = opcheck(getattr(torch.ops.moa, name).default, arguments, test_utils=checks)
    assert result == dict.fromkeys(checks, "SUCCESS")


TRACED = ["test_aot_dispatch_dynamic"]


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(name, v, marks=pytest.mark.thorough if v else ())
        for name in SAMPLES
        for v in ("", *VARIANTS.get(name, {}))
    ],
)
def test_traced_with_its_gradient(name: str, variant: str, device: torch.device) -> None:
    """Eager against AOTAutograd with dynamic shapes, which knows dtypes and strides from the fake kernel alone."""
    check_operator(name, Sample(variant=variant, triton=False), device, TRACED)


@EVERY_SAMPLE
def test_operators_leave_their_inputs_alone(name: str, sample: Sample, device: torch.device) -> None:
    """And give the same twice; by the dispatcher or not."""
    arguments = arguments_of(name, sample, device)
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    first, second = seeded(getattr(torch.ops.moa, name), *arguments), seeded(OPERATORS[name], *arguments)
    for a, b in zip(arguments, before):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a is b
    assert len(first) == len(OPERATORS[name].results)
    for a, b in zip(first, second):
        check_identical(a, b)


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, v) for name in OPERATORS for v in ("", "dropout") if not v or v in VARIANTS.get(forward_of(name), {})],
)
def test_operators_compute_under_autocast_as_outside(name: str, variant: str, device: torch.device) -> None:
    """In the dtypes that they are given: what is cast, the layer has cast before."""
    arguments = arguments_of(name, Sample(torch.float32, True, variant=variant, triton=False), device)
    outside = seeded(OPERATORS[name], *arguments)
    with torch.autocast(device.type, torch.bfloat16):
        for call in (OPERATORS[name], getattr(torch.ops.moa, name)):
            for inside, expected in zip(seeded(call, *arguments), outside):
                check_identical(inside, expected)


def forms() -> Iterator[Any]:
    """Names and samples; those of variants run with the other properties of kernels, since they take long."""
    for name in OPERATORS:
        for variant in ("", *VARIANTS.get(forward_of(name), {})):
            for masked in (False, True):
                sample = Sample(variant=variant, masked=masked)
                kernels = "triton" if variant or not masked else "both"
                yield pytest.param(name, sample, kernels, id=f"{name}-{label(sample)}-{kernels}")


@pytest.mark.parametrize(("name", "sample", "kernels"), list(forms()))
def test_pytorch_form_equals_the_kernels(name: str, sample: Sample, kernels: str, device: torch.device) -> None:
    """In float64. What is drawn is drawn alike, also in front of a backward."""
    of = OPERATORS[forward_of(name)]
    named = named_arguments(of.name, sample, device, triton=False)
    check_forms(OPERATORS[name], named if name == of.name else backward_arguments(of, named, sample))


def check_forms(operator: Operator, named: dict[str, Any]) -> None:
    """By PyTorch and by the kernels."""
    forms = [run(operator, named | {"triton": triton}) for triton in (False, True)]
    for key, expected in forms[0].items():
        torch.testing.assert_close(
            forms[1][key], expected, rtol=1e-11, atol=1e-12, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.interpreted
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_blend_where_items_begin_apart(dtype: torch.dtype, kernels: str, device: torch.device) -> None:
    """The first of them in its first block; what is not finite is a constant; in float64 the gradient of local is the
    given one, in float32 it has another dtype than that."""
    sample = Sample()
    named = named_arguments("blend", sample, device, triton=False)
    begin, width = torch.tensor([0, 2], device=device), 3
    slots = begin[:, None, None] + named["indices"] >= width
    named |= {"begin": begin, "width": width, "slots": slots, "dtype": dtype}
    named["inverse"] = ops.inverse_map(named["indices"], slots, sample.n)
    e, b, slot = slots.transpose(0, 1).nonzero()[[0, 3, -1]].unbind(1)
    named["y"][e[0], b[0], slot[0], 1], named["y"][e[1], b[1], slot[1], 0] = math.nan, -math.inf
    named["scores"][b[2], e[2], slot[2]] = math.nan
    check_forms(OPERATORS["blend"], named)
    check_forms(OPERATORS["blend_backward"], backward_arguments(OPERATORS["blend"], named, sample))


@pytest.mark.interpreted
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_tokens_that_the_last_experts_alone_took(kernels: str, device: torch.device) -> None:
    """Of more than a program looks up at a time; one group of them took token 3, the other token 4, nobody the NaN."""
    from optimized.kernels.token_gradient import TakenRows, token_gradient

    experts, n, dim = 34, 6, 4
    x, g = draw((1, n, dim), "normal", 1), draw((2, experts, dim), "normal", 2)
    x[0, 5] = math.nan
    taken = torch.arange(experts) % 3 + torch.zeros(2, 1, dtype=torch.int64)
    taken[:, 32:] = torch.tensor([[3], [4]])
    leaf = x.clone().requires_grad_()
    rows = leaf[0, taken]
    (expected,) = torch.autograd.grad(rows / rows.norm(dim=-1, keepdim=True) * dim**0.5, leaf, g)
    groups = []
    for indices, gradient in zip(taken[:, None, :, None].to(device), g[:, :, None, None].to(device)):
        inverse = ops.inverse_map(indices, torch.ones_like(indices, dtype=torch.bool), n)
        groups.append(TakenRows(gradient, inverse, torch.ones(experts, dim, dtype=x.dtype, device=device)))
    dots = (g * x[0, taken]).sum(-1).view(1, -1).to(device)
    found = token_gradient(x.to(device), None, x.norm(dim=-1).to(device), tuple(groups), dots, None)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.interpreted
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_cosine_routing_of_less_than_the_least_norm(kernels: str, device: torch.device) -> None:
    sample = Sample()
    named = named_arguments("router_logits", sample, device, triton=False)
    named["x"][0, 1] *= 1e-14
    named["x"][1, 2] = 0.0
    leaf = named["x"].clone().requires_grad_()
    cosines = [t / t.norm(dim=-1, keepdim=True).clamp_min(1e-12) for t in (leaf, named["tokens"])]
    given = backward_arguments(OPERATORS["router_logits"], named, sample) | {"triton": True}
    (expected,) = torch.autograd.grad(8 * cosines[1] @ cosines[0].mT, leaf, given["d_logits"])
    found = run(OPERATORS["router_logits_backward"], given)["d_x"]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.interpreted
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_a_cotangent_of_nan_where_a_window_is_nan(kernels: str, device: torch.device) -> None:
    """It reaches nobody: not the keys that such a query sees."""
    named, found = named_arguments("causal_window", Sample(), device), []
    named["qkv"][0, 2, 0, 0, 1] = named["qkv"][1, 3, 1, 1, 0] = math.nan
    for how in ({"backend": "math", "triton": False}, {"backend": "triton", "triton": True}):
        leaf = named["qkv"].clone().requires_grad_()
        out = ops.causal_window.first(**(named | {"qkv": leaf} | how))
        (gradient,) = torch.autograd.grad(out, leaf, torch.where(out.isnan(), math.nan, out.detach().cos()))
        found.append((out, gradient))
    assert 0 < found[0][0].isnan().sum() < found[0][0].numel()
    for a, e in zip(*found):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12, equal_nan=True)
    assert found[0][1].isfinite().all()


# --- batching --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "sample",
    [
        Sample(experts=2),
        Sample(masked=True, experts=2, triton=False),
        Sample(masked=True, experts=2, batch=1),
        Sample(batch=0),
    ],
    ids=["plain", "masked", "masked kernels", "empty"],
)
@pytest.mark.parametrize("name", list(OPERATORS))
def test_batching_rules(name: str, sample: Sample, device: torch.device) -> None:
    """vmap of an operator equals a loop, with the new dimension first or last, and with every other argument shared;
    of the registered operator and of the function, which has a rule of its own. Kernels by the function alone, with all
    arguments batched, in batches of one: how batches are folded is nothing to them.
    """
    op = getattr(torch.ops.moa, name)
    kernels = sample.by_triton
    calls = [arguments_of(name, replace(sample, seed=seed), device) for seed in range(2 if kernels else 3)]
    tensors = [i for i, a in enumerate(calls[0]) if isinstance(a, Tensor)]
    halves = () if kernels or len(tensors) < 2 else (tensors[::2], tensors[1::2])
    for batched in (tensors, *halves):
        loop = [outputs(op(*(c[i] if i in batched else a for i, a in enumerate(calls[0])))) for c in calls]
        expected = tuple(torch.stack(parts) for parts in zip(*loop))
        calls_of = ((op, 0), (OPERATORS[name], -1))
        for call, place in calls_of[1:] if kernels else calls_of[: 2 if batched is tensors else 1]:
            in_dims = tuple(place if i in batched else None for i in range(len(calls[0])))
            stacked = [torch.stack([c[i] for c in calls], place) if i in batched else a for i, a in enumerate(calls[0])]
            found = outputs(vmap(call, in_dims=in_dims)(*stacked))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "shared"])
@pytest.mark.parametrize("name", [name for name in SAMPLES if "dropout" in VARIANTS.get(name, {})])
def test_batching_of_draws(name: str, batched: bool, device: torch.device) -> None:
    """As randomness says: an error, the same masks for equal items, or others."""
    operator = OPERATORS[name]
    x, *rest = arguments_of(name, Sample(variant="dropout"), device)
    places = (0 if batched else None, *[None] * len(rest), 0)
    given = (torch.stack([x] * 3) if batched else x, *rest, torch.zeros(3, dtype=x.dtype, device=device))

    def call(*arguments: Any) -> Tensor:
        return operator(*arguments[:-1])[0] + arguments[-1]

    with pytest.raises(RuntimeError, match=rf"^moa::{name}: vmap: .*randomness='different'"):
        vmap(call, in_dims=places)(*given)
    same = vmap(call, in_dims=places, randomness="same")(*given)
    other = vmap(call, in_dims=places, randomness="different")(*given)
    for i in (1, 2):
        check_identical(same[i], same[0])
        assert not torch.equal(other[i], other[0])
    assert not torch.equal(other[1], other[2])


# --- gradients -------------------------------------------------------------------------------------------------------


def away_from_kinks(solver: str, mask: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    """float64 logits (2, 2, 7) of which none lies within 1e-3 of a comparison, some saturated and some not."""
    for seed in range(200):
        logits = draw((2, 2, 7), "normal", seed)
        valid = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask[:, None].expand_as(logits)
        if solver == "coordinate_descent":
            scores, a, _ = ops.coordinate_descent(logits, mask, *options, False)
            margin = (logits + a[..., None]).abs()[valid.expand(len(a), -1, -1, -1)].min()
            # The counts are read from a_0 on; a row may saturate for some steps only.
        else:
            scores, threshold = ops.capped_simplex(logits, mask, *options, False)
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
SOLVED = [
    *(pytest.param("coordinate_descent", options, id=f"coordinate_descent-{key}") for key, options in DESCENTS.items()),
    *(pytest.param("capped_simplex", options) for options in ((3.375, 0.5), (2.0, 0.3), (1.5, 1.0))),
]


@MASKED
@pytest.mark.parametrize(("name", "options"), SOLVED)
def test_gradcheck_of_solvers(name: str, options: tuple[Any, ...], masked: bool, device: torch.device) -> None:
    """Away from kinks, as called here (which torch.func can batch) and as registered, each in one of two layouts: with
    a mask in the other one.
    """
    mask = MASK if masked else None
    logits = away_from_kinks(name, mask, options).to(device)
    mask = None if mask is None else mask.to(device)
    layouts = ("contiguous", "transposed")[:: -1 if masked else 1]
    for call, batched, layout in ((OPERATORS[name], True, layouts[0]), (OPERATORS[name].op, False, layouts[1])):
        assert gradcheck(
            lambda s, call=call: call(s, mask, *options, False)[0],
            lay_out(logits, layout).detach().requires_grad_(),
            check_grad_dtypes=True,
            check_batched_grad=batched,
            rtol=1e-4,
            atol=1e-6,
        )


def variants(name: str) -> list[str]:
    return ["", *VARIANTS.get(name, {})]


def results_of(call: Callable[..., Any], operator: Operator, named: dict[str, Any]) -> dict[str, Tensor]:
    """By name, those that pass a gradient on."""
    results = dict(zip(operator.results, seeded(call, *(named[key] for key in operator.names))))
    return {key: results[key] for key in operator.gradients_of}


def with_gradients(operator: Operator, named: dict[str, Any]) -> list[str]:
    """Arguments of this call that can have a gradient."""
    return [key for key in operator.wrt if named[key] is not None]


def variants_and_masks() -> Iterator[Any]:
    """By day an operator as it is with masks and without, each variant of it with one of the two, taking turns."""
    for i, name in enumerate(DIFFERENTIABLE):
        for j, variant in enumerate(variants(name)):
            for masked in (False, True):
                stood_for = variant and masked != bool((i + j) % 2)
                marks = pytest.mark.thorough if stood_for else ()
                yield pytest.param(name, variant, masked, id=f"{name}-{variant}-{MASK_NAMES[masked]}", marks=marks)


EVERY_VARIANT = pytest.mark.parametrize(("name", "variant", "masked"), list(variants_and_masks()))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@EVERY_VARIANT
def test_gradcheck_of_whole_stages(name: str, variant: str, kernels: str, masked: bool, device: torch.device) -> None:
    """In float64, all differentiable arguments at once; scores are handed on as they are, not straight-through.

    The function without masks, the registered operator with them; kernels by the function.
    """
    operator = OPERATORS[name]
    named = named_arguments(name, Sample(masked=masked, variant=variant), device, triton=kernels == "triton")
    if "straight_through" in named:
        named["straight_through"] = False
    # Unit scores are promised, so they don't vary.
    wrt = [key for key in with_gradients(operator, named) if not (key == "scores" and named.get("unit_scores"))]
    form = operator.op if masked and kernels == "torch" else operator

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        results = results_of(form, operator, named | dict(zip(wrt, leaves)))
        if name == "routed_rows":  # see the next test
            halves = zip(results.pop("logits").chunk(2, 1), (named["k_q"], named["k_kv"]))
            results |= {f"logits {k}": half for half, k in halves if half.shape[-1] > k}
        return tuple(results.values())

    leaves = [named[key].detach().clone().requires_grad_() for key in wrt]
    # Where its fast mode fails, gradcheck goes on to the slow one for the message: minutes of interpreted kernels.
    module = sys.modules["torch.autograd.gradcheck"]
    with mock.patch.object(module, "_run_slow_mode_and_get_error", create=True, return_value=""):
        assert gradcheck(call, leaves, fast_mode=True, eps=1e-7, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("variant", "idle"),
    [("", set()), ("all_queries", {"q_tokens"}), ("takes_all", {"x", "q_tokens", "kv_tokens"})],
    ids=["both decide", "keys decide", "none decides"],
)
def test_logits_that_decide_nothing_pass_no_gradient_on(
    variant: str, idle: set[str], triton: bool, device: torch.device
) -> None:
    """Zeros, though they depend on the routing tokens: where N <= K there is nothing to choose."""
    operator = OPERATORS["routed_rows"]
    named = named_arguments("routed_rows", Sample(variant=variant), device, triton=triton)
    leaves = {key: named[key].requires_grad_() for key in ("x", "q_tokens", "kv_tokens")}
    logits = results_of(operator, operator, named)["logits"]
    g = draw(tuple(logits.shape), "normal", 1).to(logits)
    found = torch.autograd.grad(logits, list(leaves.values()), g)
    assert {key for key, gradient in zip(leaves, found) if not gradient.any()} == idle


@MASKED
@pytest.mark.parametrize("block", [None, 4], ids=["whole", "blocks"])
@pytest.mark.parametrize("exact", [False, True], ids=["iterative", "exact"])
@pytest.mark.parametrize("name", ["pick", "routed_rows"])
def test_straight_through_has_the_gradient_of_soft_scores(
    name: str, exact: bool, block: int | None, masked: bool, device: torch.device
) -> None:
    operator, found = OPERATORS[name], []
    for straight_through in (False, True):
        options = {"exact": exact, "block": block, "straight_through": straight_through, "eps": 0.5}
        named = named_arguments(name, Sample(masked=masked, triton=False), device, **options)
        leaf = named[operator.wrt[0]].requires_grad_()
        results = results_of(operator, operator, named)
        scores = [t for key, t in results.items() if "picked" in key or key == "scores"]
        ones = torch.cat([t.detach().flatten() for t in scores])
        assert bool(((ones == 0) | (ones == 1)).all()) == straight_through
        cotangents = [draw(tuple(t.shape), "normal", i).to(t) for i, t in enumerate(scores)]
        found.append(torch.autograd.grad(scores, leaf, cotangents)[0])
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


def subsets(keys: list[str], few: bool = False) -> Iterator[tuple[str, ...]]:
    """All of up to five; of more: each, pairs, all but one, all. Ten have a thousand. few: each, and all."""
    sizes: Iterable[int] = range(1, len(keys) + 1) if len(keys) <= 5 else (1, 2, len(keys) - 1, len(keys))
    sizes = {1, len(keys)} if few else sizes
    return itertools.chain.from_iterable(itertools.combinations(keys, size) for size in sizes)


def bits(operator: Operator, wanted: tuple[str, ...]) -> int:
    return sum(1 << operator.wrt.index(key) for key in wanted)


def check_gradient(actual: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13, msg=lambda m: f"{name}: {m}")


def counted(work: Callable[[], Any]) -> int:
    """FLOPs by PyTorch's counter."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@EVERY_VARIANT
def test_only_what_is_needed(name: str, variant: str, masked: bool, device: torch.device) -> None:
    """Every subset of gradients (of a variant each) is the same as among all, the others are empty; by autograd too.

    But for the order in which a product of matrices sums, which depends on its size.
    """
    operator, sample = OPERATORS[name], Sample(masked=masked, variant=variant, triton=False)
    named = named_arguments(name, sample, device)
    possible = with_gradients(operator, named)
    given = backward_arguments(operator, named, sample)
    backward = operator.backward
    assert backward is not None
    full = run(backward, given)
    for wanted in subsets(possible, few=bool(variant)):
        found = run(backward, given | {"needs": bits(operator, wanted)})
        for key in operator.wrt:
            if key in wanted:
                check_gradient(found[f"d_{key}"], full[f"d_{key}"], f"{key} of {wanted}")
                assert (found[f"d_{key}"].shape, found[f"d_{key}"].dtype) == (named[key].shape, named[key].dtype)
            else:
                assert found[f"d_{key}"].shape == (0,), f"{key}, of which nobody asked for a gradient"
    for wanted in (*((key,) for key in possible), tuple(possible)):
        leaves = {key: named[key].detach().clone().requires_grad_() for key in wanted}
        results = results_of(operator, operator, named | leaves)
        torch.autograd.backward(list(results.values()), [given[f"d_{key}"] for key in results])
        for key, leaf in leaves.items():
            check_gradient(leaf.grad, full[f"d_{key}"], f"{key} of {wanted}, by autograd")


@pytest.mark.interpreted
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if len(OPERATORS[name].wrt) > 1])
def test_kernels_give_each_gradient_alone(name: str, kernels: str, device: torch.device) -> None:
    """As among all."""
    operator, sample = OPERATORS[name], Sample(masked=True, batch=1, n=4, experts=2)
    named = named_arguments(name, sample, device, triton=False)
    given = backward_arguments(operator, named, sample) | {"triton": True}
    full = run(operator.backward, given)
    for key in with_gradients(operator, named):
        alone = run(operator.backward, given | {"needs": bits(operator, (key,))})
        check_gradient(alone[f"d_{key}"], full[f"d_{key}"], key)


@pytest.mark.interpreted
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(
    ("name", "key"),
    [("layer_norm", "weight"), ("layer_norm", "bias"), ("memory_experts", "kv_gamma"), ("blend", "null")],
)
def test_a_parameter_of_more_digits(name: str, key: str, kernels: str, device: torch.device) -> None:
    """Than others have: its gradient has them, too, and no other."""
    operator, sample = OPERATORS[name], Sample(torch.bfloat16, batch=1, n=6, experts=2, triton=False)
    named = named_arguments(name, sample, device)
    named[key] = named[key].float()
    found = run(operator.backward, backward_arguments(operator, named, sample) | {"triton": kernels == "triton"})
    for other in with_gradients(operator, named):
        assert found[f"d_{other}"].dtype == named[other].dtype, other
    assert (found[f"d_{key}"].bfloat16() != found[f"d_{key}"]).any()


@pytest.mark.interpreted
@pytest.mark.parametrize("kernels", ["torch", "triton"], indirect=True)
@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name not in LOGITS])
def test_gradients_are_of_the_dtypes_of_their_arguments(name: str, kernels: str, device: torch.device) -> None:
    """In half precision, where they are sums in more: autograd would convert them, a program that calls may not."""
    operator, sample = OPERATORS[name], Sample(torch.bfloat16, batch=1, n=6, experts=2, triton=False)
    named = named_arguments(name, sample, device)
    given = backward_arguments(operator, named, sample) | {"triton": kernels == "triton"}
    found = run(operator.backward, {key: given[key] for key in operator.backward.names})
    for key in with_gradients(operator, named):
        assert found[f"d_{key}"].dtype == named[key].dtype, key


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_each_result_passes_its_gradient_on(name: str, device: torch.device) -> None:
    """On its own: those of all, added up, are the gradient of all at once; zeros, not None, where none comes."""
    operator, sample = OPERATORS[name], Sample()
    named = named_arguments(name, sample, device)
    given = backward_arguments(operator, named, sample)
    total: dict[str, Tensor] = {}
    leaves = {key: named[key].detach().requires_grad_() for key in with_gradients(operator, named)}
    results = results_of(operator, operator, named | leaves)
    for key, result in results.items():
        found = torch.autograd.grad(
            result, list(leaves.values()), given[f"d_{key}"], retain_graph=True, allow_unused=True
        )
        for leaf, g in zip(leaves, found):
            assert g is not None, f"{leaf}: None for the gradient of {key}"
            total[leaf] = total[leaf] + g if leaf in total else g
    full = run(operator.backward, given)
    for leaf, g in total.items():
        torch.testing.assert_close(g, full[f"d_{leaf}"], rtol=1e-11, atol=1e-12)


@MASKED
@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "causal_window"])  # which is never all pairs
def test_flops_are_those_of_the_products(name: str, masked: bool) -> None:
    """What an operator says of itself, and of each subset of gradients, is what PyTorch counts inside of it. With masks
    of each gradient alone and of all: a product is as large with them.

    Windows reach over all tokens, which is what attention written out computes. Logits are products, too, if made as
    sums.
    """
    operator, sample = OPERATORS[name], Sample(masked=masked, triton=False, n=7)
    changes = {"window": 9, "causal": False, "mask": None, "backend": "math"} if name.startswith("window") else {}
    named = named_arguments(name, sample, CPU, **changes)
    values = [named[key] for key in operator.names]
    said = counted(lambda: operator.op(*values))
    logits = [2 * named["x"].numel() * named[key].shape[-2] for key in operator.names if key.endswith("tokens")]
    assert said == counted(lambda: operator.raw(*values)) + sum(logits)
    products = "router_logits", "routed_rows", "mixture", "window", "memory_experts"
    assert (said > 0) == (name in products or "attention" in name)
    if operator.backward is None:
        return
    given = backward_arguments(operator, named, sample)
    for wanted in subsets(with_gradients(operator, named), few=masked):
        values = [{**given, "needs": bits(operator, wanted)}[key] for key in operator.backward.names]
        said = counted(lambda values=values: operator.backward.op(*values))
        assert said == counted(lambda values=values: operator.backward.raw(*values)), wanted


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "reach"), [(0, 2), (1, 3), (7, 2), (7, 6), (7, 60), (30, 4)])
def test_flops_of_a_window(n: int, reach: int, causal: bool) -> None:
    """In proportion to the pairs that it shows, forward and backward."""
    apart = torch.arange(n)[:, None] - torch.arange(n)
    pairs = int(((apart <= reach) & (apart >= (0 if causal else -reach))).sum())
    sample = Sample(n=n)
    changes = {"window": reach, "causal": causal}
    products = 4 * pairs * sample.batch * 2 * 4
    projections = 2 * sample.batch * n * DIM * 32
    windows = {"window": 0, "window_attention": projections, **({"causal_window": 0} if causal else {})}
    for name, extra in windows.items():
        operator, named = OPERATORS[name], named_arguments(name, sample, CPU, **changes)
        assert counted(lambda o=operator, v=named: run(o, v)) == products + extra
        given = backward_arguments(operator, named, sample)
        assert counted(lambda o=operator, v=given: run(o.backward, v)) == products * 5 // 2 + 2 * extra
    named = named_arguments("attention", replace(sample, experts=1), CPU, **changes)
    assert counted(lambda: run(OPERATORS["attention"], named)) == products


CASE = Case("small", "", batch=2, n=20, dim=16, heads=2, experts=3, slots=5, dim_head=8, dtype="float32")


def counts_of_a_layer(case: Case, frozen: tuple[str, ...] = ()) -> tuple[int, int]:
    """FLOPs forward, and forward and backward; the frozen parameters, and x by that name, need no gradient."""
    layer = optimized.MixtureOfAttention(**case.layer_arguments())
    for name, p in layer.named_parameters():
        p.requires_grad_(name not in frozen)
    x = case.make_x(CPU).requires_grad_("x" not in frozen)
    return counted(lambda: layer(x)), counted(lambda: layer(x).sum().backward())


@pytest.mark.parametrize("window", [None, 3], ids=["routed", "local"])
def test_flops_of_the_layer(window: int | None) -> None:
    """As the benchmarks count them from the definition; a frozen weight drops its product, and no other."""
    case = replace(CASE, window=window)
    parts = flops.layer(case)
    both = flops.total(parts, "forward+backward")
    assert counts_of_a_layer(case) == (flops.total(parts, "forward"), both)
    rows = 2 * case.batch * case.experts * case.taken * case.dim * case.inner
    drops = {"attn.to_q.weight": rows, "attn.to_kv.weight": 2 * rows, "attn.to_out.weight": rows}
    drops |= dict.fromkeys(("query_router.routing_token", "key_value_router.routing_token"), parts["router"] / 2)
    drops["x"] = parts["router"]
    if window is not None:
        drops |= {
            "local_attn.to_qkv.weight": parts["local projections"] * 3 / 4,
            "local_attn.to_out.weight": parts["local projections"] / 4,
        }
    for name, count in drops.items():
        assert counts_of_a_layer(case, (name,))[1] == both - count, name
    tokens = ("query_router.routing_token", "key_value_router.routing_token", "x")
    assert counts_of_a_layer(case, tokens)[1] == both - 2 * parts["router"]
    every = [name for name, _ in optimized.MixtureOfAttention(**case.layer_arguments()).named_parameters()]
    rest = tuple(name for name in (*every, "x") if name != "attn.to_out.weight")
    assert counts_of_a_layer(case, rest)[1] == flops.total(parts, "forward") + rows


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_operators_refuse_higher_derivatives(name: str, device: torch.device) -> None:
    """By name, whichever way they are asked; the registered operator refuses double backward too."""
    operator = OPERATORS[name]
    named = named_arguments(name, Sample(), device)
    first = operator.wrt[0]
    value = named[first]

    def loss(call: Any, t: Tensor) -> Tensor:
        return sum(r.square().sum() for r in results_of(call, operator, named | {first: t}).values())

    def twice(call: Any) -> None:
        leaf = value.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(call, leaf), leaf, create_graph=True)
        torch.autograd.grad(g.square().sum(), leaf)

    refused = pytest.raises(RuntimeError, match=rf"^moa::{name}: double backward is not supported")
    for call in (operator, operator.op):
        with refused:
            twice(call)
    with refused:
        grad(lambda s: grad(lambda t: loss(operator, t))(s).square().sum())(value)
    tangent = torch.ones_like(value)
    refused = pytest.raises(RuntimeError, match=rf"^moa::{name}: forward-mode differentiation is not supported")
    with refused:
        jvp(lambda t: loss(operator, t), (value,), (tangent,))
    with refused, forward_ad.dual_level():
        loss(operator, forward_ad.make_dual(value, tangent))
    with forward_ad.dual_level():
        check_identical(loss(operator, value), loss(operator, value.clone()))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_other_results_are_not_differentiable(name: str, device: torch.device) -> None:
    """A loss on a threshold, say, would get a gradient of zero without a word."""
    operator = OPERATORS[name]
    named = named_arguments(name, Sample(), device)
    named[operator.wrt[0]] = named[operator.wrt[0]].clone().requires_grad_()
    values = [named[key] for key in operator.names]
    for call in (operator, operator.op):
        for key, t in zip(operator.results, outputs(call(*values))):
            assert t.requires_grad == (key in operator.gradients_of), key


# Temperatures that fall far at once where a step saturates nothing: (tokens, k, n_iters, eps, eps_init, eps_decay).
FALLS = [
    (11, 1.0, 3, 1e-3, 4.0, 0.01),
    (11, 1.0, 4, 1e-6, 4.0, 1e-4),
    (50, 2.0, 4, 1e-4, 10.0, 0.001),
    (7, 0.5, 2, 1e-5, 1.0, 1e-4),
    (200, 3.0, 6, 1e-3, 100.0, 0.05),
]


@pytest.mark.parametrize("values", ["equal", "near", "masked"])
@pytest.mark.parametrize("fall", FALLS, ids=str)
@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
def test_gradient_of_a_temperature_that_falls(
    triton: bool, fall: tuple[Any, ...], values: str, device: torch.device
) -> None:
    """The share of the mass that is saturated is 0 there, not 0 times infinity."""
    n, *options = fall
    logits = torch.zeros(1, 1, n, dtype=torch.float64)
    if values != "equal":
        logits = 1e-6 * draw((1, 1, n), "normal", 3)
    mask = torch.arange(n)[None] % 3 != 1 if values == "masked" else None
    mask = None if mask is None else mask.to(device)
    g, found = draw((1, 1, n), "normal", 4).to(device), []
    for call in (
        lambda s: reference.coordinate_descent(s, options[0], mask, **dict(zip(NAMES, options[1:]))),
        lambda s: ops.coordinate_descent(s, mask, *options, triton)[0],
    ):
        leaf = logits.to(device).requires_grad_()
        found.append(torch.autograd.grad(call(leaf), leaf, g)[0])
    assert found[1].isfinite().all()
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9 * found[0].abs().max().item())


NAMES = ("n_iters", "eps", "eps_init", "eps_decay")


@pytest.mark.interpreted
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("alone", range(5))
def test_a_token_far_from_all_others_that_experts_took(alone: int, kernels: str, device: torch.device) -> None:
    """It has its gradient, and so has one shorter than the least norm that rows are divided by. A scale that is NaN is
    felt by that expert's token, a NaN that nobody took by none.
    """
    experts, n, other = 5, 300, (alone + 1) % 5
    x, gamma = draw((1, n, 16), "normal", 1), draw((experts, 16, 1), "normal", 2)
    indices = torch.arange(experts)[None, :, None].clone()
    indices[0, alone] = n - 10
    g = draw((experts, 1, 1, 16), "normal", 3)
    x[0, (alone + 2) % 5] *= 1e-14
    leaf = x.clone().requires_grad_()
    taken = leaf[0, indices[0, :, 0]]
    picked = taken / taken.norm(dim=-1, keepdim=True).clamp_min(1e-12) * 4 * gamma[..., 0]
    (expected,) = torch.autograd.grad(picked, leaf, g[:, 0, 0])
    expected[0, indices[0, other, 0]] = torch.nan
    x[0, 150], gamma[other] = torch.nan, torch.nan
    leaf, indices = x.to(device).requires_grad_(), indices.to(device)
    there = torch.ones_like(indices, dtype=torch.bool)
    inverse = ops.inverse_map(indices, there, n)
    rows = ops.gather_norm(leaf, gamma.to(device), indices, there, inverse, kernels == "triton")[0]
    (dx,) = torch.autograd.grad(rows, leaf, g.to(device))
    torch.testing.assert_close(dx.cpu(), expected, rtol=1e-11, atol=1e-12, equal_nan=True)


@pytest.mark.interpreted
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("norm", [True, False])
def test_a_key_that_is_not_finite_spoils_no_weight(norm: bool, kernels: str, device: torch.device) -> None:
    """Listed or not, of one item: 0 times it is no part of the gradient of the keys' weight."""
    named = named_arguments("memory_experts", Sample(n=8, experts=2), device, triton=kernels == "triton")
    named["x"] = named["x"].detach().clone()
    named["x"][0, 0, 0], named["x"][0, 1, 1], named["x"][0, -1, 2] = torch.nan, torch.inf, -torch.inf
    if not norm:
        named |= {"q_gamma": None, "kv_gamma": None}
    named["w_kv"] = named["w_kv"].detach().requires_grad_()
    y = ops.memory_experts.first(*named.values())
    (gradient,) = torch.autograd.grad(y, named["w_kv"], draw(tuple(y.shape), "normal", 5).to(y))
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.interpreted
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_keys_that_nobody_lists(kernels: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 where they are a result; where they are none, anything, which no gradient reads."""
    operator, sample = OPERATORS["memory_experts"], Sample(batch=1, experts=2)
    named = named_arguments("memory_experts", sample, device, triton=True)
    plain = run(operator, named)
    leaves = {key: named[key].detach().clone().requires_grad_() for key in operator.wrt}
    found = []
    for call in (operator, operator.first):
        with new_memory_in_zones(monkeypatch):
            y, *others = outputs(call(**named | leaves))
            found.append(torch.autograd.grad(y, list(leaves.values()), draw(tuple(y.shape), "normal", 9).to(y)))
        for key, result in zip(operator.results, (y, *others)):
            if key in {"y", "kv"}:
                check_identical(result.detach(), plain[key], key)
    assert torch.equal(plain["kv"][:, :, -1], torch.zeros_like(plain["kv"][:, :, -1]))
    for key, a, b in zip(leaves, *found):
        check_identical(a, b, key)


@pytest.mark.interpreted
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_keys_by_a_weight_of_any_strides(kernels: str, device: torch.device) -> None:
    """As it is given: without a scale to multiply it by, nothing is made of it before."""
    named = named_arguments("memory_experts", Sample(n=4, experts=2, variant="no_norm"), device, triton=False)
    named["w_kv"] = lay_out(named["w_kv"], "sliced")
    check_forms(OPERATORS["memory_experts"], named)


@pytest.mark.interpreted
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_a_token_whose_norm_is_infinite_has_no_gradient(kernels: str, device: torch.device) -> None:
    """Its numbers are not."""
    sample = Sample(n=4, experts=2)
    named = named_arguments("memory_experts", sample, device, triton=False)
    named["x"][0, 1] *= 1e200
    given = backward_arguments(OPERATORS["memory_experts"], named, sample)
    check_forms(OPERATORS["memory_experts_backward"], given)
    assert (run(OPERATORS["memory_experts_backward"], given)["d_x"][0, 1] == 0).all()


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [Sample(), Sample(masked=True), Sample(batch=0), Sample(n=0)], ids=repr)
def test_gather_and_its_gradient_are_transposed(sample: Sample, device: torch.device) -> None:
    """<gather(x), y> == <x, gather'(y)>, exactly: the numbers are integers. What no valid slot holds may be NaN."""
    sample = replace(sample, variant="no_norm")
    x, _, *routing, triton = arguments_of("gather_norm", sample, device)
    _, mask, inverse = routing
    x = (10 * x).round()
    slots, held = mask.transpose(0, 1)[..., None], (inverse >= 0).any(1)[..., None]
    leaf = x.masked_fill(~held, math.nan).requires_grad_()
    rows = ops.gather_norm(leaf, None, *routing, triton)[0]
    y = (10 * draw(tuple(rows.shape), "normal", 1).to(rows)).round()
    (back,) = torch.autograd.grad(rows, leaf, y.masked_fill(~slots, math.nan))
    rows = rows.detach()
    assert (rows * y).sum() == (x * back).sum()
    assert not rows.masked_fill(slots, 0).any()
    assert not back.masked_fill(held, 0).any()
    if x.numel():
        assert rows.any()
        assert back.any()


@pytest.mark.parametrize("name", ["gather_norm_backward", "combine"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sum_over_experts_rounds_once(dtype: torch.dtype, name: str, device: torch.device) -> None:
    """Three experts' rows are added up in float32."""
    variant = "no_norm" if name != "combine" else "alone"
    named = dict(zip(OPERATORS[name].names, arguments_of(name, Sample(dtype, variant=variant), device)))
    wide = {key: t.float() if isinstance(t, Tensor) and t.dtype == dtype else t for key, t in named.items()}
    if name == "combine":
        wide["dtype"] = torch.float32
    low, exact = (next(iter(run(OPERATORS[name], given).values())) for given in (named, wide))
    assert low.dtype == dtype
    check_identical(low, exact.to(dtype))


FORMS = pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])


@FORMS
@pytest.mark.parametrize("heads", [2, 5], ids=["few", "many"])
@pytest.mark.parametrize("placed", [False, True], ids=["in order", "placed"])
def test_rotation_by_hand(placed: bool, heads: int, triton: bool, device: torch.device) -> None:
    """Rows at positions of their own; many: more heads than a program of the kernel turns at a time."""
    t = draw((3, 2, heads, 1024), "normal", 1).to(device)
    angles = draw((4, 1024), "normal", 2).to(device)  # unlike in both halves
    positions = torch.tensor([[1, 0], [3, 2], [0, 3]], device=device) if placed else None
    at = angles[torch.arange(2, device=device).expand(3, 2) if positions is None else positions][:, :, None]
    first, second = t.chunk(2, -1)
    expected = t * at.cos() + torch.cat((-second, first), -1) * at.sin()
    leaf = t.clone().requires_grad_()
    actual = ops.rotary(leaf, angles.cos(), angles.sin(), positions, False, triton)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    g = draw(tuple(t.shape), "normal", 3).to(device)
    (gradient,) = torch.autograd.grad(actual, leaf, g)
    turned = (g * at.sin()).chunk(2, -1)
    torch.testing.assert_close(gradient, g * at.cos() + torch.cat((turned[1], -turned[0]), -1), rtol=1e-12, atol=1e-12)


@FORMS
@pytest.mark.parametrize("rest", ["null", "local"])
@pytest.mark.parametrize(("dim", "average"), [(3, False), (3, True), (4100, True)], ids=["sum", "average", "many"])
def test_combination_and_its_gradients(dim: int, rest: str, average: bool, triton: bool, device: torch.device) -> None:
    """Against the sum over a dense map of slots to tokens. Many: more channels than a program holds at a time.

    Masked slots hold NaN, and so do the cotangents of masked tokens; many tokens are taken by nobody.
    """
    n = 12 if dim > 1000 else 40
    sample = Sample(masked=True, n=n)
    indices, slots, inverse = (t.to(device) for t in sample.routing().values())
    mask = to(device, sample.token_mask())
    y = draw((3, 2, 4, dim), "normal", 1).to(device).masked_fill(~slots.transpose(0, 1)[..., None], math.nan)
    scores = draw((2, 3, 4), "normal", 2).to(device)
    other = draw((dim,) if rest == "null" else (2, n, dim), "normal", 3).to(device)
    leaves = [t.requires_grad_() for t in (y, scores, other)]
    local, null = (None, other) if rest == "null" else (other, None)
    actual = ops.combine(y, scores, indices, slots, inverse, local, null, mask, average, y.dtype, triton)

    place = torch.nn.functional.one_hot(indices, n) * slots[..., None]
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
    g = draw((2, n, dim), "normal", 4).to(device).masked_fill(~mask[..., None], math.nan)
    for a, e in zip(torch.autograd.grad(actual, leaves, g), torch.autograd.grad(expected, leaves, g)):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


GRAPHS = [(name, v) for name in SAMPLES for v in ("", "blocks") if v in variants(name)]


def mark_lengths(named: dict[str, Any], others: dict[str, Any]) -> None:
    """Sizes that differ between two lengths are to be symbols; the compiler raises where it takes one for a number."""
    for key, t in named.items():
        if isinstance(t, Tensor):
            for i, (size, other) in enumerate(zip(t.shape, others[key].shape)):
                if size != other:
                    torch._dynamo.mark_dynamic(t, i)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("name", "variant"), GRAPHS)
def test_one_graph_for_all_lengths(name: str, variant: str, device: torch.device) -> None:
    """Forward and backward, below, at and above K, a window and a block; the first of a size that no other has.

    Of `pick` all sizes and numbers are symbols; of others those that a length decides, which takes a third of the time.
    All are symbols in `test_traced_with_its_gradient`, of one length.
    """
    operator, masked, graphs = OPERATORS[name], name.startswith("window"), set()  # masked windows are cut in blocks
    counter, every = CompileCounterWithBackend("aot_eager"), name == "pick"

    @torch.compile(backend=counter, fullgraph=True, dynamic=True if every else None)
    def compiled(named: dict[str, Any]) -> Any:
        return operator(**named)

    # `select` takes four of at least as many; so do the maps of others here.
    lengths = (11, 4, 8, 5) if "inverse" in operator.names or name == "select" else (11, 2, 3, 4, 8)
    if name in ("memory_attention", "memory_experts"):
        lengths = tuple(2 * n for n in lengths)  # so many blocks
    shortest = Sample(masked=masked, variant=variant, n=min(lengths), triton=False)
    for n in lengths:
        sample, found = replace(shortest, n=n), []
        for call in (compiled, lambda named: operator(**named)):
            named = named_arguments(name, sample, device)
            if not every:
                mark_lengths(named, named_arguments(name, shortest, device))
            wrt = with_gradients(operator, named)
            leaves = [named[key].requires_grad_() for key in wrt]
            results = dict(zip(operator.results, outputs(call(named))))
            tensors = [results[key] for key in operator.gradients_of]
            cotangents = [draw(tuple(t.shape), "normal", i).to(t) for i, t in enumerate(tensors)]
            gradients = torch.autograd.grad(tensors, leaves, cotangents) if wrt else ()
            found.append({**results, **{f"d_{key}": g for key, g in zip(wrt, gradients)}})
        for key, expected in found[1].items():
            torch.testing.assert_close(
                found[0][key], expected, rtol=1e-12, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
            )
        graphs.add(counter.frame_count)  # the first call may try twice, where a float is no symbol after all
    assert len(graphs) == 1, f"new graphs after the first call: {sorted(graphs)}"


# --- past the dispatcher ---------------------------------------------------------------------------------------------


class _Seen(TorchDispatchMode):
    """Names of the operators that the dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_plain_call_is_the_operator(name: str, device: torch.device) -> None:
    """Values, gradients and layout; and a mode that looks on sees the operators, forward and backward."""
    operator, found, names = OPERATORS[name], [], []
    for mode in (contextlib.nullcontext(), _Seen()):
        named = named_arguments(name, Sample(), device)
        leaf = named[operator.wrt[0]].requires_grad_()
        with mode:
            results = outputs(operator(*(named[key] for key in operator.names)))
            differentiable = [t for t in results if t.requires_grad]
            cotangents = [draw(tuple(t.shape), "normal", i).to(t) for i, t in enumerate(differentiable)]
            torch.autograd.backward(differentiable, cotangents)
        found.append((*(t.detach() for t in results), leaf.grad))
        names.append(getattr(mode, "names", []))
    for plain, seen in zip(*found):
        check_identical(plain, seen)
    assert {f"moa::{name}", f"moa::{name}_backward"} <= set(names[1])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_plain_call_without_gradients_records_nothing(name: str, device: torch.device) -> None:
    operator = OPERATORS[name]
    named = named_arguments(name, Sample(), device)
    first = operator.gradients_of[0]

    def recorded() -> bool:
        return results_of(operator, operator, named)[first].grad_fn is not None

    assert not recorded()
    named[operator.wrt[0]].requires_grad_()
    assert recorded()
    with torch.no_grad():
        assert not recorded()


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
    lengths = {"self": (27, 30), "injected": (23,)}.get(name, ())
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


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", [name for name in stages.STAGES if not name.startswith("layer")])
def test_compiled_functions_equal_eager(name: str, device: torch.device) -> None:
    """Without graph breaks, with options by name, as a layer of one's own calls them."""
    made = stages.stage(name, torch.float32, device)
    g = stages.cotangent_of(made.run(optimized, made.tensors, ())[0])
    compiled = torch.compile(partial(made.call, optimized), fullgraph=True, backend="aot_eager")
    eager = made.run(optimized, made.tensors, made.leaves, g)
    actual = replace(made, call=lambda package, tensors: compiled(tensors)).run(optimized, made.tensors, made.leaves, g)
    check_identical(actual[0], eager[0], name)
    for leaf, gradient in eager[1].items():
        check_identical(actual[1][leaf], gradient, leaf)


@pytest.mark.nightly  # by day the machine code of both directions, for any length: programs/test_dynamic_lengths.py
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
# Whatever the backend: the routing, the attention of the experts and the combination.
REACH_OPERATORS = {"x", "attn.to_out.weight", "null_routed_token"}


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
    assert REACH_OPERATORS & values.keys() <= refused


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
    assert REACH_OPERATORS & values.keys() <= refused


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
