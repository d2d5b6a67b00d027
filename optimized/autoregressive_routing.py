"""Routing of the causal layer: logits, which tokens of a block are queries, and what each expert remembers.

Block 0 of a sequence has no queries and no memory: of a call without a cache the lists begin with block 1.

Letters: B batch, N tokens of a call, E experts, W block size, J blocks, I = J blocks that have lists, or J - 1 without
a cache, L = J W places, M rows of tokens (`Places`), K slots of memory, C slots for queries in a block.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from optimized import ops
from optimized.autoregressive_cache import StaticCache
from optimized.autoregressive_layout import Places
from optimized.ops.coordinate_descent import temperature
from optimized.plain import obstacle_to_fusion
from optimized.plan import Kind, Plan, bind
from optimized.routing import cosine_scale, with_zero_gradient
from reference import contract
from reference.autoregressive_cache import Cache
from reference.autoregressive_contract import AutoregressiveConfig
from reference.contract import RouterOptions


class LogitsRouter(nn.Module):
    """Logits of tokens, one routing token per expert: routing_token (E, D)."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        options: RouterOptions,
        device: Any = None,
        dtype: torch.dtype | None = None,
        use_triton: bool = True,
    ) -> None:
        super().__init__()
        self.options, self.use_triton = options, use_triton
        self.routing_token = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.routing_token)

    def forward(self, x: Float[Tensor, "B N D"], plan: Plan | None = None) -> Float[Tensor, "B E N"]:
        """plan: that of the layer's call."""
        token = self.routing_token  # read once: a parametrization computes it
        contract.beside_parameters("x", x, token, "the routing token")
        if plan is None:
            plan = bind(Kind(x.device, x.dtype, ("routing",), allow_triton=self.use_triton))
        return ops.router_logits(x, token, None, cosine_scale(self.options), plan.routing)[0]

    def extra_repr(self) -> str:
        return "num_experts={}, dim={}".format(*self.routing_token.shape)


def fusable(routers: tuple[nn.Module, nn.Module]) -> str | None:
    """Why each router is called; None where one operator computes the logits of both."""
    ours, theirs = routers
    found = obstacle_to_fusion(query_router=(ours, LogitsRouter), key_value_router=(theirs, LogitsRouter))
    if found is not None:
        return found
    return None if ours.options is theirs.options else "the routers have different options"


