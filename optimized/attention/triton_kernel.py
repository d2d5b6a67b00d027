"""Our own kernels (`kernels.attention`): half precision, dropout, lengths, and the null slot inside; no window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized.attention.interface import Adapter, Attended, Null, Pair, Setting, Triple
from optimized.attention.request import HALF, Request

MOST_CHANNELS = 64  # of a head: rows of more don't fit in registers


class TritonKernel(Adapter):
    alignment = 1
    splits = False
    nulls = True

    def obstacle(self, r: Request) -> str | None:
        # Interpreted, nothing has to fit in registers.
        if r.device.type == "cuda" and r.dtype not in HALF:
            return f"float16 and bfloat16 only, not {r.dtype}"
        return f"dim_head {r.dim_head} > {MOST_CHANNELS}" if r.dim_head > MOST_CHANNELS else None

    def state(self, q: Tensor, k: Tensor, dropout: float) -> Tensor:
        """What weights are kept follows from, the null slot's too."""
        from optimized.kernels.keep import numbers

        rows, length, heads, _ = q.shape
        if not dropout:
            return torch.empty(0, dtype=torch.int32, device=q.device)
        return numbers(rows, heads, length, k.shape[1], q.device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Triple:
        out, lse, _, state = self.attend(q, k, v, None, setting)
        return out, lse, state

    def backward(self, dout: Tensor, done: Attended, setting: Setting, into: Pair) -> Triple:
        dq, _ = self.attend_backward(dout, done, None, setting, into)
        return dq, *into

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, null: Null, setting: Setting
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from optimized.kernels import attention as kernel

        state = self.state(q, k, setting.dropout)
        if setting.dropout:
            state.random_(-(2**31), None)
        call = _call(q, k, null, setting, state)
        out, lse = kernel.attention(q, k, v, call)
        keep = lse.new_empty(0) if call.kept is None or null is None else call.kept[1]
        return out, lse, keep, state

    def attend_backward(
        self, dout: Tensor, done: Attended, null: Null, setting: Setting, into: Pair
    ) -> tuple[Tensor, Tensor | None]:
        from optimized.kernels import attention as kernel

        q, k, v, out, lse, state = done
        return kernel.attention_backward(dout, (q, k, v), out, lse, _call(q, k, null, setting, state), into)


def _call(q: Tensor, k: Tensor, null: Null, setting: Setting, state: Tensor) -> Any:
    """With the bits of what is kept: made in either direction, since they take eight times the memory of the state."""
    from optimized.kernels.attention import Attention
    from optimized.kernels.keep import kept

    made = None
    if setting.dropout:
        made = kept(state, q.shape[1], k.shape[1], setting.dropout, torch.promote_types(q.dtype, torch.float32))
    return Attention(setting.scale, null, setting.visible.lengths, setting.dropout, made)


ADAPTER = TritonKernel()
