"""Routing: each expert picks K of N tokens by a differentiable top-k.

Letters: B batch, N tokens, E experts, K slots per expert, D model dimension, W block length.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from optimized import ops
from optimized.plan import Kind, Plan, Request, bind, choose
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

    Args:
        x: (B, N, D) float64, float32, float16 or bfloat16; computed in at least float32, under autocast too.
        tokens: routing tokens, (E, D) or (B, E, D).
        k: slots per expert. If N <= k all tokens are taken in order, with score 1 (0 where masked) and gradient 0.
        mask: (B, N) bool, False for padding. A masked token's content, NaN too, reaches nothing.
        random_route: choose uniformly among valid tokens instead (keys are torch.rand of shape (B, E, N) in float32,
            drawn with `generator`), with constant scores: a negative control.
        router_options: see `RouterOptions`.
    Returns Routes; scores and logits in float32, or float64 for float64 input. With straight_through scores are 1.
    A NaN logit of a valid token makes all scores of its (batch, expert) NaN; with solver="sigmoid", whose scores have a
    gradient also if N <= k, its own.
    Raises TypeError or ValueError naming the argument.
    """
    options = RouterOptions.of_stage(router_options)
    mask = contract.route_input(x, tokens, k, mask, random_route, generator)
    contract.solvable(options, x.dtype)
    keys = _random_keys(x, tokens, generator) if random_route else None
    triton = bind(Kind(x.device, x.dtype, ("routing",))).routing
    k = contract.positive_int("k", k)
    return in_order(_route(x, tokens, k, mask, options, keys, triton), mask, k)


def _random_keys(x: Tensor, tokens: Tensor, generator: torch.Generator | None) -> Tensor:
    shape = (x.shape[0], tokens.shape[-2], x.shape[1])
    return torch.rand(shape, generator=generator, device=x.device, dtype=torch.float32)


def _route(
    x: Tensor, tokens: Tensor, k: int, mask: Tensor | None, options: RouterOptions, keys: Tensor | None, triton: bool
) -> Routes:
    """Valid slots first. keys (B, E, N): what ranks the tokens in place of their logits."""
    logits, *_ = ops.router_logits(x, tokens, mask, cosine_scale(options), triton)
    how = options.route_block_size, *solver_of(options)
    indices, slots, _, scores, *_ = ops.pick(logits, keys, mask, k, *how, triton)
    # A sigmoid's scores depend on their logits where there is nothing to choose, too.
    alone = options.solver == "sigmoid" and keys is None
    return Routes(indices, slots, scores, logits if alone else _deciding(logits, k))


class _Times(torch.autograd.Function):
    """The logits; their gradient is multiplied by a factor of 0 or 1."""

    @staticmethod
    def forward(logits: Tensor, factor: int) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _deciding(logits: Tensor, k: int) -> Tensor:
    """The logits, which pass no gradient on where they decide nothing, N <= K; by arithmetic where N is symbolic."""
    n = logits.shape[-1]
    if torch.compiler.is_compiling():
        return _Times.apply(logits, min(max(n - k, 0), 1))
    return logits if n > k else logits.detach()


def cosine_scale(options: RouterOptions) -> float | None:
    return options.cosine_sim_scale if options.cosine_sim_routing else None


def solver_of(options: RouterOptions) -> ops.Solver:
    return ops.Solver(
        ratio=options.fetch_k_ratio,
        straight_through=options.straight_through,
        solver=options.solver,
        n_iters=options.n_iters,
        eps=options.eps,
        eps_init=options.eps_init,
        eps_decay=options.eps_decay,
    )


def in_order(routes: Routes, mask: Tensor | None, k: int) -> Routes:
    """Where there is nothing to choose, N <= K: all tokens in their order. Else valid slots first, as they are.

    By arithmetic, not by a branch, where the number of tokens may be symbolic.
    """
    n = routes.logits.shape[-1]
    if mask is None or (not torch.compiler.is_compiling() and n > k):
        return routes
    later = n * min(max(n - k, 0), 1)
    order = (routes.indices + ~routes.mask * later).argsort(-1)
    indices, slots, scores = (t.gather(-1, order) for t in routes[:3])
    return Routes(indices, slots, scores, routes.logits)


def restrict(routes: Routes, mask: Bool[Tensor, "B N"] | None) -> Routes:
    """Injected routes less the slots that hold masked tokens; scores in at least float32."""
    scores = routes.scores.to(torch.promote_types(routes.scores.dtype, torch.float32))
    if mask is None:
        return routes._replace(scores=scores)
    tokens = mask[:, None].expand(*routes.indices.shape[:2], -1)
    return routes._replace(mask=routes.mask & tokens.gather(-1, routes.indices), scores=scores)


