"""Coordinate descent, the iterative solver: scores, iterates and counts, and the gradient of the logits.

Rows are (B, R) rows of N logits, contiguous, float32 or float64, of one or two groups of experts with a mass each; one
program per row forward. A row that fits stays in registers; a longer one is read again in every step, and from `ALONE`
logits on many programs share it (`long_descent`). N scores, and T iterates a and T counts at (t, row), are written.

For t = 0 .. T-1 (see `optimized.ops.coordinate_descent`): a_t = eps_t (log k - logsumexp(u_t / eps_t)). The largest
u_t is min(max s, -a_{t-1}), so a step needs one reduction of two sums: of exponentials, and of saturated tokens.

The backward needs no reduction per step: dA follows from the counts, by scalars. Programs (row, part) leave sums of the
first dA, and the first part's writes c_t = dA_t / dA / k, and 1 / eps_t, to (t, row). Then programs (row, chunk of 512
tokens) add up dA and write ds, in tiles of steps and tokens: g scores / eps_T [s < -a_{T-1}]
- dA sum_t c_t exp((s + a_t) / eps_t) [s < -a_{t-1}]. The gradient g of the scores comes dense (B, R, N), or as that of
the picked ones, (B, E, K) per group, by the inverse map.

Blind spots: one program per row forward leaves most of a GPU idle when there are few rows of up to `ALONE` logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels import long_descent
from optimized.kernels.launch import CHUNK, cdiv, contiguous, double_bits, from_bits, launch
from optimized.kernels.rows import (
    block_of_row,
    fits,
    gradient_arguments,
    gradient_of_row,
    load_gradient,
    load_row,
    mass_arguments,
    mass_of_row,
    part_length,
    row_arguments,
    sum_both,
)
from optimized.kernels.temperature import temperature_of

# A double's bits may look divisible by 16, a number of steps may be 1: no reason to compile again. A mask that is
# loaded in vectors has another layout than the row, and costs shared memory.
UNSPECIALIZED = [
    *("n", "rows", "experts", "group", "k_0", "k_1"),
    *("mass_0_bits", "mass_1_bits", "n_iters", "eps_bits", "eps_init_bits", "eps_decay_bits", "length", "parts"),
]
ALONE = 65536  # logits of a row for one program
PARTS = 32  # of a row, at most, that sum the first dA
TOKENS = 512  # of a tile of the backward
STEPS = 8
SCALARS = 32  # steps at a time where each is a scalar


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=["mask_ptr"])
def _descent_kernel(
    s_ptr, mask_ptr, scores_ptr, a_ptr, counts_ptr,
    n, rows, experts, group, mass_0_bits, mass_1_bits, n_iters, eps_bits, eps_init_bits, eps_decay_bits,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * n
    scores_ptr += row * n
    if HAS_MASK:
        mask_ptr += row // experts * n
    dtype: tl.constexpr = s_ptr.dtype.element_ty
    log_k = tl.log(mass_of_row(row, experts, group, mass_0_bits, mass_1_bits)).to(dtype)
    lanes = tl.arange(0, BLOCK)

    s, valid = load_row(s_ptr, mask_ptr, lanes, n, HAS_MASK)
    top = tl.max(s)
    poisoned = tl.max((s != s).to(tl.int32))
    found = tl.sum(valid.to(tl.int32))
    if not ONE_BLOCK:
        for start in range(BLOCK, n, BLOCK):
            s, valid = load_row(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
            top = tl.maximum(top, tl.max(s))
            poisoned = tl.maximum(poisoned, tl.max((s != s).to(tl.int32)))
            found += tl.sum(valid.to(tl.int32))

    # Step 0 has u = 0 at every valid token. A row without any takes a = 0: all its weights are exp(-inf).
    temperature = temperature_of(0, eps_bits, eps_init_bits, eps_decay_bits, dtype)
    a = tl.where(found > 0, temperature * (log_k - tl.log(found.to(dtype))), 0.0)
    a = tl.where(poisoned > 0, float("nan"), a)
    tl.store(a_ptr + row, a)
    tl.store(counts_ptr + row, 0.0)
    hot = from_bits(eps_init_bits)
    cooling = from_bits(eps_decay_bits)
    coldest = from_bits(eps_bits)
    for t in range(1, n_iters):
        hot *= cooling
        temperature = tl.maximum(hot, coldest).to(dtype)
        rate = 1.0 / temperature
        bound = -a
        peak = tl.minimum(top, bound)
        peak = tl.where(peak == -float("inf"), 0.0, peak)
        if ONE_BLOCK:
            total, count = sum_both(tl.exp((tl.minimum(s, bound) - peak) * rate), (s >= bound).to(tl.int32))
        else:
            totals = tl.zeros((BLOCK,), dtype)
            counts = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, n, BLOCK):
                s, valid = load_row(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
                totals += tl.exp((tl.minimum(s, bound) - peak) * rate)
                counts += (s >= bound).to(tl.int32)
            total, count = sum_both(totals, counts)  # once: threads wait for one another in a sum
        a = tl.where(total > 0, temperature * (log_k - tl.log(total)) - peak, 0.0)
        a = tl.where(poisoned > 0, float("nan"), a)
        tl.store(a_ptr + tl.cast(t, tl.int64) * rows + row, a)
        tl.store(counts_ptr + tl.cast(t, tl.int64) * rows + row, count.to(dtype))
    rate = 1.0 / temperature_of(n_iters, eps_bits, eps_init_bits, eps_decay_bits, dtype)
    for start in range(0, n, BLOCK):
        if not ONE_BLOCK:
            s, valid = load_row(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
        scores = tl.exp(tl.minimum(s + a, 0.0) * rate)
        scores = tl.where(poisoned > 0, float("nan"), scores)
        tl.store(scores_ptr + start + lanes, tl.where(valid, scores, 0.0), mask=start + lanes < n)


@triton.jit
def _direct(
    grad_ptr, inverse_ptr, s_ptr, mask_ptr, scores_ptr, offsets, n, a, temperature,
    PICKED: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Logits, which are valid, and g scores / eps_T [s < -a_{T-1}]."""
    s, valid = load_row(s_ptr, mask_ptr, offsets, n, HAS_MASK)
    grad = load_gradient(grad_ptr, inverse_ptr, offsets, valid, PICKED)
    scores = tl.load(scores_ptr + offsets, mask=valid, other=0.0)
    return s, valid, tl.where(valid & (s >= -a), 0.0, grad * scores / temperature)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=["mask_ptr"])
