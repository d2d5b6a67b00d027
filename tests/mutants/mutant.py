"""What a mutant is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

from tests.faults.taxonomy import classify


@dataclass(frozen=True)
class Mutant:
    """One fault. `old` stands exactly once in `file`.

    bug, public: its class and the public bug that it re-enacts, of `tests/faults/taxonomy.py`, or "own". device: "cuda"
    where a CPU can't tell it from the original. equivalent: why no test can tell it from the original; such a mutant is
    run, and must survive.
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


Edits = dict[str, dict[str, Callable[[str, str], Mutant]]]  # by file, by name


def edit(
    old: str, new: str, why: str, bug: str = "", *, device: str = "cpu", equivalent: str = ""
) -> Callable[[str, str], Mutant]:
    """A mutant but for its name and file. why, bug: see `taxonomy.classify`."""
    return lambda name, file: Mutant(name, file, old, new, *classify(why, bug), device, equivalent)
