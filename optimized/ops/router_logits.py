"""Router logits as one operator, by the kernel of `optimized.kernels.router_logits`; PyTorch's way is autograd's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from optimized.ops.registration import differentiable, no_setup, refuse_to


@custom_op(
    "moa::router_logits",
    mutates_args=(),
    schema="(Tensor x, Tensor tokens, Tensor? mask, float? scale) -> (Tensor, Tensor)",
)
def router_logits(x: Tensor, tokens: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """Logits (B, E, N) of x (B, N, D) against tokens (E, D) or (B, E, D), and norms (B, N); in at least float32.

    scale: of cosine routing, None for the plain product. Masked tokens have logit 0 and are not read.
    """
    from optimized.kernels import router_logits as kernel

    return kernel.router_logits(x, tokens, mask, scale)


@router_logits.register_fake
def _(x, tokens, mask, scale):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(torch.promote_types(x.dtype, tokens.dtype), torch.float32)
    batch, n, _ = x.shape
    return x.new_empty(batch, tokens.shape[-2], n, dtype=dtype), x.new_empty(batch, n, dtype=dtype)


@custom_op(
    "moa::router_logits_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor tokens, Tensor? mask, Tensor logits, Tensor norms, float? scale)"
    " -> (Tensor, Tensor)",
)
def router_logits_backward(
    grad: Tensor, x: Tensor, tokens: Tensor, mask: Tensor | None, logits: Tensor, norms: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the tokens."""
    from optimized.kernels import router_logits as kernel

    return kernel.router_logits_backward(grad, x, tokens, mask, logits, norms, scale)


@router_logits_backward.register_fake
def _(grad, x, tokens, mask, logits, norms, scale):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(tokens, memory_format=torch.contiguous_format),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, tokens, mask, ctx.scale = inputs
    ctx.save_for_backward(x, tokens, mask, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    return *project_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


project_backward = differentiable(router_logits_backward, no_setup, refuse_to("moa::router_logits", "double backward"))
project = differentiable(router_logits, _setup, _backward)
