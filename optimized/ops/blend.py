"""What local attention, the experts and their null tokens have for each token of a causal layer, added up.

out[n] = local[n] + sum over experts of (score y where routed, null token else), the sum only from position W on, where
the experts have a say; averaged: divided by E + 1 there.
Letters: B batch, N tokens, D dimension, E experts, S slots of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized.ops.operator import operator
from optimized.ops.rows import add_rows, take_rows


@operator(
    "(Tensor y, Tensor scores, Tensor indices, Tensor slots, Tensor inverse, Tensor local, Tensor null, Tensor? begin,"
    " SymInt width, bool average, ScalarType dtype, bool triton) -> Tensor out",
    wrt="y scores local null",
    gradients_of="out",
    saves="y scores indices slots inverse local null begin",
)
class blend:
    """(B, N, D) in `dtype`, summed in at least float32 in the order of the experts.

    Args:
        y: (E, B, S, D). scores: (B, E, S). indices, slots (the slot mask): (B, E, S), of the N tokens. inverse:
            (B, E, N), see `ops.inverse_map`. local: (B, N, D). null: (E, D).
        begin: (B) int64, position of the first token; None for 0. width: W.
    What is not finite of y, and a score that is NaN, are constants: no gradient passes through their products.
    """

    def forward(a: Any) -> Any:
        if a.triton:
            from optimized.kernels import blend as kernel

            return kernel.blend(a.y, a.scores, a.inverse, a.local, a.null, a.begin, a.width, a.average, a.dtype)
        wide = _wide(a)
        later = _later(a)
        out = add_rows(a.y.to(wide) * _by_slot(a.scores).to(wide), a.inverse)
        for e in range(a.null.shape[0]):
            left_out = later & (a.inverse[:, e] < 0)
            out += a.null[e].to(wide) * left_out[..., None]
        out = torch.where(later[..., None], out, 0) + a.local
        if a.average:
            out = out / _terms(a, later)
        return out.to(a.dtype)

    def fake(a: Any) -> Any:
        return a.local.new_empty(a.local.shape, dtype=a.dtype)

    def backward(a: Any, g: Any, needs: Any) -> Any:
        if a.triton:
            return _gradients_by_triton(a, g.out, needs)
        found: dict[str, Tensor] = {}
        wide, later = _wide(a), _later(a)
        dout = g.out.to(wide)
        if a.average:
            dout = dout / _terms(a, later)
        if needs.local:
            found["local"] = dout.to(a.local.dtype, copy=True, memory_format=torch.contiguous_format)
        if needs.null:
            left_out = later[:, None] & (a.inverse < 0)
            parts = [(dout * left_out[:, e, :, None]).sum((0, 1)) for e in range(a.null.shape[0])]
            found["null"] = torch.stack(parts).to(a.null.dtype)
        if not (needs.y or needs.scores):
            return found
        rows = take_rows(dout, a.indices, a.slots) if dout.shape[1] else a.y.new_zeros(a.y.shape, dtype=wide)
        scores = _by_slot(a.scores).to(wide)
        constant = ~a.slots.transpose(0, 1)[..., None] | scores.isnan() | ~a.y.isfinite()
        if needs.y:
            found["y"] = (rows * scores).masked_fill_(constant, 0).to(a.y.dtype).contiguous()
        if needs.scores:
            dots = (rows * a.y.to(wide)).masked_fill_(constant, 0).sum(-1)
            found["scores"] = dots.transpose(0, 1).to(a.scores.dtype).contiguous()
        return found


def _gradients_by_triton(a: Any, g: Tensor, needs: Any) -> dict[str, Tensor | None]:
    from optimized.kernels import blend as kernel

    found: dict[str, Tensor | None] = {}
    if needs.y or needs.scores:
        found["y"], found["scores"] = kernel.blend_slots_backward(g, a.y, a.scores, a.indices, a.slots, a.average)
    if needs.local or needs.null:
        null = a.null if needs.null else None
        found["local"], found["null"] = kernel.blend_tokens_backward(
            g, a.inverse, a.local, null, a.begin, a.width, a.average
        )
    return found


def _wide(a: Any) -> torch.dtype:
    return torch.promote_types(torch.promote_types(a.y.dtype, a.scores.dtype), torch.float32)


def _by_slot(t: Tensor) -> Tensor:
    """(B, E, S) as (E, B, S, 1)."""
    return t.transpose(0, 1)[..., None]


def _later(a: Any) -> Tensor:
    """(B, N): whether a token stands behind the first block."""
    position = torch.arange(a.local.shape[1], device=a.local.device)
    position = position[None] if a.begin is None else a.begin[:, None] + position
    return (position >= a.width).expand(a.local.shape[:2])


def _terms(a: Any, later: Tensor) -> Tensor:
    return later[..., None] * a.null.shape[0] + 1
