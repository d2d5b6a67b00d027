"""PyTorch's flash attention for GPUs, the operator behind torch.nn.attention.varlen: dropout, lengths, windows.

On the CPU it is another operator, see `torch_flash_cpu`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized.attention import torch_flash_cpu
from optimized.attention.interface import Adapter, Attended, Pair, Setting, Triple
from optimized.attention.lengths import offsets
from optimized.attention.request import Request, flash

aten = torch.ops.aten


class TorchFlash(Adapter):
    windows = True

    def obstacle(self, r: Request) -> str | None:
        return torch_flash_cpu.ADAPTER.obstacle(r) if r.device.type == "cpu" else flash(r, max_dim_head=256)

    def state(self, q: Tensor, k: Tensor, dropout: float) -> Tensor:
        """Seed and offset of the draw."""
        return torch.empty(2 if dropout else 0, dtype=torch.int64, device=q.device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Triple:
        rows, length, heads, _ = q.shape
        starts = offsets(rows, length, k.shape[1], setting.visible.lengths, q.device)
        out, lse, draw, _, _ = aten._flash_attention_forward(
            *(t.flatten(0, 1) for t in (q, k, v)), *starts, length, k.shape[1], setting.dropout, False, False,
            **_options(setting),
        )  # fmt: skip
        kept = draw.view(torch.int64) if setting.dropout else self.state(q, k, setting.dropout)
        return out.view(q.shape), lse.view(heads, rows, length).transpose(0, 1), kept

    def backward(self, dout: Tensor, done: Attended, setting: Setting, into: Pair) -> Triple:
        q, k, v, out, lse, state = done
        rows, length, _, _ = q.shape
        starts = offsets(rows, length, k.shape[1], setting.visible.lengths, q.device)
        draw = state if setting.dropout else torch.zeros(2, dtype=torch.int64, device=q.device)
        gradients = aten._flash_attention_backward(
            *(t.flatten(0, 1) for t in (dout, q, k, v, out)), lse.transpose(0, 1).flatten(1), *starts,
            length, k.shape[1], setting.dropout, False, draw.view(torch.uint64), draw.new_empty(()).view(torch.uint64),
            **_options(setting),
        )  # fmt: skip
        dq, dk, dv = (g.view(t.shape) for g, t in zip(gradients, (q, k, v)))
        return dq, dk, dv


def _options(setting: Setting) -> dict[str, Any]:
    left, right = setting.visible.sides
    return {"scale": setting.scale, "window_size_left": left, "window_size_right": right}


ADAPTER = TorchFlash()
