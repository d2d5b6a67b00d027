"""flash-attn 2, package `flash_attn`: half precision, dropout, lengths, windows."""

from __future__ import annotations

from typing import Any

import flash_attn.flash_attn_interface as interface
import torch
from torch import Tensor

from optimized.attention import Setting
from optimized.attention.lengths import offsets


def state(q: Tensor, k: Tensor, dropout: float) -> Tensor:
    """Seed and offset of the draw."""
    return torch.empty(2 if dropout else 0, dtype=torch.int64, device=q.device)


def _options(setting: Setting) -> dict[str, Any]:
    left, right = setting.sides
    return {
        "dropout_p": setting.dropout,
        "softmax_scale": setting.scale,
        "causal": False,  # said by the window
        "window_size_left": left,
        "window_size_right": right,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def forward(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, heads, _ = q.shape
    options = {"return_softmax": False, **_options(setting)}
    if setting.lengths is None:
        out, lse, _, draw = interface._flash_attn_forward(q, k, v, **options)
    else:
        starts = offsets(rows, length, k.shape[1], setting.lengths, q.device)
        out, lse, _, draw = interface._flash_attn_varlen_forward(
            *(t.flatten(0, 1) for t in (q, k, v)), *starts, length, k.shape[1], **options
        )
        out, lse = out.view(q.shape), lse.view(heads, rows, length).transpose(0, 1)
    return out, lse, draw if setting.dropout else state(q, k, setting.dropout)


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
    rows, length, _, _ = q.shape
    options = {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "rng_state": state if setting.dropout else None,
        **_options(setting),
    }
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if setting.lengths is None:
        interface._flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, **options)
    else:
        starts = offsets(rows, length, k.shape[1], setting.lengths, q.device)
        flat = (t.flatten(0, 1) for t in (dout, q, k, v, out))
        interface._flash_attn_varlen_backward(
            *flat, lse.transpose(0, 1).flatten(1), *(t.flatten(0, 1) for t in (dq, dk, dv)), *starts,
            length, k.shape[1], **options,
        )  # fmt: skip
    return dq, dk, dv
