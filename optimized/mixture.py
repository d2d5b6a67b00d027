"""Mixture of Attention: routing, routed attention, optional local attention, and their combination."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from optimized import ops, validation
from optimized.backends import Request, choose
from optimized.local_attention import LocalAttention
from optimized.routed_attention import RoutedAttention, pack
from optimized.routing import Router, Routes, route_both
from optimized.validation import RouterOptions, flag, positive_int, reject


class MixtureOfAttention(nn.Module):
    """Each expert attends over K tokens that its router picked; the results are added back into the sequence.

    Args:
        dim: model dimension D of x.
        num_routed_queries, num_routed_key_values: tokens K that every expert picks; forward can override them.
        num_experts: E.
        dim_context: model dimension of context, default dim. If it differs from dim, forward needs a context.
        local_attn, local_attn_window_size: add attention of every token to its neighbours, |i - j| <= window_size
            (self-attention only). Without it, tokens that no expert picked become a learned null token.
        dim_head, heads: d and H, of both attentions.
        dropout: probability of dropping a weight of the routed attention, in training.
        use_triton, flash_attn: True admits Triton kernels and flash-attention kernels where they can run, False keeps
            them out (`explain` tells what is taken).
        prenorm: RMSNorm per expert before routed attention, LayerNorm before local attention.
        average_routed: divide by the number of terms that a token received.
        device, dtype: of the parameters.
        router_options: for both routers, see `RouterOptions`.

    State dict as of the public package mixture-of-attention 0.0.25. Checkpoints of that package load; outputs agree for
    one expert (with more it mixes experts up). Raises TypeError or ValueError naming the argument, its value and what
    was expected.
    """

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
        self.dim = positive_int("dim", dim)
        self.num_routed_queries = positive_int("num_routed_queries", num_routed_queries)
        self.num_routed_key_values = positive_int("num_routed_key_values", num_routed_key_values)
        self.num_experts = positive_int("num_experts", num_experts)
        self.dim_context = self.dim if dim_context is None else positive_int("dim_context", dim_context)
        self.dim_head = positive_int("dim_head", dim_head)
        self.heads = positive_int("heads", heads)
        self.dropout = validation.probability("dropout", dropout)
        self.use_triton = flag("use_triton", use_triton)
        self.flash_attn = flag("flash_attn", flash_attn)
        self.average_routed = flag("average_routed", average_routed)
        flag("prenorm", prenorm)
        if flag("local_attn", local_attn):
            local_attn_window_size = positive_int("local_attn_window_size", local_attn_window_size)
            if self.dim_head % 2:
                reject("dim_head", "an even number with local attention (rotary embedding)", dim_head)
            if self.dim_context != self.dim:
                reject("dim_context", f"dim = {dim} with local_attn (self-attention only)", dim_context)
        elif local_attn_window_size is not None:
            reject("local_attn_window_size", "None without local_attn=True", local_attn_window_size)
        if dtype is not None and dtype not in validation.FLOATING:
            reject("dtype", "float64, float32, float16 or bfloat16", dtype, TypeError)
        options = RouterOptions.of_module(router_options)

        where: dict[str, Any] = {"device": device, "dtype": dtype}
        shared: dict[str, Any] = {
            "dim_head": self.dim_head,
            "heads": self.heads,
            "prenorm": prenorm,
            "flash_attn": flash_attn,
            "use_triton": use_triton,
            **where,
        }
        self.null_routed_token = None if local_attn else nn.Parameter(torch.empty(1, 1, self.dim, **where))
        self.query_router = Router(self.dim, self.num_experts, options, use_triton=use_triton, **where)
        self.key_value_router = Router(self.dim_context, self.num_experts, options, use_triton=use_triton, **where)
        self.attn = RoutedAttention(self.dim, self.dim_context, self.num_experts, dropout=self.dropout, **shared)
        self.local_attn = LocalAttention(self.dim, local_attn_window_size, **shared) if local_attn else None
        self._reset_null_token()

    def _reset_null_token(self) -> None:
        if self.null_routed_token is not None:
            nn.init.normal_(self.null_routed_token)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the constructor did."""
        for child in self.children():
            child.reset_parameters()
        self._reset_null_token()

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        context: Float[Tensor, "B M Dc"] | None = None,
        mask: Bool[Tensor, "B N"] | None = None,
        context_mask: Bool[Tensor, "B M"] | None = None,
        num_routed_queries: int | None = None,
        num_routed_key_values: int | None = None,
        rotary_emb: Float[Tensor, "N d"] | None = None,
        query_routing_tokens: Float[Tensor, "*Bq E D"] | None = None,
        key_value_routing_tokens: Float[Tensor, "*Bkv E Dc"] | None = None,
        routes: tuple[Routes, Routes] | None = None,
        return_routes: bool = False,
    ) -> Float[Tensor, "B N D"] | tuple[Float[Tensor, "B N D"], tuple[Routes, Routes]]:
        """Self-attention over x, or cross-attention from x to context.

        Args:
            x: (B, N, D) float64, float32, float16 or bfloat16, any strides. B and N may be 0, and so may M.
            context: (B, M, Dc).
            mask, context_mask: bool (B, N) and (B, M), False for padding: it takes part in nothing, whatever it holds,
                and gets 0. It does count in N <= K and in the routers' target mass min(K * fetch_k_ratio, N), so
                padding changes nothing while these stay the same.
            num_routed_queries, num_routed_key_values: K for this call.
            rotary_emb: (N, d) angles in float32 or float64, without gradient (self-attention only).
            query_routing_tokens, key_value_routing_tokens: (E, D) or (B, E, D); required, and allowed, with
                learned_routing_tokens=True.
            routes: a pair (query, key/value) of decisions that replace the routers'.
            return_routes: return (out, routes); `.load` of each of the two is the number of tokens per expert.
        Returns (B, N, D), dtype and device of x. Raises TypeError or ValueError naming the argument. Routing tokens get
        no gradient (None) where N <= K, since nothing is chosen, nor with injected routes.
        """
        k_q, k_kv = self._check(
            x, context, mask, context_mask, num_routed_queries, num_routed_key_values, rotary_emb, routes
        )
        self._check_tokens(x, query_routing_tokens, key_value_routing_tokens, routes)
        flag("return_routes", return_routes)
        if context is None:
            context, context_mask = x, mask
        masked = context_mask is not None or routes is not None
        # A chosen backend that can't serve raises here, before any work.
        chosen = {
            stage: choose(stage, request) for stage, request in self._requests(x, masked, mask is not None).items()
        }
        no_choice = context.shape[1] <= k_kv
        unit_scores = routes is None and (no_choice or self.query_router.options.straight_through)
        alike = routes is None and context is x and context_mask is mask
        by_triton = chosen["routing"].triton and chosen["dispatch"].triton
        if alike and by_triton and self._chooses_from_rows(x.shape[1], max(k_q, k_kv)):
            tokens = query_routing_tokens, key_value_routing_tokens
            routers = self.query_router, self.key_value_router
            queries, keys_values, q_routes, kv_routes, q_inverse = route_both(
                x, routers, tokens, self.attn.gammas(), (k_q, k_kv), mask
            )
            y = self.attn.attend(queries, keys_values, q_routes, kv_routes, rotary_emb, masked, unit_scores)
        else:
            if routes is None:
                q_routes, q_inverse = self.query_router.decide(x, k_q, mask, query_routing_tokens)
                kv_routes, kv_inverse = self.key_value_router.decide(
                    context, k_kv, context_mask, key_value_routing_tokens
                )
            else:
                q_routes, kv_routes = _restrict(routes[0], mask), _restrict(routes[1], context_mask)
                q_inverse = ops.inverse_map(q_routes.indices, q_routes.mask, x.shape[1])
            packed = kv_routes
            if masked and (routes is not None or no_choice):
                # A router's choice is packed already, unless there was nothing to choose.
                packed = pack(kv_routes)
                kv_inverse = ops.inverse_map(packed.indices, packed.mask, context.shape[1])
            y = self.attn(x, context, q_routes, packed, q_inverse, kv_inverse, rotary_emb, masked, unit_scores)
        local = None if self.local_attn is None else self.local_attn(x, mask)
        out = _combine(
            y, q_routes, q_inverse, local, self.average_routed, self.null_routed_token, mask, x.dtype,
            allow_triton=self.use_triton,
        )  # fmt: skip
        return (out, (q_routes, kv_routes)) if return_routes else out

    def _chooses_from_rows(self, n: int, k: int) -> bool:
        """Whether both routers have a choice, over whole rows: `route_both` does no more."""
        width = self.query_router.options.route_block_size
        return n > k and (width is None or width >= n)

    def _requests(self, x: Tensor, masked: bool, token_mask: bool) -> dict[str, Request]:
        """What a call asks of each stage. masked: keys of the routed attention may have to be hidden.

        token_mask: x comes with a mask.
        """
        dtype, device = x.dtype, x.device
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
        exact = torch.promote_types(x.dtype, torch.float32)
        dropout = self.dropout if self.training else 0.0
        allowed = {"allow_flash": self.flash_attn, "allow_triton": self.use_triton}
        requests = {
            "routing": Request(device, exact, **allowed),
            "dispatch": Request(device, x.dtype, **allowed),
            "routed_attention": Request(device, dtype, self.dim_head, masked, dropout, **allowed),
            "mixture": Request(device, dtype, **allowed),
        }
        if self.local_attn is not None:
            empty = x.numel() == 0
            local = Request(device, dtype, self.dim_head, token_mask, 0.0, empty, **allowed)
            requests["local_attention"] = local
        return requests

    def _check(
        self,
        x: Any,
        context: Any,
        mask: Any,
        context_mask: Any,
        num_routed_queries: Any,
        num_routed_key_values: Any,
        rotary_emb: Any,
        routes: Any,
    ) -> tuple[int, int]:
        weight = self.attn.to_q.weight
        validation.tensor("x", x, "B", "N", self.dim, beside=weight, dtype_of=("the layer's parameters", weight))
        validation.token_mask("mask", mask, x)
        if context is None:
            if self.dim_context != self.dim:
                reject("context", f"a tensor (B, M, {self.dim_context}), since dim_context != dim", None)
            if context_mask is not None:
                reject("context_mask", "None without context", context_mask)
        else:
            if self.local_attn is not None:
                reject("context", "None with local_attn=True (self-attention only)", context)
            validation.tensor("context", context, x.shape[0], "M", self.dim_context, beside=x, dtype_of=("x", x))
            validation.token_mask("context_mask", context_mask, context)
            if rotary_emb is not None:
                reject("rotary_emb", "None with a context (self-attention only)", rotary_emb)
        validation.rotary(rotary_emb, x, self.dim_head)
        if routes is not None:
            if not (isinstance(routes, (tuple, list)) and len(routes) == 2):
                reject("routes", "a pair (query routes, key/value routes)", routes, TypeError)
            for i, tokens in enumerate((x, x if context is None else context)):
                validation.routes(f"routes[{i}]", routes[i], x.shape[0], self.num_experts, tokens.shape[1], x)
        overrides = {"num_routed_queries": num_routed_queries, "num_routed_key_values": num_routed_key_values}
        k_q, k_kv = (getattr(self, n) if v is None else positive_int(n, v) for n, v in overrides.items())
        return k_q, k_kv

    def _check_tokens(self, x: Tensor, query: Any, key_value: Any, routes: Any) -> None:
        for name, router, tokens in (
            ("query_routing_tokens", self.query_router, query),
            ("key_value_routing_tokens", self.key_value_router, key_value),
        ):
            if routes is None:
                router.check_tokens(name, tokens, x)
            elif tokens is not None:
                reject(name, "None with injected routes", tokens)

    def extra_repr(self) -> str:
        names = (
            "dim num_routed_queries num_routed_key_values num_experts dim_context heads dim_head dropout average_routed"
        )
        return ", ".join(f"{name}={getattr(self, name)}" for name in names.split())


