"""Gather of routed tokens with RMSNorm, and its backward through the inverse map; no atomics.

Forward: rows (E, B, K, D) of x (B, N, D), y = x r sqrt(D) gamma[e] with r = 1 / max(||x||, 1e-12) in at least float32;
masked slots are 0 and their tokens are not read. One program per slot.

Backward: the norm of a token does not depend on the expert, so with h = sum_e gamma[e] g[e, slot of n],

    dx = sqrt(D) r (h - x r^2 <x, h>)          (second term absent where ||x|| <= 1e-12, where r is constant)

one program per token, in the order of the experts. dgamma[e] = sum over its slots of g x r sqrt(D): programs sum
`ROWS` slots each into partial sums, which PyTorch adds up.

Blind spots: dgamma gathers x once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import as_bytes, channel_constants, contiguous, wide

ROWS = 32  # slots that one program sums for dgamma


@triton.jit
def _squares(x_ptr, dim, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr):
    """||x||^2 of one row."""
    channels = tl.arange(0, BLOCK_D)
    squares = tl.zeros((BLOCK_D,), DTYPE)
    for start in range(0, dim, BLOCK_D):
        x = tl.load(x_ptr + start + channels, mask=start + channels < dim, other=0.0).to(DTYPE)
        squares += x * x
    return tl.sum(squares)


@triton.jit(do_not_specialize=["n", "k", "batch", "experts", "root_dim"])
def _gather_kernel(
    x_ptr, indices_ptr, slots_ptr, gamma_ptr, out_ptr, n, k, dim, batch, experts, root_dim,
    HAS_NORM: tl.constexpr, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # (e, b, k)
    slot = row % k
    b = row // k % batch
    e = row // k // batch
    out_ptr += row * dim
    channels = tl.arange(0, BLOCK_D)
    place = (b * experts + e) * k + slot
    valid = tl.load(slots_ptr + place).to(tl.int32)
    x_ptr += (b * n + tl.load(indices_ptr + place)) * dim
    r = tl.full((), 1.0, DTYPE)
    if HAS_NORM:
        # root_dim = dim, as an integer: a Python float would arrive in float32.
        root = tl.sqrt(tl.cast(root_dim, tl.float64)).to(DTYPE)
        squares = tl.full((), 1.0, DTYPE)
        if valid > 0:
            squares = _squares(x_ptr, dim, DTYPE, BLOCK_D)
        r = root / tl.maximum(tl.sqrt(squares), 1e-12)
    for start in range(0, dim, BLOCK_D):
        inside = start + channels < dim
        readable = tl.where(inside, valid, 0) > 0  # a block, since the interpreter can't splat a scalar comparison
        y = tl.load(x_ptr + start + channels, mask=readable, other=0.0).to(DTYPE) * r
        if HAS_NORM:
            y *= tl.load(gamma_ptr + e * dim + start + channels, mask=inside, other=0.0).to(DTYPE)
        tl.store(out_ptr + start + channels, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "k", "batch", "experts", "root_dim"])
def _scatter_kernel(
    g_ptr, x_ptr, inverse_ptr, gamma_ptr, out_ptr, n, k, dim, batch, experts, root_dim,
    HAS_NORM: tl.constexpr, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # (b, n)
    b = token // n
    position = token % n
    x_ptr += token * dim
    out_ptr += token * dim
    channels = tl.arange(0, BLOCK_D)
    dot = tl.full((), 0.0, DTYPE)
    scale = tl.full((), 1.0, DTYPE)
    slope = tl.full((), 0.0, DTYPE)
    if HAS_NORM:
        taken = tl.full((), 0, tl.int32)
        for e in range(experts):
            slot = tl.load(inverse_ptr + (b * experts + e) * n + position).to(tl.int64)
            if slot >= 0:
                taken += 1
                row = ((e * batch + b) * k + slot) * dim
                for start in range(0, dim, BLOCK_D):
                    inside = start + channels < dim
                    g = tl.load(g_ptr + row + start + channels, mask=inside, other=0.0).to(DTYPE)
                    gamma = tl.load(gamma_ptr + e * dim + start + channels, mask=inside, other=0.0).to(DTYPE)
                    x = tl.load(x_ptr + start + channels, mask=inside, other=0.0).to(DTYPE)
                    dot += tl.sum(g * gamma * x)
        if taken > 0:
            norm = tl.sqrt(_squares(x_ptr, dim, DTYPE, BLOCK_D))
            r = 1.0 / tl.maximum(norm, 1e-12)
            scale = tl.sqrt(tl.cast(root_dim, tl.float64)).to(DTYPE) * r
            slope = tl.where(norm > 1e-12, (dot * r) * r, 0.0)
    for start in range(0, dim, BLOCK_D):
        inside = start + channels < dim
        h = tl.zeros((BLOCK_D,), DTYPE)
        any_slot = tl.full((), 0, tl.int32)
        for e in range(experts):
            slot = tl.load(inverse_ptr + (b * experts + e) * n + position).to(tl.int64)
            if slot >= 0:
                any_slot += 1
                row = ((e * batch + b) * k + slot) * dim
                g = tl.load(g_ptr + row + start + channels, mask=inside, other=0.0).to(DTYPE)
                if HAS_NORM:
                    g *= tl.load(gamma_ptr + e * dim + start + channels, mask=inside, other=0.0).to(DTYPE)
                h += g
        if HAS_NORM:
            # A token that nobody took may hold NaN: it is not read.
            x = tl.load(x_ptr + start + channels, mask=tl.where(inside, any_slot, 0) > 0, other=0.0).to(DTYPE)
            h = scale * (h - x * slope)
        tl.store(out_ptr + start + channels, h.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "k", "batch", "experts", "root_dim", "chunks"])
def _gamma_kernel(
    g_ptr, x_ptr, indices_ptr, slots_ptr, out_ptr, n, k, dim, batch, experts, root_dim, chunks,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (e, chunk of the B K slots of e): partial sums (E, chunks, D)."""
    e = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    root = tl.sqrt(tl.cast(root_dim, tl.float64)).to(DTYPE)
    out_ptr += (e * chunks + chunk) * dim
    for start in range(0, dim, BLOCK_D):
        inside = start + channels < dim
        total = tl.zeros((BLOCK_D,), DTYPE)
        for i in range(ROWS):
            r_in_expert = chunk * ROWS + i
            if r_in_expert < batch * k:
                b = r_in_expert // k
                place = (b * experts + e) * k + r_in_expert % k
                if tl.load(slots_ptr + place) != 0:
                    row_ptr = x_ptr + (b * n + tl.load(indices_ptr + place)) * dim
                    r = root / tl.maximum(tl.sqrt(_squares(row_ptr, dim, DTYPE, BLOCK_D)), 1e-12)
                    g_row = g_ptr + (e * batch * k + r_in_expert) * dim
                    g = tl.load(g_row + start + channels, mask=inside, other=0.0).to(DTYPE)
                    x = tl.load(row_ptr + start + channels, mask=inside, other=0.0).to(DTYPE)
                    total += g * x * r
        tl.store(out_ptr + start + channels, total, mask=inside)


