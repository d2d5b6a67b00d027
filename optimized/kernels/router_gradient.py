"""Gradient of the tokens by router logits alone: see `token_gradient`, which adds those of rows that experts took.

With the gradient l' (B, R, N) of logits l, norms ||x||, and r = 1 / max(||x||, 1e-12)

    dx = sum_e l' cx cr r_e - x cx^2 sum_e l' l   (cx = cr = 1 and no second term but with cosine routing)

A program per tile of tokens of an item and block of channels, which reads each routing token once for all of them: a
program for each token reads eight rows of routing tokens for one of x, and takes an eighth longer.

Blind spots: what cosine routing needs of a token besides x is made by every block of channels anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import arithmetic, cdiv, clamped_norm, contiguous, launch, next_power_of_2, norm_floor
from optimized.kernels.router_logits import item_rows

TOKENS = 8  # of a tile, half as many in float64
CHANNELS = 256


class RouterGradient(NamedTuple):
    """Of the logits, with what `router_logits` took and returned."""

    gradient: Tensor  # (B, R, N)
    logits: Tensor  # (B, R, N)
    tokens: Tensor  # (R, D) or (B, R, D)
    factors: Tensor  # (B, R), empty without cosine routing


@triton.jit(do_not_specialize=["n", "experts", "item_rows"])
def _router_gradient_kernel(
    x_ptr, mask_ptr, norms_ptr, dlogits_ptr, logits_ptr, r_ptr, factors_ptr, dx_ptr, n, dim, experts, item_rows,
    COSINE: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, TOKENS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    position = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < dim
    there = position < n
    token = b * n + position
    shown = there
    if HAS_MASK:
        shown = tl.load(mask_ptr + token, mask=there, other=0) != 0
    tile = token[:, None] * dim + channels[None, :]
    inverse_norm = tl.full((TOKENS,), 1.0, DTYPE)
    norm = inverse_norm
    if COSINE:
        norm = tl.load(norms_ptr + token, mask=shown, other=1.0)
        inverse_norm = 1.0 / clamped_norm(norm)
    total = tl.zeros((TOKENS, BLOCK_D), DTYPE)
    moment = tl.zeros((TOKENS,), DTYPE)
    for e in range(experts):
        at = (b * experts + e) * n + position
        weight = tl.load(dlogits_ptr + at, mask=shown, other=0.0).to(DTYPE)
        if COSINE:
            moment += weight * tl.load(logits_ptr + at, mask=shown, other=0.0)
            weight *= inverse_norm * tl.load(factors_ptr + b * experts + e)
        r = tl.load(r_ptr + (b * item_rows + e) * dim + channels, mask=inside, other=0.0).to(DTYPE)
        total += weight[:, None] * r[None, :]
    if COSINE:
        x = tl.load(x_ptr + tile, mask=shown[:, None] & inside[None, :], other=0.0).to(DTYPE)
        slope = tl.where(norm > norm_floor(norm), moment * inverse_norm * inverse_norm, 0.0)
        total -= x * slope[:, None]
    # Of a masked token nothing: a routing token may be NaN, and 0 * NaN is NaN.
    total = tl.where(shown[:, None], total, 0.0)
    tl.store(dx_ptr + tile, total.to(dx_ptr.dtype.element_ty), mask=there[:, None] & inside[None, :])


def router_gradient(x: Tensor, mask: Tensor | None, norms: Tensor, router: RouterGradient) -> Tensor:
    """dx in x's dtype. x (B, N, D), norms (B, N)."""
    batch, n, dim = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        dtype, tokens = arithmetic(norms.dtype), router.tokens.contiguous()
        rows = TOKENS // 2 if dtype == tl.float64 else TOKENS
        block_d = min(next_power_of_2(dim), CHANNELS)
        launch(
            _router_gradient_kernel, (batch * cdiv(n, rows), cdiv(dim, block_d)),
            x.contiguous(), contiguous(mask), norms.contiguous(), router.gradient.contiguous(),
            router.logits.contiguous(), tokens, router.factors.contiguous(), dx,
            n, dim, router.gradient.shape[1], item_rows(tokens),
            COSINE=router.factors.numel() > 0, HAS_MASK=mask is not None, DTYPE=dtype, TOKENS=rows, BLOCK_D=block_d,
            num_warps=1,
        )  # fmt: skip
    return dx
