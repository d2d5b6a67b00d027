"""A strictly causal layer under test: told what the published constructor knows, and asked what it says that it has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from hypothesis import strategies as st
from torch import nn

import reference
from tests.conformance import registry
from tests.conformance.subject import Subject
from tests.strategies import LayerCase

# "state_dict": parameters as the reference's, and what it computes of them. "cache": forward takes `cache` and
# `use_cache`, and returns (out, cache). "select", "crop": methods of a cache. "non_finite": NaN and infinity of a token
# reach no earlier one. The others are arguments of forward and of the constructor.
BUILDS = ("average_routed", "local_attn_heads", "capacity_factor", "device", "dtype", "solver", "eps")
FEATURES = ("state_dict", "mask", "rotary_emb", "cache", "select", "crop", "non_finite", *BUILDS)


class CausalSubject(Subject):
    """Nothing is read off signatures: there are many strictly causal layers, and no argument tells which it is."""

    ORACLE: ClassVar[type[nn.Module]] = reference.MixtureOfAutoregressiveAttention
    FEATURES: ClassVar[tuple[str, ...]] = FEATURES
    SIZES: ClassVar[tuple[str, ...]] = (
        *Subject.SIZES, "local_attn_window_size", "routed_window_size", "dropout", "prenorm",
    )  # fmt: skip
    DEFAULTS: ClassVar[dict[str, Any]] = {"average_routed": False}

    @property
    def features(self) -> frozenset[str]:
        return super().features or frozenset()


def checked_on(cases: st.SearchStrategy[LayerCase], *needs: str) -> Callable[[registry.Check], registry.Check]:
    """Registers a property of a strictly causal layer; needs: features, beside those that a case shows."""
    return functools.partial(registry.checked_on, subject=CausalSubject)(cases, needs)
