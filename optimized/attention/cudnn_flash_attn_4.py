"""Forward by cuDNN, backward by flash-attn 4: the faster of either on Hopper, at 1024 keys and head dimension 64.

They may be mixed, since a backward knows of its forward the result and the log-sum-exp alone, in the same form.
"""

from __future__ import annotations

from torch import Tensor

from optimized.attention import torch_cudnn
from optimized.attention.flash_attn_4 import FlashAttn4
from optimized.attention.interface import Setting, Triple
from optimized.attention.request import Request


class CudnnFlashAttn4(FlashAttn4):
    windows = False

    def obstacle(self, r: Request) -> str | None:
        return torch_cudnn.forward_obstacle(r) or super().obstacle(r)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Triple:
        return torch_cudnn.ADAPTER.forward(q, k, v, setting)


ADAPTER = CudnnFlashAttn4()
