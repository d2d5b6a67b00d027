"""The two solvers of the differentiable top-k, with gradients written by hand.

Letters: B batch, N tokens, E experts, T iterations. The backward needs T scalars and T counts per row, no intermediate
row. triton: run the kernels of `optimized.kernels` instead of PyTorch's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from optimized.ops.registration import differentiable, no_setup, refuse_to


def temperature(t: int, eps: float, eps_init: float, eps_decay: float) -> float:
    return max(eps_init * eps_decay**t, eps)


def _fill(logits: Tensor, mask: Tensor | None) -> Tensor:
    """A masked token at -inf has weight exp(-inf) = 0 in every sum below, so no step needs the mask again.

    Contiguous, and so is all that is computed from it, as the fake kernels promise.
    """
    logits = logits.contiguous()
    return logits if mask is None else logits.masked_fill(~mask[:, None], -math.inf)


@custom_op(
    "moa::coordinate_descent",
    mutates_args=(),
    schema="(Tensor logits, Tensor? mask, float k, int n_iters, float eps, float eps_init, float eps_decay,"
    " bool triton=False) -> (Tensor, Tensor, Tensor)",
)
def coordinate_descent(
    logits: Tensor,
    mask: Tensor | None,
    k: float,
    n_iters: int,
    eps: float,
    eps_init: float,
    eps_decay: float,
    triton: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft scores (B, E, N) of mass about k, the iterates a (T, B, E), and the counts (T, B, E).

    One scalar per row and step: a_t = eps_t (log k - logsumexp(u_t / eps_t)), u_0 = 0 and u_t = min(s, -a_{t-1}).
    counts[t] = #{s >= -a_{t-1}}.
    """
    if triton:
        from optimized.kernels import coordinate_descent as kernel

        return kernel.coordinate_descent(logits, mask, k, n_iters, eps, eps_init, eps_decay)
    s = _fill(logits, mask)
    a = logits.new_empty(n_iters, *logits.shape[:2])
    counts = torch.zeros_like(a)
    u = _fill(torch.zeros_like(s), mask)
    for t in range(n_iters):
        if t > 0:
            bound = -a[t - 1, ..., None]
            counts[t] = (s >= bound).sum(-1)
            u = torch.minimum(s, bound)
        eps_t = temperature(t, eps, eps_init, eps_decay)
        lse = (u / eps_t).logsumexp(-1)
        # A row without valid tokens: any finite a will do, its weights are exp(-inf).
        a[t] = torch.where(lse == -math.inf, 0.0, eps_t * (math.log(k) - lse))
        if t == 0:
            a[0].masked_fill_(s.isnan().any(-1), math.nan)  # the first step does not look at s
    scores = (s + a[-1, ..., None]).clamp_max(0).div_(temperature(n_iters, eps, eps_init, eps_decay)).exp_()
    if mask is not None:
        scores.masked_fill_(~mask[:, None], 0)  # exp(-inf) = 0 already, but for rows poisoned by a NaN
    return scores, a, counts


@coordinate_descent.register_fake
def _(logits, mask, k, n_iters, eps, eps_init, eps_decay, triton=False):  # type: ignore[no-untyped-def]
    a = logits.new_empty(n_iters, *logits.shape[:2])
    return torch.empty_like(logits, memory_format=torch.contiguous_format), a, torch.empty_like(a)


@custom_op(
    "moa::coordinate_descent_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor logits, Tensor? mask, Tensor scores, Tensor a, Tensor counts, float k, float eps,"
    " float eps_init, float eps_decay, bool triton=False) -> Tensor",
)
def coordinate_descent_backward(
    grad: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    scores: Tensor,
    a: Tensor,
    counts: Tensor,
    k: float,
    eps: float,
    eps_init: float,
    eps_decay: float,
    triton: bool = False,
) -> Tensor:
    """Gradient of the logits. With P_t = exp((u_t + a_t) / eps_t) / k and dA = dL/da:

    ds = g scores / eps_T [s < -a_{T-1}],  dA = sum ds;  for t = T-1 .. 1:  ds -= dA P_t [s < -a_{t-1}],
    dA <- dA counts_t exp((a_t - a_{t-1}) / eps_t) / k. The second line needs no row, so dA costs no reduction.
    """
    if triton:
        from optimized.kernels import coordinate_descent as kernel

        return kernel.coordinate_descent_backward(grad, logits, mask, scores, a, counts, k, eps, eps_init, eps_decay)
    s = _fill(logits, mask)
    n_iters = a.shape[0]
    bound = -a[..., None]
    grad = grad.contiguous()
    if mask is not None:
        grad = grad.masked_fill(~mask[:, None], 0)  # it may be NaN there, and 0 * NaN is NaN
    ds = (grad * scores).div_(temperature(n_iters, eps, eps_init, eps_decay))
    ds.masked_fill_(s >= bound[-1], 0)
    da = ds.sum(-1)
    for t in range(n_iters - 1, 0, -1):
        eps_t = temperature(t, eps, eps_init, eps_decay)
        p = (s - bound[t]).div_(eps_t).exp_().mul_(da[..., None] / k)
        ds -= p.masked_fill_(s >= bound[t - 1], 0)
        da = da * counts[t] * ((a[t] - a[t - 1]) / eps_t).exp() / k
    return ds if mask is None else ds.masked_fill_(~mask[:, None], 0)


