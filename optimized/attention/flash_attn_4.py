"""flash-attn 4, package `flash_attn.cute`: half precision on Hopper and newer, lengths, windows; no dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized.attention.interface import Adapter, Attended, Pair, Setting, Triple
from optimized.attention.request import Request, constant, flash, import_obstacle


class FlashAttn4(Adapter):
    # It takes multiples of 8, but its dq is wrong beyond the first 64 queries where the dimension is 8 or 16 more than
    # a multiple of 32 (4.0.0b36, H100).
    alignment = 32
    windows = True

    def obstacle(self, r: Request) -> str | None:
        if not r.allow_flash:
            return "flash_attn=False"
        if r.dropout:
            return "no dropout"
        return (
            flash(r, max_dim_head=256)
            or _device_obstacle(r.device, r.dim_head)
            or import_obstacle("flash_attn.cute.interface", "flash-attn 4")
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Triple:
        out, lse, *_ = _interface()._flash_attn_fwd(q, k, v, return_lse=True, **_options(setting))
        return out, lse, self.state(q, k, setting.dropout)

    def backward(self, dout: Tensor, done: Attended, setting: Setting, into: Pair) -> Triple:
        q, k, v, out, lse, _ = done
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = into
        if setting.visible.lengths is not None:  # hidden keys are not written
            dk.zero_()
            dv.zero_()
        dq, _, _, *_ = _interface()._flash_attn_bwd(
            q, k, v, out, dout, lse, dq=dq, dk=dk, dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(), **_options(setting),
        )  # fmt: skip
        return dq, dk, dv


def _options(setting: Setting) -> dict[str, Any]:
    visible = setting.visible
    left, right = (None, None) if visible.window < 0 else visible.sides
    return {
        "softmax_scale": setting.scale,
        "window_size_left": left,
        "window_size_right": right,
        "seqused_k": visible.lengths,
    }


def _interface() -> Any:
    from flash_attn.cute import interface

    return interface


@constant
def _device_obstacle(device: torch.device, dim_head: int) -> str | None:
    major, _ = torch.cuda.get_device_capability(device)
    if major not in (9, 10, 11):
        return "needs compute capability 9.0, 10.x or 11.x"
    return f"dim_head {dim_head} > 128" if dim_head > 128 and major > 9 else None


ADAPTER = FlashAttn4()
