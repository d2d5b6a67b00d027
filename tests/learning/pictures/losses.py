"""Bits per byte of text and of masked text, against work and against time; and the two packages side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ..summary import Runs, alike, alone, bits, compared, mean, seconds_of_a_step
from . import style


def draw(path: Path, report: dict[str, Any], runs: Runs) -> None:
    usual = style.commonest(runs)
    same = style.like(runs, **usual)
    varied = [
        name for name in ("experts", "keys") if len({r["settings"][name] for r in runs if r["settings"][name]}) > 1
    ]
    made, axes = style.panels(2 + len(varied))
    most = max(run["macs_of_a_step"] * run["settings"]["steps"] for run in same)
    unit = 10.0 ** (3 * int(math.log10(most) // 3))
    label = f"multiply-accumulates of training, {unit:.0e}".replace("e+", "e")
    _against(axes[0], same, lambda group: group[0]["macs_of_a_step"] / unit, label)
    _against(axes[1], same, seconds_of_a_step, "seconds of training")
    if not all(alone(group) for group in alike(same)):
        axes[1].set_title("some had to share a device", fontsize=9)
    for axis, name in zip(axes[2:], varied):
        _over(axis, style.like(runs, **{k: v for k, v in usual.items() if k != name}), name)
    for axis in axes:
        axis.set(
            ylabel="bits per byte that is asked for" if runs[0]["settings"]["task"] == "encoder" else "bits per byte"
        )
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    s = next((run for run in same if run["settings"]["keys"]), same[0])["settings"]
    what = "Masked bytes of text" if s["task"] == "encoder" else "Bytes of text"
    parameters = mean([run["parameters"] / 1e6 for run in same])
    made.suptitle(
        f"{what} that was held out; {parameters:.1f} M parameters each\n{style.shape(s)}\n{style.where(report, s)}",
        fontsize=10,
    )
    style.save(made, path)


def _against(axis: Axes, runs: Runs, of_a_step: Callable[[Runs], float], label: str) -> None:
    """The mean of the seeds; what a model that looks ahead reaches without looking ahead is a cross."""
    for model, found in style.models_of(runs):
        for group in alike(found):
            unit = of_a_step(group)
            points: dict[float, list[float]] = {}
            for run in group:
                for step, loss, _ in run["curve"]:
                    points.setdefault(step * unit, []).append(bits(loss))
            label_of = model if model != "window-top-k" else f"{model}: looks ahead"
            style.band(axis, model, points, label_of)
            if model == "window-top-k":
                honest = mean([bits(run["loss"] + run["honest"]["difference"]) for run in group])
                axis.plot([max(points)], [honest], "X", color=style.STYLES[model][0], label=f"{model}, from prefixes")
    lowest = min((bits(loss) for run in runs for _, loss, _ in run["curve"]), default=0.0)
    highest = max((bits(run["curve"][0][1]) for run in runs), default=1.0)
    axis.set(xlabel=label, ylim=(lowest - 0.05, min(highest, lowest + 2.5) + 0.05))


def _over(axis: Axes, runs: Runs, name: str) -> None:
    for model, found in style.models_of(runs):
        some = [run for run in found if run["settings"][name]]
        if not some:
            axis.axhline(bits(mean([run["loss"] for run in found])), color=style.STYLES[model][0],
                         linestyle=style.STYLES[model][1], linewidth=1)  # fmt: skip
            continue
        points: dict[float, list[float]] = {}
        for run in some:
            points.setdefault(run["settings"][name], []).append(bits(run["loss"]))
        if len(points) > 1:
            style.band(axis, model, points, model, marker="o")
    values = sorted({run["settings"][name] for run in runs if run["settings"][name]})
    style.by_twos(axis, values, {"experts": "E, experts", "keys": "K, tokens an expert remembers"}[name])


def packages(path: Path, report: dict[str, Any], runs: Runs) -> None:
    made = style.figure(9.5, 4.6)
    first, curves = made.subplots(1, 2)
    by_seed: dict[int, Runs] = {}
    for run in runs:
        by_seed.setdefault(run["settings"]["seed"], []).append(run)
    for seed, found in sorted(by_seed.items()):
        if len(found) == 2:
            differences = [abs(a - b) for a, b in zip(found[0]["first"], found[1]["first"])]
            first.plot(range(1, len(differences) + 1), differences, marker=".", linewidth=0.8, color="#0072B2",
                       label="a seed" if seed == min(by_seed) else None)  # fmt: skip
    eps = 2**-23 * runs[0]["first"][0]
    first.axhline(eps, color="#E69F00", linestyle="--", label="last place of a loss in float32")
    first.set_yscale("symlog", linthresh=eps / 2)
    first.set_ylim(bottom=0)
    first.set(xlabel="step", ylabel="difference of the losses, nats", title="The first steps")
    for model, found in style.models_of(runs):
        points: dict[float, list[float]] = {}
        for run in found:
            for step, loss, _ in run["curve"]:
                points.setdefault(step, []).append(bits(loss))
        style.band(curves, model, points, f"{model}, {len(found)} seeds")
    curves.set(xlabel="step", ylabel="bits per byte, held out", title="All steps")
    for axis in (first, curves):
        axis.legend(fontsize=8, frameon=False)
        axis.grid(alpha=0.3)
    s, found_of = runs[0]["settings"], compared(runs)
    said = ""
    if found_of is not None and found_of["standard_error"] is not None:
        said = f"at the end {bits(found_of['difference']):+.1e} ± {bits(found_of['standard_error']):.0e} bits; "
    made.suptitle(f"optimized beside reference: {said}{style.shape(s)}\n{style.where(report, s)}", fontsize=10)
    style.save(made, path)
