"""Runs a campaign, or one case of it again: see the package, and `python -m tests.campaign --help`."""

from __future__ import annotations

import argparse
import math
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .kind import Setting, default_kernels

if TYPE_CHECKING:
    from rich.console import Console

    from .tally import Failure

KINDS = ("selection", "solver", "layer")
ROOT = Path(__file__).parent.parent.parent


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    out.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS, help="(default: all)")
    out.add_argument(
        "--cases", type=int, default=1000, metavar="N", help="of each kind, in whole chunks (default: 1000)"
    )
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    out.add_argument("--kernels", choices=("torch", "triton"), help="(default: triton on cuda; interpreted on the CPU)")
    out.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes; 0: none but this (default: all cores)"
    )
    out.add_argument("--seconds", type=float, default=math.inf, help="end after these, with what is done")
    out.add_argument("--state", type=Path, metavar="FILE", help="results, and where to go on (default: in .campaign)")
    out.add_argument("--commit", help="that the files are of, where there is no git")
    again = out.add_argument_group("a case again")
    again.add_argument("--case", metavar="INDEX", help="or FIRST-LAST")
    again.add_argument("--example", metavar="CASE", help="of the layer: LayerCase(...)")
    again.add_argument("--dtype", default="float64", help="of --example")
    again.add_argument("--own-routers", action="store_true", help="--example is of the property with its own routers")
    report = out.add_argument_group("the report")
    report.add_argument("--report", type=Path, metavar="FILE", help="HTML, of this run or of --of")
    report.add_argument("--picture", type=Path, metavar="FILE", help="PNG, of the same")
    report.add_argument("--table", type=Path, metavar="FILE", help="a page: writes the table between its markers")
    report.add_argument("--of", type=Path, nargs="+", metavar="STATE", help="run nothing: report on these states")
    return out


def main(given: list[str] | None = None) -> int:
    asked = parser().parse_args(given)
    if asked.of:
        return _report(asked.of, asked)
    kernels = asked.kernels or default_kernels(asked.device)
    if kernels == "triton" and asked.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

    import torch
    from rich.console import Console

    setting = Setting(torch.device(asked.device), kernels, asked.seed)
    console = Console(soft_wrap=True)
    if asked.case or asked.example:
        return _again(asked, setting, console)
    path, failures = campaign(
        asked.kind, asked.cases, setting, console, asked.jobs, asked.seconds, asked.state, asked.commit
    )
    if asked.report or asked.picture or asked.table:
        _report([path], asked)
    return int(bool(failures))


def campaign(
    kinds: Sequence[str],
    cases: int,
    setting: Setting,
    console: Console,
    jobs: int,
    seconds: float = math.inf,
    path: Path | None = None,
    commit: str | None = None,
) -> tuple[Path, list[Failure]]:
    """With progress on the console; from where an earlier run of the same sources stopped, by default."""
    from . import runner
    from .progress import Reporter
    from .state import State

    header = runner.header(setting, commit)
    if path is None:
        sources = zlib.crc32(repr(header["hashes"]).encode())
        name = f"{setting.device.type}-{setting.kernels}-seed-{setting.seed}-{sources:08x}.jsonl"
        path = ROOT / ".campaign" / name
    state = State(path, header)
    with Reporter(console, kinds, cases, state) as reporter:
        failures = runner.run(kinds, cases, setting, state, jobs=jobs, seconds=seconds, told=reporter.told)
    for kind in kinds:
        tally = state.parts[kind].tally
        count = sum(tally.distinct().values())
        console.print(f"{kind}: {count:,} distinct cases, {len(tally.failures)} failures", highlight=False)
    console.print(f"kept in {path}", highlight=False)
    return path, failures


def _report(states: list[Path], asked: argparse.Namespace) -> int:
    from . import report
    from .state import read

    runs = [read(path) for path in states]
    if asked.report:
        asked.report.parent.mkdir(parents=True, exist_ok=True)
        asked.report.write_text(report.html(runs))
    if asked.picture:
        report.picture(runs, asked.picture)
    if asked.table:
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
        from record import write_between

        write_between(asked.table, "campaign", report.markdown(runs))
    return int(any(part.tally.failures for _, parts in runs for part in parts.values()))


def _again(asked: argparse.Namespace, setting: Setting, console: Console) -> int:
    import torch

    from .worker import kind_of

    torch.set_num_threads(1)
    if asked.example:
        from . import layer

        tally = layer.run_example(asked.example, asked.dtype, asked.own_routers, setting)
    else:
        kind = kind_of(asked.kind[0])
        first, _, last = asked.case.partition("-")
        if not last:
            console.print(kind.describe(int(first), setting), markup=False)
        tally = kind.run(int(first), int(last or first) - int(first) + 1, setting)
    for (quantity, dtype), band in sorted(tally.bands.items()):
        console.print(f"{quantity}, {dtype}: {max(f for f, _ in band.worst):.3g} of the budget", markup=False)
    for failure in tally.failures:
        console.print(f"{failure.message}\n    {failure.snippet}", style="red", markup=False)
    return int(bool(tally.failures))


if __name__ == "__main__":
    sys.exit(main())
