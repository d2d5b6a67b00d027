"""Both routers of self-attention and the gather of what they picked, as one operator.

Both read the same tokens, so one pass gives all logits and norms, and one assembles the gradient of x. By Triton, one
launch selects for both sides where both have a choice to make, without blocks; and one gathers for both.
Letters: B batch, N tokens, D dimension, E experts, Kq and Kkv slots, W block length, T iterations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized.ops.blocks import sizes, split
from optimized.ops.gather_norm import Taken, gamma_gradient, gather
from optimized.ops.gather_norm import input_gradient as rows_gradient
from optimized.ops.operator import operator
from optimized.ops.pick import pick, picked_gradient, solver_state
from optimized.ops.router_logits import (
    input_gradient,
    logits_dtype,
    logits_flops,
    router_logits,
    routing_token_gradient,
)
from optimized.ops.solver import SOLVER, Solver


@operator(
    "(Tensor x, Tensor q_tokens, Tensor kv_tokens, Tensor? q_gamma, Tensor? kv_gamma, Tensor? mask, SymInt k_q,"
    f" SymInt k_kv, SymInt? block, float? scale, {SOLVER}, bool triton)"
    " -> (Tensor queries, Tensor keys_values, Tensor q_picked, Tensor kv_picked, Tensor logits,"
    " Tensor q_indices, Tensor q_slots, Tensor q_inverse, Tensor kv_indices, Tensor kv_slots, Tensor kv_inverse,"
    " Tensor norms, Tensor factors, Tensor soft, Tensor a, Tensor counts)",
    wrt="x q_tokens kv_tokens q_gamma kv_gamma",
    gradients_of="queries keys_values q_picked kv_picked logits",
    saves="x q_tokens kv_tokens q_gamma kv_gamma mask logits q_indices q_slots q_inverse kv_indices kv_slots"
    " kv_inverse norms factors soft a counts",
)
class routed_rows:
    """Rows, picked scores and routes of queries and of keys/values.

    x (B, N, D); routing tokens (E, D) or (B, E, D); gamma (E, D, 1), of both sides, or None of both for no norm; mask
    (B, N); scale of cosine routing; block and options as in `ops.pick`. Returns rows (E, B, Kq', D) and
    (E, B, Kkv', D), picked scores (B, E, Kq') and (B, E, Kkv'), logits (B, 2 E, N): those have gradients; indices, slot
    mask and inverse map of either (see `ops.pick`); norms (B, N) and factors (B, 2 E) (see `ops.router_logits`), and
    the state of the solver (see `ops.pick`), for both sides along the experts. Logits of a side with N <= K decide
    nothing and pass no gradient on, but by a sigmoid, whose scores are of them all the same.
    """

    def forward(a):  # type: ignore[no-untyped-def]
        if (a.q_gamma is None) != (a.kv_gamma is None):
            raise ValueError("kv_gamma: expected a scale exactly when q_gamma is one")
        tokens, solver = _stack(a.q_tokens, a.kv_tokens), Solver.of(a)
        logits, norms, factors = router_logits.raw(a.x, tokens, a.mask, a.scale, a.triton)
        routes, scores, state = _pick_at_once(a, logits, solver) if _at_once(a) else _pick_each(a, logits, solver)
        gammas = _alike(a.q_gamma, a.kv_gamma)
        rows = gather(a.x, norms, tuple([Taken(*route, gamma) for route, gamma in zip(routes, gammas)]), a.triton)
        return *rows, *scores, logits, *routes[0], *routes[1], norms, factors, *state

    def fake(a):  # type: ignore[no-untyped-def]
        batch, n, dim = a.x.shape
        experts = a.q_tokens.shape[-2]
        logits = a.x.new_empty(batch, 2 * experts, n, dtype=logits_dtype(a.x, _wider(a.q_tokens, a.kv_tokens)))
        rows, scores, routes = [], [], []
        for k in (a.k_q, a.k_kv):
            slots, _ = sizes(n, k, a.block)
            rows.append(a.x.new_empty(experts, batch, slots, dim))
            scores.append(logits.new_empty(batch, experts, slots))
            routes.append(logits.new_empty(batch, experts, slots, dtype=torch.int64))
            routes.append(logits.new_empty(batch, experts, slots, dtype=torch.bool))
            routes.append(logits.new_empty(batch, experts, n, dtype=torch.int32))
        norms, factors = logits.new_empty(batch, n), logits.new_empty(batch, 0 if a.scale is None else 2 * experts)
        state = solver_state(logits, a.k_q, a.block, Solver.of(a), logits.new_empty)
        return *rows, *scores, logits, *routes, norms, factors, *state

    def backward(a, g, needs):  # type: ignore[no-untyped-def]
        found, sides = {}, (_Side(a, g, needs, "q"), _Side(a, g, needs, "kv"))
        dlogits = _logits_gradient(a, g, sides) if needs.x or needs.q_tokens or needs.kv_tokens else None
        for side in sides:
            if side.needs_tokens and dlogits is None:
                found[f"{side.name}_tokens"] = torch.zeros_like(side.tokens, memory_format=torch.contiguous_format)
            if side.needs_gamma and side.gradient is None:
                found[f"{side.name}_gamma"] = torch.zeros_like(side.gamma, memory_format=torch.contiguous_format)
        if dlogits is not None:
            found.update(_token_gradients(a, dlogits, sides))
        taken = [side for side in sides if side.gradient is not None]
        given = a, needs, dlogits, taken
        found.update(_row_gradients_by_triton(*given) if a.triton else _row_gradients(*given))
        return found

    def flops(a, out):  # type: ignore[no-untyped-def]
        return 2 * logits_flops(a.x, a.q_tokens)

    def backward_flops(a, g, needs):  # type: ignore[no-untyped-def]
        return (2 * needs.x + needs.q_tokens + needs.kv_tokens) * logits_flops(a.x, a.q_tokens)


class _Side:
    """What the backward has of queries or of keys/values."""

    def __init__(self, a: Any, g: Any, needs: Any, name: str) -> None:
        self.name, self.first = name, name == "q"
        there, wanted = vars(a), vars(needs)
        self.tokens, self.k = there[f"{name}_tokens"], there[f"k_{name}"]
        # A tensor or None; those in `taken` have a gradient, and a gamma where one is asked for.
        self.gamma: Any = there[f"{name}_gamma"]
        common = _alike(a.q_gamma, a.kv_gamma)[0 if self.first else 1]
        self.taken = Taken(there[f"{name}_indices"], there[f"{name}_slots"], there[f"{name}_inverse"], common)
        self.gradient: Any = g.queries if self.first else g.keys_values
        self.score_gradient: Tensor | None = vars(g)[f"{name}_picked"]
        self.needs_tokens, self.needs_gamma = wanted[f"{name}_tokens"], wanted[f"{name}_gamma"]

    def of(self, t: Tensor, dim: int) -> Tensor:
        """Its half of the experts."""
        return t.chunk(2, dim)[0 if self.first else 1]


def _stack(q_tokens: Tensor, kv_tokens: Tensor) -> Tensor:
    """Routing tokens of both sides, (2 E, D) or (B, 2 E, D)."""
    if q_tokens.ndim != kv_tokens.ndim:  # one side has them for each item
        batch = (q_tokens if q_tokens.ndim == 3 else kv_tokens).shape[0]
        q_tokens, kv_tokens = q_tokens.expand(batch, -1, -1), kv_tokens.expand(batch, -1, -1)
    return torch.cat((q_tokens, kv_tokens), -2)


def _wider(t: Tensor, other: Tensor) -> Tensor:
    return t if torch.promote_types(t.dtype, other.dtype) == t.dtype else other


def _alike(*gammas: Tensor | None) -> tuple[Tensor | None, ...]:
    """In a common dtype: one kernel reads either."""
    q, kv = gammas
    if q is None or kv is None or q.dtype == kv.dtype:
        return q, kv
    common = torch.promote_types(q.dtype, kv.dtype)
    return q.to(common), kv.to(common)


def _at_once(a: Any) -> bool:
    """Whether one launch of each kernel solves and selects for both sides."""
    n = a.x.shape[1]
    return a.triton and n > a.k_q and n > a.k_kv and (a.block is None or a.block >= n)


def _pick_at_once(a: Any, logits: Tensor, solver: Solver) -> tuple[tuple, tuple, tuple]:
    from optimized.kernels.selection import select_groups

    ks, soft = (a.k_q, a.k_kv), None
    if solver.stateless:
        state = solver_state(logits, a.k_q, None, solver, logits.new_empty)
    else:
        state = solver.solve(logits, a.mask, ks, True)
        soft = state[0]
    groups = select_groups(logits, a.mask, ks, soft, solver.straight_through, solver.sigmoid)
    return tuple([group[:3] for group in groups]), tuple([group[3] for group in groups]), state


def _pick_each(a: Any, logits: Tensor, solver: Solver) -> tuple[tuple, tuple, tuple]:
    routes, scores, states = [], [], []
    for half, k in zip(logits.chunk(2, 1), (a.k_q, a.k_kv)):
        given = half, None, a.mask, k, a.block, *solver, a.triton
        *route, picked, soft, iterates, counts = pick.raw(*given)  # type: ignore[attr-defined]
        routes.append(route)
        scores.append(picked)
        states.append((soft, iterates, counts))
    if solver.stateless:
        return tuple(routes), tuple(scores), states[0]
    (soft, iterates, counts), other = states
    counts = counts if solver.exact else torch.cat((counts, other[2]), -1)
    state = torch.cat((soft, other[0]), 1), torch.cat((iterates, other[1]), -1), counts
    return tuple(routes), tuple(scores), state


def _logits_gradient(a: Any, g: Any, sides: tuple[_Side, ...]) -> Tensor | None:
    """From those of the picked scores and of the logits themselves; None where there is none."""
    solver, n = Solver.of(a), a.x.shape[1]
    chooses = [solver.sigmoid or n > side.k for side in sides]
    own = g.logits
    if own is not None and not all(chooses):  # logits that decide nothing pass no gradient on
        own = torch.cat([part * chose for part, chose in zip(own.chunk(2, 1), chooses)], 1)
    if not [side for side in sides if side.score_gradient is not None]:
        return own
    if _at_once(a):
        grads = tuple(
            [
                a.logits.new_zeros(side.taken.indices.shape) if side.score_gradient is None else side.score_gradient
                for side in sides
            ]
        )
        ks = a.k_q, a.k_kv
        solved: tuple[Tensor, ...] = a.soft, a.a, a.counts
        if solver.straight_through and not solver.sigmoid:
            solved = solver.solve(a.logits, a.mask, ks, True)
        inverses = a.q_inverse, a.kv_inverse
        return solver.picked_backward(grads, inverses, own, a.logits, a.mask, ks, solved)
    halves = []
    for side, chose in zip(sides, chooses):
        logits = side.of(a.logits, 1).contiguous()
        if side.score_gradient is None or not chose:
            halves.append(torch.zeros_like(logits))
            continue
        state = None
        if not solver.stateless:
            state = side.of(a.soft, 1), side.of(a.a, -1), a.counts if solver.exact else side.of(a.counts, -1)
        given = side.score_gradient, side.taken.inverse, logits, a.mask, split(n, side.k, a.block), state
        halves.append(picked_gradient(*given, solver, a.triton))
    dlogits = torch.cat(halves, 1)
    return dlogits if own is None else dlogits.add_(own)


def _token_gradients(a: Any, dlogits: Tensor, sides: tuple[_Side, ...]) -> dict[str, Tensor]:
    """Of the routing tokens that need one: one product for both."""
    asked = [side for side in sides if side.needs_tokens]
    if not asked:
        return {}
    q, kv = (side.tokens for side in sides)
    if a.triton and len(asked) == 2 and (q.shape, q.dtype) == (kv.shape, kv.dtype):
        from optimized.kernels.router_logits import routing_token_gradients

        given = dlogits, a.x, (q, kv), a.mask, a.norms, a.factors
        return dict(zip(("q_tokens", "kv_tokens"), routing_token_gradients(*given)))
    tokens, logits, factors, g = _stack(a.q_tokens, a.kv_tokens), a.logits, a.factors, dlogits
    if len(asked) == 1:
        tokens, logits, g = asked[0].of(tokens, -2), asked[0].of(logits, 1), asked[0].of(g, 1)
        factors = asked[0].of(factors, 1) if a.scale is not None else factors
    stacked = routing_token_gradient(g, a.x, tokens, a.mask, logits, a.norms, factors, a.triton)
    found = {}
    for side in asked:
        part = side.of(stacked, -2) if len(asked) == 2 else stacked
        part = part.sum(0) if part.ndim > side.tokens.ndim else part
        found[f"{side.name}_tokens"] = part.to(side.tokens.dtype, copy=True, memory_format=torch.contiguous_format)
    return found


def _row_gradients(a: Any, needs: Any, dlogits: Tensor | None, taken: list[_Side]) -> dict[str, Tensor]:
    """Of x and gamma."""
    found = {}
    for side in taken:
        if side.needs_gamma:
            group = side.taken._replace(gamma=side.gamma)
            found[f"{side.name}_gamma"] = gamma_gradient(a.x, a.norms, group, side.gradient)
    if needs.x:
        dx = a.x.new_zeros(a.x.shape, dtype=a.logits.dtype)
        if taken:
            groups, gradients = zip(*((side.taken, side.gradient) for side in taken))
            dx += rows_gradient(a.x, a.norms, groups, gradients)
        if dlogits is not None:
            tokens = _stack(a.q_tokens, a.kv_tokens)
            dx += input_gradient(dlogits, a.x, tokens, a.mask, a.logits, a.norms, a.factors)
        found["x"] = dx.to(a.x.dtype)
    return found


def _row_gradients_by_triton(a: Any, needs: Any, dlogits: Tensor | None, taken: list[_Side]) -> dict[str, Tensor]:
    from optimized.kernels import gather_norm as kernel
    from optimized.kernels.router_gradient import RouterGradient
    from optimized.kernels.token_gradient import TakenRows, token_gradient

    found, dots = {}, None
    normed = a.q_gamma is not None and taken
    if normed and (needs.x or needs.q_gamma or needs.kv_gamma):
        groups = tuple([kernel.Taken(side.taken.indices, side.taken.slots, side.taken.gamma) for side in taken])
        dgammas, dots = kernel.slot_gradients(a.x, a.norms, groups, tuple([side.gradient for side in taken]))
        for side, dgamma in zip(taken, dgammas):
            found[f"{side.name}_gamma"] = dgamma.to(side.gamma.dtype)
    if needs.x:
        rows = tuple([TakenRows(side.gradient, side.taken.inverse, side.taken.gamma) for side in taken])
        router = None
        if dlogits is not None:
            router = RouterGradient(dlogits, a.logits, _stack(a.q_tokens, a.kv_tokens), a.factors)
        found["x"] = token_gradient(a.x, a.mask, a.norms, rows, dots, router)
    return found
