"""A run's results in a file, one JSON line for each part that is done. A killed run loses what was in flight.

The first line says what was run where. Every later line is the tally of some chunks of a kind; lines are merged into
one per kind when there are many, so that the file stays small. A torn last line is dropped. Only one run at a time
writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.statefile import StateError, StateFile

from .kind import KINDS
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
    """header: whatever must be the same for a run to go on; `environment` in it may differ. To be closed.

    Raises StateError where the file is in use, of other sources or another seed, or no state.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.parts: dict[str, Part] = {}
        self._file = StateFile(path)
        try:
            content = self._file.content()
            if content:
                self.header, self.parts = _parse(path, content)
                _check_same(path, self.header, header)
            self._compact()
        except BaseException:
            self.close()
            raise

    def add(self, kind: str, chunk: int, tally: Tally) -> None:
        self._part(kind).merge([chunk], tally)
        self._file.append(_line(kind, {chunk}, tally))
        self._lines += 1
        if self._lines > MANY:
            self._compact()

    def done(self, kind: str) -> set[int]:
        return self._part(kind).done

    def _part(self, kind: str) -> Part:
        return self.parts.setdefault(kind, Part())

    def _compact(self) -> None:
        lines = [_line(kind, part.done, part.tally) for kind, part in self.parts.items() if part.done]
        self._file.replace(json.dumps({"campaign": self.header}) + "\n" + "".join(lines))
        self._lines = 0

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> State:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _line(kind: str, chunks: set[int], tally: Tally) -> str:
    return json.dumps({"kind": kind, "done": as_ranges(chunks), "tally": tally.json()}, separators=(",", ":")) + "\n"


def _check_same(path: Path, found: dict[str, Any], header: dict[str, Any]) -> None:
    for name, value in header.items():
        if name != "environment" and found[name] != value:
            got = f"{name} {found[name]!r}"
            if isinstance(value, dict):
                other = [key for key in value.keys() | found[name].keys() if value.get(key) != found[name].get(key)]
                got = f"another state of {' and '.join(sorted(other))}"
            expected = "the sources as they are" if isinstance(value, dict) else f"{name} {value!r}"
            raise StateError(f"{path}: expected a state of {expected}, got one of {got}; remove it to start anew")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Part]]:
    """Header and parts by kind; StateError where it is no state. A run may be writing it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StateError(f"{path}: expected the state of a campaign, got {error.strerror}") from error
    return _parse(path, content)


def _parse(path: Path, content: bytes) -> tuple[dict[str, Any], dict[str, Part]]:
    # A line is whole if a newline ends it: of what stands after the last one something is missing.
    lines = content.split(b"\n")[:-1] or [content]
    parts: dict[str, Part] = {}
    header: dict[str, Any] = {}
    for number, line in enumerate(lines, 1):
        try:
            if number == 1:
                header = _header(json.loads(line))
            else:
                _enter(parts, json.loads(line))
        # Whatever JSON there may be in place of ours.
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            what = f"line {number}: {type(error).__name__}: {error}"
            raise StateError(f"{path}: expected the state of a campaign, got another {what}") from error
    return header, parts


def _header(line: dict[str, Any]) -> dict[str, Any]:
    header = line["campaign"]
    about = header["environment"]
    told = {name: header[name] for name in ("device", "kernels", "seed", "hashes")}
    told |= {"hardware": about["hardware"], "versions": about["versions"], "commit": about["commit"] or ""}
    kinds = {"seed": int, "hashes": dict, "hardware": dict, "versions": dict}
    for name, value in told.items():
        kind = kinds.get(name, str)
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {value!r}")
    return header


def _enter(parts: dict[str, Part], entry: dict[str, Any]) -> None:
    """Refused unless it is written as it was read: nothing in it is lost or made up."""
    kind, tally = entry["kind"], Tally.of(entry["tally"])
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    chunks = {chunk for first, last in entry["done"] for chunk in range(first, last + 1)}
    counts = [n for of in (tally.cases, tally.small_cases, tally.notes) for n in of.values()]
    if not all(map(_is_count, counts)):
        raise ValueError(f"counts: expected integers >= 0, got {counts}")
    if json.loads(_line(kind, chunks, tally)) != entry:
        raise ValueError("it would be written otherwise")
    parts.setdefault(kind, Part()).merge(chunks, tally)


def _is_count(n: Any) -> bool:
    return type(n) is int and n >= 0
