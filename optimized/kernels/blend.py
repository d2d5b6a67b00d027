"""What local attention, the experts and their null tokens have for each token, added up in one pass over the tokens.

out[b, n] = local[b, n], and from position W on plus the sum over the experts, in their order, of score[b, e, slot]
y[e, b, slot] where the inverse map holds n, else null[e]; with AVERAGE divided by E + 1 there. Sums in at least
float32, one write in the dtype of the result.

Backward: dy = score g and dscore = <g, y> are written by the slots, 0 for numbers of y that are not finite and for
scores that are NaN; dlocal = g by the tokens, if it is not g itself. dnull[e] is a sum over tokens that e left out:
partial sums of some experts at a time, then `partial_sums`. Each element is written by one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import (
    arithmetic,
    cdiv,
    channel_constants,
    contiguous,
    launch,
    next_power_of_2,
    wide,
)
from optimized.kernels.partial_sums import Sum, add_up

CHUNK = 256  # tokens of one program of the backward by tokens
ROWS = 8  # of them at a time
EXPERTS = 4  # whose sums it holds, each by name
CHANNELS = 128  # of it, half as many in float64


@triton.jit
def _later(token, n, begin_ptr, width, there, HAS_BEGIN: tl.constexpr):
    """Whether tokens, counted through the batch, stand behind the first block."""
    position = token % n
    if HAS_BEGIN:
        position += tl.load(begin_ptr + token // n, mask=there, other=0)
    return position >= width


@triton.jit(do_not_specialize=["n", "k", "batch", "experts", "width"])
def _blend_kernel(
    y_ptr, score_ptr, inverse_ptr, local_ptr, null_ptr, begin_ptr, out_ptr, n, k, dim, batch, experts, width,
    HAS_BEGIN: tl.constexpr, AVERAGE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # (b, n)
    b = token // n
    position = token % n
    later = _later(token, n, begin_ptr, width, True, HAS_BEGIN)
    channels = tl.arange(0, BLOCK_D)
    for start in range(0, dim, BLOCK_D):
        inside = start + channels < dim
        total = tl.load(local_ptr + token * dim + start + channels, mask=inside, other=0.0).to(DTYPE)
        if later:
            terms = tl.zeros((BLOCK_D,), DTYPE)
            for e in range(experts):
                slot = tl.load(inverse_ptr + (b * experts + e) * n + position).to(tl.int64)
                if slot >= 0:
                    row = (e * batch + b) * k + slot
                    y = tl.load(y_ptr + row * dim + start + channels, mask=inside, other=0.0).to(DTYPE)
                    terms += y * tl.load(score_ptr + (b * experts + e) * k + slot).to(DTYPE)
                else:
                    terms += tl.load(null_ptr + e * dim + start + channels, mask=inside, other=0.0).to(DTYPE)
            total += terms
            if AVERAGE:
                total /= (experts + 1).to(DTYPE)
        tl.store(out_ptr + token * dim + start + channels, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "k", "batch", "experts"])
def _blend_slots_kernel(
    g_ptr, y_ptr, score_ptr, indices_ptr, slots_ptr, dy_ptr, dscore_ptr, n, k, dim, batch, experts,
    AVERAGE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # (e, b, k)
    b = row // k % batch
    e = row // k // batch
    place = (b * experts + e) * k + row % k
    taken = tl.load(slots_ptr + place).to(tl.int32)
    position = tl.load(indices_ptr + place).to(tl.int64)
    score = tl.load(score_ptr + place).to(DTYPE)
    taken = tl.where(score == score, taken, 0)
    channels = tl.arange(0, BLOCK_D)
    dot = tl.full((), 0.0, DTYPE)
    for start in range(0, dim, BLOCK_D):
        inside = start + channels < dim
        readable = tl.where(inside, taken, 0) > 0
        g = tl.load(g_ptr + (b * n + position) * dim + start + channels, mask=readable, other=0.0).to(DTYPE)
        y = tl.load(y_ptr + row * dim + start + channels, mask=readable, other=0.0).to(DTYPE)
        if AVERAGE:  # what has a slot stands behind the first block
            g /= (experts + 1).to(DTYPE)
        variable = readable & (tl.abs(y) < float("inf"))
        dot += tl.sum(tl.where(variable, g * y, 0.0))
        dy = tl.where(variable, g * score, 0.0)
        tl.store(dy_ptr + row * dim + start + channels, dy.to(dy_ptr.dtype.element_ty), mask=inside)
    tl.store(dscore_ptr + place, dot.to(dscore_ptr.dtype.element_ty))


@triton.jit
def _left_out(inverse_ptr, e, experts, later, b, position, n):
    """Tokens behind the first block that an expert did not take."""
    asked = later & (position * 0 + e < experts)  # a block: beside a scalar the interpreter has no bool
    slot = tl.load(inverse_ptr + (b * experts + e) * n + position, mask=asked, other=0)
    return (slot < 0)[:, None]


@triton.jit
def _store_total(dnull_ptr, e, experts, channels, dim, total):
    row = tl.program_id(0).to(tl.int64) * experts + e
    tl.store(dnull_ptr + row * dim + channels, tl.sum(total, 0), mask=(channels < dim) & (channels * 0 + e < experts))


@triton.jit(do_not_specialize=["n", "experts", "tokens", "width"])
def _blend_tokens_kernel(
    g_ptr, inverse_ptr, begin_ptr, dlocal_ptr, dnull_ptr, n, dim, tokens, experts, width,
    HAS_BEGIN: tl.constexpr, HAS_NULL: tl.constexpr, HAS_LOCAL: tl.constexpr, AVERAGE: tl.constexpr,
    DTYPE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program: CHUNK tokens, ROWS at a time, by BLOCK_D channels and EXPERTS experts, of which the first write dlocal.

    dlocal (B, N, D), partial sums (chunks, E, D) of dnull. The rows of a tile are added up at the end alone: a sum over
    each, and a tile of inverse maps laid out anew for it, took four times as long as g takes to read.
    """
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < dim
    e = tl.program_id(2) * EXPERTS
    total_0 = tl.zeros((ROWS, BLOCK_D), DTYPE)
    total_1 = tl.zeros((ROWS, BLOCK_D), DTYPE)
    total_2 = tl.zeros((ROWS, BLOCK_D), DTYPE)
    total_3 = tl.zeros((ROWS, BLOCK_D), DTYPE)
    for start in range(0, CHUNK, ROWS):
        token = tl.program_id(0).to(tl.int64) * CHUNK + start + tl.arange(0, ROWS)
        there = token < tokens
        later = _later(token, n, begin_ptr, width, there, HAS_BEGIN) & there
        tile = token[:, None] * dim + channels[None, :]
        shown = there[:, None] & inside[None, :]
        g = tl.load(g_ptr + tile, mask=shown, other=0.0).to(DTYPE)
        if AVERAGE:
            g = tl.where(later[:, None], g / (experts + 1).to(DTYPE), g)
        if HAS_LOCAL and e == 0:
            tl.store(dlocal_ptr + tile, g.to(dlocal_ptr.dtype.element_ty), mask=shown)
        if HAS_NULL:
            b = token // n
            position = token % n
            total_0 += tl.where(_left_out(inverse_ptr, e, experts, later, b, position, n), g, 0.0)
            total_1 += tl.where(_left_out(inverse_ptr, e + 1, experts, later, b, position, n), g, 0.0)
            total_2 += tl.where(_left_out(inverse_ptr, e + 2, experts, later, b, position, n), g, 0.0)
            total_3 += tl.where(_left_out(inverse_ptr, e + 3, experts, later, b, position, n), g, 0.0)
    if HAS_NULL:
        _store_total(dnull_ptr, e, experts, channels, dim, total_0)
        _store_total(dnull_ptr, e + 1, experts, channels, dim, total_1)
        _store_total(dnull_ptr, e + 2, experts, channels, dim, total_2)
        _store_total(dnull_ptr, e + 3, experts, channels, dim, total_3)


