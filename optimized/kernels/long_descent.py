"""Coordinate descent of long rows by many programs each, a launch for each step: see `coordinate_descent`.

Programs (row, chunk); a row has at most `CHUNKS` chunks. Launch 0 finds the largest logit of each chunk, its valid
tokens, and whether it holds a NaN. Launch t = 1 .. T-1 begins with the sums of what the launch before left of each
chunk, by every program of a row alike and in the same order, so all have the same a_{t-1}, and the first one writes it.
Then each leaves the two sums of step t over its chunk. The last launch does the same with a_{T-1} and writes scores.
What a launch reads of the chunks lies apart from what it writes: sums of even and of odd steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import cdiv, double_bits, from_bits, launch
from optimized.kernels.rows import load_row, mass_arguments, mass_of_row, part_length, row_arguments, sum_both

BLOCK = 4096  # logits of a chunk at a time
CHUNKS = 32  # of a row, at most
WARPS = 8
UNSPECIALIZED = [
    *("n", "rows", "experts", "group", "length", "t"),
    *("mass_0_bits", "mass_1_bits", "earlier_bits", "now_bits"),
]


@triton.jit
def _iterate(a_ptr, counts_ptr, tops_ptr, sums_ptr, tallies_ptr, row, rows, t, log_k, temperature, DTYPE: tl.constexpr,
             CHUNKS: tl.constexpr):  # fmt: skip
    """a_t, which the first chunk's program writes with its count, from what the chunks left; and the row's largest."""
    chunk = tl.program_id(1)
    each = tl.arange(0, CHUNKS)
    known = each < tl.num_programs(1)
    left = (t % 2 * rows + row) * CHUNKS + each
    top = tl.max(tl.load(tops_ptr + row * CHUNKS + each, mask=known, other=-float("inf")))
    tallies = tl.load(tallies_ptr + left, mask=known, other=0)
    tally = tl.sum(tallies)
    if t == 0:
        # u = 0 at every valid token. A row without any takes a = 0: all its weights are exp(-inf).
        a = tl.where(tally > 0, temperature * (log_k - tl.log(tally.to(DTYPE))), 0.0)
        a = tl.where(tl.min(tallies) < 0, float("nan"), a)
        tally = tl.full((), 0, tl.int32)
    else:
        earlier = tl.load(a_ptr + tl.cast(t - 1, tl.int64) * rows + row)
        total = tl.sum(tl.load(sums_ptr + left, mask=known, other=0.0))
        a = tl.where(total > 0, temperature * (log_k - tl.log(total)) - _peak(top, -earlier), 0.0)
        a = tl.where(earlier != earlier, earlier, a)
    at = tl.cast(t, tl.int64) * rows + row
    tl.store(a_ptr + at, a, mask=chunk == 0)
    tl.store(counts_ptr + at, tally.to(DTYPE), mask=chunk == 0)
    return a, top


@triton.jit
def _peak(top, bound):
    """The largest of min(s, bound), or 0 where there is no token."""
    peak = tl.minimum(top, bound)
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=["mask_ptr"])
def _descent_step_kernel(
    s_ptr, mask_ptr, scores_ptr, a_ptr, counts_ptr, tops_ptr, sums_ptr, tallies_ptr,
    n, rows, experts, group, mass_0_bits, mass_1_bits, t, earlier_bits, now_bits, length,
    FIRST: tl.constexpr, LAST: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Step t; the temperatures of the step before and of this one, and of this one where it writes the scores."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    s_ptr += row * n
    scores_ptr += row * n
    if HAS_MASK:
        mask_ptr += row // experts * n
    dtype: tl.constexpr = s_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    first = chunk * length
    end = tl.minimum(first + length, n)
    mine = row * CHUNKS + chunk
    turn = t % 2 * rows * CHUNKS
    if FIRST:
        top = tl.full((), -float("inf"), dtype)
        found = tl.full((), 0, tl.int32)
        poisoned = tl.full((), 0, tl.int32)
        for start in range(first, end, BLOCK):
            s, valid = load_row(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
            top = tl.maximum(top, tl.max(s))
            poisoned = tl.maximum(poisoned, tl.max((s != s).to(tl.int32)))
            found += tl.sum(valid.to(tl.int32))
        tl.store(tops_ptr + mine, top)
        tl.store(tallies_ptr + mine, tl.where(poisoned > 0, -1, found))
    else:
        log_k = tl.log(mass_of_row(row, experts, group, mass_0_bits, mass_1_bits)).to(dtype)
        a, top = _iterate(
            a_ptr, counts_ptr, tops_ptr, sums_ptr, tallies_ptr, row, rows, t - 1, log_k,
            from_bits(earlier_bits).to(dtype), dtype, CHUNKS,
        )  # fmt: skip
        rate = 1.0 / from_bits(now_bits).to(dtype)
        bound = -a
        peak = _peak(top, bound)
        totals = tl.zeros((BLOCK,), dtype)
        counts = tl.zeros((BLOCK,), tl.int32)
        for start in range(first, end, BLOCK):
            s, valid = load_row(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
            if LAST:
                scores = tl.exp(tl.minimum(s + a, 0.0) * rate)
                scores = tl.where(a != a, a, scores)
                tl.store(scores_ptr + start + lanes, tl.where(valid, scores, 0.0), mask=start + lanes < n)
            else:
                totals += tl.exp((tl.minimum(s, bound) - peak) * rate)
                counts += (s >= bound).to(tl.int32)
        if not LAST:
            total, count = sum_both(totals, counts)
            tl.store(sums_ptr + turn + mine, total)
            tl.store(tallies_ptr + turn + mine, count)


def descend_long(
    logits: Tensor, mask: Tensor | None, k: float | tuple[float, ...], n_iters: int, temperatures: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `coordinate_descent.coordinate_descent`; temperatures: of the T steps, and of the scores."""
    batch, experts, n = logits.shape
    s, mask, _ = row_arguments(logits, mask, BLOCK)
    scores, rows = torch.empty_like(s), batch * experts
    make = s.new_empty if s.numel() else s.new_zeros  # without tokens no program writes
    a, counts = (make(n_iters, batch, experts) for _ in range(2))
    if s.numel():
        length = part_length(n, BLOCK, CHUNKS)
        tops, sums = s.new_empty(rows, CHUNKS), s.new_empty(2, rows, CHUNKS)
        tallies = torch.empty(2, rows, CHUNKS, dtype=torch.int32, device=s.device)
        bits = [double_bits(temperature) for temperature in temperatures]
        fixed = n, rows, experts, *mass_arguments(experts, k)
        for t in range(n_iters + 1):
            launch(
                _descent_step_kernel, (rows, cdiv(n, length)),
                s, mask, scores, a, counts, tops, sums, tallies, *fixed, t, bits[t - 1], bits[t], length,
                FIRST=t == 0, LAST=t == n_iters, HAS_MASK=mask is not None, BLOCK=BLOCK, CHUNKS=CHUNKS,
                num_warps=WARPS,
            )  # fmt: skip
    return scores, a, counts
