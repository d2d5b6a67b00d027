"""`pytest --impl module:callable`: options, selection and report. The root conftest loads it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import nn

from tests.conformance import report
from tests.conformance.examine import Verdict
from tests.conformance.properties import PROPERTIES

TESTS = Path(__file__).parent / "test_conformance.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption(
        "--impl",
        metavar="MODULE:CALLABLE",
        help="check this MixtureOfAttention, or a function that makes one, in place of this repository's own tests",
    )
    group.addoption(
        "--impl-report", type=Path, metavar="FILE", help="with --impl: write the verdicts to FILE (.md, .json or .html)"
    )


def pytest_configure(config: pytest.Config) -> None:
    spec, path = config.option.impl, config.option.impl_report
    if path is not None and spec is None:
        raise pytest.UsageError(f"--impl-report: expected together with --impl, got {str(path)!r} alone")
    if path is not None and path.suffix not in report.SUFFIXES:
        raise pytest.UsageError(f"--impl-report: expected a file in {', '.join(report.SUFFIXES)}, got {str(path)!r}")
    if spec is not None:
        if config.option.report is not None:
            raise pytest.UsageError("--report: expected without --impl, whose report is written by --impl-report")
        try:
            factory_of(spec)
        except ValueError as error:
            raise pytest.UsageError(f"--impl: {error}") from error


def factory_of(spec: str) -> Callable[..., nn.Module]:
    """The callable that module:callable names. Raises ValueError."""
    expected = "expected module:callable, a MixtureOfAttention or a function that makes one"
    module, _, name = spec.partition(":")
    if not (module and name.isidentifier()):
        raise ValueError(f"{expected}, got {spec!r}")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{expected}, got {spec!r} ({error})") from error
    if not callable(found):
        raise ValueError(f"{expected}, got {spec!r}, which is {found!r}")
    return found


def pytest_report_header(config: pytest.Config) -> list[str]:
    if config.option.impl is None:
        return []
    return [f"conformance of {config.option.impl}: its {len(PROPERTIES)} properties and no other tests are selected"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.option.impl is not None and collection_path.suffix == ".py" and collection_path != TESTS:
        return True
    return None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    spec = config.option.impl
    if spec is None:
        return
    done = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    found = {v["name"]: Verdict(**v) for r in done for key, v in r.user_properties if key == "conformance"}
    verdicts = [found[name] for name in PROPERTIES if name in found]
    console = Console(file=terminalreporter._tw._file, width=max(110, terminalreporter._tw.fullwidth))
    console.print(report.table(spec, verdicts))
    if config.option.impl_report is not None:
        report.write(config.option.impl_report, spec, config.option.device, verdicts)
