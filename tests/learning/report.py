"""What is kept of all runs, in one file: where it was made, and every finished run with its settings and figures."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests import record
from tests.benchmarks.session import rounded

from .trial import text
from .trial.settings import Settings

KIND = "learning"
SOURCES = ("reference", "optimized", "tests/learning/trial")


def begun(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    return {"kind": KIND, **record.made(device, SOURCES, commit), "corpus": text.described(), "runs": []}


def states(path: Path, report: dict[str, Any]) -> Path:
    """The folder of its runs on their way: another one for other sources, whose runs these are not."""
    made = {name: report[name] for name in ("hashes", "device", "corpus")}
    return path.with_suffix(f".{hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:8]}.states")


def run_of(report: dict[str, Any], s: Settings) -> dict[str, Any] | None:
    """The one with these settings that was not cut short."""
    wanted = asdict(s)
    return next((run for run in report["runs"] if run["settings"] == wanted and "reason" not in run), None)


def add(report: dict[str, Any], s: Settings, figures: dict[str, Any], side_by_side: int) -> None:
    """In place of an earlier one. side_by_side: runs on a device at a time, which seconds depend on."""
    exact = {name: figures[name] for name in ("loss", "first", "honest") if name in figures}  # to be subtracted
    made = {"settings": asdict(s), "side_by_side": side_by_side, **rounded(figures), **exact}
    report["runs"] = [run for run in report["runs"] if run["settings"] != made["settings"]] + [made]


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError where it is something else."""
    found = record.read(path)
    if found.get("kind") != KIND:
        raise ValueError(f"{path}: expected kind {KIND}, got {found.get('kind')}")
    return found


def joined(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """As one, with every run of the first that has it: of trees between which these models compute the same."""
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        for run in report["runs"]:
            found.setdefault(json.dumps(run["settings"], sort_keys=True), run)
    return reports[0] | {"runs": list(found.values())}


def of_task(report: dict[str, Any], task: str) -> list[dict[str, Any]]:
    """Its finished runs."""
    return [run for run in report["runs"] if run["settings"]["task"] == task and "reason" not in run]
