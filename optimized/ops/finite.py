"""What is not finite, kept from those that do not see it.

A kernel that hides a key by a weight of 0 multiplies it by 0, and 0 times NaN is NaN; so does a sum over keys in a
backward. What is not finite is therefore taken out before an attention, and results that see it become NaN after. Of a
query, key or value also numbers count whose products may overflow: more than 2**60, in float64 more than 2**500.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def largest(dtype: torch.dtype) -> float:
    """A number that may be multiplied by another, added up over channels, and once more by a gradient."""
    if dtype == torch.float16:  # products are in float32
        return torch.finfo(dtype).max
    return 2.0**500 if dtype == torch.float64 else 2.0**60


def odd_rows(t: Tensor) -> Tensor:
    """Rows (...) of t (..., d) with a number that is not finite, or too large."""
    return ~(t.abs() <= largest(t.dtype)).all(-1)


class Projected(torch.autograd.Function):
    """x w^T, of which w gets no gradient by rows of x (B, N, D) that are not finite.

    Who sees a key that is not finite passes it no gradient, and 0 times it would be NaN for all of w.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        dx = g @ w if ctx.needs_input_grad[0] else None
        dw = g.flatten(0, 1).mT @ finite_part(x).flatten(0, 1) if ctx.needs_input_grad[1] else None
        return dx, dw


def finite_part(x: Tensor) -> Tensor:
    """0 in place of what is not finite."""
    return x.masked_fill(~x.isfinite(), 0)
