"""`MixtureOfAutoregressiveAttention` whose experts are spread: every rank has all tokens, and E / R experts.

As `optimized.parallel.experts`: one all-reduce forward, of what the experts have, and one backward.

Letters: B batch, N tokens, D model dimension, E experts, R ranks, W block size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized import ops
from optimized.autoregressive import MixtureOfAutoregressiveAttention
from optimized.autoregressive_layout import Order, Places, first_call
from optimized.autoregressive_routing import Decided, own_scores, queries_of, remember, solved_scores
from optimized.parallel.arguments import Spread
from optimized.parallel.causal import READ, attend, near, refuse
from optimized.parallel.experts import as_given, replicated
from optimized.parallel.parameters import Held, held, unattached
from optimized.plan import Plan, bind
from optimized.routing import cosine_scale
from reference.autoregressive_call import check_call


class ExpertParallelCausal(Spread, MixtureOfAutoregressiveAttention):
    """As `ExpertParallel` makes it of a `MixtureOfAutoregressiveAttention`."""

    def forward(
        self,
        x: Any,
        mask: Any = None,
        rotary_emb: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        return_routes: bool = False,
    ) -> Any:
        """As `MixtureOfAutoregressiveAttention.forward`; all arguments are the same on all ranks.

        Neither caches nor routes: a rank has those of its own experts alone.
        """
        over, c = self.over, self.config
        over.refuse_ddp()
        refuse(over.style, cache=cache, use_cache=use_cache, return_routes=return_routes)
        own = replicated("x", x, over)
        mask = check_call(c, own, replicated("mask", mask, over), rotary_emb, None, False, False)
        unattached(self, over.style, READ)
        plan = bind(self._kind(own, False))
        there = held(self, over.ranks, True, alone=True)
        order = None if mask is None else Order.of(mask)
        (shared,) = over.ranks.alike(own)
        shared, tokens = (t if order is None else order.forth(t, plan.dispatch) for t in (shared, own))
        places, decided = self._decided(shared, order, there, plan)
        asked, scores = self._asked(places, decided, None, False)
        y = attend(self.attn, there, (places.x, asked, scores, None, rotary_emb), plan)[0]
        out = over.ranks.total(self._summed(y, decided, own, there, plan))
        out = out + near(self.local_attn, tokens, there, plan)
        if c.average_routed:
            later = torch.arange(own.shape[1], device=own.device) >= c.routed_window_size
            out = out / (1 + c.num_experts * later[:, None])
        out = out.to(own.dtype)
        return as_given(out if order is None else order.back(out, plan.dispatch), x, over)

    def _decided(self, x: Tensor, order: Order | None, there: Held, plan: Plan) -> tuple[Places, Decided]:
        c = self.config
        tokens: Any = (there.q_tokens, there.kv_tokens)
        logits = ops.router_logits(x, torch.cat(tokens), None, cosine_scale(c.options), plan.routing)[0]
        first, second = logits.chunk(2, 1)
        places = first_call(x, (first, second), order, c.blocks(x.shape[1], False), c.routed_window_size)
        queries, limits = queries_of(places, None, c, tokens[0], plan)
        memory = remember(places, None, c, plan, False)
        if c.options.solver == "sigmoid":
            return places, Decided(queries, limits, memory, own_scores(places, None, c.options))
        return places, Decided(queries, limits, memory, solved_scores(places, None, memory, c, tokens[1], plan))

    def _summed(self, y: Tensor, decided: Decided, x: Tensor, there: Held, plan: Plan) -> Tensor:
        """(B, N, D) in at least float32, of the rank's experts; without block 0, which has no queries."""
        c, queries = self.config, decided.queries
        wide = torch.promote_types(x.dtype, torch.float32)
        scores, at, slots = (t.flatten(2) for t in (queries.scores, queries.places, queries.mask))
        nothing = x.new_zeros(x.shape)
        assert there.null is not None
        return ops.blend(
            y, scores, at, slots, queries.inverse, nothing, there.null, None, c.routed_window_size, False, wide,
            plan.mixture,
        )  # fmt: skip
