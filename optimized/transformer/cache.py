"""What a decoder remembers of a sequence: values that no call changes.

A mixture layer has the layer's own cache. Letters: B batch, L columns (tokens that were passed, masked ones included),
H heads, d head dimension, w window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Integer
from torch import Tensor

from optimized.autoregressive_cache import take
from reference import contract


@dataclass(frozen=True, eq=False)
class DenseCache:
    """It grows by a column with every token that is passed."""

    keys: Float[Tensor, "B H L d"]  # rotated
    values: Float[Tensor, "B H L d"]

    def select(self, index: Tensor) -> DenseCache:
        return DenseCache(self.keys.index_select(0, index), self.values.index_select(0, index))


@dataclass(frozen=True, eq=False)
class LocalCache:
    """The last w tokens of every item, under the names that causal local attention reads of a mixture's cache."""

    length: Int64[Tensor, " B"]  # valid tokens so far
    local_keys: Float[Tensor, "B w H d"]  # of positions length - w and on, rotated
    local_values: Float[Tensor, "B w H d"]

    @property
    def start(self) -> Int64[Tensor, " B"]:
        """Position after those that are held: no block is unfinished here."""
        return self.length

    @staticmethod
    def empty(x: Tensor, window: int, heads: int, dim_head: int) -> LocalCache:
        nothing = x.new_zeros(x.shape[0], window, heads, dim_head)
        return LocalCache(x.new_zeros(x.shape[0], dtype=torch.int64), nothing, nothing)

    def after(self, keys: Float[Tensor, "B w+N H d"], values: Float[Tensor, "B w+N H d"], count: Tensor) -> LocalCache:
        """With `count` (B) more valid tokens. keys, values: those held, then of the call, valid ones first."""
        window = self.local_keys.shape[1]
        rows = count[:, None] + torch.arange(window, device=keys.device)
        return LocalCache(self.length + count, take(keys, rows), take(values, rows))

    def select(self, index: Tensor) -> LocalCache:
        return LocalCache(*(t.index_select(0, index) for t in (self.length, self.local_keys, self.local_values)))


class DecoderCache:
    """Of a whole decoder. No dataclass: in those FSDP casts all tensors, as in `attentions.Call`.

    Args:
        length: (B) int64, valid tokens so far. there: (B, L), which columns of dense layers hold a token; None: all.
        passed: L. layers: of each a DenseCache, LocalCache, or the cache of a mixture.
    """

    def __init__(
        self,
        length: Int64[Tensor, " B"],
        there: Bool[Tensor, "B L"] | None,
        passed: int,
        layers: tuple[Any, ...],
    ) -> None:
        self.length, self.there, self.passed, self.layers = length, there, passed, layers

    def kinds(self) -> tuple[str, ...]:
        """Of the layers, as `TransformerConfig` names them."""
        names = {DenseCache: "dense", LocalCache: "local"}
        return tuple(names.get(type(layer), "mixture") for layer in self.layers)

    def select(self, index: Integer[Tensor, " B2"]) -> DecoderCache:
        """Of these batch items, in this order: some repeated, or left out. Raises TypeError or ValueError."""
        contract.tensor("index", index, "B2", dtypes=(torch.int64, torch.int32), beside=self.length)
        there = None if self.there is None else self.there.index_select(0, index)
        layers = tuple(layer.select(index) for layer in self.layers)
        return DecoderCache(self.length.index_select(0, index), there, self.passed, layers)
