"""Attention of each block's queries over its memory, whose keys are read by index, and the null key.

Query i of block j sees the columns k of M_j, and the null key 0. With sigma_k the score of a column (1 for the null
key), z a draw of dropout, 0 or 1 / (1 - p), or 1:

    s_ik = <q_i, k_k> / sqrt(d),   P = softmax over M_j and 0,   out_i = sum_k z_ik P_ik sigma_k v_k
    D_i = <dout_i, out_i>,   dP_ik = z_ik sigma_k <dout_i, v_k>,   dS = P (dP - D) / sqrt(d)
    dq_i = sum_k dS_ik k_k,   dk_k = sum_i dS_ik q_i,   u_k = sum_i z_ik P_ik dout_i
    dv_k = sigma_k u_k,   dsigma_k = sum over heads <u_k, v_k>

The sums over i are over the queries of all blocks that see a column. sigma is multiplied into P, not into the values.

A program of the forward, and of dq, has some queries of one block and head, and goes through the list of its memory.
One of dk and dv has some places of memory (`memory_places`) of one row and head, and goes through the blocks: it keeps
the sums in registers until a place is taken by another column. So no row of keys is ever copied, each gradient is
written once, sums go by blocks ascending, and what later blocks add to a column is exactly 0 where their cotangent is.

Where a query, a key, a value, a score or a logit that it sees is not finite, out is NaN in all channels of that head,
and the query takes part in no gradient. It is told by what became of its sums: a visible logit of -inf, which would
leave no trace, is made NaN first. lse is +inf there and in empty slots, which makes P = 0 in the backward; products
with what is not finite are selected away. A key that is not finite makes all queries of its block NaN, so that no query
with a gradient ever meets it.

Draws of dropout are a hash of (seed, query, column), so the backward has them anew; see `ops.memory_attention`.

Blind spots: dk and dv compute the logits a second time; programs that hold places are few where rows and heads are;
values whose sum, not mean, overflows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import from_bits, launch, wide
from optimized.kernels.memory_keys import keys_gradient
from optimized.kernels.memory_tiles import SIZES, Memories, _finite, _kept, _place, _store, _tile
from optimized.kernels.partial_sums import Sum, add_up
from optimized.kernels.probability import along, at_most_one
from optimized.kernels.window import LN_2, LOG2_E, _product, _rounded


@triton.jit
def _null(null_ptr, e, h, experts, heads, dim, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr):
    """The null key and value of an expert and head."""
    channels = tl.arange(0, BLOCK_D)
    at = (e * heads + h) * dim + channels
    size = experts.to(tl.int64) * heads * dim
    null_k = tl.load(null_ptr + at, mask=channels < dim, other=0.0).to(DTYPE)
    return null_k, tl.load(null_ptr + size + at, mask=channels < dim, other=0.0).to(DTYPE)


@triton.jit(do_not_specialize=SIZES)
def _memory_attention_kernel(
    q_ptr, kv_ptr, scores_ptr, null_ptr, counts_ptr, q_counts_ptr, seed_ptr, indices_ptr, out_ptr, lse_ptr,
    n, k, slots, blocks, batch, experts, heads, dim, tiles, scale_bits, drop, keep_bits,
    DROPOUT: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, j, h, tile, row_be = _place(blocks, batch, experts, heads, tiles)
    block = row_be * blocks + j
    filled = tl.load(q_counts_ptr + block)
    first = tile * BLOCK_M
    count = tl.where(first < filled, tl.load(counts_ptr + block), 0)
    i = first + tl.arange(0, BLOCK_M)
    here = i < tl.minimum(filled, slots)
    stride = heads * dim
    kv_ptr += row * n * 2 * stride + h * dim
    scores_ptr += row_be * n
    indices_ptr += block * k
    queries = ((row * heads + h) * blocks + j) * slots + i
    start = (row * blocks + j) * slots * stride + h * dim
    q = _tile(q_ptr + start, i, stride, here, dim, BLOCK_D)
    null_k, null_v = _null(null_ptr, row // batch, h, experts, heads, dim, DTYPE, BLOCK_D)
    to_base_2 = (from_bits(scale_bits) * LOG2_E).to(DTYPE)
    top = tl.sum(q.to(DTYPE) * null_k[None, :], 1) * to_base_2
    total = tl.where(_finite(top), 1.0, float("nan")).to(DTYPE)
    weight = tl.full((BLOCK_M,), 1.0, DTYPE)
    seed = tl.full((), 0, tl.int64)
    if DROPOUT:
        seed = tl.load(seed_ptr)
        weight = _kept(seed, queries, tl.full((BLOCK_M,), -1, tl.int64), n, drop, keep_bits, DTYPE)
    out = weight[:, None] * null_v[None, :]
    for begin in range(0, count, BLOCK_N):
        at = begin + tl.arange(0, BLOCK_N)
        seen = at < count
        columns = tl.load(indices_ptr + at, mask=seen, other=0)
        keys = _tile(kv_ptr, columns, 2 * stride, seen, dim, BLOCK_D)
        values = _tile(kv_ptr + stride, columns, 2 * stride, seen, dim, BLOCK_D)
        score = tl.load(scores_ptr + columns, mask=seen, other=0.0).to(DTYPE)
        s = _product(q, tl.trans(keys), tl.zeros((BLOCK_M, BLOCK_N), DTYPE), HALF, DTYPE)
        s = tl.where(s == -float("inf"), float("nan"), s)
        s = tl.where(seen[None, :], s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1) * to_base_2)
        p = tl.exp2(s * to_base_2 - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(p, 1)
        p = p * score[None, :]
        if DROPOUT:
            p = p * _kept(seed, queries[:, None], columns[None, :].to(tl.int64), n, drop, keep_bits, DTYPE)
        out = _product(_rounded(p, kv_ptr), values, out * fade[:, None], HALF, DTYPE)
        top = higher
    odd = (total != total) | (tl.min(_finite(out).to(tl.int32), 1) == 0)
    total = tl.where(here, total, 1.0)
    out = tl.where(odd[:, None], float("nan"), out / total[:, None])
    inside = i < slots
    _store(out_ptr + start, i, stride, inside, tl.where(here[:, None], out, 0.0), dim, BLOCK_D)
    lse = tl.where(here & (odd == 0), (top + tl.log2(total)) * LN_2, float("inf"))
    tl.store(lse_ptr + ((row * blocks + j) * heads + h) * slots + i, lse, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _memory_queries_kernel(
    q_ptr, kv_ptr, scores_ptr, null_ptr, counts_ptr, q_counts_ptr, seed_ptr, indices_ptr, out_ptr, lse_ptr, dout_ptr,
    delta_ptr, dq_ptr, dnull_ptr,
    n, k, slots, blocks, batch, experts, heads, dim, tiles, scale_bits, drop, keep_bits,
    DROPOUT: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq of some queries of a block; D; a part (2, E, B J tiles, H, d) of the gradient of the null key and value."""
    row, j, h, tile, row_be = _place(blocks, batch, experts, heads, tiles)
    block = row_be * blocks + j
    first = tile * BLOCK_M
    count = tl.where(first < tl.load(q_counts_ptr + block), tl.load(counts_ptr + block), 0)
    i = first + tl.arange(0, BLOCK_M)
    inside = i < slots
    stride = heads * dim
    kv_ptr += row * n * 2 * stride + h * dim
    scores_ptr += row_be * n
    indices_ptr += block * k
    queries = ((row * heads + h) * blocks + j) * slots + i
    start = (row * blocks + j) * slots * stride + h * dim
    place = ((row * blocks + j) * heads + h) * slots + i
    lse = tl.load(lse_ptr + place, mask=inside, other=float("inf"))
    live = lse < float("inf")
    q = _tile(q_ptr + start, i, stride, live, dim, BLOCK_D)
    dout = _tile(dout_ptr + start, i, stride, live, dim, BLOCK_D)
    out = _tile(out_ptr + start, i, stride, live, dim, BLOCK_D)
    delta = along(dout.to(DTYPE), out.to(DTYPE))
    tl.store(delta_ptr + place, delta, mask=inside)
    scale = from_bits(scale_bits).to(DTYPE)
    to_base_2 = (from_bits(scale_bits) * LOG2_E).to(DTYPE)
    lse = lse * LOG2_E
    null_k, null_v = _null(null_ptr, row // batch, h, experts, heads, dim, DTYPE, BLOCK_D)
    p0 = at_most_one(tl.sum(q.to(DTYPE) * null_k[None, :], 1) * to_base_2 - lse)
    weight = tl.full((BLOCK_M,), 1.0, DTYPE)
    seed = tl.full((), 0, tl.int64)
    if DROPOUT:
        seed = tl.load(seed_ptr)
        weight = _kept(seed, queries, tl.full((BLOCK_M,), -1, tl.int64), n, drop, keep_bits, DTYPE)
    ds0 = p0 * (weight * tl.sum(dout.to(DTYPE) * null_v[None, :], 1) - delta) * scale
    ds0 = tl.where(live, ds0, 0.0)
    dq = tl.where(live[:, None], ds0[:, None] * null_k[None, :], 0.0)
    share = tl.where(live, p0 * weight, 0.0)
    channels = tl.arange(0, BLOCK_D)
    part = ((row * blocks + j) * tiles + tile) * heads + h
    parts = tl.num_programs(0).to(tl.int64)
    dnull_k = tl.sum(ds0[:, None] * q.to(DTYPE), 0)
    dnull_v = tl.sum(share[:, None] * dout.to(DTYPE), 0)
    tl.store(dnull_ptr + part * dim + channels, dnull_k, mask=channels < dim)
    tl.store(dnull_ptr + (parts + part) * dim + channels, dnull_v, mask=channels < dim)
    for begin in range(0, count, BLOCK_N):
        at = begin + tl.arange(0, BLOCK_N)
        seen = at < count
        columns = tl.load(indices_ptr + at, mask=seen, other=0)
        keys = _tile(kv_ptr, columns, 2 * stride, seen, dim, BLOCK_D)
        values = _tile(kv_ptr + stride, columns, 2 * stride, seen, dim, BLOCK_D)
        score = tl.load(scores_ptr + columns, mask=seen, other=0.0).to(DTYPE)
        s = _product(q, tl.trans(keys), tl.zeros((BLOCK_M, BLOCK_N), DTYPE), HALF, DTYPE)
        p = at_most_one(s * to_base_2 - lse[:, None])
        dp = _product(dout, tl.trans(values), tl.zeros((BLOCK_M, BLOCK_N), DTYPE), HALF, DTYPE) * score[None, :]
        if DROPOUT:
            dp = dp * _kept(seed, queries[:, None], columns[None, :].to(tl.int64), n, drop, keep_bits, DTYPE)
        ds = tl.where(seen[None, :] & live[:, None], p * (dp - delta[:, None]) * scale, 0.0)
        dq = _product(_rounded(ds, kv_ptr), keys, dq, HALF, DTYPE)
    # Beside a key that is not finite no query is live, and 0 times it is NaN.
    _store(dq_ptr + start, i, stride, inside, tl.where(live[:, None], dq, 0.0), dim, BLOCK_D)


def memory_attention(m: Memories) -> tuple[Tensor, Tensor]:
    """out (E, B, J, C, H, d) and lse (E, B, J, H, C), contiguous."""
    experts, batch, blocks, slots, heads, _ = m.q.shape
    out = m.q.new_empty(m.q.shape)
    lse = m.q.new_empty(experts, batch, blocks, heads, slots, dtype=wide(m.q.dtype))
    if out.numel():
        constants, tiles, programs = m.grid("forward", slots)
        launch(
            _memory_attention_kernel, (programs * blocks,), *m.read(), m.indices.contiguous(), out, lse,
            *m.numbers(tiles), **constants,
        )  # fmt: skip
    return out, lse


def memory_attention_backward(
    dout: Tensor, m: Memories, out: Tensor, lse: Tensor, keys: bool = True, dkv: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, kv, scores and null_kv, contiguous; keys: whether kv and scores ask for theirs.

    dkv: where that of kv is to be, if not in zeros: rows of columns that are listed are written.
    """
    experts, batch, blocks, slots, heads, dim = m.q.shape
    n, k = m.kv.shape[2], m.indices.shape[-1]
    dq, dkv = m.q.new_empty(m.q.shape), m.kv.new_zeros(m.kv.shape) if dkv is None else dkv
    keys = keys and min(dq.numel(), k, n) > 0
    dscores = (m.scores.new_empty if keys else m.scores.new_zeros)(m.scores.shape)
    dnull = (m.null_kv.new_empty if dq.numel() else m.null_kv.new_zeros)(m.null_kv.shape)
    if dq.numel():
        read, lse, dout = m.read(), lse.contiguous(), dout.contiguous()
        delta = torch.empty_like(lse)
        constants, tiles, programs = m.grid("queries", slots)
        partial = lse.new_empty(2, programs * blocks, dim)
        launch(
            _memory_queries_kernel, (programs * blocks,), *read, m.indices.contiguous(), out.contiguous(), lse, dout,
            delta, dq, partial, *m.numbers(tiles), **constants,
        )  # fmt: skip
        add_up(partial, heads * dim, heads * dim, Sum(dnull, 2 * experts, batch * blocks * tiles))
        if keys:
            add_up(keys_gradient(m, dout, lse, delta, dkv), n, n, Sum(dscores, batch * experts, heads))
    return dq, dkv, dscores, dnull
