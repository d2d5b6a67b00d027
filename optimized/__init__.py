"""Mixture of Attention, fast: `from optimized import MixtureOfAttention`.

The stages are functions too, one file each: routing, routed_attention, local_attention, mixture. `explain` tells which
backend a call takes, `use_backends` and `set_default_backends` fix it. What the layer computes is written to be
read in the package `reference`. `Decoder` and `Encoder` are whole transformers of such layers.
"""

from optimized.autoregressive import MixtureOfAutoregressiveAttention
from optimized.autoregressive_cache import Cache
from optimized.explain import Explanation, StageReport, explain
from optimized.local_attention import local_attention
from optimized.mixture import MixtureOfAttention, combine
from optimized.plan import backends, set_default_backends, use_backends
from optimized.routed_attention import routed_attention
from optimized.routing import Router, capped_simplex, coordinate_descent, route, select
from optimized.transformer import (
    Decoder,
    DecoderCache,
    Encoder,
    Loads,
    StaticDecoderCache,
    TransformerConfig,
    generate,
    stream,
)
from reference.contract import RouterOptions, Routes

__all__ = [
    "Cache",
    "Decoder",
    "DecoderCache",
    "Encoder",
    "Explanation",
    "Loads",
    "MixtureOfAttention",
    "MixtureOfAutoregressiveAttention",
    "Router",
    "RouterOptions",
    "Routes",
    "StageReport",
    "StaticDecoderCache",
    "TransformerConfig",
    "backends",
    "capped_simplex",
    "combine",
    "coordinate_descent",
    "explain",
    "generate",
    "local_attention",
    "route",
    "routed_attention",
    "select",
    "set_default_backends",
    "stream",
    "use_backends",
]
