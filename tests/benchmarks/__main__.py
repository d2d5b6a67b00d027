"""The comparison in one process: see the package, and `python -m tests.benchmarks --help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

# What cuBLAS asks for in deterministic mode, read at its first call; also its default on Hopper.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # errors only: the profiler tells each of its starts

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .competitors import DIRECTIONS
from .session import Job, Session, jobs
from .shapes import cases

FIGURES = (("ms", "p50", ".3f"), ("TFLOP/s", "tflops", ".3g"), ("x floor", "over_floor", ".2f"),
           ("MiB", "peak_mib", ".0f"), ("kernels", "kernels", "d"), ("host ms", "host_ms", ".3f"))  # fmt: skip


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the report, rewritten after every competitor")
    patterns = {"nargs": "*", "default": [], "metavar": "PATTERN"}
    parser.add_argument(
        "--cases", **patterns, help="names, groups, or patterns of either as of a shell: --cases 8k standard 'sweep*'"
    )
    parser.add_argument("--competitors", **patterns, help="likewise: --competitors optimized 'dense*' floor")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="skip, and say so, what no longer fits")
    parser.add_argument("--commit", help="for the report, where the files are a copy outside of git")
    parser.add_argument("--list", action="store_true", help="print the cases and who takes part, and run nothing")
    return parser.parse_args(given)


def listing(todo: list[Job]) -> Table:
    table = Table("case", "competitors")
    for name in dict.fromkeys(job.case.name for job in todo):
        table.add_row(name, Text(", ".join(job.competitor for job in todo if job.case.name == name)))
    return table


def results(report: dict[str, Any]) -> Table:
    """A line for each competitor: p50 forward and forward+backward, and what else was measured."""
    table = Table(title="forward / forward+backward", title_justify="left")
    table.add_column("case", no_wrap=True)
    table.add_column("competitor")
    for heading, *_ in FIGURES:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("reason")
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in report["rows"]:
        found.setdefault((row["case"], row["competitor"]), {})[row["direction"]] = row
    order = list(report["cases"])
    previous = None
    for (case, competitor), rows in sorted(found.items(), key=lambda item: order.index(item[0][0])):
        if previous not in (None, case):
            table.add_section()
        both = [rows.get(direction, {}) for direction in DIRECTIONS]
        cells = []
        for _, key, style in FIGURES:
            values = [format(row[key], style) if key in row else "-" for row in both]
            cells.append("" if set(values) == {"-"} else " / ".join(values))
        reasons = dict.fromkeys(row["reason"] for row in both if "reason" in row)
        table.add_row("" if previous == case else case, Text(competitor), *cells, Text("; ".join(reasons)))
        previous = case
    return table


def main() -> int:
    given = arguments()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 170
    todo = jobs(cases(given.device), given.cases, given.competitors)
    if given.list:
        console.print(listing(todo))
        return 0
    if not todo:
        console.print("expected a case and a competitor that match; --list prints them", style="red")
        return 2
    session = Session(torch.device(given.device), given.out, given.budget, given.commit)
    for part in ("hardware", "versions"):
        console.print(f"{part}: " + ", ".join(f"{k} {v}" for k, v in session.report[part].items()))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("", total=len(todo))
        done = 0

        def note(job: Job, said: str) -> None:
            nonlocal done
            done += 1
            progress.update(bar, completed=done, description=job.case.name)
            line = f"{done:3d}/{len(todo)} {session.elapsed:6.1f} s  {job.case.name:<18} {job.competitor:<30} {said}"
            console.print(line[: console.width], markup=False)

        report = session.run(todo, note)
    console.print(results(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