def with_zero_gradient(scores: Float[Tensor, "B E K"], tokens: Float[Tensor, "E D"]) -> Float[Tensor, "B E K"]:
    """The scores plus an empty sum of routing tokens: these get a gradient of zeros, not None, where they had no say.

    So every parameter has a gradient in every step, as DistributedDataParallel expects.
    """
    return scores + tokens[..., :0].sum().to(scores.dtype)


def coordinate_descent(
    logits: Float[Tensor, "B E N"],
    k: float,
    mask: TokenMask | None = None,
    *,
    n_iters: int = 20,
    eps: float = 0.03,
    eps_init: float = 4.0,
    eps_decay: float = 0.7,
) -> Float[Tensor, "B E N"]:
    """Soft top-k scores in [0, 1] of mass about k, 0 where masked; see `ops.coordinate_descent`."""
    mask = contract.solver_input(logits, k, mask)
    o = RouterOptions(n_iters=n_iters, eps=eps, eps_init=eps_init, eps_decay=eps_decay)
    contract.solvable(o, logits.dtype)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    triton = _by_triton(wide)
    return ops.coordinate_descent(wide, mask, float(k), o.n_iters, o.eps, o.eps_init, o.eps_decay, triton)[0]


def capped_simplex(
    logits: Float[Tensor, "B E N"], k: float, mask: TokenMask | None = None, *, eps: float = 0.03
) -> Float[Tensor, "B E N"]:
    """The limit of `coordinate_descent` at temperature eps, of mass min(k, valid tokens); see `ops.capped_simplex`."""
    mask = contract.solver_input(logits, k, mask)
    options = RouterOptions(eps=eps)
    contract.solvable(options, logits.dtype)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return ops.capped_simplex(wide, mask, float(k), options.eps, _by_triton(wide))[0]


def _by_triton(logits: Tensor) -> bool:
    return choose("routing", Request(logits.device, logits.dtype)).triton


def select(
    logits: Float[Tensor, "B E N"], k: int, mask: TokenMask | None = None
) -> tuple[Int64[Tensor, "B E K"], Bool[Tensor, "B E K"]]:
    """Indices and slot mask of the k best: valid before masked, larger logit, smaller index; see `ops.select`."""
    mask = contract.select_input(logits, k, mask)
    keys = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    return ops.select(keys, mask, contract.positive_int("k", k), _by_triton(keys))[:2]


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
        self.use_triton = contract.flag("use_triton", use_triton)
        self.dim = contract.positive_int("dim", dim)
        self.num_experts = contract.positive_int("num_experts", num_experts)
        if not isinstance(options, RouterOptions):
            contract.reject("options", "RouterOptions", contract.describe(options), TypeError)
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
        mask: TokenMask | None = None,
        routing_tokens: Float[Tensor, "*B E D"] | None = None,
        random_route: bool = False,
        generator: torch.Generator | None = None,
        routes: Routes | None = None,
        *,
        plan: Plan | None = None,
    ) -> Routes:
        """See `route`. routing_tokens, (E, D) or (B, E, D), exactly when learned_routing_tokens=True.

        routes: a decision made elsewhere, returned less the slots that hold masked tokens; k and the routing token have
        no say in it. A routing token of the module's own that decides nothing gets a gradient of zeros.
        plan: of a layer that has checked the arguments and chosen the backends.
        """
        own = self.routing_token  # read once: a parametrization computes it
        if plan is None:
            mask, plan = self._plan(x, k, mask, routing_tokens, random_route, generator, routes)
        contract.beside_parameters("x", x, own, "the routing token")
        if routes is not None:
            made = restrict(routes, mask)
        else:
            contract.solvable(self.options, x.dtype)
            tokens = routing_tokens if own is None else own
            assert tokens is not None
            keys = _random_keys(x, tokens, generator) if random_route else None
            k = contract.positive_int("k", k)
            made = in_order(_route(x, tokens, k, mask, self.options, keys, plan.routing), mask, k)
        if own is None or (routes is None and not random_route):  # an operator that had them gives a gradient
            return made
        return made._replace(scores=with_zero_gradient(made.scores, own))

    def _plan(
        self, x: Any, k: Any, mask: Any, routing_tokens: Any, random_route: Any, generator: Any, routes: Any
    ) -> tuple[Tensor | None, Plan]:
        """Of a call of its own, whose arguments it checks; with the mask."""
        contract.tensor("x", x, "B", "N", self.dim)
        contract.positive_int("k", k)
        mask = contract.token_mask("mask", mask, x)
        contract.randomness(x, random_route, generator)
        if routes is None:
            given = self.options.learned_routing_tokens
            contract.held_or_given_tokens("routing_tokens", routing_tokens, x, self.num_experts, self.dim, given=given)
        else:
            if routing_tokens is not None:
                contract.reject("routing_tokens", "None with injected routes", routing_tokens)
            contract.routes("routes", routes, x.shape[0], self.num_experts, x.shape[1], x)
        return mask, bind(Kind(x.device, x.dtype, ("routing",), allow_triton=self.use_triton))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, options={self.options}"
