"""Strictly causal Mixture of Attention: what a token gets depends on it and on tokens before it, and on nothing else.

The sequence, without its masked tokens, is cut into blocks of W tokens. Position p is the number of valid tokens before
a token, and p // W its block. Every expert keeps a memory of the K best tokens of all earlier blocks: the best by
key/value logit, the later of two that are equal. Two tokens never change their rank, so one that was dropped never
comes back, and a memory of K tokens is exact at any length. Queries of a block are those tokens whose query logit
reaches the Kq-th largest of the block before, at most C of them, the first; all of that is known when a token arrives.
They attend over the memory and a learned null key. A causal window of neighbours is added, and for each expert that did
not take the token a learned vector of its own.

With a cache, the same is computed on what the cache holds and the new tokens: the unfinished block is laid out again
from its start, followed by what is new (`Laid`), so that training, prefill and decoding are one path.

Letters: B batch, N tokens of a call, D model dimension, E experts, H heads, d head dimension, W block size, K slots of
memory, C slots for queries in a block, J blocks that a call touches, L = J W places, w local window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from reference import contract
from reference.autoregressive_cache import Cache, take
from reference.autoregressive_call import check_call
from reference.autoregressive_contract import AutoregressiveConfig
from reference.contract import RouterOptions, TokenMask
from reference.local_attention import CLASSES as LOCAL
from reference.local_attention import LocalAttention, rotary_angles_at
from reference.routed_attention import CLASSES as ROUTED
from reference.routed_attention import RoutedAttention, rotate
from reference.routing import dual_of, handed_on, last_temperature, routing_logits, solve, widen, with_zero_gradient

ROWS = 128  # queries of local attention at a time: bounds memory, and has no influence on the result


class QueryRoutes(NamedTuple):
    """Which tokens of this call each expert takes as queries, block by block."""

    indices: Int64[Tensor, "B E J C"]  # into x; ascending
    mask: Bool[Tensor, "B E J C"]  # False: the slot is empty, or a token of an earlier call has it
    scores: Float[Tensor, "B E J C"]
    load: Int64[Tensor, "B E J"]  # tokens of this call that have a slot
    candidates: Int64[Tensor, "B E J"]  # tokens of this call that reach the threshold, before capacity
    logits: Float[Tensor, "B E N"]  # of all tokens; 0 where masked


class MemoryRoutes(NamedTuple):
    """Which tokens the queries of a block see."""

    positions: Int64[Tensor, "B E J K"]  # counted from the cache's start, ascending; -1 where empty
    mask: Bool[Tensor, "B E J K"]
    scores: Float[Tensor, "B E J K"]
    logits: Float[Tensor, "B E N"]


class Laid(NamedTuple):
    """The unfinished block and the new tokens side by side, from the block's start on."""

    x: Float[Tensor, "B L D"]
    q_logits: Float[Tensor, "B E L"]
    kv_logits: Float[Tensor, "B E L"]
    there: Bool[Tensor, "B L"]  # whether a place holds a token
    new: Bool[Tensor, "B L"]  # whether it came with this call
    position: Int64[Tensor, "B L"]


class Memory(NamedTuple):
    """Of every block: the chosen among what was stored (K places) and what is laid out (L)."""

    places: Int64[Tensor, "B E J K"]
    mask: Bool[Tensor, "B E J K"]
    positions: Int64[Tensor, "B E J K"]
    poisoned: Bool[Tensor, "B E J"]  # a NaN logit came before, which makes the scores of a solver NaN


def attend(
    q: Float[Tensor, "*any L d"],
    k: Float[Tensor, "*any S d"],
    v: Float[Tensor, "*any S d"],
    visible: Bool[Tensor, "*any L S"],
    dropout: float = 0.0,
) -> Float[Tensor, "*any L d"]:
    """Softmax attention over visible keys. A query that is not finite, or sees what is not, gets NaN; others nothing
    of it, in values or gradients: 0 times NaN is NaN, so what is not finite is taken out before and put in after."""
    odd_q = ~q.isfinite().all(-1, keepdim=True)
    odd_kv = ~(k.isfinite() & v.isfinite()).all(-1, keepdim=True)
    q, k, v = torch.where(odd_q, 0, q), torch.where(odd_kv, 0, k), torch.where(odd_kv, 0, v)
    logits = widen(q @ k.mT) * q.shape[-1] ** -0.5
    odd = odd_q | (visible & (odd_kv.mT | ~logits.isfinite())).any(-1, keepdim=True)
    shown = visible & ~odd
    logits = torch.where(shown, logits, -torch.inf)
    probs = torch.where(shown.any(-1, keepdim=True), logits, 0).softmax(-1)
    if dropout > 0:
        probs = torch.where(torch.rand_like(probs) >= dropout, probs / (1 - dropout), 0)
    return torch.where(odd, torch.nan, probs.to(v.dtype) @ v)


