"""Selection: the K best of N logits per row, in index order, with the inverse map. One program per row.

Each logit becomes an integer with the order of the floats (see `slots`); the K-th largest is built from the top, two
bits at a time, decided by three counts over the row, until exactly K keys reach it. All keys above it are in, and of
its equals the first ones. Running counts give every chosen token its slot: valid tokens first, masked ones after them,
each in index order. So the result depends on no order of execution.

Rows (B, R, N) are those of one or two groups of E = R / groups experts, each group with a K of its own. A row writes
indices (int64), slot mask (bool) and the picked scores to (B, E, K) of its group, and inverse (int32) to (B, E, N): the
slot that holds a token, -1 for none and for masked ones. A row stays in registers for the counts; the slots are given
chunk by chunk. Rows longer than `ALONE` are `long_selection`'s, which gives the same.

Blind spots: up to 16 (float64: 32) serial counts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels import long_selection
from optimized.kernels.launch import CHUNK, launch
from optimized.kernels.rows import row_arguments
from optimized.kernels.slots import Group, load_keys, lowest_key, new_groups, of_group, place, pointers

ALONE = 65536  # bytes of a row for one program: 64 float32 in each of 256 threads


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
    BITS: tl.constexpr, UNIT: tl.constexpr, SIGMOID: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SCORES: tl.constexpr,
    BLOCK: tl.constexpr, SLOT_BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK keys, all of the row, are counted; SLOT_BLOCK at a time get their slots."""
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * n
    scores_ptr += row * n
    if HAS_MASK:
        mask_ptr += row // experts * n
    k, indices_ptr, slots_ptr, inverse_ptr, picked_ptr = of_group(
        indices_0, slots_0, inverse_0, picked_0, indices_1, slots_1, inverse_1, picked_1,
        row, experts, group, n, k_0, k_1,
    )  # fmt: skip

    key, _, _ = load_keys(s_ptr, mask_ptr, tl.arange(0, BLOCK), n, HAS_MASK)
    key_type: tl.constexpr = key.dtype
    lowest = lowest_key(key_type, BITS)
    poisoned = tl.max((key == lowest + 2).to(tl.int32))

    # The K-th largest key, from the lowest one up. Flipping its bits adds to it: of these only the sign was set.
    least = lowest
    found = tl.full((), -1, tl.int32)  # keys that reach it
    above = tl.full((), 0, tl.int32)  # keys known to lie above it
    shift = tl.full((), BITS - 2, tl.int32)
    while (shift >= 0) & (found != k):
        first = least ^ (tl.full((), 1, key_type) << shift.to(key_type))
        second = least ^ (tl.full((), 2, key_type) << shift.to(key_type))
        third = least ^ (tl.full((), 3, key_type) << shift.to(key_type))
        count_1, count_2, count_3 = _count(key, first, second, third)
        above = tl.where(count_3 >= k, above, tl.where(count_2 >= k, count_3, tl.where(count_1 >= k, count_2, count_1)))
        found = tl.where(count_3 >= k, count_3, tl.where(count_2 >= k, count_2, tl.where(count_1 >= k, count_1, found)))
        least = tl.where(count_3 >= k, third, tl.where(count_2 >= k, second, tl.where(count_1 >= k, first, least)))
        shift -= 2

    # All that reach it are in, or some of its equals: of masked tokens always, since these have other slots.
    all_in = (found == k) & (least > lowest + 1)
    threshold = tl.where(all_in, least - 1, least)
    room = tl.where(all_in, 0, k - above)
    larger = tl.full((), 0, tl.int32)
    equal = tl.full((), 0, tl.int32)
    for start in range(0, n, SLOT_BLOCK):
        larger, equal = place(
            s_ptr, mask_ptr, scores_ptr, indices_ptr, slots_ptr, inverse_ptr, picked_ptr,
            start + tl.arange(0, SLOT_BLOCK), n, k, threshold, room, larger, equal, lowest, poisoned,
            UNIT, SIGMOID, HAS_MASK, HAS_SCORES,
        )  # fmt: skip


def select_groups(
    logits: Tensor,
    mask: Tensor | None,
    ks: tuple[int, ...],
    scores: Tensor | None,
    unit: bool = False,
    sigmoid: bool = False,
) -> tuple[Group, ...]:
    """Indices, slot mask, inverse map and picked scores of one or two groups of experts.

    logits, scores: (B, R, N), the experts of the groups one after the other; ks: K of each group. Picked scores are 0
    in a masked slot, and NaN in all slots of a row with a NaN logit at a valid token. sigmoid: in place of scores that
    are given, those of the picked logits, each with its own NaN alone. unit: they are 1 where they would be a number.
    Without any of the three they are empty.
    """
    batch, experts, n = logits.shape
    size = logits.element_size()
    if n * size > ALONE:
        return long_selection.select_long(logits, mask, ks, scores, unit, sigmoid)
    s, mask, constants = row_arguments(logits, mask, ALONE // size, most_warps=8)
    groups = new_groups(s, ks, unit or sigmoid or scores is not None)
    if s.numel():
        launch(
            _select_kernel, (batch * experts,),
            s, mask, s if scores is None else scores.contiguous(), *pointers(groups),
            n, ks[0], ks[-1], experts, experts // len(ks),
            BITS=8 * size, UNIT=unit, SIGMOID=sigmoid, HAS_SCORES=scores is not None,
            SLOT_BLOCK=min(constants["BLOCK"], CHUNK), **constants,
        )  # fmt: skip
    return tuple(groups)


def select(logits: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, slot mask, and inverse map; see `optimized.ops.select`."""
    return select_groups(logits, mask, (k,), None)[0][:3]
