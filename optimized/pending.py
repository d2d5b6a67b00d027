"""Selection of the causal layer in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from optimized.ops.select import _order_preserving


def memory(
    logits: Tensor, valid: Tensor | None, k: int, block: int, prior: int, triton: bool
) -> tuple[Tensor, Tensor]:
    batch, experts, length = logits.shape
    least = torch.iinfo(torch.int64).min
    key = _order_preserving(logits)
    if valid is not None:
        key = key.masked_fill(~valid[:, None], least)
    column = torch.arange(length, device=logits.device)
    found, counts = [], []
    for j in range((length - prior) // block):
        worth = key.masked_fill(column >= prior + j * block, least).flip(-1)
        order = worth.argsort(dim=-1, descending=True, stable=True)[..., :k]
        there = worth.gather(-1, order) > least
        held = torch.where(there, length - 1 - order, length).sort(-1).values
        held = torch.nn.functional.pad(held, (0, k - held.shape[-1]), value=length)
        found.append(held.masked_fill(held == length, 0))
        counts.append((held < length).sum(-1))
    if not found:
        empty = logits.new_zeros(batch, experts, 0, k, dtype=torch.int32)
        return empty, empty[..., 0]
    return torch.stack(found, 2).int(), torch.stack(counts, 2).int()


def candidates(
    logits: Tensor, valid: Tensor | None, first: Tensor, kq: int, capacity: int, block: int, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits.unflatten(-1, (-1, block))
    there = torch.ones_like(rows, dtype=torch.bool)
    if valid is not None:
        there = valid.unflatten(-1, (-1, block))[:, None].expand_as(rows)
    number = there & ~rows.isnan()
    best = torch.where(number, rows, -torch.inf).sort(-1, descending=True).values[..., kq - 1]
    own = torch.where(number.sum(-1) >= kq, best, torch.nan)
    thresholds = torch.cat((first[..., None], own), -1)[..., : rows.shape[2]]
    candidate = there & (rows >= thresholds[..., None])
    rank = candidate.cumsum(-1)
    taken = candidate & (rank <= capacity)
    slots = (~taken).long().argsort(dim=-1, stable=True)[..., :capacity]
    filled = taken.gather(-1, slots)
    starts = block * torch.arange(rows.shape[2], device=rows.device)[:, None]
    base = capacity * torch.arange(rows.shape[2], device=rows.device)[:, None]
    inverse = torch.where(taken, base + rank - 1, -1).flatten(-2).int()
    indices = torch.where(filled, starts + slots, 0).int()
    return indices, filled, inverse, thresholds, candidate.sum(-1).int()
