"""What both forms of selection share: keys with the order of the logits, the slots of a block, and the results' memory.

Order: valid before masked, larger logit, smaller index; NaN below every number. A threshold is a key: all keys above it
are in, and the first `room` of its equals. Where none but masked tokens are left to be taken, the threshold is their
key. So the keys above a threshold are those of valid tokens, and a chosen token's slot is a count: of what is chosen
before it, and for a masked token of all valid ones besides.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Group = tuple[Tensor, Tensor, Tensor, Tensor]  # indices, slots, inverse, picked


@triton.jit
def load_keys(s_ptr, mask_ptr, offsets, n, HAS_MASK: tl.constexpr):
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
def lowest_key(KEY: tl.constexpr, BITS: tl.constexpr):
    return (tl.full((), 1, KEY) << (BITS - 1)).to(KEY)


@triton.jit
def of_group(indices_0, slots_0, inverse_0, picked_0, indices_1, slots_1, inverse_1, picked_1,
             row, experts, group, n, k_0, k_1):  # fmt: skip
    """K of a row, and where its results begin."""
    expert = row % experts
    k = k_0
    if expert >= group:
        k = k_1
        indices_0 = indices_1
        slots_0 = slots_1
        inverse_0 = inverse_1
        picked_0 = picked_1
    place = row // experts * group + expert % group
    return k, indices_0 + place * k, slots_0 + place * k, inverse_0 + place * n, picked_0 + place * k


@triton.jit
def place(
    s_ptr, mask_ptr, scores_ptr, indices_ptr, slots_ptr, inverse_ptr, picked_ptr,
    offsets, n, k, threshold, room, above, equal, lowest, poisoned,
    UNIT: tl.constexpr, SIGMOID: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SCORES: tl.constexpr,
):  # fmt: skip
    """Writes what is chosen of a block of at most 2^14 tokens. above, equal: keys before it, returned with its own.

    SIGMOID: the scores are those of s, which a NaN elsewhere in the row does not poison.
    """
    key, valid, inside = load_keys(s_ptr, mask_ptr, offsets, n, HAS_MASK)
    larger = key > threshold
    # One running count of both: of larger keys in the lower 16 bits, of equal ones in the upper.
    one = larger.to(tl.int32) + ((key == threshold).to(tl.int32) << 16)
    counts = tl.cumsum(one)
    over = above + (counts & 0xFFFF)
    same = equal + (counts >> 16)
    chosen = larger | ((key == threshold) & (same <= room))
    # Masked tokens come after all valid ones, of which there are k - room.
    between = tl.where(threshold == lowest + 1, 0, tl.minimum(same, room))
    slot = tl.where(chosen & ~valid, k - room + same, over + between) - 1
    tl.store(indices_ptr + slot, offsets.to(tl.int64), mask=chosen)
    tl.store(slots_ptr + slot, valid.to(tl.int8), mask=chosen)
    tl.store(inverse_ptr + offsets, tl.where(chosen & valid, slot, -1), mask=inside)
    if SIGMOID:
        soft = tl.sigmoid(tl.load(s_ptr + offsets, mask=chosen & valid, other=0.0))
        if UNIT:
            soft = tl.where(soft == soft, 1.0, soft)
        tl.store(picked_ptr + slot, tl.where(valid, soft, 0.0), mask=chosen)
    elif UNIT or HAS_SCORES:
        picked = valid.to(picked_ptr.dtype.element_ty)
        if not UNIT:
            picked = tl.load(scores_ptr + offsets, mask=chosen & valid, other=0.0)
        tl.store(picked_ptr + slot, tl.where(poisoned > 0, float("nan"), picked), mask=chosen)
    total = tl.sum(one)
    return above + (total & 0xFFFF), equal + (total >> 16)


def new_groups(s: Tensor, ks: tuple[int, ...], scored: bool) -> list[Group]:
    """Memory for the results of rows (B, R, N), R / groups of them with each K; scored: for picked scores too."""
    batch, experts, n = s.shape
    group, device, groups = experts // len(ks), s.device, []
    for k in ks:
        indices = torch.empty(batch, group, k, dtype=torch.int64, device=device)
        slots = torch.empty(batch, group, k, dtype=torch.bool, device=device)
        inverse = torch.empty(batch, group, n, dtype=torch.int32, device=device)
        groups.append((indices, slots, inverse, s.new_empty(batch, group, k if scored else 0)))
    return groups


def pointers(groups: list[Group]) -> list[Any]:
    """Of the first and of the last group, as `of_group` takes them."""
    return [t for indices, slots, *rest in (groups[0], groups[-1]) for t in (indices, slots.view(torch.int8), *rest)]
