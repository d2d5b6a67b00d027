"""Both routers of self-attention and the gather of what they picked, as one operator over Triton kernels.

Both read the same tokens, so one pass gives all logits and norms, one launch selects for both, and one assembles the
gradient of x. Where scores are straight-through, the solver is the backward's business alone.
Letters: B batch, N tokens, D dimension, E experts, Kq and Kkv slots, both less than N.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from optimized.ops.registration import differentiable, no_setup, refuse_to

_OPTIONS = (
    "float q_mass, float kv_mass, float? scale, bool straight_through, bool exact, int n_iters, float eps,"
    " float eps_init, float eps_decay"
)


class Solver(NamedTuple):
    """Options of both routers, in the order of the operator's arguments. Masses: what the scores of a row sum to."""

    q_mass: float
    kv_mass: float
    scale: float | None  # of cosine routing
    straight_through: bool
    exact: bool
    n_iters: int
    eps: float
    eps_init: float
    eps_decay: float

    def solve(self, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, and what their backward needs: iterates and counts, or a threshold and nothing."""
        from optimized.kernels import capped_simplex, coordinate_descent

        masses = self.q_mass, self.kv_mass
        if self.exact:
            return *capped_simplex.capped_simplex(logits, mask, masses, self.eps), logits.new_empty(0)
        epsilons = self.eps, self.eps_init, self.eps_decay
        return coordinate_descent.coordinate_descent(logits, mask, masses, self.n_iters, *epsilons)

    def backward(
        self,
        grads: tuple[Tensor, Tensor],
        inverses: tuple[Tensor, Tensor],
        dlogits: Tensor | None,
        logits: Tensor,
        mask: Tensor | None,
        solved: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        """Gradient of the logits from those of the picked scores, and from their own."""
        from optimized.kernels import capped_simplex, coordinate_descent

        given = grads, inverses, dlogits, logits, mask
        if self.exact:
            return capped_simplex.capped_simplex_picked_backward(*given, *solved[:2], self.eps)
        masses, epsilons = (self.q_mass, self.kv_mass), (self.eps, self.eps_init, self.eps_decay)
        return coordinate_descent.coordinate_descent_picked_backward(*given, *solved, masses, *epsilons)


@custom_op(
    "moa::routed_rows",
    mutates_args=(),
    schema="(Tensor x, Tensor q_tokens, Tensor kv_tokens, Tensor? q_gamma, Tensor? kv_gamma, Tensor? mask, SymInt k_q,"
    f" SymInt k_kv, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
    " Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def routed_rows(
    x: Tensor,
    q_tokens: Tensor,
    kv_tokens: Tensor,
    q_gamma: Tensor | None,
    kv_gamma: Tensor | None,
    mask: Tensor | None,
    k_q: int,
    k_kv: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    """Rows, picked scores and routes of queries and of keys/values.

    Args: x (B, N, D); routing tokens (E, D) or (B, E, D), both alike; gamma (E, D, 1), None for no norm; mask (B, N);
    options as `Solver`. Returns
    rows (E, B, Kq, D) and (E, B, Kkv, D), picked scores (B, E, Kq) and (B, E, Kkv), logits (B, 2 E, N): those have
    gradients; indices, slot mask and inverse map of either (see `ops.select`); norms (B, N), factors (see
    `ops.router_logits`), and all scores with what the solver leaves, empty with straight-through scores.
    """
    from optimized.kernels import gather_norm, router_logits, selection

    solver = Solver(*options)
    logits, norms, factors = router_logits.router_logits(x, torch.cat((q_tokens, kv_tokens), -2), mask, solver.scale)
    if solver.straight_through:
        scores, a, counts = (logits.new_empty(0) for _ in range(3))
        groups = selection.select_groups(logits, mask, (k_q, k_kv), None, unit=True)
    else:
        scores, a, counts = solver.solve(logits, mask)
        groups = selection.select_groups(logits, mask, (k_q, k_kv), scores)
    (q_indices, q_slots, q_inverse, q_picked), (kv_indices, kv_slots, kv_inverse, kv_picked) = groups
    taken = (gather_norm.Taken(q_indices, q_slots, q_gamma), gather_norm.Taken(kv_indices, kv_slots, kv_gamma))
    rows = gather_norm.gather_norm(x, norms, taken)
    routes = (q_indices, q_slots, q_inverse, kv_indices, kv_slots, kv_inverse)
    return *rows, q_picked, kv_picked, logits, *routes, norms, factors, scores, a, counts


@routed_rows.register_fake
def _(x, q_tokens, kv_tokens, q_gamma, kv_gamma, mask, k_q, k_kv, *options):  # type: ignore[no-untyped-def]
    solver = Solver(*options)
    batch, n, dim = x.shape
    experts = q_tokens.shape[-2]
    dtype = torch.promote_types(torch.promote_types(x.dtype, q_tokens.dtype), torch.float32)
    rows = [x.new_empty(experts, batch, k, dim) for k in (k_q, k_kv)]
    picked = [x.new_empty(batch, experts, k, dtype=dtype) for k in (k_q, k_kv)]
    logits = x.new_empty(batch, 2 * experts, n, dtype=dtype)
    routes = [
        made
        for k in (k_q, k_kv)
        for made in (
            x.new_empty(batch, experts, k, dtype=torch.int64),
            x.new_empty(batch, experts, k, dtype=torch.bool),
            x.new_empty(batch, experts, n, dtype=torch.int32),
        )
    ]
    factors = logits.new_empty(batch, 0 if solver.scale is None else 2 * experts)
    if solver.straight_through:
        solved = [logits.new_empty(0) for _ in range(3)]
    elif solver.exact:
        solved = [torch.empty_like(logits), logits.new_empty(logits.shape[:2]), logits.new_empty(0)]
    else:
        solved = [torch.empty_like(logits), *(logits.new_empty(solver.n_iters, *logits.shape[:2]) for _ in range(2))]
    return *rows, *picked, logits, *routes, logits.new_empty(batch, n), factors, *solved


@custom_op(
    "moa::routed_rows_backward",
    mutates_args=(),
    schema="(Tensor dqueries, Tensor dkeys_values, Tensor? dq_picked, Tensor? dkv_picked, Tensor? dlogits, Tensor x,"
    " Tensor q_tokens, Tensor kv_tokens, Tensor? q_gamma, Tensor? kv_gamma, Tensor? mask, Tensor logits,"
    " Tensor q_indices, Tensor q_slots, Tensor q_inverse, Tensor kv_indices, Tensor kv_slots, Tensor kv_inverse,"
    f" Tensor norms, Tensor factors, Tensor scores, Tensor a, Tensor counts, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def routed_rows_backward(
    dqueries: Tensor,
    dkeys_values: Tensor,
    dq_picked: Tensor | None,
    dkv_picked: Tensor | None,
    dlogits: Tensor | None,
    x: Tensor,
    q_tokens: Tensor,
    kv_tokens: Tensor,
    q_gamma: Tensor | None,
    kv_gamma: Tensor | None,
    mask: Tensor | None,
    logits: Tensor,
    q_indices: Tensor,
    q_slots: Tensor,
    q_inverse: Tensor,
    kv_indices: Tensor,
    kv_slots: Tensor,
    kv_inverse: Tensor,
    norms: Tensor,
    factors: Tensor,
    scores: Tensor,
    a: Tensor,
    counts: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the routing tokens, and gamma (empty without)."""
    from optimized.kernels.gather_norm import Taken, slot_gradients
    from optimized.kernels.router_logits import routing_token_gradient
    from optimized.kernels.token_gradient import RouterGradient, TakenRows, token_gradient

    solver = Solver(*options)
    inverses = q_inverse, kv_inverse
    picked = tuple(
        torch.zeros(indices.shape, dtype=logits.dtype, device=x.device) if given is None else given
        for given, indices in ((dq_picked, q_indices), (dkv_picked, kv_indices))
    )
    solved = solver.solve(logits, mask) if solver.straight_through else (scores, a, counts)
    dlogits = solver.backward(picked, inverses, dlogits, logits, mask, solved)
    tokens = torch.cat((q_tokens, kv_tokens), -2)
    dtokens = routing_token_gradient(dlogits, x, tokens, mask, logits, norms, factors)
    dq_tokens, dkv_tokens = (
        part.to(given.dtype, copy=True, memory_format=torch.contiguous_format)
        for part, given in zip(dtokens.chunk(2, -2), (q_tokens, kv_tokens))
    )

    gradients = dqueries, dkeys_values
    dq_gamma, dkv_gamma = x.new_empty(0), x.new_empty(0)
    dots = None
    if q_gamma is not None and kv_gamma is not None:
        taken = Taken(q_indices, q_slots, q_gamma), Taken(kv_indices, kv_slots, kv_gamma)
        (dq_gamma, dkv_gamma), dots = slot_gradients(x, norms, taken, gradients)
    rows = tuple(map(TakenRows, gradients, inverses, (q_gamma, kv_gamma)))
    dx = token_gradient(x, mask, norms, rows, dots, RouterGradient(dlogits, logits, tokens, factors))
    return dx, dq_tokens, dkv_tokens, dq_gamma, dkv_gamma


@routed_rows_backward.register_fake
def _(dqueries, dkeys_values, dq_picked, dkv_picked, dlogits, x, q_tokens, kv_tokens, q_gamma, kv_gamma, *rest):  # type: ignore[no-untyped-def]
    return tuple(
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x, q_tokens, kv_tokens, q_gamma, kv_gamma)
    )


