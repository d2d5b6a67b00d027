"""Gather with RMSNorm as one operator, by the kernels of `optimized.kernels.gather_norm` and `.token_gradient`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from optimized.ops.registration import differentiable, no_setup, refuse_to


@custom_op(
    "moa::gather_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? gamma, Tensor indices, Tensor slots, Tensor inverse) -> (Tensor, Tensor)",
)
def gather_norm(
    x: Tensor, gamma: Tensor | None, indices: Tensor, slots: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Routed tokens (E, B, K, D) of x (B, N, D), each x / max(||x||, 1e-12) sqrt(D) gamma[e]; masked slots are 0.

    gamma: (E, D, 1), None for no norm. indices, slots (the slot mask): (B, E, K). inverse: (B, E, N), for the gradient.
    Also returns the norms of all tokens (B, N), empty without gamma.
    """
    from optimized.kernels import gather_norm as kernel

    norms = _no_norms(x) if gamma is None else kernel.token_norms(x)
    return kernel.gather_norm(x, norms, (kernel.Taken(indices, slots, gamma),))[0], norms


@gather_norm.register_fake
def _(x, gamma, indices, slots, inverse):  # type: ignore[no-untyped-def]
    batch, experts, k = indices.shape
    norms = _no_norms(x)
    norms = norms if gamma is None else norms.new_empty(x.shape[:2])
    return x.new_empty(experts, batch, k, x.shape[-1]), norms


def _no_norms(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


@custom_op(
    "moa::gather_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor? gamma, Tensor indices, Tensor slots, Tensor inverse, Tensor norms)"
    " -> (Tensor, Tensor)",
)
def gather_norm_backward(
    grad: Tensor, x: Tensor, gamma: Tensor | None, indices: Tensor, slots: Tensor, inverse: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and gamma (an empty tensor without gamma)."""
    from optimized.kernels import gather_norm as kernel
    from optimized.kernels.token_gradient import TakenRows, token_gradient

    dgamma, dots = x.new_empty(0), None
    if gamma is not None:
        (dgamma,), dots = kernel.slot_gradients(x, norms, (kernel.Taken(indices, slots, gamma),), (grad,))
    return token_gradient(x, None, norms, (TakenRows(grad, inverse, gamma),), dots, None), dgamma


@gather_norm_backward.register_fake
def _(grad, x, gamma, indices, slots, inverse, norms):  # type: ignore[no-untyped-def]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(0) if gamma is None else torch.empty_like(gamma, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    saved = ctx.saved_tensors
    dx, dgamma = gather_backward(grad, *saved)
    return dx, None if saved[1] is None else dgamma, None, None, None


gather_backward = differentiable(gather_norm_backward, no_setup, refuse_to("moa::gather_norm", "double backward"))
gather = differentiable(gather_norm, _setup, _backward)
