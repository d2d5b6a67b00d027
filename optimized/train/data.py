"""Which tokens a step is given: by the seed and the number of the step, and nothing else.

So a run that goes on, on however many devices, needs no state of its data. Letters: B sequences, N context, T tokens.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from jaxtyping import Int64, Integer
from torch import Tensor


class Split(NamedTuple):
    """Contiguous parts of a text."""

    train: Integer[Tensor, " T1"]
    validation: Integer[Tensor, " T2"]


def split(tokens: Integer[Tensor, " T"], share: float, context: int) -> Split:
    """The last `share` of the tokens is the validation part. ValueError where a part is shorter than a sequence."""
    at = len(tokens) - int(share * len(tokens))
    parts = Split(tokens[:at], tokens[at:])
    for name, part in zip(("training", "validation"), parts):
        if len(part) <= context:
            raise ValueError(
                f"expected a text whose {name} part has more tokens than --context {context}, "
                f"got {len(part)} of {len(tokens)} tokens"
            )
    return parts


def digest(tokens: Integer[Tensor, " T"]) -> str:
    return hashlib.sha256(tokens.to(torch.int32).numpy().tobytes()).hexdigest()


def seed_of(*what: int | str) -> int:
    """A seed for `torch.manual_seed`, unrelated to that of other words and numbers."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "little") >> 1


class Batches:
    """Windows of a text without overlap, in an order and from a first token drawn anew for each round through it."""

    def __init__(self, tokens: Integer[Tensor, " T"], context: int, batch: int, seed: int) -> None:
        self.tokens, self.context, self.batch, self.seed = tokens, context, batch, seed
        self.each = (len(tokens) - 1) // context - (
            len(tokens) - 1 >= 2 * context
        )  # windows of a round, past an offset
        self._round: tuple[int, Int64[Tensor, " W"]] = -1, torch.empty(0, dtype=torch.int64)

    def at(self, step: int) -> Int64[Tensor, "B N+1"]:
        """Tokens of step 0, 1, ..., and of each the one that follows."""
        of = [divmod(step * self.batch + i, self.each) for i in range(self.batch)]
        return cut(self.tokens, torch.stack([self._starts(number)[i] for number, i in of]), self.context)

    def _starts(self, number: int) -> Int64[Tensor, " W"]:
        if self._round[0] != number:
            generator = torch.Generator().manual_seed(seed_of("round", self.seed, number))
            spare = len(self.tokens) - self.each * self.context  # first tokens: all windows end within the text
            offset = torch.randint(min(spare, self.context), (), generator=generator)
            self._round = number, torch.randperm(self.each, generator=generator) * self.context + offset
        return self._round[1]


def cut(tokens: Integer[Tensor, " T"], starts: Int64[Tensor, " B"], context: int) -> Int64[Tensor, "B N+1"]:
    return tokens[starts[:, None] + torch.arange(context + 1)].long()


def windows(tokens: Integer[Tensor, " T"], context: int, count: int) -> Int64[Tensor, "B N+1"]:
    """So many of them, evenly over the text; they overlap where it is short."""
    starts = torch.linspace(0, len(tokens) - context - 1, count, dtype=torch.float64).long()
    return cut(tokens, starts, context)
