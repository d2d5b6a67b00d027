"""The gradients of keys, values and scores of a memory: see `memory_attention` for what is summed.

A program has some places of memory (`memory_places`) of one row and head, and goes through some of the blocks: it keeps
the sums of the columns in its places, that of dsigma too, until another column takes the place. Where rows, heads and
places are too few to fill a GPU, several programs share the blocks; then a column may be listed in the blocks of
several. Of such a column each writes its share, and another kernel adds these up, blocks ascending, one program for a
column. A share is found by the place of its column in the list of the first block of a program, where places are those
of the list. Which of the two kernels writes a column hangs on later tokens, so both write the same bits.

Blind spots: the sums of 64 columns and heads of 64 channels take half of the registers that there are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.admitted import _lesser
from optimized.kernels.launch import cdiv, from_bits, launch
from optimized.kernels.memory_places import memory_places
from optimized.kernels.memory_tiles import SIZES, Memories, _finite, _kept, _place, _store, _tile
from optimized.kernels.probability import at_most_one
from optimized.kernels.window import LOG2_E, _product, _rounded

ALONE = 512  # programs that fill a GPU, so that none share blocks
PROGRAMS = 1024  # where they do
SPAN = 2  # blocks of a program, at least


@triton.jit
def _write(
    scores_ptr, dkv_ptr, dscores_ptr, held, done, dk, u, dsigma, stride, dim, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The gradients of columns that are `done`. A score that is not finite passes nothing on."""
    score = _finite_scores(scores_ptr, held, done, DTYPE)
    tl.store(dscores_ptr + held, dsigma, mask=done)
    _store(dkv_ptr, held, 2 * stride, done, dk, dim, BLOCK_D)
    _store(dkv_ptr + stride, held, 2 * stride, done, u * score[:, None], dim, BLOCK_D)


@triton.jit
def _finite_scores(scores_ptr, held, there, DTYPE: tl.constexpr):
    score = tl.load(scores_ptr + held, mask=there, other=0.0).to(DTYPE)
    return tl.where(_finite(score), score, 0.0)


@triton.jit
def _listed(indices_ptr, counts_ptr, block, k, columns, there, STEPS: tl.constexpr):
    """Which columns a block lists, and where."""
    count = tl.load(counts_ptr + block)
    list_ptr = indices_ptr + tl.cast(block, tl.int64) * k
    at = _lesser(list_ptr, columns, count, there, STEPS)
    return tl.load(list_ptr + at, mask=there & (at < count), other=-1) == columns, at


