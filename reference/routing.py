"""Routing: each expert picks K of N tokens by a differentiable top-k.

Three steps. `logits` are dot products of tokens with one learned routing token per expert. A solver turns a row of
logits into soft scores 0 <= lambda <= 1 of total mass about k. `select` takes the K best logits, and the soft
scores of the chosen tokens are handed on, so that gradients reach the router.

Letters: B batch, N tokens, E experts, K slots per expert, D model dimension, T iterations.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from reference import contract
from reference.contract import RouterOptions, Routes, TokenMask


def route(
    x: Float[Tensor, "B N D"],
    tokens: Float[Tensor, "*B E D"],
    k: int,
    mask: TokenMask | None = None,
    *,
    random_route: bool = False,
    generator: torch.Generator | None = None,
    **router_options: Any,
) -> Routes:
    """Choose k tokens for each of E experts.

    x (B, N, D); tokens (E, D) or (B, E, D), one per expert; mask (B, N) bool, False for padding. `router_options`
    as in `RouterOptions`. Everything is computed in at least float32, under autocast too. If N <= k there is nothing
    to choose: all tokens in order, score 1 (0 where masked), no gradient. `random_route` draws valid tokens uniformly
    (a float32 torch.rand of shape (B, E, N) takes the logits' place), the negative control; scores are then constant.

    Returns Routes of int64, bool and >= float32. A NaN logit of a valid token makes all scores of its row NaN, with
    solver="sigmoid" its own alone. With that solver scores have a gradient also if N <= k.
    Raises TypeError or ValueError naming the argument.
    """
    options = RouterOptions.of_stage(router_options)
    mask = contract.route_input(x, tokens, k, mask, random_route, generator)
    contract.solvable(options, x.dtype)
    return _route(x, tokens, contract.positive_int("k", k), mask, options, random_route, generator)


def _route(
    x: Tensor,
    tokens: Tensor,
    k: int,
    mask: Tensor | None,
    options: RouterOptions,
    random_route: bool = False,
    generator: torch.Generator | None = None,
) -> Routes:
    batch, n, _ = x.shape
    if mask is None:
        mask = torch.ones(batch, n, dtype=torch.bool, device=x.device)
    logits = routing_logits(x.masked_fill(~mask[..., None], 0), tokens, options)
    valid = mask[:, None].expand_as(logits)
    alone = options.solver == "sigmoid" and not random_route
    if n <= k:
        indices = torch.arange(n, device=x.device).expand_as(logits)
        if alone:
            return Routes(indices, valid, handed_on(logits.sigmoid(), valid, options), logits)
        return Routes(indices, valid, valid.to(logits.dtype), logits.detach())

    keys = logits
    if random_route:
        # In float32 whatever the default dtype: half precision draws ties.
        keys = torch.rand(logits.shape, generator=generator, device=x.device, dtype=torch.float32)
    width = options.route_block_size
    starts = [0] if width is None else range(0, n, width)
    k_block = -(-k // len(starts))
    taken: list[Tensor] = []
    soft: list[Tensor] = []
    for start in starts:
        block = slice(start, n if width is None else min(start + width, n))
        length = block.stop - start
        taken.append(start + select(keys[..., block], min(k_block, length), mask[:, block])[0])
        if alone:
            soft.append(logits[..., block].sigmoid())
        elif length <= k_block or random_route:
            soft.append(valid[..., block].to(logits.dtype))
        else:
            mass = min(k_block * options.fetch_k_ratio, length)
            soft.append(solve(logits[..., block], mass, mask[:, block], options))
    chosen = torch.cat(taken, dim=-1)
    # Valid slots first in the whole row, not only within each block.
    order = (~valid.gather(-1, chosen)).long().argsort(dim=-1, stable=True)
    chosen = chosen.gather(-1, order)
    slot_mask = valid.gather(-1, chosen)

    scores = handed_on(torch.cat(soft, dim=-1).gather(-1, chosen), slot_mask, options)
    if not alone:
        poisoned = (logits.isnan() & valid).any(dim=-1, keepdim=True)
        scores = torch.where(poisoned, float("nan"), scores)
    return Routes(chosen, slot_mask, scores, logits)


def handed_on(soft: Tensor, slot_mask: Tensor, options: RouterOptions) -> Tensor:
    """Scores of the slots: the soft ones, or 1 with their gradient. A NaN stays one."""
    if options.straight_through:
        soft = 1 + (soft - soft.detach())
    return torch.where(slot_mask, soft, 0.0)


def widen(t: Tensor) -> Tensor:
    """In at least float32."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def routing_logits(
    x: Float[Tensor, "B N D"], tokens: Float[Tensor, "*B E D"], options: RouterOptions
) -> Float[Tensor, "B E N"]:
    """<x[b, n], r[e]>, or the scaled cosine of the two, in at least float32."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, tokens.dtype), torch.float32)
    with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        x, tokens = x.to(dtype).contiguous(), tokens.to(dtype)
        if options.cosine_sim_routing:
            x, tokens = F.normalize(x, dim=-1, eps=1e-12), F.normalize(tokens, dim=-1, eps=1e-12)
        # Sums in one order for every token, which a product of matrices does not promise: equal tokens get equal
        # logits, however many stand beside them, and decoding ranks them as the whole sequence does.
        logits = torch.stack([(x * token.unsqueeze(-2)).sum(-1) for token in tokens.unbind(-2)], 1)
    return logits * options.cosine_sim_scale if options.cosine_sim_routing else logits


def solve(logits: Tensor, k: float, mask: Tensor | None, options: RouterOptions) -> Tensor:
    if options.solver == "exact":
        return capped_simplex(logits, k, mask, eps=options.eps)
    o = options
    return coordinate_descent(logits, k, mask, n_iters=o.n_iters, eps=o.eps, eps_init=o.eps_init, eps_decay=o.eps_decay)


def coordinate_descent(
    logits: Float[Tensor, "B E N"],
    k: float,
    mask: TokenMask | None = None,
    *,
    n_iters: int = 20,
    eps: float = 0.03,
    eps_init: float = 4.0,
    eps_decay: float = 0.7,
    saturated: Bool[Tensor, "T B E N"] | None = None,
) -> Float[Tensor, "B E N"]:
    """Soft top-k of mass about k by eps-scaled coordinate descent.

    Wright 2015, "Coordinate descent algorithms"; as a router: Ainslie et al. 2023, "CoLT5: Faster Long-Range
    Transformers with Conditional Computation", arXiv 2303.09752.

    The textbook alternates a = eps (log k - logsumexp((s + b) / eps)) and b = -relu(s + a), which ends in
    exp((s + a + b) / eps). Since b follows from a, s + b = min(s, -a): the whole state of a row is one scalar. The
    temperature of step t is max(eps_init * eps_decay**t, eps). Masked tokens get 0.

    `saturated[t]` replaces the comparison s >= -a_t. Tests inject it where a logit lies within rounding of such a kink.
    """
    mask = contract.solver_input(logits, k, mask)
    options = RouterOptions(n_iters=n_iters, eps=eps, eps_init=eps_init, eps_decay=eps_decay)
    contract.solvable(options, logits.dtype)
    logits = widen(logits)
    valid = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask[:, None].expand_as(logits)
    s = torch.where(valid, logits, 0)
    a, below = _descend(s, valid, k, options, saturated)
    scores = torch.where(below, (s + a) / last_temperature(options), 0).exp()
    return _zero_masked_spread_nan(scores, logits, valid)


def _descend(
    s: Tensor, valid: Tensor, k: float, o: RouterOptions, saturated: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The last a (..., 1), and which entries it does not saturate."""
    counted = valid | ~valid.any(dim=-1, keepdim=True)  # a row without valid tokens stays finite
    temperature = [max(o.eps_init * o.eps_decay**t, o.eps) for t in range(o.n_iters)]
    u = torch.zeros_like(s)
    for t in range(o.n_iters):
        exponent = torch.where(counted, u / temperature[t], -torch.inf)
        a = temperature[t] * (math.log(k) - exponent.logsumexp(dim=-1, keepdim=True))
        # `where`, not minimum: autograd of minimum splits a tie in two.
        below = valid & (s < -a if saturated is None else ~saturated[t])
        u = torch.where(below, s, -a)
    return a, below


