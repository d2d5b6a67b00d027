"""What all parties of the comparison share: a seeded layer, and the text as its input."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import reference
from optimized.prove.text import Text, embed


@dataclass(frozen=True)
class Setup:
    """What all parties share: arguments of the layer, float32 state dict, input and cotangent (1, N, D)."""

    arguments: dict[str, Any]
    state: dict[str, Tensor]
    x: Tensor
    cotangent: Tensor
    device: torch.device


def prepare(args: argparse.Namespace, text: Text) -> Setup:
    arguments = {
        "dim": args.dim,
        "heads": args.heads,
        "dim_head": args.dim // args.heads,
        "num_experts": args.experts,
        "num_routed_queries": args.slots,
        "num_routed_key_values": args.slots,
        "local_attn": True,
        "local_attn_window_size": args.window,
        "cosine_sim_routing": True,
        "dropout": 0.0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        state = reference.MixtureOfAttention(**arguments).state_dict()
        for name, t in state.items():
            if "norm" in name:
                t += 0.1 * torch.randn_like(t)  # ones and zeros would hide a scale or bias that is not applied
        cotangent = torch.randn(1, len(text.tokens), args.dim)
    return Setup(arguments, state, embed(text.tokens, args.dim, args.seed)[None], cotangent, args.device)
