"""The null key and value of an expert, merged into the result of any attention kernel through its log-sum-exp.

Attention over the routed keys alone gives out and lse. With s0 = <q, k0> / sqrt(d) the softmax over one key more is

    p0 = sigmoid(s0 - lse),  out' = (1 - p0) out + z p0 v0,  lse' = logaddexp(lse, s0)

where z is 1, or with dropout the null slot's own draw, 0 or 1 / (1 - p). A query without any key has lse = -inf: p0 = 1
and out, whatever it holds, is not looked at.

Backward: flash kernels form P = exp(s - lse) and delta = <dout, out> from what they are handed. Handed out' and lse'
they give dq, dk and dv of the routed keys exactly. The null slot adds, with p0 = exp(s0 - lse'),

    ds0 = p0 (z <dout, v0> - delta),  dq += ds0 k0 / sqrt(d),  dk0 = sum ds0 q / sqrt(d),  dv0 = sum z p0 dout

Shapes: q, out (R, L, H, d), contiguous; lse, keep (R, H, L), lse float32 (float64 for float64); null key and value
(G, H, d), one for every R / G rows; lengths (R): a row of length 0 has no key whatever its lse says, since kernels
differ there. A program per `ROWS` queries of one head. dk0 and dv0 are partial sums, see `partial_sums`.

Blind spots: queries are read once more than a fused attention kernel would.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import arithmetic, cdiv, contiguous, launch, next_power_of_2, wide
from optimized.kernels.partial_sums import Sum, add_up

ROWS = 64  # queries of a program, fewer for wide heads
TILE = 2048  # numbers of a tile: several tiles of them stay in the registers of 128 threads


@triton.jit
def _place(heads, chunks):
    """Row, chunk of queries and head of a program. Heads of a query lie side by side, so neighbours read what does."""
    program = tl.program_id(0)
    return (program // heads // chunks).to(tl.int64), program // heads % chunks, program % heads


@triton.jit(do_not_specialize=["length", "rows_per_null", "heads", "chunks"])
def _merge_kernel(
    q_ptr, null_k_ptr, null_v_ptr, out_ptr, lse_ptr, keep_ptr, lengths_ptr, merged_ptr, merged_lse_ptr,
    length, rows_per_null, heads, dim, chunks,
    HAS_LENGTHS: tl.constexpr, HAS_KEEP: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, chunk, h = _place(heads, chunks)
    item = row * heads + h
    null = (row // rows_per_null * heads + h) * dim
    rows = chunk * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_D)
    tile = ((row * length + rows[:, None]) * heads + h) * dim + channels[None, :]
    inside = (rows[:, None] < length) & (channels[None, :] < dim)
    null_k = tl.load(null_k_ptr + null + channels, mask=channels < dim, other=0.0).to(DTYPE)
    null_v = tl.load(null_v_ptr + null + channels, mask=channels < dim, other=0.0).to(DTYPE)
    q = tl.load(q_ptr + tile, mask=inside, other=0.0).to(DTYPE)
    s0 = tl.sum(q * null_k[None, :], 1) / tl.sqrt(tl.cast(dim, DTYPE))
    lse = tl.load(lse_ptr + item * length + rows, mask=rows < length, other=0.0).to(DTYPE)
    if HAS_LENGTHS:
        lse = tl.where(tl.load(lengths_ptr + row) > 0, lse, -float("inf"))
    top = tl.maximum(s0, lse)
    p0 = tl.exp(s0 - top)
    rest = tl.exp(lse - top)
    total = p0 + rest
    merged_lse = top + tl.log(total)
    # Not exp(lse - merged_lse): the two must sum to 1 far better than |lse| eps.
    p0 /= total
    rest /= total
    if HAS_KEEP:
        p0 *= tl.load(keep_ptr + item * length + rows, mask=rows < length, other=0.0).to(DTYPE)
    out = tl.load(out_ptr + tile, mask=inside & (lse > -float("inf"))[:, None], other=0.0).to(DTYPE)
    merged = rest[:, None] * out + p0[:, None] * null_v[None, :]
    tl.store(merged_ptr + tile, merged.to(merged_ptr.dtype.element_ty), mask=inside)
    tl.store(merged_lse_ptr + item * length + rows, merged_lse.to(merged_lse_ptr.dtype.element_ty), mask=rows < length)


@triton.jit(do_not_specialize=["length", "rows_per_null", "heads", "chunks"])
def _merge_backward_kernel(
    q_ptr, null_k_ptr, null_v_ptr, out_ptr, lse_ptr, keep_ptr, dout_ptr, dq_ptr, dk_ptr, dv_ptr,
    length, rows_per_null, heads, dim, chunks,
    HAS_KEEP: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds to dq in place; dk, dv: partial sums (R, chunks, H, d)."""
    row, chunk, h = _place(heads, chunks)
    item = row * heads + h
    null = (row // rows_per_null * heads + h) * dim
    rows = chunk * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_D)
    tile = ((row * length + rows[:, None]) * heads + h) * dim + channels[None, :]
    inside = (rows[:, None] < length) & (channels[None, :] < dim)
    null_k = tl.load(null_k_ptr + null + channels, mask=channels < dim, other=0.0).to(DTYPE)
    null_v = tl.load(null_v_ptr + null + channels, mask=channels < dim, other=0.0).to(DTYPE)
    q = tl.load(q_ptr + tile, mask=inside, other=0.0).to(DTYPE)
    out = tl.load(out_ptr + tile, mask=inside, other=0.0).to(DTYPE)
    dout = tl.load(dout_ptr + tile, mask=inside, other=0.0).to(DTYPE)
    root = tl.sqrt(tl.cast(dim, DTYPE))
    s0 = tl.sum(q * null_k[None, :], 1) / root
    lse = tl.load(lse_ptr + item * length + rows, mask=rows < length, other=float("inf")).to(DTYPE)
    p0 = tl.exp(s0 - lse)
    z = p0
    if HAS_KEEP:
        z *= tl.load(keep_ptr + item * length + rows, mask=rows < length, other=0.0).to(DTYPE)
    ds0 = (z * tl.sum(dout * null_v[None, :], 1) - p0 * tl.sum(dout * out, 1)) / root
    dq = tl.load(dq_ptr + tile, mask=inside, other=0.0).to(DTYPE) + ds0[:, None] * null_k[None, :]
    tl.store(dq_ptr + tile, dq.to(dq_ptr.dtype.element_ty), mask=inside)
    partial = ((row * chunks + chunk) * heads + h) * dim + channels
    tl.store(dk_ptr + partial, tl.sum(ds0[:, None] * q, 0), mask=channels < dim)
    tl.store(dv_ptr + partial, tl.sum(z[:, None] * dout, 0), mask=channels < dim)


