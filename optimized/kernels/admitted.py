"""Which columns a memory ever lists: those that are admitted when their own block ends, since none returns.

Lists (B, E, J, K) of ascending columns, of which the new ones of list j are those from j W on, at its end; so which
columns are ever listed, and in which order, is known of each block alone, and how many before it by two searches in
every earlier list. A program per row and block: a lane for a column.

Blind spots: every program looks at the lists of all blocks before its own, J / 2 on average, one lane each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import cdiv, launch, next_power_of_2

LANES = 256  # columns, or lists, looked at at a time


class Admitted(NamedTuple):
    """Of N columns."""

    columns: Tensor  # (B, E, N) int32, ascending; beyond the total anything
    totals: Tensor  # (B, E) int32
    inverse: Tensor  # (B, E, N) int32, the column itself or -1


@triton.jit
def _lesser(list_ptr, column, count, there, STEPS: tl.constexpr):
    """How many of the first `count` of an ascending list are lesser."""
    low = tl.zeros_like(column)
    high = low + count
    for _ in range(STEPS):
        middle = (low + high) // 2
        open_ = there & (low < high)
        lesser = tl.load(list_ptr + middle, mask=open_, other=0) < column
        low = tl.where(lesser & open_, middle + 1, low)
        high = tl.where(lesser, high, middle)
    return low


@triton.jit(do_not_specialize=["n", "k", "block", "lists"])
def _admitted_kernel(
    indices_ptr, counts_ptr, columns_ptr, totals_ptr, inverse_ptr, n, k, block, lists,
    STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, block)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.program_id(0) % blocks
    indices_ptr += row * lists * k
    counts_ptr += row * lists
    columns_ptr += row * n
    inverse_ptr += row * n
    lanes = tl.arange(0, LANES)
    before = tl.full((), 0, tl.int32)
    for begin in range(0, tl.minimum(j, lists), LANES):
        i = begin + lanes
        earlier = i < tl.minimum(j, lists)
        count = tl.load(counts_ptr + i, mask=earlier, other=0)
        old = _lesser(indices_ptr + i.to(tl.int64) * k, i * block, count, earlier, STEPS)
        before += tl.sum(count - old)
    listed = tl.full((), 0, tl.int32)
    if j < lists:
        listed += tl.load(counts_ptr + j)
    indices_ptr += j.to(tl.int64) * k
    first = tl.max(_lesser(indices_ptr, lanes * 0 + j * block, listed, lanes == 0, STEPS))
    for begin in range(0, block, LANES):
        column = j * block + begin + lanes
        there = (begin + lanes < block) & (column < n)
        place = _lesser(indices_ptr, column, listed, there, STEPS)
        found = tl.load(indices_ptr + place, mask=there & (place < listed), other=-1) == column
        tl.store(columns_ptr + before + place - first, column, mask=found)
        tl.store(inverse_ptr + column, tl.where(found, column, -1), mask=there)
    if j == blocks - 1:
        tl.store(totals_ptr + row, before + listed - first)


def admitted(indices: Tensor, counts: Tensor, n: int, block: int) -> Admitted:
    """Of lists of n columns as of `memory`, the first of them of block 1: list j holds columns below (j + 1) block."""
    batch, experts, lists, k = indices.shape
    columns, inverse = (torch.empty(batch, experts, n, dtype=torch.int32, device=indices.device) for _ in range(2))
    make = torch.empty if columns.numel() else torch.zeros  # without columns no program writes them
    totals = make(batch, experts, dtype=torch.int32, device=indices.device)
    if columns.numel():
        launch(
            _admitted_kernel, (batch * experts * cdiv(n, block),),
            indices.contiguous(), counts.contiguous(), columns, totals, inverse, n, k, block, lists,
            STEPS=k.bit_length(), LANES=min(next_power_of_2(max(block, lists)), LANES), num_warps=2,
        )  # fmt: skip
    return Admitted(columns, totals, inverse)
