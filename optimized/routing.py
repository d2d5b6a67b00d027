"""Routing: each expert picks K of N tokens by a differentiable top-k.

Letters: B batch, N tokens, E experts, K slots per expert, D model dimension, W block length.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from optimized import ops, validation
from optimized.backends import Request, choose
from optimized.validation import RouterOptions


class Routes(NamedTuple):
    """What a router decided. Indices are distinct in a row: valid tokens ascending, then masked ones ascending.

    mask is False where a slot holds a masked token; such a slot takes part in nothing.
    """

    indices: Int64[Tensor, "B E K"]
    mask: Bool[Tensor, "B E K"]
    scores: Float[Tensor, "B E K"]
    logits: Float[Tensor, "B E N"]

    @property
    def load(self) -> Int64[Tensor, "B E"]:
        """Number of valid tokens that each expert received."""
        return self.mask.sum(dim=-1)


def route(
    x: Float[Tensor, "B N D"],
    tokens: Float[Tensor, "*B E D"],
    k: int,
    mask: Bool[Tensor, "B N"] | None = None,
    *,
    random_route: bool = False,
    generator: torch.Generator | None = None,
    **router_options: Any,
) -> Routes:
    """Choose k tokens for each of E experts.

    Args:
        x: (B, N, D) float64, float32, float16 or bfloat16; computed in at least float32, under autocast too.
        tokens: routing tokens, (E, D) or (B, E, D).
        k: slots per expert. If N <= k all tokens are taken in order, with score 1 (0 where masked) and no gradient.
        mask: (B, N) bool, False for padding. A masked token's content, NaN too, reaches nothing.
        random_route: choose uniformly among valid tokens instead (keys are torch.rand of shape (B, E, N), drawn with
            `generator`), with constant scores: a negative control.
        router_options: see `RouterOptions`.
    Returns Routes; scores and logits in float32, or float64 for float64 input. With straight_through scores are 1.
    A NaN logit of a valid token makes all scores of its (batch, expert) NaN.
    Raises TypeError or ValueError naming the argument.
    """
    options = RouterOptions.of_stage(router_options)
    _check(x, tokens, k, mask, random_route, generator)
    return _route(x, tokens, int(k), mask, options, random_route, generator)[0]


def _check(x: Any, tokens: Any, k: Any, mask: Any, random_route: Any, generator: Any) -> None:
    validation.tensor("x", x, "B", "N", "D")
    validation.routing_tokens("tokens", tokens, x, "E", x.shape[2])
    validation.positive_int("k", k)
    validation.token_mask("mask", mask, x)
    validation.flag("random_route", random_route)
    if generator is not None and not (random_route and isinstance(generator, torch.Generator)):
        validation.reject("generator", "a torch.Generator, with random_route=True only", validation.describe(generator))
    if generator is not None and generator.device.type != x.device.type:
        validation.reject("generator", f"a generator on {x.device}", f"one on {generator.device}")


def _route(
    x: Tensor,
    tokens: Tensor,
    k: int,
    mask: Tensor | None,
    options: RouterOptions,
    random_route: bool = False,
    generator: torch.Generator | None = None,
    allow_triton: bool = True,
) -> tuple[Routes, Tensor]:
    """The routes and their inverse map (B, E, N)."""
    triton = choose("routing", Request(x.device, x.dtype, allow_triton=allow_triton)).triton
    if triton:
        logits = ops.project(x, tokens, mask, options.cosine_sim_scale if options.cosine_sim_routing else None)[0]
    else:
        logits = _logits(x, tokens, mask, options)
    n = logits.shape[-1]
    valid = None if mask is None else mask[:, None].expand_as(logits)
    if n <= k:
        logits = logits.detach()
        slot_mask = torch.ones_like(logits, dtype=torch.bool) if valid is None else valid
        indices = torch.arange(n, device=x.device).expand_as(logits)
        inverse = torch.where(slot_mask, indices, -1).int()
        return Routes(indices, slot_mask, slot_mask.to(logits.dtype), logits), inverse

    keys = logits.detach()
    if random_route:
        keys = torch.rand(logits.shape, generator=generator, device=x.device)
    width = options.route_block_size
    # The value of a straight-through score is 1, so that only a derivative asks for the soft one.
    solve = not random_route and not (options.straight_through and _is_constant(logits))
    if width is None or width >= n:
        indices, slot_mask, inverse = ops.select(keys, mask, k, triton)
        soft = _soft_scores(logits, mask, k, options, triton) if solve else logits
    else:
        indices, slot_mask, soft = _route_blocks(logits, keys, mask, k, options, solve, triton)
        inverse = ops.inverse_map(indices, slot_mask, n)

    scores = slot_mask.to(logits.dtype)
    if random_route:
        return Routes(indices, slot_mask, scores, logits), inverse
    if solve:
        soft = soft.gather(-1, indices)
        soft = scores + (soft - soft.detach()) if options.straight_through else soft
        scores = torch.where(slot_mask, soft, 0)
    nan = logits.isnan() if valid is None else logits.isnan() & valid
    return Routes(indices, slot_mask, torch.where(nan.any(-1, keepdim=True), math.nan, scores), logits), inverse


def route_both(
    x: Tensor,
    routers: tuple[Router, Router],
    routing_tokens: tuple[Tensor | None, Tensor | None],
    gammas: tuple[Tensor | None, Tensor | None],
    ks: tuple[int, int],
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Routes, Routes, Tensor]:
    """Rows of queries and of keys/values (E, B, K, D), normalised, their routes, and the queries' inverse map.

    By one Triton operator, for checked arguments with N > K on both sides.
    """
    options, n = routers[0].options, x.shape[1]
    for router in routers:
        router.check_input(x)
    tokens = [
        given if router.routing_token is None else router.routing_token
        for router, given in zip(routers, routing_tokens)
    ]
    if gammas[0] is not None and gammas[1] is not None and gammas[0].dtype != gammas[1].dtype:
        common = torch.promote_types(gammas[0].dtype, gammas[1].dtype)  # one kernel reads either
        gammas = gammas[0].to(common), gammas[1].to(common)
    batched = max(t.ndim for t in tokens) == 3
    tokens = [t.expand(x.shape[0], -1, -1) if batched else t for t in tokens]
    solver = ops.Solver(
        *(float(min(k * options.fetch_k_ratio, n)) for k in ks),
        scale=options.cosine_sim_scale if options.cosine_sim_routing else None,
        straight_through=options.straight_through,
        exact=options.solver == "exact",
        n_iters=options.n_iters,
        eps=options.eps,
        eps_init=options.eps_init,
        eps_decay=options.eps_decay,
    )
    queries, keys_values, q_scores, kv_scores, logits, *made = ops.route_and_gather(
        x, *tokens, *gammas, mask, *ks, *solver
    )
    q_indices, q_slots, q_inverse, kv_indices, kv_slots, _, *_ = made
    q_logits, kv_logits = logits.chunk(2, 1)
    q_routes = Routes(q_indices, q_slots, q_scores, q_logits)
    return queries, keys_values, q_routes, Routes(kv_indices, kv_slots, kv_scores, kv_logits), q_inverse


def _is_constant(t: Tensor) -> bool:
    """Whether nothing will be differentiated with respect to t, in either mode, nor by a transform that looks on."""
    if t.requires_grad or torch.compiler.is_compiling():
        return False
    return torch.autograd.forward_ad._current_level < 0 and torch._C._functorch.maybe_current_level() is None


def _logits(x: Tensor, tokens: Tensor, mask: Tensor | None, options: RouterOptions) -> Tensor:
    """(B, E, N): one GEMM when all batch items share their routing tokens."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, tokens.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x, tokens = x.to(dtype), tokens.to(dtype)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        if options.cosine_sim_routing:
            x = F.normalize(x, dim=-1, eps=1e-12) * options.cosine_sim_scale
            tokens = F.normalize(tokens, dim=-1, eps=1e-12)
        if tokens.ndim == 2:
            return F.linear(x, tokens).transpose(1, 2).contiguous()
        return torch.bmm(tokens, x.transpose(1, 2))


