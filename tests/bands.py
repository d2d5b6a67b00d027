"""The band of every error budget: how much of it correct results use, and how much the faintest of known faults does.

    python -m tests.bands --examples 10000 --out tests/reports/bands-cpu.json    # resumes where FILE ends
    python -m tests.bands --table docs/generated/bands.md                        # the table there, from the report

The suite's own properties run, under the suite's own strategies, with the comparator told to return fractions beyond 1
instead of failing. Each example is compared as it is, then with the faint faults of `tests/faults/results.py` in its
result; the first chunks run again with those of `tests/faults/computations.py` inside the reference, which then stands
for the implementation. Chunks of 100 examples, as many as an ordinary run has; the same seed draws the same ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import hypothesis
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CHUNK = 100
# Before the properties are imported, which take their settings from it.
hypothesis.settings.register_profile(
    "bands",
    max_examples=CHUNK,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("bands")

import harness  # noqa: E402
import record  # noqa: E402
import runs  # noqa: E402
import test_local_attention  # noqa: E402
import test_mixture  # noqa: E402
import test_routed_attention  # noqa: E402
import test_routing  # noqa: E402
from rich.progress import Progress  # noqa: E402

import optimized  # noqa: E402
from reference.testing import STAGES, assert_matches  # noqa: E402
from tests.faults.computations import COMPUTATIONS  # noqa: E402
from tests.faults.results import RESULTS  # noqa: E402
from tests.statefile import StateError, StateFile  # noqa: E402

HUGE = 2.0**200  # budgets are linear in c and floor: with both as many times as large nothing fails
DEVICE = torch.device("cpu")


# --- measuring -------------------------------------------------------------------------------------------------------


class Property(NamedTuple):
    """A property of the suite, and parameters to run it under.

    rarely: only one in so many examples makes an ordinary comparison of each stage and dtype. untouched: by these
    faults, since it calls something else.
    """

    module: ModuleType
    test: str
    stages: tuple[str, ...]
    parameters: tuple[dict[str, Any], ...]
    rarely: int = 1
    untouched: tuple[str, ...] = ()


def _by_dtype(*dtypes: torch.dtype, **more: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"dtype": dtype, "kernels": "torch", **more} for dtype in dtypes)


def _by_backend(stage: str, **request: Any) -> tuple[dict[str, Any], ...]:
    pairs = [p.values for p in harness.attention_backends(stage, **request)]
    return tuple({"backend": backend, "dtype": dtype, "kernels": "torch"} for backend, dtype in pairs)


WIDE = harness.DTYPES[:2]
PROPERTIES = (
    Property(test_routing, "test_logits_match", ("logits",), _by_dtype(*WIDE)),
    Property(test_routing, "test_solver_scores_match", ("scores",), _by_dtype(*WIDE, solver="iterative")),
    Property(
        test_routing,
        "test_solver_scores_match",
        ("scores",),
        _by_dtype(*WIDE, solver="exact"),
        untouched=("one iteration more",),
    ),
    Property(test_routing, "test_exact_gradient_matches", ("solver_gradient",), _by_dtype(*WIDE)),
    Property(
        test_routing,
        "test_descent_gradient_matches",
        ("solver_gradient",),
        _by_dtype(*WIDE),
        untouched=("temperature 1% too high",),
    ),
    Property(test_routing, "test_optimized_route_matches", ("scores", "router_gradient"), ({"kernels": "torch"},), 3),
    Property(
        test_routed_attention,
        "test_optimized_matches",
        ("routed_attention", "routed_attention_gradient"),
        _by_backend("routed_attention", masked=True),
    ),
    Property(
        test_local_attention,
        "test_optimized_matches",
        ("local_attention", "local_attention_gradient"),
        _by_backend("local_attention", dim_head=8),
    ),
    Property(test_mixture, "test_combine_matches_the_oracle", ("combine",), ({},), 4),
    Property(
        test_mixture,
        "test_optimized_matches_with_injected_routes",
        ("mixture", "mixture_gradient"),
        _by_dtype(*harness.DTYPES),
    ),
)


class Recorder:
    """In place of `check`: worst fraction, by stage and dtype and fault, and in how many examples there was any."""

    def __init__(self, fault: str | None, spoil: bool) -> None:
        self.fault = fault
        self.spoil = spoil
        self.example = 0
        self.case = ""
        self.beyond: list[list[Any]] = []  # stage, dtype, name, fraction and case of correct results above 1
        self.worst: dict[tuple[str, str, str], float] = {}
        self.examples: dict[tuple[str, str, str], set[int]] = {}
        self.otherwise = 0  # examples that another assertion of the property stopped

    def check(
        self, actual: Tensor, oracle: Tensor, baseline: Tensor, *, stage: str, backend: str | None = None, **rest: Any
    ) -> None:
        dtype = str(rest.get("precision") or actual.dtype).removeprefix("torch.")
        if backend == "reference":
            return
        fraction = _fraction(actual, oracle, baseline, stage, rest)
        self._enter((stage, dtype, self.fault or ""), fraction)
        if self.fault is None and not fraction <= 1:
            self.beyond.append([stage, dtype, rest.get("name", ""), fraction, self.case])
        ordinary = rest.get("expect") is None and oracle.isfinite().all() and actual.isfinite().all()
        if self.spoil and ordinary:
            given = actual.detach().contiguous()
            for fault in filter(lambda fault: fault.faint, RESULTS.values()):
                spoiled = fault.change(given, given)
                if spoiled is not None:
                    self._enter((stage, dtype, fault.name), _fraction(spoiled, oracle, baseline, stage, rest))

    def _enter(self, key: tuple[str, str, str], fraction: float) -> None:
        self.worst[key] = max(self.worst.get(key, 0.0), fraction)
        self.examples.setdefault(key, set()).add(self.example)


def _fraction(actual: Tensor, oracle: Tensor, baseline: Tensor, stage: str, rest: dict[str, Any]) -> float:
    budget = STAGES[stage]
    large = budget._replace(c=budget.c * HUGE, floor=budget.floor * HUGE)
    with mock.patch.dict(STAGES, {stage: large}):
        try:
            return assert_matches(actual, oracle, baseline, stage=stage, **rest).fraction * HUGE
        except AssertionError:  # NaN or a non-zero where it must not be
            return math.inf


def run_chunk(which: Property, parameters: dict[str, Any], seed: int, fault: str | None, spoil: bool) -> Recorder:
    """100 examples, with the fault in the computation if there is one; spoil: also with those of results."""
    recorder = Recorder(fault, spoil)
    property_ = getattr(which.module, which.test)
    inner = property_.hypothesis.inner_test

    def example(*args: Any, **keywords: Any) -> None:
        recorder.example += 1
        recorder.case = repr(keywords.get("case", keywords))
        try:
            inner.__wrapped__(*args, **keywords)
        except AssertionError:
            recorder.otherwise += 1

    property_.hypothesis.inner_test = example
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(optimized.use_backends(**harness.stages_by("torch")))
            for module in {which.module, runs}:
                if hasattr(module, "check"):
                    stack.enter_context(mock.patch.object(module, "check", recorder.check))
            if fault is not None:
                faulty = COMPUTATIONS[fault].package()
                stack.enter_context(mock.patch.object(which.module, "optimized", faulty))
            torch.manual_seed(seed)
            hypothesis.seed(seed)(property_)(**parameters, device=DEVICE)
    finally:
        property_.hypothesis.inner_test = inner
    return recorder


class Job(NamedTuple):
    name: str
    which: Property
    parameters: dict[str, Any]
    chunk: int
    fault: str | None


def jobs(chunks: int, fault_chunks: int) -> Iterator[Job]:
    """A little of everything first. Backends share the examples of a dtype; faults are run once a dtype."""
    for chunk in range(4 * chunks):
        for which in PROPERTIES:
            seen: dict[str, int] = {}
            for parameters in which.parameters:
                dtype = str(parameters.get("dtype", "")).removeprefix("torch.")
                seen[dtype] = seen.get(dtype, 0) + 1
                share = len(which.parameters) // len({str(p.get("dtype")) for p in which.parameters})
                names: list[str | None] = [None] if chunk * share < chunks * which.rarely else []
                if chunk < fault_chunks * which.rarely and seen[dtype] == 1:
                    names += [
                        name
                        for name in COMPUTATIONS
                        if name not in which.untouched and any(possible(name, stage, dtype) for stage in which.stages)
                    ]
                for fault in names:
                    words = (which.module.__name__, which.test, *parameters.values(), chunk, fault or "-")
                    yield Job(" ".join(map(str, words)), which, parameters, chunk, fault)


def measure(examples: int, fault_examples: int, out: Path, seed: int, minutes: float, only: str) -> None:
    """Every chunk is written as soon as it is done, and what the file has is not measured again.

    Raises StateError, naming the file, where another run has it, or where it is of something else.
    """
    with StateFile(out) as kept:
        _measure(examples, fault_examples, kept, seed, minutes, only)


def _kept(kept: StateFile, seed: int) -> dict[str, Any]:
    """What earlier runs found; nothing yet in a file that was made just now."""
    if not kept.content():
        return {"kind": "bands", "seed": seed, "chunks": {}}
    try:
        report = json.loads(kept.content())
        held = report["kind"], report["seed"], report["chunks"]
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"{kept.path}: expected a report of bands, got {type(error).__name__}: {error}") from error
    if held[:2] != ("bands", seed) or not isinstance(held[2], dict):
        raise StateError(f"{kept.path}: expected bands of seed {seed}, got {held[0]!r} of seed {held[1]!r}")
    return report


def _measure(examples: int, fault_examples: int, kept: StateFile, seed: int, minutes: float, only: str) -> None:
    report, made = _kept(kept, seed), record.made(DEVICE, ("optimized", "reference"))
    if report.get("hashes", made["hashes"]) != made["hashes"]:
        raise StateError(f"{kept.path}: expected bands of this state of the code, got another; remove it to start anew")
    report |= made
    torch.set_num_threads(1)
    fault_chunks = -(-fault_examples // CHUNK)
    every = [job for job in jobs(-(-examples // CHUNK), fault_chunks) if re.search(only, job.name)]
    if not every:
        raise StateError(f"--only: expected part of a chunk's name, got {only!r}")
    todo = [job for job in every if job.name not in report["chunks"]]
    start = time.monotonic()
    with Progress() as progress:
        for job in progress.track(todo, description="chunks"):
            begun = time.process_time()
            spoil = job.fault is None and job.chunk < fault_chunks * job.which.rarely
            done = run_chunk(job.which, job.parameters, seed * 1_000_003 + job.chunk, job.fault, spoil)
            report["chunks"][job.name] = {
                "cpu_seconds": round(time.process_time() - begun, 2),
                "otherwise": done.otherwise,
                "beyond": done.beyond,
                "cells": [[*key, len(done.examples[key]), float(f"{w:.4g}")] for key, w in done.worst.items()],
            }
            if done.beyond or (job.fault is None and done.otherwise):
                progress.console.print(f"[red]{job.name}: {done.otherwise} failed otherwise, beyond: {done.beyond}")
            kept.replace(json.dumps(report | {"bands": bands(report["chunks"])}, indent=0) + "\n")
            if time.monotonic() - start > 60 * minutes:
                break


# --- what was measured -----------------------------------------------------------------------------------------------


def possible(name: str, stage: str, dtype: str) -> bool:
    if name in RESULTS:  # a float32 gradient of a bfloat16 chain may well be rounded to bfloat16
        return name != "the next lower precision" or dtype != "bfloat16"
    return COMPUTATIONS[name].possible(stage, dtype)


def bands(chunks: dict[str, Any]) -> dict[str, Any]:
    """By "stage dtype": correct results at their worst; each fault's worst in a chunk, the median over chunks.

    The median: what an ordinary run of 100 examples is likely to see of a fault.
    """
    cells: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for chunk in chunks.values():
        for stage, dtype, fault, examples, worst in chunk["cells"]:
            cells.setdefault(f"{stage} {dtype}", {}).setdefault(fault, []).append((examples, worst))
    out = {}
    for cell, by_fault in cells.items():
        stage, dtype = cell.split()
        faults = {
            name: {
                "examples": sum(n for n, _ in found),
                "fraction": statistics.median(w for _, w in found),
                "runs": len(found),
                "rejected": sum(w > 1 for _, w in found),
            }
            for name, found in by_fault.items()
            if name and possible(name, stage, dtype)
        }
        correct = by_fault.get("", [(0, 0.0)])
        out[cell] = {"examples": sum(n for n, _ in correct), "worst": max(w for _, w in correct), "faults": faults}
    return out


def weakest(faults: dict[str, Any]) -> tuple[str, float]:
    """Of those that are rejected, or of all if none is."""
    seen = {name: fault["fraction"] for name, fault in faults.items()}
    rejected = {name: fraction for name, fraction in seen.items() if fraction > 1} or seen
    return min(rejected.items(), key=lambda item: item[1])


def render(report: dict[str, Any]) -> str:
    """Markdown."""
    heading = ("stage", "dtype", "c, floor", "correct at worst", "cases", "weakest fault rejected", "not rejected")
    rows = []
    for stage, budget in STAGES.items():
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            if (cell := report["bands"].get(f"{stage} {dtype}")) is None:
                continue
            name, fraction = weakest(cell["faults"])
            below = [f"{n} ({f['fraction']:.2g})" for n, f in cell["faults"].items() if not f["fraction"] > 1]
            below += [
                f"{n} (but by {f['rejected']} of {f['runs']} runs)"
                for n, f in cell["faults"].items()
                if f["fraction"] > 1 and f["rejected"] < f["runs"]
            ]
            words = (stage.replace("_", " "), dtype, f"{budget.c:g}, {budget.floor:g}", f"{cell['worst']:.2f}")
            rows.append((*words, cell["examples"], f"{fraction:.3g}: {name}", "; ".join(below) or "-"))
    return record.table(heading, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10000, help="of each property and dtype (default: 10000)")
    parser.add_argument("--fault-examples", type=int, default=300, help="of each fault in a computation (default: 300)")
    parser.add_argument("--out", type=Path, default=record.REPORTS / "bands-cpu.json", metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after the chunk that passes this")
    parser.add_argument("--only", default="", metavar="PATTERN", help="chunks whose names match, as in FILE")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: write the table of --out into it")
    given = parser.parse_args()
    if given.table:
        report = record.read(given.out)
        record.write_between(given.table, "bands", render(report | {"bands": bands(report["chunks"])}))
    else:
        try:
            measure(given.examples, given.fault_examples, given.out, given.seed, given.minutes, given.only)
        except StateError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
