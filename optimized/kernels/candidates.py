"""Queries of blocks: those tokens whose logit reaches the Kq-th largest of the block before, the first C of them.

One program per row and block. It builds the threshold from the block before, as `selection` does, in registers or, of
long blocks, chunk by chunk; then a running count over its own block gives the candidates their slots.

Blind spots: every program reads two blocks, so that logits are read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import CHUNK, by_item, contiguous, launch, next_power_of_2
from optimized.kernels.ranks import counts_of, elements, kth_largest


@triton.jit(do_not_specialize=["item", "n", "kq", "capacity", "width", "blocks", "experts"])
def _candidates_kernel(
    s_ptr, mask_ptr, first_ptr, indices_ptr, slots_ptr, inverse_ptr, thresholds_ptr, counts_ptr,
    item, n, kq, capacity, width, blocks, experts,
    BITS: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """n = blocks * width columns a row; item: see `by_item`."""
    place = tl.program_id(0).to(tl.int64)  # (b, e, j)
    row = place // blocks
    j = (place % blocks).to(tl.int32)
    s_ptr += row // experts * item + row % experts * n
    inverse_ptr += row * n
    if HAS_MASK:
        mask_ptr += row // experts * n
    i = j  # among the blocks that have slots
    listed = place
    if not HAS_FIRST:
        i = j - 1
        listed = place - row - 1
    indices_ptr += listed * capacity
    slots_ptr += listed * capacity

    lanes = tl.arange(0, BLOCK)
    threshold = tl.full((), float("nan"), s_ptr.dtype.element_ty)
    if HAS_FIRST:
        threshold = tl.load(first_ptr + row)
    if j > 0:
        threshold = tl.full((), float("nan"), threshold.dtype)
        before = (j - 1) * width
        key, _places = elements(
            s_ptr, mask_ptr, indices_ptr, counts_ptr, lanes, n, 1, 0, before, width, HAS_MASK, False
        )
        key_type: tl.constexpr = key.dtype
        lowest = (tl.full((), 1, key_type) << (BITS - 1)).to(key_type)
        number = lowest + 3  # no key between NaN's and that of -inf
        numbers, _second, _third = counts_of(
            key, number, number, number, s_ptr, mask_ptr, indices_ptr, counts_ptr, n, 1, 0, before, width,
            HAS_MASK, False, BLOCK, ONE_BLOCK,
        )  # fmt: skip
        if numbers >= kq:
            least, _found = kth_largest(
                key, kq, s_ptr, mask_ptr, indices_ptr, counts_ptr, n, 1, 0, before, width,
                BITS, HAS_MASK, False, BLOCK, ONE_BLOCK,
            )  # fmt: skip
            top = lowest ^ -1
            reached = tl.min(tl.where(key >= least, key, top))
            if not ONE_BLOCK:
                for begin in range(BLOCK, width, BLOCK):
                    more, _columns = elements(
                        s_ptr, mask_ptr, indices_ptr, counts_ptr, begin + lanes, n, 1, 0, before, width,
                        HAS_MASK, False,
                    )  # fmt: skip
                    reached = tl.minimum(reached, tl.min(tl.where(more >= least, more, top)))
            bits = tl.where(reached < 0, reached ^ top, reached).to(key_type)
            threshold = bits.to(threshold.dtype, bitcast=True)
    tl.store(thresholds_ptr + place, threshold)

    seen = tl.full((), 0, tl.int32)
    for begin in range(0, width, BLOCK):
        at = begin + lanes
        columns = j * width + at
        valid = at < width
        if HAS_MASK:
            valid = tl.load(mask_ptr + columns, mask=valid, other=0) != 0
        s = tl.load(s_ptr + columns, mask=valid, other=float("nan"))
        candidate = valid & (s >= threshold)
        slot = seen + tl.cumsum(candidate.to(tl.int32)) - 1
        taken = candidate & (slot < capacity)
        tl.store(indices_ptr + slot, columns, mask=taken)
        tl.store(inverse_ptr + columns, tl.where(taken, i * capacity + slot, -1), mask=at < width)
        seen += tl.sum(candidate.to(tl.int32))
    has_slots = i >= 0
    tl.store(counts_ptr + listed, tl.minimum(seen, capacity), mask=has_slots)
    for begin in range(0, tl.where(has_slots, capacity, 0), BLOCK):
        slot = begin + lanes
        tl.store(slots_ptr + slot, (slot < seen).to(tl.int8), mask=slot < capacity)
        tl.store(indices_ptr + slot, 0, mask=(slot < capacity) & (slot >= seen))


def candidates(
    logits: Tensor, valid: Tensor | None, first: Tensor | None, kq: int, capacity: int, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Indices, slots, inverse map, thresholds and counts; see `optimized.ops.candidates`."""
    batch, experts, n = logits.shape
    blocks = n // block
    counts = torch.empty(
        batch, experts, blocks - 1 if blocks and first is None else blocks, dtype=torch.int32, device=logits.device
    )
    indices = torch.empty(*counts.shape, capacity, dtype=torch.int64, device=logits.device)
    slots = torch.empty(*counts.shape, capacity, dtype=torch.bool, device=logits.device)
    inverse = torch.empty(batch, experts, n, dtype=torch.int32, device=logits.device)
    thresholds = torch.empty(batch, experts, blocks, dtype=logits.dtype, device=logits.device)
    if thresholds.numel():
        logits, item = by_item(logits)
        chunk = min(next_power_of_2(block), CHUNK)
        launch(
            _candidates_kernel, (thresholds.numel(),),
            logits, contiguous(valid), contiguous(first), indices, slots.view(torch.int8), inverse, thresholds, counts,
            item, n, kq, capacity, block, blocks, experts,
            BITS=8 * logits.element_size(), HAS_FIRST=first is not None, HAS_MASK=valid is not None,
            BLOCK=chunk, ONE_BLOCK=block <= chunk, num_warps=min(max(chunk // 256, 1), 8),
        )  # fmt: skip
    return indices, slots, inverse, thresholds, counts
