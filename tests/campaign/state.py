"""A run's results in a file, one JSON line for each part that is done. A killed run loses what was in flight.

The first line says what was run where. Every later line is the tally of some chunks of a kind; lines are merged into
one per kind when there are many, so that the file stays small. A torn last line is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .tally import Tally

MANY = 64  # lines


@dataclass
class Part:
    """Chunks of a kind that are done, and their tally."""

    done: set[int] = field(default_factory=set)
    tally: Tally = field(default_factory=Tally)

    def merge(self, chunks: Iterable[int], tally: Tally) -> None:
        new = set(chunks)
        if new & self.done:
            raise ValueError(f"chunks {sorted(new & self.done)} are done already")
        self.done |= new
        self.tally.merge(tally)


def as_ranges(chunks: set[int]) -> list[list[int]]:
    """First and last of each run of neighbours."""
    out: list[list[int]] = []
    for chunk in sorted(chunks):
        if out and out[-1][1] == chunk - 1:
            out[-1][1] = chunk
        else:
            out.append([chunk, chunk])
    return out


class State:
    """header: whatever must be the same for a run to go on; `environment` in it may differ."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.parts: dict[str, Part] = {}
        if path.exists():
            found, self.parts = read(path)
            for name, value in header.items():
                if name != "environment" and found.get(name) != value:
                    raise SystemExit(f"{path}: of another {name} ({found.get(name)}); remove it to start anew")
            self.header = found
        self._compact()

    def add(self, kind: str, chunk: int, tally: Tally) -> None:
        self._part(kind).merge([chunk], tally)
        with self.path.open("a") as file:
            file.write(_line(kind, {chunk}, tally))
            file.flush()
            os.fsync(file.fileno())
        self._lines += 1
        if self._lines > MANY:
            self._compact()

    def done(self, kind: str) -> set[int]:
        return self._part(kind).done

    def _part(self, kind: str) -> Part:
        return self.parts.setdefault(kind, Part())

    def _compact(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        lines = [_line(kind, part.done, part.tally) for kind, part in self.parts.items() if part.done]
        partial.write_text(json.dumps({"campaign": self.header}) + "\n" + "".join(lines))
        partial.replace(self.path)
        self._lines = 0


def _line(kind: str, chunks: set[int], tally: Tally) -> str:
    return json.dumps({"kind": kind, "done": as_ranges(chunks), "tally": tally.json()}, separators=(",", ":")) + "\n"


def read(path: Path) -> tuple[dict[str, Any], dict[str, Part]]:
    """Header and parts by kind."""
    parts: dict[str, Part] = {}
    lines = path.read_text().split("\n")
    header = json.loads(lines[0])["campaign"]
    # A line is whole if a newline ends it: of what stands after the last one something is missing.
    for line in lines[1:-1]:
        entry = json.loads(line)
        chunks = [chunk for first, last in entry["done"] for chunk in range(first, last + 1)]
        parts.setdefault(entry["kind"], Part()).merge(chunks, Tally.of(entry["tally"]))
    return header, parts
