"""Gather with RMSNorm as one operator, by the kernel of `optimized.kernels.gather_norm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from optimized.ops.registration import differentiable, no_setup, refuse_to


@custom_op(
    "moa::gather_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? gamma, Tensor indices, Tensor slots, Tensor inverse) -> Tensor",
)
def gather_norm(x: Tensor, gamma: Tensor | None, indices: Tensor, slots: Tensor, inverse: Tensor) -> Tensor:
    """Routed tokens (E, B, K, D) of x (B, N, D), each x / max(||x||, 1e-12) sqrt(D) gamma[e]; masked slots are 0.

    gamma: (E, D), None for no norm. indices, slots (the slot mask): (B, E, K). inverse: (B, E, N), for the gradient.
    """
    from optimized.kernels import gather_norm as kernel

    return kernel.gather_norm(x, indices, slots, gamma)


@gather_norm.register_fake
def _(x, gamma, indices, slots, inverse):  # type: ignore[no-untyped-def]
    batch, experts, k = indices.shape
    return x.new_empty(experts, batch, k, x.shape[-1])


@custom_op(
    "moa::gather_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor? gamma, Tensor indices, Tensor slots, Tensor inverse) -> (Tensor, Tensor)",
)
def gather_norm_backward(
    grad: Tensor, x: Tensor, gamma: Tensor | None, indices: Tensor, slots: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and gamma (an empty tensor without gamma)."""
    from optimized.kernels import gather_norm as kernel

    dx, dgamma = kernel.gather_norm_backward(grad, x, indices, slots, inverse, gamma)
    return dx, x.new_empty(0) if dgamma is None else dgamma


@gather_norm_backward.register_fake
def _(grad, x, gamma, indices, slots, inverse):  # type: ignore[no-untyped-def]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(0) if gamma is None else torch.empty_like(gamma, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    saved = ctx.saved_tensors
    dx, dgamma = gather_backward(grad, *saved)
    return dx, None if saved[1] is None else dgamma, None, None, None


gather_backward = differentiable(gather_norm_backward, no_setup, refuse_to("moa::gather_norm", "double backward"))
gather = differentiable(gather_norm, _setup, _backward)
