"""Attention written out in PyTorch: any device and dtype, with dropout; memory R H L S. No window."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def state(q: Tensor, k: Tensor, dropout: float) -> Tensor:
    """Which weights are kept, (R, H, L, S)."""
    rows, length, heads, _ = q.shape
    shape = (rows, heads, length, k.shape[1]) if dropout else (0,)
    return torch.empty(shape, dtype=torch.bool, device=q.device)


def _probabilities(
    q: Tensor, k: Tensor, lse: Tensor | None, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """exp(s - lse) and lse, in at least float32; lse computed if None."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide).transpose(1, 2), k.to(wide).permute(0, 2, 3, 1)
    s = (q @ k) * scale
    if lengths is not None:
        hidden = torch.arange(s.shape[-1], device=s.device) >= lengths[:, None]
        s = s.masked_fill(hidden[:, None, None], -math.inf)
    if lse is None:
        lse = s.logsumexp(-1)
    # A row without keys has lse -inf, and -inf - -inf is no number.
    return (s - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp(), lse


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, dropout: float, window: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    p, lse = _probabilities(q, k, None, lengths, scale)
    keep = state(q, k, dropout)
    if dropout:
        keep = torch.rand(p.shape, device=p.device) >= dropout
        p = p * keep / (1 - dropout)
    out = (p @ v.to(p.dtype).transpose(1, 2)).transpose(1, 2)
    return out.to(q.dtype), lse, keep


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
    p, _ = _probabilities(q, k, lse, lengths, scale)
    wide = p.dtype
    dout, out, v = (t.to(wide).transpose(1, 2) for t in (dout, out, v))
    dp = dout @ v.mT
    dropped = p
    if dropout:
        dp = dp * state / (1 - dropout)
        dropped = p * state / (1 - dropout)
    ds = p * (dp - (dout * out).sum(-1, keepdim=True)) * scale
    dq = ds @ k.to(wide).transpose(1, 2)
    dk = ds.mT @ q.to(wide).transpose(1, 2)
    dv = dropped.mT @ dout
    dq, dk, dv = (t.transpose(1, 2).to(q.dtype) for t in (dq, dk, dv))
    return dq, dk, dv
