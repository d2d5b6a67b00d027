"""Mixture of Attention: routing, routed attention, optional local attention, and their combination.

out[n] = sum of y[e, n] over the experts e that routed n (+ local[n]); optionally averaged over the number of terms; a
token that nothing reached becomes a learned null token; masked tokens become 0.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reference.local_attention import LocalAttention
from reference.routed_attention import RoutedAttention
from reference.routing import Router, Routes
from reference.validation import (
    FLOATS,
    RouterOptions,
    check_bool,
    check_int,
    check_mask,
    check_real,
    check_rotary,
    check_routes,
    check_same_dtype,
    check_tensor,
    describe,
    fail,
)


class MixtureOfAttention(nn.Module):
    """Mixture of Attention, as a reader would write it down.

    Args:
        dim: model dimension D of x.
        num_routed_queries, num_routed_key_values: tokens K that every expert picks; both can be overridden at forward.
        num_experts: E.
        dim_context: dimension Dc of context (default dim). If it differs from dim, context is mandatory.
        local_attn, local_attn_window_size: add local attention |i - j| <= window (self-attention only).
        dim_head, heads: d and H of both attentions. dropout: on the probabilities of the routed attention.
        use_triton, flash_attn: accepted so that either implementation can be built from the same arguments; this one
            is the same PyTorch code whatever they say.
        prenorm: RMSNorm per expert before routed attention, LayerNorm before local attention.
        average_routed: divide by the number of terms.
        router_options: see `RouterOptions`; they go to both routers.

    Raises TypeError or ValueError naming the argument, its value and what was expected.
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
        self.dim = check_int("dim", dim)
        self.num_routed_queries = check_int("num_routed_queries", num_routed_queries)
        self.num_routed_key_values = check_int("num_routed_key_values", num_routed_key_values)
        self.num_experts = check_int("num_experts", num_experts)
        self.dim_context = self.dim if dim_context is None else check_int("dim_context", dim_context)
        self.dim_head, self.heads = check_int("dim_head", dim_head), check_int("heads", heads)
        dropout = check_real("dropout", dropout, "a number in [0, 1)", lambda v: 0 <= v < 1)
        self.use_triton, self.flash_attn = (
            check_bool("use_triton", use_triton),
            check_bool("flash_attn", flash_attn),
        )
        self.average_routed = check_bool("average_routed", average_routed)
        check_bool("prenorm", prenorm)
        if check_bool("local_attn", local_attn):
            check_int("local_attn_window_size", local_attn_window_size)
            if self.dim_head % 2:
                fail("dim_head", "an even number with local attention (rotary embedding)", dim_head)
            if self.dim_context != self.dim:
                fail("dim_context", f"dim = {dim} with local_attn (self-attention only)", dim_context)
        elif local_attn_window_size is not None:
            fail("local_attn_window_size", "None with local_attn=False", local_attn_window_size)
        if dtype is not None and dtype not in FLOATS:
            fail("dtype", "float64, float32, float16 or bfloat16", dtype, TypeError)
        options = RouterOptions.parse(router_options)

        where = {"device": device, "dtype": dtype}
        inner = {"dim_head": self.dim_head, "heads": self.heads, "prenorm": prenorm, **where}
        null = None if local_attn else nn.Parameter(torch.empty(1, 1, self.dim, **where))
        self.register_parameter("null_routed_token", null)
        self.query_router = Router(self.dim, self.num_experts, options, **where)
        self.key_value_router = Router(self.dim_context, self.num_experts, options, **where)
        self.attn = RoutedAttention(self.dim, self.dim_context, self.num_experts, dropout=dropout, **inner)
        self.local_attn = LocalAttention(self.dim, int(local_attn_window_size), **inner) if local_attn else None
        if null is not None:
            nn.init.normal_(null)

    def reset_parameters(self) -> None:
        for part in (self.query_router, self.key_value_router, self.attn, self.local_attn):
            if part is not None:
                part.reset_parameters()
        if self.null_routed_token is not None:
            nn.init.normal_(self.null_routed_token)

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
            x: (B, N, D) float64, float32, float16 or bfloat16. context: (B, M, Dc).
            mask, context_mask: (B, N) and (B, M) bool, False for padding. Padding counts in N <= K and in the target
                mass of the solver, never as a token.
            num_routed_queries, num_routed_key_values: K for this call.
            rotary_emb: (N, d) angles in float32 or float64 (self-attention only).
            query_routing_tokens, key_value_routing_tokens: (E, D) or (B, E, D); with learned_routing_tokens=True.
            routes: (query, key/value) decisions to use instead of the routers'.
            return_routes: return (out, (query routes, key/value routes)); `.load` of each is the load per expert.
        Returns (B, N, D), dtype and device of x.
        """
        self._check(x, context, mask, context_mask, rotary_emb, routes, return_routes)
        self._check_tokens("query_routing_tokens", self.query_router, query_routing_tokens, x, routes)
        self._check_tokens("key_value_routing_tokens", self.key_value_router, key_value_routing_tokens, x, routes)
        k_q = self._slots("num_routed_queries", num_routed_queries)
        k_kv = self._slots("num_routed_key_values", num_routed_key_values)
        if context is None:
            context, context_mask = x, mask
        if routes is None:
            q_routes = self.query_router(x, k_q, mask, query_routing_tokens)
            kv_routes = self.key_value_router(context, k_kv, context_mask, key_value_routing_tokens)
        else:
            q_routes, kv_routes = restrict(routes[0], mask), restrict(routes[1], context_mask)

        y = self.attn(x, context, q_routes, kv_routes, rotary_emb)
        out = combine(
            y,
            q_routes,
            x.shape[1],
            local=None if self.local_attn is None else self.local_attn(x, mask),
            average_routed=self.average_routed,
            null_routed_token=None if self.null_routed_token is None else self.null_routed_token[0, 0],
            mask=mask,
        )
        return (out, (q_routes, kv_routes)) if return_routes else out

    def _slots(self, name: str, override: int | None) -> int:
        return getattr(self, name) if override is None else check_int(name, override)

    @staticmethod
    def _check_tokens(name: str, router: Router, given: Tensor | None, x: Tensor, routes: object) -> None:
        if routes is None:
            router.tokens(name, given, x)
        elif given is not None:
            fail(name, "None with injected routes", given)

    def _check(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        context_mask: Tensor | None,
        rotary_emb: Tensor | None,
        routes: tuple[Routes, Routes] | None,
        return_routes: bool,
    ) -> None:
        weight = self.attn.to_q.weight
        check_tensor("x", x, ("B", "N", self.dim), like=weight)
        check_same_dtype("x", x, "the layer's parameters", weight)
        check_mask("mask", mask, x)
        if context is not None:
            if self.local_attn is not None:
                fail("context", "None with local_attn=True (self-attention only)", context)
            check_tensor("context", context, (x.shape[0], "M", self.dim_context), like=x)
            check_same_dtype("context", context, "x", x)
            check_mask("context_mask", context_mask, context)
            if rotary_emb is not None:
                fail("rotary_emb", "None with a context (self-attention only)", rotary_emb)
        elif self.dim_context != self.dim:
            fail(
                "context",
                f"a tensor (B, M, {self.dim_context}), since dim_context differs from dim = {self.dim}",
                "None",
            )
        elif context_mask is not None:
            fail("context_mask", "None without context", context_mask)
        check_rotary(rotary_emb, x, self.dim_head)
        check_bool("return_routes", return_routes)
        if routes is not None:
            if not (isinstance(routes, (tuple, list)) and len(routes) == 2):
                fail("routes", "a pair (query routes, key/value routes)", describe(routes), TypeError)
            check_routes("routes[0]", routes[0], x, self.num_experts)
            check_routes("routes[1]", routes[1], x if context is None else context, self.num_experts)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_routed_queries={self.num_routed_queries}, "
            f"num_routed_key_values={self.num_routed_key_values}, num_experts={self.num_experts}, "
            f"heads={self.heads}, dim_head={self.dim_head}, average_routed={self.average_routed}"
        )


def restrict(routes: Routes, mask: Bool[Tensor, "B N"] | None) -> Routes:
    """Injected routes, less the slots that hold masked tokens."""
    if mask is None:
        return routes
    by_expert = mask[:, None].expand(-1, routes.mask.shape[1], -1)
    return routes._replace(mask=routes.mask & by_expert.gather(-1, routes.indices))


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
    """Sum what the experts (and local attention) have for each token, in at least float32; returned in y's dtype.

    count[n] is the number of terms. average_routed divides by max(count, 1); null_routed_token replaces tokens of count
    0; masked tokens become 0.
    """
    check_combine_input(y, q_routes, n, local, average_routed, null_routed_token, mask)
    n, dtype = int(n), torch.promote_types(y.dtype, torch.float32)
    terms = torch.where(q_routes.mask[..., None], y.to(dtype), 0)
    place = rearrange(q_routes.indices, "b e k -> b (e k) 1")
    total = torch.zeros(y.shape[0], n, y.shape[-1], dtype=dtype, device=y.device)
    total = total.scatter_add(1, place.expand(-1, -1, y.shape[-1]), rearrange(terms, "b e k d -> b (e k) d"))
    count = torch.zeros(y.shape[0], n, 1, dtype=dtype, device=y.device)
    count = count.scatter_add(1, place, rearrange(q_routes.mask, "b e k -> b (e k) 1").to(dtype))
    if local is not None:
        total, count = total + local.to(dtype), count + 1
    if average_routed:
        total = total / count.clamp_min(1)
    if null_routed_token is not None:
        null = repeat(null_routed_token.to(dtype), "d -> b n d", b=y.shape[0], n=n)
        total = torch.where(count == 0, null, total)
    if mask is not None:
        total = total.masked_fill(~mask[..., None], 0)
    return total.to(y.dtype)


def check_combine_input(
    y: Tensor,
    q_routes: Routes,
    n: int,
    local: Tensor | None,
    average_routed: bool,
    null_routed_token: Tensor | None,
    mask: Tensor | None,
) -> None:
    check_tensor("y", y, ("B", "E", "Kq", "D"))
    check_int("n", n, least=0)
    sequence = y.new_empty(0).expand(y.shape[0], n, 0)
    check_routes("q_routes", q_routes, sequence, y.shape[1])
    check_tensor("y", y, (*q_routes.indices.shape, "D"), like=q_routes.indices)
    check_bool("average_routed", average_routed)
    if local is not None:
        check_tensor("local", local, (y.shape[0], n, y.shape[3]), like=y)
    if null_routed_token is not None:
        check_tensor("null_routed_token", null_routed_token, (y.shape[3],), like=y)
    check_mask("mask", mask, sequence)
