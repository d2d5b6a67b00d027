"""Kernels of whole rows where the rows are those of two groups of experts: selection with the picked scores, solvers
with a mass per group, and gradients that come by the inverse map; and rows that many programs share, made of few tokens
by small blocks. What is known of one group is in test_routing.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import best
from harness import check_identical
from strategies import draw, draw_mask, generator
from torch import Tensor

from optimized import ops

TRITON = pytest.mark.parametrize("kernels", ["triton"], indirect=True)
MASKED = pytest.mark.parametrize("mask_kind", ["none", "random", "none_valid"])
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# What depends on the mask does not on the dtype, and one of 64 bits takes three times as long to interpret.
MASKED_FLOATS = pytest.mark.parametrize(
    ("mask_kind", "dtype"),
    [("none", torch.float32), ("random", torch.float32), ("none_valid", torch.float32), ("random", torch.float64)],
    ids=str,
)
# Beyond a tile of the backward, and beyond the steps that it takes at a time by as many as the temperature falls in.
SIZES = pytest.mark.parametrize(("n", "n_iters"), [(9, 1), (9, 2), (600, 4), (40, 45)])
# Of a row that many programs share, in blocks: below, at and above one chunk, and all of them; beyond, two blocks each.
SHARED = pytest.mark.parametrize(("blocks", "more"), [(1, -1), (1, 0), (1, 1), (4, -1), (4, 0), (4, 1)])
CONTENTS = ("numbers", "ties", "equal", "neighbours", "extremes")
KS = (3, 5)
MASSES = (1.375, 3.625)  # below K, so that some of the picked are not saturated
EPSILONS = (0.3, 4.0, 0.7)


def problem(n: int, mask_kind: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Logits (2, 4, n), two groups of two experts, with a tie at every row's start, and the mask."""
    logits = draw((2, 4, n), "normal", 1).to(dtype)
    logits[..., 1] = logits[..., 0]
    mask = draw_mask(2, n, mask_kind, 4)
    return logits.to(device), None if mask is None else mask.to(device)