def lay_out(
    x: Tensor, q_logits: Tensor, kv_logits: Tensor, count: Int64[Tensor, " B"], past: Cache, blocks: int
) -> Laid:
    """x: the valid tokens first, count of them, with their logits. blocks: that the result has."""
    width, n = past.tail.shape[1], x.shape[1]
    place = torch.arange(blocks * width, device=x.device)
    filled = (past.length - past.start)[:, None]  # places of tokens that came before
    old = place < filled
    at = torch.where(old, place, width + place - filled).clamp(0, width + n - 1)
    there = place < filled + count[:, None]
    logits = [torch.cat(pair, -1) for pair in ((past.tail_q_logits, q_logits), (past.tail_kv_logits, kv_logits))]
    q, kv = (torch.where(there[:, None], take(t, 2, at[:, None]), 0) for t in logits)
    tokens = torch.where(there[..., None], take(torch.cat((past.tail, x), 1), 1, at), 0)
    return Laid(tokens, q, kv, there, there & ~old, past.start[:, None] + place)


def thresholds_of(laid: Laid, past: Cache, c: AutoregressiveConfig) -> tuple[Tensor, Tensor]:
    """Of each block, (B, E, J): the least logit of its queries, NaN for none, and a solver's dual; by the block before.

    The last block laid out sets none: no block comes after it.
    """
    rows = rearrange(laid.q_logits, "b e (j w) -> b e j w", w=c.routed_window_size)[:, :, :-1]
    there = rearrange(laid.there, "b (j w) -> b 1 j w", w=c.routed_window_size)[:, :, :-1]
    threshold, dual = torch.full_like(rows[..., 0], torch.nan), torch.zeros_like(rows[..., 0])
    if not c.everybody:
        number = there & ~rows.isnan()
        best = torch.where(number, rows.detach(), -torch.inf).sort(-1, descending=True).values
        k = c.num_routed_queries
        threshold = torch.where(number.sum(-1) >= k, best[..., k - 1], torch.nan)
        if c.options.solver != "sigmoid":
            odd = rows.isnan().any(-1, keepdim=True)
            mass = min(k * c.options.fetch_k_ratio, c.routed_window_size)
            tamed, shift = tame(rows, odd, c.options)
            dual = torch.where(odd, torch.nan, dual_of(tamed, mass, c.options) - shift)[..., 0]
    blocks = laid.there.shape[1] // c.routed_window_size
    limits = (torch.cat((old[..., None], new), -1) for old, new in ((past.threshold, threshold), (past.dual, dual)))
    first, second = (t[..., :blocks] for t in limits)
    return first, second


def tame(rows: Tensor, odd: Tensor, options: RouterOptions) -> tuple[Tensor, Tensor]:
    """Logits that a solver can take, and what was subtracted: zeros for rows with a NaN, others bounded.

    Else the gradient of all tokens in a row would be NaN if that of one is, though what came before asks nothing of it.
    The exact solver does not mind a shift: beside a logit of 1e300 it could not tell the others apart.
    """
    rows = torch.where(odd, 0, rows)
    finfo, last = torch.finfo(rows.dtype), last_temperature(options)
    most = finfo.max / 8 * min(last, 1)
    rows = rows.clamp(-most, most)
    if options.solver != "exact" or not rows.shape[-1]:
        return rows, torch.zeros_like(rows[..., :1])
    shift = rows.detach().amax(-1, keepdim=True)
    return (rows - shift).clamp_min(-last / finfo.eps / 8), shift  # below, s + a has no digit left