@triton.jit(do_not_specialize=[*SIZES, "span", "chunks"])
def _memory_keys_kernel(
    q_ptr, kv_ptr, scores_ptr, null_ptr, counts_ptr, q_counts_ptr, seed_ptr, indices_ptr, places_ptr, lse_ptr, dout_ptr,
    delta_ptr, dkv_ptr, dscores_ptr, shares_ptr, sigma_shares_ptr,
    n, k, slots, blocks, batch, experts, heads, dim, tiles, scale_bits, drop, keep_bits, span, chunks,
    CHUNKED: tl.constexpr, STEPS: tl.constexpr, DROPOUT: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk, dv, and the share of a head (B, E, H, L) of dscores, of the columns that come by some places of memory."""
    row, chunk, h, tile, row_be = _place(chunks, batch, experts, heads, tiles)
    at = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    stride = heads * dim
    kv_ptr += row * n * 2 * stride + h * dim
    dkv_ptr += row * n * 2 * stride + h * dim
    scores_ptr += row_be * n
    dscores_ptr += (row_be * heads + h) * n
    first = chunk * span
    last = tl.minimum(first + span, blocks)
    places_ptr += (row_be * blocks + first) * k
    q_counts_ptr += row_be * blocks
    if CHUNKED:
        counts_ptr += row_be * blocks
        indices_ptr += row_be * blocks * k
        every = experts.to(tl.int64) * batch * heads * k * 2 * dim
        whole_ptr = shares_ptr + (row * heads + h) * k * 2 * dim + (chunk + 1) * every
        old_ptr = shares_ptr + (row * heads + h) * k * 2 * dim + (chunks + chunk) * every
        every = experts.to(tl.int64) * batch * heads * k
        whole_sigma_ptr = sigma_shares_ptr + (row * heads + h) * k + (chunk + 1) * every
        old_sigma_ptr = sigma_shares_ptr + (row * heads + h) * k + (chunks + chunk) * every
    scale = from_bits(scale_bits).to(DTYPE)
    to_base_2 = (from_bits(scale_bits) * LOG2_E).to(DTYPE)
    seed = tl.full((), 0, tl.int64)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    held = tl.full((BLOCK_N,), -1, tl.int32)
    old = tl.full((BLOCK_N,), -1, tl.int32)  # places of those that the block before the first listed, too
    dk = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    u = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    dsigma = tl.zeros((BLOCK_N,), DTYPE)
    lanes = tl.arange(0, BLOCK_M)
    columns = tl.load(places_ptr + at, mask=at < k, other=-1)
    filled = tl.minimum(tl.load(q_counts_ptr + first), slots)
    # Once more than there are blocks: what is held to the end is written by the same instructions as what is not.
    for j in range(first, last + 1):
        # What tells what to read is on its way before it is asked for.
        places_ptr += k
        next_columns = tl.load(places_ptr + at, mask=(at < k) & (at * 0 + j + 1 < last), other=-1)
        next_filled = tl.minimum(tl.load(q_counts_ptr + j + 1, mask=j + 1 < last, other=0), slots)
        start = (row * blocks + j) * slots * stride + h * dim
        place = ((row * blocks + j) * heads + h) * slots
        lse = tl.load(lse_ptr + place + lanes, mask=lanes < filled, other=float("inf"))
        changed = columns != held
        if tl.max(changed.to(tl.int32)) > 0:
            done = changed & (held >= 0)
            if CHUNKED:
                _store(old_ptr, old, 2 * dim, done & (old >= 0), dk, dim, BLOCK_D)
                _store(old_ptr + dim, old, 2 * dim, done & (old >= 0), u, dim, BLOCK_D)
                tl.store(old_sigma_ptr + old, dsigma, mask=done & (old >= 0))
                done = done & (old < 0)
                if (j == last) & (j < blocks):
                    stays, there_at = _listed(indices_ptr, counts_ptr, j, k, held, done, STEPS)
                    _store(whole_ptr, there_at, 2 * dim, done & stays, dk, dim, BLOCK_D)
                    _store(whole_ptr + dim, there_at, 2 * dim, done & stays, u, dim, BLOCK_D)
                    tl.store(whole_sigma_ptr + there_at, dsigma, mask=done & stays)
                    done = done & (stays == 0)
                old = tl.where(changed, -1, old)
                if (j == first) & (j > 0):
                    stayed, _at = _listed(indices_ptr, counts_ptr, j - 1, k, columns, columns >= 0, STEPS)
                    old = tl.where(stayed & (columns >= 0), at, -1)
            _write(scores_ptr, dkv_ptr, dscores_ptr, held, done, dk, u, dsigma, stride, dim, DTYPE, BLOCK_D)
            dk = tl.where(changed[:, None], 0.0, dk)
            u = tl.where(changed[:, None], 0.0, u)
            dsigma = tl.where(changed, 0.0, dsigma)
            held = columns
        there = held >= 0
        keys = _tile(kv_ptr, held, 2 * stride, there, dim, BLOCK_D)
        values = _tile(kv_ptr + stride, held, 2 * stride, there, dim, BLOCK_D)
        score = _finite_scores(scores_ptr, held, there, DTYPE)
        for begin in range(0, filled, BLOCK_M):
            i = begin + lanes
            live = lse < float("inf")
            delta = tl.load(delta_ptr + place + i, mask=live, other=0.0)
            q = _tile(q_ptr + start, i, stride, live, dim, BLOCK_D)
            dout = _tile(dout_ptr + start, i, stride, live, dim, BLOCK_D)
            pairs = there[:, None] & live[None, :]
            s = _product(keys, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), DTYPE), HALF, DTYPE)
            p = tl.where(pairs, at_most_one(s * to_base_2 - (lse * LOG2_E)[None, :]), 0.0)
            dp = _product(values, tl.trans(dout), tl.zeros((BLOCK_N, BLOCK_M), DTYPE), HALF, DTYPE)
            dp = tl.where(pairs, dp, 0.0)
            weighted = p
            scored = dp * score[:, None]
            if DROPOUT:
                queries = ((row * heads + h) * blocks + j) * slots + i
                kept = _kept(seed, queries[None, :], held[:, None].to(tl.int64), n, drop, keep_bits, DTYPE)
                scored = scored * kept
                weighted = p * kept
            dsigma += tl.sum(weighted * dp, 1)
            ds = p * (scored - delta[None, :]) * scale
            u = _product(_rounded(weighted, dout_ptr), dout, u, HALF, DTYPE)
            dk = _product(_rounded(ds, q_ptr), q, dk, HALF, DTYPE)
            lse = tl.load(lse_ptr + place + i + BLOCK_M, mask=i + BLOCK_M < filled, other=float("inf"))
        columns = next_columns
        filled = next_filled


@triton.jit(do_not_specialize=["n", "k", "blocks", "batch", "experts", "heads", "tiles", "span", "chunks"])
def _join_kernel(
    scores_ptr, indices_ptr, counts_ptr, shares_ptr, sigma_shares_ptr, dkv_ptr, dscores_ptr,
    n, k, blocks, batch, experts, heads, dim, tiles, span, chunks,
    STEPS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Columns that were listed first in the blocks of one program, and still are in the first block of the next."""
    row, chunk, h, tile, row_be = _place(chunks - 1, batch, experts, heads, tiles)
    stride = heads * dim
    dkv_ptr += row * n * 2 * stride + h * dim
    scores_ptr += row_be * n
    dscores_ptr += (row_be * heads + h) * n
    indices_ptr += row_be * blocks * k
    counts_ptr += row_be * blocks
    every = experts.to(tl.int64) * batch * heads * k * 2 * dim
    shares_ptr += (row * heads + h) * k * 2 * dim
    every_sigma = experts.to(tl.int64) * batch * heads * k
    sigma_shares_ptr += (row * heads + h) * k
    at = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    block = (chunk + 1) * span
    inside = at < tl.load(counts_ptr + block)
    held = tl.load(indices_ptr + block.to(tl.int64) * k + at, mask=inside, other=-1)
    before, _at = _listed(indices_ptr, counts_ptr, block - 1, k, held, inside, STEPS)
    mine = inside & before
    if chunk > 0:
        first, _at = _listed(indices_ptr, counts_ptr, block - span, k, held, inside, STEPS)
        even_before, _at = _listed(indices_ptr, counts_ptr, block - span - 1, k, held, inside, STEPS)
        mine = mine & ((first & even_before) == 0)
    whole_ptr = shares_ptr + (chunk + 1) * every
    dk = _tile(whole_ptr, at, 2 * dim, mine, dim, BLOCK_D)
    u = _tile(whole_ptr + dim, at, 2 * dim, mine, dim, BLOCK_D)
    dsigma = tl.load(sigma_shares_ptr + (chunk + 1) * every_sigma + at, mask=mine, other=0.0)
    left = mine.to(tl.int32)
    for later in range(chunk + 1, chunks):
        if tl.max(left) > 0:
            there, place = _listed(indices_ptr, counts_ptr, later * span, k, held, left > 0, STEPS)
            there = there & (left > 0)
            left = there.to(tl.int32)
            old_ptr = shares_ptr + (chunks + later) * every
            dk += _tile(old_ptr, place, 2 * dim, there, dim, BLOCK_D)
            u += _tile(old_ptr + dim, place, 2 * dim, there, dim, BLOCK_D)
            dsigma += tl.load(sigma_shares_ptr + (chunks + later) * every_sigma + place, mask=there, other=0.0)
    _write(scores_ptr, dkv_ptr, dscores_ptr, held, mine, dk, u, dsigma, stride, dim, DTYPE, BLOCK_D)


def keys_gradient(m: Memories, dout: Tensor, lse: Tensor, delta: Tensor, dkv: Tensor) -> Tensor:
    """Into dkv (E, B, L, 2, H, d), of listed columns, and shares (B, E, H, L) of dscores. Of sizes that are not 0."""
    experts, batch, blocks, _, heads, dim = m.q.shape
    n, k = m.kv.shape[2], m.indices.shape[-1]
    dscores = lse.new_zeros(batch, experts, heads, n)
    constants, tiles, programs = m.grid("keys", k)
    span = _span(programs, blocks)
    chunks, rows = cdiv(blocks, span), experts * batch * heads
    shares = sigma_shares = None
    if chunks > 1:
        shares, sigma_shares = (lse.new_empty(2, chunks, rows, k, *size) for size in ((2, dim), ()))
    indices, steps = m.indices.contiguous(), k.bit_length()
    read = m.read()
    launch(
        _memory_keys_kernel, (programs * chunks,), *read, indices, memory_places(indices, m.counts, n, span), lse, dout,
        delta, dkv, dscores, shares, sigma_shares, *m.numbers(tiles), span, chunks,
        CHUNKED=chunks > 1, STEPS=steps, **constants,
    )  # fmt: skip
    if shares is not None:
        same = {name: constants[name] for name in ("DTYPE", "BLOCK_D", "num_warps")}
        launch(
            _join_kernel, (programs * (chunks - 1),), read[2], indices, read[4], shares, sigma_shares, dkv, dscores,
            n, k, blocks, batch, experts, heads, dim, tiles, span, chunks,
            STEPS=steps, BLOCK_N=constants["BLOCK_N"], **same,
        )  # fmt: skip
    return dscores


def _span(programs: int, blocks: int) -> int:
    """Blocks of a program where there are so many for all of them."""
    shared = 1 if programs >= ALONE else cdiv(PROGRAMS, programs)
    return cdiv(blocks, max(min(shared, blocks // SPAN), 1))