@coordinate_descent_backward.register_fake
def _(grad, logits, mask, scores, a, counts, k, eps, eps_init, eps_decay, triton=False):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _descent_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, mask, k, _, *epsilons = inputs
    ctx.save_for_backward(logits, mask, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.constants = (k, *epsilons)


def _descent_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
    logits, mask, scores, a, counts = ctx.saved_tensors
    ds = descend_backward(grad, logits, mask, scores, a, counts, *ctx.constants)
    return ds, *(None,) * 7


@custom_op(
    "moa::capped_simplex",
    mutates_args=(),
    schema="(Tensor logits, Tensor? mask, float k, float eps, bool triton=False) -> (Tensor, Tensor)",
)
def capped_simplex(
    logits: Tensor, mask: Tensor | None, k: float, eps: float, triton: bool = False
) -> tuple[Tensor, Tensor]:
    """min(1, exp((s + a) / eps)) of mass min(k, valid tokens) for the smallest a, and a threshold (B, E).

    Sorted in descending order, j saturated tokens leave a_j = eps (log(k - j) - logsumexp of the rest); the answer is
    the first j whose next token stays below 1. Tokens at or below the threshold are unsaturated.
    """
    if triton:
        from optimized.kernels import capped_simplex as kernel

        return kernel.capped_simplex(logits, mask, k, eps)
    if logits.numel() == 0:
        return torch.empty_like(logits), logits.new_full(logits.shape[:2], -math.inf)
    poisoned = logits.isnan()
    if mask is not None:
        poisoned &= mask[:, None]
    s = _fill(logits.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf), mask)
    n = s.shape[-1]
    ordered = s.sort(dim=-1, descending=True).values
    rest = (ordered.flip(-1) / eps).logcumsumexp(-1).flip(-1)
    left = (k - torch.arange(n, device=s.device, dtype=s.dtype)).clamp_min(0)
    # A later duplicate of the threshold would be cut off from its equals: compare values, not positions.
    stays_below = (ordered + eps * (left.log() - rest) < 0) & (left > 0)
    fits = (s > -math.inf).sum(-1, keepdim=True) <= k
    first = torch.where(stays_below.any(-1, keepdim=True), stays_below.int().argmax(-1, keepdim=True), math.ceil(k))
    threshold = torch.where(fits, -math.inf, ordered.gather(-1, first.clamp_max(n - 1)))
    free = s <= threshold
    remaining = (k - (s > threshold).sum(-1, keepdim=True).to(s.dtype)).clamp_min(0)  # not int - float: float32
    rest = torch.where(free, s / eps, -math.inf).logsumexp(-1, keepdim=True)
    a = torch.where(rest == -math.inf, 0.0, eps * (remaining.log() - rest))
    scores = torch.where(free, ((s + a) / eps).clamp_max(0).exp(), 1.0)
    scores.masked_fill_(poisoned.any(-1, keepdim=True), math.nan)
    if mask is not None:
        scores.masked_fill_(~mask[:, None], 0)
    return scores, threshold.squeeze(-1)


@capped_simplex.register_fake
def _(logits, mask, k, eps, triton=False):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format), logits.new_empty(logits.shape[:2])


@custom_op(
    "moa::capped_simplex_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor logits, Tensor? mask, Tensor scores, Tensor threshold, float eps,"
    " bool triton=False) -> Tensor",
)
def capped_simplex_backward(
    grad: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    scores: Tensor,
    threshold: Tensor,
    eps: float,
    triton: bool = False,
) -> Tensor:
    """Implicit gradient: ds = w (g - <g>_w) / eps over the unsaturated tokens, w their scores; 0 elsewhere.

    Their total mass is fixed, so da = -sum(w ds) / sum(w). The row sum of ds is 0; if nothing is unsaturated so is ds.
    """
    if triton:
        from optimized.kernels import capped_simplex as kernel

        return kernel.capped_simplex_backward(grad, logits, mask, scores, threshold, eps)
    free = _fill(logits, mask) <= threshold[..., None]
    w = torch.where(free, scores, 0)
    if mask is not None:
        grad = grad.masked_fill(~mask[:, None], 0)  # it may be NaN there, and 0 * NaN is NaN
    mean = (w * grad).sum(-1, keepdim=True) / w.sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    ds = w * (grad.contiguous() - mean) / eps
    return ds if mask is None else ds.masked_fill_(~mask[:, None], 0)  # of a row with a NaN the mean is one, too


@capped_simplex_backward.register_fake
def _(grad, logits, mask, scores, threshold, eps, triton=False):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _capped_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, mask, _, *ctx.constants = inputs
    ctx.save_for_backward(logits, mask, *output)
    ctx.mark_non_differentiable(output[1])


def _capped_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    return cap_backward(grad, *ctx.saved_tensors, *ctx.constants), None, None, None, None


descend_backward = differentiable(
    coordinate_descent_backward,
    no_setup,
    refuse_to("moa::coordinate_descent", "double backward"),
    (0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0),
    (0,),
)
cap_backward = differentiable(
    capped_simplex_backward,
    no_setup,
    refuse_to("moa::capped_simplex", "double backward"),
    (0, 0, 0, 0, 0, 0, 0),
    (0,),
)
descend = differentiable(coordinate_descent, _descent_setup, _descent_backward, (0,) * 8, (0, 1, 1))
cap = differentiable(capped_simplex, _capped_setup, _capped_backward, (0,) * 5, (0, 0))
