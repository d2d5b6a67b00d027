"""Queries, keys and values rotated and rid of what is not finite, in one pass; and results that become NaN.

A program of the first has ROWS heads of tokens: it reads q, k and v of each, rotates q and k with TURN, and writes
zeros for a q, or a k and v, with a number whose size is not at most LARGEST, and which these were. The second looks who
sees such a row in a causal window, and writes nothing else but the rows that become NaN.

Blind spots: the second reads a byte for each head of all tokens in a window once for TOKENS of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import arithmetic, cdiv, contiguous, launch, next_power_of_2

NUMBERS = 1024  # of a tile, of one half of the channels
TOKENS = 64  # of a program that looks who sees what, and heads
HEADS = 16


@triton.jit
def _load_pair(ptr, at, half, inside, DTYPE: tl.constexpr):
    first = tl.load(ptr + at, mask=inside, other=0.0).to(DTYPE)
    second = tl.load(ptr + at + half, mask=inside, other=0.0).to(DTYPE)
    return first, second


@triton.jit
def _small(first, second, LARGEST: tl.constexpr, DTYPE: tl.constexpr):
    """Whether all numbers of a row are."""
    most = tl.full((1, 1), LARGEST, DTYPE)
    fits = (tl.abs(first) <= most) & (tl.abs(second) <= most)
    return tl.min(fits.to(tl.int32), 1) != 0


@triton.jit(do_not_specialize=["rows", "n", "heads"])
def _finite_heads_kernel(
    qkv_ptr, cos_ptr, sin_ptr, safe_ptr, odd_q_ptr, odd_kv_ptr, rows, n, heads, half,
    TURN: tl.constexpr, LARGEST: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (b, n, h)
    token = row // heads
    channels = tl.arange(0, BLOCK_HALF)
    inside = (row < rows)[:, None] & (channels < half)[None, :]
    part = heads.to(tl.int64) * 2 * half
    at = (token * 3 * part + row % heads * 2 * half)[:, None] + channels[None, :]
    q1, q2 = _load_pair(qkv_ptr, at, half, inside, DTYPE)
    k1, k2 = _load_pair(qkv_ptr, at + part, half, inside, DTYPE)
    v1, v2 = _load_pair(qkv_ptr, at + 2 * part, half, inside, DTYPE)
    if TURN:
        angle = (token % n * 2 * half)[:, None] + channels[None, :]
        cos1, cos2 = _load_pair(cos_ptr, angle, half, inside, DTYPE)
        sin1, sin2 = _load_pair(sin_ptr, angle, half, inside, DTYPE)
        q1, q2 = q1 * cos1 - q2 * sin1, q2 * cos2 + q1 * sin2
        k1, k2 = k1 * cos1 - k2 * sin1, k2 * cos2 + k1 * sin2
    fits_q = _small(q1, q2, LARGEST, DTYPE)
    fits_kv = _small(k1, k2, LARGEST, DTYPE) & _small(v1, v2, LARGEST, DTYPE)
    kind = safe_ptr.dtype.element_ty
    tl.store(safe_ptr + at, tl.where(fits_q[:, None], q1, 0.0).to(kind), mask=inside)
    tl.store(safe_ptr + at + half, tl.where(fits_q[:, None], q2, 0.0).to(kind), mask=inside)
    tl.store(safe_ptr + at + part, tl.where(fits_kv[:, None], k1, 0.0).to(kind), mask=inside)
    tl.store(safe_ptr + at + part + half, tl.where(fits_kv[:, None], k2, 0.0).to(kind), mask=inside)
    tl.store(safe_ptr + at + 2 * part, tl.where(fits_kv[:, None], v1, 0.0).to(kind), mask=inside)
    tl.store(safe_ptr + at + 2 * part + half, tl.where(fits_kv[:, None], v2, 0.0).to(kind), mask=inside)
    tl.store(odd_q_ptr + row, (fits_q == 0).to(tl.int8), mask=row < rows)
    tl.store(odd_kv_ptr + row, (fits_kv == 0).to(tl.int8), mask=row < rows)


@triton.jit
def _odd(odd_ptr, mask_ptr, b, j, h, there, n, heads, HAS_MASK: tl.constexpr):
    """Which keys or values at tokens j and heads h are odd; tokens that the mask hides are seen by nobody."""
    if HAS_MASK:
        there = tl.load(mask_ptr + b * n + j, mask=there, other=0) != 0
    at = (b * n + j[:, None]) * heads + h[None, :]
    return tl.load(odd_ptr + at, mask=there[:, None] & (h < heads)[None, :], other=0) != 0


@triton.jit(do_not_specialize=["n", "heads", "window"])
def _spoil_kernel(
    out_ptr, lse_ptr, odd_q_ptr, odd_kv_ptr, mask_ptr, odd_ptr, n, heads, dim, window,
    HAS_MASK: tl.constexpr, HAS_LSE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program has TOKENS tokens: of each it finds the last odd key not behind it, if any is near."""
    tiles = tl.cdiv(n, TOKENS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * TOKENS
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    lanes = tl.arange(0, TOKENS)
    i = first + lanes
    shown = (i < n)[:, None] & (h < heads)[None, :]
    last = tl.full((BLOCK_H,), -1, tl.int32)
    for start in range(tl.maximum(first - window, 0), first, TOKENS):
        j = start + lanes
        before = _odd(odd_kv_ptr, mask_ptr, b, j, h, j < first, n, heads, HAS_MASK)
        last = tl.maximum(last, tl.max(tl.where(before, j[:, None], -1), 0))
    latest = last[None, :] + tl.zeros((TOKENS, BLOCK_H), tl.int32)
    own = _odd(odd_kv_ptr, mask_ptr, b, i, h, i < n, n, heads, HAS_MASK)
    if tl.max(own.to(tl.int32)) > 0:
        for back in range(TOKENS):
            j = i - back
            there = (j >= first) & (j < n)
            seen = _odd(odd_kv_ptr, mask_ptr, b, j, h, there, n, heads, HAS_MASK)
            latest = tl.maximum(latest, tl.where(seen, j[:, None], -1))
    row = (b * n + i[:, None]) * heads + h[None, :]
    odd = tl.load(odd_q_ptr + row, mask=shown, other=0) != 0
    odd = odd | ((latest >= 0) & (latest >= i[:, None] - window))
    tl.store(odd_ptr + row, odd.to(tl.int8), mask=shown)
    odd = odd & shown
    if tl.max(odd.to(tl.int32)) > 0:
        nan = tl.full((TOKENS, BLOCK_H), float("nan"), tl.float32)
        for channel in range(dim):
            tl.store(out_ptr + row * dim + channel, nan.to(out_ptr.dtype.element_ty), mask=odd)
        if HAS_LSE:
            infinite = tl.full((TOKENS, BLOCK_H), float("inf"), tl.float32)
            at = (b * heads + h[None, :]) * n + i[:, None]
            tl.store(lse_ptr + at, infinite.to(lse_ptr.dtype.element_ty), mask=odd)


def finite_heads(qkv: Tensor, tables: tuple[Tensor, Tensor] | None, largest: float) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, N, 3, H, d) as described, contiguous, and bools (B, N, H): odd queries, odd keys or values.

    tables: cos and sin (N, d); None for no rotation.
    """
    batch, n, _, heads, dim = qkv.shape
    safe = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    odd_q, odd_kv = (torch.empty(batch, n, heads, dtype=torch.bool, device=qkv.device) for _ in range(2))
    if odd_q.numel():
        block = next_power_of_2(dim // 2)
        rows = max(NUMBERS // block, 1)
        cos, sin = (None, None) if tables is None else (table.contiguous() for table in tables)
        launch(
            _finite_heads_kernel, (cdiv(odd_q.numel(), rows),),
            qkv.contiguous(), cos, sin, safe, odd_q.view(torch.int8), odd_kv.view(torch.int8),
            odd_q.numel(), n, heads, dim // 2,
            TURN=tables is not None, LARGEST=largest, DTYPE=arithmetic(qkv.dtype), ROWS=rows, BLOCK_HALF=block,
            num_warps=4,
        )  # fmt: skip
    return safe, odd_q, odd_kv


def spoil(out: Tensor, lse: Tensor | None, odd_q: Tensor, odd_kv: Tensor, mask: Tensor | None, window: int) -> Tensor:
    """Which rows (B, N, H) have an odd query, or see an odd key or value, one of `window` before or their own.

    Rows of out (B, N, H, d), contiguous, become NaN there, and those of lse (B, H, N), contiguous, +inf.
    """
    batch, n, heads, dim = out.shape
    odd = torch.empty_like(odd_q)
    if odd.numel():
        block = min(next_power_of_2(heads), HEADS)
        launch(
            _spoil_kernel, (batch * cdiv(n, TOKENS), cdiv(heads, block)),
            out, lse, odd_q, odd_kv, contiguous(mask), odd, n, heads, dim, min(window, n),
            HAS_MASK=mask is not None, HAS_LSE=lse is not None, TOKENS=TOKENS, BLOCK_H=block, num_warps=2,
        )  # fmt: skip
    return odd
