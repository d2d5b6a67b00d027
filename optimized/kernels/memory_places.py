"""Places of memory: a place for every column, kept from the block in which it is first remembered to the last one.

indices (B, E, J, K) list what a block remembers in ascending order, so that a column moves down as others before it are
dropped. For a sum over the blocks that see a column it had better stay where it is: then a program that holds some
places goes through the blocks, and writes a sum when another column takes its place. Every column is written once, in
whatever order programs run; no tile holds places that nobody uses. A tile of 64 columns as they come is in use until
the last of them is dropped: of 8,192 (131,072) columns in random order and K 512, 7.6 (45) times as many tiles would
be passed through, of those ever remembered 2.6 (4.4), of these sorted by their last block 1.4 (1.6).

First each block looks up, by bisection, which of its columns the next one no longer lists: the last block of each
column. Then one program per row, or per some blocks of a row, goes through them; the new ones take places that became
free, in order.

Blind spots: a chain of so many steps, each as long as two reads of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import launch, next_power_of_2

LANES = 1024  # columns looked up at a time


@triton.jit(do_not_specialize=["n", "k", "blocks"])
def _last_kernel(indices_ptr, counts_ptr, last_ptr, n, k, blocks, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Program: row, block, chunk of its list. last (rows, n): of columns that are ever listed.

    From the last block on: the interpreter runs programs in order, and later ones would mend what is missed.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    j = blocks - 1 - tl.program_id(0) % blocks
    place = row * blocks + j
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < tl.load(counts_ptr + place)
    columns = tl.load(indices_ptr + place * k + at, mask=there, other=0)
    more = tl.full((BLOCK,), 0, tl.int32)
    if j + 1 < blocks:
        more += tl.load(counts_ptr + place + 1)
    next_ptr = indices_ptr + (place + 1) * k
    low = tl.full((BLOCK,), 0, tl.int32)  # how many of the next list are known to be lesser
    high = more
    for _ in range(STEPS):
        middle = (low + high) // 2
        lesser = tl.load(next_ptr + middle, mask=there & (low < high), other=n) < columns
        low = tl.where(lesser & (low < high), middle + 1, low)
        high = tl.where(lesser, high, middle)
    found = tl.load(next_ptr + low, mask=there & (low < more), other=-1) == columns
    tl.store(last_ptr + row * n + columns, j, mask=there & (found == 0))


@triton.jit(do_not_specialize=["n", "k", "blocks", "span", "chunks"])
def _places_kernel(
    indices_ptr, counts_ptr, last_ptr, places_ptr, n, k, blocks, span, chunks, BLOCK: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * span
    indices_ptr += (row * blocks + first) * k
    counts_ptr += row * blocks
    places_ptr += (row * blocks + first) * k
    last_ptr += row * n
    lanes = tl.arange(0, BLOCK)
    inside = lanes < k
    held = tl.full((BLOCK,), -1, tl.int32)
    last = tl.full((BLOCK,), -1, tl.int32)
    for j in range(first, tl.minimum(first + span, blocks)):
        free = inside & (last < j)
        kept = tl.sum((inside & (last >= j)).to(tl.int32))
        at = kept + tl.cumsum(free.to(tl.int32)) - 1  # the new ones stand behind those that were kept
        taken = free & (at < tl.load(counts_ptr + j))
        columns = tl.load(indices_ptr + at, mask=taken, other=-1)
        held = tl.where(free, columns, held)
        last = tl.where(free, tl.load(last_ptr + columns, mask=taken, other=-1), last)
        tl.store(places_ptr + lanes, held, mask=inside)
        indices_ptr += k
        places_ptr += k


def memory_places(indices: Tensor, counts: Tensor, n: int, span: int) -> Tensor:
    """(B, E, J, K) int32, the column of each place, -1 for none; indices and counts of n columns as of `memory`.

    span: after so many blocks places are given anew, in the order of the list.
    """
    batch, experts, blocks, k = indices.shape
    indices, counts = indices.contiguous(), counts.contiguous()
    places = torch.empty_like(indices)
    if places.numel():
        last = indices.new_empty(batch, experts, n)
        lanes = min(next_power_of_2(k), LANES)
        launch(
            _last_kernel, (counts.numel(), -(-k // lanes)), indices, counts, last,
            n, k, blocks, STEPS=k.bit_length(), BLOCK=lanes, num_warps=max(lanes // 256, 1),
        )  # fmt: skip
        block = next_power_of_2(k)
        launch(
            _places_kernel, (batch * experts * -(-blocks // span),), indices, counts, last, places,
            n, k, blocks, span, -(-blocks // span), BLOCK=block, num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return places
