"""Sequences, and what is to be said of each token."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Int64
from torch import Tensor

IGNORED = -100  # as cross_entropy has it


class Batch(NamedTuple):
    tokens: Int64[Tensor, "B N"]
    targets: Int64[Tensor, "B N"]  # IGNORED where nothing is asked
