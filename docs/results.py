"""Rewrites the table of README.md and draws docs/error_bands.png from tests/reports/*.json.

Run from the repository root after `pytest --report tests/reports/cpu.json` and, on a GPU,
`pytest --device cuda --report tests/reports/h100.json`, and once more with each flash-attn installed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from reference.testing import STAGES

DTYPES = ("float64", "float32", "bfloat16", "float16")
COLOURS = dict(zip(DTYPES, ("tab:blue", "tab:green", "tab:orange", "tab:red")))
ROOT = Path(__file__).parent.parent


def load() -> dict[str, dict[str, Any]]:
    """Reports by name, the CPU's first."""
    paths = sorted((ROOT / "tests" / "reports").glob("*.json"), key=lambda p: (p.stem != "cpu", p.stem))
    reports = {path.stem: json.loads(path.read_text()) for path in paths}
    return {name: report for name, report in reports.items() if "kind" not in report}


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Worst of all reports of the same hardware."""
    devices = dict.fromkeys(report["hardware"]["name"] for report in reports.values())
    lines = []
    for stage in STAGES:
        cells = []
        for dtype in DTYPES:
            values = []
            for device in devices:
                fractions = (r["worst_fraction"] for r in reports.values() if r["hardware"]["name"] == device)
                values.append(max(f.get(f"{stage} {dtype}", -1.0) for f in fractions))
            cells.append(" / ".join("-" if v < 0 else f"{v:.2f}" for v in values))
        lines.append(f"| {stage.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(reports: dict[str, dict[str, Any]]) -> None:
    """Worst use of the budget by property: a dot for every property, stage, dtype and backend."""
    rows = -(-len(reports) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 4.6 * rows), sharey=True, layout="constrained", squeeze=False)
    for axis, (name, report) in zip(axes.flat, reports.items()):
        for i, stage in enumerate(STAGES):
            for j, dtype in enumerate(DTYPES):
                rows = (r for r in report["properties"] if (r["stage"], r["dtype"]) == (stage, dtype))
                worst = [max(r["worst"], 1e-3) for r in rows if r["worst"] is not None]
                label = dtype if i == len(STAGES) - 1 else None
                axis.scatter(worst, [i + 0.18 * (j - 1.5)] * len(worst), s=16, color=COLOURS[dtype], label=label)
        axis.axvline(1, color="black", lw=1)
        axis.set(xscale="log", xlim=(8e-4, 2), xlabel="worst error / budget (1 fails)")
        axis.set_yticks(range(len(STAGES)), [s.replace("_", " ") for s in STAGES])
        axis.set_ylim(len(STAGES) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(f"{name}: {report['hardware']['name']}, {report['examples']} examples", fontsize=9)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(ROOT / "docs" / "error_bands.png", dpi=110)


def main() -> None:
    reports = load()
    readme = ROOT / "README.md"
    text = re.sub(
        r"(<!-- worst:begin -->\n).*?(<!-- worst:end -->)",
        lambda m: m[1] + table(reports) + "\n" + m[2],
        readme.read_text(),
        flags=re.S,
    )
    readme.write_text(text)
    draw(reports)
    for name, report in reports.items():
        print(f"{name}: {report['hardware']['name']}, {report['outcomes']}, {report['seconds']} s")


if __name__ == "__main__":
    main()
