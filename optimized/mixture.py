"""Mixture of Attention: routing, routed attention, optional local attention, and their combination."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from optimized import ops
from optimized.local_attention import CLASSES as LOCAL
from optimized.local_attention import LocalAttention
from optimized.plain import child, obstacle_to_fusion, parameter
from optimized.plan import Kind, Plan, Request, bind, choose
from optimized.routed_attention import CLASSES as ROUTED
from optimized.routed_attention import RMSNorm, RoutedAttention, rotation
from optimized.routing import Router, Routes, cosine_scale, in_order, solver_of
from reference import contract
from reference.contract import Call, Config, ContextMask, Forward, RouterOptions, Side, TokenMask

CLASSES = {**ROUTED, **LOCAL, Router: ("routing_token",)}


class MixtureOfAttention(nn.Module):
    """Each expert attends over K tokens that its router picked; what they return is added up by token.

    Not causal: routers choose among all tokens of a sequence, and attention looks both ways. No residual: the result
    takes the place of x. No positions without rotary_emb or local attention. Logits of masked tokens, in the routes
    that are returned, are 0.

    Args:
        dim: model dimension D of x.
        num_routed_queries, num_routed_key_values: tokens K that every expert picks; forward can override them.
        num_experts: E.
        dim_context: model dimension of context, default dim. If it differs from dim, forward needs a context.
        local_attn, local_attn_window_size: add attention of every token to its neighbours, |i - j| <= window_size
            (self-attention only). Without it, tokens that no expert picked become a learned null token.
        dim_head, heads: d and H, of both attentions.
        dropout: probability of dropping a weight of the routed attention, in training; `layer.dropout = p` changes it.
        use_triton, flash_attn: True admits Triton kernels and flash-attention kernels where they can run, False keeps
            them out (`explain` tells what is taken).
        prenorm: RMSNorm per expert before routed attention, LayerNorm before local attention.
        average_routed: divide by the number of terms that a token received.
        device, dtype: of the parameters.
        router_options: for both routers, see `RouterOptions`.

    Parameters are on x's device. Matrices and routing tokens have x's dtype, or autocast reconciles the two (it leaves
    float64 alone); scales of norms, null keys and values, the null token may have any floating dtype. Submodules with
    a forward pre-hook, or of another class, may cast what they are given, and are not looked at.

    State dict as of the public package mixture-of-attention 0.0.25. Checkpoints of that package load; outputs agree for
    one expert (with more it mixes experts up). Raises TypeError or ValueError naming the argument, its value and what
    was expected.
    """

    dim: int = contract.of_config("dim")
    dim_context: int = contract.of_config("dim_context")
    num_experts: int = contract.of_config("num_experts")
    num_routed_queries: int = contract.of_config("num_routed_queries")
    num_routed_key_values: int = contract.of_config("num_routed_key_values")
    heads: int = contract.of_config("heads")
    dim_head: int = contract.of_config("dim_head")
    average_routed: bool = contract.of_config("average_routed")
    dropout: float = contract.dropout_within(RoutedAttention)
    if TYPE_CHECKING:
        __call__: Forward

    def __init__(
        self,
        dim: int,
        *,
        num_routed_queries: int,
        num_routed_key_values: int,
        num_experts: int,
        dim_context: int | None = None,
        local_attn: bool = False,
        local_attn_window_size: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        dropout: float = 0.1,
        use_triton: bool = True,
        flash_attn: bool = True,
        prenorm: bool = True,
        average_routed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router_options: Any,
    ) -> None:
        super().__init__()
        contract.floating_dtype("dtype", dtype)
        self.config = c = Config.of(
            dim=dim,
            num_routed_queries=num_routed_queries,
            num_routed_key_values=num_routed_key_values,
            num_experts=num_experts,
            dim_context=dim_context,
            local_attn=local_attn,
            local_attn_window_size=local_attn_window_size,
            dim_head=dim_head,
            heads=heads,
            dropout=dropout,
            use_triton=use_triton,
            flash_attn=flash_attn,
            prenorm=prenorm,
            average_routed=average_routed,
            **router_options,
        )
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        window = c.local_attn_window_size
        self.null_routed_token = nn.Parameter(torch.empty(1, 1, c.dim, **where)) if window is None else None
        self.query_router = Router(c.dim, c.num_experts, c.options, use_triton=c.use_triton, **where)
        self.key_value_router = Router(c.dim_context, c.num_experts, c.options, use_triton=c.use_triton, **where)
        self.attn = RoutedAttention(c, **where)
        self.local_attn = None if window is None else LocalAttention(c, **where)
        self._reset_null_token()

    def _reset_null_token(self) -> None:
        if self.null_routed_token is not None:
            nn.init.normal_(self.null_routed_token)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the constructor did."""
        child: Any
        for child in self.children():
            child.reset_parameters()
        self._reset_null_token()

    @contract.as_forward
    def forward(
        self,
        x: Float[Tensor, "B N D"],
        context: Float[Tensor, "B M Dc"] | None = None,
        mask: TokenMask | None = None,
        context_mask: ContextMask | None = None,
        num_routed_queries: int | None = None,
        num_routed_key_values: int | None = None,
        rotary_emb: Float[Tensor, "P d"] | None = None,
        query_routing_tokens: Float[Tensor, "*Bq E D"] | None = None,
        key_value_routing_tokens: Float[Tensor, "*Bkv E Dc"] | None = None,
        routes: tuple[Routes, Routes] | None = None,
        return_routes: bool = False,
    ) -> Float[Tensor, "B N D"] | tuple[Float[Tensor, "B N D"], tuple[Routes, Routes]]:
        """Self-attention over x, or cross-attention from x to context.

        Args:
            x: (B, N, D) float64, float32, float16 or bfloat16, any strides. B and N may be 0, and so may M.
            context: (B, M, Dc).
            mask, context_mask: (B, N) and (B, M), or (1, N) and (1, M) for all batch items; bool, or integers 1 and 0
                (others are refused on the CPU, and count as 1 elsewhere, where looking would wait for the device).
                False for padding: it takes part in nothing, whatever it holds, and gets 0. It does count in N <= K and
                in the routers' target mass min(K * fetch_k_ratio, N), so padding changes nothing while these stay the
                same.
            num_routed_queries, num_routed_key_values: K for this call.
            rotary_emb: (N, d) angles in any floating dtype, without gradient (self-attention only). Of a longer table
                the first N rows.
            query_routing_tokens, key_value_routing_tokens: (E, D) or (B, E, D); required, and allowed, with
                learned_routing_tokens=True.
            routes: a pair (query, key/value) of decisions that replace the routers'.
            return_routes: return (out, routes); `.load` of each of the two is the number of tokens per expert.
        Returns (B, N, D), dtype and device of x. Raises TypeError or ValueError naming the argument.

        The layer's own routing tokens get gradient 0, not None, where they decide nothing: where N <= K, and with
        injected routes. Submodules are called, with all that is attached to them; only where all of them are as this
        class made them is the same computed by fewer, fused operators (`explain` says which).
        """
        call = contract.check_call(
            self.config,
            {
                "x": x,
                "context": context,
                "mask": mask,
                "context_mask": context_mask,
                "num_routed_queries": num_routed_queries,
                "num_routed_key_values": num_routed_key_values,
                "rotary_emb": rotary_emb,
                "query_routing_tokens": query_routing_tokens,
                "key_value_routing_tokens": key_value_routing_tokens,
                "routes": routes,
                "return_routes": return_routes,
            },
        )
        mask = call.queries.mask
        contract.parameters(self, x, CLASSES)
        fused = self._obstacle_to_fusion(call) is None
        plan = bind(self._kind(call))  # after all checks: a backend may have to be tried
        fused = fused and plan.routing == plan.dispatch
        null = self.null_routed_token  # read once: a parametrization computes it
        if null is not None:
            contract.ordinary("null_routed_token", null)
        if fused:
            if not call.return_routes and self._obstacle_to_one_operator(plan, x.dtype) is None:
                return self._at_once(call, plan, null)
            y, q_routes, kv_routes, inverse = self._fused(call, plan)
        else:
            q_routes, kv_routes = self._decide(call, plan)
            given = (x, call.keys_values.x, q_routes, kv_routes, call.rotary_emb)
            # The scores of a router that is straight-through are 1 or NaN.
            unit = call.routes is None and _straight_through(self.key_value_router)
            own = {"plan": plan, "unit_scores": unit} if _is(self.attn, RoutedAttention) else {}
            y = self.attn(*given, **own)
            inverse = ops.inverse_map(q_routes.indices, q_routes.mask, x.shape[1])
        local = None
        if self.local_attn is not None:
            own = {"plan": plan} if _is(self.local_attn, LocalAttention) else {}
            local = self.local_attn(x, mask, **own)
        routing = q_routes.scores, q_routes.indices, q_routes.mask, inverse
        out = ops.combine(y, *routing, local, null, mask, self.config.average_routed, x.dtype, plan.mixture)
        if not return_routes:
            return out
        if fused:  # whose operator has valid slots first, always
            q_routes, kv_routes = (
                in_order(q_routes, mask, call.queries.k),
                in_order(kv_routes, mask, call.keys_values.k),
            )
        return out, (q_routes, kv_routes)

    def _at_once(self, call: Call, plan: Plan, null: Tensor | None) -> Tensor:
        """All of it as one operator."""
        attn, options = child(self, "attn"), child(self, "query_router").options
        *routed, mask = self._routed(call)
        return ops.mixture.first(
            *routed,
            *attn.fused_parameters(plan),
            null,
            mask,
            *rotation(call.rotary_emb, plan),
            *_decision(call, options),
            attn.probability(),
            self.config.average_routed,
            plan.routed_attention,
            plan.dispatch,
            plan.mixture,
        )

    def _routed(self, call: Call) -> tuple[Tensor | None, ...]:
        """x, routing tokens, scales of the norms, and mask."""
        q, kv, attn = call.queries, call.keys_values, child(self, "attn")
        ours, theirs = child(self, "query_router"), child(self, "key_value_router")
        norm, context_norm = child(attn, "norm"), child(attn, "context_norm")
        given = ours.options.learned_routing_tokens
        return (
            q.x,
            q.tokens if given else parameter(ours, "routing_token"),
            kv.tokens if given else parameter(theirs, "routing_token"),
            None if norm is None else parameter(norm, "gamma"),
            None if context_norm is None else parameter(context_norm, "gamma"),
            q.mask,
        )

    def _obstacle_to_one_operator(self, plan: Plan, dtype: torch.dtype) -> str | None:
        """Why what `_obstacle_to_fusion` finds no fault with takes three operators all the same."""
        if self.local_attn is not None:
            return "local attention is added"
        if plan.dtype != dtype:
            return "autocast computes in another dtype"
        return child(self, "attn").obstacle_to_fusion()

    def _fused(self, call: Call, plan: Plan) -> tuple[Tensor, Routes, Routes, Tensor]:
        """Both routers, both gathers and both norms as one operator: what the experts have, routes, and inverse map."""
        attn, options = self.attn, self.query_router.options
        queries, keys_values, q_scores, kv_scores, logits, *made = ops.routed_rows(
            *self._routed(call), *_decision(call, options), plan.dispatch
        )
        q_indices, q_slots, inverse, kv_indices, kv_slots, *_ = made
        q_logits, kv_logits = logits.chunk(2, 1)
        q_routes = Routes(q_indices, q_slots, q_scores, q_logits)
        kv_routes = Routes(kv_indices, kv_slots, kv_scores, kv_logits)
        unit = options.straight_through
        y = attn.attend(queries, keys_values, q_routes, kv_routes, call.rotary_emb, plan, unit)
        return y, q_routes, kv_routes, inverse

    def _decide(self, call: Call, plan: Plan) -> tuple[Routes, Routes]:
        """By the routers, called as modules, or as injected."""
        sides = call.queries, call.keys_values
        routers = self.query_router, self.key_value_router
        q_routes, kv_routes = (
            _decide(router, side, routes, plan)
            for router, side, routes in zip(routers, sides, call.routes or (None, None))
        )
        return q_routes, kv_routes

    def _obstacle_to_fusion(self, call: Call) -> str | None:
        """Why the modules before the attention are called one by one; None where one operator does the same, by the
        same backend.
        """
        q, kv = call.queries, call.keys_values
        if call.routes is not None:
            return "routes are injected"
        if kv.x is not q.x or kv.mask is not q.mask:
            return "keys and values come from a context"
        ours, theirs, attn = child(self, "query_router"), child(self, "key_value_router"), child(self, "attn")
        found = obstacle_to_fusion(
            query_router=(ours, Router), key_value_router=(theirs, Router), attn=(attn, RoutedAttention)
        )
        if found is not None:
            return found
        # torch.compile, to which their numbers may be symbolic, is asked for no comparison.
        if ours.options is not theirs.options and (torch.compiler.is_compiling() or ours.options != theirs.options):
            return "the routers have different options"
        norms = {f"attn.{name}": (child(attn, name), RMSNorm) for name in ("norm", "context_norm")}
        return obstacle_to_fusion(**norms)

    def _kind(self, call: Call) -> Kind:
        """What decides between backends in a call."""
        attn = child(self, "attn")
        local = () if self.local_attn is None else ("local_attention",)
        return Kind(
            call.queries.x.device,
            call.queries.x.dtype,
            ("routing", "dispatch", "routed_attention", *local, "mixture"),
            dim_head=self.config.dim_head,
            masked=call.keys_values.mask is not None or call.routes is not None,
            token_mask=call.queries.mask is not None,
            dropout=self.dropout if attn.training else 0.0,
            allow_flash=self.config.flash_attn,
            allow_triton=self.config.use_triton,
        )

    def kind_of_call(self, x: Any, **forward_arguments: Any) -> tuple[Kind, str]:
        """For `explain`: what decides between backends in `self(x, **forward_arguments)`, and which path it takes."""
        given = inspect.signature(MixtureOfAttention.forward).bind(self, x, **forward_arguments)
        given.apply_defaults()
        call = contract.check_call(self.config, given.arguments)
        contract.parameters(self, x, CLASSES)
        kind = self._kind(call)
        plan = bind(kind)
        reasons = [self._obstacle_to_fusion(call)]
        if reasons[0] is None and plan.routing != plan.dispatch:
            reasons = ["routing and dispatch have different backends"]
        for name, module in (("attn", self.attn), ("local_attn", self.local_attn)):
            if isinstance(module, (RoutedAttention, LocalAttention)):
                found = module.obstacle_to_fusion()
                reasons.append(found and f"{name}.{found}")
        return kind, "; ".join(r for r in reasons if r) or "fused"

    def extra_repr(self) -> str:
        names = (
            "dim num_routed_queries num_routed_key_values num_experts dim_context heads dim_head dropout average_routed"
        )
        return ", ".join(f"{name}={getattr(self, name)}" for name in names.split())


