"""Attention in a sliding window: forward, and backward without atomics.

q, k, v (B, N, H, d) of any strides but that of d, which is 1. Token i sees the valid tokens j with
-before <= j - i <= after, and itself:

    s = <q_i, k_j> / sqrt(d),   P = softmax over what i sees,   out = P v,   lse = log sum exp s
    D_i = <dout_i, out_i>,   dS = P (dout v^T - D) / sqrt(d)
    dq_i = sum_j dS_ij k_j,   dk_j = sum_i dS_ij q_i,   dv = P^T dout

q and k come rotated, by whoever owns them; the gradients of both are turned back before they are rounded and stored.

A program of the forward, and of dq, has a block of queries and goes through the blocks of keys in reach; one of dk and
dv has a block of keys and goes through queries. Only blocks at the ends of the window or of the sequence ask for each
pair whether it is seen; with a mask all do. dq's program also stores D, for the other. A tile holds the channels of
both halves of d beside each other, each padded to a power of 2, so that a rotation is a matter of its two halves.

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
    cdiv,
    contiguous,
    double_bits,
    from_bits,
    launch,
    next_power_of_2,
    wide,
)
from optimized.kernels.probability import along, at_most_one

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(1 << 30)  # twice as many tokens as a row may have


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
def _places(half, BLOCK_HALF: tl.constexpr):
    """Channel of each place in a tile, and whether there is one."""
    place = tl.arange(0, 2 * BLOCK_HALF)
    return place % BLOCK_HALF + place // BLOCK_HALF * half, place % BLOCK_HALF < half


@triton.jit
def _tile(ptr, rows, stride, shown, half, BLOCK_HALF: tl.constexpr):
    """Rows of ptr; 0 where they are not shown."""
    channels, inside = _places(half, BLOCK_HALF)
    at = rows[:, None].to(tl.int64) * stride + channels[None, :]
    return tl.load(ptr + at, mask=shown[:, None] & inside[None, :], other=0.0)


@triton.jit
def _store(ptr, rows, stride, shown, tile, half, BLOCK_HALF: tl.constexpr):
    channels, inside = _places(half, BLOCK_HALF)
    at = rows[:, None].to(tl.int64) * stride + channels[None, :]
    tl.store(ptr + at, tile.to(ptr.dtype.element_ty), mask=shown[:, None] & inside[None, :])


@triton.jit
def _turned_back(tile, rows, shown, cos_ptr, sin_ptr, half, BLOCK_HALF: tl.constexpr):
    """The gradient of what was rotated to the places of `tile`, at positions `rows`."""
    first, second = tl.split(tl.trans(tl.reshape(tile, (tile.shape[0], 2, BLOCK_HALF)), (0, 2, 1)))
    channels = tl.arange(0, BLOCK_HALF)
    keep = shown[:, None] & (channels < half)[None, :]
    at = rows[:, None].to(tl.int64) * (2 * half) + channels[None, :]
    cos1, sin1 = tl.load(cos_ptr + at, mask=keep, other=0.0), tl.load(sin_ptr + at, mask=keep, other=0.0)
    cos2, sin2 = tl.load(cos_ptr + at + half, mask=keep, other=0.0), tl.load(sin_ptr + at + half, mask=keep, other=0.0)
    both = tl.join(first * cos1 + second * sin2, second * cos2 - first * sin1)
    return tl.reshape(tl.trans(both, (0, 2, 1)), (tile.shape[0], 2 * BLOCK_HALF))


@triton.jit
def _valid(mask_ptr, rows, n, HAS_MASK: tl.constexpr):
    inside = (rows >= 0) & (rows < n)
    if HAS_MASK:
        return tl.load(mask_ptr + rows, mask=inside, other=0) != 0
    return inside


@triton.jit
def _seen(i, j, valid_i, valid_j, before, after, HAS_MASK: tl.constexpr):
    """Whether a query at i sees a key at j: by one comparison of unsigned numbers, where what is negative is too large.

    With a mask each sees itself, too, so that no sum is empty.
    """
    last = tl.where(valid_j, j, -FAR)
    first = i - before
    if HAS_MASK:
        first = tl.where(valid_i, first, FAR)
    seen = (last - first).to(tl.uint32, bitcast=True) <= (before + after).to(tl.uint32)
    if HAS_MASK:
        seen = seen | (i == j)
    return seen


@triton.jit
def _cut(i, j, before, after, n, HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether one of BLOCK_M queries from i on may not see one of BLOCK_N keys from j on."""
    whole = (j - i >= BLOCK_M - 1 - before) & (j - i <= after - BLOCK_N + 1) & (j + BLOCK_N <= n)
    return (not whole) | HAS_MASK


