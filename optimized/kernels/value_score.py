"""Values times the key/value score of their slot, and the gradient of both.

v (R, L, H, d) with any strides but that of d, which is 1; scores (R, L). One program per slot: it writes the H d
numbers v s, backward g s, and the one number <g, v>.

Blind spots: none known.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["length", "heads"])
def _value_score_kernel(
    v_ptr, scores_ptr, out_ptr, length, heads, dim, stride_r, stride_l, stride_h,
    DTYPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    v_ptr += slot // length * stride_r + slot % length * stride_l
    score = tl.load(scores_ptr + slot).to(DTYPE)
    channels = tl.arange(0, BLOCK_D)
    for start in range(0, heads, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        keep = (h[:, None] < heads) & (channels[None, :] < dim)
        tile = h[:, None].to(tl.int64) * stride_h + channels[None, :]
        v = tl.load(v_ptr + tile, mask=keep, other=0.0).to(DTYPE)
        tile = (slot * heads + h[:, None]) * dim + channels[None, :]
        tl.store(out_ptr + tile, (v * score).to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["length", "heads"])
def _value_score_backward_kernel(
    g_ptr, v_ptr, scores_ptr, dv_ptr, dscores_ptr, length, heads, dim, stride_r, stride_l, stride_h,
    DTYPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    v_ptr += slot // length * stride_r + slot % length * stride_l
    score = tl.load(scores_ptr + slot).to(DTYPE)
    channels = tl.arange(0, BLOCK_D)
    dot = tl.full((), 0.0, DTYPE)
    for start in range(0, heads, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        keep = (h[:, None] < heads) & (channels[None, :] < dim)
        tile = h[:, None].to(tl.int64) * stride_h + channels[None, :]
        v = tl.load(v_ptr + tile, mask=keep, other=0.0).to(DTYPE)
        tile = (slot * heads + h[:, None]) * dim + channels[None, :]
        g = tl.load(g_ptr + tile, mask=keep, other=0.0).to(DTYPE)
        dot += tl.sum(g * v)
        tl.store(dv_ptr + tile, (g * score).to(dv_ptr.dtype.element_ty), mask=keep)
    tl.store(dscores_ptr + slot, dot.to(dscores_ptr.dtype.element_ty))


def _launch(v: Tensor) -> tuple[Tensor, tuple[int, ...], dict[str, Any]]:
    """v with a last stride of 1, integer arguments, constants."""
    _, length, heads, dim = v.shape
    v = v if v.stride(-1) == 1 else v.contiguous()
    block_d = triton.next_power_of_2(dim)
    constants = {
        "DTYPE": tl.float64 if v.dtype == torch.float64 else tl.float32,
        "BLOCK_H": min(triton.next_power_of_2(heads), max(1024 // block_d, 1)),
        "BLOCK_D": block_d,
        "num_warps": 2,
    }
    return v, (length, heads, dim, *v.stride()[:3]), constants


def value_score(v: Tensor, scores: Tensor) -> Tensor:
    """(R, L, H, d), contiguous, in v's dtype."""
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if out.numel():
        v, sizes, constants = _launch(v)
        _value_score_kernel[(scores.numel(),)](v, scores.contiguous(), out, *sizes, **constants)
    return out


def value_score_backward(g: Tensor, v: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """dv, contiguous, in v's dtype, and dscores."""
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dscores = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    if dv.numel():
        v, sizes, constants = _launch(v)
        _value_score_backward_kernel[(scores.numel(),)](
            g.contiguous(), v, scores.contiguous(), dv, dscores, *sizes, **constants
        )
    return dv, dscores
