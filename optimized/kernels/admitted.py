"""Which columns a memory ever lists: those that are admitted when their own block ends, since none returns.

Lists (B, E, J, K) of ascending columns, of which all of list 0 are new, below `prior`, and of list j those from
prior + (j - 1) W on, at its end; so which columns are ever listed, and in which order, is known of each block alone,
and how many before it by two searches in every earlier list. A program per row and block: a lane for a column.

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


@triton.jit
def _first_new(j, prior, block):
    """The column from which on those of list j are new."""
    return tl.where(j == 0, 0, prior + (j - 1) * block)


@triton.jit(do_not_specialize=["n", "k", "prior", "block", "lists"])
def _admitted_kernel(
    indices_ptr, counts_ptr, columns_ptr, totals_ptr, inverse_ptr, n, k, prior, block, lists,
    STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    blocks = 1 + tl.cdiv(tl.maximum(n - prior, 0), block)
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
        old = _lesser(indices_ptr + i.to(tl.int64) * k, _first_new(i, prior, block), count, earlier, STEPS)
        before += tl.sum(count - old)
    listed = tl.full((), 0, tl.int32)
    if j < lists:
        listed += tl.load(counts_ptr + j)
    indices_ptr += j.to(tl.int64) * k
    start = _first_new(j, prior, block)
    end = tl.minimum(prior + j * block, n)
    first = tl.max(_lesser(indices_ptr, lanes * 0 + start, listed, lanes == 0, STEPS))
    for begin in range(start, end, LANES):
        column = begin + lanes
        there = column < end
        place = _lesser(indices_ptr, column, listed, there, STEPS)
        found = tl.load(indices_ptr + place, mask=there & (place < listed), other=-1) == column
        tl.store(columns_ptr + before + place - first, column, mask=found)
        tl.store(inverse_ptr + column, tl.where(found, column, -1), mask=there)
    if j == blocks - 1:
        tl.store(totals_ptr + row, before + listed - first)


def admitted(indices: Tensor, counts: Tensor, n: int, block: int, prior: int) -> Admitted:
    """Of lists of n columns as of `memory`: list j holds columns below prior + j block."""
    batch, experts, lists, k = indices.shape
    columns, inverse = (torch.empty(batch, experts, n, dtype=torch.int32, device=indices.device) for _ in range(2))
    make = torch.empty if columns.numel() else torch.zeros  # without columns no program writes them
    totals = make(batch, experts, dtype=torch.int32, device=indices.device)
    if columns.numel():
        launch(
            _admitted_kernel, (batch * experts * (1 + cdiv(max(n - prior, 0), block)),),
            indices.contiguous(), counts.contiguous(), columns, totals, inverse, n, k, prior, block, lists,
            STEPS=k.bit_length(), LANES=min(next_power_of_2(max(prior, block, lists)), LANES), num_warps=2,
        )  # fmt: skip
    return Admitted(columns, totals, inverse)
