"""pytest for this repository: options, hypothesis profiles, and a report of how much of each error budget was used."""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.metadata
import importlib.util
import os
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Without a GPU the kernels are interpreted. Triton reads this when it is first imported, before any option is parsed;
# worker processes inherit it.
if not {"--device=cuda", "cuda"} & set(sys.argv) and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"

import harness  # noqa: E402
import hypothesis  # noqa: E402
import record  # noqa: E402
import torch  # noqa: E402
from packaging.version import Version  # noqa: E402
from record import REPORTS, hardware, read, tree_hash, versions, write  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import optimized  # noqa: E402
import reference  # noqa: E402
from tests.arguments import integer  # noqa: E402

pytest_plugins = ["tests.conformance.plugin"]  # --impl, --impl-report

PROGRAMS = {  # the extra of that name, and the oldest versions
    "transformers": "5.24",
    "peft": "0.21",
    "lightning": "2.6",
    "accelerate": "1.15",
    "torchao": "0.18",
    "safetensors": "0.8",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mixture of attention")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device the tests run on (default: cpu)")
    group.addoption(
        "--interpreted", action="store_true", help="on the CPU: all properties of our kernels, in Triton's interpreter"
    )
    group.addoption("--thorough", action="store_true", help="on the CPU: every combination, where some stand for all")
    group.addoption(
        "--max-examples",
        type=integer(1),
        help="examples per property, cases of each kind of the campaign (default: 100, with CI set 20; nightly: 1000)",
    )
    group.addoption("--mutants", action="store_true", help="run the suite against every mutant: see tests/mutants")
    group.addoption("--only", metavar="WORD", help="with --mutants: those whose name, class or file contains it")
    group.addoption("--report", type=Path, metavar="FILE", help="write hardware, versions, hashes and results as JSON")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """With -n: by default pytest-xdist deals out neighbours, and neighbours take long together."""
    if config.option.numprocesses and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs CUDA; deselected unless --device cuda")
    config.addinivalue_line("markers", "cpu: of the CPU; deselected with --device cuda")
    config.addinivalue_line("markers", "needs(*libraries): of the extra `programs`; deselected where one is missing")
    config.addinivalue_line("markers", "interpreted: on the CPU our kernels too, without --interpreted")
    config.addinivalue_line("markers", "thorough: a combination that others stand for: on a GPU, or with --thorough")
    config.addinivalue_line("markers", "slow: takes more than ten seconds")
    config.addinivalue_line("markers", "nightly: hours; selected by -m nightly only")
    config.addinivalue_line("markers", "mutants: half an hour; selected by --mutants only")
    config.addinivalue_line("markers", "speed: compares times, on a machine left alone; selected by -m speed only")
    if not __debug__:
        raise pytest.UsageError("python: expected without -O and PYTHONOPTIMIZE, which strip what the tests assert")
    for package in (reference, optimized):
        if Path(package.__file__).parent.parent != ROOT:
            raise pytest.UsageError(f"{package.__name__} comes from {package.__file__}, not from {ROOT}")
    if config.option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device: expected a device that is there, got 'cuda' without CUDA")
    if config.option.only is not None and not config.option.mutants:
        raise pytest.UsageError(f"--only: expected with --mutants, got {config.option.only!r} without it")
    harness.DEVICE = torch.device(config.option.device)
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from optimized.prove import lookups

        lookups.look_up_once()
    if (os.environ.get("TRITON_INTERPRET") == "1") != (config.option.device == "cpu"):
        raise pytest.UsageError("--device: expected on the command line, where it decides whether Triton interprets")
    if not _asks_for("speed", config):
        # Small tensors: on a busy machine more threads would wait for one another. Processes of tests inherit it.
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    common = {
        "deadline": None,
        "print_blob": True,
        "suppress_health_check": [
            hypothesis.HealthCheck.too_slow,
            hypothesis.HealthCheck.function_scoped_fixture,
            hypothesis.HealthCheck.differing_executors,
        ],
    }
    hypothesis.settings.register_profile("dev", max_examples=100, **common)
    hypothesis.settings.register_profile("ci", max_examples=20, derandomize=True, **common)
    hypothesis.settings.register_profile("nightly", max_examples=1000, **common)
    name = "ci" if os.environ.get("CI") else "dev"
    name = "nightly" if _asks_for("nightly", config) else name
    if config.option.max_examples is not None:
        base = hypothesis.settings.get_profile(name)
        hypothesis.settings.register_profile("custom", base, max_examples=config.option.max_examples)
        name = "custom"
    hypothesis.settings.load_profile(name)


