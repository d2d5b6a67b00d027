"""Choice of K tokens by their logits with differentiable scores: selection, solver and blocks as one operator.

Letters: B batch, N tokens, E experts, K slots per expert, W block length, T iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optimized.ops.blocks import Part, sizes, split
from optimized.ops.operator import operator
from optimized.ops.select import choose, place
from optimized.ops.solver import SOLVER, Solver


@operator(
    f"(Tensor logits, Tensor? keys, Tensor? mask, SymInt k, SymInt? block, {SOLVER}, bool triton)"
    " -> (Tensor indices, Tensor slots, Tensor inverse, Tensor scores, Tensor soft, Tensor a, Tensor counts)",
    wrt="logits",
    gradients_of="scores",
    saves="logits keys mask inverse soft a counts",
)
class pick:
    """Routes by logits (B, E, N): indices (B, E, K') int64, slot mask (B, E, K'), inverse map, scores (B, E, K').

    K' is K, or N where N <= K, or what blocks of W tokens give (see `ops.blocks`). Slots hold valid tokens ascending,
    then masked ones ascending; inverse (B, E, N) int32: the slot that holds a token, -1 for none and for masked ones.
    Rank: see `ops.select`. Scores: see `Solver`; 0 in masked slots, and NaN in all slots of a row with a NaN logit at a
    valid token. They are constant, 1 in valid slots, where N <= K (with a NaN, too) and in blocks that give all tokens.
    By a sigmoid each is of its own logit in all of these cases, and a NaN its own.
    keys (B, E, N): rank in place of the logits, with constant scores. Logits and keys: float32 or float64; mask (B, N).

    Also what the backward needs: soft scores (B, E, N), and iterates and counts (T, B blocks, E), or thresholds
    (B blocks, E) and nothing. All are empty with keys, by a sigmoid, and where scores are straight-through, since then
    the solver is the backward's business alone.
    """

    def forward(a):  # type: ignore[no-untyped-def]
        logits, solver, n = a.logits.contiguous(), Solver.of(a), a.logits.shape[-1]
        keys = logits if a.keys is None else a.keys.contiguous()
        parts = split(n, a.k, a.block)
        constant = _constant(a)
        if constant or solver.stateless:
            state, soft = _state(a, logits.new_zeros), None
        else:
            state = _solve(logits, a.mask, parts, solver, a.triton)
            soft = state[0]
        return *_select(logits, keys, a.mask, parts, soft, None if constant else solver, a.triton), *state

    def fake(a):  # type: ignore[no-untyped-def]
        batch, experts, n = a.logits.shape
        slots, _ = sizes(n, a.k, a.block)
        make = a.logits.new_empty
        indices = make(batch, experts, slots, dtype=torch.int64)
        taken = make(batch, experts, slots, dtype=torch.bool)
        inverse = make(batch, experts, n, dtype=torch.int32)
        return indices, taken, inverse, make(batch, experts, slots), *_state(a, make)

    def backward(a, g, needs):  # type: ignore[no-untyped-def]
        if _constant(a):
            return {"logits": torch.zeros_like(a.logits, memory_format=torch.contiguous_format)}
        solver, parts = Solver.of(a), split(a.logits.shape[-1], a.k, a.block)
        state = None if solver.stateless else (a.soft, a.a, a.counts)
        given = g.scores, a.inverse, a.logits.contiguous(), a.mask
        return {"logits": picked_gradient(*given, parts, state, solver, a.triton)}


def _constant(a: Any) -> bool:
    """Whether scores are, whatever the logits are."""
    return a.keys is not None or (a.logits.shape[-1] <= a.k and not Solver.of(a).sigmoid)


def solver_state(
    logits: Tensor, k: int, block: int | None, solver: Solver, make: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """In the shapes that `pick` returns."""
    if solver.stateless:
        nothing = logits.new_empty(0)
        return nothing, nothing, nothing
    batch, experts, n = logits.shape
    rows = batch * sizes(n, k, block)[1]
    if solver.exact:
        return make(batch, experts, n), make(rows, experts), make(0)
    iterates = solver.n_iters, rows, experts
    return make(batch, experts, n), make(iterates), make(iterates)


def _state(a: Any, make: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    solver = Solver.of(a)
    return solver_state(
        a.logits, a.k, a.block, solver if a.keys is None else solver._replace(straight_through=True), make
    )


def _solve(logits: Tensor, mask: Tensor | None, parts: list[Part], solver: Solver, triton: bool) -> tuple[Tensor, ...]:
    found: list[tuple[Tensor, ...]] = []
    for part in parts:
        folded = part.fold(logits)
        if part.takes_all:  # without a solver, hence without state
            state = solver_state(folded, part.k, None, solver, folded.new_zeros)
            found.append((torch.ones_like(part.unfold(folded)), *state[1:]))
        else:
            soft, *rest = solver.solve(folded, _folded(part, mask), (part.k,), triton)
            found.append((part.unfold(soft), *rest))
    if len(found) == 1:
        return found[0]
    softs, a, counts = zip(*found)
    return torch.cat(softs, -1), torch.cat(a, -2), counts[0] if solver.exact else torch.cat(counts, -2)


def _select(
    logits: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    parts: list[Part],
    soft: Tensor | None,
    solver: Solver | None,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices, slot mask, inverse map and scores. soft: scores of all tokens by a solver that is not straight-through.
    solver: None for scores of 1 whatever the logits are.
    """
    sigmoid = solver is not None and solver.sigmoid
    slots = sum(part.slots for part in parts)
    if triton and _is_whole(parts):
        from optimized.kernels.selection import select_groups

        unit = solver is not None and solver.straight_through
        indices, taken, inverse, scores = select_groups(keys, mask, (slots,), soft, unit, sigmoid)[0]
        return indices, taken, inverse, taken.to(logits.dtype) if solver is None else scores
    chosen = torch.cat([part.unfold(_chosen(part, keys, mask, triton)) for part in parts], -1)
    indices, taken, inverse = place(chosen, mask, slots)
    if solver is not None and solver.sigmoid:
        soft = logits.sigmoid()
        if solver.straight_through:
            soft = torch.where(soft.isnan(), soft, 1)
    scores = taken.to(logits.dtype) if soft is None else soft.gather(-1, indices).masked_fill_(~taken, 0)
    if solver is not None and not sigmoid:
        scores.masked_fill_(_poisoned(logits, mask), torch.nan)
    return indices, taken, inverse, scores


def _chosen(part: Part, keys: Tensor, mask: Tensor | None, triton: bool) -> Tensor:
    keys, mask = part.fold(keys), _folded(part, mask)
    if part.takes_all:
        return torch.ones_like(keys, dtype=torch.bool)
    if not triton:
        return choose(keys, mask, part.k)
    from optimized.kernels.selection import select

    return torch.zeros_like(keys, dtype=torch.bool).scatter_(-1, select(keys, mask, part.k)[0], True)


def picked_gradient(
    grad: Tensor,
    inverse: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    parts: list[Part],
    state: tuple[Tensor, Tensor, Tensor] | None,
    solver: Solver,
    triton: bool,
) -> Tensor:
    """Gradient of the logits (B, E, N) from that of the scores (B, E, K'), where N > K, or by a sigmoid.

    state: soft scores, iterates and counts as `pick` returned them, None to solve again.
    """
    if solver.sigmoid:
        return _sigmoid_gradient(grad, inverse, logits, triton)
    if triton and _is_whole(parts):
        ks = (parts[0].k,)
        whole = solver.solve(logits, mask, ks, triton) if state is None else state
        return solver.picked_backward((grad,), (inverse,), None, logits, mask, ks, whole)
    dense = grad.gather(-1, inverse.clamp_min(0).long())
    dense = dense.masked_fill_((inverse < 0) | _poisoned(logits, mask), 0)  # a NaN that was put is a constant
    gradients, row = [], 0
    for part in parts:
        folded, folded_mask = part.fold(logits), _folded(part, mask)
        if part.takes_all:
            gradients.append(torch.zeros_like(part.unfold(folded)))
        else:
            solved: tuple[Tensor, ...]
            if state is None:
                solved = solver.solve(folded, folded_mask, (part.k,), triton)
            else:
                soft, *rest = state
                own = (t if t.ndim == 1 else t.narrow(-2, row, len(folded)) for t in rest)
                solved = (part.fold(soft), *own)
            gradient = solver.backward(part.fold(dense), folded, folded_mask, part.k, solved, triton)
            gradients.append(part.unfold(gradient))
        row += len(folded)
    return torch.cat(gradients, -1)


def _sigmoid_gradient(grad: Tensor, inverse: Tensor, logits: Tensor, triton: bool) -> Tensor:
    """Of the tokens that have a slot, whichever block they are from; 0 of the others, NaN or not."""
    if triton:
        from optimized.kernels.sigmoid import sigmoid_picked_backward

        return sigmoid_picked_backward((grad,), (inverse,), None, logits)
    soft = logits.sigmoid()
    dense = grad.gather(-1, inverse.clamp_min(0).long()) * (soft * (1 - soft))
    return dense.masked_fill_(inverse < 0, 0)


def _is_whole(parts: list[Part]) -> bool:
    return len(parts) == 1 and parts[0].count == 1


def _folded(part: Part, mask: Tensor | None) -> Tensor | None:
    return None if mask is None else part.fold(mask)


def _poisoned(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (B, E, 1) with a NaN logit at a valid token."""
    nan = logits.isnan()
    return (nan if mask is None else nan & mask[:, None]).any(-1, keepdim=True)
