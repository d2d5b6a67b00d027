"""Decisions are steps of the logits, where rounding may legally go either way: they are checked one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

import reference
from optimized import ops
from optimized.prove.party import Decision, Party
from reference.testing import STAGES

SIDES = ("query", "key_value")


def picked(routes: Any) -> Bool[Tensor, "B E N"]:
    return torch.zeros_like(routes.logits, dtype=torch.bool).scatter_(-1, routes.indices, True)


def check_selection(actual: Sequence[Any], exact: Sequence[Any]) -> tuple[str, str | None]:
    """The oracle's choice but for tokens within rounding of the last place, and by the declared rule."""
    near = 0
    for side, mine, theirs in zip(SIDES, actual, exact):
        slots = mine.indices.shape[-1]
        differ = picked(mine) != picked(theirs)
        # A token and the K-th largest may each have moved by this much.
        error = (mine.logits.double() - theirs.logits).abs().amax(-1, keepdim=True)
        last = theirs.logits.topk(slots).values[..., -1:]
        wrong = differ & ~((theirs.logits - last).abs() <= 2 * error)
        if wrong.any():
            return "FAIL", f"selection {side}: {int(wrong.sum())} tokens chosen otherwise than their logits say"
        if not torch.equal(mine.indices, reference.select(mine.logits, slots)[0]):
            return "FAIL", f"selection {side}: not in the declared order, or ties not broken by it"
        if not mine.mask.all() or not (mine.scores == 1).all():
            return "FAIL", f"selection {side}: a slot is masked, or its straight-through score is not 1"
        near += int(differ.sum())
    return (f"{near} near ties" if near else "identical"), None


def decide(party: Party, routes: Sequence[Any], exact: Sequence[Any]) -> tuple[list[Decision], str | None]:
    """The package's decisions, and what is wrong with its saturated sets, if anything.

    s >= -a_t may differ from the oracle's where s is within the error that the budget of the scores allows for.
    """
    decisions, failure = [], None
    for side, mine, theirs in zip(SIDES, routes, exact):
        sets, gaps = [], []
        for logits in (mine.logits.detach(), theirs.logits.detach()):
            _, a, _ = ops.coordinate_descent(logits, None, party.mass, **party.solver, triton=False)
            gaps.append(logits + a[..., None])
            sets.append(logits >= -a[..., None])
        gap = gaps[1][sets[0] != sets[1]].abs()
        size = 1 + party.solver["eps_init"] * math.log(party.x.shape[1]) + theirs.logits.abs().max().item()
        bound = STAGES["scores"].floor * torch.finfo(mine.logits.dtype).eps * size
        if not (gap <= bound).all():
            failure = (
                f"routing scores {side}: a token {gap.max().item():.3g} away from a kink of the solver changed sides"
            )
        decisions.append(Decision(mine.indices, mine.mask, sets[0]))
    return decisions, failure
