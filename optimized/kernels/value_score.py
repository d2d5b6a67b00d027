"""Values times the key/value score of their slot, and the gradient of both.

v (R, L, H, d), R = (expert, batch), with any strides but that of d, which is 1; scores (B, E, L). One program per slot:
the H d numbers v s, contiguous; backward g s in place of g, or elsewhere with a copy of the keys' gradient beside it,
and the one number <g, v>. In place, a slot whose score is 1 is left alone, as most are: there a program looks at
`SLOTS` scores, and multiplies those slots that are none.

Blind spots: none known.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import arithmetic, cdiv, launch, next_power_of_2

SLOTS = 32  # whose scores a program looks at in place
SIZES = ["length", "batch", "experts", "heads"]


@triton.jit
def _place(slot, length, batch, experts):
    """Of the score of a slot (e, b, l) in (B, E, L)."""
    row = slot // length
    return (row % batch * experts + row // batch) * length + slot % length


@triton.jit(do_not_specialize=SIZES)
def _value_score_kernel(
    v_ptr, scores_ptr, out_ptr, length, batch, experts, heads, dim, stride_r, stride_l, stride_h,
    DTYPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    v_ptr += slot // length * stride_r + slot % length * stride_l
    score = tl.load(scores_ptr + _place(slot, length, batch, experts)).to(DTYPE)
    channels = tl.arange(0, BLOCK_D)
    for start in range(0, heads, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        keep = (h[:, None] < heads) & (channels[None, :] < dim)
        tile = h[:, None].to(tl.int64) * stride_h + channels[None, :]
        v = tl.load(v_ptr + tile, mask=keep, other=0.0).to(DTYPE) * score
        tile = (slot * heads + h[:, None]) * dim + channels[None, :]
        tl.store(out_ptr + tile, v.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=SIZES)
def _value_score_in_place_kernel(
    v_ptr, scores_ptr, length, batch, experts, heads, dim, stride_r, stride_l, stride_h,
    DTYPE: tl.constexpr, SLOTS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, SLOTS)
    slots = tl.program_id(0).to(tl.int64) * SLOTS + lanes
    there = slots < tl.cast(length, tl.int64) * batch * experts
    scores = tl.load(scores_ptr + _place(slots, length, batch, experts), mask=there, other=1.0).to(DTYPE)
    left = (scores != 1).to(tl.int32)
    channels = tl.arange(0, BLOCK_D)
    for _ in range(tl.sum(left)):
        lane = tl.min(tl.where(left != 0, lanes, SLOTS))
        left = tl.where(lanes == lane, 0, left)
        score = tl.sum(tl.where(lanes == lane, scores, 0.0))
        slot = tl.program_id(0).to(tl.int64) * SLOTS + lane
        row_ptr = v_ptr + slot // length * stride_r + slot % length * stride_l
        for start in range(0, heads, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            keep = (h[:, None] < heads) & (channels[None, :] < dim)
            tile = h[:, None].to(tl.int64) * stride_h + channels[None, :]
            v = tl.load(row_ptr + tile, mask=keep, other=0.0).to(DTYPE) * score
            tl.store(row_ptr + tile, v.to(v_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=SIZES)
def _value_score_backward_kernel(
    g_ptr, v_ptr, scores_ptr, dscores_ptr, gk_ptr, dk_ptr, dv_ptr,
    length, batch, experts, heads, dim, stride_r, stride_l, stride_h,
    g_stride_r, g_stride_l, g_stride_h, gk_stride_r, gk_stride_l, gk_stride_h,
    APART: tl.constexpr, DTYPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dv and dk have the strides of v, and so has g if it becomes dv. APART: dv is another, and dk is to be as gk."""
    slot = tl.program_id(0).to(tl.int64)
    offset = slot // length * stride_r + slot % length * stride_l
    g_ptr += slot // length * g_stride_r + slot % length * g_stride_l
    if APART:
        gk_ptr += slot // length * gk_stride_r + slot % length * gk_stride_l
    place = _place(slot, length, batch, experts)
    score = tl.load(scores_ptr + place).to(DTYPE)
    channels = tl.arange(0, BLOCK_D)
    dot = tl.zeros((BLOCK_H, BLOCK_D), DTYPE)
    for start in range(0, heads, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        keep = (h[:, None] < heads) & (channels[None, :] < dim)
        tile = offset + h[:, None].to(tl.int64) * stride_h + channels[None, :]
        v = tl.load(v_ptr + tile, mask=keep, other=0.0).to(DTYPE)
        g_tile = h[:, None].to(tl.int64) * g_stride_h + channels[None, :]
        g = tl.load(g_ptr + g_tile, mask=keep, other=0.0).to(DTYPE)
        dot += g * v
        if APART:
            tl.store(dv_ptr + tile, (g * score).to(dv_ptr.dtype.element_ty), mask=keep)
            gk_tile = h[:, None].to(tl.int64) * gk_stride_h + channels[None, :]
            tl.store(dk_ptr + tile, tl.load(gk_ptr + gk_tile, mask=keep, other=0.0), mask=keep)
        else:
            scaled = keep & (tl.zeros((BLOCK_H, BLOCK_D), DTYPE) + score != 1)
            tl.store(g_ptr + g_tile, (g * score).to(g_ptr.dtype.element_ty), mask=scaled)
    tl.store(dscores_ptr + place, tl.sum(dot).to(dscores_ptr.dtype.element_ty))


def _sizes(v: Tensor, scores: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Integer arguments, and constants."""
    _, length, heads, dim = v.shape
    batch, experts, _ = scores.shape
    block_d = next_power_of_2(dim)
    block_h = min(next_power_of_2(heads), max(1024 // block_d, 1))
    # In place, no number may be read by one warp after another wrote it: none is held twice.
    warps = 2 if block_h * block_d >= 64 else 1
    constants = {"DTYPE": arithmetic(v.dtype), "BLOCK_H": block_h, "BLOCK_D": block_d, "num_warps": warps}
    return (length, batch, experts, heads, dim, *v.stride()[:3]), constants


def value_score(v: Tensor, scores: Tensor) -> Tensor:
    """(R, L, H, d), contiguous, in v's dtype."""
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if out.numel():
        sizes, constants = _sizes(v, scores)
        launch(_value_score_kernel, (scores.numel(),), v, scores.contiguous(), out, *sizes, **constants)
    return out


def value_score_(v: Tensor, scores: Tensor) -> None:
    """The same in place."""
    if v.numel():
        sizes, constants = _sizes(v, scores)
        launch(
            _value_score_in_place_kernel, (cdiv(scores.numel(), SLOTS),), v, scores.contiguous(), *sizes,
            SLOTS=SLOTS, **constants,
        )  # fmt: skip


def value_score_backward_(g: Tensor, v: Tensor, scores: Tensor) -> Tensor:
    """dscores, from the gradient g of v times scores, which becomes that of v in place; g with the strides of v."""
    return _backward(g, v, scores, None, None, None)


def value_score_backward(gk: Tensor, g: Tensor, v: Tensor, scores: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """dscores; the gradient of v is written to dv, and gk, that of the keys, to dk, both with the strides of v."""
    gk, g = (t if t.stride(-1) == 1 else t.contiguous() for t in (gk, g))
    return _backward(g, v, scores, gk, dk, dv)


def _backward(
    g: Tensor, v: Tensor, scores: Tensor, gk: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> Tensor:  # fmt: skip
    make = torch.empty_like if v.numel() else torch.zeros_like
    dscores = make(scores, memory_format=torch.contiguous_format)
    if v.numel():
        sizes, constants = _sizes(v, scores)
        launch(
            _value_score_backward_kernel, (scores.numel(),), g, v, scores.contiguous(), dscores, gk, dk, dv,
            *sizes, *g.stride()[:3], *(g if gk is None else gk).stride()[:3], APART=gk is not None, **constants,
        )  # fmt: skip
    return dscores
