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
