"""Floating-point operations, counted from the definition: a product and a sum are two.

A matrix product (m, k) x (k, n) takes 2 m k n. Attention from L queries to S keys takes 4 L S d a head: scores, and
weights times values. The backward of a product is two products, that of attention five of its two (the scores again),
so 2 and 2.5 times the forward. Norms, softmax, solver and selection are not counted: they do no matrix products.
"""

from __future__ import annotations

from .shapes import Case

BACKWARD = {"projections": 2.0, "router": 2.0, "attention": 2.5, "local projections": 2.0, "local attention": 2.5}


def layer(case: Case) -> dict[str, float]:
    """Forward of Mixture of Attention, by part. The null key is left out: one in K + 1."""
    rows = case.batch * case.experts
    if case.causal:
        assert case.window is not None
        asked = case.blocks * case.queries
        return local(case, case.window) | {
            "projections": 2.0 * rows * case.dim * 2 * case.inner * (asked + case.admitted),  # q and out, k and v
            "router": 2.0 * case.batch * case.n * case.dim * 2 * case.experts,
            "attention": 4.0 * rows * asked * case.taken * case.inner,
        }
    parts = {
        "projections": 2.0 * rows * case.taken * case.dim * 4 * case.inner,  # q, k, v, out
        "router": 2.0 * case.batch * case.n * case.dim * 2 * case.experts if case.n > case.slots else 0.0,
        "attention": 4.0 * rows * case.taken**2 * case.inner,
    }
    return parts if case.window is None else parts | local(case, case.window)


def local(case: Case, window: int) -> dict[str, float]:
    inner = case.dense_heads * case.dim_head
    return {
        "local projections": 2.0 * case.batch * case.n * case.dim * 4 * inner,
        "local attention": 4.0 * case.batch * pairs(case.n, window, case.causal) * inner,
    }


def dense(case: Case) -> dict[str, float]:
    """Forward of multi-head attention of every token to every token, or to those before."""
    inner = case.dense_heads * case.dim_head
    return {
        "projections": 2.0 * case.batch * case.n * case.dim * 4 * inner,
        "attention": 4.0 * case.batch * (pairs(case.n, case.n, True) if case.causal else case.n**2) * inner,
    }


def pairs(n: int, window: int, causal: bool = False) -> int:
    """Pairs |i - j| <= window among n tokens, or 0 <= i - j <= window."""
    w = min(window, n - 1)
    both = n * (2 * w + 1) - w * (w + 1)
    return (both + n) // 2 if causal else both


def total(parts: dict[str, float], direction: str) -> float:
    both = direction == "forward+backward"
    return sum(count * (1 + BACKWARD[name] * both) for name, count in parts.items())


def of(competitor: str, case: Case, direction: str) -> float:
    """Operations of the competitor named so, see `competitors`."""
    if competitor == "dense flex window":
        return total(local(case, case.reach), direction)
    if competitor == "dense flex blocks":
        parts = dense(case)
        return total(parts | {"attention": parts["attention"] * case.taken / case.n}, direction)
    return total(dense(case) if competitor.startswith("dense") else layer(case), direction)
