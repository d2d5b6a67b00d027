"""Loss against steps, one line a layer and a band of its seeds, and what no honest model can fall below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

STYLES = {
    "strict": ("#0072B2", "-"),
    "strict, optimized": ("#009E73", "-."),
    "window top-k": ("#E69F00", "--"),
    "sequence top-k": ("#56B4E9", ":"),
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Of a report of `python -m tests.noise`."""
    figure = Figure(figsize=(7.5, 4.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    for layer, (colour, style) in STYLES.items():
        curves = [run["curve"] for run in report["runs"] if run["layer"] == layer]
        if not curves:
            continue
        steps = [step for step, _ in min(curves, key=len)]
        losses = [[loss for _, loss in curve] for curve in curves]
        by_step = [sorted(of_step) for of_step in zip(*losses)]
        label = layer if len(curves) == 1 else f"{layer}, {len(curves)} seeds"
        axis.plot(steps, [sum(of) / len(of) for of in by_step], style, color=colour, linewidth=1.6, label=label)
        axis.fill_between(steps, *zip(*((of[0], of[-1]) for of in by_step)), color=colour, alpha=0.25, linewidth=0)
    first = report["runs"][0]
    axis.axhline(first["ln_v"], color="black", linewidth=1)
    axis.annotate("ln V: nobody can predict noise", (0.99, first["ln_v"]), xycoords=("axes fraction", "data"),
                  ha="right", va="bottom", fontsize=9)  # fmt: skip
    lowest = min(loss for run in report["runs"] for _, loss in run["curve"])
    axis.set_ylim(min(lowest, first["ln_v"]) - 0.01, first["ln_v"] + 0.03)
    axis.set(xlabel="steps", ylabel="loss of new tokens, nats")
    s = first["settings"]
    axis.set_title(
        f"Trained on noise: {s['layers']} layers, N {s['n']}, W = w = {s['window']}, Kq {s['queries']},\n"
        f"K {s['keys']}, E {s['experts']}, V {s['vocabulary']}; {report['hardware']['name']}",
        fontsize=10,
    )
    axis.legend(frameon=False, fontsize=9, loc="lower left")
    axis.grid(alpha=0.3)
    figure.savefig(path)
