"""`MixtureOfAttention` whose experts are spread: every rank has all tokens, and routes and attends for E / R experts.

One all-reduce forward, of what the experts have for each token, and one backward, of the gradient of x: as many numbers
as x has, so this is for short sequences. Gradients are full on every rank.

Letters: B batch, N tokens, D model dimension, E experts, R ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.func import functional_call

from optimized import ops
from optimized.local_attention import LocalAttention
from optimized.mixture import MixtureOfAttention, _decision, _is
from optimized.parallel.arguments import Over, Spread
from optimized.parallel.mixture import READ
from optimized.parallel.parameters import Held, held, unattached
from optimized.plan import Plan, bind
from optimized.routed_attention import Keys, gather, pack
from optimized.routing import _route, in_order, restrict, with_zero_gradient
from reference import contract
from reference.contract import Call, Routes, Side


def replicated(name: str, t: Any, over: Over) -> Any:
    """A tensor that all ranks hold alike, given as such or as a DTensor; other things as they are."""
    if not isinstance(t, DTensor):
        return t
    if t.device_mesh != over.ranks.mesh or t.placements != (Replicate(),):
        expected = "a DTensor with placements (Replicate(),) on the mesh of the layer, or a plain tensor"
        contract.reject(name, expected, f"placements {t.placements} on {t.device_mesh}")
    return t.to_local()


def as_given(out: Tensor, given: Any, over: Over) -> Tensor:
    if not isinstance(given, DTensor):
        return out
    return DTensor.from_local(out, over.ranks.mesh, (Replicate(),), run_check=False)


class ExpertParallelMixture(Spread, MixtureOfAttention):
    """As `ExpertParallel` makes it of a `MixtureOfAttention`."""

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
        """As `MixtureOfAttention.forward`; all arguments are the same on all ranks, as tensors or replicas."""
        over, c = self.over, self.config
        over.refuse_ddp()
        own = {
            name: replicated(name, t, over)
            for name, t in (("x", x), ("context", context), ("mask", mask), ("context_mask", context_mask))
        }
        given = own | {
            "num_routed_queries": num_routed_queries,
            "num_routed_key_values": num_routed_key_values,
            "rotary_emb": rotary_emb,
            "query_routing_tokens": query_routing_tokens,
            "key_value_routing_tokens": key_value_routing_tokens,
            "routes": routes,
            "return_routes": return_routes,
        }
        call = contract.check_call(c, given)
        unattached(self, over.style, READ)
        plan = bind(self._kind(call))
        there = held(self, over.ranks, True, alone=True)
        total, count, found = self._of_own_experts(self._own(call), there, plan)
        mask, local = call.queries.mask, None
        out = total if self.local_attn is None else total + (local := self._local(own["x"], mask, there, plan))
        if c.average_routed:
            out = out / (count + (local is not None)).clamp_min(1)
        if there.null is not None:
            out = torch.where(count == 0, there.null.to(out.dtype), out)
        if mask is not None:
            out = out.masked_fill(~mask[..., None], 0)
        out = as_given(out.to(own["x"].dtype), x, over)
        return (out, self._all_routes(found, call)) if return_routes else out

    def _own(self, call: Call) -> Call:
        """What concerns the rank's experts. Gradients of what all ranks read are added up."""
        each = self.config.num_experts // self.over.ranks.size
        first = self.over.ranks.rank * each
        q, kv, same = call.queries, call.keys_values, call.keys_values.x is call.queries.x
        read: list[Any] = [q.x, None if same else kv.x, q.tokens, kv.tokens]
        read += [None, None] if call.routes is None else [r.scores for r in call.routes]
        shared = iter(self.over.ranks.alike(*(t for t in read if t is not None)))
        x, context, q_tokens, kv_tokens, *scores = (None if t is None else next(shared) for t in read)
        routes: Any = call.routes
        if routes is not None:
            routes = tuple(
                Routes(*(t.narrow(1, first, each) for t in (r.indices, r.mask, s, r.logits)))  # type: ignore[union-attr]
                for r, s in zip(routes, scores)
            )
        q_tokens, kv_tokens = (None if t is None else t.narrow(-2, first, each) for t in (q_tokens, kv_tokens))
        q = Side(x, q.mask, q.k, q_tokens)  # type: ignore[arg-type]
        kv = Side(x if same else context, kv.mask, kv.k, kv_tokens)  # type: ignore[arg-type]
        return Call(q, kv, call.rotary_emb, routes, call.return_routes)

    def _of_own_experts(self, call: Call, there: Held, plan: Plan) -> tuple[Tensor, Tensor, tuple[Routes, Routes]]:
        """Of all ranks: the sum over experts (B, N, D), in at least float32, and of how many terms (B, N, 1)."""
        q, kv = call.queries, call.keys_values
        options = self.query_router.options
        q_tokens, kv_tokens = (
            own if side.tokens is None else side.tokens for own, side in zip((there.q_tokens, there.kv_tokens), (q, kv))
        )
        unit = call.routes is None and options.straight_through
        if call.routes is None and q.x is kv.x and options.solver != "sigmoid" and plan.routing == plan.dispatch:
            queries, keys_values, q_scores, kv_scores, logits, *made = ops.routed_rows(
                q.x, q_tokens, kv_tokens, there.q_gamma, there.kv_gamma, q.mask, *_decision(call, options),
                plan.dispatch,
            )  # fmt: skip
            q_logits, kv_logits = logits.chunk(2, 1)
            q_indices, q_slots, inverse, kv_indices, kv_slots, *_ = made
            q_routes = Routes(q_indices, q_slots, q_scores, q_logits)
            kv_routes = Routes(kv_indices, kv_slots, kv_scores, kv_logits)
        else:
            if call.routes is None:
                q_routes, kv_routes = (
                    _route(s.x, t, s.k, s.mask, options, None, plan.routing)  # type: ignore[arg-type]
                    for s, t in ((q, q_tokens), (kv, kv_tokens))
                )
            else:
                q_routes, kv_routes = (pack(restrict(r, s.mask)) for r, s in zip(call.routes, (q, kv)))
                q_routes, kv_routes = (
                    r if t is None else r._replace(scores=with_zero_gradient(r.scores, t))
                    for r, t in ((q_routes, q_tokens), (kv_routes, kv_tokens))
                )
            queries = gather(q.x, q_routes, there.q_gamma, plan.dispatch)
            keys_values = gather(kv.x, kv_routes, there.kv_gamma, plan.dispatch)
            inverse = ops.inverse_map(q_routes.indices, q_routes.mask, q.x.shape[1])
        keys = Keys.of(q_routes, kv_routes, call.rotary_emb, plan)
        rows = [t.to(plan.dtype) for t in (queries, keys_values)]
        weights = [t.to(plan.dtype) for t in (*there.matrices, there.null_kv.contiguous())]
        scores, *rest = keys
        y = ops.expert_attention.first(
            *rows, scores, *weights, *rest, self.attn.probability(), unit, plan.routed_attention, plan.dispatch
        )
        wide = torch.promote_types(q.x.dtype, torch.float32)
        routing = q_routes.scores, q_routes.indices, q_routes.mask, inverse
        total = ops.combine(y, *routing, None, None, q.mask, False, wide, plan.mixture)
        total, count = self._summed(total, inverse)
        return total, count, (q_routes, kv_routes)

    def _summed(self, total: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Over the ranks, by one collective; terms are counted only where somebody asks."""
        count = (inverse >= 0).sum(1).to(total.dtype)
        if self.null_routed_token is None and not self.config.average_routed:
            return self.over.ranks.total(total), count[..., None]
        both = self.over.ranks.total(torch.cat((total.reshape(-1), count.reshape(-1))))
        total, counted = both.split((total.numel(), count.numel()))[0].view(total.shape), both[total.numel() :]
        return total, counted.view(*count.shape, 1).detach()

    def _local(self, x: Tensor, mask: Tensor | None, there: Held, plan: Plan) -> Tensor:
        local: Any = self.local_attn
        assert there.local is not None
        return functional_call(local, there.local, (x, mask), {"plan": plan} if _is(local, LocalAttention) else {})

    def _all_routes(self, own: tuple[Routes, Routes], call: Call) -> tuple[Routes, Routes]:
        """Of all experts, one gather a side and kind."""
        found = []
        for routes, side in zip(own, (call.queries, call.keys_values)):
            parts = [self.over.ranks.whole(t) for t in (routes.indices, routes.mask.to(torch.uint8))]
            parts += [self.over.ranks.whole(t) for t in (routes.scores, routes.logits)]
            indices, mask, scores, logits = (t.transpose(0, 1).flatten(1, 2) for t in parts)
            made = Routes(indices, mask.bool(), scores, logits)
            found.append(made if call.routes is not None else in_order(made, side.mask, side.k))
        return found[0], found[1]