def _descent_sums_kernel(
    grad_0, grad_1, inverse_0, inverse_1, s_ptr, mask_ptr, scores_ptr, a_ptr, counts_ptr, sums_ptr, c_ptr, rates_ptr,
    n, rows, experts, group, k_0, k_1, mass_0_bits, mass_1_bits, n_iters, eps_bits, eps_init_bits, eps_decay_bits,
    length,
    PICKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, SCALARS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Program (row, part of `length` tokens): its sum of the first dA; by the first part c_t of the row, and by that of
    the first row 1 / eps_t, for t = 1 .. T-1.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    grad_ptr, inverse_ptr = gradient_of_row(
        grad_0, grad_1, inverse_0, inverse_1, row, experts, group, n, k_0, k_1, PICKED
    )
    s_ptr += row * n
    scores_ptr += row * n
    if HAS_MASK:
        mask_ptr += row // experts * n
    dtype: tl.constexpr = s_ptr.dtype.element_ty
    inverse_k = (1.0 / mass_of_row(row, experts, group, mass_0_bits, mass_1_bits)).to(dtype)
    a = tl.load(a_ptr + tl.cast(n_iters - 1, tl.int64) * rows + row)
    last = temperature_of(n_iters, eps_bits, eps_init_bits, eps_decay_bits, dtype)
    da = tl.full((), 0.0, dtype)
    for start in range(part * length, tl.minimum(part * length + length, n), BLOCK):
        _, _, ds = _direct(
            grad_ptr, inverse_ptr, s_ptr, mask_ptr, scores_ptr, start + tl.arange(0, BLOCK), n, a, last,
            PICKED, HAS_MASK,
        )  # fmt: skip
        da += tl.sum(ds)
    tl.store(sums_ptr + row * PARTS + part, da)

    # From the last step back: dA_t is the first dA times a factor of each later step. Each factor is the share of the
    # mass that is saturated, so no product overflows.
    lanes = tl.arange(0, SCALARS)
    later_steps = tl.full((), 1.0, dtype)
    for back in range(0, tl.where(part == 0, n_iters, 0), SCALARS):
        t = n_iters - 1 - back - lanes
        at = t.to(tl.int64) * rows + row
        later = (t >= 1) & (t + 1 < n_iters)
        mine = tl.load(a_ptr + at, mask=later, other=0.0)
        following = tl.load(a_ptr + at + rows, mask=later, other=0.0)
        count = tl.load(counts_ptr + at + rows, mask=later, other=0.0)
        temperature = temperature_of(t + 1, eps_bits, eps_init_bits, eps_decay_bits, dtype)
        factor = count * tl.exp((following - mine) / temperature) * inverse_k
        product = later_steps * tl.cumprod(tl.where(later, tl.where(count > 0, factor, 0.0), 1.0))
        tl.store(c_ptr + at, product * inverse_k, mask=t >= 1)
        rate = 1.0 / temperature_of(t, eps_bits, eps_init_bits, eps_decay_bits, dtype)
        tl.store(rates_ptr + t, rate, mask=t >= tl.where(row == 0, 1, n_iters))
        later_steps = tl.sum(tl.where(lanes == SCALARS - 1, product, 0.0))


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=["mask_ptr"])
def _descent_backward_kernel(
    grad_0, grad_1, inverse_0, inverse_1, dlogits_ptr, s_ptr, mask_ptr, scores_ptr, a_ptr, sums_ptr, c_ptr, rates_ptr,
    out_ptr,
    n, rows, experts, group, k_0, k_1, n_iters, eps_bits, eps_init_bits, eps_decay_bits, parts,
    PICKED: tl.constexpr, HAS_DLOGITS: tl.constexpr, HAS_MASK: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk)."""
    row = tl.program_id(0).to(tl.int64)
    grad_ptr, inverse_ptr = gradient_of_row(
        grad_0, grad_1, inverse_0, inverse_1, row, experts, group, n, k_0, k_1, PICKED
    )
    if HAS_MASK:
        mask_ptr += row // experts * n
    dtype: tl.constexpr = s_ptr.dtype.element_ty
    a = tl.load(a_ptr + tl.cast(n_iters - 1, tl.int64) * rows + row)
    last = temperature_of(n_iters, eps_bits, eps_init_bits, eps_decay_bits, dtype)
    each = tl.arange(0, PARTS)
    da = tl.sum(tl.load(sums_ptr + row * PARTS + each, mask=each < parts, other=0.0))
    mine = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    s, valid, ds = _direct(
        grad_ptr, inverse_ptr, s_ptr + row * n, mask_ptr, scores_ptr + row * n, mine, n, a, last, PICKED, HAS_MASK
    )
    for first in range(1, n_iters, STEPS):
        t = first + tl.arange(0, STEPS)
        inside = t < n_iters
        at = t.to(tl.int64) * rows + row
        a_t = tl.load(a_ptr + at, mask=inside, other=0.0)[:, None]
        bound = -tl.load(a_ptr + at - rows, mask=inside, other=float("inf"))[:, None]
        c = da * tl.load(c_ptr + at, mask=inside, other=0.0)[:, None]
        rate = tl.load(rates_ptr + t, mask=inside, other=1.0)[:, None]
        # Saturated tokens take no part, and their exponential may overflow. Past the last step all are.
        p = tl.exp(tl.where(s[None, :] >= bound, -float("inf"), (s[None, :] + a_t) * rate))
        ds -= tl.sum(p * c, axis=0)
    ds = tl.where(valid, ds, 0.0)
    if HAS_DLOGITS:
        ds += tl.load(dlogits_ptr + row * n + mine, mask=mine < n, other=0.0)
    tl.store(out_ptr + row * n + mine, ds, mask=mine < n)


def coordinate_descent(
    logits: Tensor,
    mask: Tensor | None,
    k: float | tuple[float, ...],
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `optimized.ops.coordinate_descent`. k: the mass, or that of each group of rows."""
    batch, experts, n = logits.shape
    if n > ALONE:
        temperatures = [max(eps_init * eps_decay**t, eps) for t in range(n_iters + 1)]
        return long_descent.descend_long(logits, mask, k, n_iters, temperatures)
    size = logits.element_size()
    s, mask, constants = row_arguments(logits, mask, block_of_row(n, size))
    scores = torch.empty_like(s)
    make = s.new_empty if s.numel() else s.new_zeros  # without tokens no program writes
    a, counts = (make(n_iters, batch, experts) for _ in range(2))
    if s.numel():
        rows, bits = batch * experts, map(double_bits, (eps, eps_init, eps_decay))
        launch(
            _descent_kernel, (rows,),
            s, mask, scores, a, counts, n, rows, experts, *mass_arguments(experts, k), n_iters, *bits,
            ONE_BLOCK=fits(n, size), **constants,
        )  # fmt: skip
    return scores, a, counts


