"""What routers of one run do: loads while it trains, what experts pick of a text, and who is remembered how long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch, Rectangle

from ..summary import Runs
from ..trial.watched import read
from . import style

COLUMNS, LINES = 44, 14  # of the text in a gallery
STROKES = 3000  # stays that are drawn


def loads(path: Path, report: dict[str, Any], run: dict[str, Any]) -> None:
    """By layer: the share of tokens that each expert takes as queries; and how far apart experts remember."""
    s, found = run["settings"], run["loads"]
    steps, layers = [step for step, _, _ in found], len(found[0][1])
    made, (*axes, last) = style.panels(layers + 1, 3, 3.1, 3.0)
    for layer, axis in enumerate(axes):
        for expert in range(s["experts"]):
            shares = [taken[layer][expert] for _, taken, _ in found]
            colour = style.EXPERTS[expert % len(style.EXPERTS)]
            axis.plot(steps, shares, color=colour, linewidth=1.6, label=f"expert {expert + 1}")
        axis.set(title=f"layer {layer + 1}", xlabel="steps", ylim=(0, 1.02))
        grey, line = str(0.75 * layer / max(layers - 1, 1)), ("-", "--", ":", "-.")[layer % 4]
        shares = [apart[layer] for _, _, apart in found]
        last.plot(steps, shares, line, color=grey, linewidth=1.6, label=f"layer {layer + 1}")
    axes[0].set_ylabel("tokens that an expert takes")
    axes[0].legend(fontsize=8, frameon=False)
    last.set(title="different tokens in memory\nas a part of all slots", xlabel="steps", ylim=(0, 1.02))
    last.legend(fontsize=8, frameon=False)
    for axis in (*axes, last):
        axis.grid(alpha=0.3)
    made.suptitle(f"{s['task']}, {s['model']}: {style.shape(s)}\n{style.where(report, s)}", fontsize=10)
    style.save(made, path)


def picks(path: Path, report: dict[str, Any], run: dict[str, Any]) -> None:
    """A stretch of held-out text, as it was seeded and as it is trained, for the first and the last layer."""
    s, found = run["settings"], run["picks"]
    depth = len(found["trained"]["layers"])
    rows = sorted({0, depth - 1})
    lines = -(-min(s["n"], COLUMNS * LINES) // COLUMNS)
    made = style.figure(11, 1.2 + (0.5 + 0.29 * lines) * len(rows))
    axes = made.subplots(len(rows), 2, squeeze=False)
    begin = max(s["n"] // 2 - COLUMNS * LINES // 2, 0)
    for line, layer in zip(axes, rows):
        for axis, when in zip(line, ("seeded", "trained")):
            _gallery(axis, found[when], layer, begin)
            axis.set_title(f"layer {layer + 1}, {when}", fontsize=10)
    handles = [Patch(color=style.EXPERTS[e % 8], label=f"expert {e + 1}") for e in range(s["experts"])]
    made.legend(handles=handles, loc="outside lower center", ncols=min(s["experts"], 8), frameon=False, fontsize=9)
    made.suptitle(
        f"What experts remember of a text: a bar under a byte for each expert that takes it into its memory\n"
        f"{s['model']}: {style.shape(s)}; {style.where(report, s)}",
        fontsize=10,
    )
    style.save(made, path)


def _gallery(axis: Axes, found: dict[str, Any], layer: int, begin: int) -> None:
    text = [chr(b) if 32 <= b < 127 else " " for b in read(found["tokens"])][begin : begin + COLUMNS * LINES]
    experts = [read(expert["stays"])[begin : begin + COLUMNS * LINES] for expert in found["layers"][layer]]
    height = 0.42 / len(experts)
    for i, letter in enumerate(text):
        row, column = divmod(i, COLUMNS)
        axis.text(column + 0.5, row + 0.32, letter, family="monospace", fontsize=7.5, ha="center", va="center")
        for e, stays in enumerate(experts):
            if stays[i]:
                place = (column + 0.04, row + 0.56 + e * height)
                axis.add_patch(Rectangle(place, 0.92, height, color=style.EXPERTS[e % 8], linewidth=0))
    axis.set(xlim=(0, COLUMNS), ylim=(-(-len(text) // COLUMNS), 0), xticks=[], yticks=[])


def memory(path: Path, report: dict[str, Any], run: dict[str, Any]) -> None:
    """Who is admitted, and for how long: a stroke from the block after a token's to the last that sees it."""
    s, found = run["settings"], run["picks"]["trained"]["layers"]
    layer, width = len(found) - 1, s["window"]
    made = style.figure(9.5, 5.6)
    axes = made.subplots(1, s["experts"], sharex=True, sharey=True, squeeze=False)[0]
    for e, axis in enumerate(axes):
        colour = to_rgba(style.EXPERTS[e % 8], 0.8)
        stays = [(at, n) for at, n in enumerate(read(found[layer][e]["stays"])) if n]
        every = -(-len(stays) // STROKES)
        for at, blocks in stays[::every]:
            begin = (at // width + 1) * width
            axis.hlines(at, begin, min(begin + blocks * width, s["n"]), color=colour, linewidth=0.7)
        axis.plot([0, s["n"]], [0, s["n"]], color="0.5", linewidth=0.7)
        axis.set_title(f"expert {e + 1}: {len(stays)} ever\nremembered", fontsize=9)
        axis.set(xlabel="time, tokens", xlim=(0, s["n"]), ylim=(0, s["n"]))
        for border in range(width, s["n"], width):
            axis.axvline(border, color="0.9", linewidth=0.5, zorder=0)
    axes[0].set_ylabel("position of the token that is remembered")
    made.suptitle(
        f"Memory over time, layer {layer + 1}: a stroke is a token, from its admission until it is dropped\n"
        f"{s['task']}, {s['model']}: {style.shape(s)}\n{style.where(report, s)}",
        fontsize=10,
    )
    style.save(made, path)


def chosen(runs: Runs, model: str) -> dict[str, Any]:
    """The run that is shown: of that model, with picks. Raises ValueError."""
    found = [run for run in runs if run["settings"]["model"] == model and run["picks"]]
    if not found:
        raise ValueError(f"--model: expected a mixture with a run of seed 0 in the report, got {model!r}")
    return found[0]
