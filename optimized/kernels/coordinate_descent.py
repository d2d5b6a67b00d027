"""Coordinate descent, the iterative solver: scores, iterates and counts, and the gradient of the logits.

Rows are (B, E) rows of N logits, contiguous, float32 or float64; one program per row forward, and per row and chunk
backward. A row that fits stays in registers; a longer one is read again in every step (from L2: 131072 float32 take
512 KB). The program of a row writes its N scores, and T iterates a and T counts at (t, row).

For t = 0 .. T-1 (see `optimized.ops.coordinate_descent`): a_t = eps_t (log k - logsumexp(u_t / eps_t)). The largest
u_t is min(max s, -a_{t-1}), so a step needs one reduction of two sums: of exponentials, and of saturated tokens. The
backward needs no reduction per step: dA follows from the counts, by scalars; each of its programs sums the first dA
over the whole row, then finishes its own chunk.

Blind spots: one program per row leaves most of a GPU idle when there are few long rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import CHUNK, double_bits, from_bits
from optimized.kernels.rows import block_of_row, fits, load_row, row_arguments

# A double's bits may look divisible by 16, a number of steps may be 1: no reason to compile again. A mask that is
# loaded in vectors has another layout than the row, and costs shared memory.
UNSPECIALIZED = ["k_bits", "eps_bits", "eps_init_bits", "eps_decay_bits", "n_iters", "rows", "experts"]


@triton.jit
def _temperature(t, eps_bits, eps_init_bits, eps_decay_bits, DTYPE: tl.constexpr):
    """max(eps_init * eps_decay ** t, eps), in double until the end."""
    decay = tl.exp2(t * tl.log2(from_bits(eps_decay_bits)))
    return tl.maximum(from_bits(eps_init_bits) * decay, from_bits(eps_bits)).to(DTYPE)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=["mask_ptr"])
def _descent_kernel(
    s_ptr, mask_ptr, scores_ptr, a_ptr, counts_ptr,
    n, rows, experts, k_bits, n_iters, eps_bits, eps_init_bits, eps_decay_bits,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * n
    scores_ptr += row * n
    if HAS_MASK:
        mask_ptr += row // experts * n
    dtype: tl.constexpr = s_ptr.dtype.element_ty
    log_k = tl.log(from_bits(k_bits)).to(dtype)
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
    temperature = _temperature(0, eps_bits, eps_init_bits, eps_decay_bits, dtype)
    a = tl.where(found > 0, temperature * (log_k - tl.log(found.to(dtype))), 0.0)
    a = tl.where(poisoned > 0, float("nan"), a)
    tl.store(a_ptr + row, a)
    tl.store(counts_ptr + row, 0.0)
    for t in range(1, n_iters):
        temperature = _temperature(t, eps_bits, eps_init_bits, eps_decay_bits, dtype)
        bound = -a
        peak = tl.minimum(top, bound)
        peak = tl.where(peak == -float("inf"), 0.0, peak)
        if ONE_BLOCK:
            total = tl.sum(tl.exp((tl.minimum(s, bound) - peak) / temperature))
            count = tl.sum((s >= bound).to(tl.int32))
        else:
            total = tl.full((), 0.0, dtype)
            count = tl.full((), 0, tl.int32)
            for start in range(0, n, BLOCK):
                s, valid = load_row(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
                total += tl.sum(tl.exp((tl.minimum(s, bound) - peak) / temperature))
                count += tl.sum((s >= bound).to(tl.int32))
        a = tl.where(total > 0, temperature * (log_k - tl.log(total)) - peak, 0.0)
        a = tl.where(poisoned > 0, float("nan"), a)
        tl.store(a_ptr + tl.cast(t, tl.int64) * rows + row, a)
        tl.store(counts_ptr + tl.cast(t, tl.int64) * rows + row, count.to(dtype))
    temperature = _temperature(n_iters, eps_bits, eps_init_bits, eps_decay_bits, dtype)
    for start in range(0, n, BLOCK):
        if not ONE_BLOCK:
            s, valid = load_row(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
        scores = tl.exp(tl.minimum(s + a, 0.0) / temperature)
        scores = tl.where(poisoned > 0, float("nan"), scores)
        tl.store(scores_ptr + start + lanes, tl.where(valid, scores, 0.0), mask=start + lanes < n)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=["mask_ptr"])
def _descent_backward_kernel(
    grad_ptr, s_ptr, mask_ptr, scores_ptr, a_ptr, counts_ptr, out_ptr,
    n, rows, experts, k_bits, n_iters, eps_bits, eps_init_bits, eps_decay_bits,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk): every one sums ds over the whole row, then finishes its own chunk."""
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * n
    s_ptr += row * n
    scores_ptr += row * n
    out_ptr += row * n
    if HAS_MASK:
        mask_ptr += row // experts * n
    dtype: tl.constexpr = s_ptr.dtype.element_ty
    inverse_k = (1.0 / from_bits(k_bits)).to(dtype)
    lanes = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + tl.cast(n_iters - 1, tl.int64) * rows + row)
    last = _temperature(n_iters, eps_bits, eps_init_bits, eps_decay_bits, dtype)

    da = tl.full((), 0.0, dtype)
    for start in range(0, n, BLOCK):
        s, valid = load_row(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
        # Masked lanes are not read: a cotangent may be NaN there, and 0 * NaN is NaN.
        grad = tl.load(grad_ptr + start + lanes, mask=valid, other=0.0)
        scores = tl.load(scores_ptr + start + lanes, mask=valid, other=0.0)
        da += tl.sum(tl.where(valid & (s >= -a), 0.0, grad * scores / last))

    mine = tl.program_id(1) * BLOCK + lanes
    s, valid = load_row(s_ptr, mask_ptr, mine, n, HAS_MASK)
    grad = tl.load(grad_ptr + mine, mask=valid, other=0.0)
    scores = tl.load(scores_ptr + mine, mask=valid, other=0.0)
    ds = tl.where(s >= -a, 0.0, grad * scores / last)
    for back in range(1, n_iters):
        t = n_iters - back
        temperature = _temperature(t, eps_bits, eps_init_bits, eps_decay_bits, dtype)
        before = tl.load(a_ptr + tl.cast(t - 1, tl.int64) * rows + row)
        count = tl.load(counts_ptr + tl.cast(t, tl.int64) * rows + row)
        # Saturated tokens take no part, and their exponential may overflow.
        p = tl.exp(tl.where(s >= -before, -float("inf"), (s + a) / temperature))
        ds -= p * (da * inverse_k)
        da = da * count * tl.exp((a - before) / temperature) * inverse_k
        a = before
    tl.store(out_ptr + mine, tl.where(valid, ds, 0.0), mask=mine < n)


def coordinate_descent(
    logits: Tensor, mask: Tensor | None, k: float, n_iters: int, eps: float, eps_init: float, eps_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `optimized.ops.coordinate_descent`."""
    batch, experts, n = logits.shape
    size = logits.element_size()
    s, mask, constants = row_arguments(logits, mask, block_of_row(n, size))
    scores = torch.empty_like(s)
    a = s.new_zeros(n_iters, batch, experts)
    counts = torch.zeros_like(a)
    if s.numel():
        rows, bits = batch * experts, map(double_bits, (eps, eps_init, eps_decay))
        _descent_kernel[(rows,)](
            s,
            mask,
            scores,
            a,
            counts,
            n,
            rows,
            experts,
            double_bits(k),
            n_iters,
            *bits,
            ONE_BLOCK=fits(n, size),
            **constants,
        )
    return scores, a, counts


def coordinate_descent_backward(
    grad: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    scores: Tensor,
    a: Tensor,
    counts: Tensor,
    k: float,
    eps: float,
    eps_init: float,
    eps_decay: float,
) -> Tensor:
    """See `optimized.ops.coordinate_descent_backward`."""
    batch, experts, n = logits.shape
    s, mask, constants = row_arguments(logits, mask, CHUNK)
    out = torch.empty_like(s)
    if s.numel():
        rows, bits = batch * experts, map(double_bits, (eps, eps_init, eps_decay))
        grid = (rows, triton.cdiv(n, constants["BLOCK"]))
        _descent_backward_kernel[grid](
            grad.contiguous(), s, mask, scores.contiguous(), a.contiguous(), counts.contiguous(), out,
            n, rows, experts, double_bits(k), a.shape[0], *bits, **constants,
        )  # fmt: skip
    return out
