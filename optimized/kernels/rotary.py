"""Rotary embedding of queries or keys at their original positions, forward and transposed.

t (R, L, H, d) with any strides but that of d, which is 1; tables cos, sin (P, d); position of slot l of row r, or l
itself. With the halves t = (t1, t2), and angles that need not be equal in both,

    out1 = t1 cos1 - t2 sin1,  out2 = t2 cos2 + t1 sin2;   transposed:  g1 cos1 + g2 sin2,  g2 cos2 - g1 sin1.

One program per slot reads and writes its H d numbers, so the result may be in place.

The tables of positions 0 .. N-1 at theta = 10000: angle i theta^(-2 j / d), j = 0 .. d/2 - 1 twice side by side, in
float64 until its cosine is known, since in float32 position 100000 is off by 0.004 radians.

Blind spots: none known; positions are trusted to lie in the tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import arithmetic, cdiv, contiguous, launch, next_power_of_2


@triton.jit(do_not_specialize=["length", "heads"])
def _rotary_kernel(
    t_ptr, cos_ptr, sin_ptr, positions_ptr, out_ptr,
    length, heads, half, stride_r, stride_l, stride_h, out_r, out_l, out_h,
    HAS_POSITIONS: tl.constexpr, TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    row = slot // length
    place = slot % length
    t_ptr += row * stride_r + place * stride_l
    out_ptr += row * out_r + place * out_l
    position = place
    if HAS_POSITIONS:
        position = tl.load(positions_ptr + slot)
    channels = tl.arange(0, BLOCK_HALF)
    table = position * (2 * half) + channels
    inside = channels < half
    cos1 = tl.load(cos_ptr + table, mask=inside, other=0.0).to(DTYPE)[None, :]
    sin1 = tl.load(sin_ptr + table, mask=inside, other=0.0).to(DTYPE)[None, :]
    cos2 = tl.load(cos_ptr + table + half, mask=inside, other=0.0).to(DTYPE)[None, :]
    sin2 = tl.load(sin_ptr + table + half, mask=inside, other=0.0).to(DTYPE)[None, :]
    for start in range(0, heads, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        keep = (h[:, None] < heads) & inside[None, :]
        tile = h[:, None].to(tl.int64) * stride_h + channels[None, :]
        t1 = tl.load(t_ptr + tile, mask=keep, other=0.0).to(DTYPE)
        t2 = tl.load(t_ptr + tile + half, mask=keep, other=0.0).to(DTYPE)
        if TRANSPOSED:
            first = t1 * cos1 + t2 * sin2
            second = t2 * cos2 - t1 * sin1
        else:
            first = t1 * cos1 - t2 * sin1
            second = t2 * cos2 + t1 * sin2
        tile = h[:, None].to(tl.int64) * out_h + channels[None, :]
        tl.store(out_ptr + tile, first.to(out_ptr.dtype.element_ty), mask=keep)
        tl.store(out_ptr + tile + half, second.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["n", "dim_head"])
def _tables_kernel(cos_ptr, sin_ptr, n, dim_head, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_HALF)
    half = dim_head // 2
    two = tl.full((BLOCK_HALF,), 2.0, tl.float64)
    log2_theta = tl.log2(tl.full((BLOCK_HALF,), 10000.0, tl.float64))
    frequencies = tl.exp2(-(two * channels / dim_head) * log2_theta)
    angles = rows[:, None].to(tl.float64) * frequencies[None, :]
    inside = (rows < n)[:, None] & (channels < half)[None, :]
    place = rows[:, None] * dim_head + channels[None, :]
    cos, sin = tl.cos(angles).to(cos_ptr.dtype.element_ty), tl.sin(angles).to(cos_ptr.dtype.element_ty)
    tl.store(cos_ptr + place, cos, mask=inside)
    tl.store(cos_ptr + place + half, cos, mask=inside)
    tl.store(sin_ptr + place, sin, mask=inside)
    tl.store(sin_ptr + place + half, sin, mask=inside)


def tables(n: int, dim_head: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (N, d) of positions 0 .. N-1."""
    cos, sin = (torch.empty(n, dim_head, device=device, dtype=dtype) for _ in range(2))
    if cos.numel():
        block_half = next_power_of_2(dim_head // 2)
        block_n = max(1024 // block_half, 1)
        launch(
            _tables_kernel, (cdiv(n, block_n),), cos, sin, n, dim_head,
            BLOCK_N=block_n, BLOCK_HALF=block_half, num_warps=4,
        )  # fmt: skip
    return cos, sin


def rotate(t: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, transposed: bool) -> Tensor:
    """(R, L, H, d), contiguous, in t's dtype. positions (R, L) int64, or None for 0 .. L-1."""
    out = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    rotate_into(out, t, cos, sin, positions, transposed)
    return out


def rotate_into(out: Tensor, t: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, transposed: bool) -> None:
    """The same into out, of any strides but that of d, which is 1; out may be t."""
    rows, length, heads, dim = t.shape
    t = t if t.stride(-1) == 1 else t.contiguous()
    if out.numel():
        block_half = next_power_of_2(dim // 2)
        block_h = min(next_power_of_2(heads), max(1024 // block_half, 1))
        launch(
            _rotary_kernel, (rows * length,),
            t, cos.contiguous(), sin.contiguous(), contiguous(positions), out,
            length, heads, dim // 2, *t.stride()[:3], *out.stride()[:3],
            HAS_POSITIONS=positions is not None, TRANSPOSED=transposed, DTYPE=arithmetic(t.dtype),
            BLOCK_H=block_h, BLOCK_HALF=block_half,
            num_warps=2 if block_h * block_half >= 64 else 1,  # in place: no number is held by two warps
        )  # fmt: skip
