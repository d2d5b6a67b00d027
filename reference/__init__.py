"""Mixture of Attention, written to be read: a NumPy oracle and a differentiable PyTorch implementation.

`reference.oracle` is NumPy float64, from the definition. The names below are PyTorch, one file per stage.
`reference.testing` compares a kernel of your own with them.
"""

from reference.autoregressive import MixtureOfAutoregressiveAttention
from reference.autoregressive_cache import Cache
from reference.contract import RouterOptions, Routes
from reference.local_attention import local_attention
from reference.mixture import MixtureOfAttention, combine
from reference.routed_attention import routed_attention
from reference.routing import Router, capped_simplex, coordinate_descent, route, select

__all__ = [
    "Cache",
    "MixtureOfAttention",
    "MixtureOfAutoregressiveAttention",
    "Router",
    "RouterOptions",
    "Routes",
    "capped_simplex",
    "combine",
    "coordinate_descent",
    "local_attention",
    "route",
    "routed_attention",
    "select",
]
