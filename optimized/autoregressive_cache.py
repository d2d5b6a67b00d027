"""What a causal layer remembers of a sequence: the reference's value, and the same in buffers that steps change."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reference import autoregressive_cache as values

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Cache(values.Cache):
    """As of the reference; `static` is a copy for `MixtureOfAutoregressiveAttention.step`."""

    def static(self) -> StaticCache:
        """Its tensors in buffers of their own, without gradient."""
        return StaticCache(**_copies(self))


class NearBuffers:
    """Of local attention, in place: keys and values (B, w + W, H, d) of w tokens before a block, then of up to W in it.

    length, start: (B), valid tokens so far, and the position of the block's first one.
    """

    length: Any
    start: Any
    local_keys: Any
    local_values: Any

    @property
    def window(self) -> int:
        """w."""
        raise NotImplementedError

    def append_near(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated keys and values (B, 1, H, d) of the token after those held. Returns those it sees, itself first and
        further back after it, (B, w + 1, H, d), and how many of them there are (B).
        """
        place = (self.window + self.length - self.start).clamp_max(self.local_keys.shape[1] - 1)
        at = place[:, None, None, None]
        for buffer, new in zip((self.local_keys, self.local_values), (keys, values)):
            buffer.scatter_(1, at.expand_as(new), new.to(buffer.dtype))
        back = place[:, None] - torch.arange(self.window + 1, device=keys.device)
        count = (self.length + 1).clamp_max(self.window + 1)
        return take(self.local_keys, back), take(self.local_values, back), count


@dataclass(frozen=True, eq=False)
class StaticCache(Cache, NearBuffers):
    """A cache whose tensors stay where they are and are changed in place, as a CUDA graph wants them."""

    def due(self) -> Tensor:
        """Which items (B) begin a block with their next token, for which a step has to be one with border=True."""
        return self.length - self.start >= self.tail.shape[1]

    def value(self) -> Cache:
        """What it holds now, of which later steps change nothing. It waits for the device: steps count tokens there.

        Raises RuntimeError where a step without border=True took an item past the end of its block.
        """
        held, width = self.copied(), self.tail.shape[1]
        newest, most = (int(t.max()) if t.numel() else 0 for t in (self.length, self.length - self.start))
        if most > width:
            raise RuntimeError(
                f"cache: expected at most {width} tokens in an unfinished block, got {most}; border=True was due"
            )
        return replace(held, passed=max(self.passed, newest))

    def copied(self) -> Cache:
        """The same for the next step, which asks `passed` nothing: nothing waits."""
        return Cache(**_copies(self))

    def crop(self, n: int | Tensor) -> Self:
        """As of a `Cache`; in buffers of its own, too."""
        return type(self)(**_copies(super().crop(n)))

    def put(self, other: values.Cache) -> None:
        """Another cache of the same shape, into these buffers."""
        for f in fields(self):
            buffer = getattr(self, f.name)
            if isinstance(buffer, Tensor):
                buffer.copy_(getattr(other, f.name))

    def append(self, x: Tensor, logits: tuple[Tensor, Tensor]) -> Tensor:
        """A token (B, 1, D) of every item, with its logits (B, E, 1), to the unfinished blocks. Returns its places (B).

        The length is left to `advance`.
        """
        place = (self.length - self.start).clamp_max(self.tail.shape[1] - 1)
        at = place[:, None, None]
        self.tail.scatter_(1, at.expand_as(x), x)
        for buffer, new in zip((self.tail_q_logits, self.tail_kv_logits), logits):
            buffer.scatter_(2, at.expand_as(new), new)
        return place

    @property
    def window(self) -> int:
        return self.sizes()[2]

    def advance(self) -> None:
        self.length.add_(1)


def _copies(cache: values.Cache) -> dict[str, Any]:
    """Its fields, tensors without gradient, contiguous, and in memory of their own."""
    own: dict[str, Any] = {f.name: getattr(cache, f.name) for f in fields(cache)}
    kept = {"memory_format": torch.contiguous_format}
    return {name: t.detach().clone(**kept) if isinstance(t, Tensor) else t for name, t in own.items()}


def take(t: Tensor, rows: Tensor) -> Tensor:
    """(B, M, ...) of t (B, N, ...) at rows (B, M)."""
    return values.take(t, 1, rows)
