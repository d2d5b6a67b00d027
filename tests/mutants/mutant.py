"""What a mutant is, and the classes of bugs that this layer can have."""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass
from pathlib import Path

CLASSES = (
    "missing gradient",
    "stride and layout",
    "tail mask",
    "uninitialised output",
    "masked rows and sentinels",
    "masked tokens leak",
    "32-bit index",
    "log-sum-exp and scale",
    "window",
    "causality",
    "configuration",
    "stale saved tensor",
    "dropout",
    "ties and signed zeros",
    "NaN order",
    "empty input",
    "fake tensors",
    "expert mix-up",
    "batch mix-up",
    "precision",
    "host synchronisation",
    "rotary",
    "in-place modification",
    "straight-through",
    "mass",
    "combination",
    "transforms",
    "choice of backend",
    "validation",
)


@dataclass(frozen=True)
class Mutant:
    """One fault. `old` stands exactly once in `file`.

    public: the public bug that it re-enacts, or "own". device: "cuda" where a CPU can't tell it from the original.
    equivalent: why no test can tell it from the original; such a mutant is run, and must survive.
    """

    name: str
    file: str
    old: str
    new: str
    bug: str
    public: str = "own"
    device: str = "cpu"
    equivalent: str = ""

    def apply(self, root: Path) -> None:
        path = root / self.file
        path.write_text(self.mutated(path.read_text()))

    def mutated(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: expected its old text once in {self.file}, found it {text.count(self.old)}x"
            )
        return text.replace(self.old, self.new)

    def digest(self) -> str:
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()
