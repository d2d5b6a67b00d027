"""Gather of routed tokens with RMSNorm, and what its backward needs of every row; no atomics.

Forward: rows (E, B, K, D) of x (B, N, D), y = x r sqrt(D) gamma[e] with r = 1 / max(||x||, 1e-12) in at least float32;
masked slots are 0 and their tokens are not read. One or two groups of E experts, each with a K and gamma of its own, in
one launch. A program per tile of slots of an expert and of channels.

Backward, by the rows' gradients g: dgamma[e] = sum over its slots of g x r sqrt(D), and <gamma g, x> of every row, from
which `token_gradient` assembles dx. A program per `CHUNK` slots of an expert and block of channels writes its partial
sums of dgamma, see `partial_sums`, and of the row's dot, (channel blocks, rows), the second group's after the first's.

Blind spots: the backward gathers x once more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import arithmetic, cdiv, clamped_norm, contiguous, launch, next_power_of_2, wide
from optimized.kernels.partial_sums import Sum, add_up

NORM_TOKENS = 16  # of a program of the norms
CHUNK = 64  # slots of a program of the backward
MOST_ROWS = 16  # of a tile
TILE = 2048  # numbers of it, half as many in float64


class Taken(NamedTuple):
    """What a group of experts took."""

    indices: Tensor  # (B, E, K) int64
    slots: Tensor  # (B, E, K) bool, the slot mask
    gamma: Tensor | None  # E D numbers, None for no norm


@triton.jit(do_not_specialize=["tokens"])
def _norms_kernel(x_ptr, out_ptr, tokens, dim, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    squares = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    for start in range(0, dim, BLOCK_D):
        inside = (rows < tokens)[:, None] & (start + channels < dim)[None, :]
        x = tl.load(x_ptr + rows[:, None] * dim + start + channels[None, :], mask=inside, other=0.0).to(DTYPE)
        squares += x * x
    tl.store(out_ptr + rows, tl.sqrt(tl.sum(squares, 1)), mask=rows < tokens)


@triton.jit
def _rows_of(indices_ptr, slots_ptr, tile, first, k, batch, experts, chunks, LENGTH: tl.constexpr):
    """Of slots of a tile: the expert, the row (e, b, k) of each, which lie inside, which are valid, item and token."""
    e = (tile // chunks).to(tl.int64)
    in_expert = tile % chunks * LENGTH + first
    inside = in_expert < batch * k
    b = in_expert // k
    place = (b * experts + e) * k + in_expert % k
    valid = tl.load(slots_ptr + place, mask=inside, other=0) != 0
    index = tl.load(indices_ptr + place, mask=valid, other=0)
    return e, e * batch * k + in_expert, inside, valid, b, index


@triton.jit(do_not_specialize=["n", "k_0", "k_1", "batch", "experts", "chunks_0", "chunks_1", "root_dim"])
def _gather_kernel(
    x_ptr, norms_ptr, indices_0, slots_0, gamma_0, out_0, indices_1, slots_1, gamma_1, out_1,
    n, k_0, k_1, dim, batch, experts, chunks_0, chunks_1, root_dim,
    HAS_NORM: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """chunks: tiles of an expert."""
    tile = tl.program_id(0)
    if tile >= experts * chunks_0:
        tile -= experts * chunks_0
        indices_0 = indices_1
        slots_0 = slots_1
        out_0 = out_1
        if HAS_NORM:
            gamma_0 = gamma_1
        k_0 = k_1
        chunks_0 = chunks_1
    first = tl.arange(0, ROWS).to(tl.int64)
    e, row, there, valid, b, index = _rows_of(indices_0, slots_0, tile, first, k_0, batch, experts, chunks_0, ROWS)
    token = b * n + index
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < dim
    y = tl.load(x_ptr + token[:, None] * dim + channels[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
    if HAS_NORM:
        # root_dim = dim, as an integer: a Python float would arrive in float32.
        root = tl.sqrt(tl.cast(root_dim, tl.float64)).to(DTYPE)
        r = root / clamped_norm(tl.load(norms_ptr + token, mask=valid, other=1.0))
        gamma = tl.load(gamma_0 + e * dim + channels, mask=inside, other=0.0).to(DTYPE)
        y = y.to(DTYPE) * r[:, None] * gamma[None, :]
    out = out_0 + row[:, None] * dim + channels[None, :]
    tl.store(out, y.to(out_0.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["n", "k_0", "k_1", "batch", "experts", "chunks_0", "chunks_1", "root_dim", "all_rows"])
def _slots_gradient_kernel(
    x_ptr, norms_ptr, g_0, indices_0, slots_0, gamma_0, g_1, indices_1, slots_1, gamma_1, partial_ptr, dots_ptr,
    n, k_0, k_1, dim, batch, experts, chunks_0, chunks_1, root_dim, all_rows,
    DTYPE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial (experts of all groups times their chunks, D), dots (channel blocks, all rows)."""
    tile = tl.program_id(0)
    partial_ptr += tile.to(tl.int64) * dim
    dots_ptr += tl.program_id(1).to(tl.int64) * all_rows
    if tile >= experts * chunks_0:
        tile -= experts * chunks_0
        dots_ptr += tl.cast(experts, tl.int64) * batch * k_0
        indices_0 = indices_1
        slots_0 = slots_1
        gamma_0 = gamma_1
        g_0 = g_1
        k_0 = k_1
        chunks_0 = chunks_1
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < dim
    root = tl.sqrt(tl.cast(root_dim, tl.float64)).to(DTYPE)
    total = tl.zeros((ROWS, BLOCK_D), DTYPE)
    for start in range(0, CHUNK, ROWS):
        first = start + tl.arange(0, ROWS).to(tl.int64)
        e, row, there, valid, b, index = _rows_of(indices_0, slots_0, tile, first, k_0, batch, experts, chunks_0, CHUNK)
        token = b * n + index
        readable = valid[:, None] & inside[None, :]  # of a masked slot neither token nor gradient: either may be NaN
        x = tl.load(x_ptr + token[:, None] * dim + channels[None, :], mask=readable, other=0.0).to(DTYPE)
        g = tl.load(g_0 + row[:, None] * dim + channels[None, :], mask=readable, other=0.0).to(DTYPE)
        r = root / clamped_norm(tl.load(norms_ptr + token, mask=valid, other=1.0))
        gamma = tl.load(gamma_0 + e * dim + channels, mask=inside, other=0.0).to(DTYPE)
        products = g * x
        total += products * r[:, None]
        tl.store(dots_ptr + row, tl.sum(products * gamma[None, :], 1), mask=there)
    tl.store(partial_ptr + channels, tl.sum(total, 0), mask=inside)


