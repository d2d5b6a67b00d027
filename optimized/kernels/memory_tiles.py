"""What the kernels of attention over a memory share: how programs are laid out, tiles of rows, draws of dropout."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import arithmetic, cdiv, double_bits, from_bits, next_power_of_2

SIZES = ["n", "k", "slots", "blocks", "batch", "experts", "heads", "tiles", "scale_bits", "drop", "keep_bits"]


@triton.jit
def _place(blocks, batch, experts, heads, tiles):
    """Of a program: its row (e, b), block, head and tile; and the row as (b, e)."""
    program = tl.program_id(0)
    tile = program % tiles
    h = program // tiles % heads
    j = program // tiles // heads % blocks
    row = (program // tiles // heads // blocks).to(tl.int64)
    return row, j, h, tile, row % batch * experts + row // batch


@triton.jit
def _finite(x):
    """Not by x - x == 0: an x that is a product is fused into the subtraction, and what is left is its rounding."""
    return tl.abs(x) < float("inf")


@triton.jit
def _tile(ptr, rows, stride, shown, dim, BLOCK_D: tl.constexpr):
    """Rows of ptr; 0 where they are not shown."""
    channels = tl.arange(0, BLOCK_D)
    at = rows[:, None].to(tl.int64) * stride + channels[None, :]
    return tl.load(ptr + at, mask=shown[:, None] & (channels < dim)[None, :], other=0.0)


@triton.jit
def _store(ptr, rows, stride, shown, tile, dim, BLOCK_D: tl.constexpr):
    channels = tl.arange(0, BLOCK_D)
    at = rows[:, None].to(tl.int64) * stride + channels[None, :]
    tl.store(ptr + at, tile.to(ptr.dtype.element_ty), mask=shown[:, None] & (channels < dim)[None, :])


@triton.jit
def _kept(seed, queries, columns, n, drop, keep_bits, DTYPE: tl.constexpr):
    """z of each pair: 24 bits of a hash (splitmix64) of both against the probability."""
    z = seed + (queries * (n + 1) + (columns + 1)) * -7046029254386353131
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    return tl.where(((z >> 40) & 0xFFFFFF) >= drop, from_bits(keep_bits).to(DTYPE), 0.0)


class Memories(NamedTuple):
    """What both directions read: see `optimized.ops.memory_attention`. null_kv in the dtype of q; seed: one int64."""

    q: Tensor
    kv: Tensor
    scores: Tensor
    null_kv: Tensor
    indices: Tensor
    counts: Tensor
    q_counts: Tensor
    seed: Tensor
    dropout: float

    def read(self) -> tuple[Tensor, ...]:
        """Contiguous, but for the indices."""
        return tuple(t.contiguous() for t in (*self[:4], self.counts, self.q_counts, self.seed))

    def numbers(self, tiles: int) -> tuple[int, ...]:
        experts, batch, blocks, slots, heads, dim = self.q.shape
        drop, keep = round(self.dropout * 2**24), double_bits(1 / (1 - self.dropout))
        rows = (self.kv.shape[2], self.indices.shape[-1], slots, blocks, batch, experts, heads, dim)
        return (*rows, tiles, double_bits(dim**-0.5), drop, keep)

    def grid(self, role: str, length: int) -> tuple[dict[str, Any], int, int]:
        """Constants; tiles of so many queries or places; programs of a head of a row of a block."""
        sizes = _sizes(self.q.dtype, self.q.shape[-1], role)
        if role == "keys" and self.q.shape[3] <= 32:  # blocks have as many queries, side by side
            sizes["BLOCK_M"] = min(sizes["BLOCK_M"], 32)
        if role == "queries" and self.dropout > 0:  # more spill
            sizes["BLOCK_N"] = min(sizes["BLOCK_N"], 64)
        tiles = cdiv(length, sizes["BLOCK_N" if role == "keys" else "BLOCK_M"])
        experts, batch, _, _, heads, _ = self.q.shape
        return {"DROPOUT": self.dropout > 0, **sizes}, tiles, experts * batch * heads * tiles


def _sizes(dtype: torch.dtype, dim: int, role: str) -> dict[str, Any]:
    """Blocks and warps. A product has at least 16 channels. BLOCK_M: queries, BLOCK_N: keys."""
    block_d = max(next_power_of_2(dim), 16)
    half = dtype in (torch.float16, torch.bfloat16)
    stages = 1 if role == "keys" else 2
    if dtype == torch.float64:
        rows, warps = (16, 16), 4
    elif not half:
        rows, warps = ((32, 32) if role == "forward" else (16, 32)) if block_d <= 64 else (16, 16), 8
    elif block_d <= 64:  # measured: docs/lab-log.md
        rows, stages = {"forward": ((64, 64), 1), "queries": ((64, 128), 2), "keys": ((64, 64), 1)}[role]
        warps = 4
    else:  # larger tiles spill, some on one GPU and some on another
        rows, warps = (32, 32), 8
    return {
        "HALF": half,
        "DTYPE": arithmetic(dtype),
        "BLOCK_M": rows[0],
        "BLOCK_N": rows[1],
        "BLOCK_D": block_d,
        "num_warps": warps,
        "num_stages": stages,
    }
