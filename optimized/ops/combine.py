"""Combination: what the experts and local attention have for each token, added up.

Letters: B batch, N tokens, D dimension, E experts, K slots per expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimized.ops.operator import operator
from optimized.ops.rows import add_rows, take_rows


@operator(
    "(Tensor y, Tensor scores, Tensor indices, Tensor slots, Tensor inverse, Tensor? local, Tensor? null, Tensor? mask,"
    " bool average, ScalarType dtype, bool triton) -> Tensor out",
    wrt="y scores local null",
    gradients_of="out",
    saves="y scores indices slots inverse local null mask",
)
class combine:
    """(B, N, D) in `dtype`: the sum over experts of score times y (E, B, K, D) at each token, plus local (B, N, D).

    Summed in at least float32 in the order of the experts. average: divided by the number of terms. null (D numbers)
    where there is none; 0 where mask (B, N) is False. scores, indices, slots (the slot mask): (B, E, K); inverse
    (B, E, N): see `ops.inverse_map`. Rows of y in masked slots are not read.
    """

    def forward(a):  # type: ignore[no-untyped-def]
        if a.triton:
            from optimized.kernels import combine as kernel

            return kernel.combine(a.y, a.scores, a.inverse, a.local, a.null, a.mask, a.average, a.dtype)
        wide = _wide(a)
        out = add_rows(a.y.to(wide) * _by_slot(a.scores).to(wide), a.inverse)
        count = _count(a)
        if a.local is not None:
            out += a.local
        if a.average:
            out /= count.clamp_min(1)
        if a.null is not None:
            out = torch.where(count == 0, a.null.to(wide).view(-1), out)
        if a.mask is not None:
            out.masked_fill_(~a.mask[..., None], 0)
        return out.to(a.dtype)

    def fake(a):  # type: ignore[no-untyped-def]
        return a.y.new_empty(a.y.shape[1], a.inverse.shape[-1], a.y.shape[-1], dtype=a.dtype)

    def backward(a, g, needs):  # type: ignore[no-untyped-def]
        if a.triton:
            from optimized.kernels import combine as kernel

            given = a.y, a.scores, (a.indices, a.slots, a.inverse), a.local, a.null if needs.null else None, a.mask
            asked = needs.y or needs.scores, needs.local or needs.null
            found = kernel.combine_backward(g.out, *given, a.average, asked)
            return dict(zip(("y", "scores", "local", "null"), found))
        return _gradients(a, g.out, needs)


def _gradients(a, g, needs):  # type: ignore[no-untyped-def]
    found, wide, count = {}, _wide(a), _count(a)
    g = g.to(wide) if a.mask is None else g.to(wide).masked_fill(~a.mask[..., None], 0)
    if needs.null:
        found["null"] = torch.where(count == 0, g, 0).sum((0, 1)).to(a.null.dtype).view(a.null.shape)
    if a.average:
        g = g / count.clamp_min(1)
    if needs.local:
        found["local"] = g.to(a.local.dtype, copy=True, memory_format=torch.contiguous_format)
    if not (needs.y or needs.scores):
        return found
    slots = a.slots
    if a.mask is not None:
        by_expert = a.mask[:, None].expand(-1, slots.shape[1], -1)
        slots = slots & by_expert.gather(-1, a.indices)
    rows, hidden = take_rows(g, a.indices, slots), ~_by_slot(slots)
    if needs.y:
        # Selected, not multiplied by 0: scores and rows of such slots may be NaN.
        found["y"] = (rows * _by_slot(a.scores).to(wide)).masked_fill_(hidden, 0).to(a.y.dtype).contiguous()
    if needs.scores:
        dots = (rows * a.y.to(wide)).masked_fill_(hidden, 0).sum(-1)
        found["scores"] = dots.transpose(0, 1).to(a.scores.dtype).contiguous()
    return found


def _wide(a) -> torch.dtype:  # type: ignore[no-untyped-def]
    return torch.promote_types(torch.promote_types(a.y.dtype, a.scores.dtype), torch.float32)


def _by_slot(t: Tensor) -> Tensor:
    """(B, E, K) as (E, B, K, 1)."""
    return t.transpose(0, 1)[..., None]


def _count(a) -> Tensor:  # type: ignore[no-untyped-def]
    """Number of terms of each token, (B, N, 1)."""
    routed = (a.inverse >= 0).sum(1)[..., None]
    return routed if a.local is None else routed + 1
