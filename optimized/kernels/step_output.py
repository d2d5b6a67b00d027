"""What a decoding step makes of its attention: the projections of local attention and of the experts, and their sum.

out[b] = a_0 W^T + sum over experts of (score_e a_e W_e^T where e takes the token, null[e] where it does not), the sum
only behind the first block, with AVERAGE divided by E + 1 there: as `blend`, without rounding between. a: what
`step_attention` attended to, or its sums added up, rounded to x's dtype as if it had been written.

A program has a tile of channels of some items; weights of an expert that takes none of them are not read. The lengths
of the items are counted up by the first tile: nothing in this launch reads them.

Blind spots: each program adds up the parts anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import cdiv, launch, next_power_of_2
from optimized.kernels.memory_tiles import _finite
from optimized.kernels.step_attention import Attended
from optimized.kernels.step_products import _items, _more, _sums, _whole


@triton.jit
def _results(
    results_ptr, sums_ptr, b, shown, channel, inside, units, dim, SPLIT: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Tile (items, channels) of results (B, units d)."""
    readable = shown[:, None] & inside[None, :]
    row = b[:, None] * units + (channel // dim)[None, :]
    if SPLIT == 1:
        return tl.load(results_ptr + b[:, None] * units * dim + channel[None, :], mask=readable, other=0.0).to(DTYPE)
    else:  # noqa: RET505 - the compiler drops the other branch only so
        most = tl.load(sums_ptr + 2 * SPLIT * row, mask=readable, other=0.0)
        for part in tl.static_range(1, SPLIT):
            at = SPLIT * row + part
            most = tl.maximum(most, tl.load(sums_ptr + 2 * at, mask=readable, other=0.0))
        total = tl.zeros_like(most)
        made = tl.zeros_like(most)
        for part in tl.static_range(SPLIT):
            at = SPLIT * row + part
            share = tl.exp2(tl.load(sums_ptr + 2 * at, mask=readable, other=0.0) - most)
            total += share * tl.load(sums_ptr + 2 * at + 1, mask=readable, other=1.0)
            of_part = tl.load(results_ptr + at * dim + (channel % dim)[None, :], mask=readable, other=0.0)
            made += share * of_part
        made = tl.where(_finite(total) & _finite(made), made / total, float("nan"))
        return tl.where(readable, made, 0.0)


@triton.jit(do_not_specialize=["batch", "experts", "units"])
def _step_output_kernel(
    results_ptr, sums_ptr, kinds_ptr, scores_ptr, w_local_ptr, w_expert_ptr, null_ptr, length_ptr, out_ptr,
    batch, channels, experts, local_channels, expert_channels, units, dim,
    AVERAGE: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """channels: D; local_channels and expert_channels: of the heads of local attention, and of an expert."""
    b = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    shown = b < batch
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = column < channels
    if tl.program_id(0) == 0:
        length = tl.load(length_ptr + b, mask=shown, other=0)
        tl.store(length_ptr + b, length + 1, mask=shown)
    rows = column.to(tl.int64)[:, None]
    total = _sums(PRODUCT, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K)
    for start in range(0, local_channels, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        inside = at < local_channels
        w = tl.load(w_local_ptr + rows * local_channels + at[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        a = _results(results_ptr, sums_ptr, b, shown, at, inside, units, dim, SPLIT, DTYPE)
        total = _more(total, a, w, w_local_ptr, PRODUCT, HALF, DTYPE)
    out = _whole(total, PRODUCT)
    terms = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    later = tl.zeros((BLOCK_M,), tl.int32)
    for e in range(experts):
        kind = tl.load(kinds_ptr + b * experts + e, mask=shown, other=0)
        score = tl.load(scores_ptr + b * experts + e, mask=shown, other=0.0)
        taken = kind == 1
        null = tl.load(null_ptr + e * channels + column, mask=here, other=0.0).to(DTYPE)
        more = tl.where((kind == 2)[:, None], null[None, :], 0.0)
        if tl.max(taken.to(tl.int32), 0) > 0:
            part = _sums(PRODUCT, DTYPE, BLOCK_M, BLOCK_N, BLOCK_E)
            for start in range(0, expert_channels, BLOCK_E):
                at = start + tl.arange(0, BLOCK_E)
                inside = at < expert_channels
                w_at = (e * channels + rows) * expert_channels + at[None, :]
                w = tl.load(w_expert_ptr + w_at, mask=here[:, None] & inside[None, :], other=0.0)
                channel = local_channels + e * expert_channels + at
                a = _results(results_ptr, sums_ptr, b, taken, channel, inside, units, dim, SPLIT, DTYPE)
                part = _more(part, a, w, w_local_ptr, PRODUCT, HALF, DTYPE)
            more = tl.where(taken[:, None], _whole(part, PRODUCT) * score[:, None], more)
        terms += more
        later = tl.where(kind > 0, 1, later)
    out += terms
    if AVERAGE:
        out = tl.where((later > 0)[:, None], out / (experts + 1).to(DTYPE), out)
    tl.store(
        out_ptr + b[:, None] * channels + column[None, :], out.to(out_ptr.dtype.element_ty),
        mask=shown[:, None] & here[None, :],
    )  # fmt: skip


def step_output(
    attended: Attended, w_local: Tensor, w_expert: Tensor, null: Tensor, length: Tensor, average: bool
) -> Tensor:
    """(B, D) in the dtype of the weights; adds 1 to length (B) int64, contiguous.

    w_local (D, h d), w_expert (E D, H d, 1) in x's dtype; null (E, D).
    """
    experts, dim = null.shape
    batch, local_channels, expert_channels = attended.kinds.shape[0], w_local.shape[1], w_expert.shape[1]
    _, units, *split, head = attended.results.shape
    out = torch.empty(batch, dim, dtype=w_local.dtype, device=w_local.device)
    constants = _items(batch, w_local.dtype, local_channels, 8)
    block_e = max(min(next_power_of_2(expert_channels), constants["BLOCK_K"]), 16)
    launch(
        _step_output_kernel, (cdiv(dim, constants["BLOCK_N"]), cdiv(batch, constants["BLOCK_M"])),
        *attended, w_local.contiguous(), w_expert.contiguous(), null.contiguous(), length, out,
        batch, dim, experts, local_channels, expert_channels, units, head,
        AVERAGE=average, SPLIT=split[0] if split else 1, BLOCK_E=block_e, **constants,
    )  # fmt: skip
    return out
