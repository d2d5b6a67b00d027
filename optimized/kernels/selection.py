"""Selection: the K best of N logits per row, in index order, with the inverse map. One program per row.

Order: valid before masked, larger logit, smaller index; NaN below every number. Each logit becomes an integer with the
order of the floats; the K-th largest is built from the top, two bits at a time, decided by three counts over the row,
until exactly K keys reach it. All keys above it are in, and of its equals the first ones. Running counts give every
chosen token its slot: valid tokens first, masked ones after them, each in index order. So the result depends on no
order of execution.

Rows (B, R, N) are those of one or two groups of E = R / groups experts, each group with a K of its own. A row writes
indices (int64), slot mask (bool) and the picked scores to (B, E, K) of its group, and inverse (int32) to (B, E, N): the
slot that holds a token, -1 for none and for masked ones. A row of at most 131072 bytes stays in registers for the
counts; the slots are given chunk by chunk.

Blind spots: one program per row; up to 16 (float64: 32) serial counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import CHUNK, launch
from optimized.kernels.rows import block_of_row, fits, row_arguments


@triton.jit
def _keys(s_ptr, mask_ptr, offsets, n, HAS_MASK: tl.constexpr):
    """(keys, valid, inside). Keys: lowest past the end of the row, + 1 for masked tokens, + 2 for NaN."""
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
        lowest: tl.constexpr = -0x80000000  # type: ignore[no-redef]
        ones: tl.constexpr = 0x7FFFFFFF  # type: ignore[no-redef]
    bits = tl.where(s == 0, 0, bits)  # -0.0 ties with 0.0
    key = tl.where(bits < 0, bits ^ ones, bits)
    key = tl.where(s != s, lowest + 2, key)
    key = tl.where(valid, key, lowest + 1)
    key = tl.where(inside, key, lowest)
    return key, valid, inside


@triton.jit
def _count(key, first, second, third):
    """How many keys reach each of three: a block has less than 2^21, so one sum of int64 holds all of them."""
    packed = (key >= first).to(tl.int64) + ((key >= second).to(tl.int64) << 21) + ((key >= third).to(tl.int64) << 42)
    total = tl.sum(packed)
    low = (1 << 21) - 1
    return (total & low).to(tl.int32), ((total >> 21) & low).to(tl.int32), (total >> 42).to(tl.int32)


@triton.jit(do_not_specialize=["n", "k_0", "k_1", "experts", "group"])
def _select_kernel(
    s_ptr, mask_ptr, scores_ptr, indices_0, slots_0, inverse_0, picked_0, indices_1, slots_1, inverse_1, picked_1,
    n, k_0, k_1, experts, group,
    BITS: tl.constexpr, UNIT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SCORES: tl.constexpr, BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr, SLOT_BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK keys are counted at a time, SLOT_BLOCK get their slots. group: rows of one item and one group."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // experts
    expert = row % experts
    s_ptr += row * n
    scores_ptr += row * n
    if HAS_MASK:
        mask_ptr += batch * n
    k = k_0
    if expert >= group:
        k = k_1
        indices_0 = indices_1
        slots_0 = slots_1
        inverse_0 = inverse_1
        picked_0 = picked_1
    place = batch * group + expert % group
    indices_0 += place * k
    slots_0 += place * k
    inverse_0 += place * n
    picked_0 += place * k

    lanes = tl.arange(0, BLOCK)
    key, valid, _ = _keys(s_ptr, mask_ptr, lanes, n, HAS_MASK)
    key_type: tl.constexpr = key.dtype
    lowest = (tl.full((), 1, key_type) << (BITS - 1)).to(key_type)
    valid_tokens = tl.sum(valid.to(tl.int32))
    poisoned = tl.max((key == lowest + 2).to(tl.int32))
    if not ONE_BLOCK:
        for start in range(BLOCK, n, BLOCK):
            key, valid, _ = _keys(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
            valid_tokens += tl.sum(valid.to(tl.int32))
            poisoned = tl.maximum(poisoned, tl.max((key == lowest + 2).to(tl.int32)))

    # The K-th largest key, from the lowest one up. Flipping its bits adds to it: of these only the sign was set.
    least = lowest
    found = tl.full((), -1, tl.int32)  # keys that reach it
    above = tl.full((), 0, tl.int32)  # keys known to lie above it
    shift = tl.full((), BITS - 2, tl.int32)
    while (shift >= 0) & (found != k):
        first = least ^ (tl.full((), 1, key_type) << shift.to(key_type))
        second = least ^ (tl.full((), 2, key_type) << shift.to(key_type))
        third = least ^ (tl.full((), 3, key_type) << shift.to(key_type))
        if ONE_BLOCK:
            count_1, count_2, count_3 = _count(key, first, second, third)
        else:
            count_1 = tl.full((), 0, tl.int32)
            count_2 = tl.full((), 0, tl.int32)
            count_3 = tl.full((), 0, tl.int32)
            for start in range(0, n, BLOCK):
                key, _, _ = _keys(s_ptr, mask_ptr, start + lanes, n, HAS_MASK)
                more_1, more_2, more_3 = _count(key, first, second, third)
                count_1 += more_1
                count_2 += more_2
                count_3 += more_3
        above = tl.where(count_3 >= k, above, tl.where(count_2 >= k, count_3, tl.where(count_1 >= k, count_2, count_1)))
        found = tl.where(count_3 >= k, count_3, tl.where(count_2 >= k, count_2, tl.where(count_1 >= k, count_1, found)))
        least = tl.where(count_3 >= k, third, tl.where(count_2 >= k, second, tl.where(count_1 >= k, first, least)))
        shift -= 2

    room = k - above
    first_masked = tl.minimum(valid_tokens, k)
    seen_equal = tl.full((), 0, tl.int32)
    seen_valid = tl.full((), 0, tl.int32)
    seen_masked = tl.full((), 0, tl.int32)
    for start in range(0, n, SLOT_BLOCK):
        offsets = start + tl.arange(0, SLOT_BLOCK)
        keys, shown, there = _keys(s_ptr, mask_ptr, offsets, n, HAS_MASK)
        chosen = keys >= least
        if found > k:  # otherwise all equals fit
            equal = (keys == least).to(tl.int32)
            chosen = (keys > least) | ((equal > 0) & (seen_equal + tl.cumsum(equal) <= room))
            seen_equal += tl.sum(equal)
        # One running count of both: of shown tokens in the lower 16 bits, of masked ones in the upper.
        one = tl.where(chosen, tl.where(shown, 1, 1 << 16), 0)
        counts = tl.cumsum(one)
        slot = tl.where(shown, seen_valid + (counts & 0xFFFF), first_masked + seen_masked + (counts >> 16)) - 1
        tl.store(indices_0 + slot, offsets.to(tl.int64), mask=chosen)
        tl.store(slots_0 + slot, shown.to(tl.int8), mask=chosen)
        tl.store(inverse_0 + offsets, tl.where(chosen & shown, slot, -1), mask=there)
        if UNIT or HAS_SCORES:
            picked = shown.to(picked_0.dtype.element_ty)
            if not UNIT:
                picked = tl.load(scores_ptr + offsets, mask=chosen & shown, other=0.0)
            tl.store(picked_0 + slot, tl.where(poisoned > 0, float("nan"), picked), mask=chosen)
        total = tl.sum(one)
        seen_valid += total & 0xFFFF
        seen_masked += total >> 16


def select_groups(
    logits: Tensor, mask: Tensor | None, ks: tuple[int, ...], scores: Tensor | None, unit: bool = False
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], ...]:
    """Indices, slot mask, inverse map and picked scores of one or two groups of experts.

    logits, scores: (B, R, N), the experts of the groups one after the other; ks: K of each group. Picked scores are 0
    in a masked slot, and NaN in all slots of a row with a NaN logit at a valid token. unit: they are 1 where they would
    be a number. Without scores and unit they are empty.
    """
    batch, experts, n = logits.shape
    size, group = logits.element_size(), experts // len(ks)
    s, mask, constants = row_arguments(logits, mask, block_of_row(n, size), most_warps=8)
    groups = []
    for k in ks:
        indices = torch.empty(batch, group, k, dtype=torch.int64, device=s.device)
        slots = torch.empty(batch, group, k, dtype=torch.bool, device=s.device)
        inverse = torch.empty(batch, group, n, dtype=torch.int32, device=s.device)
        picked = s.new_empty(batch, group, k if unit or scores is not None else 0)
        groups.append((indices, slots, inverse, picked))
    if s.numel():
        launch(
            _select_kernel, (batch * experts,),
            s, mask, s if scores is None else scores.contiguous(), *groups[0], *groups[-1],
            n, ks[0], ks[-1], experts, group,
            BITS=8 * size, UNIT=unit, HAS_SCORES=scores is not None, ONE_BLOCK=fits(n, size),
            SLOT_BLOCK=min(constants["BLOCK"], CHUNK), **constants,
        )  # fmt: skip
    return tuple(groups)


def select(logits: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, slot mask, and inverse map; see `optimized.ops.select`."""
    return select_groups(logits, mask, (k,), None)[0][:3]
