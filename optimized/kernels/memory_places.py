"""Places of memory: a place for every column, kept from the block in which it is first remembered to the last one.

indices (B, E, J, K) list what a block remembers in ascending order, so that a column moves down as others before it are
dropped. For a sum over the blocks that see a column it had better stay where it is: then a program that holds some
places goes through the blocks, and writes a sum when another column takes its place. Every column is written once, in
whatever order programs run; no tile holds places that nobody uses. A tile of 64 columns as they come is in use until
the last of them is dropped: of 8,192 (131,072) columns in random order and K 512, 7.6 (45) times as many tiles would
be passed through, of those ever remembered 2.6 (4.4), of these sorted by their last block 1.4 (1.6).

A column that is new in a block is the heir of one that was dropped there, the first of the first, or takes the next
place that was never taken; so whose place it has is known from two lists alone, for all blocks at once. A slot's place
is then that of the eldest of its line: each walks up its own. Of random columns a line is ln(N / K) long, and at worst
as long as there are blocks.

Blind spots: lists are of `memory`: their lengths never fall, and no column returns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.admitted import _lesser
from optimized.kernels.launch import cdiv, launch, next_power_of_2

LANES = 1024  # slots of a program that walks


@triton.jit
def _missing(list_ptr, count, other_ptr, others, LANES: tl.constexpr, STEPS: tl.constexpr):
    """The columns of a list, which of them another list lacks, and how many of these come before."""
    at = tl.arange(0, LANES)
    there = at < count
    columns = tl.load(list_ptr + at, mask=there, other=0)
    place = _lesser(other_ptr, columns, others, there, STEPS)
    both = tl.load(other_ptr + place, mask=there & (place < others), other=-1) == columns
    missing = there & (both == 0)
    return columns, missing, tl.cumsum(missing.to(tl.int32)) - missing.to(tl.int32)


@triton.jit(do_not_specialize=["k", "blocks"])
def _dropped_kernel(
    indices_ptr, counts_ptr, dropped_ptr, k, blocks, LANES: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """Program: row, block but the last. The columns that the next block no longer lists, at the front."""
    place = tl.program_id(0).to(tl.int64) // (blocks - 1) * blocks + tl.program_id(0) % (blocks - 1)
    count, more = tl.load(counts_ptr + place), tl.load(counts_ptr + place + 1)
    indices_ptr += place * k
    columns, missing, rank = _missing(indices_ptr, count, indices_ptr + k, more, LANES, STEPS)
    tl.store(dropped_ptr + place * k + rank, columns, mask=missing)


@triton.jit(do_not_specialize=["n", "k", "blocks"])
def _heirs_kernel(
    indices_ptr, counts_ptr, dropped_ptr, born_ptr, heir_ptr, n, k, blocks, LANES: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """Program: row, block. Of its new columns, by column: the block, and whose heir it is, or -1 - place for nobody's.

    From the last block on: the interpreter runs programs in order, and later ones would mend what is missed.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    j = blocks - 1 - tl.program_id(0) % blocks
    place = row * blocks + j
    count, before = tl.load(counts_ptr + place), tl.full((), 0, tl.int32)
    if j > 0:
        before += tl.load(counts_ptr + place - 1)
    indices_ptr += place * k
    columns, new, rank = _missing(indices_ptr, count, indices_ptr - k, before, LANES, STEPS)
    dropped = before - count + tl.sum(new.to(tl.int32))
    heir = tl.load(dropped_ptr + (place - 1) * k + rank, mask=new & (rank < dropped), other=0)
    heir = tl.where(rank < dropped, heir, -1 - (before + rank - dropped))
    tl.store(born_ptr + row * n + columns, j, mask=new)
    tl.store(heir_ptr + row * n + columns, heir, mask=new)


@triton.jit(do_not_specialize=["n", "k", "blocks", "span"])
def _places_kernel(
    indices_ptr, counts_ptr, born_ptr, heir_ptr, places_ptr, n, k, blocks, span,
    LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program: row, block, chunk of its list."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.program_id(0) % blocks
    first = j // span * span
    here, there = row * blocks + j, row * blocks + first
    count, before = tl.load(counts_ptr + here), tl.load(counts_ptr + there)
    born_ptr += row * n
    heir_ptr += row * n
    places_ptr += here * k
    at = tl.program_id(1) * LANES + tl.arange(0, LANES)
    columns = tl.load(indices_ptr + here * k + at, mask=at < count, other=0)
    line = columns
    place = tl.full((LANES,), -1, tl.int32)
    climbs = (at < count).to(tl.int32)
    left = j - first  # a line has no more: whatever the lists are, it ends
    while (tl.max(climbs) > 0) & (left >= 0):
        born = tl.load(born_ptr + line, mask=climbs > 0, other=0)
        heir = tl.load(heir_ptr + line, mask=climbs > 0, other=0)
        climbs = tl.where(born > first, climbs, 0)  # those that the first block lists keep the place they have there
        place = tl.where((climbs > 0) & (heir < 0), -1 - heir, place)
        climbs = tl.where(heir < 0, 0, climbs)
        line = tl.where(climbs > 0, heir, line)
        left -= 1
    eldest = (at < count) & (place < 0)
    listed = _lesser(indices_ptr + there * k, line, before, eldest, STEPS)
    place = tl.where(eldest, listed, place)
    tl.store(places_ptr + place, columns, mask=at < count)
    tl.store(places_ptr + at, -1, mask=(at >= count) & (at < k))


def memory_places(indices: Tensor, counts: Tensor, n: int, span: int) -> Tensor:
    """(B, E, J, K) int32, the column of each place, -1 for none; indices and counts of n columns as of `memory`.

    span: after so many blocks places are given anew, in the order of the list.
    """
    batch, experts, blocks, k = indices.shape
    indices, counts = indices.contiguous(), counts.contiguous()
    places = torch.empty_like(indices)
    if places.numel():
        born, heir = indices.new_empty(2, batch, experts, n)
        steps, block = k.bit_length(), next_power_of_2(k)
        whole: dict[str, int] = {"LANES": block, "STEPS": steps, "num_warps": min(max(block // 128, 1), 16)}
        if blocks > 1:  # what is dropped lies where places will
            launch(_dropped_kernel, (batch * experts * (blocks - 1),), indices, counts, places, k, blocks, **whole)
        launch(_heirs_kernel, (counts.numel(),), indices, counts, places, born, heir, n, k, blocks, **whole)
        lanes = min(block, LANES)
        launch(
            _places_kernel, (counts.numel(), cdiv(k, lanes)), indices, counts, born, heir, places, n, k, blocks, span,
            LANES=lanes, STEPS=steps, num_warps=max(lanes // 128, 1),
        )  # fmt: skip
    return places