def capped_simplex(
    logits: Float[Tensor, "B E N"], k: float, mask: TokenMask | None = None, *, eps: float = 0.03
) -> Float[Tensor, "B E N"]:
    """The limit of coordinate descent: min(1, exp((s + a) / eps)) with the smallest a of mass min(k, valid tokens).

    With z = exp(a / eps) the mass is concave and piecewise linear in z, so Newton's method from the left only ever
    adds tokens to the saturated set and stops after finitely many steps (capping: Warmuth & Kuzmin 2008,
    "Randomized Online PCA Algorithms with Regret Bounds that are Logarithmic in the Dimension"; constrained softmax:
    Martins & Kreutzer 2017, "Learning What's Easy: Fully Differentiable Neural Easy-First Taggers").
    Differentiating the last step with the set held fixed is the implicit gradient.
    """
    mask = contract.solver_input(logits, k, mask)
    contract.solvable(RouterOptions(eps=eps), logits.dtype)
    logits = widen(logits)
    valid = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask[:, None].expand_as(logits)
    s = torch.where(valid & ~logits.isnan(), logits, 0)
    a, free = _cap(s, valid, k, eps)
    scores = torch.where(free, (s + a) / eps, 0).exp()
    return _zero_masked_spread_nan(scores, logits, valid)


