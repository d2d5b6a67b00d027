"""`MixtureOfAutoregressiveAttention` over a sequence in shards: every rank has some of the tokens, and all experts.

The logits of all tokens are gathered, a few numbers a token, so that every rank knows the decisions of all. Of the past
a rank needs no more than a cache holds: the K rows of each expert's memory at the start of its first block, the tokens
between that and its own first, and those of the window. Blocks and shards need not be aligned.

Letters: B batch, N tokens of the sequence, n of this rank, R ranks, D model dimension, E experts, H heads, d head
dimension, W block size, J blocks of the sequence, K slots of memory, C slots for queries in a block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from optimized import ops
from optimized.autoregressive import MixtureOfAutoregressiveAttention, _is
from optimized.autoregressive_attention import Asked, MemoryAttention
from optimized.autoregressive_layout import first_call
from optimized.autoregressive_local import CausalLocalAttention
from optimized.autoregressive_routing import (
    Decided,
    LogitsRouter,
    Queries,
    own_scores,
    queries_of,
    remember,
    solved_scores,
)
from optimized.parallel.arguments import Over, Spread, stand_in
from optimized.parallel.mixture import READ as OF_MIXTURE
from optimized.parallel.parameters import Held, held, unattached
from optimized.parallel.shards import Shard, neighbours
from optimized.plan import Plan, bind
from optimized.routing import cosine_scale
from reference import contract
from reference.autoregressive_call import check_call

READ: dict[str, type[nn.Module]] = OF_MIXTURE | {
    "query_router": LogitsRouter,
    "key_value_router": LogitsRouter,
    "attn": MemoryAttention,
}


class Part:
    """Which blocks and tokens concern a rank: blocks [first, last), whose first starts at token `begin`."""

    def __init__(self, shard: Shard, width: int) -> None:
        self.first = shard.start // width
        self.last = -(-shard.end // width) if shard.size else self.first
        self.begin = self.first * width if shard.size else shard.start


class ContextParallelCausal(Spread, MixtureOfAutoregressiveAttention):
    """As `ContextParallel` makes it of a `MixtureOfAutoregressiveAttention`."""

    def forward(
        self,
        x: Any,
        mask: Any = None,
        rotary_emb: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        return_routes: bool = False,
    ) -> Any:
        """As `MixtureOfAutoregressiveAttention.forward`, of this rank's tokens: (B, n, D), as x was given.

        x: a DTensor with placements (Shard(1),), or plain shards of equal lengths. rotary_emb: of the whole sequence.
        Neither masks, nor caches, nor routes: positions count valid tokens, so with a mask which rank has a token's
        neighbours would be known on the device alone; to decode, load the checkpoint on one device.
        """
        over, c = self.over, self.config
        over.refuse_ddp()
        refuse(over.style, mask=mask, cache=cache, use_cache=use_cache, return_routes=return_routes)
        own, shard = over.own("x", x, "B", "N", c.dim)
        check_call(c, stand_in(own, shard.n), None, rotary_emb, None, False, False)
        unattached(self, over.style, READ)
        plan = bind(self._kind(own, False))
        there = held(self, over.ranks, over.sharded, alone=False)
        if over.sharded:
            there = _of_all(there, over)
        return over.out(self._computed(own, shard, there, rotary_emb, plan), x)

    def _computed(self, own: Tensor, shard: Shard, there: Held, rotary_emb: Tensor | None, plan: Plan) -> Tensor:
        c, ranks = self.config, self.over.ranks
        part = Part(shard, c.routed_window_size)
        x = own if shard.size else F.pad(own, (0, 0, 0, 1))  # so that all ranks do the same
        before = max(c.local_attn_window_size, c.routed_window_size - 1)
        among, left = neighbours(own, shard, ranks, before, 0)
        decided = self._decided(x, shard, there, plan)
        y, slots = self._routed(
            x, among[:, left - (shard.start - part.begin) :], shard, part, decided, there, plan, rotary_emb
        )
        seen = among[:, max(left - c.local_attn_window_size, 0) :]
        local = near(self.local_attn, seen, there, plan)[:, seen.shape[1] - shard.size :]
        begin = torch.full((x.shape[0],), shard.start, device=x.device)
        assert there.null is not None
        return ops.blend(
            y, *slots, local, there.null, begin, c.routed_window_size, c.average_routed, own.dtype, plan.mixture
        )

    def _decided(self, x: Tensor, shard: Shard, there: Held, plan: Plan) -> Decided:
        """What the routers make of the whole sequence, on every rank."""
        c, ranks = self.config, self.over.ranks
        tokens: Any = (there.q_tokens, there.kv_tokens)
        logits = ops.router_logits(x, torch.cat(tokens), None, cosine_scale(c.options), plan.routing)[0]
        n = min(logits.shape[2], shard.each)
        parts = ranks.gather(F.pad(logits[..., :n], (0, shard.each - n)))
        q, kv = parts.permute(1, 2, 0, 3).flatten(2)[..., : shard.n].chunk(2, 1)
        places = first_call(stand_in(x, shard.n), (q, kv), None, c.blocks(shard.n, False), c.routed_window_size)
        queries, limits = queries_of(places, None, c, tokens[0], plan)
        memory = remember(places, None, c, plan, False)
        if c.options.solver == "sigmoid":
            scores = own_scores(places, None, c.options)
        else:
            scores = solved_scores(places, None, memory, c, tokens[1], plan)
        return Decided(queries, limits, memory, scores).of_all_blocks()

    def _routed(
        self,
        x: Tensor,
        rows: Tensor,
        shard: Shard,
        part: Part,
        decided: Decided,
        there: Held,
        plan: Plan,
        rotary_emb: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """What the experts have for the queries of this rank, (E, B, Q, D), and scores, indices, slot mask and inverse.

        rows: from the first block's start to the rank's last token. Before them the experts' memories are laid out.
        """
        c, (queries, _, memory, scores) = self.config, decided
        blocks, experts, k = slice(part.first, part.last), c.num_experts, memory.columns.shape[-1]
        remembered, held_at = self._remembered(x, shard, decided, plan)
        prior = experts * k
        columns = memory.columns[:, :, blocks]
        earlier = torch.searchsorted(held_at, columns.flatten(2).contiguous()).clamp_max(max(k - 1, 0))
        earlier = (earlier + k * torch.arange(experts, device=x.device)[:, None]).view(columns.shape)
        shown = torch.arange(k, device=x.device) < memory.counts[:, :, blocks, None]
        columns = torch.where(columns >= part.begin, columns + (prior - part.begin), earlier).masked_fill(~shown, 0)
        if scores.ndim == 3:
            far = scores.gather(-1, held_at.clamp(0, max(scores.shape[-1] - 1, 0)).long())
            far = far[:, :, None].expand(-1, -1, experts, -1).flatten(2)  # of columns of another expert anything
            scores = torch.cat((far, scores[..., part.begin : part.begin + rows.shape[1]]), -1)
        else:
            scores = scores[:, :, blocks]
        at, mine, of_queries, inverse = self._own(queries, shard, part)
        positions = held_at.clamp(0, max(shard.n - 1, 0)).flatten(1).long()
        since = torch.arange(part.begin, part.begin + rows.shape[1], device=x.device).expand(x.shape[0], -1)
        asked = Asked(
            (at + (prior - part.begin)).masked_fill(~mine, 0),
            mine,
            F.pad(inverse, (prior + shard.start - part.begin, 0), value=-1).contiguous(),
            columns.int(),
            memory.counts[:, :, blocks],
            mine.sum(-1, dtype=torch.int32),
            torch.cat((positions, since), 1),
            (c.routed_window_size, prior),
        )
        y = attend(self.attn, there, (torch.cat((remembered, rows), 1), asked, scores, None, rotary_emb), plan)[0]
        local = (at - shard.start).masked_fill(~mine, 0)
        return y, (of_queries.flatten(2), local.flatten(2), mine.flatten(2), inverse.contiguous())

    def _own(self, queries: Queries, shard: Shard, part: Part) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens of the rank's slots (B, E, J, C), which of these are filled, the first ones, scores, and inverse."""
        blocks, capacity = slice(part.first, part.last), self.config.capacity
        at, filled, scores = (t[:, :, blocks] for t in (queries.places, queries.filled, queries.scores))
        inverse = queries.inverse[..., shard.start : shard.end]
        nowhere, inverse = inverse < 0, inverse - part.first * capacity
        if part.begin < shard.start:  # the first slots of the first block are another rank's
            others = (filled[:, :, :1] & (at[:, :, :1] < shard.start)).sum(-1, dtype=torch.int32)
            slot = torch.arange(capacity, device=at.device)
            moved = F.pad(others, (0, at.shape[2] - 1))[..., None] + slot
            filled = filled.gather(-1, moved.clamp_max(capacity - 1)) & (moved < capacity)
            at, scores = (t.gather(-1, moved.clamp_max(capacity - 1)) for t in (at, scores))
            inverse = torch.where(inverse < capacity, inverse - others, inverse)
        return at, filled & (at < shard.end), scores, inverse.masked_fill(nowhere, -1)

    def _remembered(self, x: Tensor, shard: Shard, decided: Decided, plan: Plan) -> tuple[Tensor, Tensor]:
        """Rows (B, E K, D) of the experts' memories at the start of the rank's first block, and their tokens (B, E, K),
        ascending; behind them what is later than any.

        Every rank has the rows of its own tokens for all others, and zeros: one reduce-scatter.
        """
        c, ranks, memory = self.config, self.over.ranks, decided.memory
        batch, experts, _, k = memory.columns.shape
        tokens = []
        for r in range(ranks.size):
            first = Part(Shard.of(shard.n, ranks.size, r), c.routed_window_size).first
            j = min(first, memory.columns.shape[2] - 1)
            empty = torch.arange(k, device=x.device) >= memory.counts[:, :, j, None] if j >= 0 else None
            tokens.append(
                memory.columns[:, :, j].masked_fill(empty, shard.n)
                if empty is not None
                else memory.columns.new_full((batch, experts, k), shard.n)
            )
        every = torch.cat(tokens, 1).long()  # (B, R E, K)
        local = every - shard.start
        here = (local >= 0) & (local < shard.size)
        local = local.masked_fill(~here, 0)
        inverse = ops.inverse_map(local.masked_fill(~here, x.shape[1]), here, x.shape[1] + 1)[..., :-1].contiguous()
        rows = ops.gather_norm.first(x, None, local, here, inverse, plan.dispatch)
        rows = ranks.scatter(rows.unflatten(0, (ranks.size, experts)))
        return rows.transpose(0, 1).flatten(1, 2), tokens[ranks.rank].contiguous()


