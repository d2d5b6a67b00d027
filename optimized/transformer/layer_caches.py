"""What a dense and a local layer remember of a sequence: as values that no call changes, and in buffers for `step`.

Letters: B batch, L columns (tokens that were passed, masked ones included), S columns of a buffer, H heads, d head
dimension, w window, W tokens after which a buffer of local attention is moved up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from optimized.autoregressive_cache import NearBuffers, take
from optimized.autoregressive_layout import Order


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


class DenseBuffers:
    """Keys and values (B, H, S, d) of the token of position p in column p; 0 where none is yet.

    length: (B), that of the decoder's cache, which advances it.
    """

    def __init__(self, cache: DenseCache, length: Int64[Tensor, " B"], columns: int) -> None:
        batch, heads, _, dim_head = cache.keys.shape
        self.length = length
        self.keys, self.values = (t.new_zeros(batch, heads, columns, dim_head) for t in (cache.keys, cache.values))

    def append(
        self, keys: Float[Tensor, "B H 1 d"], values: Float[Tensor, "B H 1 d"]
    ) -> tuple[Float[Tensor, "B H S d"], Float[Tensor, "B H S d"]]:
        """Those of the next token of every item. Returns all, in their dtype."""
        at = self.length.clamp_max(self.keys.shape[2] - 1)[:, None, None, None].expand_as(keys)
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer.scatter_(2, at, new.to(buffer.dtype))
        return self.keys.to(keys.dtype), self.values.to(values.dtype)

    def put(self, cache: DenseCache, there: Bool[Tensor, "B L"] | None) -> None:
        """there: which columns hold a token; None: all."""
        for buffer, given in ((self.keys, cache.keys), (self.values, cache.values)):
            if there is not None:
                order = Order.of(there)
                at = order.indices[:, None, :, None].expand_as(given)
                given = given.gather(2, at).masked_fill(~order.here[:, None, :, None], 0)
            buffer[:, :, : given.shape[2]] = given
            buffer[:, :, given.shape[2] :] = 0  # a NaN in a hidden column would be seen, times 0

    def value(self, columns: int) -> DenseCache:
        return DenseCache(self.keys[:, :, :columns].clone(), self.values[:, :, :columns].clone())


class LocalBuffers(NearBuffers):
    """The last tokens of every item, at least w of them. length, start: of the decoder's cache, which advances them."""

    def __init__(self, cache: LocalCache, length: Int64[Tensor, " B"], start: Int64[Tensor, " B"], block: int) -> None:
        self.length, self.start, self._window = length, start, cache.local_keys.shape[1]
        behind = (0, 0, 0, 0, 0, block)
        self.local_keys, self.local_values = (F.pad(t.detach(), behind) for t in (cache.local_keys, cache.local_values))

    @property
    def window(self) -> int:
        return self._window

    def put(self, cache: LocalCache) -> None:
        """Of which the decoder's start is the length."""
        self.local_keys[:, : self.window] = cache.local_keys
        self.local_values[:, : self.window] = cache.local_values

    def value(self) -> LocalCache:
        rows = (self.length - self.start)[:, None] + torch.arange(self.window, device=self.length.device)
        return LocalCache(self.length.clone(), take(self.local_keys, rows), take(self.local_values, rows))

    def move_up(self) -> None:
        """The last w tokens to the front, before the decoder's start becomes the length."""
        self.put(self.value())
