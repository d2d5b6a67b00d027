"""flash-attn 2, package `flash_attn`: half precision, dropout, lengths, windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized.attention.interface import Adapter, Attended, Pair, Setting, Triple
from optimized.attention.lengths import offsets
from optimized.attention.request import Request, constant, flash, import_obstacle


class FlashAttn2(Adapter):
    windows = True

    def obstacle(self, r: Request) -> str | None:
        return flash(r, max_dim_head=256) or _build_obstacle(r.device, r.dtype, -(-r.dim_head // 8) * 8)

    def state(self, q: Tensor, k: Tensor, dropout: float) -> Tensor:
        """Seed and offset of the draw."""
        return torch.empty(2 if dropout else 0, dtype=torch.int64, device=q.device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Triple:
        rows, length, heads, _ = q.shape
        options = {"return_softmax": False, **_options(setting)}
        lengths = setting.visible.lengths
        if lengths is None:
            out, lse, _, draw = _interface()._flash_attn_forward(q, k, v, **options)
        else:
            starts = offsets(rows, length, k.shape[1], lengths, q.device)
            out, lse, _, draw = _interface()._flash_attn_varlen_forward(
                *(t.flatten(0, 1) for t in (q, k, v)), *starts, length, k.shape[1], **options
            )
            out, lse = out.view(q.shape), lse.view(heads, rows, length).transpose(0, 1)
        return out, lse, draw if setting.dropout else self.state(q, k, setting.dropout)

    def backward(self, dout: Tensor, done: Attended, setting: Setting, into: Pair) -> Triple:
        q, k, v, out, lse, state = done
        rows, length, _, _ = q.shape
        options = {
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "rng_state": state if setting.dropout else None,
            **_options(setting),
        }
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        found, lengths = (dq, *into), setting.visible.lengths
        if lengths is None:
            _interface()._flash_attn_backward(dout, q, k, v, out, lse, *found, **options)
        else:
            starts = offsets(rows, length, k.shape[1], lengths, q.device)
            flat = (t.flatten(0, 1) for t in (dout, q, k, v, out))
            _interface()._flash_attn_varlen_backward(
                *flat, lse.transpose(0, 1).flatten(1), *(t.flatten(0, 1) for t in found), *starts,
                length, k.shape[1], **options,
            )  # fmt: skip
        return found


def _options(setting: Setting) -> dict[str, Any]:
    left, right = setting.visible.sides
    return {
        "dropout_p": setting.dropout,
        "softmax_scale": setting.scale,
        "causal": False,  # said by the window
        "window_size_left": left,
        "window_size_right": right,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _interface() -> Any:
    import flash_attn.flash_attn_interface as interface

    return interface


@constant
def _build_obstacle(device: torch.device, dtype: torch.dtype, dim_head: int) -> str | None:
    """By a run, since a build may leave head dimensions out, which no version number tells."""
    missing = import_obstacle("flash_attn.flash_attn_interface", "flash-attn 2")
    if missing:
        return missing
    q = torch.zeros(1, 8, 1, dim_head, device=device, dtype=dtype)
    setting = Setting(scale=1.0)
    try:
        done = Attended(q, q, q, *ADAPTER.forward(q, q, q, setting))
        ADAPTER.backward(q, done, setting, (torch.empty_like(q), torch.empty_like(q)))
    except RuntimeError as error:
        return f"flash-attn 2 failed for dim_head {dim_head}: {str(error).splitlines()[0]}"
    return None


ADAPTER = FlashAttn2()
