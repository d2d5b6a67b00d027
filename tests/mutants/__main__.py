"""Runs mutants on the terminal: see the package, and `python -m tests.mutants --help`."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.arguments import integer
from tests.statefile import StateError

from . import matrix
from .mutant import Mutant
from .profiles import profile_of
from .registry import MUTANTS
from .runner import SECONDS, ControlError, Result, Runner

ROOT = Path(__file__).parent.parent.parent
REPORTS = ROOT / "tests" / "reports"
STATE = ROOT / ".mutants" / "results.json"


def chosen(only: str | None, device: str) -> list[Mutant]:
    """Those of the device (a GPU's: what only it can show) whose name, class or file contains `only`."""
    own = [m for m in MUTANTS if m.device == device]
    return [m for m in own if not only or any(only in text for text in (m.name, m.bug, m.file))]


def run(mutants: list[Mutant], device: str, jobs: int, console: Console, seconds: int = SECONDS) -> dict[str, Result]:
    """With a bar, and a line for each that ends."""
    faced = partial(profile_of, device=device)
    runner = Runner(ROOT, ("optimized", "reference"), faced, STATE, device=device, jobs=jobs, seconds=seconds)
    controls = len({faced(m.file) for m in mutants})
    columns = (TextColumn("mutants"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(mutants) + controls)

        def told(name: str, result: Result) -> None:
            colour = matrix.COLOURS.get(result.outcome, "dim")
            line = f"[{colour}]{result.outcome:9}[/] {name} [dim]{result.seconds:.0f} s {matrix._plain(result.test)}[/]"
            progress.console.print(line, highlight=False)
            progress.advance(task)

        return runner.run(mutants, told)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", metavar="WORD", help="names, classes or files that contain it")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--jobs", type=integer(1), default=os.cpu_count(), help="processes at a time (default: all cores)"
    )
    parser.add_argument(
        "--seconds",
        type=integer(1),
        default=SECONDS,
        help="of one core for each, at most: more on a slower machine (default: %(default)s)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        nargs="?",
        const=REPORTS,
        metavar="FILE",
        help="write a report; without FILE mutants-DEVICE.json in tests/reports, and the picture of those there",
    )
    asked = parser.parse_args(given)
    if asked.report and not asked.report.parent.is_dir():
        parser.error(f"--report: expected a file in an existing folder, got {asked.report}")
    mutants = chosen(asked.only, asked.device)
    if not mutants:
        parser.error(f"--only: expected a word in the name, class or file of a mutant, got {asked.only!r}")
    console = Console()
    try:
        results = run(mutants, asked.device, asked.jobs, console, asked.seconds)
    except ControlError as error:
        console.print(f"the control is not green: {error}", style="red", markup=False)
        return 2
    except StateError as error:
        parser.error(str(error))
    listed = list(MUTANTS) if asked.report else mutants
    console.print(matrix.table(listed, results), matrix.totals(listed, results))
    wrong = matrix.unexpected(mutants, results)
    for line in wrong:
        console.print(line, style="red", markup=False)
    if asked.report:
        save(results, asked.device, asked.report)
    return int(bool(wrong))


def save(results: dict[str, Result], device: str, path: Path) -> None:
    """path: of the report; the folder REPORTS stands for that of its own name there, and draws the picture anew."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    from record import made, read, write

    about, own = made(torch.device(device), ("optimized", "tests")), path == REPORTS
    write(path / f"mutants-{device}.json" if own else path, matrix.report(MUTANTS, results, about))
    if own:
        found = [read(path) for path in sorted(REPORTS.glob("mutants-*.json"))]
        matrix.draw(matrix.joined(found), ROOT / "docs" / "pictures" / "mutants.png")


if __name__ == "__main__":
    sys.exit(main())
