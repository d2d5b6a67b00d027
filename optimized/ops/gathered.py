"""Rows of a memory, block by block: a gather whose gradient is a sum over the blocks that see a row.

Letters: E experts, B batch, L rows, J blocks, K slots, F channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized.ops.operator import operator


@operator(
    "(Tensor t, Tensor indices, Tensor counts) -> Tensor rows", wrt="t", gradients_of="rows", saves="t indices counts"
)
class gathered:
    """Rows (E, B, J, K, F) of t (E, B, L, F) at indices (B, E, J, K); 0 from slot counts (B, E, J) on.

    The gradient is added up in at least float32, in one order.
    """

    def forward(a: Any) -> Any:
        experts, batch, length, channels = a.t.shape
        flat, hidden = _places(a)
        rows = a.t.reshape(experts * batch * length, channels)[flat]
        return rows.masked_fill_(hidden[..., None], 0)

    def fake(a: Any) -> Any:
        batch, experts, blocks, slots = a.indices.shape
        return a.t.new_empty(experts, batch, blocks, slots, a.t.shape[-1])

    def backward(a: Any, g: Any, needs: Any) -> Any:
        experts, batch, length, channels = a.t.shape
        flat, hidden = _places(a)
        wide = torch.promote_types(a.t.dtype, torch.float32)
        rows = g.rows.to(wide).masked_fill(hidden[..., None], 0).flatten(0, 3)
        total = rows.new_zeros(experts * batch * length, channels)
        if total.is_cuda:  # sorted by place, where `index_add_` would add in any order
            total.index_put_((flat.flatten(),), rows, accumulate=True)
        else:
            total.index_add_(0, flat.flatten(), rows)
        return {"t": total.to(a.t.dtype).view(a.t.shape)}


def _places(a: Any) -> tuple[Tensor, Tensor]:
    """Of every slot (E, B, J, K) its row among all of t, and whether it is empty."""
    experts, batch, length, _ = a.t.shape
    indices, counts = a.indices.transpose(0, 1), a.counts.transpose(0, 1)
    start = torch.arange(experts * batch, device=a.t.device).view(experts, batch, 1, 1) * length
    hidden = torch.arange(indices.shape[-1], device=a.t.device) >= counts[..., None]
    return (start + indices.masked_fill(hidden, 0)).contiguous(), hidden
