"""What the pictures share: colours that everybody can tell apart, and where and of what shape the runs were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..summary import Runs, mean

STYLES: dict[str, tuple[str, str]] = {
    "dense": ("#000000", "-"),
    "local": ("#7f7f7f", "--"),
    "sigmoid": ("#0072B2", "-"),
    "straight-through": ("#0072B2", ":"),
    "iterative": ("#E69F00", "-"),
    "iterative-cold": ("#E69F00", ":"),
    "exact": ("#56B4E9", "-"),
    "exact-cold": ("#56B4E9", ":"),
    "default": ("#E69F00", "-."),
    "few-queries": ("#0072B2", "--"),
    "random-memory": ("#8c6d9c", "-."),
    "window-top-k": ("#8a5a00", "-."),
    "optimized": ("#0072B2", "-"),
    "reference": ("#E69F00", "--"),
}
EXPERTS = ("#0072B2", "#E69F00", "#56B4E9", "#8a5a00", "#00365a", "#f3d08a", "#b5dcf5", "#4d3200")


def figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def panels(count: int, columns: int = 2, width: float = 4.6, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    """As many axes, in rows; narrow enough to be read at 800 pixels."""
    columns = min(columns, count)
    lines = -(-count // columns)
    made = figure(width * columns, 0.9 + height * lines)
    axes = list(made.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return made, axes[:count]


def shape(s: dict[str, Any]) -> str:
    said = f"{s['layers']} layer{'s' * (s['layers'] > 1)}, D {s['dim']}, N {s['n']}, W = w = {s['window']}"
    return said + (f", E {s['experts']}, K {s['keys']}, Kq {s['queries']}" if s["keys"] else "")


def where(report: dict[str, Any], s: dict[str, Any]) -> str:
    precision = "bfloat16 autocast" if s["precision"] == "bfloat16" else "float32"
    return f"{s['steps']} steps of {s['batch']} sequences, {precision}, {report['hardware']['name']}"


def save(made: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path)


def band(axis: Axes, model: str, points: Mapping[Any, list[float]], label: str, marker: str = "") -> None:
    """The mean of the seeds, and all between the least and the largest of them."""
    colour, line = STYLES[model]
    xs = sorted(points)
    axis.plot(xs, [mean(points[x]) for x in xs], line, color=colour, linewidth=1.7, label=label, marker=marker)
    low, high = zip(*((min(points[x]), max(points[x])) for x in xs))
    axis.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)


def by_twos(axis: Axes, values: list[int], label: str) -> None:
    """An axis of powers of two, or nearly."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [str(value) for value in values])
    axis.minorticks_off()
    axis.set_xlabel(label)


def models_of(runs: Runs) -> Iterator[tuple[str, Runs]]:
    for model in STYLES:
        found = [run for run in runs if run["settings"]["model"] == model]
        if found:
            yield model, found


def like(runs: Runs, **values: Any) -> Runs:
    """Those whose settings are these, where they have them: models without experts have no K."""
    return [
        run
        for run in runs
        if all(
            run["settings"][name] in (value, 0 if name in ("keys", "experts") else value)
            for name, value in values.items()
        )
    ]


def commonest(runs: Runs) -> dict[str, Any]:
    """N, pairs, E and K of most of the runs that have them: what a sweep varies one of."""
    found = {}
    for name in ("n", "pairs", "experts", "keys"):
        values = [run["settings"][name] for run in runs if run["settings"][name]]
        if values:
            found[name] = max(sorted(set(values)), key=values.count)
    return found
