"""Selection: the K best of N logits per row, in index order, with the inverse map. One program per row.

Order: valid before masked, larger logit, smaller index; NaN below every number. Each logit becomes an unsigned integer
with the order of the floats; the K-th largest is built bit by bit from the top, each bit decided by one count over the
row. All keys above it are in, and of its equals the first ones. Running counts give every chosen token its slot: valid
tokens first, masked ones after them, each in index order. So the result depends on no order of execution.

Writes indices (int64) and slot mask (bool) of (B, E, K), and inverse (int32) of (B, E, N): the slot that holds a
token, -1 for none and for masked ones. A row of at most 8192 logits is read once.

Blind spots: one program per row; 32 (float64: 64) serial counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import CHUNK
from optimized.kernels.rows import row_arguments


@triton.jit
def _keys(s_ptr, mask_ptr, offsets, n, HAS_MASK: tl.constexpr):
    """(keys, valid, inside). Keys are at least 1 inside the row (1: masked, 2: NaN), 0 past its end."""
    inside = offsets < n
    valid = inside
    if HAS_MASK:
        valid = tl.load(mask_ptr + offsets, mask=inside, other=0) != 0
    s = tl.load(s_ptr + offsets, mask=valid, other=0.0)
    if s.dtype == tl.float64:
        bits = s.to(tl.int64, bitcast=True)
        lowest: tl.constexpr = -0x8000000000000000
        ones: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    else:
        bits = s.to(tl.int32, bitcast=True)
        lowest: tl.constexpr = -0x80000000
        ones: tl.constexpr = 0x7FFFFFFF
    bits = tl.where(s == 0, 0, bits)  # -0.0 ties with 0.0
    key = tl.where(bits < 0, bits ^ ones, bits)
    key = tl.where(s != s, lowest + 2, key)
    key = tl.where(valid, key, lowest + 1)
    key = tl.where(inside, key, lowest)
    return key, valid, inside


@triton.jit(do_not_specialize=["n", "k", "experts"])
def _select_kernel(
    s_ptr, mask_ptr, indices_ptr, slots_ptr, inverse_ptr, n, k, experts,
    BITS: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * n
    inverse_ptr += row * n
    indices_ptr += row * k
    slots_ptr += row * k
    if HAS_MASK:
        mask_ptr += row // experts * n
    lanes = tl.arange(0, BLOCK)
    key, valid, inside = _keys(s_ptr, mask_ptr, lanes, n, HAS_MASK)
    key_type: tl.constexpr = key.dtype

    # The K-th largest key. Signed order: the top bit set means smaller, so it is decided first, the other way round.
    least = tl.full((), 0, key_type)
    if ONE_BLOCK:
        count = tl.sum((key >= 0).to(tl.int32))
    else:
        count = tl.full((), 0, tl.int32)
        for start in range(0, n, BLOCK):
            key, valid, inside = _keys(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
            count += tl.sum((key >= 0).to(tl.int32))
    lowest = (tl.full((), 1, key_type) << (BITS - 1)).to(key_type)
    least = tl.where(count >= k, least, lowest)
    for back in range(1, BITS):
        trial = least | (tl.full((), 1, key_type) << (BITS - 1 - back))
        if ONE_BLOCK:
            count = tl.sum((key >= trial).to(tl.int32))
        else:
            count = tl.full((), 0, tl.int32)
            for start in range(0, n, BLOCK):
                key, valid, inside = _keys(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
                count += tl.sum((key >= trial).to(tl.int32))
        least = tl.where(count >= k, trial, least)

    # How many equals fit, and how many valid tokens come before the masked ones.
    above = tl.full((), 0, tl.int32)
    equal_valid = tl.full((), 0, tl.int32)
    above_valid = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        if not ONE_BLOCK:
            key, valid, inside = _keys(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
        above += tl.sum((key > least).to(tl.int32))
        above_valid += tl.sum(((key > least) & valid).to(tl.int32))
        equal_valid += tl.sum(((key == least) & valid).to(tl.int32))
    room = k - above
    # Keys of masked tokens are all the same: either all equals are valid or none is.
    first_masked = above_valid + tl.minimum(equal_valid, room)

    seen_equal = tl.full((), 0, tl.int32)
    seen_valid = tl.full((), 0, tl.int32)
    seen_masked = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        if not ONE_BLOCK:
            key, valid, inside = _keys(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
        equal = ((key == least) & inside).to(tl.int32)
        chosen = (key > least) | ((equal > 0) & (seen_equal + tl.cumsum(equal) <= room))
        chosen_valid = (chosen & valid).to(tl.int32)
        chosen_masked = (chosen & ~valid).to(tl.int32)
        slot = tl.where(
            valid, seen_valid + tl.cumsum(chosen_valid), first_masked + seen_masked + tl.cumsum(chosen_masked)
        )
        slot -= 1
        tl.store(indices_ptr + slot, (start + lanes).to(tl.int64), mask=chosen)
        tl.store(slots_ptr + slot, valid.to(tl.int8), mask=chosen)
        tl.store(inverse_ptr + start + lanes, tl.where(chosen_valid > 0, slot, -1), mask=inside)
        seen_equal += tl.sum(equal)
        seen_valid += tl.sum(chosen_valid)
        seen_masked += tl.sum(chosen_masked)


def select(logits: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, slot mask, and inverse map; see `optimized.ops.select`."""
    batch, experts, n = logits.shape
    size = logits.element_size()
    s, mask, constants = row_arguments(logits, mask, CHUNK)
    constants["num_warps"] *= 2  # the running counts take more registers than the solvers
    indices = torch.empty(batch, experts, k, dtype=torch.int64, device=s.device)
    slots = torch.empty(batch, experts, k, dtype=torch.bool, device=s.device)
    inverse = torch.empty(batch, experts, n, dtype=torch.int32, device=s.device)
    if s.numel():
        _select_kernel[(batch * experts,)](
            s, mask, indices, slots.view(torch.int8), inverse, n, k, experts,
            BITS=8 * size, ONE_BLOCK=n <= CHUNK, **constants,
        )  # fmt: skip
    return indices, slots, inverse
