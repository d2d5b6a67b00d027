"""Attention in a sliding window of rotated queries and keys: forward, and backward without atomics.

q, k, v (B, N, H, d) of any strides but that of d, which is 1. Token i sees the valid tokens j with
-before <= j - i <= after, and itself; R_i is the rotation by the angles of position i:

    s = <R_i q_i, R_j k_j> / sqrt(d),   P = softmax over what i sees,   out = P v,   lse = log sum exp s
    D_i = <dout_i, out_i>,   dS = P (dout v^T - D) / sqrt(d)
    dq_i = R_i^T sum_j dS_ij R_j k_j,   dk_j = R_j^T sum_i dS_ij R_i q_i,   dv = P^T dout

A rotation by the angles of an absolute position drops out of <R_i q, R_j k> but for i - j. So a program rotates what it
reads by positions that it counts from its first neighbour on, and turns its gradient back by the same: one small table
serves all programs, and no rotated q or k is ever stored. The halves of d are two products.

A program of the forward, and of dq, has a block of queries and goes through the blocks of keys in reach; one of dk and
dv has a block of keys and goes through queries. All start at multiples of their block from its own first token, so only
the last block of a sequence and those at the ends of the window are cut. dq's program also stores D, for the other.

Products are in the dtype of q with sums in float32, P and dS rounded to it in between; float32 in exact float32.
Blind spots: dk and dv compute the logits a second time (seven products in place of five); a window shorter than a block
of keys wastes most of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import (
    INTERPRETED,
    arithmetic,
    as_bytes,
    cdiv,
    double_bits,
    from_bits,
    launch,
    next_power_of_2,
    wide,
)
from optimized.kernels.rotary import tables

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _product(a, b, total, HALF: tl.constexpr, DTYPE: tl.constexpr):
    """total + a b."""
    if HALF and not INTERPRETED:
        return tl.dot(a, b, total)
    if HALF:  # the interpreter multiplies the raw bits of bfloat16; TF32 holds every half precision number
        return tl.dot(a.to(DTYPE), b.to(DTYPE), total, input_precision="tf32")
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=DTYPE)


@triton.jit
def _rounded(t, ptr):
    """In the dtype that products take; not in the interpreter, which cuts off what a GPU rounds: sums would be off."""
    if INTERPRETED:
        return t
    return t.to(ptr.dtype.element_ty)


@triton.jit
def _turned(ptr, rows, stride, shown, cos_ptr, sin_ptr, places, half, BLOCK_HALF: tl.constexpr, DTYPE: tl.constexpr):
    """Both halves of rows, rotated by the angles of their places, in their own dtype; 0 where they are not shown."""
    channels = tl.arange(0, BLOCK_HALF)
    inside = (channels < half)[None, :]
    at = rows[:, None].to(tl.int64) * stride + channels[None, :]
    keep = shown[:, None] & inside
    first = tl.load(ptr + at, mask=keep, other=0.0).to(DTYPE)
    second = tl.load(ptr + at + half, mask=keep, other=0.0).to(DTYPE)
    table = places[:, None] * (2 * half) + channels[None, :]
    cos = tl.load(cos_ptr + table, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + table, mask=inside, other=0.0)
    return _rounded(first * cos - second * sin, ptr), _rounded(second * cos + first * sin, ptr)


@triton.jit
def _store_turned_back(
    ptr, rows, stride, shown, first, second, cos_ptr, sin_ptr, places, half, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, BLOCK_HALF)
    inside = (channels < half)[None, :]
    table = places[:, None] * (2 * half) + channels[None, :]
    cos = tl.load(cos_ptr + table, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + table, mask=inside, other=0.0)
    at = rows[:, None].to(tl.int64) * stride + channels[None, :]
    keep = shown[:, None] & inside
    tl.store(ptr + at, (first * cos + second * sin).to(ptr.dtype.element_ty), mask=keep)
    tl.store(ptr + at + half, (second * cos - first * sin).to(ptr.dtype.element_ty), mask=keep)


@triton.jit
def _rows_of(ptr, rows, stride, shown, dim, BLOCK_D: tl.constexpr):
    channels = tl.arange(0, BLOCK_D)
    at = rows[:, None].to(tl.int64) * stride + channels[None, :]
    return tl.load(ptr + at, mask=shown[:, None] & (channels < dim)[None, :], other=0.0)


@triton.jit
def _valid(mask_ptr, rows, n, HAS_MASK: tl.constexpr):
    inside = (rows >= 0) & (rows < n)
    if HAS_MASK:
        return tl.load(mask_ptr + rows, mask=inside, other=0) != 0
    return inside


@triton.jit
def _seen(i, j, valid_i, valid_j, before, after):
    """Whether a query at i sees a key at j. Each sees itself, so that no sum is empty."""
    return ((j - i >= -before) & (j - i <= after) & valid_i & valid_j) | (i == j)


@triton.jit(do_not_specialize=["n", "heads", "before", "after", "scale_bits"])
def _window_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, mask_ptr, out_ptr, lse_ptr,
    n, heads, half, before, after, scale_bits, stride_b, stride_n, stride_h,
    HAS_MASK: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, BLOCK_M)
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = tl.program_id(0) // blocks % heads
    offset = b * stride_b + h.to(tl.int64) * stride_h
    mask_ptr += b * n
    dim = 2 * half
    reach = tl.cdiv(before, BLOCK_N) * BLOCK_N  # positions are counted from as many tokens before the block
    base = block * BLOCK_M - reach
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = i < n
    valid_i = _valid(mask_ptr, i, n, HAS_MASK)
    own = reach + tl.arange(0, BLOCK_M)
    q1, q2 = _turned(q_ptr + offset, i, stride_n, here, cos_ptr, sin_ptr, own, half, BLOCK_HALF, DTYPE)
    to_base_2 = (from_bits(scale_bits) * LOG2_E).to(DTYPE)
    top = tl.full((BLOCK_M,), -float("inf"), DTYPE)
    total = tl.zeros((BLOCK_M,), DTYPE)
    out = tl.zeros((BLOCK_M, BLOCK_D), DTYPE)
    end = tl.minimum(n, block * BLOCK_M + BLOCK_M + after) - base
    for start in range(tl.maximum(0, -base) // BLOCK_N * BLOCK_N, end, BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        j = base + places
        valid_j = _valid(mask_ptr, j, n, HAS_MASK)
        inside = (j >= 0) & (j < n)
        k1, k2 = _turned(k_ptr + offset, j, stride_n, inside, cos_ptr, sin_ptr, places, half, BLOCK_HALF, DTYPE)
        v = _rows_of(v_ptr + offset, j, stride_n, inside, dim, BLOCK_D)
        s = _product(q1, tl.trans(k1), tl.zeros((BLOCK_M, BLOCK_N), DTYPE), HALF, DTYPE)
        s = _product(q2, tl.trans(k2), s, HALF, DTYPE) * to_base_2
        seen = _seen(i[:, None], j[None, :], valid_i[:, None], valid_j[None, :], before, after)
        s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # a block that shows nothing yet
        p = tl.exp2(s - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(p, 1)
        out = _product(_rounded(p, v_ptr), v, out * fade[:, None], HALF, DTYPE)
        top = higher
    total = tl.where(here, total, 1.0)
    channels = tl.arange(0, BLOCK_D)
    keep = here[:, None] & (channels < dim)[None, :]
    at = ((b * n + i[:, None]) * heads + h) * dim + channels[None, :]
    tl.store(out_ptr + at, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=keep)
    tl.store(lse_ptr + (b * heads + h) * n + i, (top + tl.log2(total)) * LN_2, mask=here)


@triton.jit(do_not_specialize=["n", "heads", "before", "after", "scale_bits"])
def _window_queries_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, mask_ptr, out_ptr, lse_ptr, dout_ptr, delta_ptr, dq_ptr,
    n, heads, half, before, after, scale_bits, stride_b, stride_n, stride_h, grad_b, grad_n, grad_h,
    HAS_MASK: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, and D."""
    blocks = tl.cdiv(n, BLOCK_M)
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = tl.program_id(0) // blocks % heads
    offset = b * stride_b + h.to(tl.int64) * stride_h
    result = (b * n * heads + h) * (2 * half)
    mask_ptr += b * n
    dim = 2 * half
    reach = tl.cdiv(before, BLOCK_N) * BLOCK_N
    base = block * BLOCK_M - reach
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = i < n
    valid_i = _valid(mask_ptr, i, n, HAS_MASK)
    own = reach + tl.arange(0, BLOCK_M)
    q1, q2 = _turned(q_ptr + offset, i, stride_n, here, cos_ptr, sin_ptr, own, half, BLOCK_HALF, DTYPE)
    dout = _rows_of(dout_ptr + result, i, heads * dim, here, dim, BLOCK_D)
    out = _rows_of(out_ptr + result, i, heads * dim, here, dim, BLOCK_D)
    delta = tl.sum(dout.to(DTYPE) * out.to(DTYPE), 1)
    row = (b * heads + h) * n + i
    tl.store(delta_ptr + row, delta, mask=here)
    scale = from_bits(scale_bits).to(DTYPE)
    lse = tl.load(lse_ptr + row, mask=here, other=0.0) * LOG2_E
    dq1 = tl.zeros((BLOCK_M, BLOCK_HALF), DTYPE)
    dq2 = tl.zeros((BLOCK_M, BLOCK_HALF), DTYPE)
    end = tl.minimum(n, block * BLOCK_M + BLOCK_M + after) - base
    for start in range(tl.maximum(0, -base) // BLOCK_N * BLOCK_N, end, BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        j = base + places
        valid_j = _valid(mask_ptr, j, n, HAS_MASK)
        inside = (j >= 0) & (j < n)
        k1, k2 = _turned(k_ptr + offset, j, stride_n, inside, cos_ptr, sin_ptr, places, half, BLOCK_HALF, DTYPE)
        v = _rows_of(v_ptr + offset, j, stride_n, inside, dim, BLOCK_D)
        s = _product(q1, tl.trans(k1), tl.zeros((BLOCK_M, BLOCK_N), DTYPE), HALF, DTYPE)
        s = _product(q2, tl.trans(k2), s, HALF, DTYPE) * (scale * LOG2_E)
        seen = _seen(i[:, None], j[None, :], valid_i[:, None], valid_j[None, :], before, after)
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        dp = _product(dout, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), DTYPE), HALF, DTYPE)
        ds = _rounded(p * (dp - delta[:, None]) * scale, k_ptr)
        dq1 = _product(ds, k1, dq1, HALF, DTYPE)
        dq2 = _product(ds, k2, dq2, HALF, DTYPE)
    offset = b * grad_b + h.to(tl.int64) * grad_h
    _store_turned_back(dq_ptr + offset, i, grad_n, here, dq1, dq2, cos_ptr, sin_ptr, own, half, BLOCK_HALF)