def _asks_for(mark: str, config: pytest.Config) -> bool:
    return mark in (config.option.markexpr or "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselected, not skipped: a skip would hide a gap in a list of dots."""
    unwanted = {
        mark
        for mark, wanted in (
            ("gpu", config.option.device == "cuda"),
            ("cpu", config.option.device == "cpu"),
            ("thorough", config.option.device == "cuda" or config.option.thorough or _asks_for("nightly", config)),
            ("nightly", _asks_for("nightly", config)),
            ("speed", _asks_for("speed", config)),
            ("mutants", config.option.mutants),
        )
        if not wanted
    }
    without_triton = config.option.device == "cpu" and not config.option.interpreted
    kept, dropped, slow = [], [], []
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if marks & {"nightly", "mutants", "speed"}:
            item.add_marker(pytest.mark.timeout(0))  # these take as long as they are asked to
        out = bool(marks & unwanted)
        left = without_triton and "interpreted" not in marks
        out = out or (left and "triton" in _kernels_of(item))
        out = out or any(version_of(name) is None for mark in item.iter_markers("needs") for name in mark.args)
        (dropped if out else slow if "slow" in marks else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    items[:] = slow + kept  # with -n, a slow one at the end would leave the other processes idle


def pytest_collection_finish() -> None:
    """What was imported and collected stays: no later search for garbage goes through it again."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries report at the end what was not freed


@functools.cache
def version_of(library: str) -> str | None:
    """None: not installed, or too old."""
    try:
        found = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
    return found if Version(found) >= Version(PROGRAMS.get(library, "0")) else None


def programs_line() -> str:
    """With which libraries of the extra the layer is tested, and what is left out without the others."""
    found = {name: version_of(name) for name in PROGRAMS}
    line = "programs: " + (", ".join(f"{name} {v}" for name, v in found.items() if v) or "none")
    missing = [name for name, v in found.items() if v is None]
    return line + (
        f"; DESELECTED are tests that need {', '.join(missing)} (pip install -e '.[programs]')" * bool(missing)
    )


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The device under test."""
    return torch.device(pytestconfig.option.device)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Generator[ModuleType, None, None]:
    """The reference, or the optimized package computing by one kind of kernels: see `harness.BOTH`."""
    if request.param == "reference":
        yield reference
        return
    with optimized.use_backends(**harness.stages_by(request.param)):
        yield optimized


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, None]:
    """PyTorch's deterministic algorithms, without NaN in new memory."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Generator[str, None, None]:
    """The optimized package computes by this kind of kernels: see `harness.EVERY_KERNEL`."""
    with optimized.use_backends(**harness.stages_by(request.param)):
        yield request.param


STARTED = pytest.StashKey[float]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[STARTED] = cpu_seconds()  # before any fixture


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Seeds the test by its own name, and passes its ledger on to the report (across processes too)."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))
    explicit = getattr(getattr(item, "function", None), "hypothesis_explicit_examples", ())
    ledger = harness.begin(_kernels_of(item), len(explicit))
    before = compilations()
    try:
        return (yield)
    finally:
        rows = [[*key, fraction] for key, fraction in ledger.worst.items()]
        made = {kind: n - before[kind] for kind, n in compilations().items()}
        taken = cpu_seconds() - item.stash[STARTED]
        entry = {"examples": max(ledger.examples, 1), "worst": rows, "compilations": made, "cpu_seconds": taken}
        item.user_properties.append(("ledger", entry))


def _kernels_of(item: pytest.Item) -> str:
    """What the parametrisation says about who computes, kernels of ours first; "-" where it says nothing."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    found = [parameters.get(name) for name in ("kernels", "implementation", "backend")]
    return " ".join(getattr(value, "__name__", str(value)) for value in found if value) or "-"  # a package by its name


def cpu_seconds() -> float:
    """That this process and the children it waited for have used so far."""
    return sum(os.times()[:4])


def compilations() -> Counter[str]:
    """Distinct graphs that torch.compile made in this process so far."""
    compiler = sys.modules.get("torch._dynamo.utils")  # its import takes seconds
    return Counter({"torch.compile graphs": int(compiler.counters["stats"]["unique_graphs"]) if compiler else 0})


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [", ".join(f"{name} {v}" for name, v in versions().items())]
    lines.append(f"device: {config.option.device}, " + ", ".join(hardware(torch.device(config.option.device)).values()))
    lines.append(programs_line())
    lines += [f"backends of {stage}: {', '.join(names)}" for stage, names in optimized.backends().items()]
    lines.append(f"reference and optimized imported from {ROOT}")
    hash_of = functools.cache(tree_hash)
    for path in sorted(REPORTS.glob("*.json")):
        report = read(path)
        stale = [folder for folder, value in report["hashes"].items() if hash_of(folder) != value]
        state = f"STALE, {' and '.join(stale)} changed since" if stale else "current"
        lines.append(f"report {path.stem} ({report['hardware']['name']}): {state}")
    return lines


def collect(reports: list[Any]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of the table, merged over parametrisation, and CPU seconds by file."""
    rows: dict[tuple[str, str, str, str, str], dict[str, Any]] = {}
    seconds: dict[str, float] = defaultdict(float)
    for report in reports:
        path, _, test = report.nodeid.partition("::")
        file = Path(path).name
        if report.when != "call":
            continue
        ledger = dict(report.user_properties).get("ledger", {"examples": 1, "worst": [], "cpu_seconds": 0.0})
        seconds[file] += ledger["cpu_seconds"]
        for stage, dtype, backend, fraction in ledger["worst"] or [("-", "-", "-", None)]:
            key = (file, test.split("[")[0], stage, dtype, backend)
            names = dict(zip(("file", "property", "stage", "dtype", "backend"), key))
            row = rows.setdefault(key, {**names, "examples": 0, "worst": None, "seconds": 0.0})
            row["examples"] += ledger["examples"]
            row["seconds"] += report.duration
            if fraction is not None:
                row["worst"] = max(row["worst"] or 0.0, fraction)
    return [rows[key] for key in sorted(rows)], seconds


def compilations_of(reports: list[Any]) -> Counter[str]:
    made: Counter[str] = Counter()
    for report in reports:
        if report.when == "call":
            made.update(dict(report.user_properties).get("ledger", {}).get("compilations", {}))
    return made


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    stats = terminalreporter.stats
    reports = [r for kind in ("passed", "failed", "error", "") for r in stats.get(kind, [])]
    reports = [r for r in reports if hasattr(r, "user_properties")]
    rows, seconds = collect(reports)
    if not rows or config.option.impl is not None:
        return
    table = Table(title="worst error as a fraction of its budget (see reference/testing.py)", title_justify="left")
    for name in ("property", "stage", "dtype", "backend", "examples", "worst / budget", "seconds"):
        table.add_column(name, justify="right" if name in ("examples", "worst / budget", "seconds") else "left")
    file = None
    for row in rows:
        if row["file"] != file:
            file = row["file"]
            table.add_section()
            table.add_row(f"[bold]{file}[/]", "", "", "", "", "", f"[bold]{seconds[file]:.0f}[/]")
        worst = "" if row["worst"] is None else f"{row['worst']:.2f}"
        cells = (row["property"], row["stage"], row["dtype"], row["backend"], str(row["examples"]), worst)
        table.add_row(*cells, f"{row['seconds']:.1f}")
    console = Console(file=terminalreporter._tw._file, width=max(110, terminalreporter._tw.fullwidth))
    console.print(table)
    made = compilations_of(reports)
    terminalreporter.write_line("compilations: " + ", ".join(f"{n} {kind}" for kind, n in made.items()))
    if config.option.report:
        write_report(config, terminalreporter, rows, seconds, made)


def write_report(
    config: pytest.Config,
    reporter: Any,
    rows: list[dict[str, Any]],
    seconds: dict[str, float],
    graphs: Counter[str],
) -> None:
    worst: dict[str, float] = {}
    for row in rows:
        if row["worst"] is not None:
            key = f"{row['stage']} {row['dtype']}"
            worst[key] = max(worst.get(key, 0.0), row["worst"])
    outcomes = {k: len(reporter.stats.get(k, [])) for k in ("passed", "failed", "error", "skipped", "deselected")}
    report = record.made(torch.device(config.option.device), ("optimized", "tests")) | {
        "outcomes": outcomes,
        "seconds": round(time.time() - _start_time(reporter), 1),
        "cpu_seconds_by_file": {file: round(taken, 1) for file, taken in sorted(seconds.items())},
        "compilations": dict(graphs),
        "examples": sum(row["examples"] for row in rows),
        "worst_fraction": {key: round(value, 4) for key, value in sorted(worst.items())},
        "properties": [{**r, "seconds": round(r["seconds"], 2)} for r in rows],
    }
    write(config.option.report, report)


def _start_time(reporter: Any) -> float:
    start = getattr(reporter, "_session_start", None)
    return start.time if start is not None else reporter._sessionstarttime
