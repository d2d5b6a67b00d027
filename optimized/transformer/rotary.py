"""Rotary positions of dense layers and experts: the two halves of a head are turned by p * base**(-2j/d)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def angles_of(position: Int64[Tensor, "*any"], dim_head: int, base: float) -> Float[Tensor, "*any d"]:
    """In float64: in float32 position 100000 is off by 0.004 radians."""
    exponent = torch.arange(0, dim_head, 2, device=position.device, dtype=torch.float64) / -dim_head
    angles = position.to(torch.float64)[..., None] * base**exponent
    return torch.cat((angles, angles), -1)


def turned(t: Float[Tensor, "*any d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*any d"]:
    """In the dtype of cos and sin, returned in that of t."""
    wide = t.to(cos.dtype)
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-second, first), -1) * sin).to(t.dtype)
