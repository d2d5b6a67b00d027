"""How a sequence falls into shards, and what neighbours give: all static, nothing asks the device.

Letters: B batch, N tokens of the sequence, R ranks, L = N / R rounded up, the length of a shard but for the last ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from optimized.parallel.collectives import Ranks


class Shard(NamedTuple):
    """Tokens [start, start + size) of n. Shards are those of torch.chunk, and of a DTensor."""

    n: int
    each: int  # L
    start: int
    size: int

    @classmethod
    def of(cls, n: int, ranks: int, rank: int) -> Shard:
        each = -(-n // ranks)
        start = min(rank * each, n)
        return cls(n, each, start, min(each, n - start))

    @property
    def end(self) -> int:
        return self.start + self.size


def neighbours(x: Tensor, shard: Shard, ranks: Ranks, before: int, after: int) -> tuple[Tensor, int]:
    """x (B, n, ...) between as many tokens before and after it as there are, at most so many; and how many come before.

    One exchange, over as many ranks as it takes. A rank without tokens gets none.
    """
    shards = [Shard.of(shard.n, ranks.size, r) for r in range(ranks.size)]
    wanted = [_wanted(s, before, after) for s in shards]
    sent = [_common(wanted[r], shard, r, ranks.rank) for r in range(ranks.size)]
    got = [_common(wanted[ranks.rank], s, ranks.rank, r) for r, s in enumerate(shards)]
    unit = x.shape[0] * math.prod(x.shape[2:])
    parts = [x[:, a - shard.start : b - shard.start].reshape(-1) for a, b in sent]
    send, receive = [(b - a) * unit for a, b in sent], [(b - a) * unit for a, b in got]
    came = ranks.exchange(torch.cat(parts), send, receive).split(receive)
    pieces = [t.view(x.shape[0], b - a, *x.shape[2:]) for t, (a, b) in zip(came, got)]
    left, right = pieces[: ranks.rank], pieces[ranks.rank + 1 :]
    return torch.cat((*left, x, *right), 1), sum(b - a for a, b in got[: ranks.rank])


def _wanted(s: Shard, before: int, after: int) -> tuple[int, int]:
    return (max(s.start - before, 0), min(s.end + after, s.n)) if s.size else (s.start, s.start)


def _common(wanted: tuple[int, int], s: Shard, of: int, owner: int) -> tuple[int, int]:
    """What `owner`, who has s, has of what rank `of` wants: nothing for itself."""
    a, b = max(wanted[0], s.start), min(wanted[1], s.end)
    return (a, b) if a < b and of != owner else (s.start, s.start)
