"""Rotary embedding of queries or keys at their positions, as one operator: by a Triton kernel, or by PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized.ops.operator import operator


@operator(
    "(Tensor t, Tensor cos, Tensor sin, Tensor? positions, bool transposed, bool triton) -> Tensor out",
    wrt="t",
    gradients_of="out",
    saves="t cos sin positions",
)
class rotary:
    """t (R, L, H, d) rotated by the angles at its positions (R, L), or at 0 .. L-1. cos, sin: (P, d) tables.

    transposed: the transpose of that linear map, which is its gradient.
    """

    def forward(a: Any) -> Tensor:
        out = torch.empty(a.t.shape, dtype=a.t.dtype, device=a.t.device)
        rotate_into(out, a.t, (a.cos, a.sin, a.positions), a.transposed, a.triton)
        return out

    def fake(a: Any) -> Tensor:
        return torch.empty_like(a.t, memory_format=torch.contiguous_format)

    def backward(a: Any, g: Any, needs: Any) -> Any:
        return {"t": rotary.raw(g.out, a.cos, a.sin, a.positions, not a.transposed, a.triton)}  # type: ignore[attr-defined]


Angles = tuple[Tensor, Tensor, Tensor | None]  # tables of cos and sin (P, d), and positions in them (R, L), or 0 .. L-1


def rotate_into(out: Tensor, t: Tensor, angles: Angles, transposed: bool, triton: bool) -> None:
    """`rotary` for operators that contain it, into out, which may be t."""
    if triton:
        from optimized.kernels import rotary as kernel

        kernel.rotate_into(out, t, *angles, transposed)
        return
    cos, sin, positions = angles
    at = slice(t.shape[1]) if positions is None else positions
    (cos1, cos2), (sin1, sin2) = (table[at].unsqueeze(-2).chunk(2, -1) for table in (cos, sin))
    t1, t2 = t.to(cos.dtype).chunk(2, -1)
    if transposed:
        first, second = torch.addcmul(t1 * cos1, t2, sin2), torch.addcmul(t2 * cos2, t1, sin1, value=-1)
    else:
        first, second = torch.addcmul(t1 * cos1, t2, sin1, value=-1), torch.addcmul(t2 * cos2, t1, sin2)
    for half, turned in zip(out.chunk(2, -1), (first, second)):
        half.copy_(turned)


def rotary_tables(
    n: int, dim_head: int, device: torch.device, dtype: torch.dtype, triton: bool = False
) -> tuple[Tensor, Tensor]:
    """cos and sin (N, d) of i * 10000**(-2j/d), j = 0 .. d/2 - 1 twice side by side, made in float64.

    triton: for operators that contain it.
    """
    if triton:
        from optimized.kernels import rotary as kernel

        return kernel.tables(n, dim_head, device, dtype)
    frequency = torch.arange(0, dim_head, 2, device=device, dtype=torch.float64).mul(-1 / dim_head)
    angles = torch.outer(torch.arange(n, device=device, dtype=torch.float64), 10000.0**frequency)
    return angles.cos().to(dtype).repeat(1, 2), angles.sin().to(dtype).repeat(1, 2)