def blend(
    y: Tensor,
    scores: Tensor,
    inverse: Tensor,
    local: Tensor,
    null: Tensor,
    begin: Tensor | None,
    width: int,
    average: bool,
    dtype: torch.dtype,
) -> Tensor:
    """(B, N, D) in `dtype`; see `optimized.ops.blend`."""
    experts, batch, k, dim = y.shape
    n = inverse.shape[-1]
    out = torch.empty(batch, n, dim, dtype=dtype, device=y.device)
    if out.numel():
        launch(
            _blend_kernel, (batch * n,),
            y.contiguous(), scores.contiguous(), inverse.contiguous(), local.contiguous(), null.contiguous(),
            contiguous(begin), out, n, k, dim, batch, experts, width,
            HAS_BEGIN=begin is not None, AVERAGE=average, **channel_constants(dim, y.dtype),
        )  # fmt: skip
    return out


def blend_slots_backward(
    g: Tensor, y: Tensor, scores: Tensor, indices: Tensor, slots: Tensor, average: bool
) -> tuple[Tensor, Tensor]:
    """dy (E, B, K, D) and dscores (B, E, K)."""
    experts, batch, k, dim = y.shape
    made = y.numel() and g.numel()
    make = torch.empty_like if made else torch.zeros_like  # without tokens no program writes them
    dy, dscores = (make(t, memory_format=torch.contiguous_format) for t in (y, scores))
    if made:
        launch(
            _blend_slots_kernel, (experts * batch * k,),
            g.contiguous(), y.contiguous(), scores.contiguous(), indices.contiguous(), contiguous(slots), dy, dscores,
            g.shape[1], k, dim, batch, experts, AVERAGE=average, **channel_constants(dim, y.dtype),
        )  # fmt: skip
    return dy, dscores


