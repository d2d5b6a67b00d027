"""Gather of routed tokens with RMSNorm.

Letters: B batch, N tokens, D dimension, E experts, K slots per expert. The norm of a token does not depend on the
expert, so with gradients g of rows, h = sum_e gamma[e] g[e, slot of n] and r = 1 / max(||x||, 1e-12),

    dx = sqrt(D) r (h - x r^2 <x, h>)   (second term absent where ||x|| <= 1e-12; without norm dx = h),
    dgamma[e] = sqrt(D) sum over its slots of g x r
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from optimized.ops.operator import operator
from optimized.ops.rows import add_rows, take_rows


@operator(
    "(Tensor x, Tensor? gamma, Tensor indices, Tensor slots, Tensor inverse, bool triton)"
    " -> (Tensor rows, Tensor norms)",
    wrt="x gamma",
    gradients_of="rows",
    saves="x gamma indices slots inverse norms",
)
class gather_norm:
    """Routed tokens (E, B, K, D) of x (B, N, D), each x / max(||x||, 1e-12) sqrt(D) gamma[e]; masked slots are 0.

    In at least float32, returned in x's dtype. gamma: (E, D, 1), None for no norm. indices, slots (the slot mask):
    (B, E, K). inverse (B, E, N): see `ops.inverse_map`. Also returns the norms of all tokens (B, N), empty without
    gamma.
    """

    def forward(a):  # type: ignore[no-untyped-def]
        group = Taken(a.indices, a.slots, a.inverse, a.gamma)
        norms = _no_norms(a.x) if a.gamma is None else token_norms(a.x, a.triton)
        return gather(a.x, norms, (group,), a.triton)[0], norms

    def fake(a):  # type: ignore[no-untyped-def]
        batch, experts, k = a.indices.shape
        norms = _no_norms(a.x)
        norms = norms if a.gamma is None else norms.new_empty(a.x.shape[:2])
        return a.x.new_empty(experts, batch, k, a.x.shape[-1]), norms

    def backward(a, g, needs):  # type: ignore[no-untyped-def]
        group = Taken(a.indices, a.slots, a.inverse, a.gamma)
        if a.triton:
            return _gradients_by_triton(a, g, needs, group)
        found = {}
        if needs.x:
            found["x"] = input_gradient(a.x, a.norms, (group,), (g.rows,)).to(a.x.dtype).contiguous()
        if needs.gamma:
            found["gamma"] = gamma_gradient(a.x, a.norms, group, g.rows)
        return found


class Taken(NamedTuple):
    """What a group of experts took."""

    indices: Tensor  # (B, E, K) int64
    slots: Tensor  # (B, E, K) bool, the slot mask
    inverse: Tensor  # (B, E, N) int32
    gamma: Tensor | None  # (E, D, 1), None for no norm


def token_norms(x: Tensor, triton: bool) -> Tensor:
    """||x|| (B, N) in at least float32."""
    if triton:
        from optimized.kernels import gather_norm as kernel

        return kernel.token_norms(x)
    return torch.linalg.vector_norm(_wide(x), dim=-1).contiguous()


def gather(x: Tensor, norms: Tensor, groups: tuple[Taken, ...], triton: bool) -> tuple[Tensor, ...]:
    """Rows of one or two groups of as many experts. norms: of all tokens that are taken."""
    if triton:
        from optimized.kernels import gather_norm as kernel

        return kernel.gather_norm(x, norms, tuple([kernel.Taken(t.indices, t.slots, t.gamma) for t in groups]))
    return tuple(_rows(x, norms, group) for group in groups)


def _rows(x: Tensor, norms: Tensor, group: Taken) -> Tensor:
    rows = take_rows(x, group.indices, group.slots)
    if group.gamma is None:
        return rows
    # Divided and multiplied as written: the rounding that `reference` has.
    rows = _wide(rows) / _divisors(norms, group).clamp_min_(1e-12) * _scale(group.gamma, x)
    return rows.masked_fill_(~group.slots.transpose(0, 1)[..., None], 0).to(x.dtype)


def input_gradient(x: Tensor, norms: Tensor, groups: tuple[Taken, ...], gradients: tuple[Tensor, ...]) -> Tensor:
    """dx in at least float32, by PyTorch, from gradients (E, B, K, D) of the rows. All groups have gamma, or none."""
    parts = [
        add_rows(_wide(g) if group.gamma is None else _wide(g) * _gamma(group.gamma, x), group.inverse)
        for group, g in zip(groups, gradients)
    ]
    h = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
    if groups[0].gamma is None:
        return h
    taken = torch.stack([(group.inverse >= 0).any(1) for group in groups]).any(0)
    # Tokens that nobody took may hold NaN.
    wide = _wide(x).masked_fill(~taken[..., None], 0)
    norms = torch.where(taken, norms, 1)[..., None].to(wide.dtype)
    r = 1 / norms.clamp_min(1e-12)
    slope = torch.where(norms > 1e-12, (wide * h).sum(-1, keepdim=True) * r * r, 0)
    return (h - wide * slope).mul_(r * x.shape[-1] ** 0.5)


def gamma_gradient(x: Tensor, norms: Tensor, group: Taken, gradient: Tensor) -> Tensor:
    """dgamma in gamma's shape and dtype, by PyTorch."""
    assert group.gamma is not None
    # Of a masked slot neither token nor gradient is read: either may be NaN.
    products = _wide(gradient).masked_fill(~group.slots.transpose(0, 1)[..., None], 0)
    products = products * _wide(take_rows(x, group.indices, group.slots))
    r = x.shape[-1] ** 0.5 / _divisors(norms, group).clamp_min_(1e-12)
    return (products * r).sum((1, 2)).to(group.gamma.dtype).view(group.gamma.shape)


def _gradients_by_triton(a, g, needs, group):  # type: ignore[no-untyped-def]
    from optimized.kernels import gather_norm as kernel
    from optimized.kernels.token_gradient import TakenRows, token_gradient

    found, dots = {}, None
    if a.gamma is not None:
        taken = (kernel.Taken(a.indices, a.slots, a.gamma),)
        (found["gamma"],), dots = kernel.slot_gradients(a.x, a.norms, taken, (g.rows,))
    if needs.x:
        rows = (TakenRows(g.rows, a.inverse, a.gamma),)
        found["x"] = token_gradient(a.x, None, a.norms, rows, dots, None)
    return found


def _divisors(norms: Tensor, group: Taken) -> Tensor:
    """Norms (E, B, K, 1) of the tokens in the slots, 1 in masked ones."""
    flat = norms.gather(1, group.indices.flatten(1)).view(group.indices.shape)
    return torch.where(group.slots, flat, 1).transpose(0, 1)[..., None]


def _gamma(gamma: Tensor, x: Tensor) -> Tensor:
    return _wide(gamma.to(torch.promote_types(x.dtype, torch.float32))).view(gamma.shape[0], 1, 1, -1)


def _scale(gamma: Tensor, x: Tensor) -> Tensor:
    return _gamma(gamma, x) * x.shape[-1] ** 0.5


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _no_norms(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
