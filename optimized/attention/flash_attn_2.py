"""flash-attn 2, package `flash_attn`: half precision, dropout, lengths, windows."""

from __future__ import annotations

import flash_attn.flash_attn_interface as interface
import torch
from torch import Tensor

from optimized.attention.lengths import offsets


def state(q: Tensor, k: Tensor, dropout: float) -> Tensor:
    """Seed and offset of the draw."""
    return torch.empty(2 if dropout else 0, dtype=torch.int64, device=q.device)


def _options(window: int, causal: bool) -> dict[str, object]:
    right = 0 if causal and window >= 0 else window
    return {"window_size_left": window, "window_size_right": right, "softcap": 0.0, "alibi_slopes": None}


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, dropout: float, window: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, heads, _ = q.shape
    arguments = {"dropout_p": dropout, "softmax_scale": scale, "causal": False, **_options(window, causal)}
    if lengths is None:
        out, lse, _, draw = interface._flash_attn_forward(q, k, v, return_softmax=False, **arguments)
    else:
        starts = offsets(rows, length, k.shape[1], lengths, q.device)
        out, lse, _, draw = interface._flash_attn_varlen_forward(
            *(t.flatten(0, 1) for t in (q, k, v)), *starts, length, k.shape[1], return_softmax=False, **arguments
        )
        out, lse = out.view(q.shape), lse.view(heads, rows, length).transpose(0, 1)
    return out, lse, draw if dropout else state(q, k, dropout)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor,
    lengths: Tensor | None,
    dropout: float,
    window: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, _, _ = q.shape
    arguments = {
        "dropout_p": dropout,
        "softmax_scale": scale,
        "causal": False,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "rng_state": state if dropout else None,
        **_options(window, causal),
    }
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if lengths is None:
        interface._flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, **arguments)
    else:
        starts = offsets(rows, length, k.shape[1], lengths, q.device)
        flat = (t.flatten(0, 1) for t in (dout, q, k, v, out))
        interface._flash_attn_varlen_backward(
            *flat, lse.transpose(0, 1).flatten(1), *(t.flatten(0, 1) for t in (dq, dk, dv)), *starts,
            length, k.shape[1], **arguments,
        )  # fmt: skip
    return dq, dk, dv
