"""Routing of a sequence that lies in shards.

Each of the B E rows of a side goes whole to one rank, which solves it and selects from it; all get the decisions. Where
`route_block_size` divides the shards nothing moves: every rank routes its own blocks, and only a NaN is made known.

Letters: B batch, N tokens of the sequence, n of this rank, L of a full shard, R ranks, E experts, K slots, c rows of a
side that a rank solves, W block length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from optimized import ops
from optimized.parallel.collectives import Ranks
from optimized.parallel.shards import Shard
from optimized.routing import cosine_scale, solver_of
from reference.contract import RouterOptions, Routes


class Tokens(NamedTuple):
    """One side of a call on this rank."""

    x: Tensor  # (B, max(n, 1), D): a zero where there is no token, so that all ranks do the same
    shard: Shard
    mask: Tensor | None  # (B, max(n, 1))
    whole: Tensor | None  # (B, N), the mask of all
    k: int


class Taken(NamedTuple):
    """What experts took of this rank's tokens, by slot."""

    indices: Tensor  # (B, E, K) int64, in this rank's tokens, 0 where the slot is not of here
    slots: Tensor  # (B, E, K) bool
    inverse: Tensor  # (B, E, max(n, 1)) int32
    scores: Tensor  # (B, E, K)
    positions: Tensor  # (B, E, K) int64, in the sequence


def logits_of(
    sides: tuple[Tokens, Tokens], tokens: tuple[Tensor, Tensor], options: RouterOptions, triton: bool
) -> tuple[Tensor, Tensor]:
    """(B, E, max(n, 1)) each; by one pass where both sides are the same."""
    q, kv = sides
    scale = cosine_scale(options)
    if q.x is not kv.x:
        first, second = (ops.router_logits(s.x, t, s.mask, scale, triton)[0] for s, t in zip(sides, tokens))
        return first, second
    if tokens[0].ndim != tokens[1].ndim:
        tokens = tuple(t.expand(q.x.shape[0], -1, -1) for t in tokens)  # type: ignore[assignment]
    both = ops.router_logits(q.x, torch.cat(tokens, -2), q.mask, scale, triton)[0]
    first, second = both.chunk(2, 1)
    return first, second


class Decisions(NamedTuple):
    """Of the whole sequence, on all ranks."""

    indices: Tensor  # (B, E, K) int64
    mask: Tensor  # (B, E, K)
    scores: Tensor  # (B, E, K)


