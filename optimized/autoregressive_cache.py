"""What a strictly causal layer remembers of a sequence: `reference.Cache`."""

from __future__ import annotations

from dataclasses import dataclass

from reference import autoregressive_cache as reference_cache


@dataclass(frozen=True, eq=False)
class Cache(reference_cache.Cache):
    """As of the reference."""
