"""PyTorch's flash attention for the CPU: masks, any floating dtype; no dropout, no window."""

from __future__ import annotations

import torch
from torch import Tensor

from optimized.attention.bias import bias
from optimized.attention.interface import Adapter, Attended, Pair, Setting, Triple
from optimized.attention.request import Request

aten = torch.ops.aten


class TorchFlashCpu(Adapter):
    alignment = 1
    masks = True

    def obstacle(self, r: Request) -> str | None:
        if not r.allow_flash:
            return "flash_attn=False"
        return "no dropout on the CPU" if r.dropout else None

    def state(self, q: Tensor, k: Tensor, dropout: float) -> Tensor:
        return q.new_empty(0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Triple:
        turned = (t.transpose(1, 2) for t in (q, k, v))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *turned, 0.0, False, attn_mask=_bias(q, k, setting), scale=setting.scale
        )
        return out.transpose(1, 2), lse, self.state(q, k, setting.dropout)

    def backward(self, dout: Tensor, done: Attended, setting: Setting, into: Pair) -> Triple:
        q, k, v, out, lse, _ = done
        dout, *turned = (t.transpose(1, 2) for t in (dout, q, k, v, out))
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, *turned, lse, 0.0, False, attn_mask=_bias(q, k, setting), scale=setting.scale
        )
        dq, dk, dv = (t.transpose(1, 2) for t in gradients)
        return dq, dk, dv


def _bias(q: Tensor, k: Tensor, setting: Setting) -> Tensor | None:
    added = bias(q, k, setting.visible)
    return None if added is None else added.expand(-1, 1, q.shape[1], -1)


ADAPTER = TorchFlashCpu()