def _restrict(routes: Routes, mask: Tensor | None) -> Routes:
    """Injected routes less the slots that hold masked tokens."""
    if mask is None:
        return routes
    tokens = mask[:, None].expand(*routes.indices.shape[:2], -1)
    return routes._replace(mask=routes.mask & tokens.gather(-1, routes.indices))


def combine(
    y: Float[Tensor, "B E Kq D"],
    q_routes: Routes,
    n: int,
    *,
    local: Float[Tensor, "B N D"] | None = None,
    average_routed: bool = False,
    null_routed_token: Float[Tensor, " D"] | None = None,
    mask: Bool[Tensor, "B N"] | None = None,
) -> Float[Tensor, "B N D"]:
    """Add up what the experts, and local attention, have for each of n tokens.

    average_routed divides by the number of terms (at least 1); null_routed_token (D) replaces tokens without any;
    tokens masked by mask (B, N) become 0. Summed in at least float32, in the order of the experts; returned in y's
    dtype.
    Raises TypeError or ValueError naming the argument.
    """
    validation.tensor("y", y, "B", "E", "Kq", "D")
    n = validation.integer("n", n, least=0)
    batch, experts, _, dim = y.shape
    validation.routes("q_routes", q_routes, batch, experts, n, y)
    validation.tensor("y", y, *q_routes.indices.shape, dim)
    if local is not None:
        validation.tensor("local", local, batch, n, dim, beside=y)
    flag("average_routed", average_routed)
    if null_routed_token is not None:
        validation.tensor("null_routed_token", null_routed_token, dim, beside=y)
    if mask is not None:
        validation.tensor("mask", mask, batch, n, dtypes=(torch.bool,), beside=y)
    inverse = ops.inverse_map(q_routes.indices, q_routes.mask, n)
    once = q_routes._replace(scores=torch.ones_like(q_routes.scores))  # y has them already
    return _combine(y.transpose(0, 1), once, inverse, local, average_routed, null_routed_token, mask, y.dtype)


def _combine(
    y: Tensor,
    q_routes: Routes,
    inverse: Tensor,
    local: Tensor | None,
    average_routed: bool,
    null_routed_token: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
    *,
    allow_triton: bool = True,
) -> Tensor:
    """(B, N, D) in `dtype` from y (E, B, Kq, D), which the query scores still have to multiply."""
    routing = (q_routes.indices, q_routes.mask, inverse)
    if choose("mixture", Request(y.device, y.dtype, allow_triton=allow_triton)).triton:
        return ops.merge_experts(y, q_routes.scores, *routing, local, null_routed_token, mask, average_routed, dtype)
    wide = torch.promote_types(y.dtype, q_routes.scores.dtype)
    out = ops.scatter_tokens(y.to(wide) * q_routes.scores.transpose(0, 1)[..., None].to(wide), *routing)
    count = (inverse >= 0).sum(1)[..., None]
    if local is not None:
        out, count = out + local, count + 1
    if average_routed:
        out = out / count.clamp_min(1)
    if null_routed_token is not None:
        out = torch.where(count == 0, null_routed_token.to(out.dtype), out)
    return (out if mask is None else out.masked_fill(~mask[..., None], 0)).to(dtype)
