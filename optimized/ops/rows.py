"""The two transposed moves of tokens by PyTorch: to the slots of the experts, and back.

The way back reads through the inverse map, so it needs no atomic additions.
Letters: B batch, N tokens, E experts, K slots per expert, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take_rows(x: Tensor, indices: Tensor, slots: Tensor) -> Tensor:
    """Routed tokens (E, B, K, D) of x (B, N, D), experts first for batched GEMMs; 0 in slots that `slots` excludes."""
    batch = torch.arange(x.shape[0], device=x.device)[None, :, None]
    # Indexing copies the layout of its index, and the rows are to be contiguous.
    rows = x[batch, indices.transpose(0, 1).contiguous()]
    return rows.masked_fill_(~slots.transpose(0, 1)[..., None], 0)


def add_rows(rows: Tensor, inverse: Tensor) -> Tensor:
    """Transpose of `take_rows`: (B, N, D), the sum over experts of rows (E, B, K, D) at each token, 0 where none.

    Every token reads its rows, at most E, through the inverse map (B, E, N) in the order of the experts: deterministic.
    """
    experts, batch, slots, dim = rows.shape
    out = rows.new_zeros(batch, inverse.shape[-1], dim)
    items = torch.arange(batch, device=rows.device)[:, None]
    for e in range(experts if slots else 0):
        slot = inverse[:, e].long()
        out += rows[e][items, slot.clamp_min(0)].masked_fill_((slot < 0)[..., None], 0)
    return out


def inverse_map(indices: Tensor, mask: Tensor, n: int) -> Tensor:
    """(B, E, N) int32: the slot that holds a token, or -1. Masked slots hold nothing; indices are distinct in a row."""
    slots = torch.arange(indices.shape[-1], device=indices.device, dtype=torch.int32)
    empty = indices.new_full((*indices.shape[:2], n), -1, dtype=torch.int32)
    return empty.scatter(-1, indices, torch.where(mask, slots, -1))
