"""What a run counts. Tallies of parts add up to that of the whole, in any order, and to JSON and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .draws import Array

WORST = 5  # cases kept of each quantity and dtype
# A bin for 0, one below 1e-6, four a decade up to 1 (a failure), one beyond.
EDGES = np.concatenate(([0.0], 10.0 ** np.arange(-6, 0.01, 0.25)))
MISSED = re.compile(r"(\w+)(?: [\w.]+)?: torch\.(\w+) \([^)]*\): error is (\S+) of its budget by element, (\S+) by row")


@dataclass
class Failure:
    """A case that failed, or a chunk whose process died."""

    message: str
    snippet: str

    def json(self) -> list[str]:
        return [self.message, self.snippet]

    def excess(self) -> tuple[str, str, float] | None:
        """Of a case of a layer that missed a budget: stage, dtype and fraction, as the comparator says them."""
        found = MISSED.search(self.message)
        return found and (found[1], found[2], max(float(found[3]), float(found[4])))


@dataclass
class Band:
    """Of a quantity in a dtype: a histogram of its fractions of the budget, and the worst (fraction, snippet)."""

    counts: Array = field(default_factory=lambda: np.zeros(len(EDGES) + 1, int))
    worst: list[tuple[float, str]] = field(default_factory=list)

    def enter(self, fractions: Array, snippets: Sequence[str]) -> None:
        self.counts += np.bincount(np.searchsorted(EDGES, fractions, side="left"), minlength=len(EDGES) + 1)
        order = np.argsort(-fractions, kind="stable")[:WORST]
        self.keep([(float(f"{fractions[i]:.4g}"), snippets[i]) for i in order])

    def merge(self, other: Band) -> None:
        self.counts = self.counts + other.counts
        self.keep(other.worst)

    def keep(self, more: list[tuple[float, str]]) -> None:
        """The worst of them, without a place in the histogram."""
        self.worst = sorted(set(self.worst + more), key=lambda w: (-w[0], w[1]))[:WORST]


@dataclass
class Tally:
    """Of one kind on one device.

    cases: run, by dtype. small: by dtype, digests of those that chance may draw twice (layers: of all). pairs: how
    often two levels met, by (parameter, level); a level with itself: how often it was drawn.
    """

    cases: dict[str, int] = field(default_factory=dict)
    small_cases: dict[str, int] = field(default_factory=dict)
    small: dict[str, set[str]] = field(default_factory=dict)
    levels: list[list[str]] = field(default_factory=list)
    pairs: Array = field(default_factory=lambda: np.zeros((0, 0), int))
    bands: dict[tuple[str, str], Band] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    def distinct(self) -> dict[str, int]:
        """Cases by dtype; one drawn again counts once."""
        return {d: n - self.small_cases.get(d, 0) + len(self.small.get(d, ())) for d, n in self.cases.items()}

    def count(self, dtype: str, digest: str | None) -> None:
        self.cases[dtype] = self.cases.get(dtype, 0) + 1
        if digest is not None:
            self.small_cases[dtype] = self.small_cases.get(dtype, 0) + 1
            self.small.setdefault(dtype, set()).add(digest)

    def cover(self, parameters: Mapping[str, Sequence[str]], cases: Sequence[Sequence[int]]) -> None:
        """parameters: the levels of each; cases: a level of each parameter, by its place."""
        levels = [[name, level] for name, of in parameters.items() for level in of]
        first = np.cumsum([0, *map(len, parameters.values())])[:-1]
        one_hot = np.zeros((len(cases), len(levels)), int)
        if len(cases):
            np.put_along_axis(one_hot, np.asarray(cases) + first, 1, -1)
        self._merge_pairs(levels, one_hot.T @ one_hot)

    def band(self, quantity: str, dtype: str) -> Band:
        return self.bands.setdefault((quantity, dtype), Band())

    def enter(self, quantity: str, dtype: str, fractions: Array, snippets: Sequence[str]) -> None:
        if len(snippets):
            self.band(quantity, dtype).enter(fractions, snippets)

    def note(self, what: str, n: int) -> None:
        if n:
            self.notes[what] = self.notes.get(what, 0) + n

    def merge(self, other: Tally) -> None:
        for mine, theirs in ((self.cases, other.cases), (self.small_cases, other.small_cases)):
            for dtype, n in theirs.items():
                mine[dtype] = mine.get(dtype, 0) + n
        for dtype, digests in other.small.items():
            self.small.setdefault(dtype, set()).update(digests)
        self._merge_pairs(other.levels, other.pairs)
        for key, band in other.bands.items():
            self.band(*key).merge(band)
        for what, n in other.notes.items():
            self.note(what, n)
        self.failures += other.failures
        self.seconds += other.seconds

    def _merge_pairs(self, levels: list[list[str]], pairs: Array) -> None:
        if not self.levels:
            self.levels, self.pairs = levels, np.zeros_like(pairs)
        if levels and levels != self.levels:
            raise ValueError("levels of another kind, or of another state of the campaign")
        if levels:
            self.pairs = self.pairs + pairs

    def json(self) -> dict[str, Any]:
        return {
            "cases": self.cases,
            "small_cases": self.small_cases,
            "small": {dtype: sorted(digests) for dtype, digests in self.small.items()},
            "levels": self.levels,
            "pairs": [row[i:].tolist() for i, row in enumerate(self.pairs)],  # symmetric: the upper half
            "bands": [[*key, _sparse(b.counts), b.worst] for key, b in self.bands.items()],
            "notes": self.notes,
            "failures": [f.json() for f in self.failures],
            "seconds": round(self.seconds, 2),
        }

    @staticmethod
    def of(found: dict[str, Any]) -> Tally:
        upper = np.zeros((len(found["levels"]),) * 2, int)
        for i, row in enumerate(found["pairs"]):
            upper[i, i:] = row
        bands = {}
        for quantity, dtype, counts, worst in found["bands"]:
            band = bands[quantity, dtype] = Band(worst=[tuple(w) for w in worst])
            for place, n in counts:
                band.counts[place] = n
        return Tally(
            cases=found["cases"],
            small_cases=found["small_cases"],
            small={dtype: set(digests) for dtype, digests in found["small"].items()},
            levels=found["levels"],
            pairs=np.maximum(upper, upper.T),
            bands=bands,
            notes=found["notes"],
            failures=[Failure(*f) for f in found["failures"]],
            seconds=found["seconds"],
        )


def _sparse(counts: Array) -> list[list[int]]:
    return [[int(i), int(counts[i])] for i in counts.nonzero()[0]]