def token_norms(x: Tensor) -> Tensor:
    """||x|| (B, N) in at least float32."""
    batch, n, dim = x.shape
    norms = torch.empty(batch, n, dtype=wide(x.dtype), device=x.device)
    if norms.numel():
        block_d = min(next_power_of_2(dim), 128)
        launch(
            _norms_kernel, (cdiv(batch * n, NORM_TOKENS),), x.contiguous(), norms, batch * n, dim,
            DTYPE=arithmetic(x.dtype), BLOCK_N=NORM_TOKENS, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return norms


def _block_d(dim: int) -> int:
    return min(next_power_of_2(dim), 1024)


def _tile(dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """A warp for each tile."""
    block = _block_d(dim)
    rows = max(TILE // (2 if dtype == torch.float64 else 1) // block, 1)
    return {"DTYPE": arithmetic(dtype), "ROWS": min(rows, MOST_ROWS), "BLOCK_D": block, "num_warps": 1}


def gather_norm(x: Tensor, norms: Tensor | None, taken: tuple[Taken, ...]) -> tuple[Tensor, ...]:
    """Rows (E, B, K, D) in x's dtype of one or two groups with as many experts. norms: of `token_norms`, with gamma."""
    batch, n, dim = x.shape
    experts = taken[0].indices.shape[1]
    outs = tuple([x.new_empty(experts, batch, group.indices.shape[2], dim) for group in taken])
    if outs[0].numel() or outs[-1].numel():
        constants = _tile(dim, x.dtype)
        k_0, k_1 = taken[0].indices.shape[2], taken[-1].indices.shape[2]
        chunks = [cdiv(batch * k, constants["ROWS"]) for k in (k_0, k_1)]
        parts = [part for group, out in zip((taken[0], taken[-1]), (outs[0], outs[-1])) for part in _parts(group, out)]
        tiles = experts * sum(chunks[: len(taken)])
        launch(
            _gather_kernel, (tiles, cdiv(dim, constants["BLOCK_D"])), x.contiguous(), contiguous(norms), *parts,
            n, k_0, k_1, dim, batch, experts, *chunks, dim, HAS_NORM=taken[0].gamma is not None, **constants,
        )  # fmt: skip
    return outs


def _parts(group: Taken, *rows: Tensor) -> tuple[Tensor | None, ...]:
    return group.indices.contiguous(), contiguous(group.slots), contiguous(group.gamma), *rows


def slot_gradients(
    x: Tensor, norms: Tensor, taken: tuple[Taken, ...], gradients: tuple[Tensor, ...], more: int = 0
) -> tuple[tuple[Tensor, ...], Tensor]:
    """dgamma of every group, in gamma's dtype, and dots (channel blocks, rows of all groups). With gamma only.

    more: rows of a group of the caller's behind them, which the first block of channels lacks and the others have as 0.
    """
    batch, n, dim = x.shape
    experts = taken[0].indices.shape[1]
    constants = _tile(dim, x.dtype)
    ks = [group.indices.shape[2] for group in taken]
    all_rows = experts * batch * sum(ks)
    chunks = [cdiv(batch * k, CHUNK) for k in ks]
    channel_blocks = cdiv(dim, constants["BLOCK_D"])
    dots = norms.new_empty(channel_blocks, all_rows + more)
    dots[1:, all_rows:].zero_()
    partial = norms.new_empty(experts * sum(chunks), dim)
    if all_rows:
        parts = [
            part
            for group, g in zip((taken[0], taken[-1]), (gradients[0], gradients[-1]))
            for part in (g.contiguous(), *_parts(group))
        ]
        launch(
            _slots_gradient_kernel, (experts * sum(chunks), channel_blocks),
            x.contiguous(), norms.contiguous(), *parts, partial, dots,
            n, ks[0], ks[-1], dim, batch, experts, chunks[0], chunks[-1], dim, dots.shape[1], CHUNK=CHUNK, **constants,
        )  # fmt: skip
    sums, first = [], 0
    for group, count in zip(taken, chunks):
        assert group.gamma is not None
        dgamma = torch.empty_like(group.gamma, memory_format=torch.contiguous_format)
        sums.append(Sum(dgamma, experts, count, first))
        first += experts * count * dim
    add_up(partial, dim, dim, *sums)
    return tuple([each.out for each in sums]), dots
