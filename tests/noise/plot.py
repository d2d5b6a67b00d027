"""Loss against steps, one line a run, and what no honest model can fall below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

STYLES = {"strict": ("#0072B2", "-"), "window top-k": ("#E69F00", "--"), "sequence top-k": ("#56B4E9", ":")}


def draw(report: dict[str, Any], path: Path) -> None:
    """Of a report of `python -m tests.noise`."""
    figure = Figure(figsize=(7.5, 4.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    labelled: set[str] = set()
    for run in report["runs"]:
        colour, style = STYLES[run["layer"]]
        label = None if run["layer"] in labelled else run["layer"]
        labelled.add(run["layer"])
        steps, losses = zip(*run["curve"])
        axis.plot(steps, losses, style, color=colour, linewidth=1.6, label=label)
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
