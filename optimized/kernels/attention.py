"""Attention over the keys of a row and a null slot, with dropout: forward, and backward without atomics.

q (R, L, H, d), k and v (R, S, H, d) of any strides but that of d, which is 1; null key and value (G, H, d), one for
every R / G rows, or none; lengths (R): the first keys of a row take part. With the null slot as key 0 of every query

    s = <q, k> / sqrt(d),   P = softmax s,   out = (Z P) v,   lse = log sum exp s
    D = <dout, out>,   dS = P (Z dout v^T - D),   dq = dS k / sqrt(d),   dk = dS^T q / sqrt(d),   dv = (Z P)^T dout

where Z is 1, or with dropout 0 or 1 / (1 - p): of a routed key by the bits of `keep`, of the null slot by a number of
its own. The null slot is where the online softmax begins, so no query is without a key; without a null slot one may be:
its out is 0, its lse -inf.

A program of the forward, and of dq, has a block of queries and goes through the keys; one of dk and dv has a block of
keys and goes through the queries. Only the last block of keys asks whether there is a key. dq's program also stores
(1 - p) D for the other, and its share of the gradient of the null key and value, see `partial_sums`.

Products are in the dtype of q with sums in float32, P and dS rounded to it in between; float32 in exact float32.
Blind spots: dk and dv compute the logits a second time (seven products in place of five).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import arithmetic, cdiv, contiguous, double_bits, from_bits, launch, next_power_of_2, wide
from optimized.kernels.partial_sums import Sum, add_up
from optimized.kernels.probability import at_most_one
from optimized.kernels.window import LN_2, LOG2_E, _product, _rounded

SIZES = ["queries", "keys", "heads", "rows_per_null", "scale_bits", "kept_bits"]


@triton.jit
def _tile(ptr, rows, stride, shown, DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows of ptr at int32 offsets; with MASKED 0 where they are not shown."""
    channels = tl.arange(0, BLOCK_D)
    at = ptr + (rows[:, None] * stride + channels[None, :])
    if MASKED:
        return tl.load(at, mask=shown[:, None] & (channels < DIM)[None, :], other=0.0)
    if DIM < BLOCK_D:
        return tl.load(at, mask=(channels < DIM)[None, :] & (rows >= 0)[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def _store(ptr, rows, stride, shown, tile, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    channels = tl.arange(0, BLOCK_D)
    at = ptr + (rows[:, None] * stride + channels[None, :])
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=shown[:, None] & (channels < DIM)[None, :])


@triton.jit
def _place(queries, heads, BLOCK: tl.constexpr):
    """Row, head, and first query or key of a program."""
    blocks = tl.cdiv(queries, BLOCK)
    program = tl.program_id(0)
    return (program // blocks // heads).to(tl.int64), program // blocks % heads, program % blocks * BLOCK


@triton.jit
def _kept(bits_ptr, i, here, first, words, BLOCK_N: tl.constexpr):
    """Whether queries i keep BLOCK_N keys from the first on, (M, N)."""
    word = first // 32 + tl.arange(0, BLOCK_N // 32)
    at = bits_ptr + (i[:, None] * words + word[None, :])
    bits = tl.load(at, mask=here[:, None] & (word < words)[None, :], other=0)
    spread = tl.broadcast_to(bits[:, :, None], (i.shape[0], BLOCK_N // 32, 32))
    bit = 1 << (tl.arange(0, BLOCK_N) % 32)
    return (tl.reshape(spread, (i.shape[0], BLOCK_N)) & bit[None, :]) != 0


@triton.jit
def _kept_by_key(bits_ptr, i, here, first, words, BLOCK_N: tl.constexpr):
    """The same transposed, (N, M)."""
    word = first // 32 + tl.arange(0, BLOCK_N // 32)
    at = bits_ptr + (i[None, :] * words + word[:, None])
    bits = tl.load(at, mask=here[None, :] & (word < words)[:, None], other=0)
    spread = tl.broadcast_to(bits[:, None, :], (BLOCK_N // 32, 32, i.shape[0]))
    bit = 1 << (tl.arange(0, BLOCK_N) % 32)
    return (tl.reshape(spread, (BLOCK_N, i.shape[0])) & bit[:, None]) != 0


@triton.jit
def _null_slot(null_k_ptr, null_v_ptr, keep_ptr, at, i, here, DIM: tl.constexpr, DTYPE: tl.constexpr,
               DROPOUT: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Key and value, and whether it is kept, 1 or 0."""
    channels = tl.arange(0, BLOCK_D)
    null_k = tl.load(null_k_ptr + at + channels, mask=channels < DIM, other=0.0).to(DTYPE)
    null_v = tl.load(null_v_ptr + at + channels, mask=channels < DIM, other=0.0).to(DTYPE)
    z = tl.full(i.shape, 1.0, DTYPE)
    if DROPOUT:
        z = tl.where(tl.load(keep_ptr + i, mask=here, other=0.0) > 0, 1.0, 0.0).to(DTYPE)
    return null_k, null_v, z


@triton.jit
def _attend(
    top, total, out, q, k_ptr, v_ptr, bits_ptr, i, here, start, end, words, stride_k, stride_v, to_base_2,
    DIM: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The online softmax with BLOCK_N keys from `start` on more. k_ptr, v_ptr: of that key."""
    j = tl.arange(0, BLOCK_N)
    shown = j < end - start
    k = _tile(k_ptr, j, stride_k, shown, DIM, BLOCK_D, MASKED)
    s = _product(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), DTYPE), HALF, DTYPE)
    if MASKED:
        s = tl.where(shown[None, :], s, -float("inf"))
    higher = tl.maximum(top, tl.max(s, 1) * to_base_2)
    shift = higher
    if MASKED:
        shift = tl.where(higher == -float("inf"), 0.0, higher)
    p = tl.exp2(s * to_base_2 - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(_kept(bits_ptr, i, here, start, words, BLOCK_N), p, 0.0)
    v = _tile(v_ptr, j, stride_v, shown, DIM, BLOCK_D, MASKED)
    return higher, total, _product(_rounded(p, v_ptr), v, out * fade[:, None], HALF, DTYPE)


@triton.jit(do_not_specialize=SIZES)
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, null_k_ptr, null_v_ptr, lengths_ptr, bits_ptr, keep_ptr, out_ptr, lse_ptr,
    queries, keys, heads, rows_per_null, scale_bits, kept_bits, q_r, q_l, q_h, k_r, k_l, k_h, v_r, v_l, v_h,
    DIM: tl.constexpr, HAS_NULL: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, HALF: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, h, first = _place(queries, heads, BLOCK_M)
    item = row * heads + h
    i = first + tl.arange(0, BLOCK_M)
    here = i < queries
    mine = tl.arange(0, BLOCK_M)
    q = _tile(q_ptr + row * q_r + h * q_h + tl.cast(first, tl.int64) * q_l, mine, q_l, here, DIM, BLOCK_D, True)
    words = tl.cdiv(keys, 32)
    bits_ptr += (item * queries + first) * words
    to_base_2 = (from_bits(scale_bits) * LOG2_E).to(DTYPE)
    top = tl.full((BLOCK_M,), -float("inf"), DTYPE)
    total = tl.zeros((BLOCK_M,), DTYPE)
    out = tl.zeros((BLOCK_M, BLOCK_D), DTYPE)
    if HAS_NULL:
        at = (row // rows_per_null * heads + h) * DIM
        null_k, null_v, z = _null_slot(
            null_k_ptr, null_v_ptr, keep_ptr + item * queries, at, i, here, DIM, DTYPE, DROPOUT, BLOCK_D
        )
        top = tl.sum(q.to(DTYPE) * null_k[None, :], 1) * to_base_2
        total += 1.0
        out = z[:, None] * null_v[None, :]
    end = keys
    if HAS_LENGTHS:
        end = tl.load(lengths_ptr + row)
    k_ptr += row * k_r + h * k_h
    v_ptr += row * v_r + h * v_h
    whole_blocks = end // BLOCK_N * BLOCK_N
    for start in range(0, whole_blocks, BLOCK_N):
        at_k, at_v = tl.cast(start, tl.int64) * k_l, tl.cast(start, tl.int64) * v_l
        top, total, out = _attend(
            top, total, out, q, k_ptr + at_k, v_ptr + at_v, bits_ptr, mine, here, start, end, words, k_l, v_l,
            to_base_2, DIM, DROPOUT, False, HALF, DTYPE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if whole_blocks < end:
        at_k, at_v = tl.cast(whole_blocks, tl.int64) * k_l, tl.cast(whole_blocks, tl.int64) * v_l
        top, total, out = _attend(
            top, total, out, q, k_ptr + at_k, v_ptr + at_v, bits_ptr, mine, here, whole_blocks, end, words, k_l, v_l,
            to_base_2, DIM, DROPOUT, True, HALF, DTYPE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    some = total > 0
    lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN_2, -float("inf"))
    out = out / (tl.where(some, total, 1.0) * from_bits(kept_bits).to(DTYPE))[:, None]
    result = out_ptr + ((row * queries + first) * heads + h) * DIM
    _store(result, mine, heads * DIM, here, out, DIM, BLOCK_D)
    tl.store(lse_ptr + item * queries + i, lse, mask=here)


@triton.jit
def _step_queries(
    dq, q, dout, lse, delta, k_ptr, v_ptr, bits_ptr, i, here, start, end, words, stride_k, stride_v, to_base_2,
    DIM: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq with the share of BLOCK_N keys from `start` on."""
    j = tl.arange(0, BLOCK_N)
    shown = j < end - start
    k = _tile(k_ptr, j, stride_k, shown, DIM, BLOCK_D, MASKED)
    v = _tile(v_ptr, j, stride_v, shown, DIM, BLOCK_D, MASKED)
    s = _product(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), DTYPE), HALF, DTYPE)
    p = at_most_one(s * to_base_2 - lse[:, None])
    if MASKED:
        p = tl.where(shown[None, :], p, 0.0)
    dp = _product(dout, tl.trans(v), tl.zeros((q.shape[0], BLOCK_N), DTYPE), HALF, DTYPE)
    if DROPOUT:
        dp = tl.where(_kept(bits_ptr, i, here, start, words, BLOCK_N), dp, 0.0)
    return _product(_rounded(p * (dp - delta[:, None]), k_ptr), k, dq, HALF, DTYPE)


@triton.jit(do_not_specialize=SIZES)
def _attention_queries_kernel(
    q_ptr, k_ptr, v_ptr, null_k_ptr, null_v_ptr, lengths_ptr, bits_ptr, keep_ptr, out_ptr, lse_ptr, dout_ptr,
    delta_ptr, dq_ptr, dnull_k_ptr, dnull_v_ptr,
    queries, keys, heads, rows_per_null, scale_bits, kept_bits, q_r, q_l, q_h, k_r, k_l, k_h, v_r, v_l, v_h,
    DIM: tl.constexpr, HAS_NULL: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, HALF: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, (1 - p) D, and partial sums (R, blocks, H, d) of the null slot's gradients."""
    row, h, first = _place(queries, heads, BLOCK_M)
    item = row * heads + h
    i = first + tl.arange(0, BLOCK_M)
    here = i < queries
    mine = tl.arange(0, BLOCK_M)
    q = _tile(q_ptr + row * q_r + h * q_h + tl.cast(first, tl.int64) * q_l, mine, q_l, here, DIM, BLOCK_D, True)
    result = ((row * queries + first) * heads + h) * DIM
    dout = _tile(dout_ptr + result, mine, heads * DIM, here, DIM, BLOCK_D, True)
    out = _tile(out_ptr + result, mine, heads * DIM, here, DIM, BLOCK_D, True)
    kept = from_bits(kept_bits).to(DTYPE)
    delta = tl.sum(dout.to(DTYPE) * out.to(DTYPE), 1) * kept
    tl.store(delta_ptr + item * queries + i, delta, mask=here)
    scale = from_bits(scale_bits).to(DTYPE)
    to_base_2 = (from_bits(scale_bits) * LOG2_E).to(DTYPE)
    # Of a query without any key: exp(s - inf) is 0.
    lse = tl.load(lse_ptr + item * queries + i, mask=here, other=0.0)
    lse = tl.where(lse == -float("inf"), float("inf"), lse) * LOG2_E
    dq = tl.zeros((BLOCK_M, BLOCK_D), DTYPE)
    if HAS_NULL:
        at = (row // rows_per_null * heads + h) * DIM
        null_k, null_v, z = _null_slot(
            null_k_ptr, null_v_ptr, keep_ptr + item * queries, at, i, here, DIM, DTYPE, DROPOUT, BLOCK_D
        )
        p0 = at_most_one(tl.sum(q.to(DTYPE) * null_k[None, :], 1) * to_base_2 - lse)
        p0 = tl.where(here, p0, 0.0)
        ds0 = p0 * (z * tl.sum(dout.to(DTYPE) * null_v[None, :], 1) - delta)
        dq = ds0[:, None] * null_k[None, :]
        channels = tl.arange(0, BLOCK_D)
        blocks = tl.cdiv(queries, BLOCK_M)
        partial = ((row * blocks + first // BLOCK_M) * heads + h) * DIM + channels
        dnull_k = tl.sum(ds0[:, None] * q.to(DTYPE), 0) * (scale / kept)
        dnull_v = tl.sum((p0 * z)[:, None] * dout.to(DTYPE), 0) / kept
        tl.store(dnull_k_ptr + partial, dnull_k, mask=channels < DIM)
        tl.store(dnull_v_ptr + partial, dnull_v, mask=channels < DIM)
    words = tl.cdiv(keys, 32)
    bits_ptr += (item * queries + first) * words
    end = keys
    if HAS_LENGTHS:
        end = tl.load(lengths_ptr + row)
    k_ptr += row * k_r + h * k_h
    v_ptr += row * v_r + h * v_h
    whole_blocks = end // BLOCK_N * BLOCK_N
    for start in range(0, whole_blocks, BLOCK_N):
        at_k, at_v = tl.cast(start, tl.int64) * k_l, tl.cast(start, tl.int64) * v_l
        dq = _step_queries(
            dq, q, dout, lse, delta, k_ptr + at_k, v_ptr + at_v, bits_ptr, mine, here, start, end, words, k_l, v_l,
            to_base_2, DIM, DROPOUT, False, HALF, DTYPE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if whole_blocks < end:
        at_k, at_v = tl.cast(whole_blocks, tl.int64) * k_l, tl.cast(whole_blocks, tl.int64) * v_l
        dq = _step_queries(
            dq, q, dout, lse, delta, k_ptr + at_k, v_ptr + at_v, bits_ptr, mine, here, whole_blocks, end, words,
            k_l, v_l, to_base_2, DIM, DROPOUT, True, HALF, DTYPE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    _store(dq_ptr + result, mine, heads * DIM, here, dq * (scale / kept), DIM, BLOCK_D)


@triton.jit
def _step_keys(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, bits_ptr, start, queries, first, words, stride_q, stride_dout,
    to_base_2,
    DIM: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv with the share of BLOCK_M queries from `start` on."""
    i = tl.arange(0, BLOCK_M)
    here = i < queries - start
    q = _tile(q_ptr + tl.cast(start, tl.int64) * stride_q, i, stride_q, here, DIM, BLOCK_D, MASKED)
    dout = _tile(dout_ptr + tl.cast(start, tl.int64) * stride_dout, i, stride_dout, here, DIM, BLOCK_D, MASKED)
    # Of no query, and of one without any key: exp(s - inf) is 0.
    lse = tl.load(lse_ptr + start + i, mask=here, other=-float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse) * LOG2_E
    delta = tl.load(delta_ptr + start + i, mask=here, other=0.0)
    s = _product(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), DTYPE), HALF, DTYPE)
    p = at_most_one(s * to_base_2 - lse[None, :])
    dp = _product(v, tl.trans(dout), tl.zeros((BLOCK_N, BLOCK_M), DTYPE), HALF, DTYPE)
    dropped = p
    if DROPOUT:
        kept = _kept_by_key(bits_ptr + tl.cast(start, tl.int64) * words, i, here, first, words, BLOCK_N)
        dropped = tl.where(kept, p, 0.0)
        dp = tl.where(kept, dp, 0.0)
    dv = _product(_rounded(dropped, dout_ptr), dout, dv, HALF, DTYPE)
    dk = _product(_rounded(p * (dp - delta[None, :]), q_ptr), q, dk, HALF, DTYPE)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def _attention_keys_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, bits_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
    queries, keys, heads, rows_per_null, scale_bits, kept_bits,
    q_r, q_l, q_h, k_r, k_l, k_h, v_r, v_l, v_h, dk_r, dk_l, dk_h, dv_r, dv_l, dv_h,
    DIM: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, HALF: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, 0 where they take no part."""
    row, h, first = _place(keys, heads, BLOCK_N)
    item = row * heads + h
    j = tl.arange(0, BLOCK_N)
    words = tl.cdiv(keys, 32)
    end = keys
    if HAS_LENGTHS:
        end = tl.load(lengths_ptr + row)
    shown = j < end - first
    k = _tile(k_ptr + row * k_r + h * k_h + tl.cast(first, tl.int64) * k_l, j, k_l, shown, DIM, BLOCK_D, True)
    v = _tile(v_ptr + row * v_r + h * v_h + tl.cast(first, tl.int64) * v_l, j, v_l, shown, DIM, BLOCK_D, True)
    to_base_2 = (from_bits(scale_bits) * LOG2_E).to(DTYPE)
    dk = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    dv = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    q_ptr += row * q_r + h * q_h
    dout_ptr += (row * queries * heads + h) * DIM
    lse_ptr += item * queries
    delta_ptr += item * queries
    bits_ptr += item * queries * words
    seeing = tl.where(first < end, queries, 0)
    whole_blocks = seeing // BLOCK_M * BLOCK_M
    for start in range(0, whole_blocks, BLOCK_M):
        dk, dv = _step_keys(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, bits_ptr, start, queries, first, words, q_l, heads * DIM,
            to_base_2, DIM, DROPOUT, False, HALF, DTYPE, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if whole_blocks < seeing:
        dk, dv = _step_keys(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, bits_ptr, whole_blocks, queries, first, words, q_l,
            heads * DIM, to_base_2, DIM, DROPOUT, True, HALF, DTYPE, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    kept = from_bits(kept_bits).to(DTYPE)
    dk = tl.where(shown[:, None], dk * (from_bits(scale_bits).to(DTYPE) / kept), 0.0)
    dv = tl.where(shown[:, None], dv / kept, 0.0)
    there = j < keys - first
    _store(dk_ptr + row * dk_r + h * dk_h + tl.cast(first, tl.int64) * dk_l, j, dk_l, there, dk, DIM, BLOCK_D)
    _store(dv_ptr + row * dv_r + h * dv_h + tl.cast(first, tl.int64) * dv_l, j, dv_l, there, dv, DIM, BLOCK_D)


class Attention(NamedTuple):
    """What both directions share. null: key and value; lengths (R) int32; dropout: a probability below 1.

    kept: with dropout the bits (R, H, L, W) of the routed keys, and of the null slot Z (R, H, L); see `keep`.
    """

    scale: float
    null: tuple[Tensor, Tensor] | None
    lengths: Tensor | None
    dropout: float
    kept: tuple[Tensor, Tensor] | None


def attention(q: Tensor, k: Tensor, v: Tensor, call: Attention) -> tuple[Tensor, Tensor]:
    """out (R, L, H, d) and lse (R, H, L), contiguous."""
    rows, length, heads, dim = q.shape
    out = torch.empty((rows, length, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((rows, heads, length), dtype=wide(q.dtype), device=q.device)
    if q.numel():
        q, k, v = map(_side_by_side, (q, k, v))
        sizes = _sizes(q.dtype, dim, "forward")
        launch(
            _attention_kernel, (cdiv(length, sizes["BLOCK_M"]) * rows * heads,),
            q, k, v, *_null(q, call), *_read(q, call), out, lse, *_arguments(q, k, v, call),
            HAS_NULL=call.null is not None, HAS_LENGTHS=call.lengths is not None, DROPOUT=call.dropout > 0, **sizes,
        )  # fmt: skip
    return out, lse


def attention_backward(
    dout: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    call: Attention,
    into: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor | None]:
    """dq, contiguous, and the gradient (2, G, H, d) of the null key and value; dk and dv are written to `into`."""
    q, k, v = map(_side_by_side, qkv)
    rows, length, heads, dim = q.shape
    dk, dv = into
    dq = torch.empty((rows, length, heads, dim), dtype=q.dtype, device=q.device)
    dnull = None if call.null is None else call.null[0].new_empty(2, call.null[0].shape[0], heads, dim)
    if not q.numel():
        for gradient in (*into, *(() if dnull is None else (dnull,))):
            gradient.zero_()
        return dq, dnull
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    shared, read = _arguments(q, k, v, call), _read(q, call)
    constants = {"HAS_LENGTHS": call.lengths is not None, "DROPOUT": call.dropout > 0}
    sizes = _sizes(q.dtype, dim, "queries")
    blocks = cdiv(length, sizes["BLOCK_M"])
    shape = (2, 1) if dnull is None else (2, rows, blocks, heads, dim)
    partial = torch.empty(shape, dtype=lse.dtype, device=q.device)
    launch(
        _attention_queries_kernel, (blocks * rows * heads,),
        q, k, v, *_null(q, call), *read, out, lse, dout, delta, dq, *partial, *shared,
        HAS_NULL=dnull is not None, **constants, **sizes,
    )  # fmt: skip
    if dnull is not None:
        groups = dnull.shape[1]
        add_up(partial, heads * dim, heads * dim, Sum(dnull, 2 * groups, rows // groups * blocks))
    if k.shape[1]:
        sizes = _sizes(q.dtype, dim, "keys")
        launch(
            _attention_keys_kernel, (cdiv(k.shape[1], sizes["BLOCK_N"]) * rows * heads,),
            q, k, v, *read[:2], lse, dout, delta, dk, dv, *shared, *dk.stride()[:3], *dv.stride()[:3],
            **constants, **sizes,
        )  # fmt: skip
    return dq, dnull


def _side_by_side(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _null(q: Tensor, call: Attention) -> tuple[Tensor, Tensor]:
    if call.null is None:
        return q, q
    null_k, null_v = call.null
    return null_k.contiguous(), null_v.contiguous()


def _read(q: Tensor, call: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths, bits, and Z of the null slot, or what is not read."""
    lengths = contiguous(call.lengths)
    bits, keep = (q, q) if call.kept is None else call.kept
    return q if lengths is None else lengths, bits.contiguous(), keep.contiguous()


def _arguments(q: Tensor, k: Tensor, v: Tensor, call: Attention) -> tuple[int, ...]:
    rows, length, heads, _ = q.shape
    groups = rows if call.null is None else call.null[0].shape[0]
    bits = double_bits(call.scale), double_bits(1 - call.dropout)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    return length, k.shape[1], heads, rows // groups, *bits, *strides


def _sizes(dtype: torch.dtype, dim: int, role: str) -> dict[str, Any]:
    """Blocks and warps, measured: docs/lab-log.md. A product has at least 16 channels, a word of bits 32 keys."""
    chunky = dtype in (torch.float16, torch.bfloat16)
    rows, warps, stages = (16, 32), 4, 2
    if chunky:
        rows, warps, stages = {
            "forward": ((64, 64), 4, 3),
            "queries": ((64, 64), 4, 3),
            "keys": ((32, 128), 4, 3),
        }[role]
    return {
        "DIM": dim,
        "HALF": chunky,
        "DTYPE": arithmetic(dtype),
        "BLOCK_M": rows[0],
        "BLOCK_N": rows[1],
        "BLOCK_D": max(next_power_of_2(dim), 16),
        "num_warps": warps,
        "num_stages": stages,
    }
