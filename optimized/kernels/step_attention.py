"""Attention of a decoding step: one query of each head over the window, and of each expert that takes the token over
its memory, in one launch.

The queries, keys and values of local attention are those of `step_products`, rotated here; the new key and value go to
their place, w + min(length - start, W - 1), behind those of the tokens before. A head sees them and the min(length, w)
before. If one of what it sees, or its query, is not finite or too large (`ops.finite`), it gets NaN.

An expert takes the token if a memory is there (start > 0) and its logit reaches the threshold, of which it is one of
the first C to do so in the block; or, with EVERYBODY, if only a memory is there. Over the filled slots k and the null
key 0,

    s_k = <q, k_k> / sqrt(d),   P = softmax,   out = P_0 v_0 + sum_k P_k sigma_k v_k,   sigma_k = sigmoid(l_k), or 1

and what is not finite makes NaN of it as in `memory_attention`. What an empty slot holds changes nothing.

Of one item keys are shared by as many programs of a head as fill a GPU: each hands on its sums, which `step_output`
adds up in their order. The first has the new key, or the null key, so that its sum is never empty.

Blind spots: an expert finds out anew for each head whether it takes the token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import arithmetic, cdiv, double_bits, from_bits, launch, next_power_of_2, wide
from optimized.kernels.memory_tiles import _finite, _tile
from optimized.kernels.step_tokens import _place
from optimized.kernels.window import LOG2_E

MOST_PARTS = 4  # of a head


@triton.jit
def _turned(ptr, cos_ptr, sin_ptr, dim, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr):
    """A row rotated, and rounded as if it had been written."""
    channels = tl.arange(0, BLOCK_D)
    first = channels < dim // 2
    inside = channels < dim
    across = tl.where(first, channels + dim // 2, channels - dim // 2)
    t = tl.load(ptr + channels, mask=inside, other=0.0).to(DTYPE)
    other = tl.load(ptr + across, mask=inside, other=0.0).to(DTYPE)
    cos = tl.load(cos_ptr + channels, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + channels, mask=inside, other=0.0)
    return (t * cos + tl.where(first, -other, other) * sin).to(ptr.dtype.element_ty).to(DTYPE)


@triton.jit
def _larger(t, LARGEST: tl.constexpr, DTYPE: tl.constexpr):
    """1 where a number is not at most so large, NaN among them."""
    return tl.where(tl.abs(t) <= tl.full((1,), LARGEST, DTYPE), 0, 1)


@triton.jit
def _score(logit, UNIT: tl.constexpr):
    """Its sigmoid, or 1; of NaN NaN."""
    if UNIT:
        return tl.where(logit == logit, 1.0, float("nan")).to(logit.dtype)
    else:  # noqa: RET505 - the compiler drops the other branch only so
        return 1.0 / (1.0 + tl.exp(-logit))


@triton.jit
def _over(
    q, keys_ptr, values_ptr, stride, first, end, logits_ptr, positions_ptr, top, total, out, dim, to_base_2,
    MEMORY: tl.constexpr, UNIT: tl.constexpr, LARGEST: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sums with rows first to end: of a memory those that are filled, times their scores."""
    for begin in range(first, end, BLOCK_R):
        at = begin + tl.arange(0, BLOCK_R)
        seen = at < end
        keys = _tile(keys_ptr, at, stride, seen, dim, BLOCK_D).to(DTYPE)
        values = _tile(values_ptr, at, stride, seen, dim, BLOCK_D).to(DTYPE)
        score = tl.full((BLOCK_R,), 1.0, DTYPE)
        if MEMORY:  # all slots are read, since to wait for which are filled takes longer
            seen = tl.load(positions_ptr + at, mask=seen, other=-1) >= 0
            score = _score(tl.load(logits_ptr + at, mask=seen, other=0.0), UNIT)
            values = tl.where(seen[:, None], values, 0.0)
        s = tl.sum(keys * q[None, :], 1)
        s = tl.where(s == -float("inf"), float("nan"), s)
        s = tl.where(seen, s * to_base_2, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # of rows none of which is seen
        p = tl.exp2(s - shift)
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(p, 0)
        out = out * fade + tl.sum((p * score)[:, None] * values, 0)
        top = higher
        if not MEMORY:
            large = _larger(keys, LARGEST, DTYPE) + _larger(values, LARGEST, DTYPE)
            total = tl.where(tl.max(tl.max(large, 1), 0) > 0, float("nan"), total)
    return top, total, out


@triton.jit
def _hand_on(attended_ptr, sums_ptr, row, part, top, total, out, dim, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row (b, unit): the result, or the sums of one of SPLIT parts."""
    channels = tl.arange(0, BLOCK_D)
    odd = tl.where(_finite(total), tl.max(tl.where(_finite(out), 0, 1), 0), 1) > 0
    if SPLIT == 1:
        attended_ptr += row * dim + channels
        made = tl.where(odd, float("nan"), out / total)
        tl.store(attended_ptr, made.to(attended_ptr.dtype.element_ty), mask=channels < dim)
    else:
        row = row * SPLIT + part
        tl.store(attended_ptr + row * dim + channels, out, mask=channels < dim)
        tl.store(sums_ptr + 2 * row, top)
        tl.store(sums_ptr + 2 * row + 1, tl.where(odd, float("nan"), total))


@triton.jit
def _local_head(
    projected_ptr, tables_ptr, length_ptr, start_ptr, keys_ptr, values_ptr, attended_ptr, sums_ptr,
    b, h, part, heads, dim, units, columns, window, width, share, to_base_2,
    SPLIT: tl.constexpr, LARGEST: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """share: keys before the new one of a part."""
    stride = heads * dim
    new = window + _place(length_ptr, start_ptr, b, b >= 0, width)
    held = tl.minimum(tl.load(length_ptr + b), window)
    first = tl.minimum(new - held + part * share, new).to(tl.int32)
    end = tl.minimum(first + share, new.to(tl.int32))
    projected_ptr += b * columns + h * dim
    tables_ptr += b * 4 * dim
    q = _turned(projected_ptr, tables_ptr, tables_ptr + dim, dim, DTYPE, BLOCK_D)
    row = b * (window + width) * stride + h * dim
    channels = tl.arange(0, BLOCK_D)
    top = tl.full((), -float("inf"), DTYPE)
    total = tl.full((), 0.0, DTYPE)
    out = tl.zeros((BLOCK_D,), DTYPE)
    large = _larger(q, LARGEST, DTYPE)
    if part == 0:
        k = _turned(projected_ptr + stride, tables_ptr, tables_ptr + dim, dim, DTYPE, BLOCK_D)
        raw = tl.load(projected_ptr + 2 * stride + channels, mask=channels < dim, other=0.0)
        at = row + new * stride + channels
        tl.store(keys_ptr + at, k.to(keys_ptr.dtype.element_ty), mask=channels < dim)
        tl.store(values_ptr + at, raw, mask=channels < dim)
        out = raw.to(DTYPE)
        top = tl.sum(q * k, 0) * to_base_2
        total = tl.full((), 1.0, DTYPE)
        large += _larger(k, LARGEST, DTYPE) + _larger(out, LARGEST, DTYPE)
    total = tl.where(tl.max(large, 0) > 0, float("nan"), total)
    top, total, out = _over(
        q, keys_ptr + row, values_ptr + row, stride, first, end, keys_ptr, keys_ptr, top, total, out, dim, to_base_2,
        False, False, LARGEST, DTYPE, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    _hand_on(attended_ptr, sums_ptr, b * units + h, part, top, total, out, dim, SPLIT, BLOCK_D)


@triton.jit
def _expert_head(
    projected_ptr, tables_ptr, length_ptr, start_ptr, q_logits_ptr, threshold_ptr, logits_ptr, positions_ptr,
    keys_ptr, values_ptr, null_ptr, attended_ptr, sums_ptr, kinds_ptr, scores_ptr,
    b, e, h, part, experts, heads, dim, units, columns, first_unit, slots, width, capacity, share, to_base_2,
    ROTARY: tl.constexpr, UNIT: tl.constexpr, EVERYBODY: tl.constexpr, SPLIT: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """share: slots of a part."""
    row = b * experts + e
    place = _place(length_ptr, start_ptr, b, b >= 0, width).to(tl.int32)
    later = tl.load(start_ptr + b) > 0
    q_logits_ptr += row * width
    own = tl.load(q_logits_ptr + place)
    taken = later.to(tl.int32)
    if not EVERYBODY:
        threshold = tl.load(threshold_ptr + row)
        count = tl.zeros((BLOCK_W,), tl.int32)
        for begin in range(0, place + 1, BLOCK_W):
            at = begin + tl.arange(0, BLOCK_W)
            logits = tl.load(q_logits_ptr + at, mask=at <= place, other=float("nan"))  # which reaches nothing
            count += (logits >= threshold).to(tl.int32)
        taken = tl.where(own >= threshold, taken, 0)
        taken = tl.where(tl.sum(count, 0) <= capacity, taken, 0)
    if part + h == 0:
        nobody = tl.where(tl.load(length_ptr + b) >= width, 2, 0)
        tl.store(kinds_ptr + row, tl.where(taken > 0, 1, nobody))
        tl.store(scores_ptr + row, _score(own, UNIT))
    if taken > 0:
        channels = tl.arange(0, BLOCK_D)
        projected_ptr += b * columns + (first_unit + e * heads + h) * dim
        if ROTARY:
            tables_ptr += b * 4 * dim + 2 * dim
            q = _turned(projected_ptr, tables_ptr, tables_ptr + dim, dim, DTYPE, BLOCK_D)
        else:
            q = tl.load(projected_ptr + channels, mask=channels < dim, other=0.0).to(DTYPE)
        top = tl.full((), -float("inf"), DTYPE)
        total = tl.full((), 0.0, DTYPE)
        out = tl.zeros((BLOCK_D,), DTYPE)
        if part == 0:
            null = null_ptr + (e * heads + h) * dim + channels
            top = tl.sum(q * tl.load(null, mask=channels < dim, other=0.0).to(DTYPE), 0) * to_base_2
            total = tl.where(_finite(top), 1.0, float("nan")).to(DTYPE)
            out = tl.load(null + experts.to(tl.int64) * heads * dim, mask=channels < dim, other=0.0).to(DTYPE)
        stride = heads * dim
        memory = row * slots
        first = part * share
        end = tl.minimum(first + share, slots)
        top, total, out = _over(
            q, keys_ptr + memory * stride + h * dim, values_ptr + memory * stride + h * dim, stride, first, end,
            logits_ptr + memory, positions_ptr + memory, top, total, out, dim, to_base_2,
            True, UNIT, 0.0, DTYPE, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        unit = b * units + first_unit + e * heads + h
        _hand_on(attended_ptr, sums_ptr, unit, part, top, total, out, dim, SPLIT, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        "batch", "local_heads", "experts", "heads", "window", "slots", "width", "capacity", "local_share", "share",
        "scale_bits",
    ]
)  # fmt: skip
def _step_attention_kernel(
    projected_ptr, tables_ptr, length_ptr, start_ptr, local_keys_ptr, local_values_ptr, q_logits_ptr, threshold_ptr,
    logits_ptr, positions_ptr, keys_ptr, values_ptr, null_ptr, attended_ptr, sums_ptr, kinds_ptr, scores_ptr,
    batch, local_heads, experts, heads, dim, window, slots, width, capacity, local_share, share, scale_bits,
    ROTARY: tl.constexpr, UNIT: tl.constexpr, EVERYBODY: tl.constexpr, SPLIT: tl.constexpr, LARGEST: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    part = program % SPLIT
    unit = program // SPLIT
    units = local_heads + experts * heads
    columns = (3 * local_heads + experts * heads) * dim
    to_base_2 = (from_bits(scale_bits) * LOG2_E).to(DTYPE)
    if unit < batch * local_heads:
        b = (unit // local_heads).to(tl.int64)
        _local_head(
            projected_ptr, tables_ptr, length_ptr, start_ptr, local_keys_ptr, local_values_ptr, attended_ptr, sums_ptr,
            b, unit % local_heads, part, local_heads, dim, units, columns, window, width, local_share, to_base_2,
            SPLIT, LARGEST, DTYPE, BLOCK_R, BLOCK_D,
        )  # fmt: skip
    else:
        unit -= batch * local_heads
        b = (unit // heads // experts).to(tl.int64)
        # The queries of the experts lie behind three rows of each local head, what comes of them behind one.
        _expert_head(
            projected_ptr + 2 * local_heads * dim, tables_ptr, length_ptr, start_ptr, q_logits_ptr, threshold_ptr,
            logits_ptr, positions_ptr, keys_ptr, values_ptr, null_ptr, attended_ptr, sums_ptr, kinds_ptr, scores_ptr,
            b, unit // heads % experts, unit % heads, part, experts, heads, dim, units, columns, local_heads, slots,
            width, capacity, share, to_base_2,
            ROTARY, UNIT, EVERYBODY, SPLIT, DTYPE, BLOCK_R, BLOCK_D, BLOCK_W,
        )  # fmt: skip


class Held(NamedTuple):
    """Of a static cache, contiguous; local keys and values are changed. Shapes as of `reference.autoregressive_cache`.

    threshold may be of any value where everybody is routed.
    """

    length: Tensor
    start: Tensor
    local_keys: Tensor
    local_values: Tensor
    tail_q_logits: Tensor
    threshold: Tensor
    logits: Tensor
    positions: Tensor
    keys: Tensor
    values: Tensor


class Attended(NamedTuple):
    """results: (B, h + H E, d) of local heads, then of the heads of every expert, in x's dtype; or sums of SPLIT parts
    of each in at least float32, with their maxima and totals (B, h + H E, SPLIT, 2).

    kinds (B, E) int32: what an expert adds to the token, 0 nothing, 1 its output, 2 its null token. scores (B, E): of
    its output.
    """

    results: Tensor
    sums: Tensor | None
    kinds: Tensor
    scores: Tensor


def step_attention(
    projected: Tensor,
    tables: Tensor,
    held: Held,
    null_kv: Tensor,
    capacity: int | None,
    rotary: bool,
    unit_scores: bool,
    largest: float,
    parts: int | None = None,
) -> Attended:
    """See `Attended`. projected: as `step_products` returns it; tables: as `step_tokens`; null_kv (2, E, H, 1, d).

    capacity: C, None where everybody is routed. rotary: the experts' queries are rotated. unit_scores: scores are 1, or
    NaN. largest: of `ops.finite`. parts: programs of a head, of one item alone; None: as many as fill a GPU.
    """
    batch, experts, slots, heads, dim = held.keys.shape
    near, local_heads, width = held.local_keys.shape[1], held.local_keys.shape[2], held.tail_q_logits.shape[2]
    dtype, units, window = wide(projected.dtype), local_heads + experts * heads, near - width
    block_d = next_power_of_2(dim)
    block_r = max(min(32768 // dtype.itemsize // block_d, 128), 1)  # 32 numbers of each of 256 threads, or half as many
    if parts is None:  # none of which is empty; of more items `step_output` has no place to add up
        parts = min(128 // units, cdiv(max(window, slots), block_r), MOST_PARTS) if batch == 1 else 1
    split = 1 << (max(parts, 1).bit_length() - 1)
    shape = (batch, units, dim) if split == 1 else (batch, units, split, dim)
    results = torch.empty(shape, dtype=projected.dtype if split == 1 else dtype, device=projected.device)
    sums = None if split == 1 else torch.empty(batch, units, split, 2, dtype=dtype, device=projected.device)
    kinds = torch.empty(batch, experts, dtype=torch.int32, device=projected.device)
    scores = torch.empty(batch, experts, dtype=dtype, device=projected.device)
    launch(
        _step_attention_kernel, (batch * units * split,),
        projected, tables, *held, null_kv.contiguous(), results, sums, kinds, scores,
        batch, local_heads, experts, heads, dim, window, slots, width, 0 if capacity is None else capacity,
        cdiv(window, split), cdiv(slots, split), double_bits(dim**-0.5),
        ROTARY=rotary, UNIT=unit_scores, EVERYBODY=capacity is None, SPLIT=split, LARGEST=largest,
        DTYPE=arithmetic(dtype), BLOCK_R=block_r, BLOCK_D=block_d, BLOCK_W=min(next_power_of_2(width), 1024),
        num_warps=8,
    )  # fmt: skip
    return Attended(results, sums, kinds, scores)
