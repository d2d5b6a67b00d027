"""Router logits of all tokens in one pass over x, with the norms of the tokens, and their gradients.

x (B, N, D), routing tokens r (E, D) or (B, E, D) -> logits (B, E, N) and norms ||x|| (B, N), both in at least float32:

    l = <x, r>,   or with cosine routing   l = cx cr <x, r>,
    cx = 1 / max(||x||, 1e-12),  cr = scale / max(||r||, 1e-12)

Masked tokens are not read, forward or backward: logit 0, gradient 0. With g = dL/dl the gradients are

    dx = sum_e g cx cr r_e - x cx^2 sum_e g l       (second term: cosine only, and not where ||x|| <= 1e-12)
    dr = sum_n g cx cr x   - r / ||r||^2 sum_n g l  (the second term is left to the caller: E rows)

Forward: a program per `block_n` tokens of an item and up to 16 experts, as a matrix product: for half precision in
TF32, which holds every float16 and bfloat16 number exactly, for float32 in exact float32 whatever TF32 is allowed
elsewhere, for float64 as sums. dx: a program per tile of tokens and channels. dr: partial sums (B, chunks, E, D) over
`CHUNK_N` tokens each, added up by PyTorch.

Blind spots: a matrix product has at least 16 columns, so few experts waste most of it; reading x dominates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import as_bytes, wide

CHUNK_N = 512  # tokens of one program of dr


@triton.jit(do_not_specialize=["n", "experts", "item_stride", "factor_stride"])
def _logits_kernel(
    x_ptr, r_ptr, mask_ptr, factors_ptr, logits_ptr, norms_ptr, n, dim, experts, item_stride, factor_stride,
    HAS_MASK: tl.constexpr, COSINE: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    shown = rows < n
    if HAS_MASK:
        shown = tl.load(mask_ptr + b * n + rows, mask=shown, other=0) != 0
    x_ptr += (b * n + rows[:, None].to(tl.int64)) * dim
    here = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    r_ptr += b * item_stride + here[None, :].to(tl.int64) * dim
    channels = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_E), DTYPE)
    squares = tl.zeros((BLOCK_N,), DTYPE)
    for start in range(0, dim, BLOCK_D):
        inside = start + channels < dim
        x = tl.load(x_ptr + start + channels[None, :], mask=shown[:, None] & inside[None, :], other=0.0)
        r = tl.load(r_ptr + start + channels[:, None], mask=inside[:, None] & (here < experts)[None, :], other=0.0)
        if DTYPE == tl.float64:
            total += tl.sum(x.to(DTYPE)[:, :, None] * r.to(DTYPE)[None, :, :], 1)
        elif HALF:
            total = tl.dot(x.to(tl.float32), r.to(tl.float32), total, input_precision="tf32")
        else:
            total = tl.dot(x.to(tl.float32), r.to(tl.float32), total, input_precision="ieee")
        exact = x.to(DTYPE)
        squares += tl.sum(exact * exact, 1)
    norms = tl.sqrt(squares)
    if COSINE:
        factors = tl.load(factors_ptr + b * factor_stride + here, mask=here < experts, other=0.0)
        total = total / tl.maximum(norms, 1e-12)[:, None] * factors[None, :]
    logits_ptr += (b * experts + here[None, :]) * n + rows[:, None]
    tl.store(logits_ptr, total, mask=(rows < n)[:, None] & (here < experts)[None, :])
    if tl.program_id(2) == 0:
        tl.store(norms_ptr + b * n + rows, norms, mask=rows < n)


@triton.jit(do_not_specialize=["n", "experts", "item_stride", "factor_stride"])
def _dx_kernel(
    g_ptr, x_ptr, r_ptr, mask_ptr, factors_ptr, logits_ptr, norms_ptr, dx_ptr,
    n, dim, experts, item_stride, factor_stride,
    HAS_MASK: tl.constexpr, COSINE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channels < dim
    shown = rows < n
    if HAS_MASK:
        shown = tl.load(mask_ptr + b * n + rows, mask=shown, other=0) != 0
    total = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    moment = tl.zeros((BLOCK_N,), DTYPE)
    inverse = tl.full((BLOCK_N,), 1.0, DTYPE)
    norms = inverse
    if COSINE:
        norms = tl.load(norms_ptr + b * n + rows, mask=shown, other=1.0)
        inverse = 1.0 / tl.maximum(norms, 1e-12)
    for e in range(experts):
        row = (b * experts + e) * n + rows
        g = tl.load(g_ptr + row, mask=shown, other=0.0).to(DTYPE)
        r = tl.load(r_ptr + b * item_stride + tl.cast(e, tl.int64) * dim + channels, mask=inside, other=0.0).to(DTYPE)
        weight = g
        if COSINE:
            moment += g * tl.load(logits_ptr + row, mask=shown, other=0.0)
            weight = g * inverse * tl.load(factors_ptr + b * factor_stride + e)
        total += weight[:, None] * r[None, :]
    tile = (b * n + rows[:, None]) * dim + channels[None, :]
    if COSINE:
        x = tl.load(x_ptr + tile, mask=shown[:, None] & inside[None, :], other=0.0).to(DTYPE)
        slope = tl.where(norms > 1e-12, moment * inverse * inverse, 0.0)
        total -= x * slope[:, None]
    tl.store(dx_ptr + tile, total.to(dx_ptr.dtype.element_ty), mask=(rows < n)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["n", "experts", "chunks", "factor_stride"])
def _dr_kernel(
    g_ptr, x_ptr, mask_ptr, factors_ptr, norms_ptr, partial_ptr, n, dim, experts, chunks, factor_stride,
    HAS_MASK: tl.constexpr, COSINE: tl.constexpr, DTYPE: tl.constexpr, CHUNK_N: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, EXPERT_BLOCKS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    first_expert = tl.program_id(2) % EXPERT_BLOCKS * BLOCK_E
    channels = tl.program_id(2) // EXPERT_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    here = first_expert + tl.arange(0, BLOCK_E)
    inside = channels < dim
    total = tl.zeros((BLOCK_E, BLOCK_D), DTYPE)
    for start in range(0, CHUNK_N, BLOCK_N):
        rows = chunk * CHUNK_N + start + tl.arange(0, BLOCK_N)
        shown = rows < n
        if HAS_MASK:
            shown = tl.load(mask_ptr + b * n + rows, mask=shown, other=0) != 0
        keep = (here < experts)[:, None] & shown[None, :]
        weight = tl.load(g_ptr + (b * experts + here[:, None]) * n + rows[None, :], mask=keep, other=0.0).to(DTYPE)
        if COSINE:
            norms = tl.load(norms_ptr + b * n + rows, mask=shown, other=1.0)
            factors = tl.load(factors_ptr + b * factor_stride + here, mask=here < experts, other=0.0)
            weight = weight / tl.maximum(norms, 1e-12)[None, :] * factors[:, None]
        tile = (b * n + rows[:, None]) * dim + channels[None, :]
        x = tl.load(x_ptr + tile, mask=shown[:, None] & inside[None, :], other=0.0).to(DTYPE)
        if DTYPE == tl.float64:
            total += tl.sum(weight[:, :, None] * x[None, :, :], 1)
        else:
            total = tl.dot(weight, x, total, input_precision="ieee")
    partial_ptr += ((b * chunks + chunk) * experts + here[:, None]) * dim + channels[None, :]
    tl.store(partial_ptr, total, mask=(here < experts)[:, None] & inside[None, :])


def _item_stride(t: Tensor, dims: int) -> int:
    """Of the batch dimension, 0 where all items share t."""
    return t.stride(0) if t.ndim == dims else 0


def _factors(r: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale / max(||r||, 1e-12), (E) or (B, E)."""
    return scale / torch.linalg.vector_norm(r.to(dtype), dim=-1).clamp_min(1e-12)


