"""cuDNN's attention through PyTorch: the fastest without lengths, dropout and window, which it is not given here."""

from __future__ import annotations

import torch
from torch import Tensor

from optimized.attention import torch_flash
from optimized.attention.interface import Adapter, Attended, Pair, Setting, Triple
from optimized.attention.request import Request, constant, flash

aten = torch.ops.aten
# Its backward takes keys in tiles of so many. Where the last one is exactly half full, its other half is not hidden
# before exp(0 - lse); that overflows in rows whose log-sum-exp is below -88.7, and 0 * inf makes dq NaN. Seen with
# torch 2.11 and cuDNN 9.19 on an H100 and an H200, for every head dimension, dtype and number of queries tried,
# and with no other number of keys (each multiple of 8 up to 512, and odd ones); nothing but dq is wrong.
TILE = 128


class TorchCudnn(Adapter):
    note = (
        f"the backward is torch_flash's where {TILE // 2} keys are left over by {TILE}, since its own gives NaN there"
    )

    def obstacle(self, r: Request) -> str | None:
        if torch.are_deterministic_algorithms_enabled():
            return "its backward is not deterministic"
        return forward_obstacle(r)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Triple:
        turned = (t.transpose(1, 2) for t in (q, k, v))
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *turned, None, True, 0.0, False, False, scale=setting.scale
        )
        return out.transpose(1, 2), lse.view(lse.shape[:3]), self.state(q, k, setting.dropout)

    def backward(self, dout: Tensor, done: Attended, setting: Setting, into: Pair) -> Triple:
        q, k, v, out, lse, _ = done
        if ends_in_half_a_tile(k.shape[1]):
            return torch_flash.ADAPTER.backward(dout, done, setting, into)
        dout, *turned = (t.transpose(1, 2) for t in (dout, q, k, v, out))
        none = torch.empty(2, dtype=torch.int64, device=q.device)  # a draw of the dropout that there is not
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            dout, *turned, lse[..., None], none[0], none[1], None, None, None, q.shape[1], k.shape[1], 0.0, False,
            scale=setting.scale,
        )  # fmt: skip
        dq, dk, dv = (t.transpose(1, 2) for t in gradients)
        return dq, dk, dv


def ends_in_half_a_tile(keys: int) -> bool:
    """Where cuDNN's own backward may give NaN."""
    return keys % TILE == TILE // 2


def forward_obstacle(r: Request) -> str | None:
    if not r.allow_flash:
        return "flash_attn=False"
    if r.device.type == "cuda" and _unavailable() is not None:
        return _unavailable()
    if r.dropout or r.masked:
        return "used here without dropout and mask only"
    return flash(r, max_dim_head=128)


@constant
def _unavailable() -> str | None:
    return None if torch.backends.cudnn.is_available() else "cuDNN is not available"


ADAPTER = TorchCudnn()