def _cap(s: Tensor, valid: Tensor, k: float, eps: float) -> tuple[Tensor, Tensor]:
    """The smallest a (..., 1) of that mass, 0 where all are saturated, and which entries it does not saturate."""
    saturated = valid & (valid.sum(dim=-1, keepdim=True) <= k)
    while True:
        free = valid & ~saturated
        # The count in s's dtype first: an integer tensor and a float make a float32 one.
        left = (k - saturated.sum(dim=-1, keepdim=True).to(s.dtype)).clamp_min(0)
        # A row without free tokens needs no a; 0 keeps it, and its gradient, finite.
        exponent = torch.where(free | ~free.any(dim=-1, keepdim=True), s / eps, -torch.inf)
        a = eps * (left.log() - exponent.logsumexp(dim=-1, keepdim=True))
        grown = saturated | (free & (s + a >= 0))
        if torch.equal(grown, saturated):
            return a, free
        saturated = grown


def last_temperature(o: RouterOptions) -> float:
    """That of the scores: of the descent one decay beyond its last step."""
    return o.eps if o.solver == "exact" else max(o.eps_init * o.eps_decay**o.n_iters, o.eps)


def dual_of(logits: Float[Tensor, "*rows N"], k: float, options: RouterOptions) -> Float[Tensor, "*rows 1"]:
    """The a in lambda = exp(min(s + a, 0) / last_temperature) of rows of numbers; infinite where all are saturated."""
    valid = torch.ones_like(logits, dtype=torch.bool)
    if options.solver == "iterative":
        return _descend(logits, valid, k, options)[0]
    if k >= logits.shape[-1]:
        return torch.full_like(logits[..., :1], torch.inf)
    a, free = _cap(logits, valid, k, options.eps)
    # Saturated tokens that alone amount to the mass, by rounding, leave nothing to the rest, at any a down to -inf: the
    # least a that saturates them.
    least = torch.where(free, torch.inf, logits).amin(-1, keepdim=True)
    return torch.where(a == -torch.inf, -least, a)


