"""Gradients of a weight and of the scale of its columns, from those of their product, which come in parts.

Of w (E, F, D), gamma (E, D) and parts p (P, E, F, D) of the gradient of w gamma,

    dw = gamma sum over parts of p,   dgamma = sum over rows f and parts of w p

and without gamma dw is the sum alone. A program has CHUNK rows of an expert and some channels, reads each part once,
writes dw, and its partial sum of dgamma, see `partial_sums`. Parts and rows are added in their order, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import arithmetic, cdiv, contiguous, launch, next_power_of_2
from optimized.kernels.partial_sums import Sum, add_up

CHUNK, ROWS = 32, 16  # rows of a program, and at a time
CHANNELS = 128


@triton.jit(do_not_specialize=["parts", "experts", "rows"])
def _scaled_weight_kernel(
    parts_ptr, w_ptr, gamma_ptr, dw_ptr, partial_ptr, parts, experts, rows, dim,
    HAS_GAMMA: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial (E, chunks, D), of dgamma."""
    across = tl.cdiv(dim, BLOCK_D)
    chunks = tl.cdiv(rows, CHUNK)
    chunk = tl.program_id(0) // across % chunks
    e = (tl.program_id(0) // across // chunks).to(tl.int64)
    channels = tl.program_id(0) % across * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < dim
    every = experts.to(tl.int64) * rows * dim
    if HAS_GAMMA:
        gamma = tl.load(gamma_ptr + e * dim + channels, mask=inside, other=0.0).to(DTYPE)
        dgamma = tl.zeros((ROWS, BLOCK_D), DTYPE)
    for start in range(0, CHUNK, ROWS):
        row = chunk * CHUNK + start + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & inside[None, :]
        at = (e * rows + row[:, None]) * dim + channels[None, :]
        total = tl.zeros((ROWS, BLOCK_D), DTYPE)
        for part in range(parts):
            total += tl.load(parts_ptr + part * every + at, mask=there, other=0.0)
        if HAS_GAMMA:
            dgamma += total * tl.load(w_ptr + at, mask=there, other=0.0).to(DTYPE)
            total *= gamma[None, :]
        tl.store(dw_ptr + at, total.to(dw_ptr.dtype.element_ty), mask=there)
    if HAS_GAMMA:
        tl.store(partial_ptr + (e * chunks + chunk) * dim + channels, tl.sum(dgamma, 0), mask=inside)


def scaled_weight_gradients(parts: Tensor, w: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """dw (E, F, D) and dgamma, in the dtypes and shapes of w and gamma, of E D numbers; parts: in at least float32."""
    count, experts, rows, dim = parts.shape
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    dgamma = None if gamma is None else torch.empty(gamma.shape, dtype=gamma.dtype, device=w.device)
    chunks, block = cdiv(rows, CHUNK), min(next_power_of_2(max(dim, 1)), CHANNELS)
    partial = None if gamma is None else parts.new_empty(experts, chunks, dim)
    if dw.numel():
        launch(
            _scaled_weight_kernel, (experts * chunks * cdiv(dim, block),),
            parts.contiguous(), w.contiguous(), contiguous(gamma), dw, partial, count, experts, rows, dim,
            HAS_GAMMA=gamma is not None, DTYPE=arithmetic(parts.dtype), CHUNK=CHUNK, ROWS=ROWS, BLOCK_D=block,
            num_warps=4,
        )  # fmt: skip
    if dgamma is not None and partial is not None:
        add_up(partial, dim, dim, Sum(dgamma, experts, chunks))
    return dw, dgamma
