"""Multiply-accumulates of a model, counted from the definition: half of the FLOPs of `tests.benchmarks.flops`.

Of matrix products and attention alone. Keys and values count for tokens that an expert ever remembers, where logits
come in random order: that is what the kernels project. A memory that is not full yet counts as full as it is. The null
key is left out.
"""

from __future__ import annotations

import math

from tests.benchmarks.flops import pairs

from .models import config_of, hidden_of
from .recall import VALUES
from .settings import Settings

BACKWARD = (2.0, 2.5)  # times the forward: of products, and of attention, which takes its scores again


def forward(s: Settings) -> dict[str, float]:
    """By part, of one sequence."""
    c = config_of(s, hidden_of(s))
    assert c.heads is not None
    assert c.hidden is not None
    inner, causal, reach = s.heads * s.dim_head, s.task != "encoder", s.n if s.model == "dense" else s.window
    if s.mixture and not causal:  # whose local branch has as many heads as an expert
        inner //= s.experts
    classes = VALUES if s.task == "recall" else c.vocab_size
    parts = {
        "feed-forward": 3.0 * s.n * s.dim * c.hidden,
        "head": 1.0 * s.n * s.dim * classes,
        "projections": 4.0 * s.n * s.dim * inner,
        "attention": 2.0 * pairs(s.n, reach, causal) * inner,
    }
    for name in ("feed-forward", "projections", "attention"):
        parts[name] *= s.layers
    return parts | (_routed(s, causal) if s.mixture else {})


def _routed(s: Settings, causal: bool) -> dict[str, float]:
    """Of all layers. All experts together have as many heads as local attention."""
    inner, k = s.heads * s.dim_head, min(s.keys, s.n)
    if causal:
        blocks = s.n // s.window - 1
        asked = min(s.queries, s.window) * blocks
        seen = sum(min(k, j * s.window) for j in range(1, blocks + 1)) * min(s.queries, s.window)
        kept = min(k * (1 + math.log(s.n / k)), s.n)
    else:
        asked, kept = min(s.queries, s.n), k
        seen = asked * k
    return {
        "router": 2.0 * s.layers * s.n * s.dim * s.experts,
        "routed queries": 2.0 * s.layers * asked * s.dim * inner,  # and outputs
        "routed keys": 2.0 * s.layers * kept * s.dim * inner,  # and values
        "routed attention": 2.0 * s.layers * seen * inner,
    }


def of_a_step(s: Settings) -> float:
    """Forward and backward of a batch."""
    parts = forward(s).items()
    return s.batch * sum(count * (1 + BACKWARD[name.endswith("attention")]) for name, count in parts)
