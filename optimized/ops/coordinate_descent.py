"""Coordinate descent, the iterative solver of the differentiable top-k, with a gradient written by hand.

Letters: B batch, N tokens, E experts, T iterations. The backward needs T scalars and T counts per row, no intermediate
row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimized.ops.operator import operator


def temperature(t: int, eps: float, eps_init: float, eps_decay: float) -> float:
    return max(eps_init * eps_decay**t, eps)


def fill_masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """A masked token at -inf has weight exp(-inf) = 0 in every sum of a solver, so no step needs the mask again.

    Contiguous, and so is all that is computed from it, as the fakes promise.
    """
    logits = logits.contiguous()
    return logits if mask is None else logits.masked_fill(~mask[:, None], -math.inf)


@operator(
    "(Tensor logits, Tensor? mask, float k, int n_iters, float eps, float eps_init, float eps_decay, bool triton)"
    " -> (Tensor scores, Tensor a, Tensor counts)",
    wrt="logits",
    gradients_of="scores",
    saves="logits mask scores a counts",
    folds={"logits": 0, "mask": 0, "scores": 0, "a": 1, "counts": 1},
)
class coordinate_descent:
    """Soft scores (B, E, N) of mass about k, the iterates a (T, B, E), and the counts (T, B, E).

    logits: (B, E, N) float32 or float64; mask: (B, N). One scalar per row and step:
    a_t = eps_t (log k - logsumexp(u_t / eps_t)), u_0 = 0 and u_t = min(s, -a_{t-1}). counts[t] = #{s >= -a_{t-1}}.

    Gradient. With P_t = exp((u_t + a_t) / eps_t) / k and dA = dL/da:
    ds = g scores / eps_T [s < -a_{T-1}],  dA = sum ds;  for t = T-1 .. 1:  ds -= dA P_t [s < -a_{t-1}],
    dA <- dA counts_t exp((a_t - a_{t-1}) / eps_t) / k. The second line needs no row, so dA costs no reduction.
    """

    def forward(a):  # type: ignore[no-untyped-def]
        if a.triton:
            from optimized.kernels import coordinate_descent as kernel

            return kernel.coordinate_descent(a.logits, a.mask, a.k, a.n_iters, a.eps, a.eps_init, a.eps_decay)
        return _descend(a.logits, a.mask, a.k, a.n_iters, (a.eps, a.eps_init, a.eps_decay))

    def fake(a):  # type: ignore[no-untyped-def]
        iterates = a.logits.new_empty(a.n_iters, *a.logits.shape[:2])
        scores = torch.empty_like(a.logits, memory_format=torch.contiguous_format)
        return scores, iterates, torch.empty_like(iterates)

    def backward(a, g, needs):  # type: ignore[no-untyped-def]
        solved, epsilons = (a.scores, a.a, a.counts), (a.eps, a.eps_init, a.eps_decay)
        if a.triton:
            from optimized.kernels import coordinate_descent as kernel

            given = g.scores, a.logits, a.mask
            return {"logits": kernel.coordinate_descent_backward(*given, *solved, a.k, *epsilons)}
        return {"logits": _descend_backward(g.scores, a.logits, a.mask, *solved, a.k, epsilons)}


def _descend(
    logits: Tensor, mask: Tensor | None, k: float, n_iters: int, epsilons: tuple[float, float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    s = fill_masked(logits, mask)
    a = logits.new_empty(n_iters, *logits.shape[:2])
    counts = torch.zeros_like(a)
    u = fill_masked(torch.zeros_like(s), mask)
    for t in range(n_iters):
        if t > 0:
            bound = -a[t - 1, ..., None]
            counts[t] = (s >= bound).sum(-1)
            u = torch.minimum(s, bound)
        eps_t = temperature(t, *epsilons)
        lse = (u / eps_t).logsumexp(-1)
        # A row without valid tokens: any finite a will do, its weights are exp(-inf).
        a[t] = torch.where(lse == -math.inf, 0.0, eps_t * (math.log(k) - lse))
        if t == 0:
            a[0].masked_fill_(s.isnan().any(-1), math.nan)  # the first step does not look at s
    scores = (s + a[-1, ..., None]).clamp_max(0).div_(temperature(n_iters, *epsilons)).exp_()
    if mask is not None:
        scores.masked_fill_(~mask[:, None], 0)  # exp(-inf) = 0 already, but for rows poisoned by a NaN
    return scores, a, counts


def _descend_backward(
    grad: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    scores: Tensor,
    a: Tensor,
    counts: Tensor,
    k: float,
    epsilons: tuple[float, float, float],
) -> Tensor:
    s = fill_masked(logits, mask)
    n_iters = a.shape[0]
    bound = -a[..., None]
    grad = grad.contiguous()
    if mask is not None:
        grad = grad.masked_fill(~mask[:, None], 0)  # it may be NaN there, and 0 * NaN is NaN
    ds = (grad * scores).div_(temperature(n_iters, *epsilons))
    ds.masked_fill_(s >= bound[-1], 0)
    da = ds.sum(-1)
    for t in range(n_iters - 1, 0, -1):
        eps_t = temperature(t, *epsilons)
        p = (s - bound[t]).div_(eps_t).exp_().mul_(da[..., None] / k)
        ds -= p.masked_fill_(s >= bound[t - 1], 0)
        # The factor is the share of the mass that is saturated. Where nothing is, a may rise by many eps_t: 0 * inf.
        share = counts[t] * ((a[t] - a[t - 1]) / eps_t).exp() / k
        da = da * torch.where(counts[t] > 0, share, 0)
    return ds if mask is None else ds.masked_fill_(~mask[:, None], 0)
