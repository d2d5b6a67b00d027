"""Gradient of the tokens, assembled in one pass from rows that experts took and from router logits.

x (B, N, D). Up to two groups of E experts took rows of x (see `gather_norm`): gradients g (E, B, K, D) of these,
inverse maps (B, E, N), gamma (E, D), and dots <gamma g, x> of every row, by blocks of channels. The norm of a token
does not depend on the expert, so with h = sum_e gamma[e] g[e, slot of n] over all experts that took it, and
r = 1 / max(||x||, 1e-12),

    dx = sqrt(D) r (h - x r^2 <x, h>)           (second term absent where ||x|| <= 1e-12; without norm dx = h)

The router adds, with the gradient l' (B, R, N) of its logits l (see `router_logits`)

    dx += sum_e l' cx cr r_e - x cx^2 sum_e l' l   (cx = cr = 1 and no second term but with cosine routing)

A program per tile of tokens and channels; experts in their order, so always the same bits. A token that nobody took is
not read but for cosine routing: it may hold NaN.

Blind spots: every tile asks the inverse maps of all experts, whether they took a token of it or not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import arithmetic, as_bytes, cdiv, contiguous, launch, next_power_of_2
from optimized.kernels.router_logits import item_stride


class TakenRows(NamedTuple):
    """What the experts of a group have for the tokens that they took."""

    gradient: Tensor  # (E, B, K, D)
    inverse: Tensor  # (B, E, N) int32
    gamma: Tensor | None  # (E, D)


class RouterGradient(NamedTuple):
    """Of the logits, with what `router_logits` took and returned."""

    gradient: Tensor  # (B, R, N)
    logits: Tensor  # (B, R, N)
    tokens: Tensor  # (R, D) or (B, R, D)
    factors: Tensor  # (B, R), empty without cosine routing


@triton.jit
def _add_rows(
    total, dot, taken, g_ptr, inverse_ptr, gamma_ptr, dots_ptr, b, rows, channels, n, k, dim, batch, experts,
    channel_blocks, all_rows, HAS_NORM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """h, <x, h>, and which tokens were taken, with one group of experts more."""
    inside = channels < dim
    for e in range(experts):
        slot = tl.load(inverse_ptr + (b * experts + e) * n + rows, mask=rows < n, other=-1).to(tl.int64)
        here = slot >= 0
        row = (e * batch + b) * k + slot
        g = tl.load(g_ptr + row[:, None] * dim + channels[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        g = g.to(DTYPE)
        if HAS_NORM:
            gamma = tl.load(gamma_ptr + tl.cast(e, tl.int64) * dim + channels, mask=inside, other=0.0).to(DTYPE)
            g *= gamma[None, :]
            for block in range(channel_blocks):
                dot += tl.load(dots_ptr + tl.cast(block, tl.int64) * all_rows + row, mask=here, other=0.0)
        total += g
        taken |= here.to(tl.int32)
    return total, dot, taken


@triton.jit(
    do_not_specialize=[
        *("n", "k_0", "k_1", "batch", "experts", "router_experts", "item_stride", "root_dim"),
        *("channel_blocks", "all_rows", "rows_0"),
    ]
)
def _tokens_gradient_kernel(
    x_ptr, mask_ptr, norms_ptr, g_0, inverse_0, gamma_0, g_1, inverse_1, gamma_1, dots_ptr,
    dlogits_ptr, logits_ptr, r_ptr, factors_ptr, dx_ptr,
    n, k_0, k_1, dim, batch, experts, router_experts, item_stride, root_dim, channel_blocks, all_rows, rows_0,
    GROUPS: tl.constexpr, HAS_NORM: tl.constexpr, ROUTER: tl.constexpr, COSINE: tl.constexpr, HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rows_0: rows of the first group, whose dots come first."""
    tiles = tl.cdiv(n, BLOCK_N)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < dim
    tile = (b * n + rows[:, None]) * dim + channels[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    taken = tl.zeros((BLOCK_N,), tl.int32)
    dot = tl.zeros((BLOCK_N,), DTYPE)
    if GROUPS > 0:
        total, dot, taken = _add_rows(
            total, dot, taken, g_0, inverse_0, gamma_0, dots_ptr, b, rows, channels, n, k_0, dim, batch, experts,
            channel_blocks, all_rows, HAS_NORM, DTYPE,
        )  # fmt: skip
    if GROUPS > 1:
        total, dot, taken = _add_rows(
            total, dot, taken, g_1, inverse_1, gamma_1, dots_ptr + rows_0, b, rows, channels, n, k_1, dim, batch,
            experts, channel_blocks, all_rows, HAS_NORM, DTYPE,
        )  # fmt: skip
    slope = tl.zeros((BLOCK_N,), DTYPE)  # of the term in x
    norms = tl.full((BLOCK_N,), 1.0, DTYPE)
    shown = rows < n
    if ROUTER:
        if HAS_MASK:
            shown = tl.load(mask_ptr + b * n + rows, mask=shown, other=0) != 0
    else:
        shown = taken > 0
    if HAS_NORM or COSINE:
        norms = tl.load(norms_ptr + b * n + rows, mask=shown, other=1.0)
    inverse_norms = 1.0 / tl.maximum(norms, 1e-12)
    if HAS_NORM:
        # root_dim = dim, as an integer: a Python float would arrive in float32.
        scale = tl.sqrt(tl.cast(root_dim, tl.float64)).to(DTYPE) * inverse_norms
        # A token that nobody took has no part in this, though its norm may be NaN.
        total = tl.where((taken > 0)[:, None], total * scale[:, None], 0.0)
        slope = tl.where((taken > 0) & (norms > 1e-12), scale * ((dot * inverse_norms) * inverse_norms), 0.0)
    if ROUTER:
        moment = tl.zeros((BLOCK_N,), DTYPE)
        for e in range(router_experts):
            place = (b * router_experts + e) * n + rows
            weight = tl.load(dlogits_ptr + place, mask=shown, other=0.0).to(DTYPE)
            r_row = r_ptr + b * item_stride + tl.cast(e, tl.int64) * dim
            r = tl.load(r_row + channels, mask=inside, other=0.0).to(DTYPE)
            if COSINE:
                moment += weight * tl.load(logits_ptr + place, mask=shown, other=0.0)
                weight *= inverse_norms * tl.load(factors_ptr + b * router_experts + e)
            total += weight[:, None] * r[None, :]
        if COSINE:
            slope += tl.where(norms > 1e-12, moment * inverse_norms * inverse_norms, 0.0)
    if HAS_NORM or COSINE:
        read = shown if COSINE else taken > 0
        x = tl.load(x_ptr + tile, mask=read[:, None] & inside[None, :], other=0.0).to(DTYPE)
        total -= x * slope[:, None]
    if ROUTER:
        total = tl.where(shown[:, None], total, 0.0)  # a routing token may be NaN, and 0 * NaN is NaN
    tl.store(dx_ptr + tile, total.to(dx_ptr.dtype.element_ty), mask=(rows < n)[:, None] & inside[None, :])


def token_gradient(
    x: Tensor,
    mask: Tensor | None,
    norms: Tensor,
    taken: tuple[TakenRows, ...],
    dots: Tensor | None,
    router: RouterGradient | None,
) -> Tensor:
    """dx in x's dtype. norms (B, N); dots: of `gather_norm.slot_gradients` (channel blocks, rows of all groups), None
    without gamma. mask: of the router.
    """
    batch, n, dim = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return dx
    x, norms = x.contiguous(), norms.contiguous()
    dots = norms if dots is None else dots.contiguous()
    absent = TakenRows(x, x, None)
    first, second = (*taken, absent, absent)[:2]
    has_norm = first.gamma is not None
    k_0, k_1 = ([rows.gradient.shape[2] for rows in taken] + [0, 0])[:2]
    experts = taken[0].inverse.shape[1] if taken else 0
    groups = [part for rows in (first, second) for part in (rows.gradient, rows.inverse, rows.gamma)]
    tokens = x if router is None else router.tokens.contiguous()
    parts = (None,) * 4 if router is None else (router.gradient, router.logits, tokens, router.factors)
    double = norms.dtype == torch.float64
    block_d = min(64 if double else 256, max(next_power_of_2(dim), 16))
    launch(
        _tokens_gradient_kernel, (batch * cdiv(n, 16), cdiv(dim, block_d)),
        x, as_bytes(mask), norms, *(contiguous(part) for part in groups), dots, *(contiguous(p) for p in parts), dx,
        n, k_0, k_1, dim, batch, experts, 0 if router is None else router.gradient.shape[1], item_stride(tokens),
        dim, dots.shape[0], dots.shape[-1], experts * batch * k_0,
        GROUPS=len(taken), HAS_NORM=has_norm, ROUTER=router is not None,
        COSINE=router is not None and router.factors.numel() > 0, HAS_MASK=mask is not None,
        DTYPE=arithmetic(norms.dtype), BLOCK_N=16, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return dx
