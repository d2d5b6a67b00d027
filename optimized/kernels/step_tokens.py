"""What a decoding step needs of a token before any projection, and what the unfinished block keeps of it.

x (B, D), one token of each item, goes to its place in the unfinished block, min(length - start, W - 1), as do its
logits l = <x, r> of both routers, or with cosine routing l = scale <x, r> / (max(||x||, 1e-12) max(||r||, 1e-12)). They
have the bits that `router_logits` gives the same token anywhere: what is equal stays so, whoever computed it.

Rates (3, B) are what norms take of an item: its mean m and 1 / sqrt(mean (x - m)^2 + eps) of a LayerNorm, and
sqrt(D) / max(||x||, 1e-12) of an RMSNorm. Tables (B, 4, d) are cos and sin at its position, of local attention by
theta = 10000 in float64, then of the experts by the given angles.

A program has a tile of items and experts, another kind one item.

Blind spots: one program reads a whole token several times; with few items most multiprocessors rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import (
    MAX_BLOCK_D,
    arithmetic,
    cdiv,
    clamped_norm,
    double_bits,
    from_bits,
    launch,
    next_power_of_2,
    wide,
)
from optimized.kernels.router_logits import _tile, more_logits


@triton.jit
def _place(length_ptr, start_ptr, b, there, width):
    """Of items b, in their unfinished blocks."""
    length = tl.load(length_ptr + b, mask=there, other=0)
    return tl.minimum(length - tl.load(start_ptr + b, mask=there, other=0), width - 1)


@triton.jit
def _logits_of_step(
    x_ptr, q_tokens_ptr, kv_tokens_ptr, length_ptr, start_ptr, q_logits_ptr, kv_logits_ptr,
    tile, batch, dim, experts, width, scale_bits,
    COSINE: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """As `router_logits` of the items as tokens, and of the experts of both routers one after the other."""
    tiles = tl.cdiv(2 * experts, BLOCK_E)
    b = (tile // tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    here = tile % tiles * BLOCK_E + tl.arange(0, BLOCK_E)
    first = here < experts
    second = (here >= experts) & (here < 2 * experts)
    shown = b < batch
    channels = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_E), DTYPE)
    x_squares = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    r_squares = tl.zeros((BLOCK_D, BLOCK_E), DTYPE)
    for start in range(0, dim, BLOCK_D):
        inside = start + channels < dim
        x = tl.load(
            x_ptr + b[:, None] * dim + start + channels[None, :], mask=shown[:, None] & inside[None, :], other=0.0
        )
        r_at = start + channels[:, None]
        r = tl.load(q_tokens_ptr + here[None, :] * dim + r_at, mask=inside[:, None] & first[None, :], other=0.0)
        more = tl.load(
            kv_tokens_ptr + (here - experts)[None, :] * dim + r_at, mask=inside[:, None] & second[None, :], other=0.0
        )
        r = tl.where(first[None, :], r, more)
        exact = x.to(DTYPE)
        total = more_logits(total, x, r, HALF, DTYPE)
        x_squares += exact * exact
        if COSINE:
            r_squares += r.to(DTYPE) * r.to(DTYPE)
    norms = tl.sqrt(tl.sum(x_squares, 1))
    if COSINE:
        factors = from_bits(scale_bits).to(DTYPE) / clamped_norm(tl.sqrt(tl.sum(r_squares, 0)))
        total = total / clamped_norm(norms)[:, None] * factors[None, :]
    place = _place(length_ptr, start_ptr, b, shown, width)
    at = (b * experts * width + place)[:, None]
    tl.store(q_logits_ptr + at + here[None, :] * width, total, mask=shown[:, None] & first[None, :])
    tl.store(kv_logits_ptr + at + (here - experts)[None, :] * width, total, mask=shown[:, None] & second[None, :])


@triton.jit
def _item_of_step(
    x_ptr, length_ptr, start_ptr, angles_ptr, tail_ptr, rates_ptr, tables_ptr,
    b, batch, dim, root_dim, width, dim_head, positions, eps_bits,
    ROTARY: tl.constexpr, ANGLE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_HEAD: tl.constexpr,
):  # fmt: skip
    place = _place(length_ptr, start_ptr, b, b < batch, width)
    channels = tl.arange(0, BLOCK_ROW)
    sums = tl.zeros((BLOCK_ROW,), DTYPE)
    squares = tl.zeros((BLOCK_ROW,), DTYPE)
    for start in range(0, dim, BLOCK_ROW):
        inside = start + channels < dim
        raw = tl.load(x_ptr + b * dim + start + channels, mask=inside, other=0.0)
        tl.store(tail_ptr + (b * width + place) * dim + start + channels, raw, mask=inside)
        x = raw.to(DTYPE)
        sums += x
        squares += x * x
    mean = tl.sum(sums, 0) / dim
    norm = tl.sqrt(tl.sum(squares, 0))
    squares = tl.zeros((BLOCK_ROW,), DTYPE)
    for start in range(0, dim, BLOCK_ROW):
        inside = start + channels < dim
        x = tl.load(x_ptr + b * dim + start + channels, mask=inside, other=0.0).to(DTYPE)
        apart = tl.where(inside, x - mean, 0.0)
        squares += apart * apart
    rate = 1.0 / tl.sqrt(tl.sum(squares, 0) / dim + from_bits(eps_bits).to(DTYPE))
    root = tl.sqrt(tl.cast(root_dim, tl.float64)).to(DTYPE)  # an integer: a Python float would arrive in float32
    tl.store(rates_ptr + b, mean)
    tl.store(rates_ptr + batch + b, rate)
    tl.store(rates_ptr + 2 * batch + b, root / clamped_norm(norm))
    at = tl.arange(0, BLOCK_HEAD)
    length = tl.load(length_ptr + b)
    two = tl.full((BLOCK_HEAD,), 2.0, tl.float64)
    log2_theta = tl.log2(tl.full((BLOCK_HEAD,), 10000.0, tl.float64))
    angle = length.to(tl.float64) * tl.exp2(-(two * (at % (dim_head // 2)) / dim_head) * log2_theta)
    tables_ptr += b * 4 * dim_head + at
    tl.store(tables_ptr, tl.cos(angle).to(DTYPE), mask=at < dim_head)
    tl.store(tables_ptr + dim_head, tl.sin(angle).to(DTYPE), mask=at < dim_head)
    if ROTARY:
        row = tl.minimum(length, positions - 1)
        given = tl.load(angles_ptr + row * dim_head + at, mask=at < dim_head, other=0.0).to(ANGLE)
        tl.store(tables_ptr + 2 * dim_head, tl.cos(given).to(DTYPE), mask=at < dim_head)
        tl.store(tables_ptr + 3 * dim_head, tl.sin(given).to(DTYPE), mask=at < dim_head)


@triton.jit(
    do_not_specialize=[
        "batch", "experts", "width", "root_dim", "dim_head", "positions", "routers", "scale_bits", "eps_bits"
    ]
)  # fmt: skip
def _step_tokens_kernel(
    x_ptr, q_tokens_ptr, kv_tokens_ptr, length_ptr, start_ptr, angles_ptr, tail_ptr, q_logits_ptr, kv_logits_ptr,
    rates_ptr, tables_ptr,
    batch, dim, experts, width, root_dim, dim_head, positions, routers, scale_bits, eps_bits,
    COSINE: tl.constexpr, ROTARY: tl.constexpr, ANGLE: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_HEAD: tl.constexpr,
):  # fmt: skip
    """routers: programs of logits, which come first."""
    program = tl.program_id(0)
    if program < routers:
        _logits_of_step(
            x_ptr, q_tokens_ptr, kv_tokens_ptr, length_ptr, start_ptr, q_logits_ptr, kv_logits_ptr,
            program, batch, dim, experts, width, scale_bits, COSINE, HALF, DTYPE, BLOCK_N, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    else:
        _item_of_step(
            x_ptr, length_ptr, start_ptr, angles_ptr, tail_ptr, rates_ptr, tables_ptr,
            (program - routers).to(tl.int64), batch, dim, root_dim, width, dim_head, positions, eps_bits,
            ROTARY, ANGLE, DTYPE, BLOCK_ROW, BLOCK_HEAD,
        )  # fmt: skip


class Block(NamedTuple):
    """What a step changes of the unfinished blocks, contiguous, W places each, and where these are.

    tail (B, W, D); logits (B, E, W) in at least float32; length, start (B) int64.
    """

    tail: Tensor
    q_logits: Tensor
    kv_logits: Tensor
    length: Tensor
    start: Tensor


def step_tokens(
    x: Tensor,
    q_tokens: Tensor,
    kv_tokens: Tensor,
    scale: float | None,
    eps: float,
    angles: Tensor | None,
    dim_head: int,
    block: Block,
) -> tuple[Tensor, Tensor]:
    """Rates (3, B) and tables (B, 4, d), of which half are not written without angles; changes the tail and its logits.

    x (B, D), routing tokens (E, D) in its dtype; scale: of cosine routing, None for plain products; eps: of the
    LayerNorm; angles (P, d): of the experts, P >= 1, for positions beyond the last row that.
    """
    (batch, dim), dtype = x.shape, wide(x.dtype)
    experts, width = block.q_logits.shape[1:]
    rates = torch.empty(3, batch, dtype=dtype, device=x.device)
    tables = torch.empty(batch, 4, dim_head, dtype=dtype, device=x.device)
    constants: dict[str, Any] = _tile(dtype, x.element_size() == 2, 2 * experts)
    routers = cdiv(batch, constants["BLOCK_N"]) * cdiv(2 * experts, constants["BLOCK_E"])
    launch(
        _step_tokens_kernel, (routers + batch,),
        x.contiguous(), q_tokens.contiguous(), kv_tokens.contiguous(), block.length, block.start,
        None if angles is None else angles.contiguous(), block.tail, block.q_logits, block.kv_logits, rates, tables,
        batch, dim, experts, width, dim, dim_head, 0 if angles is None else angles.shape[0], routers,
        double_bits(0.0 if scale is None else scale), double_bits(eps),
        COSINE=scale is not None, ROTARY=angles is not None,
        ANGLE=tl.float64 if angles is not None and angles.dtype == torch.float64 else arithmetic(dtype), **constants,
        BLOCK_ROW=min(next_power_of_2(dim), MAX_BLOCK_D), BLOCK_HEAD=next_power_of_2(dim_head),
    )  # fmt: skip
    return rates, tables
