"""flash-attn 4, package `flash_attn.cute`: half precision on Hopper and newer, lengths, windows; no dropout."""

from __future__ import annotations

from typing import Any

import torch
from flash_attn.cute import interface
from torch import Tensor

from optimized.attention import Setting


def state(q: Tensor, k: Tensor, dropout: float) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=q.device)


def _options(setting: Setting) -> dict[str, Any]:
    left, right = (None, None) if setting.window < 0 else setting.sides
    return {
        "softmax_scale": setting.scale,
        "window_size_left": left,
        "window_size_right": right,
        "seqused_k": setting.lengths,
    }


def forward(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, *_ = interface._flash_attn_fwd(q, k, v, return_lse=True, **_options(setting))
    return out, lse, state(q, k, setting.dropout)


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
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if setting.lengths is not None:  # hidden keys are not written
        dk.zero_()
        dv.zero_()
    dq, _, _, *_ = interface._flash_attn_bwd(
        q, k, v, out, dout, lse, dq=dq, dk=dk, dv=dv,
        deterministic=torch.are_deterministic_algorithms_enabled(), **_options(setting),
    )  # fmt: skip
    return dq, dk, dv
