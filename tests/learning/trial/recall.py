"""Recall over a distance: a table of keys and values at the beginning, questions at the end, and nothing in between.

A token is a symbol and an attribute. The first quarter holds `pairs` tokens of distinct key symbols, with a value each
for an attribute, at random places; the last W tokens are the question symbols of these keys, each key once before one
comes again. All else is distractors with random attributes. The answer to a question is the value of its key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import IGNORED, Batch
from .settings import Settings

VALUES = 16
DISTRACTORS = 64


def symbols_of(s: Settings) -> int:
    """Keys, then the questions for them, then distractors."""
    return 2 * s.symbols + DISTRACTORS


def draw(s: Settings, count: int, generator: torch.Generator) -> Batch:
    """Sequences of tokens symbol * VALUES + attribute, (count, N) int64, and their answers at the questions."""

    def shuffled(length: int, rows: int = count) -> Tensor:
        return torch.rand(rows, length, generator=generator).argsort(1)

    symbol = 2 * s.symbols + torch.randint(DISTRACTORS, (count, s.n), generator=generator)
    attribute = torch.randint(VALUES, (count, s.n), generator=generator)
    keys = shuffled(s.symbols)[:, : s.pairs]
    places = shuffled(s.n // 4)[:, : s.pairs]
    symbol.scatter_(1, places, keys)
    values = attribute.gather(1, places)

    rounds = -(-s.window // s.pairs)
    asked = shuffled(s.pairs, count * rounds).view(count, -1)[:, : s.window]  # which pair
    symbol[:, -s.window :] = s.symbols + keys.gather(1, asked)
    attribute[:, -s.window :] = 0
    answers = torch.full((count, s.n), IGNORED)
    answers[:, -s.window :] = values.gather(1, asked)
    return Batch(symbol * VALUES + attribute, answers)
