"""flash-attn 4, package `flash_attn.cute`: half precision on Hopper and newer, lengths, windows; no dropout."""

from __future__ import annotations

from typing import Any

import torch
from flash_attn.cute import interface
from torch import Tensor


def state(q: Tensor, k: Tensor, dropout: float) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=q.device)


def _options(scale: float, lengths: Tensor | None, window: int, causal: bool) -> dict[str, Any]:
    sides = (None, None) if window < 0 else (window, 0 if causal else window)
    return {
        "softmax_scale": scale,
        "window_size_left": sides[0],
        "window_size_right": sides[1],
        "seqused_k": lengths,
    }


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, dropout: float, window: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, *_ = interface._flash_attn_fwd(q, k, v, return_lse=True, **_options(scale, lengths, window, causal))
    return out, lse, state(q, k, dropout)


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
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Hidden keys are not written.
    make = torch.empty if lengths is None else torch.zeros
    dk, dv = (make(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    dq, dk, dv, *_ = interface._flash_attn_bwd(
        q, k, v, out, dout, lse, dq=dq, dk=dk, dv=dv,
        deterministic=torch.are_deterministic_algorithms_enabled(), **_options(scale, lengths, window, causal),
    )  # fmt: skip
    return dq, dk, dv
