"""Combination: what the experts and local attention have for each token, added up in one pass over the tokens.

out[b, n] = sum_e score[b, e, slot] y[e, b, slot] (+ local), over the experts whose inverse map holds n, in their order;
divided by the number of terms with AVERAGE; the null token where there is none; 0 where masked. Sums in at least
float32, one write in the dtype of the result.

Backward: dy[e, b, slot] = score g / terms and dscore = <g / terms, y> are written by the slots, dlocal = g / terms by
the tokens, each element by one program; dnull is a sum over tokens that nobody took: by `partial_sums`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import arithmetic, cdiv, channel_constants, contiguous, launch, next_power_of_2, wide
from optimized.kernels.partial_sums import Sum, add_up

CHUNK = 64  # tokens of one program of the backward by tokens
ROWS = 8  # of them at a time


@triton.jit(do_not_specialize=["n", "k", "batch", "experts"])
def _combine_kernel(
    y_ptr, score_ptr, inverse_ptr, local_ptr, null_ptr, mask_ptr, out_ptr, n, k, dim, batch, experts,
    HAS_LOCAL: tl.constexpr, HAS_NULL: tl.constexpr, HAS_MASK: tl.constexpr, AVERAGE: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # (b, n)
    b = token // n
    position = token % n
    channels = tl.arange(0, BLOCK_D)
    shown = tl.full((), 1, tl.int32)
    if HAS_MASK:
        shown = tl.load(mask_ptr + token).to(tl.int32)
    for start in range(0, dim, BLOCK_D):
        inside = start + channels < dim
        total = tl.zeros((BLOCK_D,), DTYPE)
        terms = tl.full((), 0, tl.int32)
        if shown > 0:
            for e in range(experts):
                slot = tl.load(inverse_ptr + (b * experts + e) * n + position).to(tl.int64)
                if slot >= 0:
                    row = (e * batch + b) * k + slot
                    y = tl.load(y_ptr + row * dim + start + channels, mask=inside, other=0.0).to(DTYPE)
                    total += y * tl.load(score_ptr + (b * experts + e) * k + slot).to(DTYPE)
                    terms += 1
            if HAS_LOCAL:
                total += tl.load(local_ptr + token * dim + start + channels, mask=inside, other=0.0).to(DTYPE)
                terms += 1
            if AVERAGE:
                total /= tl.maximum(terms, 1).to(DTYPE)
            if HAS_NULL:
                null = tl.load(null_ptr + start + channels, mask=inside, other=0.0).to(DTYPE)
                total = tl.where(tl.where(inside, terms, 1) == 0, null, total)
        tl.store(out_ptr + token * dim + start + channels, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "k", "batch", "experts"])
def _slots_kernel(
    g_ptr, y_ptr, score_ptr, indices_ptr, slots_ptr, inverse_ptr, mask_ptr, dy_ptr, dscore_ptr,
    n, k, dim, batch, experts,
    HAS_LOCAL: tl.constexpr, HAS_MASK: tl.constexpr, AVERAGE: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # (e, b, k)
    b = row // k % batch
    e = row // k // batch
    place = (b * experts + e) * k + row % k
    taken = tl.load(slots_ptr + place).to(tl.int32)
    position = tl.load(indices_ptr + place)
    if HAS_MASK:
        taken = tl.where(tl.load(mask_ptr + b * n + position) != 0, taken, 0)
    score = tl.load(score_ptr + place).to(DTYPE)
    share = tl.full((), 1.0, DTYPE)
    if AVERAGE:
        terms = tl.full((), 1 if HAS_LOCAL else 0, tl.int32)
        for other in range(experts):
            terms += (tl.load(inverse_ptr + (b * experts + other) * n + position) >= 0).to(tl.int32)
        share /= tl.maximum(terms, 1).to(DTYPE)
    channels = tl.arange(0, BLOCK_D)
    dot = tl.full((), 0.0, DTYPE)
    for start in range(0, dim, BLOCK_D):
        inside = start + channels < dim
        readable = tl.where(inside, taken, 0) > 0  # a masked slot's row may hold NaN
        g = tl.load(g_ptr + (b * n + position) * dim + start + channels, mask=readable, other=0.0).to(DTYPE) * share
        y = tl.load(y_ptr + row * dim + start + channels, mask=readable, other=0.0).to(DTYPE)
        dot += tl.sum(g * y)
        dy = tl.where(readable, g * score, 0.0)
        tl.store(dy_ptr + row * dim + start + channels, dy.to(dy_ptr.dtype.element_ty), mask=inside)
    tl.store(dscore_ptr + place, dot.to(dscore_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["n", "experts", "tokens"])
def _tokens_kernel(
    g_ptr, inverse_ptr, mask_ptr, dlocal_ptr, dnull_ptr, n, dim, tokens, experts,
    HAS_LOCAL: tl.constexpr, HAS_NULL: tl.constexpr, HAS_MASK: tl.constexpr, AVERAGE: tl.constexpr,
    DTYPE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program: CHUNK tokens, ROWS at a time, by BLOCK_D channels. dlocal (B, N, D), partial sums (chunks, D) of dnull.

    The null token has no gradient of a token that somebody took; without local attention these are not read.
    """
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < dim
    total = tl.zeros((ROWS, BLOCK_D), DTYPE)
    for start in range(0, CHUNK, ROWS):
        token = tl.program_id(0).to(tl.int64) * CHUNK + start + tl.arange(0, ROWS)
        there = token < tokens
        shown = there
        if HAS_MASK:
            shown = tl.load(mask_ptr + token, mask=there, other=0) != 0
        terms = tl.full((ROWS,), 1 if HAS_LOCAL else 0, tl.int32)
        for e in range(experts):
            place = (token // n * experts + e) * n + token % n
            terms += (tl.load(inverse_ptr + place, mask=there, other=-1) >= 0).to(tl.int32)
        readable = shown if HAS_LOCAL else shown & (terms == 0)
        tile = token[:, None] * dim + channels[None, :]
        g = tl.load(g_ptr + tile, mask=readable[:, None] & inside[None, :], other=0.0).to(DTYPE)
        if HAS_NULL:
            total += tl.where((terms == 0)[:, None], g, 0.0)
        if HAS_LOCAL:
            if AVERAGE:
                g /= tl.maximum(terms, 1).to(DTYPE)[:, None]
            tl.store(dlocal_ptr + tile, g.to(dlocal_ptr.dtype.element_ty), mask=there[:, None] & inside[None, :])
    if HAS_NULL:
        tl.store(dnull_ptr + tl.program_id(0).to(tl.int64) * dim + channels, tl.sum(total, 0), mask=inside)


def combine(
    y: Tensor,
    scores: Tensor,
    inverse: Tensor,
    local: Tensor | None,
    null: Tensor | None,
    mask: Tensor | None,
    average: bool,
    dtype: torch.dtype,
) -> Tensor:
    """(B, N, D) in `dtype` from y (E, B, K, D), scores (B, E, K), inverse (B, E, N), local (B, N, D), null (D)."""
    experts, batch, k, dim = y.shape
    n = inverse.shape[-1]
    out = torch.empty(batch, n, dim, dtype=dtype, device=y.device)
    if out.numel():
        launch(
            _combine_kernel, (batch * n,),
            y.contiguous(), scores.contiguous(), inverse.contiguous(),
            contiguous(local), contiguous(null),
            contiguous(mask), out, n, k, dim, batch, experts,
            HAS_LOCAL=local is not None, HAS_NULL=null is not None, HAS_MASK=mask is not None, AVERAGE=average,
            **channel_constants(dim, y.dtype),
        )  # fmt: skip
    return out


def combine_backward(
    g: Tensor,
    y: Tensor,
    scores: Tensor,
    routing: tuple[Tensor, Tensor, Tensor],
    local: Tensor | None,
    null: Tensor | None,
    mask: Tensor | None,
    average: bool,
    asked: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dy, dscores by the slots, dlocal, dnull by the tokens; None where not asked for, and the last two without their
    input.

    routing: indices and slot mask (B, E, K), inverse map (B, E, N). asked: for those by the slots, by the tokens.
    """
    (indices, slots, inverse), (by_slots, by_tokens) = routing, asked
    experts, batch, k, dim = y.shape
    n = inverse.shape[-1]
    g, y, inverse = g.contiguous(), y.contiguous(), inverse.contiguous()
    constants = channel_constants(dim, y.dtype)
    mask = contiguous(mask)
    dy, dscores = None, None
    if by_slots:
        make = torch.empty_like if y.numel() else torch.zeros_like  # without channels no program writes
        dy, dscores = torch.empty_like(y), make(scores, memory_format=torch.contiguous_format)
    if by_slots and y.numel():
        launch(
            _slots_kernel, (experts * batch * k,),
            g, y, scores.contiguous(), indices.contiguous(), contiguous(slots), inverse, mask, dy, dscores,
            n, k, dim, batch, experts,
            HAS_LOCAL=local is not None, HAS_MASK=mask is not None, AVERAGE=average, **constants,
        )  # fmt: skip
    if not by_tokens or (local is None and null is None):
        return dy, dscores, None, None
    chunks = cdiv(batch * n, CHUNK)
    dlocal = None if local is None else torch.empty_like(local, memory_format=torch.contiguous_format)
    make_rows: Callable[..., Tensor] = torch.empty if g.numel() else torch.zeros  # without tokens no program writes
    partial = None if null is None else make_rows(chunks, dim, dtype=wide(y.dtype), device=y.device)
    if g.numel():
        block_d = min(next_power_of_2(dim), 64 if y.dtype == torch.float64 else 256)
        launch(
            _tokens_kernel, (chunks, cdiv(dim, block_d)),
            g, inverse, mask, dlocal, partial, n, dim, batch * n, experts,
            HAS_LOCAL=local is not None, HAS_NULL=null is not None, HAS_MASK=mask is not None, AVERAGE=average,
            DTYPE=arithmetic(y.dtype), CHUNK=CHUNK, ROWS=ROWS, BLOCK_D=block_d, num_warps=1,
        )  # fmt: skip
    if null is None or partial is None:
        return dy, dscores, dlocal, None
    dnull = torch.empty_like(null, memory_format=torch.contiguous_format)
    add_up(partial, dim, dim, Sum(dnull, 1, chunks))
    return dy, dscores, dlocal, dnull
