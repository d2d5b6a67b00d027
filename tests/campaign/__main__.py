"""Runs a campaign, or one case of it again: see the package, and `python -m tests.campaign --help`."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.arguments import integer, seconds
from tests.statefile import StateError

from .kind import DRAWN, KINDS, Setting, default_kernels

if TYPE_CHECKING:
    from rich.console import Console

    from .tally import Failure, Tally

ROOT = Path(__file__).parent.parent.parent
DTYPES = ("float64", "float32", "bfloat16", "float16")
LAST = 2**64 - 1  # index of a case


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    out.add_argument("--kind", nargs="+", choices=KINDS, help="(default: all)")
    out.add_argument(
        "--cases", type=integer(1), default=1000, metavar="N", help="of each kind, in whole chunks (default: 1000)"
    )
    out.add_argument("--seed", type=integer(0, 2**32 - 1), default=0)
    out.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    out.add_argument("--kernels", choices=("torch", "triton"), help="(default: triton on cuda; interpreted on the CPU)")
    out.add_argument(
        "--jobs", type=integer(0), default=os.cpu_count(), help="processes; 0: none but this (default: all cores)"
    )
    out.add_argument("--seconds", type=seconds, default=math.inf, help="end after these, with what is done")
    out.add_argument("--state", type=Path, metavar="FILE", help="results, and where to go on (default: in .campaign)")
    out.add_argument("--commit", help="that the files are of, where there is no git")
    again = out.add_argument_group("a case again")
    again.add_argument("--case", type=cases_of, metavar="INDEX", help="or FIRST-LAST, of one --kind")
    again.add_argument("--example", metavar="CASE", help="of a layer: LayerCase(...), CausalCase(...)")
    again.add_argument("--dtype", choices=DTYPES, help="of --example (default: float64)")
    again.add_argument("--property", metavar="NAME", help="that --example is of (default: the first of its kind)")
    report = out.add_argument_group("the report")
    report.add_argument("--report", type=Path, metavar="FILE", help="HTML, of this run or of --of")
    report.add_argument("--picture", type=Path, metavar="FILE", help="PNG, of the same")
    report.add_argument("--table", type=Path, metavar="FILE", help="a page: writes the table between its markers")
    report.add_argument("--of", type=Path, nargs="+", metavar="STATE", help="run nothing: report on these states")
    return out


def cases_of(text: str) -> tuple[int, int]:
    """First and last index."""
    first, _, last = text.partition("-")
    with contextlib.suppress(ValueError):
        if 0 <= int(first) <= int(last or first) <= LAST:
            return int(first), int(last or first)
    raise argparse.ArgumentTypeError(f"expected an index >= 0, or FIRST-LAST, got {text!r}")


# Options that each way to call it takes.
TAKES = {
    "of": {"of", "report", "picture", "table"},
    "case": {"case", "kind", "seed", "device", "kernels"},
    "example": {"example", "kind", "dtype", "property", "device", "kernels"},
    "run": {"kind", "cases", "seed", "device", "kernels", "jobs", "seconds", "state", "commit"}
    | {"report", "picture", "table"},
}


def refusal(asked: argparse.Namespace, options: argparse.ArgumentParser) -> str | None:
    """What is wrong about options that are right one by one; None where nothing is."""
    ways = {way: "a run" if way == "run" else f"--{way}" for way in TAKES}
    given = [name for name, value in vars(asked).items() if value != options.get_default(name)]
    way = next((name for name in TAKES if name in given), "run")
    for name in given:
        if name not in TAKES[way]:
            takers = " or ".join(ways[other] for other in TAKES if name in TAKES[other])
            return f"--{name.replace('_', '-')}: expected with {takers}, got it with {ways[way]}"
    kinds = asked.kind or (["layer"] if asked.example else KINDS)
    said = " ".join(kinds)
    if len(set(kinds)) < len(kinds):
        return f"--kind: expected each kind once, got {said}"
    if asked.case and len(kinds) > 1:
        return f"--kind: expected one kind with --case, got {said}"
    if asked.example and said not in DRAWN:
        return f"--kind: expected {' or '.join(DRAWN)} with --example, got {said}"
    if asked.of and not (asked.report or asked.picture or asked.table):
        return "--of: expected with --report, --picture or --table, got none of them"
    for name in ("report", "picture"):
        path = getattr(asked, name)
        if path and path.is_dir():
            return f"--{name}: expected a file, got the folder {path}"
    return unmarked(asked.table) if asked.table else None


def unmarked(path: Path) -> str | None:
    """Why no table can be written there."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from record import around

    try:
        around(path, "campaign")
    except OSError as error:
        return f"--table: {path}: expected a page, got {error.strerror}"
    except ValueError as error:
        return f"--table: {error}"
    return None


def main(given: list[str] | None = None) -> int:
    options = parser()
    asked = options.parse_args(given)
    if wrong := refusal(asked, options):
        options.error(wrong)
    if asked.of:
        try:
            return _report(asked.of, asked)
        except StateError as error:
            options.error(f"--of: {error}")
    kernels = asked.kernels or default_kernels(asked.device)
    if kernels == "triton" and asked.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

    import torch
    from rich.console import Console

    if asked.device == "cuda" and not torch.cuda.is_available():
        options.error("--device: expected a device that is there, got 'cuda' without CUDA")
    setting = Setting(torch.device(asked.device), kernels, asked.seed)
    console = Console(soft_wrap=True)
    if asked.example:
        return _example(asked, setting, console, options)
    if asked.case:
        return _again(asked, setting, console)
    kinds = asked.kind or KINDS
    try:
        path, failures = campaign(
            kinds, asked.cases, setting, console, asked.jobs, asked.seconds, asked.state, asked.commit
        )
    except StateError as error:
        options.error(f"--state: {error}")
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
    with State(path, header) as state, Reporter(console, kinds, cases, state) as reporter:
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
    for path in filter(None, (asked.report, asked.picture)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if asked.report:
        asked.report.write_text(report.html(runs))
    if asked.picture:
        report.picture(runs, asked.picture)
    if asked.table:
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
        from record import write_between

        write_between(asked.table, "campaign", report.markdown(runs))
    return int(any(part.tally.failures for _, parts in runs for part in parts.values()))


def _example(asked: argparse.Namespace, setting: Setting, console: Console, options: argparse.ArgumentParser) -> int:
    import torch

    from .worker import kind_of

    kind: Any = kind_of(asked.kind[0] if asked.kind else "layer")
    try:
        lane = kind.lane(asked.dtype, asked.property)
    except ValueError as error:
        options.error(str(error))
    try:
        case = kind.parse(asked.example)
    except ValueError as error:
        options.error(f"--example: {error}")
    torch.set_num_threads(1)
    return _told(kind.run_example(case, lane, setting), console)


def _again(asked: argparse.Namespace, setting: Setting, console: Console) -> int:
    import torch

    from .worker import kind_of

    torch.set_num_threads(1)
    kind = kind_of(asked.kind[0])
    first, last = asked.case
    if first == last:
        console.print(kind.describe(first, setting), markup=False)
    return _told(kind.run(first, last - first + 1, setting), console)


def _told(tally: Tally, console: Console) -> int:
    for (quantity, dtype), band in sorted(tally.bands.items()):
        console.print(f"{quantity}, {dtype}: {max(f for f, _ in band.worst):.3g} of the budget", markup=False)
    for failure in tally.failures:
        console.print(f"{failure.message}\n    {failure.snippet}", style="red", markup=False)
    return int(bool(tally.failures))


if __name__ == "__main__":
    sys.exit(main())
