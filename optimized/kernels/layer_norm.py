"""LayerNorm of rows, and its backward in one pass; no atomics.

x (M, D) -> y = (x - m) r w + b with m the mean of a row, r = 1 / sqrt(mean (x - m)^2 + eps), in at least float32. With
z = (x - m) r and h = g w

    dx = r (h - mean h - z mean (h z)),   dw = sum over rows of g z,   db = sum over rows of g

Masked rows are not read: they count as zeros, whose norm is b, and pass nothing on but their part of db. A program of
the backward takes `CHUNK` rows and writes its partial sums of dw and db, see `partial_sums`.

Blind spots: a row lies in registers, so D has a most (`MAX_BLOCK_D`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import (
    MAX_BLOCK_D,
    arithmetic,
    cdiv,
    contiguous,
    double_bits,
    from_bits,
    launch,
    next_power_of_2,
    wide,
)
from optimized.kernels.partial_sums import Sum, add_up

CHUNK = 64  # rows of a program of the backward
TILE = 4096  # numbers that a program holds of x at a time, half as many in float64


@triton.jit
def _shown(mask_ptr, row, rows, HAS_MASK: tl.constexpr):
    inside = row < rows
    if HAS_MASK:
        return tl.load(mask_ptr + row, mask=inside, other=0) != 0
    return inside


@triton.jit(do_not_specialize=["rows", "eps_bits"])
def _norm_kernel(
    x_ptr, w_ptr, b_ptr, mask_ptr, y_ptr, mean_ptr, rate_ptr, rows, dim, eps_bits,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_D)
    inside = channels < dim
    at = row[:, None] * dim + channels[None, :]
    shown = _shown(mask_ptr, row, rows, HAS_MASK)
    x = tl.load(x_ptr + at, mask=shown[:, None] & inside[None, :], other=0.0).to(DTYPE)
    mean = tl.sum(x, 1) / dim
    apart = tl.where(inside[None, :], x - mean[:, None], 0.0)
    rate = 1.0 / tl.sqrt(tl.sum(apart * apart, 1) / dim + from_bits(eps_bits).to(DTYPE))
    y = apart * rate[:, None] * tl.load(w_ptr + channels, mask=inside, other=0.0).to(DTYPE)[None, :]
    if HAS_BIAS:
        y += tl.load(b_ptr + channels, mask=inside, other=0.0).to(DTYPE)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rate_ptr + row, rate, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "chunks"])
def _norm_backward_kernel(
    g_ptr, x_ptr, w_ptr, mask_ptr, mean_ptr, rate_ptr, dx_ptr, partial_ptr, rows, dim, chunks,
    HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial (2, chunks, D): of dw, and of db."""
    chunk = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    inside = channels < dim
    w = tl.load(w_ptr + channels, mask=inside, other=0.0).to(DTYPE)[None, :]
    dw = tl.zeros((ROWS, BLOCK_D), DTYPE)
    db = tl.zeros((ROWS, BLOCK_D), DTYPE)
    for start in range(0, CHUNK, ROWS):
        row = chunk * CHUNK + start + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * dim + channels[None, :]
        shown = _shown(mask_ptr, row, rows, HAS_MASK)
        g = tl.load(g_ptr + at, mask=there, other=0.0).to(DTYPE)
        x = tl.load(x_ptr + at, mask=shown[:, None] & inside[None, :], other=0.0).to(DTYPE)
        mean = tl.load(mean_ptr + row, mask=shown, other=0.0)
        rate = tl.load(rate_ptr + row, mask=shown, other=0.0)
        z = tl.where(inside[None, :], (x - mean[:, None]) * rate[:, None], 0.0)
        h = g * w
        along = tl.sum(h * z, 1) / dim
        dx = rate[:, None] * (h - (tl.sum(h, 1) / dim)[:, None] - z * along[:, None])
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=there)
        dw += g * z
        db += g
    partial_ptr += chunk * dim + channels
    tl.store(partial_ptr, tl.sum(dw, 0), mask=inside)
    tl.store(partial_ptr + tl.cast(chunks, tl.int64) * dim, tl.sum(db, 0), mask=inside)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y in x's dtype, means and rates, of x's shape but for the channels. mask: of that shape, bool."""
    x = x.contiguous()
    y, (rows, dim) = torch.empty_like(x), _shape(x)
    mean, rate = (torch.empty(x.shape[:-1], dtype=wide(x.dtype), device=x.device) for _ in range(2))
    if y.numel():
        sizes = _sizes(x, dim)
        launch(
            _norm_kernel, (cdiv(rows, sizes["ROWS"]),),
            x, weight.contiguous(), contiguous(bias), contiguous(mask), y, mean, rate, rows, dim, double_bits(eps),
            HAS_MASK=mask is not None, HAS_BIAS=bias is not None, **sizes,
        )  # fmt: skip
    return y, mean, rate


def layer_norm_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    mean: Tensor,
    rate: Tensor,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx in x's dtype, dw and db (D) in these, None of one without."""
    x, g = x.contiguous(), g.contiguous()
    dx, (rows, dim) = torch.empty_like(x), _shape(x)
    chunks = cdiv(rows, CHUNK)
    partial = torch.empty(2, chunks, dim, dtype=wide(x.dtype), device=x.device)
    if dx.numel():
        launch(
            _norm_backward_kernel, (chunks,),
            g, x, weight.contiguous(), contiguous(mask), mean.contiguous(), rate.contiguous(), dx, partial,
            rows, dim, chunks,
            HAS_MASK=mask is not None, CHUNK=CHUNK, **_sizes(x, dim),
        )  # fmt: skip
    dw, db = (None if dtype is None else torch.empty(dim, dtype=dtype, device=x.device) for dtype in dtypes)
    sums = [Sum(out, 1, chunks, i * chunks * dim) for i, out in enumerate((dw, db)) if out is not None]
    if sums:
        add_up(partial, dim, dim, *sums)
    return dx, dw, db


def _shape(x: Tensor) -> tuple[int, int]:
    dim = x.shape[-1]
    return x.numel() // dim if dim else 0, dim


def _sizes(x: Tensor, dim: int) -> dict[str, Any]:
    """A warp for 4 KB of the arithmetic's numbers."""
    kind, block = wide(x.dtype), next_power_of_2(dim)
    assert block <= MAX_BLOCK_D
    rows = max(min(TILE * 4 // kind.itemsize // block, 16), 1)
    warps = min(max(rows * block * kind.itemsize // 4096, 1), 16)
    return {"DTYPE": arithmetic(x.dtype), "ROWS": rows, "BLOCK_D": block, "num_warps": warps}
