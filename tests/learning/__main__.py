"""Trains models on a task and measures what they learn: see the package.

Runs that the report has are not made again, and one that the budget ended goes on where it was: give the same command.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tests import record
from tests.arguments import integer, seconds

from . import grid, report, summary
from .pictures import PICTURES
from .trial.settings import MODELS, TASKS, Settings
from .workers import Places, perform_all

CHANGED = ("steps", "n", "batch", "layers", "dim", "experts", "keys", "queries", "pairs", "window", "every", "unseen")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m tests.learning", description=__doc__)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)} (default: all)")
    parser.add_argument("--size", choices=tuple(grid.SIZES), default="full" if cuda else "small")
    varied = "; ".join(f"{task}: {', '.join(names)}" for task, names in grid.OF_TASK.items())
    parser.add_argument("--sweeps", nargs="+", default=["base"], metavar="NAME", help=f"what is varied ({varied})")
    parser.add_argument("--models", nargs="+", metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--equal-macs", action="store_true", help="other steps for each model: equal work in all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--devices", type=integer(0), nargs="+", metavar="I", help="several: a process for each")
    parser.add_argument("--share", type=integer(1), default=1, metavar="R", help="runs on a device at a time")
    parser.add_argument("--budget", type=seconds, metavar="SECONDS", help="put runs aside after so many")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the report, rewritten after every run")
    parser.add_argument("--list", action="store_true", help="print the runs, and make none")
    parser.add_argument("--read", type=Path, nargs="+", metavar="FILE.json", help="show these reports, and run nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="of one task")
    parser.add_argument("--picture", choices=tuple(PICTURES), default="task", help="what the plot shows")
    parser.add_argument("--model", help="of the pictures of one model: loads, picks and memory", default="sigmoid")
    parser.add_argument("--commit", help="for the report, where the files are a copy outside of git")
    kinds = {f.name: float if isinstance(f.default, float) else int for f in fields(Settings)}
    for name in (*CHANGED, "rate"):
        parser.add_argument(f"--{name}", type=kinds[name], metavar=name[0].upper(), help="in place of the size's")
    found = parser.parse_args(given)
    found.tasks = found.tasks or list(TASKS)
    for task in found.tasks:
        if task not in TASKS:
            parser.error(f"TASK: expected one of {', '.join(TASKS)}, got {task!r}")
    if found.plot is not None and len(found.tasks) != 1:
        parser.error(f"--plot: expected one task, got {len(found.tasks)}")
    try:
        found.runs = _runs(found)
    except ValueError as error:
        parser.error(str(error))
    if not found.runs and not found.read:
        parser.error("--models, --sweeps: expected some of the task, got none of it")
    return found


def _runs(given: argparse.Namespace) -> list[Settings]:
    """Of all tasks; what is not of a task is left to the others. Raises ValueError."""
    changed = {name: value for name in (*CHANGED, "rate") if (value := getattr(given, name)) is not None}
    found = []
    for sweep in given.sweeps:
        if not any(sweep in grid.OF_TASK[task] for task in given.tasks):
            raise ValueError(f"--sweeps: expected some of {given.tasks}, got {sweep!r}")
    for name in given.models or ():
        if name not in MODELS:
            raise ValueError(f"--models: expected some of {', '.join(MODELS)}, got {name!r}")
    for task in given.tasks:
        models = [m for m in given.models or grid.TAKE_PART[task] if m in grid.TAKE_PART[task]]
        sweeps = [sweep for sweep in given.sweeps if sweep in grid.OF_TASK[task]]
        found += grid.runs(task, given.size, sweeps, models, given.seeds, changed, given.equal_macs)
    return found


def table(task: str, runs: list[dict[str, Any]]) -> Table:
    headings = ("model", "N", "P", "E", "K", "Kq", "seeds", "steps", "parameters", "accuracy", "bits", "spread",
                "at equal MACs", "at equal seconds", "whole / prefixes", "fell in a tenth", "seconds")  # fmt: skip
    shown = Table(*headings, title=task)
    for row in summary.rows(runs):
        bits = [f"{summary.bits(row[name]):.3f}" if name in row else "-" for name in
                ("loss", "spread", "at_equal_macs", "at_equal_seconds")]  # fmt: skip
        pair = " / ".join(f"{summary.bits(row[k]):.3f}" for k in ("teacher_forced", "honest") if k in row) or "-"
        numbers = [str(row[name] or "-") for name in summary.VARIED]
        last = f"{summary.bits(row['still_falling']):+.3f}", f"{row['seconds']:.0f}"
        counts = str(row["seeds"]), str(row["steps"]), f"{row['parameters'] / 1e6:.2f} M", f"{row['accuracy']:.3f}"
        shown.add_row(row["model"], *numbers, *counts, *bits, pair, *last)
    return shown


def resumed(given: argparse.Namespace) -> dict[str, Any]:
    """A report, with the runs that the file has. Raises ValueError."""
    made = report.begun(torch.device(given.device), given.commit)
    if given.out is not None:
        same = {name: made[name] for name in ("kind", "hashes", "device", "corpus")}
        made["runs"] = record.earlier(given.out, same)
    return made


def learn(given: argparse.Namespace, made: dict[str, Any], console: Console) -> int:
    """How many runs were put aside."""
    todo = [s for s in given.runs if report.run_of(made, s) is None]
    console.print(f"{len(given.runs)} runs, {len(given.runs) - len(todo)} of them in the report")
    names = [given.device if given.device == "cpu" else f"cuda:{i}" for i in given.devices or [0]]
    states = None if given.out is None else report.states(given.out, made)
    deadline = float("inf") if given.budget is None else time.time() + given.budget
    places, aside = Places(tuple(names * given.share), states, deadline), 0
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}")
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bars: dict[Settings, TaskID] = {}

        def told(s: Settings, step: int, loss: float) -> None:
            if s not in bars:
                bars[s] = progress.add_task(s.label(), total=s.steps, loss="")
            progress.update(bars[s], completed=step, loss=f"{loss:.4f} nats")

        for s, figures in perform_all(todo, places, told):
            if s in bars:
                progress.remove_task(bars.pop(s))
            if figures is None:
                aside += 1
                continue
            report.add(made, s, figures, given.share)
            if given.out is not None:
                record.write(given.out, made)
            said = figures.get("reason") or f"{figures['loss']:.4f} nats, accuracy {figures['accuracy']:.3f}"
            console.print(f"{s.label()}: {said}", markup=False)
    if states is not None and states.is_dir() and not any(states.iterdir()):
        states.rmdir()
    return aside


def main(given: list[str] | None = None) -> int:
    options, console = arguments(given), Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    if options.list:
        for s in options.runs:
            console.print(f"{s.label()}, {s.steps} steps", markup=False)
        return 0
    aside = 0
    if options.read:
        made = report.joined([report.read(path) for path in options.read])
    else:
        try:
            made = resumed(options)
        except ValueError as error:
            console.print(f"--out: {error}", style="red")
            return 2
        aside = learn(options, made, console)
    for task in options.tasks:
        runs = report.of_task(made, task)
        if runs:
            console.print(table(task, runs))
        if task == "packages" and (found := summary.compared(runs)):
            spread = "" if found["standard_error"] is None else f" ± {found['standard_error']:.2g}"
            console.print(
                f"optimized less reference, {found['seeds']} seeds: the first steps differ by {found['first']:.2g} nats"
                f" at most, the ends by {found['difference']:+.2g}{spread}"
            )
    if options.plot is not None:
        PICTURES[options.picture](options.plot, made, options.tasks[0], options.model)
    if aside:
        console.print(f"{aside} runs were put aside: the same command goes on with them")
    return int(aside > 0 or any("reason" in run for run in made["runs"]))


if __name__ == "__main__":
    sys.exit(main())
