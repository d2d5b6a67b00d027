"""The two transposed token moves, by PyTorch's own kernels: tokens to the slots of the experts, and back.

Each is the other's gradient through the inverse map, so neither needs atomic additions.
Letters: B batch, N tokens, E experts, K slots per expert, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from optimized.ops.registration import differentiable


@custom_op("moa::dispatch", mutates_args=(), schema="(Tensor x, Tensor indices, Tensor mask, Tensor inverse) -> Tensor")
def dispatch(x: Tensor, indices: Tensor, mask: Tensor, inverse: Tensor) -> Tensor:
    """Routed tokens (E, B, K, D) of x (B, N, D), experts first for batched GEMMs; masked slots are 0."""
    batch = torch.arange(x.shape[0], device=x.device)[None, :, None]
    # Indexing copies the layout of its index, and the fake kernel promises a contiguous result.
    rows = x[batch, indices.transpose(0, 1).contiguous()]
    return rows.masked_fill_(~mask.transpose(0, 1)[..., None], 0)


@custom_op("moa::collect", mutates_args=(), schema="(Tensor y, Tensor indices, Tensor mask, Tensor inverse) -> Tensor")
def collect(y: Tensor, indices: Tensor, mask: Tensor, inverse: Tensor) -> Tensor:
    """Transpose of `dispatch`: (B, N, D), the sum over experts of y (E, B, K, D) at each token, 0 where none.

    Every token reads its rows, at most E, through the inverse map in the order of the experts: deterministic.
    Summed in at least float32, returned in y's dtype.
    """
    experts, batch, slots, dim = y.shape
    wide = torch.promote_types(y.dtype, torch.float32)
    out = y.new_zeros(batch, inverse.shape[-1], dim, dtype=wide)
    rows = torch.arange(batch, device=y.device)[:, None]
    for e in range(experts if slots else 0):
        slot = inverse[:, e].long()
        out += y[e][rows, slot.clamp_min(0)].masked_fill_((slot < 0)[..., None], 0)
    return out.to(y.dtype)


@dispatch.register_fake
def _(x, indices, mask, inverse):  # type: ignore[no-untyped-def]
    batch, experts, slots = indices.shape
    return x.new_empty(experts, batch, slots, x.shape[-1])


@collect.register_fake
def _(y, indices, mask, inverse):  # type: ignore[no-untyped-def]
    return y.new_empty(y.shape[1], inverse.shape[-1], y.shape[-1])


def _save_routing(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


gather_tokens = differentiable(
    dispatch,
    _save_routing,
    lambda ctx, g: (scatter_tokens(g, *ctx.saved_tensors), None, None, None),
    (0, 0, 0, 0),
    (1,),
)
scatter_tokens = differentiable(
    collect, _save_routing, lambda ctx, g: (gather_tokens(g, *ctx.saved_tensors), None, None, None), (1, 0, 0, 0), (0,)
)
