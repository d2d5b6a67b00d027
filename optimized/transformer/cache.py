"""What a decoder remembers of a sequence: a value that no call changes, or buffers that steps change in place.

A mixture layer has the layer's own cache. Letters: B batch, L columns (tokens that were passed, masked ones included).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int64, Integer
from torch import Tensor

from optimized.autoregressive_cache import Cache, StaticCache
from optimized.transformer.layer_caches import DenseBuffers, DenseCache, LocalBuffers, LocalCache
from reference import contract

_NAMES = {DenseCache: "dense", DenseBuffers: "dense", LocalCache: "local", LocalBuffers: "local"}


class _OfLayers:
    """layers: of each its cache."""

    length: Int64[Tensor, " B"]
    layers: tuple[Any, ...]

    def kinds(self) -> tuple[str, ...]:
        """Of the layers, as `TransformerConfig` names them."""
        return tuple(_NAMES.get(type(layer), "mixture") for layer in self.layers)

    def require(self, argument: str, batch: int, kinds: tuple[str, ...], device: torch.device) -> None:
        """Raises ValueError naming the argument that it is."""
        for name, expected, given in (
            ("batch", batch, self.length.shape[0]),
            ("layers", kinds, self.kinds()),
            ("device", device, self.length.device),
        ):
            if expected != given:
                contract.reject(argument, f"one for {name} {expected}", f"one for {given}")


class DecoderCache(_OfLayers):
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

    def select(self, index: Integer[Tensor, " B2"]) -> DecoderCache:
        """Of these batch items, in this order: some repeated, or left out. Raises TypeError or ValueError."""
        contract.tensor("index", index, "B2", dtypes=(torch.int64, torch.int32), beside=self.length)
        there = None if self.there is None else self.there.index_select(0, index)
        layers = tuple(layer.select(index) for layer in self.layers)
        return DecoderCache(self.length.index_select(0, index), there, self.passed, layers)

    def static(self, room: int) -> StaticDecoderCache:
        """A copy in buffers of its own, without gradient, for `room` calls of `Decoder.step`.

        Raises TypeError or ValueError, also for a cache of layers of the package `reference`.
        """
        contract.positive_int("room", room)
        for i, (kind, layer) in enumerate(zip(self.kinds(), self.layers)):
            if kind == "mixture" and not isinstance(layer, Cache):
                contract.reject(f"layers[{i}]", "a Cache of the package optimized", f"one of {type(layer).__module__}")
        return StaticDecoderCache(self, room)


class StaticDecoderCache(_OfLayers):
    """A `DecoderCache` whose tensors stay where they are and are changed in place, as a CUDA graph wants them.

    It is made by `DecoderCache.static` and has room for as many steps as was said there: what dense layers hold, and
    the angles of experts that rotate, are of that many tokens more. `left` counts on the host how many steps there is
    still room for; a replay of a recorded step is not counted.
    """

    def __init__(self, cache: DecoderCache, room: int) -> None:
        self.length, self.start = cache.length.clone(), cache.length.clone()
        self.passed, self.columns = cache.passed, cache.passed + room
        mixtures = [layer for layer in cache.layers if isinstance(layer, Cache)]
        near = [layer for layer in cache.layers if isinstance(layer, LocalCache)]
        # Buffers of local layers are moved up where a mixture begins a block, which is often enough for them too.
        self.block = mixtures[0].tail.shape[1] if mixtures else near[0].local_keys.shape[1] if near else None
        self.layers = tuple(self._buffers(layer) for layer in cache.layers)
        self.put(cache)

    def _buffers(self, layer: Any) -> DenseBuffers | LocalBuffers | StaticCache:
        if isinstance(layer, DenseCache):
            return DenseBuffers(layer, self.length, self.columns)
        if isinstance(layer, LocalCache):
            assert self.block is not None
            return LocalBuffers(layer, self.length, self.start, self.block)
        return layer.static()

    def due(self) -> Bool[Tensor, " B"]:
        """Which items begin a block with their next token, for which a step has to be one with border=True."""
        filled = self.filled()
        return torch.zeros_like(filled, dtype=torch.bool) if self.block is None else filled >= self.block

    def filled(self) -> Int64[Tensor, " B"]:
        """Tokens in the unfinished block of every item: of mixture layers, or without any since a border of all."""
        mixtures = [layer for layer in self.layers if isinstance(layer, StaticCache)]
        of = mixtures[0] if mixtures else self
        return of.length - of.start

    def value(self) -> DecoderCache:
        """What it holds now, of which later steps change nothing. The host waits for the device, to know the lengths.

        To be continued as a value, or selected from and made static again.
        """
        lengths = self.length.tolist()
        columns = max(self.passed, *lengths)
        there = None
        if min(lengths) < columns:
            there = torch.arange(columns, device=self.length.device) < self.length[:, None]
        layers = (layer.value(columns) if isinstance(layer, DenseBuffers) else layer.value() for layer in self.layers)
        return DecoderCache(self.length.clone(), there, columns, tuple(layers))

    @torch.no_grad()
    def put(self, other: DecoderCache) -> None:
        """Another cache of the same model and batch into these buffers, of as many columns at most.

        Raises TypeError or ValueError.
        """
        if not isinstance(other, DecoderCache):
            contract.reject("other", "a DecoderCache", contract.describe(other), TypeError)
        other.require("other", self.length.shape[0], self.kinds(), self.length.device)
        if other.passed > self.columns:
            contract.reject("other", f"one of at most {self.columns} columns", f"one of {other.passed}")
        self.passed = max(self.passed, other.passed)  # what caches of mixtures count stays, too
        self.left = self.columns - other.passed
        for buffers, given in zip(self.layers, other.layers):
            if isinstance(buffers, DenseBuffers):
                buffers.put(given, other.there)
            else:
                buffers.put(given)
        self.length.copy_(other.length)
        self.start.copy_(other.length)

    def begin_blocks(self) -> None:
        """Of local layers, in all items, before a step with border=True."""
        near = [layer for layer in self.layers if isinstance(layer, LocalBuffers)]
        for layer in near:
            layer.move_up()
        if near:
            self.start.copy_(self.length)

    def advance(self) -> None:
        """After a step. One that is being recorded takes no token."""
        self.length.add_(1)
        if not (self.length.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.left -= 1