class Queries(NamedTuple):
    """The first candidates of each block."""

    places: Int64[Tensor, "B E J C"]  # among what is laid out
    mask: Bool[Tensor, "B E J C"]  # whether a token of this call has the slot
    scores: Float[Tensor, "B E J C"]
    candidates: Int64[Tensor, "B E J"]  # of this call


def queries_of(
    laid: Laid, past: Cache, limits: tuple[Tensor, Tensor], c: AutoregressiveConfig, token: Tensor
) -> Queries:
    """token: the routing tokens, which get a gradient of zeros where they decide nothing."""
    width = c.routed_window_size
    logits = rearrange(laid.q_logits, "b e (j w) -> b e j w", w=width)
    there, new, position = (rearrange(t, "b (j w) -> b 1 j w", w=width) for t in (laid.there, laid.new, laid.position))
    candidate = (there & (position >= width)).expand_as(logits)
    if not c.everybody:
        candidate = candidate & (logits >= limits[0][..., None])
    routed = candidate & (candidate.cumsum(-1) <= c.capacity)
    slots = (~routed).long().argsort(dim=-1, stable=True)[..., : c.capacity]
    mask = (routed & new).gather(-1, slots)
    s, o = logits.gather(-1, slots), c.options
    if o.solver == "sigmoid":
        scores = s.sigmoid()
    elif c.everybody:
        scores = torch.ones_like(s)
    else:
        above = (
            torch.where(mask, s, 0) + limits[1][..., None]
        )  # an empty slot may hold NaN, which the dual must not meet
        scores = torch.where(above >= 0, 0, above / last_temperature(o)).exp()
    starts = width * torch.arange(slots.shape[2], device=s.device)[:, None]
    scores = handed_on(scores, mask, o)
    if o.solver != "sigmoid":  # whose scores depend on logits everywhere
        scores = with_zero_gradient(scores, token)
    return Queries(starts + slots, mask, scores, (candidate & new).sum(-1))


