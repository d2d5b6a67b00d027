"""Trains the layers on noise: see the package."""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests import record

from .layers import LAYERS, STRICT
from .plot import draw
from .training import Run, Settings, verdict


def is_of(run: dict[str, Any], name: str, settings: Settings) -> bool:
    return (run["layer"], run["settings"]) == (name, asdict(settings))


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.noise", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", nargs="+", choices=tuple(LAYERS), default=list(LAYERS), metavar="NAME",
                        help="of " + ", ".join(LAYERS))  # fmt: skip
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--unseen", type=int, default=Settings.unseen, help="tokens that the loss is measured on")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="the report; what it has already is not run again"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--commit", help="for the report, where the files are a copy outside of git")
    options = parser.parse_args(given)
    device, console = torch.device(options.device), Console(highlight=False)
    made = record.made(device, ("reference", "optimized", "tests/noise"), options.commit)
    report: dict[str, Any] = {"kind": "noise", **made, "runs": []}
    try:
        if options.out is not None:
            report["runs"] = record.earlier(options.out, {name: report[name] for name in ("kind", "hashes", "device")})
    except ValueError as error:
        parser.error(f"--out: {error}")
    table = Table("layer", "seed", "steps", "loss, nats", "standard error", "errors below ln V", "says")
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        for seed, name in itertools.product(options.seeds, options.layers):
            settings = Settings(steps=options.steps, unseen=options.unseen, seed=seed)
            found = next((run for run in report["runs"] if is_of(run, name, settings)), None)
            if found is None:
                task = progress.add_task(f"{name}, seed {seed}", total=settings.steps, loss="")
                run = Run(name, settings, device)
                run.train(lambda step, loss, task=task: progress.update(task, completed=step, loss=f"{loss:.5f}"))
                found = run.evaluate()
                found["verdict"] = verdict(found)
                report["runs"].append(found)
                if options.out is not None:
                    record.write(options.out, report)
            figures = f"{found['loss']:.5f}", f"{found['standard_error']:.5f}", f"{found['errors_below_ln_v']:.1f}"
            table.add_row(name, str(seed), str(settings.steps), *figures, found["verdict"])
    console.print(table)
    if options.plot is not None:
        draw(report, options.plot)
    strict = [run for run in report["runs"] if run["layer"] in STRICT]
    return int(any(run["verdict"] != "sees nothing" for run in strict))


if __name__ == "__main__":
    sys.exit(main())
