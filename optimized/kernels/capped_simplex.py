"""The exact solver, forward and implicit gradient: min(1, exp((s + a) / eps)) of a given mass.

Rows are (B, E) rows of N logits, contiguous, float32 or float64; one program per row, which writes its N scores and its
threshold (tokens at or below it are unsaturated). Michelot's iteration: solve for a over the free tokens, saturate
those with s + a >= 0, until none is left to saturate. The saturated set only grows, so the loop ends, after at most k
rounds and in practice a handful.

Blind spots: long rows are read again, chunk by chunk, in every round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import CHUNK, double_bits, from_bits
from optimized.kernels.rows import load_row, row_arguments

# A double's bits may look divisible by 16, a number of steps may be 1: no reason to compile again. A mask that is
# loaded in vectors has another layout than the row, and costs shared memory.
UNSPECIALIZED = ["k_bits", "eps_bits", "experts"]


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=["mask_ptr"])
def _exact_kernel(
    s_ptr, mask_ptr, scores_ptr, threshold_ptr,
    n, experts, k_bits, eps_bits,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`level`: tokens with s >= level are saturated. It starts at +inf and falls until no free token reaches 1."""
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * n
    scores_ptr += row * n
    if HAS_MASK:
        mask_ptr += row // experts * n
    dtype: tl.constexpr = s_ptr.dtype.element_ty
    k = from_bits(k_bits).to(dtype)
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


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=["mask_ptr"])
def _exact_backward_kernel(
    grad_ptr, s_ptr, mask_ptr, scores_ptr, threshold_ptr, out_ptr,
    n, experts, eps_bits,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ds = w (g - <g>_w) / eps over the unsaturated tokens, w their scores."""
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * n
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
        s, valid = load_row(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
        grad = tl.load(grad_ptr + start + lanes, mask=valid, other=0.0)
        w = tl.load(scores_ptr + start + lanes, mask=valid & (s <= threshold), other=0.0)
        weight += tl.sum(w)
        moment += tl.sum(w * grad)
    mean = tl.where(weight == 0, 0.0, moment / weight)
    for start in range(0, n, BLOCK):
        s, valid = load_row(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
        grad = tl.load(grad_ptr + start + lanes, mask=valid, other=0.0)
        w = tl.load(scores_ptr + start + lanes, mask=valid & (s <= threshold), other=0.0)
        tl.store(out_ptr + start + lanes, w * (grad - mean) / eps, mask=start + lanes < n)


def capped_simplex(logits: Tensor, mask: Tensor | None, k: float, eps: float) -> tuple[Tensor, Tensor]:
    """See `optimized.ops.capped_simplex`."""
    batch, experts, n = logits.shape
    s, mask, constants = row_arguments(logits, mask, CHUNK)
    scores, threshold = torch.empty_like(s), s.new_full((batch, experts), -float("inf"))
    if s.numel():
        _exact_kernel[(batch * experts,)](
            s, mask, scores, threshold, n, experts, double_bits(k), double_bits(eps), **constants
        )
    return scores, threshold


def capped_simplex_backward(
    grad: Tensor, logits: Tensor, mask: Tensor | None, scores: Tensor, threshold: Tensor, eps: float
) -> Tensor:
    """See `optimized.ops.capped_simplex_backward`."""
    batch, experts, n = logits.shape
    s, mask, constants = row_arguments(logits, mask, CHUNK)
    out = torch.empty_like(s)
    if s.numel():
        _exact_backward_kernel[(batch * experts,)](
            grad.contiguous(),
            s,
            mask,
            scores.contiguous(),
            threshold.contiguous(),
            out,
            n,
            experts,
            double_bits(eps),
            **constants,
        )
    return out