def coordinate_descent_backward(
    grad: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    scores: Tensor,
    a: Tensor,
    counts: Tensor,
    k: float | tuple[float, ...],
    eps: float,
    eps_init: float,
    eps_decay: float,
) -> Tensor:
    """See `optimized.ops.coordinate_descent_backward`."""
    return _backward((grad,), None, None, logits, mask, scores, a, counts, k, (eps, eps_init, eps_decay))


def coordinate_descent_picked_backward(
    grads: tuple[Tensor, ...],
    inverses: tuple[Tensor, ...],
    dlogits: Tensor | None,
    logits: Tensor,
    mask: Tensor | None,
    solved: tuple[Tensor, ...],
    k: float | tuple[float, ...],
    epsilons: tuple[float, float, float],
) -> Tensor:
    """From the gradients (B, E, K) of each group's picked scores, by its inverse map (B, E, N); dlogits is added.

    solved: scores, iterates and counts of the forward; epsilons: eps, eps_init, eps_decay.
    """
    scores, a, counts = solved
    return _backward(grads, inverses, dlogits, logits, mask, scores, a, counts, k, epsilons)


def _backward(
    grads: tuple[Tensor, ...],
    inverses: tuple[Tensor, ...] | None,
    dlogits: Tensor | None,
    logits: Tensor,
    mask: Tensor | None,
    scores: Tensor,
    a: Tensor,
    counts: Tensor,
    k: float | tuple[float, ...],
    epsilons: tuple[float, float, float],
) -> Tensor:
    batch, experts, n = logits.shape
    s, mask, constants = row_arguments(logits, mask, CHUNK, most_warps=32)
    out = torch.empty_like(s)
    if s.numel():
        rows, n_iters, bits = batch * experts, a.shape[0], [double_bits(eps) for eps in epsilons]
        pointers, widths, picked = gradient_arguments(grads, inverses)
        group, *masses = mass_arguments(experts, k)
        scores, a = scores.contiguous(), a.contiguous()
        c, rates = torch.empty_like(a), a.new_empty(n_iters)
        length = part_length(n, constants["BLOCK"], PARTS)
        parts, sums = cdiv(n, length), a.new_empty(rows, PARTS)
        launch(
            _descent_sums_kernel, (rows, parts),
            *pointers, s, mask, scores, a, counts.contiguous(), sums, c, rates,
            n, rows, experts, group, *widths, *masses, n_iters, *bits, length,
            SCALARS=SCALARS, PARTS=PARTS, **picked, **constants,
        )  # fmt: skip
        launch(
            _descent_backward_kernel, (rows, cdiv(n, TOKENS)),
            *pointers, contiguous(dlogits), s, mask, scores, a, sums, c, rates, out,
            n, rows, experts, group, *widths, n_iters, *bits, parts,
            HAS_DLOGITS=dlogits is not None, HAS_MASK=mask is not None, TOKENS=TOKENS, STEPS=STEPS, PARTS=PARTS,
            num_warps=4, **picked,
        )  # fmt: skip
    return out
