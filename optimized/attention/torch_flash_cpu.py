"""PyTorch's flash attention for the CPU: no dropout, no window, any floating dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimized.attention import Setting

aten = torch.ops.aten


def state(q: Tensor, k: Tensor, dropout: float) -> Tensor:
    return q.new_empty(0)


def _bias(q: Tensor, k: Tensor, lengths: Tensor | None) -> Tensor | None:
    if lengths is None:
        return None
    hidden = torch.arange(k.shape[1], device=q.device) >= lengths[:, None]
    bias = q.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)
    return bias[:, None, None].expand(-1, 1, q.shape[1], -1)


def forward(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    turned = (t.transpose(1, 2) for t in (q, k, v))
    bias = _bias(q, k, setting.lengths)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *turned, 0.0, False, attn_mask=bias, scale=setting.scale
    )
    return out.transpose(1, 2), lse, state(q, k, setting.dropout)


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
    dout, *turned = (t.transpose(1, 2) for t in (dout, q, k, v, out))
    bias = _bias(q, k, setting.lengths)
    gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, *turned, lse, 0.0, False, attn_mask=bias, scale=setting.scale
    )
    dq, dk, dv = (t.transpose(1, 2) for t in gradients)
    return dq, dk, dv
