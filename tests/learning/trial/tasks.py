"""The data of a task: drawn from the seed and the step alone, so that all models see the same, resumed or not."""

from __future__ import annotations

import torch

from . import recall, text
from .batch import Batch
from .settings import Settings

UNSEEN = 2**40  # no step has so many


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(s: Settings, step: int) -> Batch:
    """Of one step of training."""
    generator = _generator(s.seed * 2**20 + step)
    return recall.draw(s, s.batch, generator) if s.task == "recall" else text.trained(s, s.batch, generator)


def unseen(s: Settings, count: int) -> Batch:
    """The same of all seeds."""
    generator = _generator(UNSEEN)
    return recall.draw(s, count, generator) if s.task == "recall" else text.held_out(s, count, generator)
