"""What every kind of case has: a name, a size of its chunks, and a way to run some of its cases."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .draws import TINIEST, Array
from .tally import Tally

DRAWN = ("layer", "causal")  # by hypothesis
KINDS = ("selection", "solver", *DRAWN)


@dataclass(frozen=True)
class Setting:
    """Where cases run. kernels: "torch" or "triton", which is interpreted on the CPU."""

    device: torch.device
    kernels: str
    seed: int = 0

    @property
    def triton(self) -> bool:
        return self.kernels == "triton"

    def snippet(self, kind: str, which: str) -> str:
        """A command that runs the case, or the cases "A-B", again."""
        return f"{self.command(kind)} --case {which} --seed {self.seed}"

    def command(self, kind: str) -> str:
        words = ["python -m tests.campaign --kind", kind]
        words += ["--device", self.device.type] if self.device.type != "cpu" else []
        words += ["--kernels", self.kernels] if self.kernels != default_kernels(self.device.type) else []
        return " ".join(words)


def default_kernels(device: str) -> str:
    return "triton" if device == "cuda" else "torch"


class Kind(Protocol):
    """A module per kind: `selection`, `solver`, and `layer` and `causal`, whose KIND it is."""

    NAME: str
    CHUNK: int  # cases

    def run(self, first: int, count: int, setting: Setting) -> Tally:
        """Cases first .. first + count - 1."""

    def describe(self, index: int, setting: Setting) -> str:
        """The configuration of a case, as text."""


def digest_of(configuration: tuple[Any, ...], *data: Array | None) -> str | None:
    """Of a case so small that it may be drawn twice; None for others."""
    if data[0] is None or data[0].size > TINIEST:
        return None
    told = hashlib.blake2b(repr(configuration).encode(), digest_size=6)
    for t in data:
        told.update(b"-" if t is None else t.tobytes())
    return told.hexdigest()


def warm_up(kind: Any, share: int, of: int, setting: Setting) -> None:
    """Has Triton compile what `share` of `of` processes owes the others, by a case of every variant.

    Else all of them would compile the same kernels at once; the rare ones of long rows are left to whoever meets them.
    """
    variants: dict[Any, int] = {}
    for index in range(4000):
        variants.setdefault(kind.compiled_for(kind.draw(setting.seed, index).configuration), index)
    for index in list(variants.values())[share::of]:
        kind.run(index, 1, setting)


def broke_the_device(error: Exception) -> bool:
    """After such an error nothing that the process computes on its GPU is worth anything."""
    return "CUDA error" in str(error) or "illegal memory access" in str(error)
