"""The router: logits, solvers, selection, and `route`, which puts them together.

Selection is a step function and the solver has kinks, so the parts are compared apart: logits within budget; solvers
and selection on the very same logits; gradients with the saturated sets of the implementation injected into the
oracle, after these sets were compared with the oracle's own.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from harness import BOTH, DTYPES, EVERY_KERNEL, check, check_identical, counted, expectation, interpreted
from hypothesis import example, given
from hypothesis import strategies as st
from runs import BASELINE_OF, degenerate_rows, kink_free, router_tensors
from strategies import MASKS, RouterCase, draw, draw_mask, generator, router_cases
from torch import Tensor
from torch.autograd import forward_ad

import optimized
import reference
from optimized import ops
from reference import oracle

EPSILONS = {"eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7}
OFF_BAND = ("normal", "large", "tiny", "outlier")  # no exact ties, whose order would hang on rounding


def apply_rows(function: object, logits: Tensor, mask: Tensor | None, *args: object, **kwargs: object) -> Tensor:
    """A row-wise NumPy function on (B, E, N) logits and a (B, N) mask."""
    rows = []
    for b, e in itertools.product(range(logits.shape[0]), range(logits.shape[1])):
        row_mask = None if mask is None else mask[b].cpu().numpy()
        rows.append(function(logits[b, e].detach().cpu().double().numpy(), *args, row_mask, **kwargs))
    return rows


def as_tensor(rows: list, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.as_tensor(np.array(rows).reshape(shape), device=device)


# --- logits ----------------------------------------------------------------------------------------------------------


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=router_cases(blocks=False))
# A row that is one valid token's logit of 0.03, a sum of terms of up to 3: its error is relative to the terms.
@example(case=RouterCase(batch=3, n=2, dim=8, k=1, mask="random", tokens_per_item=True, seed=142))
@counted
def test_logits_match(kernels: str, case: RouterCase, dtype: torch.dtype, device: torch.device) -> None:
    runs = []
    for implementation, run_dtype, layout in (
        (optimized, dtype, True),
        (reference, torch.float64, False),
        (reference, BASELINE_OF.get(dtype, dtype), False),
    ):
        x, tokens, mask = router_tensors(case, dtype, run_dtype, device, layout=layout)
        runs.append(implementation.route(x, tokens, case.k, mask, **case.options).logits.detach())
    actual, exact, baseline = runs
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    # A masked token's logits are those of a zero token; with nothing valid they are all zero.
    expect = None
    if not exact.abs().any():
        expect = "zeros"
    elif exact.numel() > 1 and (exact == exact.flatten()[0]).all():
        expect = "constant"
    x, tokens, mask = router_tensors(case, dtype, torch.float64, device, layout=False)
    terms = reference.route(x.abs(), tokens.abs(), case.k, mask, **case.options).logits.detach()
    check(actual, exact, baseline, stage="logits", expect=expect, scale=float(terms.nan_to_num().max()))


# --- selection -------------------------------------------------------------------------------------------------------

ATOMS = (0.0, -0.0, 1.0, 1.0, -1.0, 2.5, math.inf, -math.inf, math.nan)


@st.composite
def selections(draw_: st.DrawFn) -> tuple[Tensor, int, Tensor | None]:
    """Logits (B, E, N) of ATOMS, k, mask."""
    batch, experts, n = draw_(st.integers(1, 3)), draw_(st.integers(1, 3)), draw_(st.integers(1, 40))
    seed = draw_(st.integers(0, 2**20))
    atoms = torch.tensor(ATOMS, dtype=torch.float64)
    logits = atoms[torch.randint(len(ATOMS), (batch, experts, n), generator=generator(seed))]
    return logits, draw_(st.integers(1, n)), draw_mask(batch, n, draw_(st.sampled_from(MASKS)), seed)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=selections())
@counted
def test_selection_is_the_declared_rule(
    implementation: ModuleType, dtype: torch.dtype, device: torch.device, problem: tuple[Tensor, int, Tensor | None]
) -> None:
    """Ties, signed zeros, infinities, NaN and masks, against the oracle's sort with an explicit key."""
    logits, k, mask = problem
    logits = logits.to(dtype).to(device)
    mask = None if mask is None else mask.to(device)
    indices, slots = implementation.select(logits, k, mask)
    expected = apply_rows(oracle.select, logits, mask, k)
    check_identical(indices, as_tensor([r[0] for r in expected], indices.shape, device).long())
    check_identical(slots, as_tensor([r[1] for r in expected], slots.shape, device).bool())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("start", [1.0, -3.0, 0.0, 1e30])
def test_selection_among_neighbouring_floats(
    implementation: ModuleType, start: float, dtype: torch.dtype, device: torch.device
) -> None:
    """A rounding apart, in random order: down from the start, through the smallest numbers where it is 0."""
    ladder = [torch.tensor(start, dtype=dtype)]
    for _ in range(40):
        ladder.append(torch.nextafter(ladder[-1], torch.tensor(-math.inf, dtype=dtype)))
    order = torch.stack([torch.randperm(41, generator=generator(i)) for i in range(6)])
    logits = torch.stack(ladder)[order].view(2, 3, 41).to(device)
    for k in (1, 13, 40):
        expected = (order < k).nonzero()[:, 1].view(2, 3, k).to(device)
        check_identical(implementation.select(logits, k, None)[0], expected)