_SAVED = 6  # x .. mask
_WITH_GRADIENT = 5  # rows, picked scores, logits


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:_SAVED], *output[_WITH_GRADIENT - 1 :])
    ctx.mark_non_differentiable(*output[_WITH_GRADIENT:])
    ctx.options = inputs[_SAVED + 2 :]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dqueries: Tensor | None, dkeys_values: Tensor | None, *given: Tensor | None) -> tuple:
    saved = ctx.saved_tensors
    x, *_, q_gamma, kv_gamma, _ = saved[:_SAVED]
    q_indices, kv_indices = saved[_SAVED + 1], saved[_SAVED + 4]
    rows = [
        x.new_zeros(indices.shape[1], indices.shape[0], indices.shape[2], x.shape[-1]) if gradient is None else gradient
        for gradient, indices in ((dqueries, q_indices), (dkeys_values, kv_indices))
    ]
    dx, dq_tokens, dkv_tokens, *dgammas = routed_rows_gradient(*rows, *given[:3], *saved, *ctx.options)
    gammas = (None if gamma is None else dgamma for gamma, dgamma in zip((q_gamma, kv_gamma), dgammas))
    return dx, dq_tokens, dkv_tokens, *gammas, *(None,) * (3 + len(ctx.options))


routed_rows_gradient = differentiable(routed_rows_backward, no_setup, refuse_to("moa::routed_rows", "double backward"))
route_and_gather = differentiable(routed_rows, _setup, _backward)