def both_logits(routers: tuple[nn.Module, nn.Module], x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Query and key/value logits (B, E, N) of tokens."""
    if fusable(routers) is None:
        ours: Any = routers[0]
        tokens = torch.cat([router.routing_token for router in routers])  # type: ignore[misc]
        logits = ops.router_logits(x, tokens, None, cosine_scale(ours.options), plan.routing)[0]
        first, second = logits.chunk(2, 1)
        return first, second
    first, second = (router(x, plan) if _takes_a_plan(router) else router(x) for router in routers)
    return first, second


def _takes_a_plan(router: nn.Module) -> bool:
    own = isinstance(router, LogitsRouter) and type(router).forward is LogitsRouter.forward
    return own and "forward" not in vars(router)


# --- queries ----------------------------------------------------------------------------------------------------------


class Queries(NamedTuple):
    """The first candidates of each block."""

    places: Int[Tensor, "B E I C"]  # int64, ascending, 0 in empty slots
    filled: Bool[Tensor, "B E I C"]
    counts: Int[Tensor, "B E I"]  # int32, how many are filled
    mask: Bool[Tensor, "B E I C"]  # of those filled, the tokens of this call
    inverse: Int[Tensor, "B E M"]  # int32, slot i C + c of a row, -1 for none
    scores: Float[Tensor, "B E I C"]


class Limits(NamedTuple):
    """Of each block, by the one before."""

    thresholds: Float[Tensor, "B E J"]  # the least logit of its queries, NaN for none
    duals: Float[Tensor, "B E J"] | None  # of a solver, for their scores; None for 0


def queries_of(
    places: Places, past: Cache | None, c: AutoregressiveConfig, token: Tensor | None, plan: Plan
) -> tuple[Queries, Limits]:
    """token: the routing tokens, which get a gradient of zeros where they decide nothing."""
    logits, width, o = places.q_logits, c.routed_window_size, c.options
    blocks = logits.shape[-1] // width
    if c.everybody:
        indices, filled, inverse, counts = _all_of(places, past, c)
        thresholds = torch.full_like(logits[..., ::width], torch.nan).detach()
    else:
        first = None if past is None else past.threshold
        indices, filled, inverse, thresholds, counts = ops.candidates(
            logits.detach(), places.there, first, c.num_routed_queries, c.capacity, width, plan.routing
        )
    mask = filled if places.filled is None else filled & (indices >= places.filled[:, None, None, None])
    picked = logits.gather(-1, indices.flatten(2)).view(indices.shape)
    duals = None
    if o.solver == "sigmoid":
        scores = handed_on(picked.sigmoid(), mask, o)
    else:
        if not c.everybody:
            first = torch.zeros_like(thresholds[..., :1]) if past is None else past.dual[..., None]
            rows = logits[..., : (blocks - 1) * width] if blocks else logits
            duals = torch.cat((first, _duals(rows.unflatten(-1, (-1, width)), places, c)), -1)[..., :blocks]
            # Of an empty slot, which may hold NaN, nothing.
            above = picked.masked_fill(~mask, 0) + duals[..., blocks - indices.shape[2] :, None]
            soft = (above / last_temperature(o)).masked_fill(above >= 0, 0).exp()
        else:
            soft = torch.ones_like(picked)
        scores = handed_on(soft, mask, o)
        if token is not None:
            scores = with_zero_gradient(scores, token)
    inverse = inverse[..., : places.x.shape[1]].contiguous()
    return Queries(indices, filled, counts, mask, inverse, scores), Limits(thresholds, duals)


def _all_of(
    places: Places, past: Cache | None, c: AutoregressiveConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Indices, slots, inverse map and counts of every token behind the first block, as `ops.candidates` tells them."""
    logits, width = places.q_logits, c.routed_window_size
    batch, experts, length = logits.shape
    place = torch.arange(length, device=logits.device)
    position = place[None] if places.start is None else places.start[:, None] + place
    there = (place < places.x.shape[1])[None] if places.there is None else places.there
    taken = (there & (position >= width)).expand(batch, -1)[:, None].expand(-1, experts, -1)
    skipped = width if past is None else 0
    inverse = (place - skipped).expand_as(taken).masked_fill(~taken, -1).int()
    slots, place = taken[..., skipped:].unflatten(-1, (-1, width)), place[skipped:].view(-1, width)
    return place.masked_fill(~slots, 0), slots.contiguous(), inverse, slots.sum(-1, dtype=torch.int32)


def handed_on(soft: Tensor, slots: Tensor, options: RouterOptions) -> Tensor:
    """Scores of the slots: the soft ones, or 1 with their gradient. A NaN stays one."""
    if options.straight_through:
        soft = 1 + (soft - soft.detach())
    return soft.masked_fill(~slots, 0)


# --- memory -----------------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Of blocks: the chosen among what was stored (K columns, with a cache) and what is laid out (L)."""

    columns: Int[Tensor, "B E I K"]  # int32, ascending, 0 in empty slots
    counts: Int[Tensor, "B E I"]  # int32, filled slots, which come first
    poisoned: Bool[Tensor, "B E J"] | None  # a NaN logit came before, which a solver's scores or a cache need to know

    @property
    def there(self) -> Bool[Tensor, "B E I K"]:
        """Which slots are filled."""
        return torch.arange(self.columns.shape[-1], device=self.columns.device) < self.counts[..., None]

    def positions(self, places: Places, past: Cache | None) -> Int[Tensor, "B E I K"]:
        """Counted from the cache's start; -1 where empty."""
        columns = self.columns.long()
        if past is not None:
            laid = past.start[:, None] + torch.arange(places.q_logits.shape[-1], device=columns.device)
            every = torch.cat((past.positions, laid[:, None].expand(-1, columns.shape[1], -1)), -1)
            columns = every.gather(-1, columns.flatten(2)).view(columns.shape)
        return columns.masked_fill(~self.there, -1)


def remember(places: Places, past: Cache | None, c: AutoregressiveConfig, plan: Plan, watched: bool) -> Memory:
    """watched: somebody asks which are poisoned."""
    logits, there = places.kv_logits.detach(), places.there
    prior = min(c.routed_window_size, logits.shape[-1])  # block 0, of which block 1 knows
    if past is not None:
        prior = c.num_routed_key_values
        logits = torch.cat((past.logits.detach(), logits), -1)
        assert there is not None
        there = torch.cat((past.positions[:, 0] >= 0, there), -1)
    given = c.num_routed_key_values, c.routed_window_size, prior
    columns, counts = ops.memory(logits, there, *given, plan.routing)
    poisoned = None
    if watched or c.options.solver != "sigmoid":
        nan = places.kv_logits.isnan().unflatten(-1, (-1, c.routed_window_size)).any(-1)
        before = F.pad(nan.cumsum(-1), (1, 0))[..., :-1] > 0
        poisoned = before if past is None else before | past.poisoned[..., None]
    return Memory(columns, counts, poisoned)


def own_scores(places: Places, past: Cache | None, o: RouterOptions) -> Float[Tensor, "B E S"]:
    """Of every column, by the sigmoid of its logit."""
    logits = places.kv_logits
    if past is not None:
        logits = torch.cat((past.logits, logits), -1)
    soft = logits.sigmoid()
    return 1 + (soft - soft.detach()) if o.straight_through else soft


def solved_scores(
    places: Places, past: Cache | None, memory: Memory, c: AutoregressiveConfig, token: Tensor | None, plan: Plan
) -> Float[Tensor, "B E I K"]:
    """By a solver, of the memory of each block. With a cache the scores are 1 (`check_call`)."""
    o, slots, width = c.options, c.num_routed_key_values, c.routed_window_size
    columns, (_, _, lists, _) = memory.columns.long(), memory.columns.shape
    assert memory.poisoned is not None
    blocks = memory.poisoned.shape[2]
    skipped = blocks - lists
    odd, scores = memory.poisoned[:, :, skipped:, None], torch.ones_like(columns, dtype=places.kv_logits.dtype)
    if past is None and blocks > slots // width + 1:
        parts = [scores[:, :, i] for i in range(lists)]
        for j in range(slots // width + 1, blocks):
            i = j - skipped
            row, _ = tame(places.kv_logits[..., : j * width], odd[:, :, i], o)
            soft = _solve(row, min(slots * o.fetch_k_ratio, j * width), o, plan.routing)
            parts[i] = soft.gather(-1, columns[:, :, i].clamp_max(j * width - 1))
        scores = torch.stack(parts, 2)
    start = width * torch.arange(skipped, blocks, device=columns.device)
    start = start[None] if past is None else past.start[:, None] + start
    scores = scores.masked_fill(odd & (start > slots)[:, None, :, None], torch.nan)
    scores = handed_on(scores, memory.there, o)
    return scores if token is None else with_zero_gradient(scores, token)


class Decided(NamedTuple):
    """What the routers made of a call."""

    queries: Queries
    limits: Limits
    memory: Memory
    scores: Tensor  # of the memory: by column (B, E, S), or by slot of every list (B, E, I, K)

    def of_all_blocks(self) -> Decided:
        """With lists of block 0, which are empty, too; I = J then."""
        queries, memory, scores = self.queries, self.memory, self.scores
        blocks, lists, capacity = self.limits.thresholds.shape[2], *queries.places.shape[2:]
        if blocks == lists:
            return self

        def all_of(t: Tensor) -> Tensor:
            return F.pad(t, (*(0, 0) * (t.ndim - 3), 1, 0))

        inverse = torch.where(queries.inverse < 0, -1, queries.inverse + capacity)
        lists_of = {name: all_of(getattr(queries, name)) for name in ("places", "filled", "counts", "mask", "scores")}
        memory = memory._replace(columns=all_of(memory.columns), counts=all_of(memory.counts))
        scores = scores if scores.ndim == 3 else all_of(scores)
        return Decided(queries._replace(inverse=inverse, **lists_of), self.limits, memory, scores)


# --- one token of every item ------------------------------------------------------------------------------------------


def routed_now(cache: StaticCache, place: Tensor, c: AutoregressiveConfig) -> tuple[Bool[Tensor, "B E"], Tensor]:
    """Whether the token at a place (B) of the unfinished block has a slot, and its score (B, E)."""
    logits = cache.tail_q_logits
    own = logits.gather(-1, place[:, None, None].expand(-1, logits.shape[1], -1))[..., 0]
    later = (cache.start > 0)[:, None]
    if c.everybody:
        routed, soft = later.expand_as(own), torch.ones_like(own)
    else:
        so_far = torch.arange(logits.shape[-1], device=logits.device) <= place[:, None]
        candidate = (logits >= cache.threshold[..., None]) & so_far[:, None]
        reached = own >= cache.threshold
        routed = later & reached & (candidate.sum(-1) <= c.capacity)
    if c.options.solver == "sigmoid":
        soft = own.sigmoid()
    elif not c.everybody:
        above = own.masked_fill(~routed, 0) + cache.dual
        soft = (above / last_temperature(c.options)).masked_fill(above >= 0, 0).exp()
    return routed, handed_on(soft, routed, c.options)


def stored_scores(cache: StaticCache, c: AutoregressiveConfig) -> Float[Tensor, "B E K"]:
    """Of the stored memory."""
    there = cache.positions >= 0
    if c.options.solver == "sigmoid":
        return handed_on(cache.logits.sigmoid(), there, c.options)
    odd = cache.poisoned & (cache.start > c.num_routed_key_values)[:, None]
    return torch.ones_like(cache.logits).masked_fill(odd[..., None], torch.nan).masked_fill(~there, 0)


# --- solvers ----------------------------------------------------------------------------------------------------------


def last_temperature(o: RouterOptions) -> float:
    """That of the scores: of the descent one decay beyond its last step."""
    return o.eps if o.solver == "exact" else temperature(o.n_iters, o.eps, o.eps_init, o.eps_decay)


def tame(rows: Tensor, odd: Tensor, o: RouterOptions) -> tuple[Tensor, Tensor]:
    """Logits that a solver can take, and what was subtracted: zeros for rows with a NaN, others bounded.

    Else the gradient of all tokens in a row would be NaN if that of one is, though what came before asks nothing of it.
    The exact solver does not mind a shift: beside a logit of 1e300 it could not tell the others apart.
    """
    rows = torch.where(odd, 0, rows)
    finfo, last = torch.finfo(rows.dtype), last_temperature(o)
    most = finfo.max / 8 * min(last, 1)
    rows = rows.clamp(-most, most)
    if o.solver != "exact" or not rows.shape[-1]:
        return rows, torch.zeros_like(rows[..., :1])
    shift = rows.detach().amax(-1, keepdim=True)
    return (rows - shift).clamp_min(-last / finfo.eps / 8), shift  # below, s + a has no digit left


def _solve(rows: Tensor, mass: float, o: RouterOptions, triton: bool) -> Tensor:
    if o.solver == "exact":
        return ops.capped_simplex(rows, None, float(mass), o.eps, triton)[0]
    return ops.coordinate_descent(rows, None, float(mass), o.n_iters, o.eps, o.eps_init, o.eps_decay, triton)[0]


def _duals(rows: Float[Tensor, "B E J W"], places: Places, c: AutoregressiveConfig) -> Float[Tensor, "B E J"]:
    """The a in the score exp(min(s + a, 0) / temperature), from the rows of the blocks before."""
    o = c.options
    if places.there is not None:  # of blocks that are not full nobody asks
        there = places.there[:, : rows.shape[2] * rows.shape[3]].unflatten(-1, (-1, rows.shape[3]))
        rows = torch.where(there[:, None], rows, 0)
    odd = rows.isnan().any(-1, keepdim=True)
    mass = min(c.num_routed_queries * o.fetch_k_ratio, c.routed_window_size)
    tamed, shift = tame(rows, odd, o)
    dual = _exact_dual(tamed, mass, o.eps) if o.solver == "exact" else _iterative_dual(tamed, mass, o)
    return torch.where(odd, torch.nan, dual - shift)[..., 0]


def _iterative_dual(s: Tensor, mass: float, o: RouterOptions) -> Tensor:
    """The last iterate of `ops.coordinate_descent`."""
    u = a = torch.zeros_like(s)
    for t in range(o.n_iters):
        eps = temperature(t, o.eps, o.eps_init, o.eps_decay)
        a = eps * (math.log(mass) - (u / eps).logsumexp(-1, keepdim=True))
        u = torch.where(s < -a, s, -a)
    return a[..., :1]


def _exact_dual(s: Tensor, mass: float, eps: float) -> Tensor:
    """Of `ops.capped_simplex`: the first number of saturated tokens that leaves the next below 1."""
    if mass >= s.shape[-1]:
        return torch.full_like(s[..., :1], torch.inf)
    best = s.detach().sort(-1, descending=True).values
    rest = (best / eps).flip(-1).logcumsumexp(-1).flip(-1)
    left = mass - torch.arange(s.shape[-1], device=s.device, dtype=s.dtype)
    stays = (left > 0) & (left.clamp_min(torch.finfo(s.dtype).tiny).log() <= rest - best / eps)
    full = stays.int().argmax(-1, keepdim=True)
    free = s <= best.gather(-1, full)
    return eps * ((mass - full.to(s.dtype)).log() - torch.where(free, s / eps, -torch.inf).logsumexp(-1, keepdim=True))
