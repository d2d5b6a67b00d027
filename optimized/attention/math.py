"""Attention written out in PyTorch: any device and dtype, with dropout and windows; memory R H L S.

No stage with a window takes it, for its memory; it shows that the operators around a window are right.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimized.attention import Setting


def state(q: Tensor, k: Tensor, dropout: float) -> Tensor:
    """Which weights are kept, (R, H, L, S)."""
    rows, length, heads, _ = q.shape
    shape = (rows, heads, length, k.shape[1]) if dropout else (0,)
    return torch.empty(shape, dtype=torch.bool, device=q.device)


def _logits(q: Tensor, k: Tensor, setting: Setting) -> Tensor:
    """(R, H, L, S) in at least float32, -inf for hidden keys."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide).transpose(1, 2), k.to(wide).permute(0, 2, 3, 1)
    s = (q @ k) * setting.scale
    keys = torch.arange(s.shape[-1], device=s.device)
    if setting.window >= 0:
        left, right = setting.sides
        ahead = keys - torch.arange(s.shape[-2], device=s.device)[:, None]
        s = s.masked_fill((ahead < -left) | (ahead > right), -math.inf)
    if setting.lengths is None:
        return s
    return s.masked_fill((keys >= setting.lengths[:, None])[:, None, None], -math.inf)


def forward(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    s = _logits(q, k, setting)
    lse = s.logsumexp(-1)
    # Not exp(s - lse): the weights must sum to 1 far better than |lse| eps, and to 0 where there is no key.
    p = s.softmax(-1).masked_fill((lse == -math.inf)[..., None], 0)
    keep = state(q, k, setting.dropout)
    if setting.dropout:
        keep = torch.rand(p.shape, device=p.device) >= setting.dropout
        p = p * keep / (1 - setting.dropout)
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
    setting: Setting,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    # A row without keys and without a null slot has lse -inf, and -inf - -inf is no number.
    p = (_logits(q, k, setting) - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    wide = p.dtype
    dout, out, v = (t.to(wide).transpose(1, 2) for t in (dout, out, v))
    dp = dout @ v.mT
    dropped = p
    if setting.dropout:
        dp = dp * state / (1 - setting.dropout)
        dropped = p * state / (1 - setting.dropout)
    ds = p * (dp - (dout * out).sum(-1, keepdim=True)) * setting.scale
    dq = ds @ k.to(wide).transpose(1, 2)
    dk = ds.mT @ q.to(wide).transpose(1, 2)
    dv = dropped.mT @ dout
    dq, dk, dv = (t.transpose(1, 2).to(q.dtype) for t in (dq, dk, dv))
    return dq, dk, dv
