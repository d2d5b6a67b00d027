"""Strictly causal Mixture of Attention: what a token gets depends on it and on tokens before it, and on nothing else.

Without a mask and a cache tokens stay where they are. With a mask the valid ones are moved to the front, and the output
back; with a cache they are laid out behind the unfinished block (`autoregressive_layout`). Nothing asks the device.

Letters: B batch, N tokens of a call, D model dimension, E experts, H heads, d head dimension, W block size, K slots of
memory, C slots for queries in a block, J blocks.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from optimized import ops
from optimized.autoregressive_attention import CLASSES as ROUTED
from optimized.autoregressive_attention import Asked, MemoryAttention
from optimized.autoregressive_cache import Cache, StaticCache
from optimized.autoregressive_layout import Order, Places, continued, first_call
from optimized.autoregressive_local import CLASSES as LOCAL
from optimized.autoregressive_local import CausalLocalAttention
from optimized.autoregressive_results import after, routes_of
from optimized.autoregressive_routing import (
    Decided,
    LogitsRouter,
    both_logits,
    fusable,
    own_scores,
    queries_of,
    remember,
    routed_now,
    solved_scores,
    stored_scores,
)
from optimized.autoregressive_step import fused_step, obstacle_to_fused_step
from optimized.plan import Kind, Plan, bind
from optimized.routed_attention import RoutedAttention
from reference import contract
from reference.autoregressive_call import check_call
from reference.autoregressive_contract import AutoregressiveConfig
from reference.contract import Config, TokenMask

CLASSES: contract.Classes = {**ROUTED, **LOCAL, LogitsRouter: ("routing_token",)}


class MixtureOfAutoregressiveAttention(nn.Module):
    """Strictly causal Mixture of Attention: each expert remembers the K best tokens of the blocks before.

    out[t] and all its derivatives depend on x[<= t] only. No residual: the result takes the place of x. No positions
    but through local attention and rotary_emb.

    Args:
        dim: model dimension D.
        num_routed_queries: Kq, tokens of a block that every expert updates, about: the threshold is that of the block
            before. From routed_window_size on every token is routed.
        num_routed_key_values: K, tokens that every expert remembers.
        local_attn_window_size: w. routed_window_size: W (default w). More than w + 1 leaves tokens of the own block
            that neither branch sees.
        dim_head, heads: d and H of the routed attention. local_attn_heads: of the local one (default heads).
        dropout: on the probabilities of the routed attention, in training; `layer.dropout = p` changes it.
        capacity_factor: at most min(W, ceil(capacity_factor * Kq)) queries of a block have a slot.
        use_triton, flash_attn, prenorm, average_routed: as of `MixtureOfAttention`.
        solver: scores of routed tokens. "sigmoid" couples no tokens, and every routed token has a gradient. With
            "iterative" and "exact" tokens that saturate have none, and a threshold saturates many.
        straight_through, cosine_sim_routing, cosine_sim_scale, router_options: see `RouterOptions`. Raw dot products
            are soon so large that a sigmoid of the chosen is 1 in float32: hence scaled cosines.
    State: null_tokens (E, D), query_router, key_value_router, attn, local_attn, as of the public package
    mixture-of-attention 0.0.25, whose checkpoints load (with as many local heads as heads); outputs differ, its leak.
    Raises TypeError or ValueError naming the argument.
    """

    dropout: float = contract.dropout_within(RoutedAttention)

    def __init__(
        self,
        dim: int,
        *,
        num_routed_queries: int,
        num_routed_key_values: int,
        local_attn_window_size: int,
        routed_window_size: int | None = None,
        num_experts: int = 2,
        dim_head: int = 64,
        heads: int = 8,
        local_attn_heads: int | None = None,
        dropout: float = 0.0,
        capacity_factor: float = 2.0,
        use_triton: bool = True,
        flash_attn: bool = True,
        prenorm: bool = True,
        average_routed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        solver: str = "sigmoid",
        straight_through: bool = False,
        cosine_sim_routing: bool = True,
        cosine_sim_scale: float = 8.0,
        **router_options: Any,
    ) -> None:
        super().__init__()
        contract.floating_dtype("dtype", dtype)
        self.config = c = AutoregressiveConfig.of(
            dim=dim,
            num_routed_queries=num_routed_queries,
            num_routed_key_values=num_routed_key_values,
            local_attn_window_size=local_attn_window_size,
            routed_window_size=routed_window_size,
            num_experts=num_experts,
            dim_head=dim_head,
            heads=heads,
            local_attn_heads=local_attn_heads,
            dropout=dropout,
            capacity_factor=capacity_factor,
            use_triton=use_triton,
            flash_attn=flash_attn,
            prenorm=prenorm,
            average_routed=average_routed,
            solver=solver,
            straight_through=straight_through,
            cosine_sim_routing=cosine_sim_routing,
            cosine_sim_scale=cosine_sim_scale,
            **router_options,
        )
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        routed = Config(
            c.dim, c.num_routed_queries, c.num_routed_key_values, c.num_experts, c.dim, c.local_attn_window_size,
            c.dim_head, c.heads, c.dropout, c.use_triton, c.flash_attn, c.prenorm, c.average_routed, c.options,
        )  # fmt: skip
        router = c.dim, c.num_experts, c.options
        self.null_tokens = nn.Parameter(torch.empty(c.num_experts, c.dim, **where))
        self.query_router = LogitsRouter(*router, use_triton=c.use_triton, **where)
        self.key_value_router = LogitsRouter(*router, use_triton=c.use_triton, **where)
        self.attn = MemoryAttention(routed, **where)
        self.local_attn = CausalLocalAttention(replace(routed, heads=c.local_attn_heads), **where)
        nn.init.zeros_(self.null_tokens)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the constructor did."""
        for part in (self.query_router, self.key_value_router, self.attn, self.local_attn):
            part.reset_parameters()
        nn.init.zeros_(self.null_tokens)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        mask: TokenMask | None = None,
        rotary_emb: Float[Tensor, "P d"] | None = None,
        cache: Cache | None = None,
        use_cache: bool = False,
        return_routes: bool = False,
    ) -> Any:
        """The layer's output for x, which begins a sequence or continues that of `cache`.

        Args:
            x: (B, N, D). mask: (B, N) or (1, N), bool or integers 1 and 0; False for padding, wherever it stands: it
                is no token, advances no cache and gets 0.
            rotary_emb: (P, d) angles by position, without gradient; P at least the tokens ever passed to this cache,
                masked ones included. In all calls of a cache or in none.
            cache: of the call before; it is not changed. use_cache: return one. return_routes: return (query routes,
                memory routes).
        Returns out (B, N, D) in x's dtype, or (out, cache, routes) as far as asked for, in this order.
        Raises TypeError or ValueError naming the argument.
        """
        c = self.config
        if isinstance(cache, StaticCache):
            contract.reject("cache", "a Cache, as `value()` of a StaticCache is", "a StaticCache", TypeError)
        mask = check_call(c, x, mask, rotary_emb, cache, use_cache, return_routes)
        n = x.shape[1]
        contract.parameters(self, x, CLASSES)
        plan = bind(self._kind(x, cache is not None))  # after all checks: a backend may have to be tried
        null_tokens = self.null_tokens  # read once: a parametrization computes it
        contract.ordinary("null_tokens", null_tokens)

        order = None if mask is None else Order.of(mask)
        tokens = x if order is None else order.forth(x, plan.dispatch)
        logits = both_logits((self.query_router, self.key_value_router), tokens, plan)
        blocks = c.blocks(n, cache is not None)
        if cache is None:
            places = first_call(tokens, logits, order, blocks, c.routed_window_size)
        else:
            places = continued(tokens, logits, order, cache, blocks, plan.dispatch)
        decided = self._decide(places, cache, plan, use_cache)
        y, kv = self._attend(places, decided, cache, use_cache, rotary_emb, plan)
        given = {"plan": plan} if _is(self.local_attn, CausalLocalAttention) else {}
        local, *near = self.local_attn(tokens, cache, use_cache, **given)
        out = self._blend(y, places, decided, local, null_tokens, cache, x.dtype, plan)
        if order is not None:
            out = order.back(out, plan.dispatch)
        results: list[Any] = [out]
        if use_cache or return_routes:
            decided = decided.of_all_blocks()
        if use_cache:
            count = x.new_full((x.shape[0],), n, dtype=torch.int64) if order is None else order.mask.sum(1)
            past = Cache.empty(c, x, rotary_emb is not None) if cache is None else cache
            assert kv is not None
            results.append(after(past, count, n, places, decided, (kv, near), cache is not None))
        if return_routes:
            results.append(routes_of(places, decided, logits, order, cache, c))
        return results[0] if len(results) == 1 else tuple(results)

    @torch.no_grad()
    def step(
        self,
        x: Float[Tensor, "B 1 D"],
        cache: StaticCache,
        rotary_emb: Float[Tensor, "P d"] | None = None,
        border: bool = False,
    ) -> Float[Tensor, "B 1 D"]:
        """One more token of every item, without gradients; the cache is changed in place, its sizes are not.

        border: an item may begin a block with this token (`cache.due()`); right for any mixture of lengths, and many
        times as much work, as any step is whose `attn` or `local_attn` was replaced by a module of another class.
        Without it no item may, and that is not looked at: nothing waits for the device. Capture a
        step of either kind in a CUDA graph, and replay that with a border where one is due: with items of one length,
        once every routed_window_size tokens.
        rotary_emb: as many rows as tokens will ever be passed. Raises TypeError or ValueError naming the argument.
        """
        c = self.config
        if not isinstance(cache, StaticCache):
            contract.reject("cache", "a StaticCache, as `cache.static()` makes it", contract.describe(cache), TypeError)
        check_call(c, x, None, rotary_emb, cache, contract.flag("border", border), False)
        if x.shape[1] != 1:
            contract.reject("x", "one token of every item", x)
        contract.parameters(self, x, CLASSES)
        own = isinstance(self.attn, MemoryAttention) and isinstance(self.local_attn, CausalLocalAttention)
        if border or not own:  # other modules write nothing into these buffers
            out, later = self(x, rotary_emb=rotary_emb, cache=cache.copied(), use_cache=True)
            cache.put(later)
            return out
        plan = bind(self._kind(x, False))
        if obstacle_to_fused_step(self, x, cache, rotary_emb, plan) is None:
            return fused_step(self, x, cache, rotary_emb)
        logits = both_logits((self.query_router, self.key_value_router), x, plan)
        place = cache.append(x, logits)
        routed, q_scores = routed_now(cache, place, c)
        held = (cache.positions >= 0).sum(-1, dtype=torch.int32)[..., None]
        nowhere = routed.new_zeros(*routed.shape, 1, 1, dtype=torch.int64)
        inverse = routed.int()[..., None] - 1
        ones = torch.ones_like(held)
        asked = Asked(nowhere, routed[..., None, None], inverse, None, held, ones, cache.length[:, None], None)
        stored, scores = (cache.keys, cache.values), stored_scores(cache, c)
        given = {"plan": plan} if _is(self.attn, MemoryAttention) else {}
        y, _ = self.attn(x, asked, scores, stored, rotary_emb, **given)
        given = {"plan": plan} if _is(self.local_attn, CausalLocalAttention) else {}
        local, *_ = self.local_attn(x, cache, **given)
        slots = nowhere[..., 0], routed[..., None]
        out = ops.blend(
            y, q_scores[..., None], *slots, inverse, local, self.null_tokens, cache.length, c.routed_window_size,
            c.average_routed, x.dtype, plan.mixture,
        )  # fmt: skip
        cache.advance()
        return out

    def _decide(self, places: Places, past: Cache | None, plan: Plan, watched: bool) -> Decided:
        c = self.config
        tokens = [getattr(router, "routing_token", None) for router in (self.query_router, self.key_value_router)]
        queries, limits = queries_of(places, past, c, tokens[0], plan)
        memory = remember(places, past, c, plan, watched)
        if c.options.solver == "sigmoid":
            return Decided(queries, limits, memory, own_scores(places, past, c.options))
        return Decided(queries, limits, memory, solved_scores(places, past, memory, c, tokens[1], plan))

    def _attend(
        self,
        places: Places,
        decided: Decided,
        cache: Cache | None,
        kept: bool,
        rotary_emb: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor | None]:
        """What the experts have, (E, B, Q, D), and keys and values of all columns, at least if they are to be kept.

        Without block 0 of a sequence.
        """
        asked, scores = self._asked(places, decided, cache, kept)
        stored = None if cache is None else (cache.keys, cache.values)
        given = {"plan": plan} if _is(self.attn, MemoryAttention) else {}
        return self.attn(places.x, asked, scores, stored, rotary_emb, **given)

    def _asked(self, places: Places, decided: Decided, cache: Cache | None, kept: bool) -> tuple[Asked, Tensor]:
        """What the routed attention is asked, and the scores of the keys. kept: these are wanted, of all columns."""
        m, device = places.x.shape[1], places.x.device
        queries, memory, scores = decided.queries, decided.memory, decided.scores
        if cache is None and scores.ndim == 3:
            scores = scores[..., :m]
        asked = Asked(
            queries.places,
            queries.mask,
            queries.inverse,
            memory.columns,
            memory.counts,
            queries.counts,
            None if places.start is None else places.start[:, None] + torch.arange(m, device=device),
            None if cache is not None or kept else (self.config.routed_window_size,) * 2,
        )
        if places.filled is not None:  # what has a slot already is not asked again
            new = torch.arange(m, device=device) >= places.filled[:, None]
            asked = asked._replace(inverse=queries.inverse.masked_fill(~new[:, None], -1))
        return asked, scores

    def _blend(
        self,
        y: Tensor,
        places: Places,
        decided: Decided,
        local: Tensor,
        null_tokens: Tensor,
        cache: Cache | None,
        dtype: torch.dtype,
        plan: Plan,
    ) -> Tensor:
        """(B, N, D), valid tokens first."""
        c, n, queries = self.config, local.shape[1], decided.queries
        inverse, begin, at = queries.inverse, None, queries.places
        if cache is not None:
            assert places.filled is not None
            new = places.filled[:, None] + torch.arange(n, device=local.device)
            inverse, begin = inverse.gather(-1, new[:, None].expand(-1, c.num_experts, -1)), cache.length
            at = (at - places.filled[:, None, None, None]).clamp_min(0)
        at, slots, scores = (t.flatten(2) for t in (at, queries.mask, queries.scores))
        return ops.blend(
            y, scores, at, slots, inverse, local, null_tokens, begin, c.routed_window_size,
            c.average_routed, dtype, plan.mixture,
        )  # fmt: skip

    def _kind(self, x: Tensor, continued: bool) -> Kind:
        """What decides between backends in a call."""
        return Kind(
            x.device,
            x.dtype,
            ("routing", "dispatch", "routed_attention", "local_attention", "mixture"),
            dim_head=self.config.dim_head,
            masked=True,
            token_mask=continued,
            dropout=self.dropout if self.attn.training else 0.0,
            allow_flash=self.config.flash_attn,
            allow_triton=self.config.use_triton,
        )

    def kind_of_call(self, x: Any, **forward_arguments: Any) -> tuple[Kind, str]:
        """For `explain`: what decides between backends in `self(x, **forward_arguments)`, and which path it takes."""
        given = inspect.signature(MixtureOfAutoregressiveAttention.forward).bind(self, x, **forward_arguments)
        given.apply_defaults()
        arguments = {name: value for name, value in given.arguments.items() if name != "self"}
        check_call(self.config, *arguments.values())
        contract.parameters(self, x, CLASSES)
        kind = self._kind(x, arguments["cache"] is not None)
        bind(kind)
        reasons = [fusable((self.query_router, self.key_value_router))]
        for name, module in (("attn", self.attn), ("local_attn", self.local_attn)):
            if isinstance(module, (MemoryAttention, CausalLocalAttention)):
                found = module.obstacle_to_fusion()
                reasons.append(found and f"{name}.{found}")
        return kind, "; ".join(r for r in reasons if r) or "fused"

    def extra_repr(self) -> str:
        names = "dim num_routed_queries num_routed_key_values local_attn_window_size routed_window_size num_experts"
        return ", ".join(f"{name}={getattr(self.config, name)}" for name in names.split())


def _is(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether it takes what only a layer's own modules take: a class that FSDP or a user derived does, too."""
    return isinstance(module, cls) and type(module).forward is cls.forward and "forward" not in vars(module)
