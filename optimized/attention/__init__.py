"""Attention kernels behind one interface: raw forward with log-sum-exp, raw backward. One file per package.

Each module but `flex_window`, which has no raw form, has

    forward(q, k, v, setting) -> (out, lse, state)
    backward(dout, q, k, v, out, lse, state, setting, dk, dv) -> (dq, dk, dv)
    state(q, k, dropout) -> an empty tensor of the shape and dtype that `state` of forward has

q (R, L, H, d), k and v (R, S, H, d), d padded with zeros; L, S >= 1. lse (R, H, L); that of a row without keys is
whatever the kernel leaves. state: what a backward must know of the random draw.

dk and dv of the arguments are buffers shaped as k and v: a backward that can write there does, and returns them; others
return tensors of their own.

The backward forms P = exp(s - lse) and delta = <dout, out> from what it is handed, so that handing it the out and lse
of attention over more keys than k gives the exact gradients of q's, k's and v's part (see `kernels.null_slot`).
dk and dv of hidden keys are 0.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """What both directions of a call share."""

    scale: float  # of the logits: 1 / sqrt(d) of the unpadded d
    lengths: Tensor | None = None  # (R) int32: the first keys of a row that take part; None for all
    dropout: float = 0.0
    window: int = -1  # |i - j| <= window, or 0 <= i - j <= window if causal; -1 for none
    causal: bool = False

    @property
    def sides(self) -> tuple[int, int]:
        """How far the window reaches to the left and to the right; -1 for no limit."""
        return self.window, 0 if self.causal and self.window >= 0 else self.window


# Head dimensions are padded to a multiple of this, else of 8. flash-attn 4 (4.0.0b36, H100) takes multiples of 8, but
# its dq is wrong beyond the first 64 queries where the dimension is 8 or 16 more than a multiple of 32.
ALIGNMENT = {"math": 1, "torch_flash_cpu": 1, "flash_attn_4": 32, "cudnn_flash_attn_4": 32}


@functools.cache
def adapter(name: str) -> ModuleType:
    """The module of a backend; imports its package."""
    return importlib.import_module(f"optimized.attention.{name}")


def module_name(backend: str, device: torch.device) -> str:
    """PyTorch's flash attention is another operator on the CPU."""
    return "torch_flash_cpu" if backend == "torch_flash" and device.type == "cpu" else backend


def alignment(name: str) -> int:
    return ALIGNMENT.get(name, 8)
