"""`pytest --impl module:callable`: options, selection and report. The root conftest loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from reference.contract import number
from tests.conformance import report
from tests.conformance.examine import FAILS, NOT_OFFERED, Verdict, verdict
from tests.conformance.process import Examiner
from tests.conformance.properties import PROPERTIES
from tests.conformance.registry import Property
from tests.conformance.sets import SETS
from tests.conformance.subject import printable, split

TESTS = Path(__file__).parent / "test_conformance.py"
TIMEOUT = 300  # seconds: kernels are compiled in the first call
EXAMINER = pytest.StashKey[Examiner]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption(
        "--impl",
        metavar="MODULE:CALLABLE",
        help="check this MixtureOfAttention, or a function that makes one, in place of this repository's own tests",
    )
    group.addoption(
        "--causal", action="store_true", help="with --impl: the layer is strictly causal, and asked for what that takes"
    )
    group.addoption(
        "--impl-report", type=Path, metavar="FILE", help="with --impl: write the verdicts to FILE (.md, .json or .html)"
    )
    group.addoption(
        "--impl-timeout",
        type=float,
        metavar="SECONDS",
        help=f"with --impl: how long the import, or one configuration, may take (default: {TIMEOUT})",
    )


def pytest_configure(config: pytest.Config) -> None:
    spec = config.option.impl
    check_options(config.option)
    if spec is None:
        return
    timeout = TIMEOUT if config.option.impl_timeout is None else config.option.impl_timeout
    examiner = config.stash[EXAMINER] = Examiner(spec, config.option.device, timeout, config.option.causal)
    if hasattr(config, "workerinput"):  # of pytest-xdist, where the controller has looked
        return
    try:
        examiner.start()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    if config.option.numprocesses:
        examiner.close()


def pytest_unconfigure(config: pytest.Config) -> None:
    if EXAMINER in config.stash:
        config.stash[EXAMINER].close()


def check_options(option: Any) -> None:
    """Raises UsageError."""
    spec, path, timeout = option.impl, option.impl_report, option.impl_timeout
    for name, value in (("--impl-report", path), ("--impl-timeout", timeout)):
        if value is not None and spec is None:
            raise pytest.UsageError(f"{name}: expected together with --impl, got {str(value)!r} alone")
    if option.causal and spec is None:
        raise pytest.UsageError("--causal: expected together with --impl, got it alone")
    if path is not None and path.suffix not in report.SUFFIXES:
        raise pytest.UsageError(f"--impl-report: expected a file in {', '.join(report.SUFFIXES)}, got {str(path)!r}")
    if spec is None:
        return
    if option.report is not None:
        raise pytest.UsageError("--report: expected without --impl, whose report is written by --impl-report")
    try:
        if timeout is not None:
            number("--impl-timeout", timeout, "a finite number > 0", lambda v: v > 0)
        split(spec)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header(config: pytest.Config) -> list[str]:
    if config.option.impl is None:
        return []
    count = len(SETS[config.option.causal].properties)
    return [f"conformance of {config.option.impl}: its {count} properties and no other tests are selected"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.option.impl is not None and collection_path.suffix == ".py" and collection_path != TESTS:
        return True
    return None


def verdicts_of(reporter: Any, properties: Mapping[str, Property] = PROPERTIES) -> list[Verdict]:
    """Of all properties that were selected; one whose test ended without a verdict fails."""
    found: dict[str, Verdict] = {}
    for kind in ("passed", "failed", "error", "skipped"):
        for r in (r for r in reporter.stats.get(kind, []) if hasattr(r, "user_properties")):
            made = [Verdict(**v) for key, v in r.user_properties if key == "conformance"]
            name = r.nodeid.removesuffix("]").rpartition("-")[2]
            if name in properties and not made and kind != "passed":
                made = [verdict(properties[name], FAILS, f"no verdict: {printable(r.longreprtext or kind)}")]
            # Of two reports of a test, setup and call, the one that fails counts.
            found.update({v.name: v for v in made if v.name not in found or v.verdict == FAILS})
    return [found[name] for name in properties if name in found]


def nothing_was_checked(verdicts: list[Verdict]) -> bool:
    return all(v.verdict == NOT_OFFERED for v in verdicts)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    option = session.config.option
    if option.impl is None or reporter is None or option.collectonly:
        return
    verdicts = verdicts_of(reporter, SETS[option.causal].properties)
    if exitstatus == pytest.ExitCode.OK and nothing_was_checked(verdicts):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    spec, causal = config.option.impl, config.option.causal
    if spec is None or config.option.collectonly:
        return
    verdicts = verdicts_of(terminalreporter, SETS[causal].properties)
    console = Console(file=terminalreporter._tw._file, width=max(110, terminalreporter._tw.fullwidth))
    console.print(report.table(spec, verdicts))
    if nothing_was_checked(verdicts):
        terminalreporter.write_line("nothing was checked", red=True)
    if config.option.impl_report is not None:
        report.write(config.option.impl_report, spec, config.option.device, verdicts, causal)
