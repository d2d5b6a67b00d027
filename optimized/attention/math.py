"""Attention written out in PyTorch: any device and dtype, with dropout, windows and masks; memory R H L S."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimized.attention.interface import Adapter, Attended, Pair, Setting, Triple, Visible
from optimized.attention.request import Request


class Math(Adapter):
    alignment = 1
    splits = False
    windows = True
    masks = True

    def obstacle(self, r: Request) -> str | None:
        return None

    def state(self, q: Tensor, k: Tensor, dropout: float) -> Tensor:
        """Which weights are kept, (R, H, L, S)."""
        rows, length, heads, _ = q.shape
        shape = (rows, heads, length, k.shape[1]) if dropout else (0,)
        return torch.empty(shape, dtype=torch.bool, device=q.device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Triple:
        s = _logits(q, k, setting)
        lse = s.logsumexp(-1)
        # Not exp(s - lse): the weights must sum to 1 far better than |lse| eps, and to 0 where there is no key.
        p = s.softmax(-1).masked_fill((lse == -math.inf)[..., None], 0)
        keep = self.state(q, k, setting.dropout)
        if setting.dropout:
            keep = torch.rand(p.shape, dtype=p.dtype, device=p.device) >= setting.dropout
            p = p * keep / (1 - setting.dropout)
        out = (p @ v.to(p.dtype).transpose(1, 2)).transpose(1, 2)
        return out.to(q.dtype), lse, keep

    def backward(self, dout: Tensor, done: Attended, setting: Setting, into: Pair) -> Triple:
        q, k, v, out, lse, state = done
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


def _logits(q: Tensor, k: Tensor, setting: Setting) -> Tensor:
    """(R, H, L, S) in at least float32, -inf for hidden keys."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide).transpose(1, 2), k.to(wide).permute(0, 2, 3, 1)
    s = (q @ k) * setting.scale
    length, keys = s.shape[-2:]
    hidden = _hidden(setting.visible, length, keys, s.device)
    return s if hidden is None else s.masked_fill(hidden, -math.inf)


def _hidden(visible: Visible, length: int, keys: int, device: torch.device) -> Tensor | None:
    """What of (R, H, L, S) is not seen; None for nothing."""
    hidden = None if visible.mask is None else ~visible.mask[:, None]
    key = torch.arange(keys, device=device)
    if visible.window >= 0:
        left, right = visible.sides
        ahead = key - torch.arange(length, device=device)[:, None]
        outside = (ahead < -left) | (ahead > right)
        hidden = outside if hidden is None else hidden | outside
    if visible.lengths is not None:
        beyond = (key >= visible.lengths[:, None])[:, None, None]
        hidden = beyond if hidden is None else hidden | beyond
    return hidden


ADAPTER = Math()
