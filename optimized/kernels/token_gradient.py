"""Gradient of the tokens, assembled in one pass from rows that experts took and from router logits.

x (B, N, D). Up to two groups of E experts took rows of x (see `gather_norm`): gradients g (E, B, K, D) of these,
inverse maps (B, E, N), gamma (E, D), and dots <gamma g, x> of every row, by blocks of channels. The norm of a token
does not depend on the expert, so with h = sum_e gamma[e] g[e, slot of n] over all experts that took it, and
r = 1 / max(||x||, 1e-12),

    dx = sqrt(D) r (h - x r^2 <x, h>)           (second term absent where ||x|| <= 1e-12; without norm dx = h)

The router adds, with the gradient l' (B, R, N) of its logits l (see `router_logits`)

    dx += sum_e l' cx cr r_e - x cx^2 sum_e l' l   (cx = cr = 1 and no second term but with cosine routing)

A program has some tokens of an item and some channels: a routing token is read once for all of them, and inverse maps
and gradients of logits lie side by side. Of four experts at a time it asks whether any has one of its tokens; if so,
their rows are on their way together, and are added in the order of the experts, so always the same bits. A token that
nobody took is not read but for cosine routing: it may hold NaN.

Blind spots: norms, dots and the second term's sum are made anew for each block of channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import arithmetic, cdiv, contiguous, launch, next_power_of_2
from optimized.kernels.router_logits import item_rows

EXPERTS = 4  # of `_add_rows` at a time
TILE = 4096  # numbers of a program
MOST_CHANNELS = 128


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
def _slots_of(inverse_ptr, b, e, position, shown, n, experts):
    """What an expert says of the tokens; -1 of none."""
    known = tl.zeros_like(position) + e < experts
    return tl.load(inverse_ptr + (b * experts + e) * n + position, mask=shown & known, other=-1)


@triton.jit
def _add_row(
    total, dot, slots, e, g_ptr, gamma_ptr, dots_ptr, b, channels, k, dim, batch, experts, channel_blocks, all_rows,
    HAS_NORM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    taken = slots >= 0
    inside = channels < dim
    row = (tl.cast(e, tl.int64) * batch + b) * k + slots
    read = taken[:, None] & inside[None, :]
    g = tl.load(g_ptr + row[:, None] * dim + channels[None, :], mask=read, other=0.0).to(DTYPE)
    if HAS_NORM:
        known = inside & (tl.zeros_like(channels) + e < experts)
        gamma = tl.load(gamma_ptr + tl.cast(e, tl.int64) * dim + channels, mask=known, other=0.0).to(DTYPE)
        g = tl.where(taken[:, None], g * gamma[None, :], 0.0)  # a scale may be NaN
        for block in range(channel_blocks):
            dot += tl.load(dots_ptr + tl.cast(block, tl.int64) * all_rows + row, mask=taken, other=0.0)
    return total + g, dot


@triton.jit
def _add_rows(
    total, dot, count, inverse_ptr, g_ptr, gamma_ptr, dots_ptr, b, position, shown, channels, n, k, dim, batch, experts,
    channel_blocks, all_rows,
    HAS_NORM: tl.constexpr, DTYPE: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """h, <x, h>, and by how many experts a token was taken, with a group more."""
    for e in range(0, experts, EXPERTS):
        first = _slots_of(inverse_ptr, b, e, position, shown, n, experts)
        second = _slots_of(inverse_ptr, b, e + 1, position, shown, n, experts)
        third = _slots_of(inverse_ptr, b, e + 2, position, shown, n, experts)
        fourth = _slots_of(inverse_ptr, b, e + 3, position, shown, n, experts)
        count += (first >= 0).to(tl.int32) + (second >= 0).to(tl.int32)
        count += (third >= 0).to(tl.int32) + (fourth >= 0).to(tl.int32)
        if tl.max(tl.maximum(tl.maximum(first, second), tl.maximum(third, fourth))) >= 0:
            total, dot = _add_row(
                total, dot, first, e, g_ptr, gamma_ptr, dots_ptr, b, channels, k, dim, batch, experts, channel_blocks,
                all_rows, HAS_NORM, DTYPE,
            )  # fmt: skip
            total, dot = _add_row(
                total, dot, second, e + 1, g_ptr, gamma_ptr, dots_ptr, b, channels, k, dim, batch, experts,
                channel_blocks, all_rows, HAS_NORM, DTYPE,
            )  # fmt: skip
            total, dot = _add_row(
                total, dot, third, e + 2, g_ptr, gamma_ptr, dots_ptr, b, channels, k, dim, batch, experts,
                channel_blocks, all_rows, HAS_NORM, DTYPE,
            )  # fmt: skip
            total, dot = _add_row(
                total, dot, fourth, e + 3, g_ptr, gamma_ptr, dots_ptr, b, channels, k, dim, batch, experts,
                channel_blocks, all_rows, HAS_NORM, DTYPE,
            )  # fmt: skip
    return total, dot, count


@triton.jit(
    do_not_specialize=[
        *("n", "k_0", "k_1", "batch", "experts", "router_experts", "item_rows", "root_dim"),
        *("channel_blocks", "all_rows", "rows_0"),
    ]
)
def _tokens_gradient_kernel(
    x_ptr, mask_ptr, norms_ptr, g_0, inverse_0, gamma_0, g_1, inverse_1, gamma_1, dots_ptr,
    dlogits_ptr, logits_ptr, r_ptr, factors_ptr, dx_ptr,
    n, k_0, k_1, dim, batch, experts, router_experts, item_rows, root_dim, channel_blocks, all_rows, rows_0,
    GROUPS: tl.constexpr, HAS_NORM: tl.constexpr, ROUTER: tl.constexpr, COSINE: tl.constexpr, HAS_MASK: tl.constexpr,
    DTYPE: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rows_0: rows of the first group, whose dots come first."""
    tiles = tl.cdiv(n, BLOCK_N)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    position = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    there = position < n
    token = b * n + position
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < dim

    total = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    dot = tl.zeros((BLOCK_N,), DTYPE)
    count = tl.zeros((BLOCK_N,), tl.int32)
    if GROUPS > 0:
        total, dot, count = _add_rows(
            total, dot, count, inverse_0, g_0, gamma_0, dots_ptr, b, position, there, channels, n, k_0, dim, batch,
            experts, channel_blocks, all_rows, HAS_NORM, DTYPE, EXPERTS,
        )  # fmt: skip
    if GROUPS > 1:
        total, dot, count = _add_rows(
            total, dot, count, inverse_1, g_1, gamma_1, dots_ptr + rows_0, b, position, there, channels, n, k_1, dim,
            batch, experts, channel_blocks, all_rows, HAS_NORM, DTYPE, EXPERTS,
        )  # fmt: skip
    shown = there
    if ROUTER and HAS_MASK:
        shown = tl.load(mask_ptr + token, mask=there, other=0) != 0
    reads = count > 0
    if COSINE:
        reads = shown
    norm = tl.full((BLOCK_N,), 1.0, DTYPE)
    x = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    at = token[:, None] * dim + channels[None, :]
    if HAS_NORM or COSINE:
        norm = tl.load(norms_ptr + token, mask=reads, other=1.0)  # that of a token that nobody took may be NaN
        x = tl.load(x_ptr + at, mask=reads[:, None] & inside[None, :], other=0.0).to(DTYPE)
    inverse_norm = 1.0 / tl.maximum(norm, 1e-12)
    slope = tl.zeros((BLOCK_N,), DTYPE)  # of the term in x
    if HAS_NORM:
        # root_dim = dim, as an integer: a Python float would arrive in float32.
        scale = tl.sqrt(tl.cast(root_dim, tl.float64)).to(DTYPE) * inverse_norm
        total *= scale[:, None]
        slope = tl.where((count > 0) & (norm > 1e-12), scale * ((dot * inverse_norm) * inverse_norm), 0.0)
    if ROUTER:
        moment = tl.zeros((BLOCK_N,), DTYPE)
        for e in range(router_experts):
            place = (b * router_experts + e) * n + position
            weight = tl.load(dlogits_ptr + place, mask=shown, other=0.0).to(DTYPE)
            if COSINE:
                moment += weight * tl.load(logits_ptr + place, mask=shown, other=0.0)
                weight *= inverse_norm * tl.load(factors_ptr + b * router_experts + e)
            routing = tl.load(r_ptr + (b * item_rows + e) * dim + channels, mask=inside, other=0.0).to(DTYPE)
            added = weight[:, None] * routing[None, :]
            if HAS_MASK:  # a routing token may be NaN, and 0 * NaN is NaN
                added = tl.where(shown[:, None], added, 0.0)
            total += added
        if COSINE:
            slope += tl.where(norm > 1e-12, moment * inverse_norm * inverse_norm, 0.0)
    if HAS_NORM or COSINE:
        total -= x * slope[:, None]
    tl.store(dx_ptr + at, total.to(dx_ptr.dtype.element_ty), mask=there[:, None] & inside[None, :])


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
    block_d = min(next_power_of_2(dim), MOST_CHANNELS)
    block_n = max(min(TILE // norms.dtype.itemsize * 4 // block_d, next_power_of_2(n)), 1)
    launch(
        _tokens_gradient_kernel, (batch * cdiv(n, block_n), cdiv(dim, block_d)),
        x, contiguous(mask), norms, *map(contiguous, groups), dots, *map(contiguous, parts), dx,
        n, k_0, k_1, dim, batch, experts, 0 if router is None else router.gradient.shape[1], item_rows(tokens),
        dim, dots.shape[0], dots.shape[-1], experts * batch * k_0,
        GROUPS=len(taken), HAS_NORM=has_norm, ROUTER=router is not None,
        COSINE=router is not None and router.factors.numel() > 0, HAS_MASK=mask is not None,
        DTYPE=arithmetic(norms.dtype), EXPERTS=EXPERTS, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return dx
