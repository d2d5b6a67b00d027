"""Rotary embedding and value scores as operators, by the kernels of `optimized.kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from optimized.ops.registration import differentiable, no_setup, refuse_to


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


@custom_op("moa::value_score", mutates_args=(), schema="(Tensor v, Tensor scores) -> Tensor")
def value_score(v: Tensor, scores: Tensor) -> Tensor:
    """Values (R, L, H, d) times the scores (R, L) of their slots, in v's dtype."""
    from optimized.kernels import value_score as kernel

    return kernel.value_score(v, scores)


@value_score.register_fake
def _(v, scores):  # type: ignore[no-untyped-def]
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@custom_op(
    "moa::value_score_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor v, Tensor scores) -> (Tensor, Tensor)",
)
def value_score_backward(grad: Tensor, v: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of v and of the scores."""
    from optimized.kernels import value_score as kernel

    return kernel.value_score_backward(grad, v, scores)


@value_score_backward.register_fake
def _(grad, v, scores):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (v, scores))


def _score_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


scale_backward = differentiable(value_score_backward, no_setup, refuse_to("moa::value_score", "double backward"))
scale_values = differentiable(value_score, _score_setup, lambda ctx, grad: scale_backward(grad, *ctx.saved_tensors))
