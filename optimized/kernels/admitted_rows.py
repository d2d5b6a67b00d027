"""Products of the rows of columns that are ever listed (`admitted`), read by index: of each row of tokens and expert as
many as there are, which no one but the device knows. Tiles beyond them end at once.

Of a weight w (E, F, D) and a scale r = sqrt(D) / max(||x||, 1e-12) of a token (1 without norms):

    project:          out[e, b, n] = r w[e] x[b, n],
    rows_gradient:    h[e, b, n] = w[e]^T g[e, b, n], and <out, g> / r of every row, which is <gamma h, x> where out was
                      projected by w gamma: `token_gradient` asks for it, and it takes fewer channels than x has,
    weight_gradient:  dw[e] = sum over b and n of g[e, b, n] (r x[b, n])^T, in the order of items and columns, without
                      what of r x is not finite: a key that is not gets no gradient. r x is made once, for all experts
                      and tiles: a product that scales what it reads took twice as long.

Only rows of those columns are written. A program of the first two has some columns of an item and expert and some
channels; one of the last a tile of the weight, and goes through a part of the columns of each item; where tiles are few
to fill a GPU there are several parts, which `scaled_weight` adds up.

Blind spots: the grid is that of all columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.admitted import Admitted
from optimized.kernels.launch import (
    arithmetic,
    cdiv,
    channel_constants,
    clamped_norm,
    contiguous,
    launch,
    next_power_of_2,
    wide,
)
from optimized.kernels.memory_tiles import _finite
from optimized.kernels.window import _product

UNITS = 1024  # numbers of a program that scales rows, at least
PROGRAMS = 256  # that fill a GPU; with twice as many, parts, and their sum, took longer
SIZES = ["n", "batch", "experts"]


@triton.jit
def _scales(norms_ptr, token, there, root_dim, HAS_NORM: tl.constexpr, DTYPE: tl.constexpr):
    """r of tokens."""
    # root_dim is an integer: a Python float would arrive in float32.
    if HAS_NORM:
        root = tl.sqrt(tl.cast(root_dim, tl.float64)).to(DTYPE)
        return root / clamped_norm(tl.load(norms_ptr + token, mask=there, other=1.0))
    return tl.full(token.shape, 1.0, DTYPE)


@triton.jit
def _tile(ptr, rows, width, there, start, BLOCK: tl.constexpr):
    """Channels from start on of some rows; 0 where there is none."""
    channels = start + tl.arange(0, BLOCK)
    at = rows[:, None] * width + channels[None, :]
    return tl.load(ptr + at, mask=there[:, None] & (channels < width)[None, :], other=0.0)


@triton.jit(do_not_specialize=[*SIZES, "root_dim", "row_e"])
def _rows_kernel(
    t_ptr, w_ptr, columns_ptr, totals_ptr, norms_ptr, other_ptr, out_ptr, dots_ptr,
    n, batch, experts, root_dim, row_e, width, out_width, w_in, w_out,
    SCALED: tl.constexpr, DOTS: tl.constexpr, HAS_NORM: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of t (B, N, width), row_e = 0, or (E, B, N, width), row_e = B N, times w of strides w_in and w_out."""
    outer = tl.cdiv(out_width, BLOCK_N)
    tiles = tl.cdiv(n, BLOCK_M)
    first_out = tl.program_id(0) % outer * BLOCK_N
    first = tl.program_id(0) // outer % tiles * BLOCK_M
    b = (tl.program_id(0) // outer // tiles % batch).to(tl.int64)
    e = (tl.program_id(0) // outer // tiles // batch).to(tl.int64)
    total = tl.load(totals_ptr + b * experts + e)
    if first < total:
        at = first + tl.arange(0, BLOCK_M)
        there = at < total
        column = tl.load(columns_ptr + (b * experts + e) * n + at, mask=there, other=0).to(tl.int64)
        rows = e * row_e + b * n + column
        made = (e * batch + b) * n + column
        channels = first_out + tl.arange(0, BLOCK_N)
        inside = channels < out_width
        inner = tl.arange(0, BLOCK_K)
        w_ptr += e * width * out_width
        out = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
        for start in range(0, width, BLOCK_K):
            t = _tile(t_ptr, rows, width, there, start, BLOCK_K)
            place = (start + inner)[:, None] * w_in + channels[None, :] * w_out
            w = tl.load(w_ptr + place, mask=(start + inner < width)[:, None] & inside[None, :], other=0.0)
            out = _product(t, w, out, HALF, DTYPE)
        scale = _scales(norms_ptr, b * n + column, there, root_dim, HAS_NORM, DTYPE)
        if SCALED:
            out *= scale[:, None]
        stored = made[:, None] * out_width + channels[None, :]
        tl.store(out_ptr + stored, out.to(out_ptr.dtype.element_ty), mask=there[:, None] & inside[None, :])
        if DOTS and first_out == 0:
            dot = tl.zeros((BLOCK_M,), DTYPE)
            for start in range(0, width, BLOCK_K):
                t = _tile(t_ptr, rows, width, there, start, BLOCK_K).to(DTYPE)
                dot += tl.sum(t * _tile(other_ptr, rows, width, there, start, BLOCK_K).to(DTYPE), 1)
            tl.store(dots_ptr + made, tl.where(scale > 0, dot / scale, 0.0), mask=there)  # 0 of an infinite norm


@triton.jit(do_not_specialize=["rows", "root_dim"])
def _units_kernel(
    x_ptr, norms_ptr, out_ptr, rows, root_dim, dim,
    HAS_NORM: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = token < rows
    start = tl.program_id(1) * BLOCK_D
    x = _tile(x_ptr, token, dim, there, start, BLOCK_D).to(DTYPE)
    x *= _scales(norms_ptr, token, there, root_dim, HAS_NORM, DTYPE)[:, None]
    x = tl.where(_finite(x), x, 0.0)  # of a key that is not finite g is 0, and 0 times NaN is NaN
    channels = start + tl.arange(0, BLOCK_D)
    at = token[:, None] * dim + channels[None, :]
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=there[:, None] & (channels < dim)[None, :])


@triton.jit(do_not_specialize=[*SIZES, "parts"])
def _weight_kernel(
    g_ptr, x_ptr, columns_ptr, totals_ptr, dw_ptr, n, batch, experts, parts, g_width, dim,
    HALF: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x: rows r x, finite."""
    across = tl.cdiv(dim, BLOCK_N)
    down = tl.cdiv(g_width, BLOCK_M)
    first_n = tl.program_id(0) % across * BLOCK_N
    first_m = tl.program_id(0) // across % down * BLOCK_M
    e = (tl.program_id(0) // across // down % experts).to(tl.int64)
    part = (tl.program_id(0) // across // down // experts).to(tl.int64)
    dw = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    for item in range(batch):
        b = tl.cast(item, tl.int64)
        total = tl.load(totals_ptr + b * experts + e)
        end = (total * (part + 1) // parts).to(tl.int32)
        for begin in range((total * part // parts).to(tl.int32), end, BLOCK_K):
            at = begin + tl.arange(0, BLOCK_K)
            there = at < end
            column = tl.load(columns_ptr + (b * experts + e) * n + at, mask=there, other=0).to(tl.int64)
            g = _tile(g_ptr, (e * batch + b) * n + column, g_width, there, first_m, BLOCK_M)
            x = _tile(x_ptr, b * n + column, dim, there, first_n, BLOCK_N)
            dw = _product(tl.trans(g), x, dw, HALF, DTYPE)
    rows, channels = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    stored = ((part * experts + e) * g_width + rows[:, None]) * dim + channels[None, :]
    tl.store(dw_ptr + stored, dw, mask=(rows < g_width)[:, None] & (channels < dim)[None, :])


def project(x: Tensor, w: Tensor, norms: Tensor | None, listed: Admitted, out: Tensor) -> None:
    """Into out (E, B, N, F) the projected rows of x (B, N, D). w: (E, F, D); norms: (B, N), of tokens, or None."""
    _rows(x, w.contiguous(), norms, listed, out, 0, None, None)


def rows_gradient(
    g: Tensor, w: Tensor, norms: Tensor | None, listed: Admitted, projected: Tensor, dots: Tensor | None
) -> Tensor:
    """h (E, B, N, D) of g (E, B, N, F), uninitialised in other rows. projected: what `project` made of w gamma.

    dots: E B N numbers, side by side, which are given the products of both; None for no norm.
    """
    h = g.new_empty(*g.shape[:3], w.shape[2])
    _rows(g, w.contiguous().mT, norms, listed, h, g.shape[1] * g.shape[2], projected, dots)
    return h


def _rows(
    t: Tensor,
    w: Tensor,
    norms: Tensor | None,
    listed: Admitted,
    out: Tensor,
    row_e: int,
    other: Tensor | None,
    dots: Tensor | None,
) -> None:
    (experts, batch, n, out_width), width = out.shape, t.shape[-1]
    if out.numel():
        sizes = _sizes(t.dtype, n, out_width, width, 4)
        launch(
            _rows_kernel, (cdiv(out_width, sizes["BLOCK_N"]) * cdiv(n, sizes["BLOCK_M"]) * batch * experts,),
            t.contiguous(), w, listed.columns, listed.totals, contiguous(norms), contiguous(other), out, dots,
            n, batch, experts, width if other is None else out_width, row_e, width, out_width, w.stride(2), w.stride(1),
            SCALED=other is None, DOTS=dots is not None, HAS_NORM=norms is not None, **sizes,
        )  # fmt: skip


def weight_gradient(g: Tensor, x: Tensor, norms: Tensor | None, listed: Admitted) -> Tensor:
    """Parts of dw (parts, E, F, D) in at least float32, of g (E, B, N, F)."""
    experts, batch, n, width = g.shape
    dim = x.shape[2]
    sizes = _sizes(g.dtype, width, dim, n, 8)
    tiles = cdiv(dim, sizes["BLOCK_N"]) * cdiv(width, sizes["BLOCK_M"]) * experts
    parts = max(min(cdiv(PROGRAMS, max(tiles, 1)), cdiv(n, sizes["BLOCK_K"])), 1)
    dw = torch.empty(parts, experts, width, dim, dtype=wide(g.dtype), device=g.device)
    if dw.numel():
        launch(
            _weight_kernel, (tiles * parts,),
            g.contiguous(), _units(x, norms), listed.columns, listed.totals, dw,
            n, batch, experts, parts, width, dim, **sizes,
        )  # fmt: skip
    return dw


def _units(x: Tensor, norms: Tensor | None) -> Tensor:
    """r x of all tokens; 0 where it is not finite."""
    batch, n, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    constants = channel_constants(dim, x.dtype)
    rows = max(UNITS // constants["BLOCK_D"], 1)
    launch(
        _units_kernel, (cdiv(batch * n, rows), cdiv(dim, constants["BLOCK_D"])),
        x.contiguous(), contiguous(norms), out, batch * n, dim, dim, HAS_NORM=norms is not None, ROWS=rows, **constants,
    )  # fmt: skip
    return out


def _sizes(dtype: torch.dtype, rows: int, columns: int, inner: int, warps: int) -> dict[str, Any]:
    """Blocks and warps of a product (rows, inner) by (inner, columns). A product has at least 16 of each.

    warps: of large blocks in half precision.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if half:
        block_m, block_n, block_k = 128, 128, 64
    else:
        block_m, block_n, block_k = (16, 16, 16) if dtype == torch.float64 else (64, 64, 16)
    block_m, block_n, block_k = (
        max(min(block, next_power_of_2(max(size, 1))), 16)
        for block, size in ((block_m, rows), (block_n, columns), (block_k, inner))
    )
    return {
        "HALF": half,
        "DTYPE": arithmetic(dtype),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": 4 if block_m * block_n < 4096 else warps if half else 8,
        "num_stages": 3 if half else 2,
    }
