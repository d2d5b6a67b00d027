"""Oracles of selection and of both solvers for many rows at a time, in NumPy, each from its definition.

Rows are padded to a common length; every row has parameters of its own. Their dtype is that of the logits: float64 for
an oracle, float32 for a baseline. `tests/test_campaign.py` holds them against `reference.oracle` and autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .draws import Array


class Rows(NamedTuple):
    """s (R, L) logits; valid (R, L); by row: mass, number of steps (descending), and temperatures."""

    s: Array
    valid: Array
    mass: Array
    n_iters: Array
    eps: Array
    eps_init: Array
    eps_decay: Array

    def temperature(self, t: int | Array) -> Array:
        """(R,) in the dtype of the logits; t may be of each row."""
        hot = np.maximum(self.eps_init * self.eps_decay**t, self.eps)
        return hot.astype(self.s.dtype)


class Kinks(NamedTuple):
    """Decides which tokens are saturated, s >= -a_t, in place of the rows' own logits and iterates.

    s (R, L) logits and a (T, R) iterates, in any precision that holds those of the implementation under test.
    """

    s: Array
    a: Array

    def free(self, t: int, active: int) -> Array:
        """(active, L)"""
        return self.s[:active] < -self.a[t, :active, None]


class Solution(NamedTuple):
    """scores (R, L); a (T, R): the iterates, of a row with fewer steps the last one again.

    drift (R,): by how many roundings of 1 the last iterate may be off. A step rounds a and the logits, and passes on
    what came before by the weight of the tokens that are held at the iterate before: where one token outweighs all, to
    the full. Of 436,000 cases on a GPU two were beyond a budget that knew the last step alone, after 7 and 32 steps.
    """

    scores: Array
    a: Array
    drift: Array


# --- selection -------------------------------------------------------------------------------------------------------


def select(s: Array, valid: Array, n: Array, k: Array) -> tuple[Array, Array, Array]:
    """Indices and slot mask, k of each row one after the other, and the slot of every token (R, L), or -1.

    By sorting: valid numbers, then NaN, then masked tokens, then padding; the larger logit; the smaller index.
    """
    length = s.shape[1]
    tokens = np.arange(length)
    tier = np.where(tokens >= n[:, None], 3, np.where(~valid, 2, np.isnan(s).astype(int)))
    order = np.lexsort((np.where(tier == 0, -s, 0.0), tier), axis=-1)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(tokens, order.shape), -1)
    chosen = rank < k[:, None]
    shown = chosen & valid
    hidden = chosen & ~valid
    slot = np.where(shown, shown.cumsum(-1), shown.sum(-1, keepdims=True) + hidden.cumsum(-1)) - 1
    indices, slots = np.zeros(s.shape, np.int64), np.zeros(s.shape, bool)
    rows, columns = chosen.nonzero()
    indices[rows, slot[rows, columns]] = columns
    slots[rows, slot[rows, columns]] = shown[rows, columns]
    used = tokens < k[:, None]
    return indices[used], slots[used], np.where(shown, slot, -1)


# --- coordinate descent ----------------------------------------------------------------------------------------------


def descend(rows: Rows, kinks: Kinks | None = None) -> Solution:
    """Alternately the best a for u = min(s, -a), and u for that a (see `reference.coordinate_descent`)."""
    s, valid, poisoned = _numbers(rows)
    log_k = np.log(rows.mass).astype(s.dtype)
    steps = int(rows.n_iters[0])
    a = np.zeros((steps, len(s)), s.dtype)
    u = np.zeros_like(s)
    held = np.zeros(s.shape, bool)
    drift, size = np.zeros(len(s)), np.where(valid, np.abs(s), 0).max(-1, initial=0)
    for t in range(steps):
        active = _active(rows, t)
        eps = rows.temperature(t)[:active]
        a[t, :active] = eps * (log_k[:active] - _logsumexp(u[:active] / eps[:, None], valid[:active]))
        a[t, active:] = a[t - 1, active:]
        share = np.exp((u[:active] + a[t, :active, None]) / eps[:, None] - log_k[:active, None])
        passed_on = np.where(held[:active], share, 0).sum(-1) * drift[:active]
        drift[:active] = passed_on + np.abs(a[t, :active]) + size[:active]
        free = (kinks or Kinks(s, a)).free(t, active)
        u[:active] = np.where(free, s[:active], -a[t, :active, None])
        held[:active] = valid[:active] & ~free
    scores = np.exp((u + a[-1][:, None]) / rows.temperature(rows.n_iters)[:, None])
    return Solution(_spread(scores, valid, poisoned), a, drift)


def descend_gradient(rows: Rows, kinks: Kinks, g: Array) -> tuple[Array, Array]:
    """d sum(g * scores) / ds by reverse mode through every step, with the saturated sets of `kinks`, and the scores."""
    s, valid, poisoned = _numbers(rows)
    scores, a, _ = descend(rows, kinks)
    last = rows.temperature(rows.n_iters)[:, None]
    du = np.where(valid, np.where(poisoned, np.nan, g * scores / last), 0)
    free = valid & kinks.free(-1, len(s))
    ds = np.where(free, du, 0)
    da = ds.sum(-1)  # u + a: of a saturated token it is 0
    for t in range(int(rows.n_iters[0]) - 1, 0, -1):
        active = _active(rows, t)
        eps = rows.temperature(t)[:active, None]
        free = kinks.free(t - 1, active)
        z = np.where(free, s[:active], -a[t - 1, :active, None]) / eps
        weights = np.exp(z - _logsumexp(z, valid[:active])[:, None])
        du = np.where(valid[:active], -weights * da[:active, None], 0)
        ds[:active] += np.where(free, du, 0)
        da[:active] = -np.where(free, 0, du).sum(-1)
    return ds, scores


def _active(rows: Rows, t: int) -> int:
    """Rows with a step t: the first ones, for their numbers of steps descend."""
    return int(np.searchsorted(-rows.n_iters, -t, side="left"))


def _numbers(rows: Rows) -> tuple[Array, Array, Array]:
    """Logits with 0 for NaN and for masked tokens, the valid ones, and whether a row (R, 1) holds a valid NaN."""
    poisoned = (np.isnan(rows.s) & rows.valid).any(-1, keepdims=True)
    return np.where(rows.valid & ~np.isnan(rows.s), rows.s, 0).astype(rows.s.dtype), rows.valid, poisoned


def _logsumexp(z: Array, valid: Array) -> Array:
    """(R,) over valid tokens; 0 without any."""
    z = np.where(valid, z, -np.inf)
    top = z.max(-1, keepdims=True)
    top = np.where(top == -np.inf, 0, top)
    total = np.exp(z - top).sum(-1)
    return np.where(total > 0, np.log(np.where(total > 0, total, 1)) + top[:, 0], 0).astype(z.dtype)


def _spread(scores: Array, valid: Array, poisoned: Array) -> Array:
    return np.where(valid, np.where(poisoned, np.nan, scores), 0).astype(scores.dtype)


# --- the exact solver ------------------------------------------------------------------------------------------------


def cap(rows: Rows) -> tuple[Array, Array]:
    """min(1, exp((s + a) / eps)) of mass min(k, valid tokens), and the tokens that are not saturated.

    Tokens that reach 1 are saturated and the rest solved again, until none does. In float64 the mass certifies it: such
    scores are unique.
    """
    s, valid, poisoned = _numbers(rows)
    eps = rows.eps.astype(s.dtype)[:, None]
    count = valid.sum(-1, keepdims=True)
    mass = rows.mass.astype(s.dtype)[:, None]
    free = valid & (count > mass)
    while True:
        left = np.maximum(mass - (valid & ~free).sum(-1, keepdims=True).astype(s.dtype), 0)
        a = eps * (np.log(left) - _logsumexp(s / eps, free)[:, None])
        grown = free & (s + a >= 0)
        if not grown.any():
            break
        free &= ~grown
    scores = np.where(free, np.exp(np.where(free, s + a, 0) / eps), 1)
    if s.dtype == np.float64:
        wrong = np.abs(np.where(valid, scores, 0).sum(-1) - np.minimum(rows.mass, count[:, 0]))
        size = np.abs(s).max(-1) / rows.eps + s.shape[1]
        assert (wrong <= 1e-13 * (1 + size) * np.maximum(rows.mass, 1)).all(), "the oracle misses its mass"
    return _spread(scores, valid, poisoned), free


def cap_gradient(rows: Rows, scores: Array, free: Array, g: Array) -> Array:
    """The mass of the free tokens is fixed: a moves by minus their mean, weighted by their scores."""
    _, valid, poisoned = _numbers(rows)
    w = np.where(free & ~poisoned, scores, 0)
    total = w.sum(-1, keepdims=True)
    mean = (w * g).sum(-1, keepdims=True) / np.where(total > 0, total, 1)
    ds = w * (g - mean) / rows.eps[:, None].astype(w.dtype)
    return np.where(valid & poisoned, np.nan, ds).astype(w.dtype)


def about_to_saturate(rows: Rows, scores: Array, tolerance: Array) -> Array:
    """(R,): rows where a token may count as saturated or not, its score being that close to 1: the gradient jumps."""
    full = (scores >= 1 - tolerance[:, None]) & rows.valid
    count = rows.valid.sum(-1)
    every = (full.sum(-1) == count) & (count <= rows.mass)
    touching = ((scores < 1) & full).any(-1) | (np.abs(full.sum(-1) - rows.mass) <= tolerance * scores.shape[1])
    return touching & ~every