def near(local: Any, rows: Tensor, there: Held, plan: Plan) -> Tensor:
    """Local attention of rows (B, M, D) that come one after another."""
    given = {"plan": plan} if _is(local, CausalLocalAttention) else {}
    if there.local is None:
        return local(rows, **given)[0]
    return functional_call(local, there.local, (rows,), given)[0]


def attend(attn: Any, there: Held, given: tuple, plan: Plan) -> Any:
    """The routed attention, by parameters that are not its own where there are such."""
    if there.local is None:
        return attn(*given, plan=plan)
    names = ("to_q.weight", "to_kv.weight", "to_out.weight")
    own = dict(zip(names, there.matrices)) | {"null_kv": there.null_kv}
    for name, gamma in (("norm.gamma", there.q_gamma), ("context_norm.gamma", there.kv_gamma)):
        if gamma is not None:
            own[name] = gamma
    return functional_call(attn, own, given, {"plan": plan})


def refuse(style: str, **given: Any) -> None:
    """What a causal layer in parallel does not take."""
    for name, value in given.items():
        if value is not None and value is not False:
            contract.reject(name, f"nothing under {style} (one device decodes, with the gathered checkpoint)", value)


def _of_all(there: Held, over: Over) -> Held:
    """Matrices and null keys of all experts: a rank's tokens are for any of them."""
    ranks = over.ranks
    matrices: Any = tuple(ranks.gather(w).flatten(0, 1) for w in there.matrices)
    null_kv = ranks.gather(there.null_kv.transpose(0, 1).contiguous()).flatten(0, 1).transpose(0, 1).contiguous()
    return there._replace(matrices=matrices, null_kv=null_kv)
