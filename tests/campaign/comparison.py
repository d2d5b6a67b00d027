"""`reference.testing.assert_matches` for many cases at a time: the same two rules, by element and by row.

`tests/test_campaign.py` holds the fractions of both against each other. Cases are whole rows, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from reference.testing import STAGES

from .draws import Array

TINY = np.finfo(np.float64).tiny


class Cases(NamedTuple):
    """starts (C,): the first row of each case; n (C,) and dtype (C,) of its logits; inside (R, L): no padding."""

    starts: Array
    n: Array
    dtype: Array
    inside: Array

    def of_row(self) -> Array:
        """(R,): the case of every row."""
        rows = np.diff(np.append(self.starts, len(self.inside)))
        return np.repeat(np.arange(len(self.starts)), rows)

    def largest(self, t: Array) -> Array:
        """(C,) of the elements (R, L) inside."""
        return self.worst_row(np.where(self.inside, t, 0).max(-1))

    def worst_row(self, t: Array) -> Array:
        """(C,) of (R,)."""
        return np.maximum.reduceat(t, self.starts)

    def limit(self, name: str) -> Array:
        """(C,): `eps` or `tiny` of the dtype."""
        known = {d: getattr(np.finfo(d), name) for d in np.unique(self.dtype)}
        return np.array([known[d] for d in self.dtype], np.float64)


@dataclass(frozen=True)
class Compared:
    """Of each case: the fraction of the budget that was used, and the element (row, token) that is off most."""

    fraction: Array
    row: Array
    token: Array


def compare(
    cases: Cases,
    actual: Array,
    oracle: Array,
    baseline: Array,
    *,
    stage: str,
    scale: Array,
    vanishing: bool = False,
    slope: Array | float = 1.0,
) -> Compared:
    """actual, oracle (R, L) in float64; baseline in float32; scale (C,): see `assert_matches`.

    vanishing: where all of a case's oracle is below 1e-12 * scale, a few ulps of scale are its budget (a gradient that
    cancels). A case whose oracle is zero must be zero otherwise. NaN must stand where the oracle has them. What lies
    below the smallest normal number of the dtype may be lost, `slope` (C,) times.
    """
    c, floor, small_row, _ = STAGES[stage]
    own, eps, tiny = cases.of_row(), cases.limit("eps"), cases.limit("tiny") * slope
    misplaced = cases.inside & ((np.isnan(actual) != np.isnan(oracle)) | np.isinf(actual))
    known = np.isfinite(oracle) & ~misplaced & cases.inside
    o = np.where(known, oracle, 0)
    error = np.abs(np.where(known, actual, 0) - o)
    with np.errstate(invalid="ignore"):
        base = np.abs(baseline.astype(np.float64) - o)
    base = np.where(known & np.isfinite(base), base, 0) * (eps / np.finfo(np.float32).eps)[own][:, None]
    top = cases.largest(np.abs(o))
    budget = np.maximum(c * cases.largest(base) + floor * eps * np.maximum(top, scale) + tiny, TINY)
    cancels = np.where(vanishing, top <= 1e-12 * scale, top == 0)
    few = np.where(vanishing, 64 * eps * scale + tiny, 0)
    lost = cases.largest(error)
    with np.errstate(over="ignore"):
        by_element = np.where(cancels, np.where(lost <= few, 0.0, lost / np.maximum(few, TINY)), lost / budget)

    largest = np.maximum(top, TINY)[own]
    error_norm, base_norm, norm = (np.linalg.norm(t / largest[:, None], axis=-1) for t in (error, base, o))
    norm = norm + small_row * cases.worst_row(norm)[own]
    norm = np.where(norm > 0, norm, 1)
    width = np.sqrt(cases.n)[own]
    row_budget = c * cases.worst_row(base_norm / norm)[own]
    row_budget += (floor * eps)[own] * (1 + scale[own] / largest * width / norm) + tiny[own] / largest * width / norm
    by_row = np.where(cancels, 0, cases.worst_row(error_norm / norm / row_budget))
    broken = cases.worst_row(misplaced.any(-1))
    fraction = np.where(broken, np.inf, np.maximum(by_element, by_row))
    fraction = np.where(np.isnan(fraction), np.inf, fraction)
    row, token = _worst(cases, np.where(misplaced, np.inf, error))
    return Compared(fraction, row, token)


def _worst(cases: Cases, error: Array) -> tuple[Array, Array]:
    """(C,) row and token of the largest error."""
    token = error.argmax(-1)
    by_row = error[np.arange(len(error)), token]
    ends = np.append(cases.starts[1:], len(error))
    row = np.array([a + by_row[a:b].argmax() for a, b in zip(cases.starts, ends)], dtype=int)
    return row, token[row]
