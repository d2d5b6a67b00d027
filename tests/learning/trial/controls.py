"""Layers that are told what ours must find out, or see what it must not: the optimized layer with one part replaced."""

from __future__ import annotations

from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

import optimized
from optimized import autoregressive, autoregressive_routing, ops


class _Patched(optimized.MixtureOfAutoregressiveAttention):
    """The strict layer, computed with another function of a module."""

    module: ClassVar[Any]
    in_place_of: ClassVar[dict[str, Any]]

    def forward(self, *args: Any, **named: Any) -> Any:
        with mock.patch.multiple(self.module, None, **self.in_place_of):
            return super().forward(*args, **named)


remember = autoregressive.remember


def _anybody(places: Any, *given: Any) -> Any:
    """The best by logits that nobody learns: drawn anew in every call, one for each token and expert."""
    return remember(places._replace(kv_logits=torch.rand_like(places.kv_logits)), *given)


class RandomMemory(_Patched):
    """Experts remember tokens of the blocks before at random."""

    module: ClassVar[Any] = autoregressive
    in_place_of: ClassVar[dict[str, Any]] = {"remember": _anybody}


def of_its_own_block(
    logits: Tensor, valid: Tensor | None, first: Tensor | None, kq: int, capacity: int, block: int, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.candidates`, but the threshold of a block is the kq-th largest logit of that block."""
    rows = logits.unflatten(-1, (-1, block))
    there = torch.ones_like(rows, dtype=torch.bool) if valid is None else valid[:, None].unflatten(-1, (-1, block))
    worth = rows.masked_fill(~(there & ~rows.isnan()), -torch.inf)
    thresholds = worth.topk(min(kq, block), -1).values[..., -1]
    candidate = (worth > -torch.inf) & (worth >= thresholds[..., None])
    candidate[:, :, 0] = False  # nothing is remembered before the first block
    slot, skipped = candidate.cumsum(-1) - 1, 1 if first is None else 0
    taken = candidate & (slot < capacity)
    columns = torch.arange(logits.shape[-1], device=logits.device).view(-1, block).expand_as(slot)
    indices = slot.new_zeros(*rows.shape[:3], capacity + 1)  # tokens without a slot write to one past the end
    indices = indices.scatter_(-1, torch.where(taken, slot, capacity), columns)[:, :, skipped:, :capacity]
    counts = taken.sum(-1, dtype=torch.int32)[:, :, skipped:].contiguous()
    slots = torch.arange(capacity, device=rows.device) < counts[..., None]
    starts = capacity * (torch.arange(rows.shape[2], device=rows.device) - skipped)[:, None]
    inverse = torch.where(taken, starts + slot, -1).int().flatten(2)
    return torch.where(slots, indices, 0), slots, inverse, thresholds, counts


class _Ops:
    """`ops`, but for the queries."""

    candidates = staticmethod(of_its_own_block)

    def __getattr__(self, name: str) -> Any:
        return getattr(ops, name)


class WindowTopK(_Patched):
    """Queries of a block are the best of that block, as in mixture-of-attention 0.0.25: a token learns of those behind
    it by whether it is one. See `tests.noise`."""

    module: ClassVar[Any] = autoregressive_routing
    in_place_of: ClassVar[dict[str, Any]] = {"ops": _Ops()}
