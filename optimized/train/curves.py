"""curve.json and curve.png: what was trained, on what, and how it went. matplotlib is imported when it is drawn."""

from __future__ import annotations

import importlib.util
import io
import math
from pathlib import Path
from typing import Any

from optimized.train import files

JSON, PICTURE = "curve.json", "curve.png"
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "0.45"


def write(folder: Path, report: dict[str, Any]) -> bool:
    """Whether a picture is drawn: that takes matplotlib, and a first step."""
    files.write_json(folder / JSON, report)
    drawn = bool(report["training"]) and importlib.util.find_spec("matplotlib") is not None
    if drawn:
        picture = io.BytesIO()
        draw(report, picture)
        files.write(folder / PICTURE, lambda file: file.write(picture.getvalue()))
    return drawn


def draw(report: dict[str, Any], file: io.BytesIO) -> None:
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    training, validation = report["training"], report["validation"]
    figure = Figure(figsize=(8, 6.4), dpi=130, layout="constrained")
    losses, loads = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    figure.suptitle(
        "\n".join((report["described"]["model"], report["described"]["training"], report["hardware"])), fontsize=8
    )
    losses.plot([n["step"] for n in training], [n["loss"] for n in training], color=BLUE, linewidth=1, label="training")
    steps, found = [n["step"] for n in validation], [n["loss"] for n in validation]
    losses.plot(steps, found, "o-", color=ORANGE, markersize=3.5, label="validation")
    losses.set(ylabel="loss, nats a token")
    losses.legend(frameon=False)
    to_bits = report["bytes_per_token"] * math.log(2)
    bits = losses.secondary_yaxis("right", functions=(lambda loss: loss / to_bits, lambda b: b * to_bits))
    bits.set_ylabel("bits a byte")
    _loads(loads, training)
    for axes in (losses, loads):
        axes.grid(alpha=0.3)
    figure.savefig(file, format="png")


def _loads(axes: Any, training: list[dict[str, Any]]) -> None:
    """Of the busiest and the idlest expert of any layer, over the mean of its layer."""
    noted = [n for n in training if n["loads"]]
    if noted:
        steps = [n["step"] for n in noted]
        most, least = ([of(of(layer) * len(layer) for layer in n["loads"]) for n in noted] for of in (max, min))
        axes.fill_between(steps, least, most, color=BLUE, alpha=0.25, linewidth=0)
        axes.plot(steps, most, color=BLUE, linewidth=1)
        axes.plot(steps, least, color=BLUE, linewidth=1)
        axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set(xlabel="step", ylabel="load of experts,\nover their mean", ylim=(0, None))