def _constants(q: Tensor, keep: Tensor | None) -> dict[str, Any]:
    block, rows = next_power_of_2(q.shape[-1]), _rows(q.shape[-1])
    return {"HAS_KEEP": keep is not None, "DTYPE": arithmetic(q.dtype), "ROWS": rows, "BLOCK_D": block, "num_warps": 4}


def _rows(dim: int) -> int:
    return max(min(ROWS, TILE // next_power_of_2(dim)), 1)


def merge(
    q: Tensor,
    null_k: Tensor,
    null_v: Tensor,
    out: Tensor,
    lse: Tensor,
    keep: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out' and lse', contiguous."""
    rows, length, heads, dim = q.shape
    merged = torch.empty_like(out, memory_format=torch.contiguous_format)
    merged_lse = torch.empty_like(lse, memory_format=torch.contiguous_format)
    if q.numel():
        chunks = cdiv(length, _rows(dim))
        launch(
            _merge_kernel, (rows * heads * chunks,),
            *map(contiguous, (q, null_k, null_v, out, lse, keep, lengths)), merged, merged_lse,
            length, rows // null_k.shape[0], heads, dim, chunks, HAS_LENGTHS=lengths is not None, **_constants(q, keep),
        )  # fmt: skip
    return merged, merged_lse


def merge_backward(
    q: Tensor,
    null_k: Tensor,
    null_v: Tensor,
    merged: Tensor,
    merged_lse: Tensor,
    keep: Tensor | None,
    dout: Tensor,
    dq: Tensor,
) -> Tensor:
    """dk0 and dv0, (2, G, H, d); adds the null slot's part in place to dq, which is contiguous."""
    rows, length, heads, dim = q.shape
    chunks, groups = cdiv(length, _rows(dim)), null_k.shape[0]
    partial = torch.empty(2, rows, chunks, heads, dim, dtype=wide(q.dtype), device=q.device)
    if q.numel():
        launch(
            _merge_backward_kernel, (rows * heads * chunks,),
            *map(contiguous, (q, null_k, null_v, merged, merged_lse, keep, dout)), dq, *partial,
            length, rows // groups, heads, dim, chunks, **_constants(q, keep),
        )  # fmt: skip
    found = null_k.new_empty(2, groups, heads, dim)
    add_up(partial, heads * dim, heads * dim, Sum(found, 2 * groups, rows // groups * chunks))
    return found
