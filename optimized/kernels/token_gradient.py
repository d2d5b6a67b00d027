"""Gradient of the tokens, assembled in one pass from rows that experts took and from router logits.

x (B, N, D). One or two groups of E experts took rows of x (see `gather_norm`): gradients g (E, B, K, D) of these,
inverse maps (B, E, N), gamma (E, D), and dots <gamma g, x> of every row, by blocks of channels. The norm of a token
does not depend on the expert, so with h = sum_e gamma[e] g[e, slot of n] over all experts that took it, and
r = 1 / max(||x||, 1e-12),

    dx = sqrt(D) r (h - x r^2 <x, h>)           (second term absent where ||x|| <= 1e-12; without norm dx = h)

The router adds, with the gradient l' (B, R, N) of its logits l (see `router_logits`)

    dx += sum_e l' cx cr r_e - x cx^2 sum_e l' l   (cx = cr = 1 and no second term but with cosine routing)

A program per token and block of channels: what the experts hold of a token differs from its neighbour's, so a branch of
its own per row that was taken costs less than a tile that waits for the longest. All inverse maps of a token are read
at once, `EXPERTS` of them; then its rows in the order of the experts, so always the same bits. A token that nobody took
is not read but for cosine routing: it may hold NaN.

Blind spots: inverse maps and logits are read by the token, which leaves most of a sector of memory to its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import cdiv, channel_constants, clamped_norm, contiguous, launch, norm_floor
from optimized.kernels.router_gradient import RouterGradient, router_gradient
from optimized.kernels.router_logits import item_rows

EXPERTS = 32  # whose inverse maps are read at once: one for each thread of a warp
MOST_CHANNELS = 1024  # of a program


class TakenRows(NamedTuple):
    """What the experts of a group have for the tokens that they took."""

    gradient: Tensor  # (E, B, K, D)
    inverse: Tensor  # (B, E, N) int32
    gamma: Tensor | None  # (E, D)


@triton.jit
def _slots_of(inverse_ptr, b, position, n, first, experts, EXPERTS: tl.constexpr):
    """What `EXPERTS` experts from the first on say of a token."""
    e = first + tl.arange(0, EXPERTS)
    return tl.load(inverse_ptr + (b * experts + e) * n + position, mask=e < experts, other=-1)


@triton.jit
def _add_rows(
    total, dot, slots, first, g_ptr, gamma_ptr, dots_ptr, b, channels, k, dim, batch, channel_blocks, all_rows,
    HAS_NORM: tl.constexpr, DTYPE: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """h and <x, h> with the rows in these slots more."""
    inside = channels < dim
    lanes = tl.arange(0, EXPERTS)
    for _ in range(tl.sum((slots >= 0).to(tl.int32))):
        lane = tl.min(tl.where(slots >= 0, lanes, EXPERTS))  # the first that is left
        slot = tl.max(tl.where(lanes == lane, slots, -1)).to(tl.int64)
        slots = tl.where(lanes == lane, -1, slots)
        e = (first + lane).to(tl.int64)
        row = (e * batch + b) * k + slot
        g = tl.load(g_ptr + row * dim + channels, mask=inside, other=0.0).to(DTYPE)
        if HAS_NORM:
            g *= tl.load(gamma_ptr + e * dim + channels, mask=inside, other=0.0).to(DTYPE)
            for block in range(channel_blocks):
                dot += tl.load(dots_ptr + tl.cast(block, tl.int64) * all_rows + row)
        total += g
    return total, dot


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
    DTYPE: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rows_0: rows of the first group, whose dots come first."""
    token = tl.program_id(0).to(tl.int64)  # (b, n)
    b = token // n
    position = token % n
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < dim
    lanes = tl.arange(0, EXPERTS)

    # All that tells what to read is on its way before any of it is waited for.
    shown = tl.full((), 1, tl.int32)
    if ROUTER and HAS_MASK:
        shown = tl.load(mask_ptr + token).to(tl.int32)
    slots_0 = _slots_of(inverse_0, b, position, n, 0, experts, EXPERTS)
    slots_1 = tl.full((EXPERTS,), -1, tl.int32)
    if GROUPS > 1:
        slots_1 = _slots_of(inverse_1, b, position, n, 0, experts, EXPERTS)
    norm = tl.full((), 1.0, DTYPE)
    if HAS_NORM or COSINE:
        norm = tl.load(norms_ptr + token)
    weights = tl.zeros((EXPERTS,), DTYPE)
    if ROUTER:
        place = (b * router_experts + lanes) * n + position
        weights = tl.load(dlogits_ptr + place, mask=lanes < router_experts, other=0.0).to(DTYPE)

    count = tl.sum((slots_0 >= 0).to(tl.int32)) + tl.sum((slots_1 >= 0).to(tl.int32))
    for first in range(EXPERTS, experts, EXPERTS):
        count += tl.sum((_slots_of(inverse_0, b, position, n, first, experts, EXPERTS) >= 0).to(tl.int32))
        if GROUPS > 1:
            count += tl.sum((_slots_of(inverse_1, b, position, n, first, experts, EXPERTS) >= 0).to(tl.int32))
    reads = count
    if COSINE:
        reads = shown
    norm = tl.where(reads > 0, norm, 1.0)  # that of a token that nobody took may be NaN
    inverse_norm = 1.0 / clamped_norm(norm)
    x = tl.zeros((BLOCK_D,), DTYPE)
    if HAS_NORM or COSINE:
        x = tl.load(x_ptr + token * dim + channels, mask=tl.where(inside, reads, 0) > 0, other=0.0).to(DTYPE)

    total = tl.zeros((BLOCK_D,), DTYPE)
    dot = tl.full((), 0.0, DTYPE)
    total, dot = _add_rows(
        total, dot, slots_0, 0, g_0, gamma_0, dots_ptr, b, channels, k_0, dim, batch, channel_blocks, all_rows,
        HAS_NORM, DTYPE, EXPERTS,
    )  # fmt: skip
    for first in range(EXPERTS, experts, EXPERTS):
        more = _slots_of(inverse_0, b, position, n, first, experts, EXPERTS)
        total, dot = _add_rows(
            total, dot, more, first, g_0, gamma_0, dots_ptr, b, channels, k_0, dim, batch, channel_blocks,
            all_rows, HAS_NORM, DTYPE, EXPERTS,
        )  # fmt: skip
    if GROUPS > 1:
        total, dot = _add_rows(
            total, dot, slots_1, 0, g_1, gamma_1, dots_ptr + rows_0, b, channels, k_1, dim, batch, channel_blocks,
            all_rows, HAS_NORM, DTYPE, EXPERTS,
        )  # fmt: skip
        for first in range(EXPERTS, experts, EXPERTS):
            more = _slots_of(inverse_1, b, position, n, first, experts, EXPERTS)
            total, dot = _add_rows(
                total, dot, more, first, g_1, gamma_1, dots_ptr + rows_0, b, channels, k_1, dim, batch,
                channel_blocks, all_rows, HAS_NORM, DTYPE, EXPERTS,
            )  # fmt: skip
    slope = tl.full((), 0.0, DTYPE)  # of the term in x
    if HAS_NORM:
        # root_dim = dim, as an integer: a Python float would arrive in float32.
        scale = tl.sqrt(tl.cast(root_dim, tl.float64)).to(DTYPE) * inverse_norm
        total *= scale
        slope = tl.where((count > 0) & (norm > norm_floor(norm)), scale * ((dot * inverse_norm) * inverse_norm), 0.0)
    if ROUTER:
        moment = tl.full((), 0.0, DTYPE)
        # Not of a masked token: a routing token may be NaN, and 0 * NaN is NaN.
        for first in range(0, tl.where(shown > 0, router_experts, 0), EXPERTS):
            place = b * router_experts + first + lanes
            known = first + lanes < router_experts
            if first > 0:
                weights = tl.load(dlogits_ptr + place * n + position, mask=known, other=0.0).to(DTYPE)
            if COSINE:
                moment += tl.sum(weights * tl.load(logits_ptr + place * n + position, mask=known, other=0.0))
                weights *= inverse_norm * tl.load(factors_ptr + place, mask=known, other=0.0)
            for lane in range(tl.minimum(router_experts - first, EXPERTS)):
                weight = tl.sum(tl.where(lanes == lane, weights, 0.0))
                row = r_ptr + (b * item_rows + first + lane) * dim
                total += weight * tl.load(row + channels, mask=inside, other=0.0).to(DTYPE)
        if COSINE:
            slope += tl.where(norm > norm_floor(norm), moment * inverse_norm * inverse_norm, 0.0)
    if HAS_NORM or COSINE:
        total -= x * slope
    tl.store(dx_ptr + token * dim + channels, total.to(dx_ptr.dtype.element_ty), mask=inside)


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
    if not taken:
        return torch.zeros_like(x) if router is None else router_gradient(x, mask, norms, router)
    batch, n, dim = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return dx
    x, norms = x.contiguous(), norms.contiguous()
    dots = norms if dots is None else dots.contiguous()
    absent = TakenRows(x, x, None)
    first, second = (*taken, absent)[:2]
    has_norm = first.gamma is not None
    k_0, k_1 = ([rows.gradient.shape[2] for rows in taken] + [0])[:2]
    experts = first.inverse.shape[1]
    groups = [part for rows in (first, second) for part in (rows.gradient, rows.inverse, rows.gamma)]
    tokens = x if router is None else router.tokens.contiguous()
    parts = (None,) * 4 if router is None else (router.gradient, router.logits, tokens, router.factors)
    constants = channel_constants(min(dim, MOST_CHANNELS), norms.dtype)
    launch(
        _tokens_gradient_kernel, (batch * n, cdiv(dim, constants["BLOCK_D"])),
        x, contiguous(mask), norms, *map(contiguous, groups), dots, *map(contiguous, parts), dx,
        n, k_0, k_1, dim, batch, experts, 0 if router is None else router.gradient.shape[1], item_rows(tokens),
        dim, dots.shape[0], dots.shape[-1], experts * batch * k_0,
        GROUPS=len(taken), HAS_NORM=has_norm, ROUTER=router is not None,
        COSINE=router is not None and router.factors.numel() > 0, HAS_MASK=mask is not None,
        EXPERTS=EXPERTS, **constants,
    )  # fmt: skip
    return dx
