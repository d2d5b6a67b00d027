"""Routed rows on their way to the ranks that attend over them, and back.

A unit is an expert's attention for a piece of its query slots: S = R / gcd(E, R) pieces, so that every rank has as many
units, E / gcd(E, R), where R does not divide E too. The keys of an expert go to all of its pieces.

Letters: B batch, R ranks, E experts, S pieces, u units of a rank, K slots, P slots of a piece, D channels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from optimized.parallel.collectives import Ranks
from optimized.parallel.routing import Taken


class Units(NamedTuple):
    """Which units there are, and which are this rank's."""

    experts: int
    pieces: int  # S
    each: int  # u
    rank: int

    @classmethod
    def of(cls, experts: int, ranks: Ranks) -> Units:
        common = math.gcd(experts, ranks.size)
        return cls(experts, ranks.size // common, experts // common, ranks.rank)

    @property
    def own(self) -> list[int]:
        """Expert of each."""
        return [(self.rank * self.each + i) // self.pieces for i in range(self.each)]

    @property
    def own_pieces(self) -> list[int]:
        return [(self.rank * self.each + i) % self.pieces for i in range(self.each)]

    def pick(self, t: Tensor, dim: int) -> Tensor:
        """Of a tensor with E along dim, those of the rank's units, contiguous."""
        if self.pieces == 1:
            return t.narrow(dim, self.rank * self.each, self.each).contiguous()
        return torch.stack([t.select(dim, e) for e in self.own], dim)  # whose gradient is added up in one order

    def matrix(self, w: Tensor) -> Tensor:
        """Of (E O, I, 1)."""
        return self.pick(w.view(self.experts, -1, *w.shape[1:]), 0).flatten(0, 1)

    def cut(self, t: Tensor, dim: int) -> Tensor:
        """(..., S P, ...) of (..., K, ...): filled up with zeros, or False."""
        more = -t.shape[dim] % self.pieces
        return F.pad(t, (0, 0) * (t.ndim - 1 - dim % t.ndim) + (0, more)) if more else t

    def queries_by_unit(self, rows: Tensor) -> Tensor:
        """(E S, B, P, D) of (E, B, K, D)."""
        if self.pieces == 1:
            return rows
        return self.cut(rows, 2).unflatten(2, (self.pieces, -1)).transpose(1, 2).flatten(0, 1)

    def keys_by_unit(self, rows: Tensor) -> Tensor:
        """(E S, B, K, D) of (E, B, K, D)."""
        return rows if self.pieces == 1 else rows.unsqueeze(1).expand(-1, self.pieces, -1, -1, -1).flatten(0, 1)

    def summed(self, rows: Tensor) -> Tensor:
        """(E, B, K, D): the transpose of `keys_by_unit`."""
        return rows if self.pieces == 1 else rows.unflatten(0, (self.experts, self.pieces)).sum(1)

    def by_expert(self, rows: Tensor, k: int) -> Tensor:
        """(E, B, K, D) of (E S, B, P, D)."""
        if self.pieces == 1:
            return rows
        return rows.unflatten(0, (self.experts, self.pieces)).transpose(1, 2).flatten(2, 3)[:, :, :k]

    def own_queries(self, t: Tensor) -> Tensor:
        """(B, u, P) of (B, E, K): of the rank's units, their pieces."""
        if self.pieces == 1:
            return self.pick(t, 1)
        by_piece = self.cut(t, 2).unflatten(2, (self.pieces, -1))
        return torch.stack([by_piece[:, e, p] for e, p in zip(self.own, self.own_pieces)], 1)


class Attended(NamedTuple):
    """What the rank's units attend with."""

    queries: Tensor  # (u, B, P, D)
    keys_values: Tensor  # (u, B, K, Dc)
    scores: Tensor  # (B, u, K)
    lengths: Tensor | None  # (u B) int32
    q_positions: Tensor  # (B, u, P)
    k_positions: Tensor  # (B, u, K)

    def positions(self) -> tuple[Tensor, Tensor]:
        """(u B, slots) each."""
        first, second = (t.transpose(0, 1).flatten(0, 1) for t in (self.q_positions, self.k_positions))
        return first, second


def bring(
    queries: Tensor, keys_values: Tensor, taken: tuple[Taken, Taken], kv_mask: Tensor | None, units: Units, ranks: Ranks
) -> Attended:
    """From rows (E, B, K, D) that hold this rank's tokens, zeros elsewhere, and slots that all know.

    One reduce-scatter: of every row one rank has something else than zeros, so the sums are exact. kv_mask (B, E, K):
    the valid slots, which come first; None for all.
    """
    q, kv = units.queries_by_unit(queries), units.keys_by_unit(keys_values)
    parts = [t.unflatten(0, (ranks.size, -1)) for t in (q, kv)]
    q_rows, kv_rows = _scattered(parts, ranks)
    return arrived(q_rows, kv_rows, taken, kv_mask, units)


def arrived(
    q_rows: Tensor, kv_rows: Tensor, taken: tuple[Taken, Taken], kv_mask: Tensor | None, units: Units
) -> Attended:
    """Rows (u, B, P, D) and (u, B, K, Dc) of slots that all know."""
    lengths = None
    if kv_mask is not None:
        lengths = units.pick(kv_mask, 1).sum(-1, dtype=torch.int32).t().flatten()
    q_taken, kv_taken = taken
    at = units.own_queries(q_taken.positions), units.pick(kv_taken.positions, 1)
    return Attended(q_rows, kv_rows, units.pick(kv_taken.scores, 1), lengths, *at)


def _scattered(parts: list[Tensor], ranks: Ranks) -> list[Tensor]:
    flat = ranks.scatter(torch.cat([t.flatten(1) for t in parts], 1))
    sizes = [t[0].numel() for t in parts]
    return [part.view(t.shape[1:]) for part, t in zip(flat.split(sizes), parts)]


def spread(y: Tensor, k: int, units: Units, ranks: Ranks) -> Tensor:
    """What all units have, (E, B, K, D), of the rank's (u, B, P, D)."""
    return units.by_expert(ranks.gather(y).flatten(0, 1), k)


# --- slots that their ranks alone know, as many on each -------------------------------------------------------------


def bring_own(
    queries: Tensor, keys_values: Tensor, taken: tuple[Taken, Taken], ragged: bool, units: Units, ranks: Ranks
) -> Attended:
    """From rows (E, B, K, D) of this rank's slots: the units get those of all ranks, one after another.

    ragged: slots may be empty; valid ones then come first. One exchange of rows, one of scores and positions.
    """
    q, kv = units.queries_by_unit(queries), units.keys_by_unit(keys_values)
    parts = [t.unflatten(0, (ranks.size, -1)) for t in (q, kv)]
    sizes = [t[0].numel() for t in parts]
    came = ranks.swap(torch.cat([t.flatten(1) for t in parts], 1)).split(sizes, 1)
    # (R, u, B, P, D) as (u, B, R P, D)
    q_rows, kv_rows = (_joined(t.view(part.shape)) for t, part in zip(came, parts))
    q_taken, kv_taken = taken
    q_at = units.queries_by_unit(q_taken.positions.int().transpose(0, 1)[..., None])
    signed = torch.where(kv_taken.slots, kv_taken.positions, -1 - kv_taken.positions).int()
    kv_at = units.keys_by_unit(signed.transpose(0, 1)[..., None])
    scores = units.keys_by_unit(kv_taken.scores.transpose(0, 1)[..., None])
    at = torch.cat([t.unflatten(0, (ranks.size, -1)).flatten(1) for t in (q_at, kv_at)], 1)
    scores, at = ranks.swap_decisions(scores.unflatten(0, (ranks.size, -1)).flatten(1), at)
    q_width = q_at.numel() // ranks.size
    shape, q_shape = kv_rows.shape[:2], q_rows.shape[:2]
    q_positions = _joined(at[:, :q_width].reshape(ranks.size, *q_shape, -1, 1))[..., 0]
    kv_positions = _joined(at[:, q_width:].reshape(ranks.size, *shape, -1, 1))[..., 0]
    scores = _joined(scores.reshape(ranks.size, *shape, -1, 1))[..., 0]
    lengths = None
    if ragged:
        valid = kv_positions >= 0
        order = (~valid).to(torch.uint8).argsort(dim=-1, stable=True)
        lengths = valid.sum(-1, dtype=torch.int32).flatten()
        kv_positions, scores = kv_positions.gather(-1, order), scores.gather(-1, order)
        kv_rows = kv_rows.gather(2, order[..., None].expand(kv_rows.shape))
    kv_positions = torch.where(kv_positions < 0, -1 - kv_positions, kv_positions)
    by_item: Any = (t.transpose(0, 1).contiguous() for t in (scores, q_positions.long(), kv_positions.long()))
    scores, q_positions, kv_positions = by_item
    return Attended(q_rows, kv_rows, scores, lengths, q_positions, kv_positions)


def _joined(t: Tensor) -> Tensor:
    """(u, B, R P, D) of (R, u, B, P, D)."""
    return t.permute(1, 2, 0, 3, 4).flatten(2, 3)


def spread_own(y: Tensor, k: int, units: Units, ranks: Ranks) -> Tensor:
    """What the experts have for this rank's slots, (E, B, K, D), of the rank's units (u, B, R P, D)."""
    by_rank = y.unflatten(2, (ranks.size, -1)).permute(2, 0, 1, 3, 4)
    return units.by_expert(ranks.swap(by_rank.contiguous()).flatten(0, 1), k)