def decide(
    sides: tuple[Tokens, Tokens], logits: tuple[Tensor, Tensor], options: RouterOptions, ranks: Ranks, triton: bool
) -> tuple[Decisions, Decisions]:
    """One exchange of logits, one gather of decisions."""
    batch, experts, _ = logits[0].shape
    count = -(-batch * experts // ranks.size)  # c
    parts = [by_rank(t, side.shard.each, count, ranks.size) for t, side in zip(logits, sides)]
    came = ranks.swap(torch.cat([t.flatten(1) for t in parts], 1)).split([t[0].numel() for t in parts], 1)
    found = []
    for side, t, part in zip(sides, came, parts):
        rows = rows_of(t.view(part.shape), side.shard.n)
        mask = masks_of(side.whole, count, (batch, experts), ranks.rank)
        found.append(_pick(rows, mask, side.k, options, triton))
    signed = torch.cat([torch.where(slots, i, -1 - i).int()[:, 0] for i, slots, _ in found], 1)
    scores, ints = ranks.gather_decisions(torch.cat([s[:, 0] for _, _, s in found], 1), signed)
    widths = [i.shape[-1] for i, _, _ in found]
    made = []
    for s, i in zip(scores.split(widths, 2), ints.split(widths, 2)):
        s, i = (t.flatten(0, 1)[: batch * experts].unflatten(0, (batch, experts)) for t in (s, i))
        made.append(Decisions(torch.where(i < 0, -1 - i, i).long(), i >= 0, s.contiguous()))
    return made[0], made[1]


def by_rank(logits: Tensor, each: int, count: int, size: int) -> Tensor:
    """(R, c, L) of (B, E, max(n, 1)): the rows that each rank solves, zeros where there are none."""
    n = min(logits.shape[2], each)
    rows = logits[:, :, :n].flatten(0, 1)
    return F.pad(rows, (0, each - n, 0, size * count - rows.shape[0])).unflatten(0, (size, count))


def rows_of(came: Tensor, n: int) -> Tensor:
    """(c, 1, N) of (R, c, L): whole rows, side by side."""
    return came.transpose(0, 1).flatten(1)[:, :n].unsqueeze(1).contiguous()


def masks_of(whole: Tensor | None, count: int, sizes: tuple[int, int], rank: int) -> Tensor | None:
    """(c, N): of each row its batch item's, from (B, N)."""
    if whole is None:
        return None
    batch, experts = sizes
    row = torch.arange(count, device=whole.device) + rank * count
    return whole[row.div(max(experts, 1), rounding_mode="floor").clamp_max(max(batch - 1, 0))]


def _pick(
    logits: Tensor, mask: Tensor | None, k: int, options: RouterOptions, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, slot mask and scores of rows (B, E, N)."""
    how = options.route_block_size, *solver_of(options)
    indices, slots, _, scores, *_ = ops.pick(logits, None, mask, k, *how, triton)
    return indices, slots, scores


def taken_here(made: Decisions, side: Tokens) -> Taken:
    """Those of the slots that hold tokens of this rank."""
    local = local_slots(made.indices, made.mask, side.shard, side.x.shape[1])
    return Taken(*local, made.scores, made.indices)


def local_slots(indices: Tensor, mask: Tensor, shard: Shard, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices among the rank's n tokens, slot mask, and inverse map, of slots of the sequence."""
    local = indices - shard.start
    here = mask & (local >= 0) & (local < shard.size)
    local = local.masked_fill(~here, 0)
    return local, here, _inverse(local, here, n)


def _inverse(indices: Tensor, here: Tensor, n: int) -> Tensor:
    """`ops.inverse_map` where slots that are not of here share a place, which is cut off."""
    return ops.inverse_map(indices.masked_fill(~here, n), here, n + 1)[..., :n].contiguous()


# --- blocks that no shard cuts ---------------------------------------------------------------------------------------


def aligned(sides: tuple[Tokens, Tokens], options: RouterOptions) -> bool:
    """Whether every rank routes by itself: blocks end where shards end, and both sides have a choice to make."""
    block = options.route_block_size
    return block is not None and all(
        s.shard.n > s.k and s.shard.each < s.shard.n and s.shard.each % block == 0 for s in sides
    )


def slots_of(side: Tokens, block: int, size: int) -> int:
    """Of a rank that has so many tokens."""
    whole, each = size // block, per_block(side, block)
    return whole * min(each, block) + min(each, size - whole * block)


def per_block(side: Tokens, block: int) -> int:
    """K of a block: the same for all blocks of the sequence."""
    return -(-side.k // -(-side.shard.n // block))


def decide_here(
    sides: tuple[Tokens, Tokens], logits: tuple[Tensor, Tensor], options: RouterOptions, ranks: Ranks, triton: bool
) -> tuple[Taken, Taken]:
    """By this rank's blocks; slots of shorter shards are filled up, and masked."""
    made = []
    for side, t in zip(sides, logits):
        indices, slots, scores = _pick_blocks(t[..., : side.shard.size].contiguous(), side, options, triton)
        more = slots_of(side, _block(options), side.shard.each) - indices.shape[-1]
        made.append([F.pad(t, (0, more)) for t in (indices, slots, scores)])
    if options.solver != "sigmoid":
        odd = ranks.largest(torch.cat([_odd(t, side) for side, t in zip(sides, logits)], 1).to(torch.int32)) > 0
        for one, flags in zip(made, odd.chunk(2, 1)):
            one[2] = torch.where(flags & one[1], torch.nan, one[2])
    found = []
    for side, (indices, slots, scores) in zip(sides, made):
        inverse = _inverse(indices, slots, side.x.shape[1])
        found.append(Taken(indices, slots, inverse, scores, indices + side.shard.start))
    return found[0], found[1]


def _block(options: RouterOptions) -> int:
    assert options.route_block_size is not None
    return options.route_block_size


def _pick_blocks(logits: Tensor, side: Tokens, options: RouterOptions, triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Whole blocks, and a last one that is shorter; each like the others of its length."""
    block, n = _block(options), logits.shape[-1]
    each, whole = per_block(side, block), n - n % block
    parts = []
    for start, end, k in ((0, whole, each * (whole // block)), (whole, n, each)):
        if start < end:
            mask = None if side.mask is None else side.mask[:, start:end]
            indices, slots, scores = _pick(logits[..., start:end].contiguous(), mask, k, options, triton)
            parts.append((indices + start, slots, scores))
    if not parts:
        nothing = logits.new_zeros(*logits.shape[:2], 0)
        return nothing.long(), nothing.bool(), logits[..., :0]
    if len(parts) == 1:
        return parts[0]
    first, second, third = (torch.cat(of, -1) for of in zip(*parts))
    return first, second, third


def _odd(logits: Tensor, side: Tokens) -> Tensor:
    """Rows (B, E, 1) with a NaN logit at a valid token."""
    nan: Any = logits.isnan()
    return (nan if side.mask is None else nan & side.mask[:, None]).any(-1, keepdim=True)


def of_all(
    taken: tuple[Taken, Taken], sides: tuple[Tokens, Tokens], logits: Any, options: RouterOptions, ranks: Ranks
) -> tuple[Routes, Routes]:
    """What the ranks decided, together: valid slots ascending, then masked ones ascending."""
    found = []
    for own, side, t in zip(taken, sides, logits):
        shards = [Shard.of(side.shard.n, ranks.size, r) for r in range(ranks.size)]
        counts = [slots_of(side, _block(options), s.size) for s in shards]
        signed = torch.where(own.slots, own.positions, -1 - own.positions).int()
        scores, ints = ranks.gather_decisions(own.scores, signed)
        scores, ints = (torch.cat([part[..., :n] for part, n in zip(of, counts)], -1) for of in (scores, ints))
        indices = torch.where(ints < 0, -1 - ints, ints).long()
        order = (indices + (ints < 0) * side.shard.n).argsort(-1)
        indices, mask, scores = (of.gather(-1, order) for of in (indices, ints >= 0, scores))
        found.append(Routes(indices, mask, scores, t[..., : side.shard.size]))
    return found[0], found[1]
