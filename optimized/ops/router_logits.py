"""Router logits as one operator, by the kernels of `optimized.kernels.router_logits` and `.token_gradient`.

PyTorch's way is autograd's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from optimized.ops.registration import differentiable, no_setup, refuse_to


@custom_op(
    "moa::router_logits",
    mutates_args=(),
    schema="(Tensor x, Tensor tokens, Tensor? mask, float? scale) -> (Tensor, Tensor, Tensor)",
)
def router_logits(x: Tensor, tokens: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, E, N) of x (B, N, D) against tokens (E, D) or (B, E, D), norms (B, N) of x, and factors (B, E).

    In at least float32. scale: of cosine routing, None for the plain product, without factors (scale over the norm of
    the routing token). Masked tokens have logit 0 and are not read.
    """
    from optimized.kernels import router_logits as kernel

    return kernel.router_logits(x, tokens, mask, scale)


@router_logits.register_fake
def _(x, tokens, mask, scale):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(torch.promote_types(x.dtype, tokens.dtype), torch.float32)
    batch, n, _ = x.shape
    experts = tokens.shape[-2]
    sizes = ((batch, experts, n), (batch, n), (batch, 0 if scale is None else experts))
    return tuple(x.new_empty(size, dtype=dtype) for size in sizes)


@custom_op(
    "moa::router_logits_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor tokens, Tensor? mask, Tensor logits, Tensor norms, Tensor factors)"
    " -> (Tensor, Tensor)",
)
def router_logits_backward(
    grad: Tensor, x: Tensor, tokens: Tensor, mask: Tensor | None, logits: Tensor, norms: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the tokens."""
    from optimized.kernels.router_logits import routing_token_gradient
    from optimized.kernels.token_gradient import RouterGradient, token_gradient

    router = RouterGradient(grad, logits, tokens, factors)
    dx = token_gradient(x, mask, norms, (), None, router)
    return dx, routing_token_gradient(grad, x, tokens, mask, logits, norms, factors)


@router_logits_backward.register_fake
def _(grad, x, tokens, mask, logits, norms, factors):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(tokens, memory_format=torch.contiguous_format),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
    return *project_backward(grad, *ctx.saved_tensors), None, None


project_backward = differentiable(router_logits_backward, no_setup, refuse_to("moa::router_logits", "double backward"))
project = differentiable(router_logits, _setup, _backward)
