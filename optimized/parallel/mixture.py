"""`MixtureOfAttention` over a sequence in shards: every rank has some of the tokens, and attends for some experts.

Gradients of parameters that all ranks hold are each rank's share; the sum over the ranks is the gradient of the sum of
all ranks' losses.

Letters: B batch, N tokens of the sequence, n of this rank, D model dimension, E experts, K slots.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from optimized import ops
from optimized.local_attention import LocalAttention
from optimized.mixture import MixtureOfAttention, _is
from optimized.parallel import fused, routing, rows
from optimized.parallel.arguments import Spread, stand_in
from optimized.parallel.parameters import Held, held, unattached
from optimized.parallel.routing import Decisions, Taken, Tokens
from optimized.parallel.shards import Shard, neighbours
from optimized.plan import Plan, bind
from optimized.routed_attention import ExpertProjection, RMSNorm, RoutedAttention, pack, rotation
from optimized.routing import Router, cosine_scale, in_order, restrict, solver_of, with_zero_gradient
from reference import contract
from reference.contract import Call, RouterOptions, Routes

READ: dict[str, type[nn.Module]] = {
    "query_router": Router,
    "key_value_router": Router,
    "attn": RoutedAttention,
    "attn.norm": RMSNorm,
    "attn.context_norm": RMSNorm,
    "attn.to_q": ExpertProjection,
    "attn.to_kv": ExpertProjection,
    "attn.to_out": ExpertProjection,
}


class ContextParallelMixture(Spread, MixtureOfAttention):
    """As `ContextParallel` makes it of a `MixtureOfAttention`."""

    def forward(  # type: ignore[override]
        self,
        x: Any,
        context: Any = None,
        mask: Any = None,
        context_mask: Any = None,
        num_routed_queries: int | None = None,
        num_routed_key_values: int | None = None,
        rotary_emb: Tensor | None = None,
        query_routing_tokens: Tensor | None = None,
        key_value_routing_tokens: Tensor | None = None,
        routes: tuple[Routes, Routes] | None = None,
        return_routes: bool = False,
    ) -> Any:
        """As `MixtureOfAttention.forward`, of this rank's tokens.

        Args:
            x, context, mask, context_mask: DTensors with placements (Shard(1),), whose shards may differ, or plain
                shards of equal lengths.
            rotary_emb, routing tokens, routes: those of the whole sequence, on all ranks.
        Returns (B, n, D), as x was given. Routes are of the whole sequence, but for logits, which are this rank's.
        """
        over, c = self.over, self.config
        over.refuse_ddp()
        own, shard = over.own("x", x, "B", "N", c.dim)
        other, other_shard = (own, shard) if context is None else over.own("context", context, "B", "M", c.dim_context)
        given = {
            "num_routed_queries": num_routed_queries,
            "num_routed_key_values": num_routed_key_values,
            "rotary_emb": rotary_emb,
            "query_routing_tokens": query_routing_tokens,
            "key_value_routing_tokens": key_value_routing_tokens,
            "routes": routes,
            "return_routes": return_routes,
        }
        call = contract.check_call(c, given | _standing_in(own, shard, other, other_shard, context, context_mask))
        q_mask = over.mask("mask", mask, own)
        kv_mask = q_mask if context is None else over.mask("context_mask", context_mask, other)
        unattached(self, over.style, READ)
        plan = self._plan(call, q_mask, kv_mask)
        q = _tokens(own, shard, q_mask, over.whole_mask(q_mask, shard), call.queries.k)
        kv = q._replace(k=call.keys_values.k)
        if context is not None:
            kv = _tokens(other, other_shard, kv_mask, over.whole_mask(kv_mask, other_shard), call.keys_values.k)
        there = held(self, over.ranks, over.sharded, alone=False)
        y, taken, found = self._over_shards(call, (q, kv), there, plan)
        local = None if self.local_attn is None else self._local(q, own, there, plan)
        out = ops.combine(
            y, taken.scores, taken.indices, taken.slots, taken.inverse, local, there.null, q.mask,
            c.average_routed, own.dtype, plan.mixture,
        )  # fmt: skip
        out = over.out(out[:, : shard.size], x)
        return (out, found()) if return_routes else out

    def _plan(self, call: Call, q_mask: Tensor | None, kv_mask: Tensor | None) -> Plan:
        sides = call.queries._replace(mask=q_mask), call.keys_values._replace(mask=kv_mask)
        kind = self._kind(call._replace(queries=sides[0], keys_values=sides[1]))
        return bind(kind)

    def _over_shards(
        self, call: Call, sides: tuple[Tokens, Tokens], there: Held, plan: Plan
    ) -> tuple[Tensor, Taken, Any]:
        """What the experts have, (E, B, K, D), for the slots of this rank; and what tells the routes."""
        ranks, options = self.over.ranks, self.query_router.options
        units = rows.Units.of(self.config.num_experts, ranks)
        q, kv = sides
        unit_scores = call.routes is None and options.straight_through
        if call.routes is not None:
            decided = self._injected(call.routes, sides, there)
            logits = tuple(r.logits[..., s.shard.start : s.shard.end] for r, s in zip(call.routes, sides))
        else:
            passed = call.queries.tokens, call.keys_values.tokens
            tokens: Any = [
                own if given is None else given for own, given in zip((there.q_tokens, there.kv_tokens), passed)
            ]
            own_blocks = routing.aligned(sides, options)
            one_step = q.x is kv.x and options.solver != "sigmoid" and plan.routing == plan.dispatch
            if one_step and not own_blocks:
                how = fused.How(
                    q.shard, (q.k, kv.k), options.route_block_size, cosine_scale(options), solver_of(options), units,
                    ranks.name, ranks.size, ranks.rank, plan.dtype, plan.dispatch,
                )  # fmt: skip
                there_are = fused.routed_rows(q, (tokens[0], tokens[1]), (there.q_gamma, there.kv_gamma), how)
                decided, taken, logits = there_are.decided, there_are.taken, there_are.logits
                kv_slots = decided[1].mask if plan.masked else None
                attended = rows.arrived(there_are.q_rows, there_are.kv_rows, taken, kv_slots, units)
                y = self._attended(attended, call, there, units, unit_scores, plan)
                y = rows.spread(y, taken[0].indices.shape[-1], units, ranks)
                return y, taken[0], lambda: _routes(decided, logits, sides, options)
            logits = routing.logits_of(sides, (tokens[0], tokens[1]), options, plan.routing)
            if own_blocks:
                return self._own_blocks(call, sides, there, logits, units, plan)
            decided = routing.decide(sides, logits, options, ranks, plan.routing)
        taken = routing.taken_here(decided[0], q), routing.taken_here(decided[1], kv)
        made = self._gathered(sides, taken, there, plan)
        kv_slots = decided[1].mask if plan.masked else None
        attended = rows.bring(*made, taken, kv_slots, units, ranks)
        y = self._attended(attended, call, there, units, unit_scores, plan)
        y = rows.spread(y, taken[0].indices.shape[-1], units, ranks)
        return y, taken[0], lambda: _routes(decided, logits, sides, options)

    def _injected(
        self, routes: tuple[Routes, Routes], sides: tuple[Tokens, Tokens], there: Held
    ) -> tuple[Decisions, Decisions]:
        """Valid slots first."""
        made = []
        for given, side, token in zip(routes, sides, (there.q_tokens, there.kv_tokens)):
            found = pack(restrict(given, side.whole))
            scores = found.scores if token is None else with_zero_gradient(found.scores, token)
            made.append(Decisions(found.indices, found.mask, scores))
        return made[0], made[1]

    def _own_blocks(
        self, call: Call, sides: tuple[Tokens, Tokens], there: Held, logits: Any, units: rows.Units, plan: Plan
    ) -> tuple[Tensor, Taken, Any]:
        """Where no shard cuts a block: ranks know their own slots alone."""
        ranks, options = self.over.ranks, self.query_router.options
        taken = routing.decide_here(sides, logits, options, ranks, plan.routing)
        made = self._gathered(sides, taken, there, plan)
        kv = sides[1]
        ragged = plan.masked or kv.shard.n != kv.shard.each * ranks.size
        attended = rows.bring_own(*made, taken, ragged, units, ranks)
        y = self._attended(attended, call, there, units, options.straight_through, plan)
        y = rows.spread_own(y, taken[0].indices.shape[-1], units, ranks)
        return y, taken[0], lambda: routing.of_all(taken, sides, logits, options, ranks)

    def _gathered(
        self, sides: tuple[Tokens, Tokens], taken: tuple[Taken, Taken], there: Held, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        """Rows (E, B, K, D) of the rank's tokens, normalised, in the dtype that they are multiplied in."""
        q, kv = (
            ops.gather_norm.first(s.x, gamma, t.indices, t.slots, t.inverse, plan.dispatch).to(plan.dtype)
            for s, t, gamma in zip(sides, taken, (there.q_gamma, there.kv_gamma))
        )
        return q, kv

    def _attended(
        self, given: rows.Attended, call: Call, there: Held, units: rows.Units, unit_scores: bool, plan: Plan
    ) -> Tensor:
        """(u, B, P, D)."""
        matrices, null_kv = there.matrices, there.null_kv
        if not self.over.sharded:
            matrices, null_kv = tuple(units.matrix(w) for w in matrices), units.pick(null_kv, 1)  # type: ignore[assignment]
        own = [t.to(plan.dtype) for t in (*matrices, null_kv.contiguous())]
        at = (None, None) if call.rotary_emb is None else given.positions()
        return ops.expert_attention.first(
            given.queries, given.keys_values, given.scores, *own, given.lengths, *rotation(call.rotary_emb, plan), *at,
            self.attn.probability(), unit_scores, plan.routed_attention, plan.dispatch,
        )  # fmt: skip

    def _local(self, q: Tokens, x: Tensor, there: Held, plan: Plan) -> Tensor:
        """(B, max(n, 1), D): of the rank's tokens among their neighbours."""
        local: Any = self.local_attn
        width = self.config.local_attn_window_size
        assert width is not None
        among, before = neighbours(x, q.shard, self.over.ranks, width, width)
        mask = None if q.whole is None else q.whole[:, q.shard.start - before :][:, : among.shape[1]]
        own = {"plan": plan} if _is(local, LocalAttention) else {}
        if there.local is None:
            out = local(among, mask, **own)
        else:
            out = functional_call(local, there.local, (among, mask), own)
        return F.pad(out[:, before : before + q.shard.size], (0, 0, 0, q.x.shape[1] - q.shard.size))


