"""Combination as one operator, by the kernel of `optimized.kernels.combine`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from optimized.ops.registration import differentiable, no_setup, refuse_to

_ARGUMENTS = (
    "Tensor y, Tensor scores, Tensor indices, Tensor slots, Tensor inverse, Tensor? local, Tensor? null, Tensor? mask,"
    " bool average, ScalarType dtype"
)


@custom_op("moa::combine", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def combine(
    y: Tensor,
    scores: Tensor,
    indices: Tensor,
    slots: Tensor,
    inverse: Tensor,
    local: Tensor | None,
    null: Tensor | None,
    mask: Tensor | None,
    average: bool,
    dtype: torch.dtype,
) -> Tensor:
    """(B, N, D) in `dtype`: the sum over experts of score times y (E, B, K, D) at each token, plus local (B, N, D).

    average: divided by the number of terms. null (D numbers) where there is none; 0 where mask (B, N) is False.
    scores, indices, slots (the slot mask): (B, E, K); inverse: (B, E, N).
    """
    from optimized.kernels import combine as kernel

    return kernel.combine(y, scores, inverse, local, null, mask, average, dtype)


@combine.register_fake
def _(y, scores, indices, slots, inverse, local, null, mask, average, dtype):  # type: ignore[no-untyped-def]
    return y.new_empty(y.shape[1], inverse.shape[-1], y.shape[-1], dtype=dtype)


@custom_op(
    "moa::combine_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def combine_backward(
    grad: Tensor,
    y: Tensor,
    scores: Tensor,
    indices: Tensor,
    slots: Tensor,
    inverse: Tensor,
    local: Tensor | None,
    null: Tensor | None,
    mask: Tensor | None,
    average: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, scores, local and null; empty for one that is absent."""
    from optimized.kernels import combine as kernel

    found = kernel.combine_backward(grad, y, scores, indices, slots, inverse, local, null, mask, average)
    dy, dscores, dlocal, dnull = (y.new_empty(0) if t is None else t for t in found)
    return dy, dscores, dlocal, dnull


@combine_backward.register_fake
def _(grad, y, scores, indices, slots, inverse, local, null, mask, average, dtype):  # type: ignore[no-untyped-def]
    return tuple(
        y.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (y, scores, local, null)
    )


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.constants = inputs[8:]


def _backward(ctx: Any, grad: Tensor) -> tuple:
    saved = ctx.saved_tensors
    dy, dscores, *found = merge_backward(grad, *saved, *ctx.constants)
    optional = (None if given is None else gradient for given, gradient in zip(saved[5:7], found))
    return dy, dscores, None, None, None, *optional, None, None, None


merge_backward = differentiable(combine_backward, no_setup, refuse_to("moa::combine", "double backward"))
merge_experts = differentiable(combine, _setup, _backward)
