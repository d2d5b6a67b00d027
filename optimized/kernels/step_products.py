"""The projections of a decoding step before attention: of local attention, and of the experts' queries, in one launch.

With x (B, D), one token of each item, and its rates as of `step_tokens`,

    (x - m) rate w + b  times  W_qkv^T,   x r gamma[e]  times  W_q[e]^T for every expert e,

the norms rounded to x's dtype before, as if they had been written. Without norms of x itself. A program has a tile of
columns of one of these matrices, so each weight is read once for a tile of items; of one item, and in float64, the
products are sums over channels by all threads, else matrix products, which have at least 16 items.

Blind spots: every program normalises its tile of items anew.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import arithmetic, cdiv, launch, next_power_of_2
from optimized.kernels.window import _product, _rounded


@triton.jit
def _sums(
    PRODUCT: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Zeros to which `_more` adds."""
    if PRODUCT:
        return tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    else:  # noqa: RET505 - the compiler drops the other branch only so
        return tl.zeros((BLOCK_N, BLOCK_K), DTYPE)


@triton.jit
def _more(total, a, w, w_ptr, PRODUCT: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr):
    """total + a w^T of tiles (items, channels) and (columns, channels), a rounded as if it had been written."""
    if PRODUCT:
        total = _product(_rounded(a, w_ptr), tl.trans(w), total, HALF, DTYPE)
    else:
        total += _rounded(a, w_ptr).to(DTYPE) * w.to(DTYPE)
    return total


@triton.jit
def _whole(total, PRODUCT: tl.constexpr):
    """(items, columns)."""
    if PRODUCT:
        return total
    else:  # noqa: RET505
        return tl.sum(total, 1)[None, :]


@triton.jit
def _projected(
    x_ptr, b, shown, mean, rate, scale_ptr, first_scale, bias_ptr, w_ptr, rows, here, dim,
    NORM: tl.constexpr, BIAS: tl.constexpr, PRODUCT: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(items, columns): normalised items times rows of a matrix."""
    channels = tl.arange(0, BLOCK_K)
    total = _sums(PRODUCT, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K)
    for start in range(0, dim, BLOCK_K):
        at = start + channels
        inside = at < dim
        w = tl.load(w_ptr + rows + at[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptr + b[:, None] * dim + at[None, :], mask=shown[:, None] & inside[None, :], other=0.0).to(DTYPE)
        if NORM:
            x = (x - mean) * rate * tl.load(scale_ptr + first_scale + at, mask=inside, other=0.0).to(DTYPE)[None, :]
            if BIAS:
                x += tl.load(bias_ptr + at, mask=inside, other=0.0).to(DTYPE)[None, :]
            x = tl.where(inside[None, :], x, 0.0)
        total = _more(total, x, w, w_ptr, PRODUCT, HALF, DTYPE)
    return _whole(total, PRODUCT)


@triton.jit(do_not_specialize=["batch", "experts", "local_tiles", "expert_tiles"])
def _step_products_kernel(
    x_ptr, rates_ptr, norm_w_ptr, norm_b_ptr, gamma_ptr, w_qkv_ptr, w_q_ptr, out_ptr,
    batch, dim, experts, local_columns, expert_columns, local_tiles, expert_tiles,
    NORM: tl.constexpr, BIAS: tl.constexpr, PRODUCT: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    local = program < local_tiles
    e = tl.where(local, 0, (program - local_tiles) // expert_tiles).to(tl.int64)
    tile = tl.where(local, program, (program - local_tiles) % expert_tiles)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    here = column < tl.where(local, local_columns, expert_columns)
    b = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    shown = b < batch
    rows = column.to(tl.int64)[:, None] * dim
    mean = tl.load(rates_ptr + b, mask=b < tl.where(local, batch, 0), other=0.0)[:, None]
    rate = tl.load(rates_ptr + tl.where(local, batch, 2 * batch) + b, mask=shown, other=0.0)[:, None]
    if local:  # a pointer to one of two is more than every compiler can take
        out = _projected(
            x_ptr, b, shown, mean, rate, norm_w_ptr, 0, norm_b_ptr, w_qkv_ptr, rows, here, dim,
            NORM, BIAS, PRODUCT, HALF, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        out = _projected(
            x_ptr, b, shown, mean, rate, gamma_ptr, e * dim, gamma_ptr, w_q_ptr + e * expert_columns * dim, rows, here,
            dim, NORM, False, PRODUCT, HALF, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    width = local_columns + experts.to(tl.int64) * expert_columns
    out_ptr += b[:, None] * width + tl.where(local, 0, local_columns + e * expert_columns) + column[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=shown[:, None] & here[None, :])


def _items(batch: int, dtype: torch.dtype, channels: int, columns: int) -> dict[str, Any]:
    """Constants of products: items, columns and channels of a tile. columns: of several items; of one 8."""
    half = dtype in (torch.float16, torch.bfloat16)
    product = batch > 1 and dtype != torch.float64
    items = min(max(next_power_of_2(batch), 16), 64) if product else 1
    most = 128 // dtype.itemsize * (2 if product else 16)
    return {
        "PRODUCT": product,
        "HALF": half,
        "DTYPE": arithmetic(dtype),
        "BLOCK_M": items,
        "BLOCK_N": columns if product else 8,
        "BLOCK_K": max(min(next_power_of_2(channels), most), 16),
        "num_warps": 4,
        "num_stages": 4 if items <= 16 else 2,  # what more of them take does not fit everywhere
    }


def step_products(
    x: Tensor,
    rates: Tensor,
    norm: tuple[Tensor, Tensor | None, Tensor] | None,
    w_qkv: Tensor,
    w_q: Tensor,
    experts: int,
) -> Tensor:
    """(B, 3 h d + E H d) in x's dtype: local queries, keys and values, then the queries of every expert.

    x (B, D); rates (3, B); norm: w (D), b (D) or None, and gamma, E D numbers; matrices w_qkv (3 h d, D) and w_q
    (E H d, D, 1) in x's dtype.
    """
    (batch, dim), local_columns, expert_columns = x.shape, w_qkv.shape[0], w_q.shape[0] // experts
    out = x.new_empty(batch, local_columns + w_q.shape[0])
    constants = _items(batch, x.dtype, dim, 16)
    local_tiles, expert_tiles = (cdiv(n, constants["BLOCK_N"]) for n in (local_columns, expert_columns))
    w, b, gamma = (None, None, None) if norm is None else (None if t is None else t.contiguous() for t in norm)
    launch(
        _step_products_kernel, (local_tiles + experts * expert_tiles, cdiv(batch, constants["BLOCK_M"])),
        x.contiguous(), rates, w, b, gamma, w_qkv.contiguous(), w_q.contiguous(), out,
        batch, dim, experts, local_columns, expert_columns, local_tiles, expert_tiles,
        NORM=norm is not None, BIAS=b is not None, **constants,
    )  # fmt: skip
    return out
