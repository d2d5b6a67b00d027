"""PyTorch's memory-efficient attention for GPUs: float32 too, dropout, lengths, masks; no window.

Lengths and masks are a bias of -inf. Cumulative offsets would be cheaper, but with them its backward leaves the
gradients of queries without any key unwritten, and draws another dropout mask than its forward (both seen with torch
2.11).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimized.attention.bias import bias
from optimized.attention.interface import Adapter, Attended, Pair, Setting, Triple
from optimized.attention.request import Request, off_cuda

aten = torch.ops.aten
LSE_BLOCK = 32  # its log-sum-exp is padded to a multiple of this
BIAS_BLOCK = 8  # and rows of the bias must be aligned to this many elements


class TorchEfficient(Adapter):
    masks = True

    def obstacle(self, r: Request) -> str | None:
        return off_cuda(r) or ("no float64" if r.dtype == torch.float64 else None)

    def state(self, q: Tensor, k: Tensor, dropout: float) -> Tensor:
        """Seed and offset of the draw: on the CPU, but for a CUDA graph, which draws anew at each replay."""
        captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        return torch.empty(2 if dropout else 0, dtype=torch.int64, device=q.device if captured else "cpu")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Triple:
        out, lse, seed, offset, _, _ = aten._efficient_attention_forward(
            q, k, v, _bias(q, k, setting), None, None, None, None, setting.dropout, 0, True, scale=setting.scale
        )
        kept = torch.stack((seed, offset)) if setting.dropout else self.state(q, k, setting.dropout)
        return out, lse[..., : q.shape[1]], kept

    def backward(self, dout: Tensor, done: Attended, setting: Setting, into: Pair) -> Triple:
        q, k, v, out, lse, state = done
        rows, length, heads, _ = q.shape
        padded = lse.new_full((rows, heads, -(-length // LSE_BLOCK) * LSE_BLOCK), math.inf)
        padded[..., :length] = lse
        draw = state if setting.dropout else torch.empty(2, dtype=torch.int64)  # not looked at
        dq, dk, dv, _ = aten._efficient_attention_backward(
            dout, q, k, v, _bias(q, k, setting), out, None, None, length, k.shape[1], padded, setting.dropout,
            draw[0], draw[1], 0, False, scale=setting.scale,
        )  # fmt: skip
        return dq, dk, dv


def _bias(q: Tensor, k: Tensor, setting: Setting) -> Tensor | None:
    """(R, H, L, S), stored once for all heads, and once per row if there are lengths alone."""
    added = bias(q, k, setting.visible, BIAS_BLOCK)
    return None if added is None else added.expand(-1, q.shape[2], q.shape[1], -1)


ADAPTER = TorchEfficient()
