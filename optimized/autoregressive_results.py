"""What a call of the causal layer returns besides its output: routes, and the cache.

Letters: B batch, N tokens of a call, E experts, W block size, J blocks, L = J W places, K slots of memory, C slots for
queries in a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from optimized import ops
from optimized.autoregressive_cache import Cache
from optimized.autoregressive_layout import Order, Places
from optimized.autoregressive_routing import Decided
from reference.autoregressive import Laid, Memory, MemoryRoutes, QueryRoutes
from reference.autoregressive_contract import AutoregressiveConfig


def routes_of(
    places: Places,
    decided: Decided,
    logits: tuple[Tensor, Tensor],
    order: Order | None,
    cache: Cache | None,
    c: AutoregressiveConfig,
) -> tuple[QueryRoutes, MemoryRoutes]:
    """decided: of all blocks. logits: (B, E, N), of valid tokens first."""
    queries, limits, memory, scores = decided
    n, at = logits[0].shape[-1], queries.places
    new = _held(places)
    if places.filled is not None:
        at = (at - places.filled[:, None, None, None]).clamp_min(0)
        new = new & (torch.arange(new.shape[-1], device=new.device) >= places.filled[:, None])
    if order is not None and n:
        by_expert = [t[:, None].expand(-1, c.num_experts, -1) for t in (order.indices, order.place, order.mask)]
        at = by_expert[0].gather(-1, at.flatten(2)).view(at.shape)
        first, second = (t.gather(-1, by_expert[1]).masked_fill(~by_expert[2], 0) for t in logits)
        logits = first, second
    rows = places.q_logits.unflatten(-1, (-1, c.routed_window_size))
    slots = F.pad(queries.inverse, (0, new.shape[-1] - queries.inverse.shape[-1]), value=-1).view(rows.shape)
    candidate = slots >= 0 if c.everybody else rows >= limits.thresholds[..., None]
    candidates = (candidate & new.unflatten(-1, rows.shape[-2:])[:, None]).sum(-1)
    taken = QueryRoutes(at, queries.mask, queries.scores, queries.mask.sum(-1), candidates, logits[0])
    there = memory.there
    if scores.ndim == 3:
        by_slot = ops.gathered(scores.transpose(0, 1)[..., None], memory.columns, memory.counts)
        scores = by_slot[..., 0].transpose(0, 1)
    return taken, MemoryRoutes(memory.positions(places, cache), there, scores, logits[1])


def after(
    past: Cache,
    count: Tensor,
    passed: int,
    places: Places,
    decided: Decided,
    made: tuple[Tensor, tuple[Tensor, Tensor]],
    continued: bool,
) -> Cache:
    """The cache after a call with `count` valid tokens of `passed`; past: that before, empty for a first call.

    made: keys and values of all columns, (E, B, S, 2, H, d), and those of local attention, (B, S', H, d) each. In a
    first call they lack what is not stored yet.
    """
    memory, dtype, (kv, near) = decided.memory, past.keys.dtype, made
    length, stored = places.q_logits.shape[-1], past.positions.shape[-1]
    assert memory.poisoned is not None
    x, rows, columns = places.x, kv.permute(3, 1, 0, 2, 4, 5).to(dtype), memory.columns.long()
    local = tuple(t.to(dtype) for t in near)
    if not continued:
        x, columns = F.pad(x, (0, 0, 0, length - x.shape[1])), columns + stored
        rows = F.pad(rows, (0, 0, 0, 0, stored, 0))
        local = tuple(F.pad(t, (0, 0, 0, 0, past.local_keys.shape[1], 0)) for t in local)
    held = _held(places)
    position = past.start[:, None] + torch.arange(length, device=x.device)
    laid = Laid(x, places.q_logits.masked_fill(~held[:, None], 0), places.kv_logits, held, held, position)
    positions = memory.positions(places, past if continued else None)
    chosen = Memory(columns, memory.there, positions, memory.poisoned)
    thresholds, duals = decided.limits
    limits = thresholds, torch.zeros_like(thresholds) if duals is None else duals
    return past.after(count, passed, laid, chosen, (rows[0], rows[1]), limits, (local[0], local[1]))


def _held(places: Places) -> Tensor:
    """Which places hold a token, (B, L)."""
    if places.there is not None:
        return places.there
    held = torch.arange(places.q_logits.shape[-1], device=places.x.device) < places.x.shape[1]
    return held.expand(places.x.shape[0], -1)