@triton.jit(do_not_specialize=["n", "heads", "before", "after", "scale_bits"])
def _window_keys_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, mask_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
    n, heads, half, before, after, scale_bits, stride_b, stride_n, stride_h, grad_b, grad_n, grad_h,
    HAS_MASK: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys."""
    blocks = tl.cdiv(n, BLOCK_N)
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = tl.program_id(0) // blocks % heads
    offset = b * stride_b + h.to(tl.int64) * stride_h
    result = (b * n * heads + h) * (2 * half)
    mask_ptr += b * n
    dim = 2 * half
    reach = tl.cdiv(after, BLOCK_M) * BLOCK_M  # queries as far before the block see its keys
    base = block * BLOCK_N - reach
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    here = j < n
    valid_j = _valid(mask_ptr, j, n, HAS_MASK)
    own = reach + tl.arange(0, BLOCK_N)
    k1, k2 = _turned(k_ptr + offset, j, stride_n, here, cos_ptr, sin_ptr, own, half, BLOCK_HALF, DTYPE)
    v = _rows_of(v_ptr + offset, j, stride_n, here, dim, BLOCK_D)
    scale = from_bits(scale_bits).to(DTYPE)
    dk1 = tl.zeros((BLOCK_N, BLOCK_HALF), DTYPE)
    dk2 = tl.zeros((BLOCK_N, BLOCK_HALF), DTYPE)
    dv = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    end = tl.minimum(n, block * BLOCK_N + BLOCK_N + before) - base
    for start in range(tl.maximum(0, -base) // BLOCK_M * BLOCK_M, end, BLOCK_M):
        places = start + tl.arange(0, BLOCK_M)
        i = base + places
        valid_i = _valid(mask_ptr, i, n, HAS_MASK)
        inside = (i >= 0) & (i < n)
        q1, q2 = _turned(q_ptr + offset, i, stride_n, inside, cos_ptr, sin_ptr, places, half, BLOCK_HALF, DTYPE)
        dout = _rows_of(dout_ptr + result, i, heads * dim, inside, dim, BLOCK_D)
        row = (b * heads + h) * n + i
        lse = tl.load(lse_ptr + row, mask=inside, other=0.0) * LOG2_E
        delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        s = _product(k1, tl.trans(q1), tl.zeros((BLOCK_N, BLOCK_M), DTYPE), HALF, DTYPE)
        s = _product(k2, tl.trans(q2), s, HALF, DTYPE) * (scale * LOG2_E)
        seen = _seen(i[None, :], j[:, None], valid_i[None, :], valid_j[:, None], before, after) & inside[None, :]
        p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
        dv = _product(_rounded(p, dout_ptr), dout, dv, HALF, DTYPE)
        dp = _product(v, tl.trans(dout), tl.zeros((BLOCK_N, BLOCK_M), DTYPE), HALF, DTYPE)
        ds = _rounded(p * (dp - delta[None, :]) * scale, q_ptr)
        dk1 = _product(ds, q1, dk1, HALF, DTYPE)
        dk2 = _product(ds, q2, dk2, HALF, DTYPE)
    offset = b * grad_b + h.to(tl.int64) * grad_h
    _store_turned_back(dk_ptr + offset, j, grad_n, here, dk1, dk2, cos_ptr, sin_ptr, own, half, BLOCK_HALF)
    channels = tl.arange(0, BLOCK_D)
    keep = here[:, None] & (channels < dim)[None, :]
    tl.store(
        dv_ptr + offset + j[:, None].to(tl.int64) * grad_n + channels[None, :],
        dv.to(dv_ptr.dtype.element_ty), mask=keep,
    )  # fmt: skip


class Band(NamedTuple):
    """-before <= j - i <= after, of tokens that are valid; mask (B, N) bool or None."""

    before: int
    after: int
    mask: Tensor | None

    @classmethod
    def of(cls, n: int, window: int, causal: bool, mask: Tensor | None) -> Band:
        before = min(window, max(n - 1, 0))
        return cls(before, 0 if causal else before, mask)


def window_attention(qkv: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """out (B, N, H, d) and lse (B, H, N), contiguous. qkv: (B, N, 3, H, d), not rotated."""
    batch, n, _, heads, dim = qkv.shape
    out = qkv.new_empty(batch, n, heads, dim)
    lse = qkv.new_empty(batch, heads, n, dtype=wide(qkv.dtype))
    if out.numel():
        sizes = _sizes(qkv.dtype, dim, backward=False)
        qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
        m, given = sizes["BLOCK_M"], _given(qkv, band, (sizes["BLOCK_M"], sizes["BLOCK_N"]))
        launch(
            _window_kernel, (cdiv(n, m) * batch * heads,),
            *qkv.unbind(2), *given.read, out, lse, *given.numbers,
            HAS_MASK=band.mask is not None, **sizes,
        )  # fmt: skip
    return out, lse


def window_attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, band: Band) -> Tensor:
    """The gradient (B, N, 3, H, d) of qkv, contiguous. out, lse: of the forward."""
    batch, n, _, heads, dim = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if not dqkv.numel():
        return dqkv
    sizes = _sizes(qkv.dtype, dim, backward=True)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    given = _given(qkv, band, (sizes["BLOCK_M"], sizes["BLOCK_N"]))
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    dq, dk, dv = dqkv.unbind(2)
    strides = dq.stride(0), dq.stride(1), dq.stride(2)
    numbers = *given.numbers, *strides
    launch(
        _window_queries_kernel, (cdiv(n, sizes["BLOCK_M"]) * batch * heads,),
        *qkv.unbind(2), *given.read, out, lse, dout, delta, dq, *numbers,
        HAS_MASK=band.mask is not None, **sizes,
    )  # fmt: skip
    launch(
        _window_keys_kernel, (cdiv(n, sizes["BLOCK_N"]) * batch * heads,),
        *qkv.unbind(2), *given.read, lse, dout, delta, dk, dv, *numbers,
        HAS_MASK=band.mask is not None, **sizes,
    )  # fmt: skip
    return dqkv


class _Given(NamedTuple):
    """What all three kernels are given: pointers to be read, and numbers."""

    read: tuple[Any, ...]
    numbers: tuple[int, ...]


def _given(qkv: Tensor, band: Band, blocks: tuple[int, int]) -> _Given:
    """Positions of a program: as many as the longer side of the window in blocks, its own, and the other side."""
    _, n, _, heads, dim = qkv.shape
    most = max(blocks)
    positions = (cdiv(band.before, most) + cdiv(band.after, most) + 2) * most
    mask = as_bytes(band.mask)
    angles = tables(positions, dim, qkv.device, wide(qkv.dtype))
    numbers = n, heads, dim // 2, band.before, band.after, double_bits(dim**-0.5)
    return _Given((*angles, qkv if mask is None else mask), (*numbers, qkv.stride(0), qkv.stride(1), qkv.stride(3)))


def _sizes(dtype: torch.dtype, dim: int, backward: bool) -> dict[str, Any]:
    """Blocks and warps. A product has at least 16 channels."""
    half = max(next_power_of_2(dim // 2), 16)
    chunky = dtype in (torch.float16, torch.bfloat16)
    if dtype == torch.float64:
        rows, warps = (16, 16), 4
    elif not chunky:
        rows, warps = (32, 32), 8
    elif backward:
        rows, warps = (64, 64), 4 if half <= 32 else 8
    else:
        rows, warps = (128, 64), 4 if half <= 32 else 8
    return {
        "HALF": chunky,
        "DTYPE": arithmetic(dtype),
        "BLOCK_M": rows[0],
        "BLOCK_N": rows[1],
        "BLOCK_HALF": half,
        "BLOCK_D": 2 * half,
        "num_warps": warps,
        "num_stages": 2,
    }
