"""The table of docs/learning.md, from tests/reports/learning-*.json. Run from the repository root:

python docs/learning.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.learning import report, summary  # noqa: E402
from tests.learning.trial.settings import TASKS  # noqa: E402
from tests.record import REPORTS, table, write_between  # noqa: E402

HEADINGS = (
    "task", "model", "N", "P", "E", "K", "Kq", "parameters", "steps", "seeds", "accuracy", "bits", "at equal MACs",
    "whole / prefixes",
)  # fmt: skip


def rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for task in TASKS:
        for row in summary.rows(report.of_task(found, task)):
            said = [f"{summary.bits(row[name]):.3f}" for name in ("loss", "at_equal_macs")]
            both = [f"{summary.bits(row[name]):.3f}" for name in ("teacher_forced", "honest") if name in row]
            counts = f"{row['parameters'] / 1e6:.3g} M", str(row["steps"]), str(row["seeds"])
            shape = [str(row[name] or "") for name in summary.VARIED]
            yield task, row["model"], *shape, *counts, f"{row['accuracy']:.3f}", *said, " / ".join(both)


def text() -> str:
    """A table for each kind of device, of all its reports."""
    by_device: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path in sorted(REPORTS.glob("learning-*.json"), key=lambda path: path.stem):
        found = report.read(path)
        by_device.setdefault(found["hardware"]["name"], []).append((path, found))
    parts = []
    for name, reports in by_device.items():
        first = reports[0][1]
        links = ", ".join(f"[{path.stem}](../tests/reports/{path.name})" for path, _ in reports)
        said = f"*{name}, torch {first['versions']['torch']}, {first['runs'][0]['settings']['precision']}; {links}*"
        parts.append(table(HEADINGS, rows(report.joined([found for _, found in reports])), left=2) + f"\n\n{said}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    write_between(ROOT / "docs" / "learning.md", "learning", text())
