"""AdamW, with decay of matrices alone, and a rate that rises, then falls by a cosine."""

from __future__ import annotations

import math

import torch
from torch import nn

BETAS = (0.9, 0.95)
LEAST = 0.1  # of the highest rate, at the end


def optimizer_of(model: nn.Module, rate: float, decay: float) -> torch.optim.AdamW:
    """Weights of two dimensions and more decay; norms, routing tokens, null keys and values and null tokens do not."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (matrices if p.ndim >= 2 and name.endswith("weight") else rest).append(p)
    groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)


def rate_at(step: int, steps: int, warmup: int, highest: float) -> float:
    """Of step 0, 1, ..., steps - 1."""
    if step < warmup:
        return highest * (step + 1) / warmup
    along = (step - warmup) / max(steps - 1 - warmup, 1)
    return highest * (LEAST + (1 - LEAST) * (1 + math.cos(math.pi * along)) / 2)