def _zero_masked_spread_nan(scores: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
    poisoned = (logits.isnan() & valid).any(dim=-1, keepdim=True)
    return torch.where(valid, torch.where(poisoned, float("nan"), scores), 0)


def select(
    logits: Float[Tensor, "B E N"], k: int, mask: TokenMask | None = None
) -> tuple[Int64[Tensor, "B E K"], Bool[Tensor, "B E K"]]:
    """The k best tokens of each row, ranked by (valid before masked, larger logit, smaller index).

    NaN ranks below every number; -0.0 and 0.0 tie. Returned ascending by index, valid tokens first.
    """
    mask = contract.select_input(logits, k, mask)
    s = logits.detach()
    valid = torch.ones_like(s, dtype=torch.bool) if mask is None else mask[:, None].expand_as(s)
    tier = torch.where(valid, s.isnan().long(), 2)
    key = torch.where(tier == 0, s + 0.0, 0.0)  # adding 0.0 turns -0.0 into 0.0; other tiers rank by index alone
    best = key.argsort(dim=-1, descending=True, stable=True)
    best = best.gather(-1, tier.gather(-1, best).argsort(dim=-1, stable=True))[..., :k]
    best = best.sort(dim=-1).values
    best = best.gather(-1, (~valid.gather(-1, best)).long().argsort(dim=-1, stable=True))
    return best, valid.gather(-1, best)


class Router(nn.Module):
    """One routing token per expert, and `route` with it.

    State: routing_token (E, D), absent with learned_routing_tokens=True, when forward must be given them.
    """

    routing_token: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        options: RouterOptions,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = contract.positive_int("dim", dim)
        self.num_experts = contract.positive_int("num_experts", num_experts)
        if not isinstance(options, RouterOptions):
            contract.reject("options", "RouterOptions", contract.describe(options), TypeError)
        self.options = options
        token = None
        if not options.learned_routing_tokens:
            token = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.register_parameter("routing_token", token)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.routing_token is not None:
            nn.init.normal_(self.routing_token)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        k: int,
        mask: TokenMask | None = None,
        routing_tokens: Float[Tensor, "*B E D"] | None = None,
        random_route: bool = False,
        generator: torch.Generator | None = None,
        routes: Routes | None = None,
    ) -> Routes:
        """See `route`. routing_tokens, (E, D) or (B, E, D), exactly when learned_routing_tokens=True.

        routes: a decision made elsewhere, returned less the slots that hold masked tokens; k and the routing token have
        no say in it. A routing token of the module's own that decides nothing gets a gradient of zeros.
        """
        own: Tensor | None = self.routing_token  # read once: a parametrization computes it
        contract.tensor("x", x, "B", "N", self.dim)
        contract.beside_parameters("x", x, own, "the routing token")
        k = contract.positive_int("k", k)
        mask = contract.token_mask("mask", mask, x)
        contract.randomness(x, random_route, generator)
        if routes is not None:
            if routing_tokens is not None:
                contract.reject("routing_tokens", "None with injected routes", routing_tokens)
            contract.routes("routes", routes, x.shape[0], self.num_experts, x.shape[1], x)
            made = restrict(routes, mask)
        else:
            given = self.options.learned_routing_tokens
            contract.held_or_given_tokens("routing_tokens", routing_tokens, x, self.num_experts, self.dim, given=given)
            tokens = routing_tokens if own is None else own
            assert tokens is not None
            contract.solvable(self.options, x.dtype)
            made = _route(x, tokens, k, mask, self.options, random_route, generator)
        return made if own is None else made._replace(scores=with_zero_gradient(made.scores, own))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, options={self.options}"


def restrict(routes: Routes, mask: Bool[Tensor, "B N"] | None) -> Routes:
    """Injected routes, less the slots that hold masked tokens."""
    if mask is None:
        return routes
    by_expert = mask[:, None].expand(-1, routes.mask.shape[1], -1)
    return routes._replace(mask=routes.mask & by_expert.gather(-1, routes.indices))


def with_zero_gradient(scores: Float[Tensor, "B E K"], tokens: Float[Tensor, "E D"]) -> Float[Tensor, "B E K"]:
    """The scores plus an empty sum of routing tokens: these get a gradient of zeros, not None, where they had no say.

    So every parameter has a gradient in every step, as DistributedDataParallel expects.
    """
    return scores + tokens[..., :0].sum().to(scores.dtype)
