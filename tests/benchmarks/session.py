"""A run: every competitor on every case, and its report, which is on disk after each."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests import record

from . import flops
from .attentions import UnavailableError
from .competitors import COMPILED, DIRECTIONS, Steps, enter
from .floor import Floor
from .measure import clock_of, host_ms, peak_bytes, profile_kernels, time_call
from .shapes import Case

FLOOR = "floor"
OF_THE_LAYER = ("optimized", "reference", "upstream")  # what the floor is a floor of
EFFORT = {"cuda": {"budget_ms": 60.0, "least": 5}, "cpu": {"budget_ms": 400.0, "least": 3}}


class Job(NamedTuple):
    case: Case
    competitor: str

    @property
    def rank(self) -> int:
        """Torch compiles last: it takes longest, and says least."""
        if self.competitor.partition(" ")[2] in COMPILED:
            return 3
        return 2 if "flex" in self.competitor else int("=" in self.competitor)

    @property
    def seconds(self) -> float:
        """A guess at what it takes, for the budget."""
        return (2.0, 2.0, 20.0, 40.0)[
            self.rank
        ] + 5e-10 * self.case.batch * self.case.n**2 * self.competitor.startswith("dense")


def jobs(cases: list[Case], shapes: list[str], competitors: list[str]) -> list[Job]:
    """Those whose names (of a case: or its group's) match one of the patterns, most important first."""
    wanted = [case for case in cases if _matches(case.name, shapes) or _matches(case.group, shapes)]
    found = [Job(case, name) for case in wanted for name in (FLOOR, *case.competitors) if _matches(name, competitors)]
    return sorted(found, key=lambda job: job.rank)


def _matches(name: str, patterns: list[str]) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


class Session:
    """Runs jobs and keeps the report. budget: seconds after which jobs are skipped, which the report says."""

    def __init__(
        self, device: torch.device, out: Path | None, budget: float | None = None, commit: str | None = None,
        effort: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.device, self.out, self.budget = device, out, budget
        self.effort = effort or EFFORT[device.type]
        self.start = time.monotonic()
        self.clock = clock_of(device)
        self.floor = Floor(device, self.clock)
        self.lost: str | None = None
        self.report: dict[str, Any] = {
            "kind": "benchmarks",
            **record.made(device, ("optimized", "reference", "tests/benchmarks"), commit),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "budget": budget,
            "complete": False,
            "cases": {},
            "floors": {},
            "rows": [],
        }

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def run(self, todo: list[Job], note: Callable[[Job, str], None] = lambda job, said: None) -> dict[str, Any]:
        """note: called after each job, with what came out in words."""
        if self.device.type == "cuda":
            try:
                self.report["ceilings"] = self.floor.ceilings()
            except Exception as error:
                self.report["ceilings"] = {"reason": self._reason(error)}
            self._free()
        for job in todo:
            operations = {name: {d: flops.of(name, job.case, d) for d in DIRECTIONS} for name in ("optimized", "dense")}
            self.report["cases"][job.case.name] = job.case.described() | {"flops": operations}
        for job in todo:
            reason = self._skipped(job)
            if job.competitor == FLOOR:
                said = self._floor(job.case, reason)
            else:
                rows = list(self._rows(job, reason))
                self._free()  # here, since the generator held the competitor to its end
                self.report["rows"] += rows
                said = " / ".join(row.get("reason") or f"{row['p50']:.3f} ms" for row in rows)
            self._save()
            note(job, said)
        self.report["complete"] = True
        self._save()
        return self.report

    def _skipped(self, job: Job) -> str | None:
        if self.lost:
            return f"skipped: the device was lost: {self.lost}"
        if self.budget is not None and self.elapsed + job.seconds > self.budget:
            return f"skipped: {self.elapsed:.0f} of {self.budget:.0f} s were spent"
        return None

    def _floor(self, case: Case, reason: str | None) -> str:
        found: dict[str, Any] = {"reason": reason}
        if reason is None:
            try:
                found = self.floor.of(case)
            except Exception as error:
                found = {"reason": self._reason(error)}
            self._free()
        self.report["floors"][case.name] = found
        return found.get("reason") or " / ".join(f"{found[d]['ms']:.3f} ms" for d in DIRECTIONS)

    def _rows(self, job: Job, reason: str | None) -> Iterator[dict[str, Any]]:
        """A row for each direction, whatever happens."""
        named = [{"case": job.case.name, "competitor": job.competitor, "direction": d} for d in DIRECTIONS]
        if reason is not None:
            yield from (row | {"reason": reason} for row in named)
            return
        done = 0
        try:
            with enter(job.competitor, job.case, self.device) as steps:
                for row in named:
                    try:
                        measured = self._figures(job, steps, row["direction"])
                    except Exception as error:
                        measured = {"reason": self._reason(error)}
                    finally:
                        steps.clear()
                    yield row | measured
                    done += 1
        except Exception as error:
            said = self._reason(error)
            yield from (row | {"reason": said} for row in named[done:])

    def _figures(self, job: Job, steps: Steps, direction: str) -> dict[str, Any]:
        call = steps.direction(direction)
        timing = time_call(call, self.clock, before=steps.clear, **self.effort)
        figures = timing._asdict() | {"tflops": flops.of(job.competitor, job.case, direction) / timing.p50 / 1e9}
        if steps.backends:
            figures["backends"] = steps.backends
        if steps.memory:
            steps.clear()
            figures["peak_mib"] = peak_bytes(call, self.device) / 2**20
        if self.device.type == "cuda" and job.case.detail:
            profile = profile_kernels(call, self.clock, before=steps.clear)
            figures |= profile._asdict()
            if job.competitor != "optimized":
                del figures["names"]  # pages of elementwise kernels
            launches = profile.kernels + profile.copies if steps.memory else 1  # a graph is one launch
            figures["host_ms"] = host_ms(call, self.clock, before=steps.clear, launches=launches)
        return figures

    def _reason(self, error: Exception) -> str:
        """In one line. Finds out whether the device survived."""
        text = " ".join(str(error).split())[:300]
        try:
            self.clock.wait()
        except Exception as gone:
            self.lost = " ".join(str(gone).split())[:200]
        if isinstance(error, torch.OutOfMemoryError):
            return "out of memory"
        return text if isinstance(error, UnavailableError) else f"{type(error).__name__}: {text}"

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda" and not self.lost:
            torch.cuda.empty_cache()

    def _save(self) -> None:
        for row in self.report["rows"]:
            floor = self.report["floors"].get(row["case"], {}).get(row["direction"])
            if floor and "p50" in row and row["competitor"].startswith(OF_THE_LAYER):
                row["over_floor"] = row["p50"] / floor["ms"]
        self.report["seconds"] = round(self.elapsed, 1)
        if self.out is not None:
            record.write(self.out, rounded(self.report))


def rounded(value: Any) -> Any:
    """Figures to 5 digits: what comes after them is noise."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
