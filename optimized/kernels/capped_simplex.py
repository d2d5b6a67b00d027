"""The exact solver, forward and implicit gradient: min(1, exp((s + a) / eps)) of a given mass.

Rows are (B, R) rows of N logits, contiguous, float32 or float64, of one or two groups of experts with a mass each; one
program per row, which writes its N scores and its threshold (tokens at or below it are unsaturated). Michelot's
iteration: solve for a over the free tokens, saturate those with s + a >= 0, until none is left to saturate. The
saturated set only grows, so the loop ends, after at most k rounds and in practice a handful.

The gradient of the scores comes dense (B, R, N), or as that of the picked ones, (B, E, K) per group, by the inverse
map.

Blind spots: long rows are read again, chunk by chunk, in every round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import CHUNK, contiguous, double_bits, from_bits, launch
from optimized.kernels.rows import (
    gradient_arguments,
    gradient_of_row,
    load_gradient,
    load_row,
    mass_arguments,
    mass_of_row,
    row_arguments,
)

# A double's bits may look divisible by 16, a number of steps may be 1: no reason to compile again. A mask that is
# loaded in vectors has another layout than the row, and costs shared memory.
UNSPECIALIZED = ["n", "mass_0_bits", "mass_1_bits", "eps_bits", "experts", "group", "k_0", "k_1"]


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=["mask_ptr"])
def _exact_kernel(
    s_ptr, mask_ptr, scores_ptr, threshold_ptr,
    n, experts, group, mass_0_bits, mass_1_bits, eps_bits,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`level`: tokens with s >= level are saturated. It starts at +inf and falls until no free token reaches 1."""
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * n
    scores_ptr += row * n
    if HAS_MASK:
        mask_ptr += row // experts * n
    dtype: tl.constexpr = s_ptr.dtype.element_ty
    k = mass_of_row(row, experts, group, mass_0_bits, mass_1_bits).to(dtype)
    eps = from_bits(eps_bits).to(dtype)
    lanes = tl.arange(0, BLOCK)
    infinity = tl.full((), float("inf"), dtype)

    poisoned = tl.full((), 0, tl.int32)
    found = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        s, valid = load_row(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
        poisoned = tl.maximum(poisoned, tl.max((s != s).to(tl.int32)))
        found += tl.sum((s > -infinity).to(tl.int32))

    fits = found.to(dtype) <= k
    level = tl.where(fits, -infinity, infinity)
    a = tl.full((), 0.0, dtype)
    threshold = -infinity
    going = tl.where(fits | (poisoned > 0), 0, 1)
    while going > 0:
        # The largest free token, and how many are saturated above it.
        peak = -infinity
        above = tl.full((), 0, tl.int32)
        for start in range(0, n, BLOCK):
            s, valid = load_row(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
            saturated = s >= level
            peak = tl.maximum(peak, tl.max(tl.where(saturated, -infinity, s)))
            above += tl.sum(saturated.to(tl.int32))
        total = tl.full((), 0.0, dtype)
        shift = tl.where(peak == -infinity, 0.0, peak)
        for start in range(0, n, BLOCK):
            s, valid = load_row(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
            total += tl.sum(tl.where(s >= level, 0.0, tl.exp((s - shift) / eps)))
        left = tl.maximum(k - above.to(dtype), 0.0)
        # a + shift: relative to the peak, so that a common offset of the logits costs no precision.
        relative = tl.where((left > 0) & (total > 0), eps * (tl.log(left) - tl.log(total)), -infinity)
        threshold = peak
        a = relative
        going = tl.where(relative >= 0, 1, 0)
        level = tl.where(relative >= 0, tl.minimum(peak, shift - relative), level)
    for start in range(0, n, BLOCK):
        s, valid = load_row(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
        free = s <= threshold
        shift = tl.where(threshold == -infinity, 0.0, threshold)
        scores = tl.where(free, tl.exp(tl.minimum((s - shift + a) / eps, 0.0)), 1.0)
        scores = tl.where(poisoned > 0, float("nan"), scores)
        tl.store(scores_ptr + start + lanes, tl.where(valid, scores, 0.0), mask=start + lanes < n)
    tl.store(threshold_ptr + row, threshold)


@triton.jit
def _weighted(
    grad_ptr, inverse_ptr, s_ptr, mask_ptr, scores_ptr, offsets, n, threshold,
    PICKED: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Weights w and gradients of the scores."""
    s, valid = load_row(s_ptr, mask_ptr, offsets, n, HAS_MASK)
    grad = load_gradient(grad_ptr, inverse_ptr, offsets, valid, PICKED)
    scores = tl.load(scores_ptr + offsets, mask=valid, other=0.0)
    if PICKED:
        grad = tl.where(scores != scores, 0.0, grad)  # picked scores that were set to NaN are constants
    return tl.where(s <= threshold, scores, 0.0), grad


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=["mask_ptr"])
def _exact_backward_kernel(
    grad_0, grad_1, inverse_0, inverse_1, dlogits_ptr, s_ptr, mask_ptr, scores_ptr, threshold_ptr, out_ptr,
    n, experts, group, k_0, k_1, eps_bits,
    PICKED: tl.constexpr, HAS_DLOGITS: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ds = w (g - <g>_w) / eps over the unsaturated tokens, w their scores."""
    row = tl.program_id(0).to(tl.int64)
    grad_ptr, inverse_ptr = gradient_of_row(
        grad_0, grad_1, inverse_0, inverse_1, row, experts, group, n, k_0, k_1, PICKED
    )
    s_ptr += row * n
    scores_ptr += row * n
    out_ptr += row * n
    if HAS_MASK:
        mask_ptr += row // experts * n
    dtype: tl.constexpr = s_ptr.dtype.element_ty
    eps = from_bits(eps_bits).to(dtype)
    threshold = tl.load(threshold_ptr + row)
    lanes = tl.arange(0, BLOCK)
    weight = tl.full((), 0.0, dtype)
    moment = tl.full((), 0.0, dtype)
    for start in range(0, n, BLOCK):
        w, grad = _weighted(
            grad_ptr, inverse_ptr, s_ptr, mask_ptr, scores_ptr, start + lanes, n, threshold, PICKED, HAS_MASK
        )
        weight += tl.sum(w)
        moment += tl.sum(w * grad)
    mean = tl.where(weight == 0, 0.0, moment / weight)
    for start in range(0, n, BLOCK):
        inside = start + lanes < n
        w, grad = _weighted(
            grad_ptr, inverse_ptr, s_ptr, mask_ptr, scores_ptr, start + lanes, n, threshold, PICKED, HAS_MASK
        )
        ds = w * (grad - mean) / eps
        if HAS_DLOGITS:
            ds += tl.load(dlogits_ptr + row * n + start + lanes, mask=inside, other=0.0)
        tl.store(out_ptr + start + lanes, ds, mask=inside)


def capped_simplex(
    logits: Tensor, mask: Tensor | None, k: float | tuple[float, ...], eps: float
) -> tuple[Tensor, Tensor]:
    """See `optimized.ops.capped_simplex`. k: the mass, or that of each group of rows."""
    batch, experts, n = logits.shape
    s, mask, constants = row_arguments(logits, mask, CHUNK)
    scores, threshold = torch.empty_like(s), s.new_full((batch, experts), -float("inf"))
    if s.numel():
        launch(
            _exact_kernel,
            (batch * experts,),
            s,
            mask,
            scores,
            threshold,
            n,
            experts,
            *mass_arguments(experts, k),
            double_bits(eps),
            **constants,
        )
    return scores, threshold


def capped_simplex_backward(
    grad: Tensor, logits: Tensor, mask: Tensor | None, scores: Tensor, threshold: Tensor, eps: float
) -> Tensor:
    """See `optimized.ops.capped_simplex_backward`."""
    return _backward((grad,), None, None, logits, mask, scores, threshold, eps)


def capped_simplex_picked_backward(
    grads: tuple[Tensor, ...],
    inverses: tuple[Tensor, ...],
    dlogits: Tensor | None,
    logits: Tensor,
    mask: Tensor | None,
    scores: Tensor,
    threshold: Tensor,
    eps: float,
) -> Tensor:
    """From the gradients (B, E, K) of each group's picked scores, by its inverse map (B, E, N); dlogits is added."""
    return _backward(grads, inverses, dlogits, logits, mask, scores, threshold, eps)


def _backward(
    grads: tuple[Tensor, ...],
    inverses: tuple[Tensor, ...] | None,
    dlogits: Tensor | None,
    logits: Tensor,
    mask: Tensor | None,
    scores: Tensor,
    threshold: Tensor,
    eps: float,
) -> Tensor:
    batch, experts, n = logits.shape
    s, mask, constants = row_arguments(logits, mask, CHUNK)
    out = torch.empty_like(s)
    if s.numel():
        pointers, widths, picked = gradient_arguments(grads, inverses)
        launch(
            _exact_backward_kernel, (batch * experts,),
            *pointers, contiguous(dlogits), s, mask, scores.contiguous(), threshold.contiguous(), out,
            n, experts, experts // len(grads), *widths, double_bits(eps),
            HAS_DLOGITS=dlogits is not None, **picked, **constants,
        )  # fmt: skip
    return out
