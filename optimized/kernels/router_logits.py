"""Router logits of all tokens in one pass over x, with the norms of the tokens, and the gradient of the routing tokens.

x (B, N, D), routing tokens r (E, D) or (B, E, D) -> logits (B, E, N), norms ||x|| (B, N), factors cr (B, E), all in at
least float32:

    l = <x, r>,   or with cosine routing   l = cx cr <x, r>,
    cx = 1 / max(||x||, 1e-12),  cr = scale / max(||r||, 1e-12)

Masked tokens are not read, forward or backward: logit 0, gradient 0. With g = dL/dl

    dr = sum_n g cx cr x   - r / ||r||^2 sum_n g l  (cosine only, and not where ||r|| <= 1e-12)

where the second term is what the first has along r, since sum_n g l is its product with r: so it is taken out of the
rounded sum, E rows, by the last kernel. dx: see `token_gradient`.

Forward: a program per tile of tokens of an item and block of experts, as a matrix product: half precision as it is,
whose products float32 holds exactly, float32 in exact float32 whatever TF32 is allowed elsewhere, float64 as sums. dr:
partial sums (B, chunks, E, D) over `CHUNK_N` tokens each, see `partial_sums`; for bfloat16 g is cut to TF32, whose 10
bits are three more than the result has.

Blind spots: a matrix product has at least 16 columns, so few experts waste most of it; reading x dominates.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import (
    INTERPRETED,
    arithmetic,
    cdiv,
    channel_constants,
    clamped_norm,
    contiguous,
    double_bits,
    from_bits,
    launch,
    next_power_of_2,
    norm_floor,
    wide,
)
from optimized.kernels.partial_sums import Sum, add_up

CHUNK_N = 512  # tokens of one program of dr


@triton.jit
def more_logits(total, x, r, HALF: tl.constexpr, DTYPE: tl.constexpr):
    """total + x r of tiles (tokens, channels) and (channels, experts), with the same bits in every kernel of logits."""
    if DTYPE == tl.float64:
        total += tl.sum(x.to(DTYPE)[:, :, None] * r.to(DTYPE)[None, :, :], 1)
    elif HALF and x.dtype == r.dtype and not INTERPRETED:
        total = tl.dot(x, r, total)
    elif HALF:  # the interpreter multiplies the raw bits of bfloat16; TF32 holds every half precision number
        total = tl.dot(x.to(DTYPE), r.to(DTYPE), total, input_precision="tf32")
    else:
        total = tl.dot(x.to(DTYPE), r.to(DTYPE), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["n", "experts", "item_rows", "scale_bits"])
def _logits_kernel(
    x_ptr, r_ptr, mask_ptr, logits_ptr, norms_ptr, factors_ptr, n, dim, experts, item_rows, scale_bits,
    HAS_MASK: tl.constexpr, COSINE: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    shown = rows < n
    if HAS_MASK:
        shown = tl.load(mask_ptr + b * n + rows, mask=shown, other=0) != 0
    x_ptr += (b * n + rows[:, None].to(tl.int64)) * dim
    here = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    r_ptr += (b * item_rows + here[None, :]) * dim
    channels = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_E), DTYPE)
    # Squares are added up across threads once, at the end.
    x_squares = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)
    r_squares = tl.zeros((BLOCK_D, BLOCK_E), DTYPE)
    for start in range(0, dim, BLOCK_D):
        inside = start + channels < dim
        x = tl.load(x_ptr + start + channels[None, :], mask=shown[:, None] & inside[None, :], other=0.0)
        r = tl.load(r_ptr + start + channels[:, None], mask=inside[:, None] & (here < experts)[None, :], other=0.0)
        exact = x.to(DTYPE)
        total = more_logits(total, x, r, HALF, DTYPE)
        x_squares += exact * exact
        if COSINE:
            r_squares += r.to(DTYPE) * r.to(DTYPE)
    norms = tl.sqrt(tl.sum(x_squares, 1))
    if COSINE:
        factors = from_bits(scale_bits).to(DTYPE) / clamped_norm(tl.sqrt(tl.sum(r_squares, 0)))
        total = total / clamped_norm(norms)[:, None] * factors[None, :]
        first = tl.where(tile == 0, experts, 0)
        tl.store(factors_ptr + b * experts + here, factors, mask=here < first)
    logits_ptr += (b * experts + here[None, :]) * n + rows[:, None]
    tl.store(logits_ptr, total, mask=(rows < n)[:, None] & (here < experts)[None, :])
    if tl.program_id(1) == 0:
        tl.store(norms_ptr + b * n + rows, norms, mask=rows < n)


@triton.jit(do_not_specialize=["n", "experts", "chunks"])
def _dr_kernel(
    g_ptr, x_ptr, mask_ptr, factors_ptr, norms_ptr, partial_ptr, n, dim, experts, chunks,
    HAS_MASK: tl.constexpr, COSINE: tl.constexpr, COARSE: tl.constexpr, DTYPE: tl.constexpr, CHUNK_N: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, EXPERT_BLOCKS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    first_expert = tl.program_id(1) % EXPERT_BLOCKS * BLOCK_E
    channels = tl.program_id(1) // EXPERT_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
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
            factors = tl.load(factors_ptr + b * experts + here, mask=here < experts, other=0.0)
            weight = weight / clamped_norm(norms)[None, :] * factors[:, None]
        tile = (b * n + rows[:, None]) * dim + channels[None, :]
        x = tl.load(x_ptr + tile, mask=shown[:, None] & inside[None, :], other=0.0).to(DTYPE)
        if DTYPE == tl.float64:
            total += tl.sum(weight[:, :, None] * x[None, :, :], 1)
        else:
            total = tl.dot(weight, x, total, input_precision="tf32" if COARSE else "ieee")
    partial_ptr += ((b * chunks + chunk) * experts + here[:, None]) * dim + channels[None, :]
    tl.store(partial_ptr, total, mask=(here < experts)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["experts", "each"])
def _across_kernel(
    dr_ptr, r_0, r_1, out_0, out_1, experts, each, dim, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """A row of dr (items, E, D) without what it has along r, which has `each` experts of it, as the other r."""
    e = tl.program_id(0) % experts
    dr_ptr += tl.program_id(0).to(tl.int64) * dim
    place = (tl.program_id(0) // experts * each + e).to(tl.int64) * dim
    if e >= each:
        r_0 = r_1
        out_0 = out_1
        place -= each.to(tl.int64) * dim
    dots = tl.zeros((BLOCK_D,), DTYPE)
    squares = tl.zeros((BLOCK_D,), DTYPE)
    for start in range(0, dim, BLOCK_D):
        channels = start + tl.arange(0, BLOCK_D)
        r = tl.load(r_0 + place + channels, mask=channels < dim, other=0.0).to(DTYPE)
        dots += r * tl.load(dr_ptr + channels, mask=channels < dim, other=0.0)
        squares += r * r
    square = tl.sum(squares, 0)
    length = tl.sqrt(square)
    directed = length > norm_floor(length)  # where not, the factor is the same for all r
    along = tl.where(directed, tl.sum(dots, 0), 0.0) / tl.where(directed, square, 1.0)
    for start in range(0, dim, BLOCK_D):
        channels = start + tl.arange(0, BLOCK_D)
        r = tl.load(r_0 + place + channels, mask=channels < dim, other=0.0).to(DTYPE)
        dr = tl.load(dr_ptr + channels, mask=channels < dim, other=0.0) - along * r
        tl.store(out_0 + place + channels, dr.to(out_0.dtype.element_ty), mask=channels < dim)


def item_rows(r: Tensor) -> int:
    """Rows of r (contiguous) from an item to the next, 0 where all share it.

    Not a stride: the compiler knows that a row starts at a multiple of `dim`, and so reads several numbers at once.
    """
    return r.shape[1] if r.ndim == 3 else 0


def _tile(dtype: torch.dtype, half: bool, experts: int) -> dict[str, Any]:
    """Constants of a tile of logits in `dtype`; half: of x and r in half precision."""
    blocks = (16, 32, 4) if dtype == torch.float64 else (64 if half else 32, 64, 16 if experts <= 16 else 32)
    return {
        "HALF": half,
        "DTYPE": arithmetic(dtype),
        **dict(zip(("BLOCK_N", "BLOCK_D", "BLOCK_E"), blocks)),
        "num_warps": 4,
    }


def router_logits(x: Tensor, r: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, E, N), norms (B, N) and factors (B, E), empty without scale, that of cosine routing."""
    batch, n, dim = x.shape
    experts = r.shape[-2]
    dtype = wide(torch.promote_types(x.dtype, r.dtype))
    logits = torch.empty(batch, experts, n, dtype=dtype, device=x.device)
    norms = torch.empty(batch, n, dtype=dtype, device=x.device)
    # Without tokens no program writes them.
    make = norms.new_empty if logits.numel() else norms.new_zeros
    factors = make(batch, 0 if scale is None else experts)
    if logits.numel():
        constants = _tile(dtype, max(x.element_size(), r.element_size()) == 2, experts)
        r = r.contiguous()
        launch(
            _logits_kernel, (batch * cdiv(n, constants["BLOCK_N"]), cdiv(experts, constants["BLOCK_E"])),
            x.contiguous(), r, contiguous(mask), logits, norms, factors,
            n, dim, experts, item_rows(r), double_bits(0.0 if scale is None else scale),
            HAS_MASK=mask is not None, COSINE=scale is not None, **constants,
        )  # fmt: skip
    return logits, norms, factors