def _decision(call: Call, options: RouterOptions) -> tuple[Any, ...]:
    """What operators are told of how to choose, checked for logits of x's dtype."""
    if options.beyond_float32 is not None:
        contract.solvable(options, call.queries.x.dtype)
    return call.queries.k, call.keys_values.k, options.route_block_size, cosine_scale(options), *solver_of(options)


def _decide(router: nn.Module, side: Side, injected: Routes | None, plan: Plan) -> Routes:
    """A router of this package is called with injected routes too: hooks and FSDP see every call."""
    if _is(router, Router):
        return router(side.x, side.k, side.mask, side.tokens, routes=injected, plan=plan)
    if injected is None:
        return router(side.x, side.k, side.mask, side.tokens)
    return router(side.x, side.k, side.mask, routes=injected)


def _is(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether it takes what only a layer's own modules take: a class that FSDP or a user derived does, too."""
    return isinstance(module, cls) and type(module).forward is cls.forward and "forward" not in vars(module)


def _straight_through(router: nn.Module) -> bool:
    return isinstance(router, Router) and _is(router, Router) and router.options.straight_through


def combine(
    y: Float[Tensor, "B E Kq D"],
    q_routes: Routes,
    n: int,
    *,
    local: Float[Tensor, "B N D"] | None = None,
    average_routed: bool = False,
    null_routed_token: Float[Tensor, " D"] | None = None,
    mask: TokenMask | None = None,
) -> Float[Tensor, "B N D"]:
    """Add up what the experts, and local attention, have for each of n tokens.

    average_routed divides by the number of terms (at least 1); null_routed_token (D) replaces tokens without any;
    tokens masked by mask (B, N) become 0. Summed in at least float32, in the order of the experts; returned in y's
    dtype.
    Raises TypeError or ValueError naming the argument.
    """
    mask = contract.combine_input(y, q_routes, n, local, average_routed, null_routed_token, mask)
    n = contract.integer("n", n, least=0)
    inverse = ops.inverse_map(q_routes.indices, q_routes.mask, n)
    ones = torch.ones_like(q_routes.scores)  # y has its scores already
    triton = choose("mixture", Request(y.device, y.dtype)).triton
    routing = ones, q_routes.indices, q_routes.mask, inverse
    y = y.transpose(0, 1)
    return ops.combine(y, *routing, local, null_routed_token, mask, average_routed, y.dtype, triton)
