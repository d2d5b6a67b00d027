"""The causal layers that are trained: the strict one of either package, and the same with selections that look ahead.

Both controls differ from the strict layer in whom they pick, and in nothing else: what a query sees, and all that
autograd can tell, stays causal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

import optimized
import reference
from reference import autoregressive
from reference.autoregressive import Laid, Memory
from reference.autoregressive_cache import Cache
from reference.autoregressive_contract import AutoregressiveConfig


class _Patched(reference.MixtureOfAutoregressiveAttention):
    """The strict layer, computed with other functions of its module in place of those named."""

    in_place_of: ClassVar[dict[str, Callable[..., Any]]]

    def forward(self, *args: Any, **named: Any) -> Any:
        with mock.patch.multiple(autoregressive, **self.in_place_of):
            return super().forward(*args, **named)


def _rows(laid: Laid, c: AutoregressiveConfig) -> Tensor:
    """Query logits (B, E, J, W), -inf where there is no token."""
    logits = laid.q_logits.detach().masked_fill(~laid.there[:, None], -torch.inf)
    return logits.unflatten(-1, (-1, c.routed_window_size))


def _of_its_own_window(laid: Laid, past: Cache, c: AutoregressiveConfig) -> tuple[Tensor, Tensor]:
    rows = _rows(laid, c)
    threshold = rows.topk(min(c.num_routed_queries, rows.shape[-1]), -1).values[..., -1]
    return threshold, torch.zeros_like(threshold)


class WindowTopK(_Patched):
    """Queries of a block are the best of that block, as in mixture-of-attention 0.0.25."""

    in_place_of: ClassVar = {"thresholds_of": _of_its_own_window}


def _of_the_sequence(laid: Laid, past: Cache, c: AutoregressiveConfig) -> tuple[Tensor, Tensor]:
    rows = _rows(laid, c)
    every = rows.flatten(2)
    best = every.topk(min(c.num_routed_queries * rows.shape[2], every.shape[-1]), -1).values[..., -1:]
    return best.expand(rows.shape[:3]), torch.zeros_like(rows[..., 0])


def _of_the_best_in_all(laid: Laid, past: Cache, c: AutoregressiveConfig) -> Memory:
    """The K best of the whole sequence, of which a block sees those before it."""
    logits, width, slots = laid.kv_logits.detach(), c.routed_window_size, c.num_routed_key_values
    batch, experts, length = logits.shape
    best = logits.masked_fill(~laid.there[:, None], -torch.inf).topk(min(slots, length), -1).indices.sort(-1).values
    blocks = torch.arange(length // width, device=logits.device)
    mask = best[:, :, None] < width * blocks[:, None]
    places = (slots + best)[:, :, None].expand(-1, -1, len(blocks), -1)
    at = torch.where(mask, best[:, :, None], -1)
    return Memory(places, mask, at, torch.zeros(batch, experts, len(blocks), dtype=torch.bool, device=logits.device))


class SequenceTopK(_Patched):
    """Queries, keys and values are the best of the whole sequence, masked afterwards, as in MoSA."""

    in_place_of: ClassVar = {"thresholds_of": _of_the_sequence, "remember": _of_the_best_in_all}


OPTIMIZED = "strict, optimized"
STRICT = ("strict", OPTIMIZED)
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "strict": reference.MixtureOfAutoregressiveAttention,
    OPTIMIZED: optimized.MixtureOfAutoregressiveAttention,
    "window top-k": WindowTopK,
    "sequence top-k": SequenceTopK,
}