@BOTH
@pytest.mark.parametrize("n", [2**15, 2**16])
def test_selection_among_equal_keys(implementation: ModuleType, n: int, device: torch.device) -> None:
    """The first of those that are shown, however many are equal."""
    mask = (torch.rand(1, n, generator=generator(1)) < 0.7).to(device)
    logits = torch.full((1, 2, n), -2.5, device=device)
    for k in (1, n // 3):
        indices, slots = implementation.select(logits, k, mask)
        assert slots.all()
        check_identical(indices, mask[0].nonzero()[:k, 0].expand(1, 2, k).contiguous())


@EVERY_KERNEL
@given(problem=selections())
@example(problem=(torch.zeros(1, 2, 3, dtype=torch.float64), 2, torch.tensor([[False, True, False]])))
@counted
def test_selection_leaves_the_inverse_map(
    kernels: str, problem: tuple[Tensor, int, Tensor | None], device: torch.device
) -> None:
    """A masked token has no slot, even where it was selected for want of valid ones."""
    logits, k, mask = problem
    indices, slots, inverse = ops.select(logits.to(device), to_device(mask, device), k, kernels == "triton")
    check_identical(inverse, ops.inverse_map(indices, slots, logits.shape[-1]))


@BOTH
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_selection_of_all_small_rows(implementation: ModuleType, n: int, device: torch.device) -> None:
    """Every order with every tie, every mask, every k: rows over {0, 1, 2, NaN} and all masks, for n <= 4."""
    rows = torch.tensor(list(itertools.product((0.0, 1.0, 2.0, math.nan), repeat=n)), device=device)
    if interpreted():  # 16384 programs of n = 4 would take minutes
        rows = rows[:: max(len(rows) // 8, 1)]
    for bits in itertools.product((False, True), repeat=n):
        mask = torch.tensor(bits, device=device).expand(len(rows), n)
        for k in range(1, n + 1):
            indices, slots = implementation.select(rows[:, None], k, mask)
            expected = [oracle.select(row.cpu().double().numpy(), k, np.array(bits)) for row in rows]
            check_identical(indices, as_tensor([r[0] for r in expected], indices.shape, device).long())
            check_identical(slots, as_tensor([r[1] for r in expected], slots.shape, device).bool())


# --- solvers ---------------------------------------------------------------------------------------------------------


@st.composite
def solver_problems(draw_: st.DrawFn) -> dict:
    """Logits of several spreads, any mass up to N, masks. `band`: mass equal to N or to the number of valid tokens."""
    n = draw_(st.sampled_from((1, 2, 3, 7, 16, 33, 64)))
    seed = draw_(st.integers(0, 2**20))
    shape = (draw_(st.integers(1, 2)), draw_(st.integers(1, 3)), n)
    logits = torch.randn(shape, generator=generator(seed), dtype=torch.float64) * draw_(st.sampled_from((1e-3, 1, 8)))
    logits += draw_(st.sampled_from((0.0, 0.0, 3.0, -40.0)))
    if draw_(st.booleans()):
        logits = logits.round()
    mass = draw_(st.one_of(st.just(float(n)), st.floats(0.3, n), st.integers(1, n).map(float)))
    return {
        "logits": logits,
        "k": mass,
        "mask": draw_mask(shape[0], n, draw_(st.sampled_from(MASKS)), seed),
        "n_iters": draw_(st.integers(1, 20)),
        "eps": draw_(st.sampled_from((0.03, 0.1, 1.0))),
        "eps_init": draw_(st.sampled_from((0.01, 1.0, 4.0))),
        "eps_decay": draw_(st.sampled_from((0.5, 0.7, 1.0))),
    }


def to_device(mask: Tensor | None, device: torch.device) -> Tensor | None:
    return None if mask is None else mask.to(device)


@given(problem=solver_problems())
@counted
def test_reference_descent_is_the_textbook_form(problem: dict, device: torch.device) -> None:
    """The eliminated scalar form against the two-variable textbook descent in NumPy, both float64."""
    p = dict(problem)
    logits, mask, k = p.pop("logits").to(device), to_device(p.pop("mask"), device), p.pop("k")
    actual = reference.coordinate_descent(logits, k, mask, **p)
    rows = apply_rows(lambda s, m: oracle.coordinate_descent(s, k, m, **p), logits, mask)
    exact = as_tensor(rows, actual.shape, device)
    baseline = reference.coordinate_descent(logits.float(), k, mask, **p)
    check_scores(actual, exact, baseline, logits, p["eps"], backend="reference")


@BOTH
@given(problem=solver_problems())
@counted
def test_exact_solver_solves_the_mass_equation(implementation: ModuleType, problem: dict, device: torch.device) -> None:
    """Against bisection in NumPy, and by its certificate: mass min(k, valid tokens) in float64."""
    logits, mask, k, eps = (
        problem["logits"].to(device),
        to_device(problem["mask"], device),
        problem["k"],
        problem["eps"],
    )
    actual = implementation.capped_simplex(logits, k, mask, eps=eps)
    exact = as_tensor(
        apply_rows(lambda s, m: oracle.capped_simplex(s, k, m, eps=eps), logits, mask), actual.shape, device
    )
    baseline = reference.capped_simplex(logits.float(), k, mask, eps=eps)
    check_scores(actual, exact, baseline, logits, eps, backend=implementation.__name__)
    valid = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask[:, None].expand_as(logits)
    count = valid.sum(-1)
    # A relative error of lambda is the absolute error of (s + a) / eps.
    tolerance = 1e-13 * (1 + logits.abs().amax().item() / eps) * max(k, 1)
    mass = count.double().clamp_max(k)
    assert ((actual.sum(-1) - mass).abs() <= tolerance).all()
    assert (actual >= 0).all()
    assert (actual <= 1).all()
    assert not actual[~valid].any()


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("solver", ["iterative", "exact"])
@given(problem=solver_problems())
@counted
def test_solver_scores_match(
    kernels: str, solver: str, dtype: torch.dtype, device: torch.device, problem: dict
) -> None:
    p = dict(problem)
    logits, mask, k = p.pop("logits").to(dtype).to(device), to_device(p.pop("mask"), device), p.pop("k")
    name, options = ("coordinate_descent", p) if solver == "iterative" else ("capped_simplex", {"eps": p["eps"]})
    actual = getattr(optimized, name)(logits, k, mask, **options)
    solve = getattr(reference, name)
    exact = solve(logits.double(), k, mask, **options)
    baseline = solve(logits.to(BASELINE_OF.get(dtype, dtype)), k, mask, **options)
    check_scores(actual, exact, baseline, logits, p["eps"])


def conditioning(logits: Tensor, eps: float) -> float:
    """exp((s + a) / eps) turns a relative error of s into one |s| / eps times as large; a balances a sum of N terms."""
    finite = logits.detach().nan_to_num(0.0, 0.0, 0.0)
    return logits.shape[-1] + (finite.abs().max().item() / eps if finite.numel() else 0.0)


def check_scores(
    actual: Tensor, exact: Tensor, baseline: Tensor, logits: Tensor, eps: float, backend: str = "torch"
) -> None:
    expect = expectation(exact)
    scale = conditioning(logits, eps) * exact.abs().max().item() if expect in (None, "constant") else 0.0
    check(actual, exact, baseline, stage="scores", backend=backend, expect=expect, scale=scale)


def check_gradient(actual: Tensor, exact: Tensor, baseline: Tensor, scale: float) -> None:
    """scale: of the terms that make up a gradient. Where the oracle cancels to nothing, a few ulps of that."""
    if (exact.abs() <= 1e-12 * scale).all():
        assert ((actual - exact).abs() <= 64 * torch.finfo(actual.dtype).eps * scale).all()
        return
    expect = expectation(exact)
    check(actual, exact, baseline, stage="solver_gradient", expect=expect, scale=scale)


def descend(logits: Tensor, k: float, mask: Tensor | None, p: dict, kernels: str = "torch") -> tuple[Tensor, Tensor]:
    """The optimized solver's scores and iterates a (T, B, E)."""
    epsilons = (p["eps"], p["eps_init"], p["eps_decay"])
    scores, a, _ = ops.coordinate_descent(logits, mask, float(k), p["n_iters"], *epsilons, kernels == "triton")
    return scores, a


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(problem=solver_problems())
@counted
def test_descent_gradient_matches(kernels: str, dtype: torch.dtype, device: torch.device, problem: dict) -> None:
    """With the implementation's own saturated sets in the oracle, once they agree with the oracle's but for kinks."""
    p = dict(problem)
    logits, mask, k = p.pop("logits").to(dtype).to(device), to_device(p.pop("mask"), device), p.pop("k")
    valid = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask[:, None].expand_as(logits)
    leaf = logits.clone().requires_grad_()
    scores, a = descend(leaf, k, mask, p, kernels)
    sets = logits >= -a[..., None]

    _, a_exact = descend(logits.double(), k, mask, p)
    gap = (logits.double() + a_exact[..., None]).abs()
    # Rounding of a step is of the order of eps(dtype) (|a| + temperature * log N); steps pass it on without growth.
    size = 1 + a_exact.abs().amax() + p["eps_init"] * math.log(logits.shape[-1] + 1) + logits.abs().amax()
    bound = 32 * torch.finfo(dtype).eps * size
    differ = (sets != (logits.double() >= -a_exact[..., None])) & valid
    assert (gap[differ] <= bound).all(), "a token away from every kink changed sides"

    g = torch.randn(logits.shape, generator=generator(1), dtype=torch.float64).to(dtype).to(device)
    (actual,) = torch.autograd.grad(scores, leaf, g)
    runs = []
    exact_scores = reference.coordinate_descent(logits.double(), k, mask, saturated=sets, **p)
    for run_dtype in (torch.float64, BASELINE_OF.get(dtype, dtype)):
        s = logits.to(run_dtype).requires_grad_()
        out = reference.coordinate_descent(s, k, mask, saturated=sets, **p)
        runs.append(torch.autograd.grad(out, s, g.to(run_dtype))[0])
    # dA is a product of one factor per step, each with the error of an exponential.
    growth = p["n_iters"] * (conditioning(logits, p["eps"]) + a_exact.abs().max().item() / p["eps"])
    scale = (g.abs().max() * exact_scores.max() / p["eps"]).item() * growth
    check_gradient(actual, *runs, scale)


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(problem=solver_problems())
@counted
def test_exact_gradient_matches(kernels: str, dtype: torch.dtype, device: torch.device, problem: dict) -> None:
    logits, mask = problem["logits"].to(dtype).to(device), to_device(problem["mask"], device)
    k, eps = problem["k"], problem["eps"]
    g = torch.randn(logits.shape, generator=generator(1), dtype=torch.float64).to(dtype).to(device)
    runs = []
    for solve, run_dtype in (
        (optimized.capped_simplex, dtype),
        (reference.capped_simplex, torch.float64),
        (reference.capped_simplex, BASELINE_OF.get(dtype, dtype)),
    ):
        s = logits.to(run_dtype).requires_grad_()
        runs.append(torch.autograd.grad(solve(s, k, mask, eps=eps), s, g.to(run_dtype))[0])
    regular = ~degenerate_rows(reference.capped_simplex(logits.double(), k, mask, eps=eps), k, mask)
    actual, exact, baseline = (t[regular] for t in runs)
    if not regular.any():
        return
    scale = (g.abs().max().double() / eps).item() * conditioning(logits, eps)
    check_gradient(actual, exact, baseline, scale)
    # Invariance to a shift of the logits: every row of the gradient sums to zero.
    assert (actual.sum(-1).abs() <= 64 * torch.finfo(dtype).eps * scale * logits.shape[-1]).all()


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(
    n=st.integers(1, 40),
    share=st.sampled_from((0.1, 0.5, 1.0)),
    options=st.fixed_dictionaries(
        {
            "n_iters": st.sampled_from((1, 2, 5, 30, 200)),
            "eps": st.sampled_from((1e-3, 0.03, 1.0)),
            "eps_init": st.sampled_from((1e-2, 1.0, 100.0)),
            "eps_decay": st.sampled_from((1e-3, 0.01, 0.1, 0.5, 1.0)),
        }
    ),
    spread=st.sampled_from((0.0, 1.0, 30.0)),
    mask=st.sampled_from(MASKS),
    seed=st.integers(0, 2**20),
)
@counted
def test_descent_is_finite_where_the_references_is(
    kernels: str,
    dtype: torch.dtype,
    device: torch.device,
    n: int,
    share: float,
    options: dict[str, Any],
    spread: float,
    mask: str,
    seed: int,
) -> None:
    """Scores and gradient, under every schedule of temperatures."""
    logits = (spread * torch.randn(2, 1, n, generator=generator(seed), dtype=torch.float64)).to(dtype).to(device)
    shown, k = to_device(draw_mask(2, n, mask, seed), device), max(1.0, share * n)
    g = torch.randn(logits.shape, generator=generator(seed + 1), dtype=torch.float64).to(logits)
    found = []
    for solve in (
        lambda t: reference.coordinate_descent(t, k, shown, **options),
        lambda t: descend(t, k, shown, options, kernels)[0],
    ):
        leaf = logits.clone().requires_grad_()
        scores = solve(leaf)
        found.append((scores, *torch.autograd.grad(scores, leaf, g)))
    for expected, actual in zip(*found):
        assert (actual.isfinite() | ~expected.isfinite()).all()


@EVERY_KERNEL
def test_smallest_temperature(kernels: str, device: torch.device) -> None:
    """A double reaches the kernels as the integer of its bits, one below 1e-314 as an int32: max(1.0, eps) is 1.0."""
    logits = torch.randn(2, 1, 6, generator=generator(5), dtype=torch.float64).to(device)
    runs = []
    for eps in (5e-324, 1e-3):
        leaf = logits.clone().requires_grad_()
        scores, a = descend(leaf, 2.4, None, {"n_iters": 3, "eps": eps, "eps_init": 1.0, "eps_decay": 1.0}, kernels)
        runs.append((scores.detach(), a, *torch.autograd.grad(scores, leaf, logits.flip(-1))))
    for actual, expected in zip(*runs):
        assert expected.any()
        check_identical(actual, expected)


@EVERY_KERNEL
def test_saturation_begins_at_equality(kernels: str, device: torch.device) -> None:
    """Mass N makes a_0 = 0, and then a logit of 0 is saturated: it counts."""
    logits = torch.tensor([[[0.0, -1.0, 1.0, 0.0, 2.0, -0.0, -3.0, 0.0]]], dtype=torch.float64, device=device)
    _, a, counts = ops.coordinate_descent(logits, None, 8.0, 2, 0.1, 4.0, 0.7, kernels == "triton")
    assert a[0].item() == 0
    assert counts[1].item() == 6


@BOTH
def test_iterative_tends_to_exact(implementation: ModuleType, device: torch.device) -> None:
    logits = torch.randn(2, 2, 200, generator=generator(0), dtype=torch.float64).to(device)
    exact = implementation.capped_simplex(logits, 30.0, eps=0.03)
    gaps = [
        (implementation.coordinate_descent(logits, 30.0, n_iters=n, **EPSILONS) - exact).abs().max().item()
        for n in (20, 100, 1500)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-5


@BOTH
@given(problem=solver_problems())
@counted
def test_scores_are_bounded_and_monotone(implementation: ModuleType, problem: dict, device: torch.device) -> None:
    p = dict(problem)
    logits, mask, k = p.pop("logits").to(device), to_device(p.pop("mask"), device), p.pop("k")
    for scores in (
        implementation.coordinate_descent(logits, k, mask, **p),
        implementation.capped_simplex(logits, k, mask, eps=p["eps"]),
    ):
        assert ((scores >= 0) & (scores <= 1)).all()
        order = logits.argsort(dim=-1)
        valid = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask[:, None].expand_as(logits)
        assert not scores[~valid].any()
        for row, row_valid in zip(scores.gather(-1, order).flatten(0, 1), valid.gather(-1, order).flatten(0, 1)):
            assert (row[row_valid].diff() >= 0).all()


@BOTH
@given(seed=st.integers(0, 2**20), spread=st.sampled_from((0.3, 1.0, 8.0)))
@counted
def test_mass_error_never_grows(implementation: ModuleType, seed: int, spread: float, device: torch.device) -> None:
    """Once the temperature stands at eps (from step 14 on), |mass - k| does not grow."""
    logits = spread * torch.randn(1, 2, 60, generator=generator(seed), dtype=torch.float64).to(device)
    errors = torch.stack(
        [
            (implementation.coordinate_descent(logits, 9.0, n_iters=n, **EPSILONS).sum(-1) - 9.0).abs()
            for n in range(15, 31)
        ]
    )
    assert (errors.diff(dim=0) <= 1e-9).all()


@EVERY_KERNEL
def test_twenty_iterations_are_far_from_the_limit(kernels: str, device: torch.device) -> None:
    """The documented figures: mass well short of 1152 at unit variance, thousands saturated at a spread of 32."""
    logits = torch.randn(1, 1, 8192, generator=generator(0), dtype=torch.float64).to(device)
    k = 1024 * 9 / 8
    scores = optimized.coordinate_descent(logits, k)
    assert 800 < scores.sum().item() < 1000
    wide = optimized.coordinate_descent(32 * logits, k)
    assert 2200 < (wide == 1).sum().item() < 2700
    exact = optimized.capped_simplex(32 * logits, k)
    assert abs(exact.sum().item() - k) < 1e-9 * k


@BOTH
def test_exact_solver_ignores_a_shift_the_iterates_do_not(implementation: ModuleType, device: torch.device) -> None:
    logits = torch.randn(1, 1, 64, generator=generator(0), dtype=torch.float64).to(device)
    shifted = logits + 100.0
    torch.testing.assert_close(
        implementation.capped_simplex(shifted, 8.0), implementation.capped_simplex(logits, 8.0), rtol=1e-9, atol=0
    )
    leaf = shifted.requires_grad_()
    scores = implementation.coordinate_descent(leaf, 8.0)
    assert (scores == 1).all()
    (gradient,) = torch.autograd.grad(scores, leaf, torch.randn_like(scores))
    assert not gradient.any()


@BOTH
@pytest.mark.parametrize("solver", ["iterative", "exact"])
@pytest.mark.parametrize("n_iters", [1, 2, 20])
def test_solver_rows_without_valid_tokens_and_nan(
    implementation: ModuleType, solver: str, n_iters: int, device: torch.device
) -> None:
    """Rows: all masked; NaN at a valid token; NaN at a masked token; ordinary."""
    logits = torch.randn(4, 2, 10, generator=generator(2)).to(device)
    mask = torch.ones(4, 10, dtype=torch.bool, device=device)
    mask[0] = False
    mask[1:, 3] = False
    logits[1, 1, 5] = math.nan
    logits[2, :, 3] = math.nan
    leaf = logits.requires_grad_()
    if solver == "exact":
        scores = implementation.capped_simplex(leaf, 4.0, mask)
    else:
        scores = implementation.coordinate_descent(leaf, 4.0, mask, n_iters=n_iters)
    assert not scores[0].any()
    assert scores[1, 1, mask[1]].isnan().all()
    assert not scores[1, 0].isnan().any()
    assert not scores[1, :, 3].any()
    assert not scores[2:].isnan().any()
    clean = torch.where(mask[:, None], leaf.detach(), 7.0)
    if solver == "exact":
        again = implementation.capped_simplex(clean, 4.0, mask)
    else:
        again = implementation.coordinate_descent(clean, 4.0, mask, n_iters=n_iters)
    check_identical(scores[2:].detach(), again[2:])
    g = torch.randn(scores.shape, generator=generator(3)).to(device)
    g[0] = math.nan  # nobody may multiply by it
    g[2, :, 3] = math.nan
    g[1, 1] = 0
    (gradient,) = torch.autograd.grad(scores, leaf, g)
    assert not gradient[0].any()
    assert not gradient[1:, :, 3].any()  # nor does the NaN of another token reach a masked one
    assert not gradient[2:].isnan().any()
    assert not gradient[1, 0].isnan().any()


@EVERY_KERNEL
@pytest.mark.parametrize("solver", ["iterative", "exact"])
def test_solvers_leave_logits_and_cotangents_alone(kernels: str, solver: str, device: torch.device) -> None:
    """Where tokens are masked, whose logits and cotangents count for nothing."""
    logits, g = (draw((2, 2, 9), "normal", seed).to(device) for seed in (1, 2))
    mask = draw_mask(2, 9, "random", 1).to(device)
    leaf, sent = logits.clone().requires_grad_(), g.clone()
    if solver == "exact":
        scores = ops.capped_simplex(leaf, mask, 2.5, 0.3, kernels == "triton")[0]
    else:
        scores = ops.coordinate_descent(leaf, mask, 2.5, 5, 0.3, 4.0, 0.7, kernels == "triton")[0]
    torch.autograd.grad(scores, leaf, sent)
    check_identical(leaf.detach(), logits)
    check_identical(sent, g)


# --- route -----------------------------------------------------------------------------------------------------------


def assert_declared_order(routes: optimized.Routes, mask: Tensor | None, n: int) -> None:
    """Distinct, in range, valid ascending, then masked ascending; scores are 0 exactly where the slot is masked."""
    indices, slots = routes.indices, routes.mask
    assert indices.dtype == torch.int64
    assert slots.dtype == torch.bool
    assert ((indices >= 0) & (indices < n)).all()
    if mask is not None:
        check_identical(slots, mask[:, None].expand(-1, indices.shape[1], -1).gather(-1, indices))
    else:
        assert slots.all()
    if indices.shape[-1] == n:  # nothing to choose: all tokens in order, or all of them sorted
        assert all(sorted(row) == list(range(n)) for row in indices.flatten(0, 1).tolist())
    else:
        assert ((indices + n * (~slots)).diff(dim=-1) > 0).all()
    check_identical(routes.load, slots.sum(-1))


@given(case=router_cases(values=("normal", "integer", "tiny", "large")))
@example(case=RouterCase(n=9, k=8, options={"route_block_size": 2}))
@example(case=RouterCase(n=17, k=5, mask="suffix", options={"route_block_size": 6}))
@counted
def test_reference_route_matches_the_oracle(case: RouterCase, device: torch.device) -> None:
    """float64, off exact ties but for integers, whose sums are exact."""
    x, tokens, mask = router_tensors(case, torch.float64, torch.float64, device)
    if case.values == "integer" and case.options.get("cosine_sim_routing"):
        case = replace(case, options={**case.options, "cosine_sim_routing": False})
    actual = reference.route(x, tokens, case.k, mask, **case.options)
    arrays = [None if t is None else t.detach().cpu().numpy() for t in (x, tokens, mask)]
    expected = oracle.route(arrays[0], arrays[1], case.k, arrays[2], **case.options)
    check_identical(actual.indices, torch.as_tensor(expected.indices, device=device).long())
    check_identical(actual.mask, torch.as_tensor(expected.mask, device=device).bool())
    exact = torch.as_tensor(expected.scores, device=device)
    x32, tokens32, _ = router_tensors(case, torch.float64, torch.float32, device)
    baseline = reference.route(x32, tokens32, case.k, mask, **case.options).scores.detach()
    if baseline.isfinite().all() and not case.options.get("straight_through", True):
        eps = case.options.get("eps", 0.03)
        check_scores(actual.scores.detach(), exact, baseline, actual.logits, eps, backend="reference")
    else:
        check_identical(actual.scores.detach(), exact)


@EVERY_KERNEL
@given(case=router_cases(values=(*OFF_BAND, "integer")))
@example(case=RouterCase(n=8, k=8))
@example(case=RouterCase(n=16, k=15))
@example(case=RouterCase(n=16, k=15, options={"straight_through": False, "n_iters": 2}))  # mass min(K * 9/8, N) = N
# Mass of a block, not of the row; the last block is two tokens, with scores of 1.
@example(case=RouterCase(n=32, k=8, options={"straight_through": False, "route_block_size": 10, "n_iters": 2}))
@counted
def test_optimized_route_matches(kernels: str, case: RouterCase, device: torch.device) -> None:
    """Decisions identical, scores and gradients of x and routing tokens within budget, float64."""
    if case.options.get("cosine_sim_routing"):  # in one dimension its gradient cancels exactly
        case = replace(case, dim=max(case.dim, 8), values="normal" if case.values == "integer" else case.values)
    runs = []
    for implementation, dtype, layout in (
        (optimized, torch.float64, True),
        (reference, torch.float64, False),
        (reference, torch.float32, False),
    ):
        x, tokens, mask = router_tensors(case, torch.float64, dtype, device, layout=layout)
        routes = implementation.route(x, tokens, case.k, mask, **case.options)
        assert_declared_order(routes, mask, case.n)
        runs.append((routes, x, tokens))
    (actual, x, tokens), (expected, x_ref, tokens_ref), (baseline, x_base, tokens_base) = runs
    check_identical(actual.indices, expected.indices)
    if case.options.get("straight_through", True):
        check_identical(actual.scores.detach(), expected.scores.detach())
        check_identical(actual.scores.detach(), actual.mask.double())
    elif torch.equal(baseline.indices, expected.indices):
        scores = (run.scores.detach() for run in (actual, expected, baseline))
        check_scores(*scores, expected.logits, case.options.get("eps", 0.03))
    if case.n <= case.k:
        assert not expected.scores.requires_grad
        assert_constant(actual.scores, x, tokens)
        return
    g = torch.randn(expected.scores.shape, generator=generator(case.seed), dtype=torch.float64).to(device)
    eps = case.options.get("eps", 0.03)

    def gradients(routes: reference.Routes, *leaves: Tensor) -> list[Tensor]:
        got = torch.autograd.grad(routes.scores, leaves, g.to(routes.scores.dtype), allow_unused=True)
        return [torch.zeros_like(leaf) if t is None else t for t, leaf in zip(got, leaves)]

    if not expected.scores.requires_grad:
        assert not actual.scores.requires_grad or not any(t.any() for t in gradients(actual, x, tokens))
        return
    for name, a, e, b in zip(
        ("x", "tokens"),
        gradients(actual, x, tokens),
        gradients(expected, x_ref, tokens_ref),
        gradients(baseline, x_base, tokens_base),
    ):
        if not kink_free(expected, case, mask):
            continue
        # Every step passes on a relative error of the size of the exponentials'; sums over tokens or slots may cancel.
        growth = case.options.get("n_iters", 20) * conditioning(expected.logits, eps)
        own, partner = (x_ref, tokens_ref) if name == "x" else (tokens_ref, x_ref)
        slope = partner.abs().max()
        if case.options.get("cosine_sim_routing"):
            slope = case.options.get("cosine_sim_scale", 8.0) / own.norm(dim=-1).min()
        terms = (g.abs().max() * slope / eps).item()
        scale = growth * max(e.abs().max().item(), terms)
        check(a, e, b, stage="router_gradient", name=name, expect=expectation(e), scale=scale)


def assert_constant(t: Tensor, *leaves: Tensor) -> None:
    """Nothing, or exactly zero, comes back through it, whatever is sent."""
    if not t.requires_grad:
        return
    sent = torch.randn(t.shape, generator=generator(8), dtype=torch.float64).to(t)
    for gradient in torch.autograd.grad(t, leaves, sent, allow_unused=True, retain_graph=True):
        assert gradient is None or not gradient.any()


@EVERY_KERNEL
@pytest.mark.parametrize("n", [7, 8, 9])
@pytest.mark.parametrize("poisoned", [False, True], ids=["finite", "a NaN"])
def test_edge_of_a_choice(kernels: str, n: int, poisoned: bool, device: torch.device) -> None:
    """K is 8. Without a choice: all tokens in their order, scores of 1, whatever a token holds; else its row is NaN."""
    case = RouterCase(n=n, k=8, batch=2, dim=8, mask="random", seed=3)
    x, tokens, mask = router_tensors(case, torch.float64, torch.float64, device, layout=False)
    assert mask is not None
    mask[0, 2], mask[:, 4] = False, True
    if poisoned:
        x = x.detach().clone()
        x[1, 4] = math.nan
    expected = reference.route(x, tokens, 8, mask)
    actual = optimized.route(x, tokens, 8, mask)
    for field in ("indices", "mask", "scores"):
        check_identical(getattr(actual, field).detach(), getattr(expected, field).detach(), field)
    assert actual.scores[1].isnan().all() == (poisoned and n > 8)
    if n <= 8:
        check_identical(actual.indices, torch.arange(n, device=device).expand_as(actual.indices).contiguous())


@BOTH
@pytest.mark.parametrize("n", [7, 8, 20])
def test_gradient_of_logits_of_a_compiled_router(implementation: ModuleType, n: int, device: torch.device) -> None:
    """As of the eager one: all of it where they decide, nothing where they don't."""
    case = RouterCase(n=n, k=8, batch=2, dim=8)
    x, tokens, _ = router_tensors(case, torch.float64, torch.float64, device, layout=False)
    g = draw((2, case.experts, n), "normal", 1).to(device)
    torch.compiler.reset()
    found = []
    for call in (implementation.route, torch.compile(implementation.route, backend="eager", fullgraph=True)):
        logits = call(x, tokens, 8).logits
        gradients = (
            torch.autograd.grad(logits, (x, tokens), g, allow_unused=True) if logits.requires_grad else (None,) * 2
        )
        found.append([torch.zeros_like(t) if d is None else d for t, d in zip((x, tokens), gradients)])
    for compiled, eager in zip(found[1], found[0]):
        torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=1e-12)
        assert bool(eager.any()) == (n > 8)


@BOTH
def test_compiled_routes_are_those_of_eager(implementation: ModuleType, device: torch.device) -> None:
    """Masked tokens before, between and after valid ones, more and fewer of these than K: the order of slots too."""
    k = 8
    torch.compiler.reset()
    compiled = torch.compile(implementation.route, backend="eager", fullgraph=True, dynamic=True)
    for n in (7, 8, 9, 30, 31):
        x, tokens, _ = RouterCase(n=n, k=k, batch=4, dim=8, seed=n).tensors()
        mask = torch.zeros(4, n, dtype=torch.bool)
        mask[0, -3:] = mask[1, 1::2] = mask[2] = True
        x, tokens, mask = x.to(device), tokens.to(device), mask.to(device)
        expected, actual = (call(x, tokens, k, mask) for call in (implementation.route, compiled))
        for field, t in expected._asdict().items():
            check_identical(getattr(actual, field).detach().clone(), t.detach(), f"{field} at {n}")


@EVERY_KERNEL
@pytest.mark.parametrize("solver", ["iterative", "exact"])
@pytest.mark.parametrize("straight_through", [False, True])
def test_scores_that_are_set_to_nan_pass_nothing_on(
    kernels: str, solver: str, straight_through: bool, device: torch.device
) -> None:
    """A NaN logit sets the scores of its row in every block: of the others they are constants."""
    x, tokens, _ = RouterCase(n=20, batch=3, dim=8, seed=4).tensors()
    x, tokens = x.to(device, torch.float32), tokens.to(device, torch.float32).requires_grad_()
    x[1, 4] = math.nan
    options = {"solver": solver, "straight_through": straight_through, "route_block_size": 6, "eps": 9.0}
    for package in (reference, optimized):
        routes = package.route(x, tokens, 7, **options)
        assert routes.scores[1].isnan().all()
        g = draw(tuple(routes.scores.shape), "normal", 5).to(x)
        (gradient,) = torch.autograd.grad(routes.scores, routes.logits, g)
        assert not gradient[1, :, 6:].any()
        assert gradient[0, :, :6].any(-1).all()


@BOTH
@pytest.mark.parametrize("n", [7, 8])
def test_nothing_to_choose_gives_the_router_no_gradient(
    implementation: ModuleType, n: int, device: torch.device
) -> None:
    """Neither through the scores nor through the logits, which nobody compared."""
    x, tokens, _ = (t if t is None else t.to(device).requires_grad_() for t in RouterCase(n=n).tensors())
    routes = implementation.route(x, tokens, 8)
    for t in (routes.scores, routes.logits):
        assert_constant(t, x, tokens)


@BOTH
@EVERY_KERNEL
def test_exact_gradient_at_a_kink(implementation: ModuleType, kernels: str, device: torch.device) -> None:
    """Nine ties and a mass of nine, the rest too small to count: the ties are saturated, with no gradient, or free,
    with that of a softmax of mass nine. Rounding decides, and nothing in between is right.
    """
    top = torch.arange(1, 33, dtype=torch.float64, device=device).view(1, -1, 1) / 7
    s = torch.cat((top.expand(-1, -1, 9), torch.zeros_like(top) - 3), -1).requires_grad_()
    g = torch.randn(s.shape, generator=generator(1), dtype=torch.float64).to(device)
    scores = implementation.capped_simplex(s, 9.0, eps=0.03)
    (actual,) = torch.autograd.grad(scores, s, g)
    free = torch.zeros_like(g)
    free[..., :9] = (g[..., :9] - g[..., :9].mean(-1, keepdim=True)) / 0.03
    assert (scores[..., :9] - 1).abs().max() <= 1e-12
    assert torch.minimum(actual.abs().amax(-1), (actual - free).abs().amax(-1)).max() <= 1e-9


@BOTH
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [None, 4])
def test_random_route_is_shared(
    implementation: ModuleType, masked: bool, block: int | None, device: torch.device
) -> None:
    """Both implementations draw the same keys from a generator; scores are constant."""
    x, tokens = torch.randn(3, 30, 8, device=device), torch.randn(2, 8, device=device, requires_grad=True)
    mask = to_device(draw_mask(3, 30, "random", 1), device) if masked else None
    chosen = []
    for package in (implementation, reference):
        g = torch.Generator(device=device).manual_seed(5)
        routes = package.route(x, tokens, 8, mask, random_route=True, generator=g, route_block_size=block)
        assert_declared_order(routes, mask, 30)
        check_identical(routes.scores.detach(), routes.mask.float())
        assert_constant(routes.scores, tokens)
        chosen.append(routes.indices)
    check_identical(chosen[0], chosen[1].clone())


@BOTH
@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("block", [None, 6])
def test_nan_of_a_valid_token_poisons_its_rows_only(
    implementation: ModuleType, straight_through: bool, block: int | None, device: torch.device
) -> None:
    x = torch.randn(3, 20, 8, device=device)
    tokens = torch.randn(2, 8, device=device)
    x[1, 4] = math.nan
    routes = implementation.route(x, tokens, 7, straight_through=straight_through, route_block_size=block)
    assert routes.scores[1].isnan().all()
    assert not routes.scores[[0, 2]].isnan().any()
    assert_declared_order(routes, None, 20)
    if block is None:
        assert not (routes.indices[1] == 4).any(), "NaN ranks below every number"


@BOTH
@given(case=router_cases(values=("normal",)))
@counted
def test_content_of_masked_tokens_reaches_nothing(
    implementation: ModuleType, case: RouterCase, device: torch.device
) -> None:
    """Values and gradients stay bitwise when masked tokens are replaced by NaN and infinities."""
    case = replace(case, mask="random")
    x, tokens, mask = router_tensors(case, torch.float32, torch.float32, device)
    filler = torch.tensor([math.nan, math.inf, -math.inf], device=device)
    junk = filler[torch.randint(3, x.shape, generator=generator(case.seed)).to(device)]
    runs = []
    for values in (x.detach(), torch.where(mask[..., None], x.detach(), junk)):
        leaf, r = values.requires_grad_(), tokens.detach().requires_grad_()
        routes = implementation.route(leaf, r, case.k, mask, **case.options)
        grads: tuple[Tensor | None, ...] = (None, None)
        if routes.scores.requires_grad:
            g = torch.randn(routes.scores.shape, generator=generator(9)).to(device)
            grads = torch.autograd.grad(routes.scores, (leaf, r), g, allow_unused=True)
        runs.append((routes, grads))
    (clean, clean_grads), (dirty, dirty_grads) = runs
    check_identical(dirty.indices, clean.indices)
    check_identical(dirty.scores.detach(), clean.scores.detach())
    for a, b in zip(dirty_grads, clean_grads):
        assert (a is None) == (b is None)
        if a is not None:
            check_identical(a, b)
    if dirty_grads[0] is not None:
        assert not dirty_grads[0][~mask].any()


@BOTH
def test_batch_isolation_is_bitwise(implementation: ModuleType, device: torch.device) -> None:
    x, tokens = torch.randn(3, 40, 8, device=device), torch.randn(2, 8, device=device)
    before = implementation.route(x, tokens, 9, straight_through=False)
    x[1] = torch.randn(40, 8, device=device) * 50
    after = implementation.route(x, tokens, 9, straight_through=False)
    for item in (0, 2):
        for a, b in zip(after, before):
            check_identical(a[item], b[item])
    assert not torch.equal(after.indices[1], before.indices[1])


@EVERY_KERNEL
@given(seed=st.integers(0, 2**20), n=st.integers(20, 60))
@counted
def test_solver_rows_do_not_depend_on_their_batch(kernels: str, seed: int, n: int, device: torch.device) -> None:
    """Row-wise code: a row alone and in a batch, bitwise on the CPU and for selection everywhere."""
    logits = draw((3, 2, n), "normal", seed).float().to(device)
    indices, slots = optimized.select(logits, 7)
    for b in range(3):
        alone = optimized.select(logits[b : b + 1].clone(), 7)
        check_identical(alone[0], indices[b : b + 1].clone())
        check_identical(alone[1], slots[b : b + 1].clone())


@pytest.mark.parametrize("options", [{}, {"solver": "exact"}, {"route_block_size": 7}], ids=str)
@pytest.mark.parametrize("mask", ["none", "suffix"])
@EVERY_KERNEL
def test_straight_through_scores_need_a_solver_for_their_gradient_alone(
    kernels: str, mask: str, options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same routes with and without gradients, bit for bit; without, nothing is solved."""
    case = RouterCase(n=24, mask=mask, options=options)
    x, tokens, hidden = (None if t is None else t.to(device) for t in case.tensors())
    with_gradient = optimized.route(x, tokens.requires_grad_(), case.k, hidden, **options)
    assert with_gradient.scores.requires_grad

    def solve(*_: object) -> None:
        raise AssertionError("solved")

    monkeypatch.setattr(ops.Solver, "solve", solve)
    with torch.no_grad():
        without = optimized.route(x, tokens, case.k, hidden, **options)
        with pytest.raises(AssertionError, match="solved"):
            optimized.route(x, tokens, case.k, hidden, **options, straight_through=False)
    for a, b in zip(without, with_gradient):
        check_identical(a, b.detach())


@pytest.mark.parametrize("moved", [0, 1], ids=["x", "tokens"])
@EVERY_KERNEL
def test_straight_through_scores_refuse_forward_mode(kernels: str, moved: int, device: torch.device) -> None:
    """Their value is constant, their derivative is not: without requires_grad anywhere, a tangent must be named as
    unsupported, not lost.
    """
    inputs = [t.to(device) for t in RouterCase(n=24).tensors()[:2]]
    with forward_ad.dual_level():
        inputs[moved] = forward_ad.make_dual(inputs[moved], torch.ones_like(inputs[moved]))
        with pytest.raises(RuntimeError, match=r"^moa::\w+: forward-mode differentiation is not supported"):
            optimized.route(*inputs, 9, straight_through=True)
