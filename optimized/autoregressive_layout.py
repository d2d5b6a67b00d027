"""Where the tokens of a call stand: valid ones first, and behind those of an unfinished block that a cache holds.

Letters: B batch, N tokens of a call, E experts, D model dimension, W block size, J blocks, L = J W places.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optimized import ops
from reference.autoregressive_cache import Cache


class Places(NamedTuple):
    """Tokens in places that are whole blocks. Without a mask and a cache they stand as they came."""

    x: Float[Tensor, "B M D"]  # M = N without a cache, else L
    q_logits: Float[Tensor, "B E L"]  # NaN where no token is
    kv_logits: Float[Tensor, "B E L"]  # 0 where no token is
    there: Bool[Tensor, "B L"] | None  # whether a place holds a token; None: the first N do
    start: Int[Tensor, " B"] | None  # position of the first place; None for 0
    filled: Int[Tensor, " B"] | None  # tokens of earlier calls, which come first; None for none


class Order(NamedTuple):
    """Valid tokens first: which token stands at a place, and at which place a token stands."""

    indices: Int[Tensor, "B N"]  # int64
    here: Bool[Tensor, "B N"]  # whether a valid token stands at a place
    place: Int[Tensor, "B N"]  # int64
    mask: Bool[Tensor, "B N"]

    @classmethod
    def of(cls, mask: Bool[Tensor, "B N"]) -> Order:
        n = mask.shape[1]
        place = (mask.cumsum(1) - 1).clamp_min(0)
        token = torch.arange(n, device=mask.device)
        indices = token.new_zeros(mask.shape[0], n + 1)
        indices = indices.scatter(1, place.masked_fill(~mask, n), token.expand_as(place))[:, :n]
        return cls(indices, token < mask.sum(1)[:, None], place, mask)

    def forth(self, x: Float[Tensor, "B N D"], triton: bool) -> Float[Tensor, "B N D"]:
        """Valid tokens first; zeros behind, whatever masked tokens hold."""
        return rows_at(x, self.indices, self.here, self.place.masked_fill(~self.mask, -1), triton)

    def back(self, x: Float[Tensor, "B N D"], triton: bool) -> Float[Tensor, "B N D"]:
        """The opposite; masked tokens become 0."""
        return rows_at(x, self.place, self.mask, self.indices.masked_fill(~self.here, -1), triton)


def rows_at(x: Tensor, indices: Tensor, there: Tensor, inverse: Tensor, triton: bool) -> Tensor:
    """(B, M, D): rows of x (B, N, D) at indices (B, M); 0 where not `there`. inverse (B, N): where a row went, or -1.

    Every row goes to one place at most, so the gradient is a gather, too.
    """
    return ops.gather_norm(x, None, indices[:, None], there[:, None], inverse[:, None].int(), triton)[0][0]


def first_call(x: Tensor, logits: tuple[Tensor, Tensor], order: Order | None, blocks: int, width: int) -> Places:
    """Of tokens with none before them, valid ones first."""
    n = x.shape[1]
    more = blocks * width - n
    q_logits, kv_logits = logits
    there = None
    if order is not None:
        q_logits = q_logits.masked_fill(~order.here[:, None], torch.nan)
        kv_logits = kv_logits.masked_fill(~order.here[:, None], 0)
        there = F.pad(order.here, (0, more))
    if torch.compiler.is_compiling() or more:  # a copy, which a compiler fuses; asked, it would make two graphs
        q_logits, kv_logits = F.pad(q_logits, (0, more), value=torch.nan), F.pad(kv_logits, (0, more))
    return Places(x, q_logits, kv_logits, there, None, None)


def continued(
    x: Tensor, logits: tuple[Tensor, Tensor], order: Order | None, past: Cache, blocks: int, triton: bool
) -> Places:
    """The unfinished block of `past` and what follows, from the block's start on."""
    (batch, n, _), width = x.shape, past.tail.shape[1]
    place = torch.arange(blocks * width, device=x.device)
    filled = past.length - past.start
    count = x.new_full((batch,), n, dtype=torch.int64) if order is None else order.here.sum(1)
    old = place < filled[:, None]
    there = place < (filled + count)[:, None]
    at = torch.where(old, place, width + place - filled[:, None]).clamp(0, width + n - 1)
    kept = torch.arange(width, device=x.device)
    came = torch.arange(n, device=x.device)
    inverse = torch.cat(
        (
            kept.expand(batch, -1).masked_fill(kept >= filled[:, None], -1),
            (filled[:, None] + came).masked_fill(came >= count[:, None], -1),
        ),
        1,
    )
    tokens = rows_at(torch.cat((past.tail, x), 1), at, there, inverse, triton)
    by_expert = at[:, None].expand(-1, past.logits.shape[1], -1)
    rows = []
    for stored, new, nothing in (
        (past.tail_q_logits, logits[0], torch.nan),
        (past.tail_kv_logits, logits[1], 0),
    ):
        found = torch.cat((stored, new), -1).gather(-1, by_expert)
        rows.append(found.masked_fill(~there[:, None], nothing))
    return Places(tokens, rows[0], rows[1], there, past.start, filled)