@triton.jit(do_not_specialize=["n", "heads", "before", "after", "scale_bits"])
def _window_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, lse_ptr,
    n, heads, half, before, after, scale_bits, stride_b, stride_n, stride_h, v_b, v_n, v_h,
    HAS_MASK: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = tl.program_id(0) // blocks % heads
    offset = b * stride_b + h.to(tl.int64) * stride_h
    v_ptr += b * v_b + h.to(tl.int64) * v_h
    result = (b * n * heads + h) * (2 * half)
    mask_ptr += b * n
    i = first + tl.arange(0, BLOCK_M)
    here = i < n
    valid_i = _valid(mask_ptr, i, n, HAS_MASK)
    q = _tile(q_ptr + offset, i, stride_n, here, half, BLOCK_HALF)
    to_base_2 = (from_bits(scale_bits) * LOG2_E).to(DTYPE)
    top = tl.full((BLOCK_M,), -float("inf"), DTYPE)
    total = tl.zeros((BLOCK_M,), DTYPE)
    out = tl.zeros((BLOCK_M, 2 * BLOCK_HALF), DTYPE)
    end = tl.minimum(n, first + BLOCK_M + after)
    for start in range(tl.maximum(first - before, 0) // BLOCK_N * BLOCK_N, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = _tile(k_ptr + offset, j, stride_n, j < n, half, BLOCK_HALF)
        v = _tile(v_ptr, j, v_n, j < n, half, BLOCK_HALF)
        s = _product(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), DTYPE), HALF, DTYPE)
        if _cut(first, start, before, after, n, HAS_MASK, BLOCK_M, BLOCK_N):
            valid_j = _valid(mask_ptr, j, n, HAS_MASK)
            seen = _seen(i[:, None], j[None, :], valid_i[:, None], valid_j[None, :], before, after, HAS_MASK)
            s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1) * to_base_2)
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # a block that shows nothing yet
        p = tl.exp2(s * to_base_2 - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(p, 1)
        out = _product(_rounded(p, v_ptr), v, out * fade[:, None], HALF, DTYPE)
        top = higher
    total = tl.where(here, total, 1.0)
    _store(out_ptr + result, i, heads * 2 * half, here, out / total[:, None], half, BLOCK_HALF)
    tl.store(lse_ptr + (b * heads + h) * n + i, (top + tl.log2(total)) * LN_2, mask=here)


@triton.jit(do_not_specialize=["n", "heads", "before", "after", "scale_bits"])
def _window_queries_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cos_ptr, sin_ptr, out_ptr, lse_ptr, dout_ptr, delta_ptr, dq_ptr,
    n, heads, half, before, after, scale_bits, stride_b, stride_n, stride_h, v_b, v_n, v_h, grad_b, grad_n, grad_h,
    HAS_MASK: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr, SPOILED: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, and D."""
    blocks = tl.cdiv(n, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = tl.program_id(0) // blocks % heads
    offset = b * stride_b + h.to(tl.int64) * stride_h
    v_ptr += b * v_b + h.to(tl.int64) * v_h
    result = (b * n * heads + h) * (2 * half)
    mask_ptr += b * n
    i = first + tl.arange(0, BLOCK_M)
    here = i < n
    valid_i = _valid(mask_ptr, i, n, HAS_MASK)
    q = _tile(q_ptr + offset, i, stride_n, here, half, BLOCK_HALF)
    row = (b * heads + h) * n + i
    lse = tl.load(lse_ptr + row, mask=here, other=0.0) * LOG2_E
    live = here
    if SPOILED:
        live = here & (lse < float("inf"))
    dout = _tile(dout_ptr + result, i, heads * 2 * half, live, half, BLOCK_HALF)
    out = _tile(out_ptr + result, i, heads * 2 * half, live, half, BLOCK_HALF)
    delta = along(dout.to(DTYPE), out.to(DTYPE))
    tl.store(delta_ptr + row, delta, mask=here)
    scale = from_bits(scale_bits).to(DTYPE)
    dq = tl.zeros((BLOCK_M, 2 * BLOCK_HALF), DTYPE)
    end = tl.minimum(n, first + BLOCK_M + after)
    for start in range(tl.maximum(first - before, 0) // BLOCK_N * BLOCK_N, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = _tile(k_ptr + offset, j, stride_n, j < n, half, BLOCK_HALF)
        v = _tile(v_ptr, j, v_n, j < n, half, BLOCK_HALF)
        s = _product(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), DTYPE), HALF, DTYPE)
        p = at_most_one(s * (scale * LOG2_E) - lse[:, None])
        if _cut(first, start, before, after, n, HAS_MASK, BLOCK_M, BLOCK_N):
            valid_j = _valid(mask_ptr, j, n, HAS_MASK)
            seen = _seen(i[:, None], j[None, :], valid_i[:, None], valid_j[None, :], before, after, HAS_MASK)
            p = tl.where(seen, p, 0.0)
        dp = _product(dout, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), DTYPE), HALF, DTYPE)
        dq = _product(_rounded(p * (dp - delta[:, None]) * scale, k_ptr), k, dq, HALF, DTYPE)
    dq = _turned_back(dq, i, here, cos_ptr, sin_ptr, half, BLOCK_HALF)
    _store(dq_ptr + b * grad_b + h.to(tl.int64) * grad_h, i, grad_n, here, dq, half, BLOCK_HALF)


@triton.jit(do_not_specialize=["n", "heads", "before", "after", "scale_bits"])
def _window_keys_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cos_ptr, sin_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
    n, heads, half, before, after, scale_bits, stride_b, stride_n, stride_h, v_b, v_n, v_h, grad_b, grad_n, grad_h,
    HAS_MASK: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr, SPOILED: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys."""
    blocks = tl.cdiv(n, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_N
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    h = tl.program_id(0) // blocks % heads
    offset = b * stride_b + h.to(tl.int64) * stride_h
    v_ptr += b * v_b + h.to(tl.int64) * v_h
    result = (b * n * heads + h) * (2 * half)
    mask_ptr += b * n
    j = first + tl.arange(0, BLOCK_N)
    here = j < n
    valid_j = _valid(mask_ptr, j, n, HAS_MASK)
    k = _tile(k_ptr + offset, j, stride_n, here, half, BLOCK_HALF)
    v = _tile(v_ptr, j, v_n, here, half, BLOCK_HALF)
    scale = from_bits(scale_bits).to(DTYPE)
    dk = tl.zeros((BLOCK_N, 2 * BLOCK_HALF), DTYPE)
    dv = tl.zeros((BLOCK_N, 2 * BLOCK_HALF), DTYPE)
    end = tl.minimum(n, first + BLOCK_N + before)
    for start in range(tl.maximum(first - after, 0) // BLOCK_M * BLOCK_M, end, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        there = i < n
        q = _tile(q_ptr + offset, i, stride_n, there, half, BLOCK_HALF)
        dout = _tile(dout_ptr + result, i, heads * 2 * half, there, half, BLOCK_HALF)
        row = (b * heads + h) * n + i
        lse = tl.load(lse_ptr + row, mask=there, other=0.0) * LOG2_E
        delta = tl.load(delta_ptr + row, mask=there, other=0.0)
        if SPOILED:
            dout = tl.where((lse < float("inf"))[:, None], dout, 0.0)
        s = _product(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), DTYPE), HALF, DTYPE)
        p = at_most_one(s * (scale * LOG2_E) - lse[None, :])
        if _cut(start, first, before, after, n, HAS_MASK, BLOCK_M, BLOCK_N):
            valid_i = _valid(mask_ptr, i, n, HAS_MASK)
            seen = _seen(i[None, :], j[:, None], valid_i[None, :], valid_j[:, None], before, after, HAS_MASK)
            p = tl.where(seen, p, 0.0)
        dv = _product(_rounded(p, dout_ptr), dout, dv, HALF, DTYPE)
        dp = _product(v, tl.trans(dout), tl.zeros((BLOCK_N, BLOCK_M), DTYPE), HALF, DTYPE)
        dk = _product(_rounded(p * (dp - delta[None, :]) * scale, q_ptr), q, dk, HALF, DTYPE)
    dk = _turned_back(dk, j, here, cos_ptr, sin_ptr, half, BLOCK_HALF)
    offset = b * grad_b + h.to(tl.int64) * grad_h
    _store(dk_ptr + offset, j, grad_n, here, dk, half, BLOCK_HALF)
    _store(dv_ptr + offset, j, grad_n, here, dv, half, BLOCK_HALF)


class Band(NamedTuple):
    """-before <= j - i <= after, of tokens that are valid; mask (B, N) bool or None."""

    before: int
    after: int
    mask: Tensor | None

    @classmethod
    def of(cls, n: int, window: int, causal: bool, mask: Tensor | None) -> Band:
        if n > FAR.value // 2:
            raise ValueError(f"n: expected at most {FAR.value // 2} tokens in a row, got {n}")
        before = min(window, max(n - 1, 0))
        return cls(before, 0 if causal else before, mask)


def window_attention(q: Tensor, k: Tensor, v: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """out (B, N, H, d) and lse (B, H, N), contiguous. q, k, v: (B, N, H, d); q and k rotated, of the same strides."""
    batch, n, heads, dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, heads, n, dtype=wide(q.dtype))
    if out.numel():
        sizes = _sizes(q.dtype, dim, "forward")
        launch(
            _window_kernel, (cdiv(n, sizes["BLOCK_M"]) * batch * heads,),
            *_read(q, k, v, band), out, lse, *_numbers(q, v, band), HAS_MASK=band.mask is not None, **sizes,
        )  # fmt: skip
    return out, lse


def window_attention_backward(
    dout: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    band: Band,
    angles: tuple[Tensor, Tensor],
    spoiled: bool = False,
) -> Tensor:
    """The gradient (B, N, 3, H, d), contiguous, of v, and of q and k before their rotation.

    qkv, out, lse: of the forward. angles: cos and sin (N, d) of that rotation. spoiled: where lse is +inf neither out
    nor dout is read, and nothing has a gradient of that row.
    """
    q, k, v = qkv
    batch, n, heads, dim = q.shape
    dqkv = q.new_empty(batch, n, 3, heads, dim)
    if not dqkv.numel():
        return dqkv
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    dq, dk, dv = dqkv.unbind(2)
    read, numbers = _read(q, k, v, band), (*_numbers(q, v, band), *dq.stride()[:3])
    for kernel, role, given in (
        (_window_queries_kernel, "queries", (out, lse, dout, delta, dq)),
        (_window_keys_kernel, "keys", (lse, dout, delta, dk, dv)),
    ):
        sizes = _sizes(q.dtype, dim, role)
        blocks = cdiv(n, sizes["BLOCK_N" if role == "keys" else "BLOCK_M"])
        launch(
            kernel, (blocks * batch * heads,), *read, *angles, *given, *numbers,
            HAS_MASK=band.mask is not None, SPOILED=spoiled, **sizes,
        )  # fmt: skip
    return dqkv


def _read(q: Tensor, k: Tensor, v: Tensor, band: Band) -> tuple[Tensor, ...]:
    assert q.stride() == k.stride()
    assert q.stride(-1) == v.stride(-1) == 1
    mask = contiguous(band.mask)
    if mask is not None and q.dtype == torch.float64:  # Triton to 3.6 lays a float64 product out by the narrowest of
        mask = mask.int()  # all that its factors were made from: https://github.com/triton-lang/triton/pull/11632
    return q, k, v, q if mask is None else mask


def _numbers(q: Tensor, v: Tensor, band: Band) -> tuple[int, ...]:
    _, n, heads, dim = q.shape
    return n, heads, dim // 2, band.before, band.after, double_bits(dim**-0.5), *q.stride()[:3], *v.stride()[:3]


def _sizes(dtype: torch.dtype, dim: int, role: str) -> dict[str, Any]:
    """Blocks and warps. A product has at least 16 channels."""
    half = max(next_power_of_2(dim // 2), 8)
    chunky = dtype in (torch.float16, torch.bfloat16)
    stages = 2
    if dtype == torch.float64:
        rows, warps = (16, 16), 4
    elif not chunky:  # of more channels as many numbers spill, of keys, which have two sums, sooner
        keys = role == "keys"
        rows, warps = (32, 32) if half <= (16 if keys else 32) else (16, 32) if keys else (32, 16), 8
    elif half <= 32:  # measured: docs/lab-log.md
        rows, warps, stages = (
            {"forward": (64, 32), "queries": (64, 32), "keys": (32, 64)}[role],
            4,
            1 if role == "keys" else 3,
        )
    else:
        rows, warps = (64, 64), 4 if role == "forward" else 8
    return {
        "HALF": chunky,
        "DTYPE": arithmetic(dtype),
        "BLOCK_M": rows[0],
        "BLOCK_N": rows[1],
        "BLOCK_HALF": half,
        "num_warps": warps,
        "num_stages": stages,
    }
