"""Trains the layers on noise: see the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests import record

from .layers import LAYERS
from .plot import draw
from .training import Run, Settings, verdict


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.noise", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", nargs="+", choices=tuple(LAYERS), default=list(LAYERS), metavar="NAME",
                        help="of " + ", ".join(LAYERS))  # fmt: skip
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--unseen", type=int, default=Settings.unseen, help="tokens that the loss is measured on")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the report")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--commit", help="for the report, where the files are a copy outside of git")
    options = parser.parse_args(given)
    device, console = torch.device(options.device), Console(highlight=False)
    report = {"kind": "noise", **record.made(device, ("reference", "tests/noise"), options.commit), "runs": []}
    table = Table("layer", "seed", "steps", "loss, nats", "standard error", "errors below ln V", "says")
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        for seed in options.seeds:
            for name in options.layers:
                settings = Settings(steps=options.steps, unseen=options.unseen, seed=seed)
                task = progress.add_task(f"{name}, seed {seed}", total=settings.steps, loss="")
                run = Run(name, settings, device)
                run.train(lambda step, loss, task=task: progress.update(task, completed=step, loss=f"{loss:.5f}"))
                found = run.evaluate()
                found["verdict"] = verdict(found)
                report["runs"].append(found)
                figures = f"{found['loss']:.5f}", f"{found['standard_error']:.5f}", f"{found['errors_below_ln_v']:.1f}"
                table.add_row(name, str(seed), str(settings.steps), *figures, found["verdict"])
                if options.out is not None:
                    record.write(options.out, report)
    console.print(table)
    if options.plot is not None:
        draw(report, options.plot)
    strict = [run for run in report["runs"] if run["layer"] == "strict"]
    return int(any(run["verdict"] != "sees nothing" for run in strict))


if __name__ == "__main__":
    sys.exit(main())