def remember(laid: Laid, past: Cache, c: AutoregressiveConfig) -> Memory:
    """The best of what was stored and of the blocks before each: numbers before NaN, larger logits, later tokens."""
    slots, width = c.num_routed_key_values, c.routed_window_size
    logits = torch.cat((past.logits, laid.kv_logits), -1).detach()  # (B, E, K + L)
    experts = logits.shape[1]
    positions = torch.cat((past.positions, laid.position[:, None].expand(-1, experts, -1)), -1)
    blocks = torch.arange(laid.there.shape[1] // width, device=logits.device)
    block = torch.arange(laid.there.shape[1], device=logits.device) // width
    before = laid.there[:, None] & (block < blocks[:, None])  # (B, J, L)
    old = (past.positions >= 0)[:, :, None].expand(-1, -1, len(blocks), -1)
    eligible = torch.cat((old, before[:, None].expand(-1, experts, -1, -1)), -1)

    best = positions.argsort(dim=-1, descending=True)
    worth = torch.where(logits.isnan(), 0, logits) + 0.0  # adding 0.0 turns -0.0 into 0.0
    for key, descending in ((worth, True), (logits.isnan().long(), False)):
        best = best.gather(-1, key.gather(-1, best).argsort(dim=-1, descending=descending, stable=True))
    best = best[:, :, None].expand_as(eligible)
    ranked = eligible.gather(-1, best)
    chosen = torch.zeros_like(eligible).scatter(-1, best, ranked & (ranked.cumsum(-1) <= slots))
    places = (~chosen).long().argsort(dim=-1, stable=True)[..., :slots]  # those of the memory are older than all others
    mask = chosen.gather(-1, places)
    at = positions[:, :, None].expand_as(eligible).gather(-1, places)
    odd = (laid.kv_logits.isnan()[:, :, None] & before[:, None]).any(-1) | past.poisoned[..., None]
    return Memory(places, mask, torch.where(mask, at, -1), odd)


def memory_scores(
    laid: Laid, past: Cache, memory: Memory, c: AutoregressiveConfig, cached: bool, token: Tensor
) -> Float[Tensor, "B E J K"]:
    """cached: what came before is not laid out, and the scores of a solver are 1 (`check_call`)."""
    o, slots, width = c.options, c.num_routed_key_values, c.routed_window_size
    if o.solver == "sigmoid":
        logits = torch.cat((past.logits, laid.kv_logits), -1)[:, :, None]
        scores = logits.expand(-1, -1, memory.places.shape[2], -1).gather(-1, memory.places).sigmoid()
    else:
        scores = torch.ones_like(memory.places, dtype=laid.kv_logits.dtype)
        odd = memory.poisoned[..., None]
        if not cached:
            parts = [scores[:, :, i] for i in range(scores.shape[2])]
            for i in range(slots // width + 1, len(parts)):
                row, _ = tame(laid.kv_logits[..., : i * width], odd[:, :, i], o)
                soft = solve(row, min(slots * o.fetch_k_ratio, i * width), None, o)
                parts[i] = soft.gather(-1, (memory.places[:, :, i] - slots).clamp(0, i * width - 1))
            scores = torch.stack(parts, 2) if parts else scores
        start = past.start[:, None, None, None] + width * torch.arange(scores.shape[2], device=scores.device)[:, None]
        scores = torch.where(odd & (start > slots), torch.nan, scores)
    scores = handed_on(scores, memory.mask, o)
    return scores if o.solver == "sigmoid" else with_zero_gradient(scores, token)


def scored(t: Tensor, scores: Tensor) -> Tensor:
    """t times scores, in t's dtype. What is not finite is a constant: 0 times it, in a gradient, would be NaN."""
    odd = scores.isnan() | ~t.isfinite()
    product = torch.where(odd, 0, t) * torch.where(odd, 0, scores).to(t.dtype)
    return torch.where(odd, (t * scores.to(t.dtype)).detach(), product)


class LogitsRouter(nn.Module):
    """Logits of tokens, one routing token per expert: routing_token (E, D)."""

    def __init__(
        self, dim: int, num_experts: int, options: RouterOptions, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.options = options
        self.routing_token = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.routing_token)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B E N"]:
        token = self.routing_token
        contract.beside_parameters("x", x, token, "the routing token")
        return routing_logits(x, token, self.options)


class MemoryAttention(RoutedAttention):
    """Queries of each block over its memory and the null key: state as of `RoutedAttention`."""

    def forward(  # type: ignore[override]
        self,
        laid: Laid,
        stored: tuple[Tensor, Tensor],
        memory: Memory,
        kv_scores: Float[Tensor, "B E J K"],
        queries: Queries,
        rotary_emb: Float[Tensor, "P d"] | None,
    ) -> tuple[Float[Tensor, "B E J C D"], Tensor, Tensor]:
        """Outputs of the slots, times their scores; rotated keys and values (B, E, K + L, H, d) of all places."""
        contract.parameters(self, laid.x, CLASSES)
        slots, slot_mask, q_scores, _ = queries
        experts, heads, blocks = self.null_kv.shape[1], self.null_kv.shape[2], slots.shape[2]
        rows = laid.x[:, None].expand(-1, experts, -1, -1)
        kv = self._project(self.to_kv, rows if self.context_norm is None else self.context_norm(rows))
        k, v = rearrange(kv, "b e l (two h d) -> two b e l h d", two=2, h=heads)
        chosen = torch.where(slot_mask[..., None], take(rows, 2, slots), 0)
        flat = rearrange(chosen, "b e j c d -> b e (j c) d")
        q = self._project(self.to_q, flat if self.norm is None else self.norm(flat))
        q = q.unflatten(2, slots.shape[2:]).unflatten(-1, (heads, -1)).transpose(3, 4)  # (B, E, J, H, C, d)
        if rotary_emb is not None:
            at = laid.position.clamp(0, max(rotary_emb.shape[0] - 1, 0))
            k = rotate(k, rotary_emb[at][:, None, :, None])
            q = rotate(q, take(rotary_emb[at][:, None].expand(-1, experts, -1, -1), 2, slots)[:, :, :, None])
        k, v = (torch.cat(pair, 2) for pair in ((stored[0].to(k.dtype), k), (stored[1].to(v.dtype), v)))
        seen = memory.mask[..., None, None]
        keys = torch.where(seen, take(k, 2, memory.places), 0)
        values = torch.where(seen, scored(take(v, 2, memory.places), kv_scores[..., None, None]), 0)
        keys, values = (rearrange(t, "b e j k h d -> b e j h k d") for t in (keys, values))
        null_k, null_v = self.null_kv.to(q.dtype)[:, None, :, None].expand(2, len(slots), -1, blocks, -1, -1, -1)
        visible = F.pad(memory.mask, (1, 0), value=True)[:, :, :, None, None]
        visible = visible & slot_mask[:, :, :, None, :, None]  # a slot without a query: a NaN would spoil gradients
        pair = torch.cat((null_k, keys), -2), torch.cat((null_v, values), -2)
        out = attend(q, *pair, visible.expand(-1, -1, -1, heads, q.shape[-2], -1), self.dropout * self.training)
        out = self._project(self.to_out, rearrange(out, "b e j h c d -> b e (j c) (h d)").to(laid.x.dtype))
        y = out.unflatten(2, slots.shape[2:])
        y = scored(y, q_scores[..., None])
        return torch.where(slot_mask[..., None], y, 0), k, v


class CausalLocalAttention(LocalAttention):
    """Position p sees 0 <= p - p' <= window_size: state as of `LocalAttention`."""

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "B N D"], cache: Cache
    ) -> tuple[Float[Tensor, "B N D"], Tensor, Tensor]:
        """x: the valid tokens first, which continue those of the cache.

        Returns (B, N, D), and rotated keys and values (B, w + W + N, H, d) of what was stored and x.
        """
        contract.parameters(self, x, CLASSES)
        n, stored = x.shape[1], cache.local_keys.shape[1]
        qkv = self.to_qkv(x if self.norm is None else self.norm(x))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b n h d", three=3, h=self.heads)
        position = cache.length[:, None] + torch.arange(n, device=x.device)
        angles = rotary_angles_at(position, q.shape[-1])[:, :, None]
        q, k = rotate(q, angles), rotate(k, angles)
        k, v = torch.cat((cache.local_keys.to(k.dtype), k), 1), torch.cat((cache.local_values.to(v.dtype), v), 1)
        back = torch.arange(self.window_size, -1, -1, device=x.device)
        parts = []
        for start in range(0, n, ROWS):
            rows = slice(start, min(start + ROWS, n))
            wanted = position[:, rows, None] - back  # (B, R, w + 1)
            old = wanted - cache.start[:, None, None] + self.window_size
            since = wanted - cache.length[:, None, None]
            place = torch.where(since < 0, old, stored + since).clamp_min(0)
            visible = (wanted >= 0)[:, :, None]
            near_k, near_v = (
                torch.where(visible[..., None], take(t, 1, place).transpose(2, 3), 0) for t in (k, v)
            )  # (B, R, H, w + 1, d)
            parts.append(attend(q[:, rows, :, None], near_k, near_v, visible[..., None, :])[:, :, :, 0])
        out = torch.cat(parts, 1) if parts else q
        return self.to_out(out.flatten(2).to(x.dtype)), k, v