def routing_token_gradient(
    g: Tensor, x: Tensor, r: Tensor, mask: Tensor | None, norms: Tensor, factors: Tensor
) -> Tensor:
    """dr in r's dtype, from the gradient g (B, E, N) of the logits, and what `router_logits` returned with them."""
    return routing_token_gradients(g, x, (r,), mask, norms, factors)[0]


def routing_token_gradients(
    g: Tensor, x: Tensor, parts: tuple[Tensor, ...], mask: Tensor | None, norms: Tensor, factors: Tensor
) -> tuple[Tensor, ...]:
    """The same of one or two parts of the experts, alike in shape and dtype, whose logits lie one after the other."""
    batch, n, dim = x.shape
    r = parts[0]
    experts = r.shape[-2] * len(parts)
    if not g.numel():
        return tuple([torch.zeros_like(r, memory_format=torch.contiguous_format) for r in parts])
    dtype, cosine = norms.dtype, factors.numel() > 0
    g = g.contiguous()
    double = dtype == torch.float64
    block_n, block_d, block_e = (16, 32, 4) if double else (32, 128, 16)
    block_d = min(block_d, max(next_power_of_2(dim), 16))
    chunks, expert_blocks = cdiv(n, CHUNK_N), cdiv(experts, block_e)
    partial = torch.empty(batch, chunks, experts, dim, dtype=dtype, device=x.device)
    launch(
        _dr_kernel, (batch * chunks, cdiv(dim, block_d) * expert_blocks),
        g, x.contiguous(), contiguous(mask), factors.contiguous(), norms.contiguous(), partial,
        n, dim, experts, chunks,
        HAS_MASK=mask is not None, COSINE=cosine, COARSE=x.dtype == r.dtype == torch.bfloat16,
        DTYPE=arithmetic(dtype), CHUNK_N=CHUNK_N,
        BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_E=block_e, EXPERT_BLOCKS=expert_blocks, num_warps=4,
    )  # fmt: skip
    found = tuple([torch.empty(part.shape, dtype=r.dtype, device=r.device) for part in parts])
    groups, rows = (batch, chunks) if r.ndim == 3 else (1, batch * chunks)
    width = experts // len(parts) * dim
    if not cosine:
        add_up(partial, width, experts * dim, *[Sum(dr, groups, rows, i * width) for i, dr in enumerate(found)])
        return found
    whole = partial.new_empty(groups, experts, dim)
    add_up(partial, experts * dim, experts * dim, Sum(whole, groups, rows))
    given = [part.contiguous() for part in parts]
    launch(
        _across_kernel, (groups * experts,),
        whole, given[0], given[-1], found[0], found[-1], experts, r.shape[-2], dim, **channel_constants(dim, dtype),
    )  # fmt: skip
    return found