@pytest.fixture
def unit(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every row is shared by at most four programs, in blocks of so many tokens."""
    from optimized.kernels import coordinate_descent, long_descent, long_selection, selection

    size = 8 if device.type == "cpu" else 1024
    monkeypatch.setattr(selection, "ALONE", 0)
    monkeypatch.setattr(coordinate_descent, "ALONE", 0)
    for module in (long_selection, long_descent):
        monkeypatch.setattr(module, "BLOCK", size)
        monkeypatch.setattr(module, "CHUNKS", 4)
    return size


def halves(t: Tensor) -> tuple[Tensor, Tensor]:
    return t[:, :2], t[:, 2:]


def dense(grads: tuple[Tensor, ...], inverses: tuple[Tensor, ...]) -> Tensor:
    """The gradient of all scores, by PyTorch."""
    rows = []
    for grad, inverse in zip(grads, inverses):
        rows.append(torch.where(inverse >= 0, grad.gather(-1, inverse.clamp_min(0).long()), 0))
    return torch.cat(rows, 1)


@pytest.mark.interpreted
@TRITON
@MASKED_FLOATS
@pytest.mark.parametrize("content", ["numbers", "nan", "ties"])
def test_groups_select_what_each_selects_alone(
    kernels: str, mask_kind: str, dtype: torch.dtype, content: str, device: torch.device
) -> None:
    """Against a sort of each group. A NaN at a valid token poisons its row, at a masked one nothing."""
    from optimized.kernels.selection import select_groups

    logits, mask = problem(9, mask_kind, dtype, device)
    if content == "nan":
        logits[0, 1, 2] = logits[1, 2, 4] = math.nan
        logits[1, 3, :] = math.nan
    elif content == "ties":
        logits = logits.round()
    scores = draw((2, 4, 9), "normal", 2).to(dtype).to(device).mT.contiguous().mT
    valid = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask[:, None].expand_as(logits)
    poisoned = (logits.isnan() & valid).any(-1, keepdim=True)
    for given, unit in ((scores, False), (scores, True), (None, True), (None, False)):
        groups = select_groups(logits, mask, KS, given, unit)
        assert len({t.untyped_storage().data_ptr() for group in groups for t in group if t.numel()}) == 6 + 2 * (
            unit or given is not None
        )
        for group, s, weight, bad, k in zip(groups, halves(logits), halves(scores), halves(poisoned), KS):
            indices, slots, inverse, picked = group
            for actual, expected in zip((indices, slots, inverse), best(s, valid[:, 0], k)):
                check_identical(actual, expected)
            if given is None and not unit:
                assert picked.shape == (2, 2, 0)
                continue
            numbers = torch.ones_like(picked) if unit else weight.gather(-1, indices)
            check_identical(picked, torch.where(bad, math.nan, torch.where(slots, numbers, 0)))
            if given is scores and not unit:
                for actual, expected in zip(group, select_groups(s, mask, (k,), weight, unit)[0]):
                    check_identical(actual, expected)


@TRITON
@pytest.mark.parametrize("n", [8192, 8193, 32769])
def test_selection_beyond_its_blocks(kernels: str, n: int, device: torch.device) -> None:
    """Few distinct logits: ties in every block, cut within one."""
    from optimized.kernels.selection import select

    logits = torch.randint(4, (1, 2, n), generator=generator(3)).float().to(device)
    mask = draw_mask(1, n, "random", 3).to(device)
    for k in (1, n // 2, n - 1):
        for actual, expected in zip(select(logits, mask, k), best(logits, mask, k)):
            check_identical(actual, expected)


@TRITON
def test_a_nan_of_any_block_poisons_its_row(kernels: str, device: torch.device) -> None:
    """Of a row too long for the registers, which is read block by block."""
    from optimized.kernels.selection import select_groups

    logits = draw((1, 3, 32769), "normal", 3).float().to(device)
    logits[0, 0, 5] = logits[0, 2, -1] = math.nan
    picked = select_groups(logits, None, (4,), None, unit=True)[0][3]
    check_identical(picked[0], torch.tensor([math.nan, 1.0, math.nan], device=device)[:, None].expand(3, 4))


def rows_of(content: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, 2, n)"""
    s = draw((1, 2, n), "normal", n).to(dtype)
    if content == "ties":  # beyond every border of a chunk, signed zeros among them
        s = torch.where(s.abs() < 0.4, torch.copysign(torch.zeros_like(s), s), s.round())
    elif content == "equal":
        s = torch.full_like(s, -2.5)
    elif content == "neighbours":  # that differ in the last digit alone
        s = 1 + s.mul(9).round() * torch.finfo(dtype).eps
    elif content == "extremes":
        s[..., ::3], s[..., 1::5] = math.inf, -math.inf
        s[0, 0, -1] = math.nan
        s[0, 1, ::2] = math.nan
    return s.to(device)


@TRITON
@SHARED
@pytest.mark.interpreted
def test_long_rows_select_as_any(kernels: str, blocks: int, more: int, unit: int, device: torch.device) -> None:
    """Against a sort, bit for bit: every content with every mask and K; two of these where kernels are interpreted."""
    from optimized.kernels.selection import select_groups

    n, turn = unit * blocks + more, 3 * blocks + more
    pairs = (1, n), (n // 2 + 1, n - 1), (n // 3 + 1, n // 5 + 1)
    every = [
        (c, m, d) for c in CONTENTS for m in ("none", "random", "none_valid") for d in (torch.float32, torch.float64)
    ]
    chosen = [every[(7 * turn) % len(every)], every[(7 * turn + 13) % len(every)]] if device.type == "cpu" else every
    for content, kind, dtype in chosen:
        s, mask, ks = rows_of(content, n, dtype, device), draw_mask(1, n, kind, 5), pairs[turn % 3]
        mask = None if mask is None else mask.to(device)
        shown = torch.ones(1, n, dtype=torch.bool, device=device) if mask is None else mask
        poisoned = (s.isnan() & shown[:, None]).any(-1, keepdim=True)
        scores = draw(tuple(s.shape), "normal", 2).to(s).mT.contiguous().mT
        for i, (group, k) in enumerate(zip(select_groups(s, mask, ks, scores), ks)):
            row, weight, bad = (t[:, i : i + 1] for t in (s, scores, poisoned))
            made = best(row, shown, k)
            picked = torch.where(made[1], weight.gather(-1, made[0]), 0).masked_fill(bad, math.nan)
            for actual, expected in zip(group, (*made, picked)):
                check_identical(actual, expected)


@TRITON
@pytest.mark.interpreted
def test_long_rows_select_in_every_item(kernels: str, unit: int, device: torch.device) -> None:
    """Of several items with a mask each, by ones in place of scores."""
    from optimized.kernels.selection import select_groups

    n = 4 * unit + 3  # two blocks to a chunk
    s, mask = draw((2, 2, n), "normal", 7).float().to(device), draw_mask(2, n, "random", 8).to(device)
    s[1, 1, 2 * unit], mask[1, 2 * unit] = math.nan, True
    for part, row, k in zip(select_groups(s, mask, (2, 9), None, unit=True), s.split(1, 1), (2, 9)):
        made = best(row, mask, k)
        ones = made[1].float().masked_fill((row.isnan() & mask[:, None]).any(-1, keepdim=True), math.nan)
        for actual, expected in zip(part, (*made, ones)):
            check_identical(actual, expected)


@TRITON
@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("blocks", "more", "dtype"), [(1, -1, torch.float32), (4, 1, torch.float32), (4, 1, torch.float64)], ids=str
)
def test_long_rows_descend_as_any(
    kernels: str, blocks: int, more: int, dtype: torch.dtype, unit: int, device: torch.device
) -> None:
    """Of two items with two masses: one step, and logits so far apart that a peak that is not theirs overflows."""
    n = unit * blocks + more
    for n_iters, mask_kind, apart in ((1, "none", 0.0), (5, "random", 3000.0)):
        logits, mask = problem(n, mask_kind, dtype, device)
        far = torch.ones(n, dtype=torch.bool, device=device)
        far[2 * unit : 3 * unit] = False  # the first block of a chunk of two
        logits = torch.where(far, logits - apart, logits)
        found = solve("iterative", logits, mask, MASSES, n_iters)
        tolerance = 64 * torch.finfo(dtype).eps * (1 + apart) / EPSILONS[0]
        for i, mass in enumerate(MASSES):
            expected = ops.coordinate_descent(halves(logits)[i], mask, mass, n_iters, *EPSILONS, False)
            actual = halves(found[0])[i], *(t.unflatten(-1, (2, 2))[..., i, :] for t in found[1:])
            for a, e in zip(actual, expected):
                torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@TRITON
@pytest.mark.interpreted
@pytest.mark.parametrize("at", [0, -1])
def test_a_nan_of_any_chunk_poisons_a_long_row(kernels: str, at: int, unit: int, device: torch.device) -> None:
    """Its scores, through every step; a row without tokens has zeros and finite iterates."""
    n = 4 * unit + 1  # two blocks to a chunk
    logits, mask = draw((2, 2, n), "normal", 3).float().to(device), torch.ones(2, n, dtype=torch.bool, device=device)
    logits[0, 1, at], mask[1] = math.nan, False
    scores, a, counts = solve("iterative", logits, mask, 5.5, 4)
    assert scores[0, 1].isnan().all()
    assert a[:, 0, 1].isnan().all()
    assert not scores[0, 0].isnan().any()
    assert not scores[1].any()
    assert not a[:, 1].any()
    assert not counts[:, 1].any()


@TRITON
@pytest.mark.interpreted
def test_parts_of_a_row_sum_its_first_gradient(
    kernels: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does, but for the order of the sum."""
    from optimized.kernels import coordinate_descent as kernel

    size = 16 if device.type == "cpu" else 1024
    logits, mask = problem(3 * size + 1, "random", torch.float64, device)
    saved = solve("iterative", logits, mask, MASSES, 6)
    g = draw(tuple(logits.shape), "normal", 9).to(device)
    whole, parts = [], []
    for found, chunk, most in ((whole, kernel.CHUNK, kernel.PARTS), (parts, size, 2)):
        monkeypatch.setattr(kernel, "CHUNK", chunk)
        monkeypatch.setattr(kernel, "PARTS", most)
        found += [kernel.coordinate_descent_backward(g, logits, mask, *saved, MASSES, *EPSILONS)]
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-12, atol=1e-12)
    assert whole[0].any()


def solve(solver: str, logits: Tensor, mask: Tensor | None, mass: Any, n_iters: int) -> tuple[Tensor, ...]:
    from optimized.kernels import capped_simplex, coordinate_descent

    if solver == "exact":
        return capped_simplex.capped_simplex(logits, mask, mass, EPSILONS[0])
    return coordinate_descent.coordinate_descent(logits, mask, mass, n_iters, *EPSILONS)


def pull_back(
    solver: str, grads: tuple, inverses: tuple, dlogits: Tensor | None, saved: tuple[Any, ...], mass: Any
) -> Tensor:
    from optimized.kernels import capped_simplex, coordinate_descent

    if solver == "exact":
        return capped_simplex.capped_simplex_picked_backward(grads, inverses, dlogits, *saved, EPSILONS[0])
    given = grads, inverses, dlogits, *saved[:2], saved[2:], mass, EPSILONS
    return coordinate_descent.coordinate_descent_picked_backward(*given)


SOLVERS = pytest.mark.parametrize("solver", ["iterative", "exact"])


@pytest.mark.interpreted
@TRITON
@MASKED
@FLOATS
@SOLVERS
def test_groups_have_a_mass_each(
    kernels: str, solver: str, mask_kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    logits, mask = problem(9, mask_kind, dtype, device)
    together = solve(solver, logits, mask, MASSES, 6)
    for i, mass in enumerate(MASSES):
        for actual, alone in zip(together, solve(solver, halves(logits)[i], mask, mass, 6)):
            rows = actual.movedim(-1, 1) if actual.ndim == 3 and actual.shape[-1] == 4 else actual
            part = halves(rows)[i]
            check_identical(part, alone.movedim(-1, 1) if alone.ndim == 3 and alone.shape[-1] == 2 else alone)


@TRITON
@MASKED
@FLOATS
@SOLVERS
@SIZES
def test_solvers_are_pytorchs(
    kernels: str, solver: str, n: int, n_iters: int, mask_kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Scores, iterates and counts (exact: thresholds), also of logits far below what the first step expects."""
    logits, mask = problem(n, mask_kind, dtype, device)
    for offset in (0.0, -3000.0):
        s = logits + offset
        found = solve(solver, s, mask, MASSES, n_iters)
        tolerance = 64 * torch.finfo(dtype).eps * (1 + abs(offset)) / EPSILONS[0]
        for i, mass in enumerate(MASSES):
            if solver == "exact":
                expected = ops.capped_simplex(halves(s)[i], mask, mass, EPSILONS[0], False)
                actual = tuple(halves(t)[i] for t in found)
            else:
                expected = ops.coordinate_descent(halves(s)[i], mask, mass, n_iters, *EPSILONS, False)
                actual = halves(found[0])[i], *(t.unflatten(-1, (2, 2))[..., i, :] for t in found[1:])
            for a, e in zip(actual, expected):
                torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@pytest.mark.interpreted
@TRITON
@MASKED_FLOATS
@SOLVERS
@SIZES
def test_picked_backward_is_the_dense_one(
    kernels: str, solver: str, n: int, n_iters: int, mask_kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Against PyTorch's backward of each group with its gradient made dense; dlogits reaches masked tokens too."""
    from optimized.kernels.selection import select_groups

    logits, mask = problem(n, mask_kind, dtype, device)
    saved = solve(solver, logits, mask, MASSES, n_iters)
    inverses = tuple(group[2] for group in select_groups(logits, mask, KS, None))
    grads = tuple(draw((2, 2, k), "normal", k).to(dtype).to(device).mT.contiguous().mT for k in KS)
    dlogits = draw((2, 4, n), "normal", 7).to(dtype).to(device).mT.contiguous().mT
    plain = pull_back(solver, grads, inverses, None, (logits, mask, *saved), MASSES)
    both = pull_back(solver, grads, inverses, dlogits, (logits, mask, *saved), MASSES)
    check_identical(both, plain + dlogits)
    for i, mass in enumerate(MASSES):
        g, s = halves(dense(grads, inverses))[i], halves(logits)[i]
        if solver == "exact":
            parts = halves(saved[0])[i], halves(saved[1])[i]
            expected = ops.capped_simplex.backward(g, s, mask, *parts, mass, EPSILONS[0], False, 1)
        else:
            parts = halves(saved[0])[i], *(t.unflatten(-1, (2, 2))[..., i, :] for t in saved[1:])
            expected = ops.coordinate_descent.backward(g, s, mask, *parts, mass, n_iters, *EPSILONS, False, 1)
        assert expected.any() or mask_kind != "none"  # few valid tokens may all be saturated
        error = (halves(plain)[i] - expected).abs().max()
        # The exponentials' arguments are rounded logits over eps; the sums are of n terms.
        assert error <= 64 * torch.finfo(dtype).eps * g.abs().max() / EPSILONS[0] / EPSILONS[0]


@TRITON
@SOLVERS
def test_poisoned_rows_pull_back_as_through_pytorch(kernels: str, solver: str, device: torch.device) -> None:
    """A gradient of NaN arrives where a picked score was set to NaN, which is a constant."""
    from optimized.kernels.selection import select_groups

    logits, _ = problem(9, "none", torch.float64, device)
    logits[1, 2, 4] = math.nan
    saved = solve(solver, logits, None, MASSES, 6)
    groups = select_groups(logits, None, KS, saved[0])
    grads = tuple(torch.where(group[3].isnan(), math.nan, 1.0) for group in groups)
    actual = pull_back(solver, grads, tuple(group[2] for group in groups), None, (logits, None, *saved), MASSES)
    poisoned = logits.isnan().any(-1)
    assert actual[~poisoned].isfinite().all()
    if solver == "exact":
        assert not actual[poisoned].any()
    else:
        assert actual[poisoned].isnan().all()


@TRITON
@SOLVERS
@pytest.mark.interpreted
def test_a_nan_of_any_block_poisons_the_scores_of_its_row(kernels: str, solver: str, device: torch.device) -> None:
    logits = draw((1, 3, 16385), "normal", 3).to(device)
    logits[0, 0, 5] = logits[0, 2, -1] = math.nan
    nan = solve(solver, logits, None, 300.5, 2)[0].isnan()[0]
    assert nan[0].all()
    assert not nan[1].any()
    assert nan[2].all()


@TRITON
@SOLVERS
@pytest.mark.interpreted
@pytest.mark.parametrize("largest", ["first", "last"])
@pytest.mark.parametrize("apart", [2.0, 3000.0])
def test_solvers_beyond_their_blocks(
    kernels: str, solver: str, largest: str, apart: float, device: torch.device
) -> None:
    """A row too long for the registers, largest logits and cotangent in one block, against PyTorch's solvers.

    Far apart, exponentials overflow where the largest logit of the first block alone is taken off.
    """
    n, mass, n_iters = 16385, 700.5, 4
    here = slice(2000) if largest == "first" else slice(n - 2000, n)
    logits = draw((1, 1, n), "normal", 5).to(device)
    logits -= apart
    logits[..., here] += apart
    mask = draw_mask(1, n, "random", 5).to(device)
    g = draw((1, 1, n), "normal", 6).to(device)
    g[..., here] *= 10
    actual = solve(solver, logits, mask, mass, n_iters)
    if solver == "exact":
        expected = ops.capped_simplex(logits, mask, mass, EPSILONS[0], False)
        gradient, found = (
            ops.capped_simplex.backward(g, logits, mask, *expected, mass, EPSILONS[0], triton, 1)
            for triton in (False, True)
        )
    else:
        expected = ops.coordinate_descent(logits, mask, mass, n_iters, *EPSILONS, False)
        gradient, found = (
            ops.coordinate_descent.backward(g, logits, mask, *expected, mass, n_iters, *EPSILONS, triton, 1)
            for triton in (False, True)
        )
    assert (expected[0] == 1).any()
    for a, e in zip((*actual, found), (*expected, gradient)):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
