"""How large a model is, and how much it computes."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from optimized.transformer import Decoder, TransformerConfig


def parameters_of(config: TransformerConfig) -> int:
    return sum(p.numel() for p in Decoder(config, device="meta").parameters())


def macs_per_token(config: TransformerConfig, context: int) -> float:
    """Multiplications and additions of a forward call, over its tokens; those of products of matrices and attention."""
    model = Decoder(config, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, context, dtype=torch.int64, device="meta"))
    return counter.get_total_flops() / 2 / context
