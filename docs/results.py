"""Rewrites the table of proof in docs/testing.md and draws docs/pictures/error_bands.png from tests/reports/*.json.

Run from the repository root after `pytest --report=tests/reports/cpu.json` and, on a GPU,
`pytest --device cuda --report=tests/reports/h200.json`, and once more with each flash-attn installed. The bands of the
first picture: `python -m tests.bands`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from reference.testing import STAGES  # noqa: E402
from tests.record import REPORTS, read, write_between  # noqa: E402
from tests.record import table as markdown_table  # noqa: E402

DTYPES = ("float64", "float32", "bfloat16", "float16")
COLOURS = dict(zip(DTYPES, ("#0072B2", "#56B4E9", "#E69F00", "#CC79A7")))  # told apart without red and green


def load() -> dict[str, dict[str, Any]]:
    """Reports by name, the CPU's first."""
    paths = sorted(REPORTS.glob("*.json"), key=lambda p: (p.stem != "cpu", p.stem))
    reports = {path.stem: read(path) for path in paths}
    return {name: report for name, report in reports.items() if "kind" not in report}


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Worst of all reports of the same hardware."""
    devices = dict.fromkeys(report["hardware"]["name"] for report in reports.values())
    rows = []
    for stage in STAGES:
        cells = []
        for dtype in DTYPES:
            values = []
            for device in devices:
                fractions = (r["worst_fraction"] for r in reports.values() if r["hardware"]["name"] == device)
                values.append(max(f.get(f"{stage} {dtype}", -1.0) for f in fractions))
            cells.append(" / ".join("-" if v < 0 else f"{v:.2f}" for v in values))
        rows.append([stage.replace("_", " "), *cells])
    return markdown_table(("stage", *DTYPES), rows)


def draw(reports: dict[str, dict[str, Any]], measured: dict[str, Any]) -> None:
    """The band of every budget, then the worst use of it by property, in each report."""
    rows = -(-len(reports) // 2)
    figure = plt.figure(figsize=(11, 5.6 + 4.2 * rows), layout="constrained")
    grid = figure.add_gridspec(rows + 1, 2, height_ratios=[1.35] + [1] * rows)
    top = figure.add_subplot(grid[0, :])
    draw_bands(top, measured)
    for i, (name, report) in enumerate(reports.items()):
        axis = figure.add_subplot(grid[1 + i // 2, i % 2])
        draw_properties(axis, name, report)
        axis.tick_params(labelleft=i % 2 == 0)
    figure.savefig(ROOT / "docs" / "pictures" / "error_bands.png", dpi=110)


def rows_of_stages(axis: Axes) -> None:
    axis.axvline(1, color="black", lw=1.2)
    axis.set_yticks(range(len(STAGES)), [s.replace("_", " ") for s in STAGES])
    axis.set_ylim(len(STAGES) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


def draw_bands(axis: Axes, measured: dict[str, Any]) -> None:
    """Correct results at their worst, the weakest fault that is rejected, and faults that are not: hollow."""
    for i, stage in enumerate(STAGES):
        axis.axhspan(i - 0.5, i + 0.5, color="black", alpha=0.04 * (i % 2), lw=0)
        for j, dtype in enumerate(DTYPES):
            cell = measured["bands"].get(f"{stage} {dtype}")
            if cell is None:
                continue
            y, colour = i + 0.2 * (j - 1.5), COLOURS[dtype]
            fractions = [fault["fraction"] for fault in cell["faults"].values()]
            rejected = min((f for f in fractions if f > 1), default=None)
            worst = max(cell["worst"], 1e-3)
            axis.plot([worst, rejected or 1], [y, y], color=colour, lw=1, alpha=0.5)
            axis.plot(worst, y, "o", ms=5, color=colour, label=dtype if i == len(STAGES) - 1 else None)
            if rejected:
                axis.plot(rejected, y, ">", ms=6, color=colour)
            lost = [f for f in fractions if not f > 1]
            axis.plot(lost, [y] * len(lost), "o", ms=5, mfc="none", mew=0.8, alpha=0.7, color=colour)
    axis.set(xscale="log", xlim=(8e-4, 1e9), xlabel="error / budget (1 fails)")
    rows_of_stages(axis)
    name = measured["hardware"]["name"]
    axis.set_title(
        f"{name}: \u25cf correct results at their worst   \u25b6 weakest fault rejected   \u25cb faults not rejected",
        fontsize=9,
    )
    axis.legend(loc="lower right", fontsize=8)


def draw_properties(axis: Axes, name: str, report: dict[str, Any]) -> None:
    """A dot for every property, stage, dtype and backend."""
    for i, stage in enumerate(STAGES):
        for j, dtype in enumerate(DTYPES):
            rows = (r for r in report["properties"] if (r["stage"], r["dtype"]) == (stage, dtype))
            worst = [max(r["worst"], 1e-3) for r in rows if r["worst"] is not None]
            axis.scatter(worst, [i + 0.18 * (j - 1.5)] * len(worst), s=14, color=COLOURS[dtype])
    axis.set(xscale="log", xlim=(8e-4, 2), xlabel="worst error / budget (1 fails)")
    rows_of_stages(axis)
    axis.set_title(f"{name}: {report['hardware']['name']}, {report['examples']} examples", fontsize=8)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    reports = load()
    write_between(ROOT / "docs" / "testing.md", "worst", table(reports))
    draw(reports, read(REPORTS / "bands-cpu.json"))
    for name, report in reports.items():
        print(f"{name}: {report['hardware']['name']}, {report['outcomes']}, {report['seconds']} s")


if __name__ == "__main__":
    main()