def blend_tokens_backward(
    g: Tensor,
    inverse: Tensor,
    local: Tensor,
    null: Tensor | None,
    begin: Tensor | None,
    width: int,
    average: bool,
) -> tuple[Tensor, Tensor | None]:
    """dlocal (B, N, D), g itself where it is no other, and dnull (E, D), None without null."""
    batch, n, dim = g.shape
    experts = inverse.shape[1]
    chunks = cdiv(batch * n, CHUNK)
    g = g.contiguous()
    same = not average and g.dtype == local.dtype
    dlocal = g if same else torch.empty_like(local, memory_format=torch.contiguous_format)
    kind = wide(local.dtype)
    partial = None if null is None else torch.empty(chunks, experts, dim, dtype=kind, device=g.device)
    if g.numel() and not (same and null is None):
        block_d = min(next_power_of_2(dim), CHANNELS // 2 if kind == torch.float64 else CHANNELS)
        launch(
            _blend_tokens_kernel, (chunks, cdiv(dim, block_d), 1 if null is None else cdiv(experts, EXPERTS)),
            g, inverse.contiguous(), contiguous(begin), None if same else dlocal, partial,
            n, dim, batch * n, experts, width,
            HAS_BEGIN=begin is not None, HAS_NULL=null is not None, HAS_LOCAL=not same,
            AVERAGE=average, DTYPE=arithmetic(local.dtype),
            CHUNK=CHUNK, ROWS=ROWS, EXPERTS=EXPERTS, BLOCK_D=block_d, num_warps=2,
        )  # fmt: skip
    if null is None or partial is None:
        return dlocal, None
    dnull = torch.empty_like(null, memory_format=torch.contiguous_format)
    add_up(partial, experts * dim, experts * dim, Sum(dnull, 1, chunks))
    return dlocal, dnull
