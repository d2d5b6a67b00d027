"""Mixture of Attention: routing, routed attention, optional local attention, and their combination.

out[n] = sum of y[e, n] over the experts e that routed n (+ local[n]); optionally averaged over the number of terms; a
token that nothing reached becomes a learned null token; masked tokens become 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from reference import contract
from reference.contract import Config, ContextMask, Forward, Routes, Side, TokenMask, check_call
from reference.local_attention import CLASSES as LOCAL
from reference.local_attention import LocalAttention
from reference.routed_attention import CLASSES as ROUTED
from reference.routed_attention import RoutedAttention
from reference.routing import Router

CLASSES = {**ROUTED, **LOCAL, Router: ("routing_token",)}


class MixtureOfAttention(nn.Module):
    """Mixture of Attention, as a reader would write it down.

    Not causal: routers choose among all tokens of a sequence, and attention looks both ways. No residual: the result
    takes the place of x. No positions without rotary_emb or local attention. Logits of masked tokens, in the routes
    that are returned, are 0.

    Args:
        dim: model dimension D of x.
        num_routed_queries, num_routed_key_values: tokens K that every expert picks; both can be overridden at forward.
        num_experts: E.
        dim_context: dimension Dc of context (default dim). If it differs from dim, context is mandatory.
        local_attn, local_attn_window_size: add local attention |i - j| <= window (self-attention only).
        dim_head, heads: d and H of both attentions. dropout: on the probabilities of the routed attention, in training;
            `layer.dropout = p` changes it.
        use_triton, flash_attn: accepted so that either implementation can be built from the same arguments; this one
            is the same PyTorch code whatever they say.
        prenorm: RMSNorm per expert before routed attention, LayerNorm before local attention.
        average_routed: divide by the number of terms.
        router_options: see `RouterOptions`; they go to both routers.

    Parameters are on x's device. Matrices and routing tokens have x's dtype, or autocast reconciles the two (it leaves
    float64 alone); scales of norms, null keys and values, the null token may have any floating dtype. Submodules with
    a forward pre-hook, or of another class, may cast what they are given, and are not looked at.

    Raises TypeError or ValueError naming the argument, or the parameter, its value and what was expected.
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
    null_routed_token: nn.Parameter | None
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
        self.config = config = Config.of(
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
        inner: dict[str, Any] = {"dim_head": config.dim_head, "heads": config.heads, "prenorm": prenorm, **where}
        null = None if local_attn else nn.Parameter(torch.empty(1, 1, config.dim, **where))
        self.register_parameter("null_routed_token", null)
        self.query_router = Router(config.dim, config.num_experts, config.options, **where)
        self.key_value_router = Router(config.dim_context, config.num_experts, config.options, **where)
        sizes = config.dim, config.dim_context, config.num_experts
        self.attn = RoutedAttention(*sizes, dropout=config.dropout, **inner)
        window_size = config.local_attn_window_size
        self.local_attn = None if window_size is None else LocalAttention(config.dim, window_size, **inner)
        if null is not None:
            nn.init.normal_(null)

    def reset_parameters(self) -> None:
        for part in (self.query_router, self.key_value_router, self.attn, self.local_attn):
            if part is not None:
                part.reset_parameters()
        if self.null_routed_token is not None:
            nn.init.normal_(self.null_routed_token)

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
            x: (B, N, D) float64, float32, float16 or bfloat16. context: (B, M, Dc).
            mask, context_mask: (B, N) and (B, M), or (1, N) and (1, M) for all batch items; bool, or integers 1 and 0
                (others are refused on the CPU, and count as 1 elsewhere). False for padding. Padding counts in N <= K
                and in the target mass of the solver, never as a token.
            num_routed_queries, num_routed_key_values: K for this call.
            rotary_emb: (N, d) angles, without gradient (self-attention only). Of a longer table the first N rows.
            query_routing_tokens, key_value_routing_tokens: (E, D) or (B, E, D); with learned_routing_tokens=True.
            routes: (query, key/value) decisions to use instead of the routers'.
            return_routes: return (out, (query routes, key/value routes)); `.load` of each is the load per expert.
        Returns (B, N, D), dtype and device of x. The layer's own routing tokens get a gradient of zeros where they
        decide nothing (N <= K, injected routes). Raises TypeError or ValueError naming the argument.
        """
        given = {
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
        }
        call = check_call(self.config, given)
        mask = call.queries.mask
        contract.parameters(self, x, CLASSES)
        injected = (None, None) if call.routes is None else call.routes
        q_routes = decide(self.query_router, call.queries, injected[0])
        kv_routes = decide(self.key_value_router, call.keys_values, injected[1])
        null = self.null_routed_token
        y = self.attn(x, call.keys_values.x, q_routes, kv_routes, call.rotary_emb)
        out = combine(
            y.to(x.dtype),
            q_routes,
            x.shape[1],
            local=None if self.local_attn is None else self.local_attn(x, mask),
            average_routed=self.config.average_routed,
            null_routed_token=None if null is None else null[0, 0],
            mask=mask,
        )
        return (out, (q_routes, kv_routes)) if return_routes else out

    def extra_repr(self) -> str:
        names = "dim num_routed_queries num_routed_key_values num_experts heads dim_head dropout average_routed"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names.split())


def decide(router: nn.Module, side: Side, injected: Routes | None) -> Routes:
    """The router's decision, or the one that was made elsewhere."""
    if injected is None:
        return router(side.x, side.k, side.mask, side.tokens)
    return router(side.x, side.k, side.mask, routes=injected)


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
    """Sum what the experts (and local attention) have for each token, in at least float32; returned in y's dtype.

    count[n] is the number of terms. average_routed divides by max(count, 1); null_routed_token replaces tokens of count
    0; masked tokens become 0.
    """
    mask = contract.combine_input(y, q_routes, n, local, average_routed, null_routed_token, mask)
    n, dtype = contract.integer("n", n, least=0), torch.promote_types(y.dtype, torch.float32)
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
