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
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure

from .draws import Array
from .tally import EDGES, Band, Tally

BLUE, ORANGE = "#0072B2", "#D55E00"
SHARES = ScalarMappable(PowerNorm(0.4, 0, 1), "Blues")  # of the cases of a row
FARTHEST = 0.4  # log10 of the fraction at which the picture ends
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
    """A row each: shades for the share of cases in a bin, a line at the worst, one at the budget, and each failure."""
    for y, (_, band) in enumerate(bands):
        shares = band.counts / max(band.counts.sum(), 1)
        for x, share in zip(CENTRES[:-1], shares[:-1]):  # what failed is marked where it is
            if share:
                half = 0.12 if x > -6.2 else 0.35
                ax.barh(y, 2 * half, left=x - half, height=0.8, color=SHARES.to_rgba(share))
        fractions = [fraction for fraction, _ in band.worst]
        if fractions and 0 < max(fractions) <= 1:
            ax.plot([np.log10(max(*fractions, 1e-7))] * 2, [y - 0.4, y + 0.4], color=ORANGE, lw=1.8)
        failed = [fraction for fraction in fractions if not fraction <= 1]
        for fraction in failed:
            x = FARTHEST - 0.05 if np.isnan(fraction) else min(np.log10(fraction), FARTHEST - 0.05)
            ax.plot(x, y, "D", ms=5, color=ORANGE, mec="black", mew=0.6)
        if failed:
            said = ", ".join(f"{fraction:.3g}" for fraction in failed)
            ax.annotate(said, (FARTHEST, y), (4, 0), textcoords="offset points", fontsize=8, va="center")
    ax.axvline(0, color="black", lw=1)
    ax.set_yticks(range(len(bands)), [name for name, _ in bands], fontsize=8)
    ax.set_ylim(len(bands) - 0.4, -0.6)
    ticks = [-7.2, -6, -5, -4, -3, -2, -1, 0]
    ax.set_xticks(ticks, ["exact", *(f"1e{t}" for t in ticks[1:-1]), "budget"], fontsize=8)
    ax.set_xlim(-7.7, FARTHEST)
    ticks = [0, 0.001, 0.01, 0.1, 0.3, 1]
    bar = ax.figure.colorbar(SHARES, ax=ax, location="bottom", pad=0.02, aspect=60, ticks=ticks)
    bar.ax.set_xticklabels([f"{100 * share:g} %" for share in ticks], fontsize=8)
    bar.set_label("share of the row's cases", fontsize=8)


def bands_figure(bands: Sequence[tuple[str, Band]], title: str) -> Figure:
    figure, ax = plt.subplots(figsize=(9, 0.24 * len(bands) + 1.2))
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
        ax.barh(range(len(places)), counts, color=[BLUE if n else ORANGE for n in counts])
        ax.set_yticks(range(len(places)), [tally.levels[i][1] for i in places], fontsize=6)
        ax.tick_params(axis="x", labelsize=6)
        ax.invert_yaxis()
        ax.set_title(name, fontsize=8, loc="left")
    figure.tight_layout()
    return figure


def draw_pairs(ax: Axes, tally: Tally, labels: bool = True) -> None:
    """How often two levels met, on a logarithmic scale; dots: never."""
    of = parameters(tally)
    own = np.zeros(tally.pairs.shape, bool)
    for places in of.values():
        own[np.ix_(places, places)] = True
    met = (tally.pairs > 0) & ~own
    shown = np.where(met, tally.pairs, np.nan)
    most = max(tally.pairs[met].max(initial=1), 10)
    colours = mpl.colormaps["Blues"].with_extremes(bad="#f4f4f4")
    image = ax.imshow(shown, cmap=colours, norm=LogNorm(1, most), interpolation="nearest")
    never = np.argwhere((tally.pairs == 0) & ~own)
    ax.scatter(never[:, 1], never[:, 0], s=2, color=ORANGE, marker="s")
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, location="right" if labels else "top", pad=0.02, aspect=30)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("cases in which both were drawn", fontsize=8)
    if labels:
        words = [f"{name}: {level}" if i == of[name][0] else level for i, (name, level) in enumerate(tally.levels)]
        ax.set_yticks(range(len(words)), words, fontsize=5)
        ax.set_xticks(range(len(words)), words, fontsize=5, rotation=90)
    else:
        middle = [np.mean(places) for places in of.values()]
        ax.set_yticks(middle, of, fontsize=7)
        ax.set_xticks(middle, of, fontsize=7, rotation=90)


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
    """One picture: bands, and pairs of each kind. To be read at the width of a page."""
    columns = 2
    lines = -(-len(tallies) // columns)
    heights = [0.24 * len(bands) + 1.0, 5.0 * lines]
    figure = plt.figure(figsize=(9.5, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    ax = upper.subplots()
    draw_bands(ax, bands)
    said = "Share of cases by the fraction of its budget that an error reached.\nLine: the worst; diamond: a failure"
    ax.set_title(said, fontsize=9, loc="left")
    places = lower.subplots(lines, columns, squeeze=False).flat
    for (kind, tally), ax in zip(tallies.items(), places):
        draw_pairs(ax, tally, labels=False)
        ax.set_xlabel(f"{kind}: pairs of drawn levels; dots: never together", fontsize=9)
    for ax in places:
        ax.axis("off")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