def _standing_in(
    x: Tensor, shard: Shard, other: Tensor, other_shard: Shard, context: Any, context_mask: Any
) -> dict[str, Any]:
    """What is as long as the whole sequence, for checks of sizes; masks are checked where they are."""
    if context is None:
        return {"x": stand_in(x, shard.n), "context": None, "mask": None, "context_mask": context_mask}
    return {
        "x": stand_in(x, shard.n), "context": stand_in(other, other_shard.n), "mask": None, "context_mask": None,
    }  # fmt: skip


def _tokens(x: Tensor, shard: Shard, mask: Tensor | None, whole: Tensor | None, k: int) -> Tokens:
    if not shard.size:
        x = F.pad(x, (0, 0, 0, 1))
        mask = None if mask is None else F.pad(mask, (0, 1))
    return Tokens(x, shard, mask, whole, k)


def _routes(
    decided: tuple[Decisions, Decisions], logits: Any, sides: tuple[Tokens, Tokens], options: RouterOptions
) -> tuple[Routes, Routes]:
    found = []
    for made, own, side in zip(decided, logits, sides):
        n = side.shard.n
        ordered = in_order(Routes(*made, own[..., :1].expand(-1, -1, n)), side.whole, side.k)  # whose number counts
        own = own[..., : side.shard.size]
        found.append(ordered._replace(logits=own if n > side.k or options.solver == "sigmoid" else own.detach()))
    return found[0], found[1]
