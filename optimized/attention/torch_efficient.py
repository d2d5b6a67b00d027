"""PyTorch's memory-efficient attention for GPUs: float32 too, dropout, lengths; no window."""

from __future__ import annotations

import torch
from torch import Tensor

from optimized.attention.lengths import offsets

aten = torch.ops.aten
LSE_BLOCK = 32  # its log-sum-exp is padded to a multiple of this


def state(q: Tensor, k: Tensor, dropout: float) -> Tensor:
    """Seed and offset of the draw: on the CPU, but for a CUDA graph, which draws anew at each replay."""
    captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return torch.empty(2 if dropout else 0, dtype=torch.int64, device=q.device if captured else "cpu")


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, dropout: float, window: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, _, _ = q.shape
    starts = offsets(rows, length, k.shape[1], lengths, q.device)
    out, lse, seed, offset, _, _ = aten._efficient_attention_forward(
        *(t.flatten(0, 1)[None] for t in (q, k, v)), None, *starts, length, k.shape[1], dropout, 0, True,
        scale=scale,
    )  # fmt: skip
    kept = torch.stack((seed, offset)) if dropout else state(q, k, dropout)
    every = slice(None) if lengths is None else slice(0, None, 2)
    return out.view(q.shape), lse[every, :, :length], kept


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor,
    lengths: Tensor | None,
    dropout: float,
    window: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, heads, _ = q.shape
    starts = offsets(rows, length, k.shape[1], lengths, q.device)
    every = slice(None) if lengths is None else slice(0, None, 2)
    padded = lse.new_full(
        (rows if lengths is None else 2 * rows, heads, -(-length // LSE_BLOCK) * LSE_BLOCK), torch.inf
    )
    padded[every, :, :length] = lse
    draw = state if dropout else torch.zeros(2, dtype=torch.int64)
    dout, *inputs = (t.flatten(0, 1)[None] for t in (dout, q, k, v, out))
    *qkv, out = inputs
    *gradients, _ = aten._efficient_attention_backward(
        dout, *qkv, None, out, *starts, length, k.shape[1], padded, dropout, draw[0], draw[1], 0, False,
        scale=scale,
    )  # fmt: skip
    dq, dk, dv = (g.view(t.shape) for g, t in zip(gradients, (q, k, v)))
    return dq, dk, dv
