"""Pictures of a campaign's results: error bands, and how the space of configurations was covered."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .draws import Array
from .tally import EDGES, Band, Tally

BLUE, RED = "#3465a4", "#cc0000"
# Of the bins: exact, below 1e-6, then up to each edge, and beyond the budget.
CENTRES = np.concatenate(([-7.2, -6.35], np.log10(EDGES[1:-1]) + 0.125, [0.4]))


def inline(figure: Figure) -> str:
    """As an image of HTML that needs no file."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return f'<img src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'


def share_below(band: Band, share: float) -> float:
    """log10 of the fraction of its budget that this share of cases stays below, by whole bins."""
    counts = band.counts.cumsum()
    return float(CENTRES[int(np.searchsorted(counts, share * counts[-1]))])


def draw_bands(ax: Axes, bands: Sequence[tuple[str, Band]]) -> None:
    """A row each: shades for the share of cases in a bin, a line at the worst, and one at the budget."""
    for y, (_, band) in enumerate(bands):
        shares = band.counts / max(band.counts.sum(), 1)
        for x, share in zip(CENTRES, shares):
            if share:
                shade = float(np.clip(0.12 + 0.88 * share**0.4, 0, 1))
                ax.barh(
                    y,
                    0.24 if x > -6.2 else 0.7,
                    left=x - (0.12 if x > -6.2 else 0.35),
                    height=0.8,
                    color=BLUE,
                    alpha=shade,
                )
        worst = max((f for f, _ in band.worst), default=0.0)
        if worst > 0:
            ax.plot([min(np.log10(max(worst, 1e-7)), 0.5)] * 2, [y - 0.4, y + 0.4], color=RED, lw=1.5)
    ax.axvline(0, color="black", lw=1)
    ax.set_yticks(range(len(bands)), [name for name, _ in bands], fontsize=7)
    ax.set_ylim(len(bands) - 0.4, -0.6)
    ticks = [-7.2, -6, -5, -4, -3, -2, -1, 0]
    ax.set_xticks(ticks, ["exact", *(f"1e{t}" for t in ticks[1:-1]), "budget"], fontsize=7)
    ax.set_xlim(-7.7, 0.7)


def bands_figure(bands: Sequence[tuple[str, Band]], title: str) -> Figure:
    figure, ax = plt.subplots(figsize=(8, 0.22 * len(bands) + 0.9))
    draw_bands(ax, bands)
    ax.set_title(title, fontsize=9, loc="left")
    return figure


def parameters(tally: Tally) -> dict[str, list[int]]:
    """Places of each parameter's levels."""
    out: dict[str, list[int]] = {}
    for i, (name, _) in enumerate(tally.levels):
        out.setdefault(name, []).append(i)
    return out


def marginals_figure(tally: Tally) -> Figure:
    """Cases of every level of every parameter."""
    of = parameters(tally)
    columns = 4
    lines = -(-len(of) // columns)
    tallest = max(map(len, of.values()))
    figure, axes = plt.subplots(lines, columns, figsize=(11, lines * (0.5 + 0.17 * tallest)), squeeze=False)
    for ax in axes.flat[len(of) :]:
        ax.axis("off")
    for ax, (name, places) in zip(axes.flat, of.items()):
        counts = [int(tally.pairs[i, i]) for i in places]
        ax.barh(range(len(places)), counts, color=[BLUE if n else RED for n in counts])
        ax.set_yticks(range(len(places)), [tally.levels[i][1] for i in places], fontsize=6)
        ax.tick_params(axis="x", labelsize=6)
        ax.invert_yaxis()
        ax.set_title(name, fontsize=8, loc="left")
    figure.tight_layout()
    return figure


def draw_pairs(ax: Axes, tally: Tally, labels: bool = True) -> None:
    """How often two levels met, as a logarithm; red: never."""
    shown = np.full(tally.pairs.shape, np.nan)
    of = parameters(tally)
    own = np.zeros(tally.pairs.shape, bool)
    for places in of.values():
        own[np.ix_(places, places)] = True
    met = (tally.pairs > 0) & ~own
    shown[met] = np.log10(tally.pairs[met])
    colours = mpl.colormaps["Blues"].with_extremes(bad="#f4f4f4")
    ax.imshow(shown, cmap=colours, vmin=0, interpolation="nearest")
    never = np.argwhere((tally.pairs == 0) & ~own)
    ax.scatter(never[:, 1], never[:, 0], s=2, color=RED, marker="s")
    if labels:
        words = [f"{name}: {level}" if i == of[name][0] else level for i, (name, level) in enumerate(tally.levels)]
        ax.set_yticks(range(len(words)), words, fontsize=5)
        ax.set_xticks(range(len(words)), words, fontsize=5, rotation=90)
    else:
        middle = [np.mean(places) for places in of.values()]
        ax.set_yticks(middle, of, fontsize=6)
        ax.set_xticks(middle, of, fontsize=6, rotation=90)


def pairs_figure(tally: Tally) -> Figure:
    size = 2.5 + 0.085 * len(tally.levels)
    figure, ax = plt.subplots(figsize=(size, size))
    draw_pairs(ax, tally)
    return figure


def never_met(tally: Tally) -> list[str]:
    """Pairs of levels of two parameters that no case has."""
    names: Array = np.array([name for name, _ in tally.levels])
    rows, columns = np.nonzero(np.triu((tally.pairs == 0) & (names[:, None] != names[None, :])))
    return [f"{' '.join(tally.levels[i])} with {' '.join(tally.levels[j])}" for i, j in zip(rows, columns)]


def summary(bands: Sequence[tuple[str, Band]], tallies: dict[str, Tally], title: str, path: Path) -> None:
    """One picture: bands, and pairs of each kind."""
    figure = plt.figure(figsize=(12, 0.2 * len(bands) + 5.5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[0.2 * len(bands) + 0.8, 4.6])
    ax = upper.subplots()
    draw_bands(ax, bands)
    ax.set_title(
        "Share of cases by the fraction of its budget that an error reached; red: the worst", fontsize=9, loc="left"
    )
    for ax, (kind, tally) in zip(np.atleast_1d(lower.subplots(1, len(tallies))), tallies.items()):
        draw_pairs(ax, tally, labels=False)
        ax.set_title(f"{kind}: pairs of drawn levels", fontsize=9, loc="left")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
