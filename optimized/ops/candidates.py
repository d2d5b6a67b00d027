"""Queries of blocks by a threshold that is known before a block starts.

Letters: B batch, E experts, J blocks, W length of a block, C slots of a block, I blocks that have slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized.ops.operator import operator


@operator(
    "(Tensor logits, Tensor? valid, Tensor? first, SymInt kq, SymInt capacity, SymInt block, bool triton)"
    " -> (Tensor indices, Tensor slots, Tensor inverse, Tensor thresholds, Tensor counts)",
    folds=dict.fromkeys(("logits", "valid", "first", "indices", "slots", "inverse", "thresholds", "counts"), 0),
)
class candidates:
    """The first `capacity` tokens of each block whose logit is at least the kq-th largest of the block before.

    Args:
        logits: (B, E, J W), float32 or float64. valid: (B, J W) bool, None for all; others are no candidates and count
            for no threshold.
        first: (B, E) in the logits' dtype, the threshold of block 0; NaN: nobody reaches it. None: nobody does, and
            block 0 has no slots.
        kq: whose threshold is NaN where the block before has fewer numbers. block: W, at least 1.
    Returns, without gradient, indices (B, E, I, C) int64, columns ascending, 0 in empty slots; slots, which are filled,
    bool, the first ones of a block; inverse (B, E, J W) int32, slot i C + c of a token or -1; thresholds (B, E, J); and
    counts (B, E, I) int32, how many slots are filled. I = J, or J - 1 without `first`.
    """

    def forward(a: Any) -> Any:
        if a.triton:
            from optimized.kernels import candidates as kernel

            return kernel.candidates(a.logits, a.valid, a.first, a.kq, a.capacity, a.block)
        rows = a.logits.contiguous().unflatten(-1, (a.logits.shape[-1] // a.block, a.block))
        skipped = 1 if a.first is None else 0
        valid = torch.ones_like(rows, dtype=torch.bool)
        if a.valid is not None:
            valid = a.valid[:, None].expand_as(a.logits).reshape(rows.shape)
        blocks = rows.shape[2]
        thresholds = _thresholds(rows, valid, a.first, a.kq)
        candidate = valid & (rows >= thresholds[..., None])
        slot = candidate.cumsum(-1) - 1
        taken = candidate & (slot < a.capacity)
        columns = torch.arange(blocks * a.block, device=rows.device).view(blocks, a.block).expand_as(slot)
        # Tokens without a slot write to one past the end.
        indices = slot.new_zeros(*rows.shape[:3], a.capacity + 1)
        indices = indices.scatter_(-1, torch.where(taken, slot, a.capacity), columns)[:, :, skipped:, : a.capacity]
        counts = taken.sum(-1).int()[:, :, skipped:].contiguous()
        slots = torch.arange(a.capacity, device=rows.device) < counts[..., None]
        starts = a.capacity * (torch.arange(blocks, device=rows.device) - skipped)[:, None]
        inverse = torch.where(taken, starts + slot, -1).int().flatten(2)
        return torch.where(slots, indices, 0), slots, inverse, thresholds, counts

    def fake(a: Any) -> Any:
        batch, experts, n = a.logits.shape
        blocks = n // a.block
        with_slots = blocks - 1 if blocks and a.first is None else blocks
        counts = a.logits.new_empty(batch, experts, with_slots, dtype=torch.int32)
        indices = counts.new_empty(*counts.shape, a.capacity, dtype=torch.int64)
        inverse = counts.new_empty(batch, experts, n)
        thresholds = a.logits.new_empty(batch, experts, blocks)
        return indices, indices.new_empty(indices.shape, dtype=torch.bool), inverse, thresholds, counts


def _thresholds(rows: Tensor, valid: Tensor, first: Tensor | None, kq: int) -> Tensor:
    """Of each block, (B, E, J)."""
    number = (valid & ~rows.isnan())[:, :, :-1]
    best = torch.where(number, rows[:, :, :-1] + 0.0, -torch.inf)  # adding 0.0 turns -0.0 into 0.0
    found = torch.full_like(best[..., 0], torch.nan)
    if kq <= rows.shape[-1] and rows.shape[2]:
        found = torch.where(number.sum(-1) >= kq, best.topk(kq, -1).values[..., -1], torch.nan)
    first = rows.new_full(rows.shape[:2], torch.nan) if first is None else first
    return torch.cat((first[..., None], found), -1)[..., : rows.shape[2]].contiguous()
