"""Answers that are wrong: what is done to a right one.

`t`: the answer; `v`: the values that were averaged to make it, where there are any. None: nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.faults.computations import LOWER
from tests.faults.fault import Fault

Change = Callable[[Tensor, Tensor], "Tensor | None"]


@dataclass(frozen=True)
class ResultFault(Fault):
    """gross: beyond every budget in every dtype. faint: `tests/bands.py` measures how much of a budget it takes."""

    change: Change
    gross: bool = True
    faint: bool = False


def _rows(t: Tensor) -> Tensor:
    """A copy as the rows that the comparator takes."""
    width = next((size for size in reversed(t.shape) if size > 1), 1)
    return t.clone().reshape(-1, width) if t.ndim > 1 else t.clone().reshape(1, -1)


def _row_zeroed(t: Tensor, v: Tensor) -> Tensor:
    """That of the median size, of those that are not zero."""
    rows = _rows(t)
    sizes = rows.double().norm(dim=-1)
    rows[(sizes - sizes[sizes > 0].median()).abs().argmin()] = 0
    return rows.view(t.shape)


def _rows_exchanged(t: Tensor, v: Tensor) -> Tensor | None:
    """The first two that are not zero."""
    rows = _rows(t)
    found = rows.any(-1).nonzero().flatten()[:2]
    if len(found) < 2 or torch.equal(rows[found[0]], rows[found[1]]):
        return None
    rows[found] = rows[found.flip(0)]
    return rows.view(t.shape)


def _element_lost(t: Tensor, v: Tensor) -> Tensor:
    """The largest."""
    out = t.clone()
    out.view(-1)[out.abs().argmax()] = 0
    return out


def _element_off(t: Tensor, v: Tensor) -> Tensor:
    """By its row's size."""
    rows = _rows(t)
    rows[-1, 0] = rows[-1].norm()
    return rows.view(t.shape)


def _one_row_is(value: float) -> Change:
    return lambda t, v: t.index_fill(1, torch.tensor([7], device=t.device), value)


def _lower(t: Tensor, v: Tensor) -> Tensor | None:
    return t.to(LOWER[t.dtype]).to(t.dtype) if t.dtype in LOWER else None


RESULTS = {
    name: ResultFault(name, *given)
    for name, given in {
        "a row of median size zeroed": ("tail mask", _row_zeroed, True, True),
        "two rows exchanged": ("expert mix-up", _rows_exchanged, True, True),
        "the largest element zeroed": ("tile-ai/tilelang#2461", _element_lost, True, True),
        "1% too large": ("log-sum-exp and scale", lambda t, v: t * 1.01, False, True),
        "10% too large": ("log-sum-exp and scale", lambda t, v: t * 1.1, False, True),
        "the next lower precision": ("precision", _lower, False, True),
        "zeros": ("uninitialised output", lambda t, v: torch.zeros_like(t)),
        "a constant": ("uninitialised output", lambda t, v: torch.full_like(t, t.mean().item())),
        "mean of v": ("microsoft/onnxruntime#28904", lambda t, v: v.mean(1, keepdim=True).expand_as(t).clone()),
        "permuted rows": ("stride and layout", lambda t, v: t.roll(1, dims=1)),
        "permuted channels": ("stride and layout", lambda t, v: t.flip(-1)),
        "another batch item": ("batch mix-up", lambda t, v: t.flip(0)),
        "one element off by its row's size": ("uninitialised output", _element_off),
        "scaled by 1.5": ("log-sum-exp and scale", lambda t, v: t * 1.5),
        "wrong sign": ("combination", lambda t, v: -t),
        "NaN": ("masked rows and sentinels", _one_row_is(math.nan)),
        "infinity": ("masked rows and sentinels", _one_row_is(math.inf)),
    }.items()
}
