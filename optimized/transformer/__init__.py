"""Transformers of dense, local and mixture layers: a causal language model, an encoder, and generation.

`config` says what they are made of; `attentions` the kinds of attention, `block` a block, `trunk` all but the head,
`models` the two models. For decoding: `layer_caches` and `cache` say what is remembered, `stepping` what can step in
place, `decoding` how the next logits come, `generation` how tokens do.
"""

from optimized.transformer.cache import DecoderCache, StaticDecoderCache
from optimized.transformer.config import TransformerConfig
from optimized.transformer.generation import generate, stream
from optimized.transformer.models import Decoder, Encoder
from optimized.transformer.trunk import Loads

__all__ = [
    "Decoder",
    "DecoderCache",
    "Encoder",
    "Loads",
    "StaticDecoderCache",
    "TransformerConfig",
    "generate",
    "stream",
]