def _soft_scores(logits: Tensor, mask: Tensor | None, k: int, options: RouterOptions, triton: bool) -> Tensor:
    mass = float(min(k * options.fetch_k_ratio, logits.shape[-1]))
    if options.solver == "exact":
        return ops.cap(logits, mask, mass, options.eps, triton)[0]
    epsilons = (options.eps, options.eps_init, options.eps_decay)
    return ops.descend(logits, mask, mass, options.n_iters, *epsilons, triton)[0]


def _route_blocks(
    logits: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    k: int,
    options: RouterOptions,
    solve: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """ceil(K / blocks) tokens from each block; a block as short as that gives all of its tokens with score 1.

    Whole blocks are folded into the batch dimension and solved in one go, a short last block after them.
    """
    n, width = logits.shape[-1], options.route_block_size
    k_block, whole = math.ceil(k / math.ceil(n / width)), n // width
    indices, masks, soft = [], [], []
    for start, length, count in ((0, width, whole), (whole * width, n - whole * width, 1)):
        if length == 0:
            continue
        span = slice(start, start + length * count)
        block_mask = None if mask is None else _fold_blocks(mask[..., span], count)
        block_keys = _fold_blocks(keys[..., span], count)
        chosen, chosen_mask, _ = ops.select(block_keys, block_mask, min(k_block, length), triton)
        first = start + length * torch.arange(count, device=logits.device).repeat_interleave(chosen.shape[-1])
        indices.append(_unfold_blocks(chosen, count) + first)
        masks.append(_unfold_blocks(chosen_mask, count))
        if length <= k_block or not solve:
            soft.append(torch.ones_like(logits[..., span]))
        else:
            scores = _soft_scores(_fold_blocks(logits[..., span], count), block_mask, k_block, options, triton)
            soft.append(_unfold_blocks(scores, count))
    chosen, chosen_mask = torch.cat(indices, -1), torch.cat(masks, -1)
    if mask is not None:
        # Each block has its masked slots last; the row wants them last.
        order = (~chosen_mask).to(torch.uint8).argsort(dim=-1, stable=True)
        chosen, chosen_mask = chosen.gather(-1, order), chosen_mask.gather(-1, order)
    return chosen, chosen_mask, torch.cat(soft, -1)


def _fold_blocks(rows: Tensor, count: int) -> Tensor:
    """(B, ..., count W) to (B count, ..., W)."""
    return rows.unflatten(-1, (count, -1)).movedim(-2, 1).flatten(0, 1).contiguous()


def _unfold_blocks(rows: Tensor, count: int) -> Tensor:
    """(B count, E, W) to (B, E, count W)."""
    return rows.unflatten(0, (-1, count)).movedim(1, -2).flatten(-2)


def coordinate_descent(
    logits: Float[Tensor, "B E N"],
    k: float,
    mask: Bool[Tensor, "B N"] | None = None,
    *,
    n_iters: int = 20,
    eps: float = 0.03,
    eps_init: float = 4.0,
    eps_decay: float = 0.7,
) -> Float[Tensor, "B E N"]:
    """Soft top-k scores in [0, 1] of mass about k, 0 where masked; see `ops.coordinate_descent`."""
    _check_solver(logits, k, mask)
    options = RouterOptions(n_iters=n_iters, eps=eps, eps_init=eps_init, eps_decay=eps_decay)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    epsilons = (options.eps, options.eps_init, options.eps_decay)
    return ops.descend(wide, mask, float(k), options.n_iters, *epsilons, _by_triton(wide))[0]


def capped_simplex(
    logits: Float[Tensor, "B E N"], k: float, mask: Bool[Tensor, "B N"] | None = None, *, eps: float = 0.03
) -> Float[Tensor, "B E N"]:
    """The limit of `coordinate_descent` at temperature eps, of mass min(k, valid tokens); see `ops.capped_simplex`."""
    _check_solver(logits, k, mask)
    options = RouterOptions(eps=eps)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return ops.cap(wide, mask, float(k), options.eps, _by_triton(wide))[0]


def _by_triton(logits: Tensor) -> bool:
    return choose("routing", Request(logits.device, logits.dtype)).triton


def _check_solver(logits: Any, k: Any, mask: Any) -> None:
    validation.tensor("logits", logits, "B", "E", "N")
    validation.number("k", k, "a finite number > 0", lambda v: v > 0)
    validation.token_mask("mask", mask, logits, dim=2)


def select(
    logits: Float[Tensor, "B E N"], k: int, mask: Bool[Tensor, "B N"] | None = None
) -> tuple[Int64[Tensor, "B E K"], Bool[Tensor, "B E K"]]:
    """Indices and slot mask of the k best: valid before masked, larger logit, smaller index; see `ops.select`."""
    validation.tensor("logits", logits, "B", "E", "N")
    validation.positive_int("k", k)
    validation.token_mask("mask", mask, logits, dim=2)
    if k > logits.shape[-1]:
        validation.reject("k", f"at most N = {logits.shape[-1]}", k)
    keys = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    return ops.select(keys, mask, int(k), _by_triton(keys))[:2]


class Router(nn.Module):
    """`route` with one learned routing token per expert.

    State: routing_token (E, D), standard normal; absent with learned_routing_tokens=True, when forward takes tokens.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        options: RouterOptions,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        use_triton: bool = True,
    ) -> None:
        super().__init__()
        self.use_triton = validation.flag("use_triton", use_triton)
        self.dim = validation.positive_int("dim", dim)
        self.num_experts = validation.positive_int("num_experts", num_experts)
        if not isinstance(options, RouterOptions):
            validation.reject("options", "RouterOptions", validation.describe(options), TypeError)
        self.options = options
        self.routing_token = (
            None
            if options.learned_routing_tokens
            else nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.routing_token is not None:
            nn.init.normal_(self.routing_token)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        k: int,
        mask: Bool[Tensor, "B N"] | None = None,
        routing_tokens: Float[Tensor, "*B E D"] | None = None,
        random_route: bool = False,
        generator: torch.Generator | None = None,
    ) -> Routes:
        """See `route`. routing_tokens, (E, D) or (B, E, D), exactly when learned_routing_tokens=True."""
        return self.decide(x, k, mask, routing_tokens, random_route, generator)[0]

    def decide(
        self,
        x: Float[Tensor, "B N D"],
        k: int,
        mask: Bool[Tensor, "B N"] | None = None,
        routing_tokens: Float[Tensor, "*B E D"] | None = None,
        random_route: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Routes, Tensor]:
        """As forward, with the map from tokens to slots, see `ops.inverse_map`."""
        self.check_input(x)
        self.check_tokens("routing_tokens", routing_tokens, x)
        tokens = routing_tokens if self.routing_token is None else self.routing_token
        _check(x, tokens, k, mask, random_route, generator)
        return _route(x, tokens, int(k), mask, self.options, random_route, generator, self.use_triton)

    def check_input(self, x: Any) -> None:
        own = None if self.routing_token is None else ("the routing token", self.routing_token)
        validation.tensor("x", x, "B", "N", self.dim, beside=self.routing_token, dtype_of=own)

    def check_tokens(self, argument: str, tokens: Tensor | None, x: Tensor) -> None:
        if self.routing_token is not None:
            if tokens is not None:
                validation.reject(argument, "None, since learned_routing_tokens=False", tokens)
        elif tokens is None:
            validation.reject(argument, "a tensor, since learned_routing_tokens=True", None)
        else:
            validation.routing_tokens(argument, tokens, x, self.num_experts, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, options={self.options}"
