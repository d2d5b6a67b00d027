"""The routing map of `python -m optimized --plot FILE`. matplotlib is imported when it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimized.prove.decisions import picked
from optimized.prove.report import colour
from optimized.prove.text import Text
from optimized.routing import Routes

BINS = 64


def draw(path: Path, text: Text, queries: Routes, keys_values: Routes, soft: Tensor, mass: float) -> None:
    """Which tokens each expert picks along the text, how densely, and from which distribution of logits.

    Routes of one batch item; soft (E, N): the query routers' soft scores, whose sum aims at `mass`.
    """
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    experts, n = queries.logits[0].shape
    slots = queries.indices.shape[-1]
    figure = Figure(figsize=(10.5, 5.4 + 0.7 * min(experts, 12)), dpi=110, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(5, 2), height_ratios=(0.75 * min(experts, 12) + 0.8, 2.6))
    reached = 100 * picked(queries)[0].any(0).double().mean().item()
    figure.suptitle(
        f"{text.name}: {n} tokens, {experts} experts with {slots} slots each\n"
        f"Seeded routers, not trained: {reached:.0f} % of the tokens are picked as a query by at least one expert",
        fontsize=11,
    )
    raster = figure.add_subplot(grid[0, 0])
    _raster(raster, queries, keys_values)
    _density(figure.add_subplot(grid[1, 0], sharex=raster), queries)
    _logits(figure.add_subplot(grid[0, 1]), queries.logits[0].cpu(), slots)
    _soft(figure.add_subplot(grid[1, 1]), soft.cpu(), slots, mass)
    raster.set_xlim(0, n)
    raster.tick_params(labelbottom=False)
    figure.savefig(path)


def _raster(axes: Any, queries: Routes, keys_values: Routes) -> None:
    experts = queries.indices.shape[1]
    for e in range(experts):
        for routes, row, shade in ((queries, 2 * e, 0.9), (keys_values, 2 * e + 1, 0.45)):
            at = routes.indices[0, e].tolist()
            axes.vlines(at, row + 0.06, row + 0.94, color=colour(e), alpha=shade, linewidth=0.35)
        if e:
            axes.axhline(2 * e, color="0.75", linewidth=0.8)
    labels = [f"expert {e}  {what}" for e in range(1, experts + 1) for what in ("queries", "keys/values")]
    axes.set_yticks([i + 0.5 for i in range(2 * experts)], labels, fontsize=8)
    axes.set_ylim(2 * experts, 0)
    axes.set_title("Tokens that each expert picked (one stroke per token)", fontsize=10)


def _density(axes: Any, queries: Routes) -> None:
    _, experts, n = queries.logits.shape
    slots = queries.indices.shape[-1]
    bins = min(BINS, n // 16)
    edges = torch.linspace(0, n, bins + 1, dtype=torch.float64)
    for e in range(experts):
        counts = torch.histogram(queries.indices[0, e].cpu().double(), edges).hist
        share = 100 * counts / edges.diff()
        axes.stairs(share.tolist(), edges.tolist(), color=colour(e), linewidth=1.6, label=f"expert {e + 1}")
    axes.axhline(100 * slots / n, color="0.3", linestyle="--", linewidth=1, label=f"even: {100 * slots / n:.1f} %")
    axes.set(xlabel="token position", ylabel="picked as query, %", ylim=(0, 1.25 * axes.dataLim.ymax))
    axes.set_title(f"Share of the tokens picked, in stretches of {n / bins:.0f}", fontsize=10)
    axes.legend(fontsize=8, ncols=min(experts + 1, 5), loc="upper right")
    axes.grid(axis="y", alpha=0.3)


def _logits(axes: Any, logits: Tensor, slots: int) -> None:
    logits = logits.double()
    edges = torch.linspace(logits.min().item(), logits.max().item(), 61, dtype=torch.float64)
    for e, row in enumerate(logits):
        counts = torch.histogram(row, edges).hist
        threshold = row.topk(slots).values[-1].item()
        axes.stairs(counts.tolist(), edges.tolist(), color=colour(e), linewidth=1.4, label=f"> {threshold:.2f}")
        axes.axvline(threshold, color=colour(e), linestyle="--", linewidth=1)
    axes.set(xlabel="query routing logit", ylabel="tokens", ylim=(0, 1.5 * axes.dataLim.ymax))  # room for the legend
    axes.set_title(f"Logits; the top {slots} are picked", fontsize=10)
    axes.legend(fontsize=8, title="picked by expert 1, ...", title_fontsize=8)


def _soft(axes: Any, soft: Tensor, slots: int, mass: float) -> None:
    for e, row in enumerate(soft):
        label = f"mass {row.sum().item():.0f} of {mass:.0f}"
        axes.plot(row.sort(descending=True).values.tolist(), color=colour(e), linewidth=1.4, label=label)
    axes.axvline(slots, color="0.3", linestyle="--", linewidth=1, label=f"{slots} slots")
    axes.set(xlabel="token, best first", ylabel="soft score", xlim=(0, min(3 * slots, soft.shape[-1])), ylim=(0, 1.05))
    axes.set_title("Soft scores, of which gradients are", fontsize=10)
    axes.legend(fontsize=8)
