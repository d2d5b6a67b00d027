"""Accuracy of recall: while it is learned, over distances, and over numbers of pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ..summary import Runs
from ..trial.recall import VALUES
from . import style

Panel = Callable[[Axes], None]


def draw(path: Path, report: dict[str, Any], runs: Runs) -> None:
    usual = style.commonest(runs)
    panels = [lambda axis: _curves(axis, style.like(runs, **usual))]
    if len({run["settings"]["n"] for run in runs}) > 1:
        fixed = {name: value for name, value in usual.items() if name != "n"}
        panels.append(lambda axis: _distances(axis, style.like(runs, **fixed)))
    if len({run["settings"]["pairs"] for run in runs}) > 1:
        panels.append(lambda axis: _pairs(axis, style.like(runs, n=usual["n"])))
    made, axes = style.panels(len(panels), columns=3, width=3.8 if len(panels) > 1 else 7.5)
    for axis, panel in zip(axes, panels):
        panel(axis)
        axis.axhline(1 / VALUES, color="0.4", linewidth=0.9, linestyle=":")
        axis.annotate(f"a guess: 1/{VALUES}", (0.99, 1 / VALUES), xycoords=("axes fraction", "data"),
                      ha="right", va="bottom", fontsize=8)  # fmt: skip
        axis.set(ylim=(0, 1.03), ylabel="accuracy of the answers")
        axis.legend(fontsize=8, frameon=False)
        axis.grid(alpha=0.3)
    s = next((run for run in style.like(runs, **usual) if run["settings"]["keys"]), runs[0])["settings"]
    made.suptitle(
        f"Recall of {s['pairs']} pairs over {s['n'] - s['window'] - s['n'] // 4} tokens at least\n"
        f"{style.shape(s)}\n{style.where(report, s)}",
        fontsize=10,
    )
    style.save(made, path)


def _curves(axis: Axes, runs: Runs) -> None:
    for model, found in style.models_of(runs):
        points: dict[float, list[float]] = {}
        for run in found:
            for step, _, accuracy in run["curve"]:
                points.setdefault(step, []).append(accuracy)
        style.band(axis, model, points, model)
    axis.set(xlabel="steps")


def _by(runs: Runs, name: str) -> dict[int, list[float]]:
    points: dict[int, list[float]] = {}
    for run in runs:
        points.setdefault(run["settings"][name], []).append(run["accuracy"])
    return points


def _distances(axis: Axes, runs: Runs) -> None:
    for model, found in style.models_of(runs):
        if len(points := _by(found, "n")) > 1:
            style.band(axis, model, points, model, marker="o")
    style.by_twos(axis, sorted(_by(runs, "n")), "N, tokens of a sequence")


def _pairs(axis: Axes, runs: Runs) -> None:
    """A line for each K of the sigmoid mixture, where it meets E K; the others at any K, if they were varied."""
    for model, found in style.models_of(runs):
        if model != "sigmoid" and len(points := _by(found, "pairs")) > 1:
            style.band(axis, model, points, model, marker="o")
    found = [run for run in runs if run["settings"]["model"] == "sigmoid"]
    for marker, keys in zip("svD^P", sorted({run["settings"]["keys"] for run in found})):
        some = [run for run in found if run["settings"]["keys"] == keys]
        slots = keys * some[0]["settings"]["experts"]
        style.band(axis, "sigmoid", _by(some, "pairs"), f"sigmoid, K {keys}: {slots} slots a layer", marker=marker)
    style.by_twos(axis, sorted(_by(runs, "pairs")), "pairs")