def gather_norm(x: Tensor, indices: Tensor, slots: Tensor, gamma: Tensor | None) -> Tensor:
    """(E, B, K, D) in x's dtype. gamma (E, D) or None for no norm."""
    batch, n, dim = x.shape
    _, experts, k = indices.shape
    out = x.new_empty(experts, batch, k, dim)
    if out.numel():
        _gather_kernel[(out.shape[:3].numel(),)](
            x.contiguous(), indices.contiguous(), as_bytes(slots),
            contiguous(gamma), out, n, k, dim, batch, experts, dim,
            HAS_NORM=gamma is not None, **channel_constants(dim, x.dtype),
        )  # fmt: skip
    return out


def gather_norm_backward(
    g: Tensor, x: Tensor, indices: Tensor, slots: Tensor, inverse: Tensor, gamma: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """dx in x's dtype and dgamma in gamma's (None without gamma)."""
    batch, n, dim = x.shape
    _, experts, k = indices.shape
    x, g = x.contiguous(), g.contiguous()
    dx = torch.zeros_like(x) if g.numel() == 0 else torch.empty_like(x)
    constants = channel_constants(dim, x.dtype)
    if g.numel() and x.numel():
        _scatter_kernel[(batch * n,)](
            g, x, inverse.contiguous(), contiguous(gamma), dx,
            n, k, dim, batch, experts, dim, HAS_NORM=gamma is not None, **constants,
        )  # fmt: skip
    if gamma is None:
        return dx, None
    chunks = triton.cdiv(batch * k, ROWS)
    partial = torch.zeros(experts, chunks, dim, dtype=wide(x.dtype), device=x.device)
    if g.numel():
        _gamma_kernel[(experts, chunks)](
            g, x, indices.contiguous(), as_bytes(slots), partial,
            n, k, dim, batch, experts, dim, chunks, ROWS=ROWS, **constants,
        )  # fmt: skip
    return dx, partial.sum(1).to(gamma.dtype)
