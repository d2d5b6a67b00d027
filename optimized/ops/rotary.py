"""Rotary embedding as one operator, by the kernel of `optimized.kernels.rotary`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from optimized.ops.registration import differentiable


@custom_op(
    "moa::rotary",
    mutates_args=(),
    schema="(Tensor t, Tensor cos, Tensor sin, Tensor? positions, bool transposed) -> Tensor",
)
def rotary(t: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, transposed: bool) -> Tensor:
    """t (R, L, H, d) rotated by the angles at its positions (R, L), or at 0 .. L-1. cos, sin: (P, d) tables.

    transposed: the transpose of that linear map, which is its gradient.
    """
    from optimized.kernels import rotary as kernel

    return kernel.rotate(t, cos, sin, positions, transposed)


@rotary.register_fake
def _(t, cos, sin, positions, transposed):  # type: ignore[no-untyped-def]
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _rotary_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, cos, sin, positions, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin, positions)


def _rotary_backward(ctx: Any, grad: Tensor) -> tuple:
    return turn(grad, *ctx.saved_tensors, not ctx.transposed), None, None, None, None


turn = differentiable(rotary, _rotary_setup, _rotary_backward)


def rotate_into(
    out: Tensor, t: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, transposed: bool, triton: bool
) -> None:
    """`rotary` for operators that contain it, into out, which may be t; by its kernel or by PyTorch."""
    if triton:
        from optimized.kernels import rotary as kernel

        kernel.rotate_into(out, t, cos, sin, positions, transposed)
        return
    half = t.shape[-1] // 2
    # t cos + (-t2, t1) sin; transposed: t cos + (t2 sin2, -t1 sin1).
    sign = torch.ones(t.shape[-1], dtype=sin.dtype, device=t.device)
    sign[:half] = -1
    at = slice(None) if positions is None else positions
    cos, signed = (table[at].unsqueeze(-2) for table in (cos, sin * sign))
    wide = t.to(cos.dtype)
    turned = (wide * signed).roll(half, -1) if transposed else wide.roll(half, -1) * signed
    out.copy_(wide * cos + turned)


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
