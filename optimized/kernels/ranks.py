"""The K-th largest of some logits of a row, by keys that are integers with the order of the floats; see `selection`.

The elements of a search are entries of lists of columns, one list after the other, and then columns side by side. So
what earlier searches found can be searched together with what came after it, without a copy.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optimized.kernels.selection import _count
from optimized.kernels.slots import load_keys


@triton.jit
def elements(
    s_ptr, mask_ptr, list_ptr, counts_ptr, offsets, n, width, listed, start, size,
    HAS_MASK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """(keys, columns) of elements `offsets` of `size`: the `listed` entries of lists of `width`, of which counts say
    how many are filled, then the columns from `start` on. Keys as of `selection`; lowest where there is no element.
    """
    columns = start + offsets - listed
    there = offsets < size
    if LISTED:
        in_lists = offsets < listed
        filled = tl.load(counts_ptr + offsets // width, mask=in_lists, other=0)
        columns = tl.where(in_lists, tl.load(list_ptr + offsets, mask=in_lists, other=0), columns)
        there = there & ((offsets >= listed) | (offsets % width < filled))
    key, _, _ = load_keys(s_ptr, mask_ptr, tl.where(there, columns, n), n, HAS_MASK)
    return key, columns


@triton.jit
def counts_of(
    key, first, second, third, s_ptr, mask_ptr, list_ptr, counts_ptr, n, width, listed, start, size,
    HAS_MASK: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """How many elements reach each of three keys. key: those of the first block, which is all with ONE_BLOCK."""
    count_1, count_2, count_3 = _count(key, first, second, third)
    if not ONE_BLOCK:
        for begin in range(BLOCK, size, BLOCK):
            more, _ = elements(
                s_ptr, mask_ptr, list_ptr, counts_ptr, begin + tl.arange(0, BLOCK), n, width, listed, start, size,
                HAS_MASK, LISTED,
            )  # fmt: skip
            more_1, more_2, more_3 = _count(more, first, second, third)
            count_1 += more_1
            count_2 += more_2
            count_3 += more_3
    return count_1, count_2, count_3


@triton.jit
def kth_largest(
    key, k, s_ptr, mask_ptr, list_ptr, counts_ptr, n, width, listed, start, size,
    BITS: tl.constexpr, HAS_MASK: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """(least, found): the K-th largest key or, where exactly k keys reach it, a lesser one; how many reach it.

    Built from the top, two bits at a time, from the lowest key up: flipping a bit adds to it, but for the sign, which
    is set. At least k keys are there.
    """
    key_type: tl.constexpr = key.dtype
    least = (tl.full((), 1, key_type) << (BITS - 1)).to(key_type)
    found = tl.full((), -1, tl.int32)
    shift = tl.full((), BITS - 2, tl.int32)
    while (shift >= 0) & (found != k):
        first = least ^ (tl.full((), 1, key_type) << shift.to(key_type))
        second = least ^ (tl.full((), 2, key_type) << shift.to(key_type))
        third = least ^ (tl.full((), 3, key_type) << shift.to(key_type))
        count_1, count_2, count_3 = counts_of(
            key, first, second, third, s_ptr, mask_ptr, list_ptr, counts_ptr, n, width, listed, start, size,
            HAS_MASK, LISTED, BLOCK, ONE_BLOCK,
        )  # fmt: skip
        found = tl.where(count_3 >= k, count_3, tl.where(count_2 >= k, count_2, tl.where(count_1 >= k, count_1, found)))
        least = tl.where(count_3 >= k, third, tl.where(count_2 >= k, second, tl.where(count_1 >= k, first, least)))
        shift -= 2
    return least, found
