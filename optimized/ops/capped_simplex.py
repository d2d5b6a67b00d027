"""The exact solver of the differentiable top-k, with its implicit gradient.

Letters: B batch, N tokens, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimized.ops.coordinate_descent import fill_masked
from optimized.ops.operator import operator


@operator(
    "(Tensor logits, Tensor? mask, float k, float eps, bool triton) -> (Tensor scores, Tensor threshold)",
    wrt="logits",
    gradients_of="scores",
    saves="logits mask scores threshold",
    folds={"logits": 0, "mask": 0, "scores": 0, "threshold": 0},
)
class capped_simplex:
    """min(1, exp((s + a) / eps)) of mass min(k, valid tokens) for the smallest a, and a threshold (B, E).

    logits: (B, E, N) float32 or float64; mask: (B, N). Sorted in descending order, j saturated tokens leave
    a_j = eps (log(k - j) - logsumexp of the rest); the answer is the first j whose next token stays below 1. Tokens at
    or below the threshold are unsaturated; it is -inf for a row with a NaN at a valid token.

    Gradient: ds = w (g - <g>_w) / eps over the unsaturated tokens, w their scores; 0 elsewhere. Their total mass is
    fixed, so da = -sum(w ds) / sum(w). The row sum of ds is 0; if nothing is unsaturated so is ds.
    """

    def forward(a):  # type: ignore[no-untyped-def]
        if a.triton:
            from optimized.kernels import capped_simplex as kernel

            return kernel.capped_simplex(a.logits, a.mask, a.k, a.eps)
        return _cap(a.logits, a.mask, a.k, a.eps)

    def fake(a):  # type: ignore[no-untyped-def]
        scores = torch.empty_like(a.logits, memory_format=torch.contiguous_format)
        return scores, a.logits.new_empty(a.logits.shape[:2])

    def backward(a, g, needs):  # type: ignore[no-untyped-def]
        given = g.scores, a.logits, a.mask, a.scores, a.threshold, a.eps
        if a.triton:
            from optimized.kernels import capped_simplex as kernel

            return {"logits": kernel.capped_simplex_backward(*given)}
        return {"logits": _cap_backward(*given)}


def _cap(logits: Tensor, mask: Tensor | None, k: float, eps: float) -> tuple[Tensor, Tensor]:
    if logits.numel() == 0:
        scores = torch.empty_like(logits, memory_format=torch.contiguous_format)
        return scores, logits.new_full(logits.shape[:2], -math.inf)
    poisoned = logits.isnan()
    if mask is not None:
        poisoned &= mask[:, None]
    poisoned = poisoned.any(-1, keepdim=True)
    s = fill_masked(logits.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf), mask)
    n = s.shape[-1]
    ordered = s.sort(dim=-1, descending=True).values
    rest = (ordered.flip(-1) / eps).logcumsumexp(-1).flip(-1)
    left = (k - torch.arange(n, device=s.device, dtype=s.dtype)).clamp_min(0)
    # A later duplicate of the threshold would be cut off from its equals: compare values, not positions.
    stays_below = (ordered + eps * (left.log() - rest) < 0) & (left > 0)
    fits = (s > -math.inf).sum(-1, keepdim=True) <= k
    first = torch.where(stays_below.any(-1, keepdim=True), stays_below.int().argmax(-1, keepdim=True), math.ceil(k))
    threshold = torch.where(fits | poisoned, -math.inf, ordered.gather(-1, first.clamp_max(n - 1)))
    free = s <= threshold
    remaining = (k - (s > threshold).sum(-1, keepdim=True).to(s.dtype)).clamp_min(0)  # not int - float: float32
    rest = torch.where(free, s / eps, -math.inf).logsumexp(-1, keepdim=True)
    a = torch.where(rest == -math.inf, 0.0, eps * (remaining.log() - rest))
    scores = torch.where(free, ((s + a) / eps).clamp_max(0).exp(), 1.0)
    scores.masked_fill_(poisoned, math.nan)
    if mask is not None:
        scores.masked_fill_(~mask[:, None], 0)
    return scores, threshold.squeeze(-1)


def _cap_backward(
    grad: Tensor, logits: Tensor, mask: Tensor | None, scores: Tensor, threshold: Tensor, eps: float
) -> Tensor:
    free = fill_masked(logits, mask) <= threshold[..., None]
    w = torch.where(free, scores, 0)
    if mask is not None:
        grad = grad.masked_fill(~mask[:, None], 0)  # it may be NaN there, and 0 * NaN is NaN
    mean = (w * grad).sum(-1, keepdim=True) / w.sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    ds = w * (grad.contiguous() - mean) / eps
    return ds if mask is None else ds.masked_fill_(~mask[:, None], 0)  # of a row with a NaN the mean is one, too