def router_logits(x: Tensor, r: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """Logits (B, E, N) and norms (B, N). scale: of cosine routing, None for the plain product."""
    batch, n, dim = x.shape
    experts = r.shape[-2]
    dtype = wide(torch.promote_types(x.dtype, r.dtype))
    logits = torch.empty(batch, experts, n, dtype=dtype, device=x.device)
    norms = torch.empty(batch, n, dtype=dtype, device=x.device)
    if logits.numel():
        double = dtype == torch.float64
        block_n, block_d, block_e = (16, 32, 4) if double else (32, 64, 16)
        r = r.contiguous()
        factors = None if scale is None else _factors(r, scale, dtype)
        _logits_kernel[(triton.cdiv(n, block_n), batch, triton.cdiv(experts, block_e))](
            x.contiguous(), r, as_bytes(mask), factors, logits, norms,
            n, dim, experts, _item_stride(r, 3), 0 if factors is None else _item_stride(factors, 2),
            HAS_MASK=mask is not None, COSINE=scale is not None,
            HALF=max(x.element_size(), r.element_size()) == 2, DTYPE=tl.float64 if double else tl.float32,
            BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_E=block_e, num_warps=4,
        )  # fmt: skip
    return logits, norms


def router_logits_backward(
    g: Tensor, x: Tensor, r: Tensor, mask: Tensor | None, logits: Tensor, norms: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """dx in x's dtype and dr in r's."""
    batch, n, dim = x.shape
    experts = r.shape[-2]
    dtype = logits.dtype
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if not logits.numel():
        return dx, torch.zeros_like(r)
    g, x, r, logits, norms = (t.contiguous() for t in (g, x, r, logits, norms))
    factors = None if scale is None else _factors(r, scale, dtype)
    double = dtype == torch.float64
    block_n, block_d = (16, 32) if double else (32, 128)
    block_d = min(block_d, max(triton.next_power_of_2(dim), 16))
    constants = {
        "HAS_MASK": mask is not None,
        "COSINE": scale is not None,
        "DTYPE": tl.float64 if double else tl.float32,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "num_warps": 4,
    }
    shown, factor_stride = as_bytes(mask), 0 if factors is None else _item_stride(factors, 2)
    _dx_kernel[(triton.cdiv(n, block_n), batch, triton.cdiv(dim, block_d))](
        g, x, r, shown, factors, logits, norms, dx, n, dim, experts, _item_stride(r, 3), factor_stride, **constants
    )
    chunks, block_e = triton.cdiv(n, CHUNK_N), 4 if double else 16
    expert_blocks = triton.cdiv(experts, block_e)
    partial = torch.empty(batch, chunks, experts, dim, dtype=dtype, device=x.device)
    _dr_kernel[(chunks, batch, triton.cdiv(dim, block_d) * expert_blocks)](
        g, x, shown, factors, norms, partial, n, dim, experts, chunks, factor_stride,
        CHUNK_N=CHUNK_N, BLOCK_E=block_e, EXPERT_BLOCKS=expert_blocks, **constants,
    )  # fmt: skip
    dr = partial.sum(1)
    if scale is not None:
        squares = r.to(dtype).square().sum(-1, keepdim=True)
        moment = (g if mask is None else g.masked_fill(~mask[:, None], 0)).mul(logits).sum(-1, keepdim=True)
        dr -= torch.where(squares > 1e-24, moment * r / squares.clamp_min(1e-24), 0)
    return dx, (dr if r.ndim == 3 else dr.sum(0)).to(r.dtype)