CLASSES: contract.Classes = {
    **ROUTED,
    **LOCAL,
    MemoryAttention: (),
    CausalLocalAttention: (),
    LogitsRouter: ("routing_token",),
}


class MixtureOfAutoregressiveAttention(nn.Module):
    """Strictly causal Mixture of Attention, as a reader would write it down.

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
        dropout: on the probabilities of the routed attention, in training.
        capacity_factor: at most min(W, ceil(capacity_factor * Kq)) queries of a block have a slot.
        prenorm, average_routed, use_triton, flash_attn: as of `MixtureOfAttention`; the last two change nothing here.
        solver: scores of routed tokens. "sigmoid" couples no tokens, and every routed token has a gradient. With
            "iterative" and "exact" tokens that saturate have none, and a threshold saturates many.
        straight_through, cosine_sim_routing, cosine_sim_scale, router_options: see `RouterOptions`. Raw dot products
            are soon so large that a sigmoid of the chosen is 1 in float32: hence scaled cosines.
    State: null_tokens (E, D), query_router, key_value_router, attn, local_attn.
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
        self.config = config = AutoregressiveConfig.of(
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
        shared: dict[str, Any] = {"dim_head": config.dim_head, "prenorm": prenorm, **where}
        self.null_tokens = nn.Parameter(torch.empty(config.num_experts, config.dim, **where))
        self.query_router = LogitsRouter(config.dim, config.num_experts, config.options, **where)
        self.key_value_router = LogitsRouter(config.dim, config.num_experts, config.options, **where)
        self.attn = MemoryAttention(
            config.dim, config.dim, config.num_experts, heads=config.heads, dropout=config.dropout, **shared
        )
        self.local_attn = CausalLocalAttention(
            config.dim, config.local_attn_window_size, heads=config.local_attn_heads, **shared
        )
        nn.init.zeros_(self.null_tokens)

    def reset_parameters(self) -> None:
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
        mask = check_call(c, x, mask, rotary_emb, cache, use_cache, return_routes)
        n = x.shape[1]
        contract.parameters(self, x, CLASSES)
        past = Cache.empty(c, x, rotary_emb is not None) if cache is None else cache
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        order, count = (~valid).long().argsort(dim=1, stable=True), valid.sum(1)  # the valid ones first
        here = torch.arange(n, device=x.device) < count[:, None]
        tokens = torch.where(here[..., None], take(x, 1, order), 0)

        logits = self.query_router(tokens), self.key_value_router(tokens)
        laid = lay_out(tokens, *logits, count, past, c.blocks(n, cache is not None))
        limits = thresholds_of(laid, past, c)
        queries = queries_of(laid, past, limits, c, self.query_router.routing_token)
        memory = remember(laid, past, c)
        scores = memory_scores(laid, past, memory, c, cache is not None, self.key_value_router.routing_token)
        y, *rows = self.attn(laid, (past.keys, past.values), memory, scores, queries, rotary_emb)
        local, *near = self.local_attn(tokens, past)
        y = torch.where(here[..., None], combine(y, queries, local, past, self.null_tokens, c), 0)
        out = torch.zeros_like(y).scatter(1, order[..., None].expand_as(y), y).to(x.dtype)
        results: list[Any] = [out]
        if use_cache:
            results.append(past.after(count, n, laid, memory, (rows[0], rows[1]), limits, (near[0], near[1])))
        if return_routes:
            back = [torch.zeros_like(t).scatter(-1, order[:, None].expand_as(t), t * here[:, None]) for t in logits]
            at = (queries.places - (past.length - past.start)[:, None, None, None]).clamp(0, max(n - 1, 0))
            at = take(order[:, None].expand(-1, c.num_experts, -1), 2, at) if n else at
            load = queries.mask.sum(-1)
            taken = QueryRoutes(at, queries.mask, queries.scores, load, queries.candidates, back[0])
            results.append((taken, MemoryRoutes(memory.positions, memory.mask, scores, back[1])))
        return results[0] if len(results) == 1 else tuple(results)

    def extra_repr(self) -> str:
        names = "dim num_routed_queries num_routed_key_values local_attn_window_size routed_window_size num_experts"
        return ", ".join(f"{name}={getattr(self.config, name)}" for name in names.split())


def combine(
    y: Float[Tensor, "B E J C D"],
    queries: Queries,
    local: Float[Tensor, "B N D"],
    past: Cache,
    null_tokens: Float[Tensor, "E D"],
    c: AutoregressiveConfig,
) -> Float[Tensor, "B N D"]:
    """local, and beyond block 0 each expert's output or null token, in at least float32."""
    dtype, n = torch.promote_types(local.dtype, torch.float32), local.shape[1]
    new = queries.places - (past.length - past.start)[:, None, None, None]  # among the tokens of this call
    at = torch.where(queries.mask, new, n).flatten(2)  # empty slots go to a place that is cut off
    rows = y.to(dtype).flatten(2, 3)
    terms = rows.new_zeros(*rows.shape[:2], n + 1, rows.shape[-1])
    terms = terms.scatter(2, at[..., None].expand_as(rows), rows)[:, :, :n]
    routed = torch.zeros(*at.shape[:2], n + 1, dtype=torch.bool, device=at.device).scatter(2, at, True)[:, :, :n]
    terms = torch.where(routed[..., None], terms, null_tokens[None, :, None].to(dtype))
    position = past.length[:, None] + torch.arange(n, device=local.device)
    later = (position >= c.routed_window_size)[..., None]
    total = local.to(dtype) + torch.where(later, terms.sum(1), 0)
    return total / torch.where(later, c.num_experts + 1, 1) if c.average_routed else total
