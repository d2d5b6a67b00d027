"""Draws docs/pictures/parallel.png, what moves between ranks, and docs/pictures/volumes.png, how much.

Run from the repository root.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import NullFormatter

from optimized.parallel import volume
from optimized.parallel.volume import Setting
from reference.contract import Config

BLUE, SKY, ORANGE, PURPLE = "#0072B2", "#56B4E9", "#E69F00", "#CC79A7"  # Okabe and Ito's: no red beside green
PICTURES = Path(__file__).parent / "pictures"
N, DIM, EXPERTS, NUMBER = 2**20, 1024, 4, 2
RANKS = (2, 4, 8, 16, 32)
STEPS = (
    ("x", "n tokens\nof each rank"),
    ("logits", "all-to-all:\na row whole\nto one rank, which\nsolves and selects"),
    ("decisions", "all-gather:\nindices, scores"),
    ("rows", "reduce-scatter:\nK rows an expert,\nto the rank that\nhas it"),
    ("outputs", "all-gather:\nwhat the experts\nhave"),
    ("out", "n tokens\nof each rank"),
)


def diagram() -> None:
    figure, axes = plt.subplots(figsize=(9.5, 5.2), layout="constrained")
    axes.set(xlim=(-0.2, 6.2), ylim=(-1.3, 4.6))
    axes.axis("off")
    colours = (BLUE, ORANGE, SKY, PURPLE)
    for i, (name, what) in enumerate(STEPS):
        axes.text(i + 0.3, 4.35, name, ha="center", weight="bold")
        axes.text(i + 0.3, -0.15, what, ha="center", va="top", fontsize=9)
        for rank, colour in enumerate(colours):
            y = 3 - rank
            if i == 0:
                axes.text(-0.12, y + 0.4, f"rank {rank}", ha="right", va="center", fontsize=9)
            height = 0.8 / 4
            for part in range(4):
                shown = colour if name in ("x", "out") else colours[part]
                axes.add_patch(
                    Rectangle((i, y + 0.8 - (part + 1) * height), 0.6, height, color=shown, alpha=0.75, lw=0)
                )
    for i in range(5):
        for a in range(4):
            for b in range(4) if i < 4 else [a]:  # the last step is each rank's own
                arrow = FancyArrowPatch(
                    (i + 0.62, 3.4 - a), (i + 0.98, 3.4 - b), arrowstyle="-", lw=0.5, color="grey", mutation_scale=6
                )
                axes.add_patch(arrow)
    figure.suptitle("ContextParallel on four ranks. Colours: whose tokens; gradients go the same way back", fontsize=10)
    figure.savefig(PICTURES / "parallel.png", dpi=110)


def gigabytes(slots: int, ranks: int, block: int | None = None) -> float:
    options: dict[str, Any] = {} if block is None else {"route_block_size": block}
    c = Config.of(dim=DIM, num_routed_queries=slots, num_routed_key_values=slots, num_experts=EXPERTS, **options)
    return sum(volume.total(volume.context_parallel(c, Setting(ranks, 1, N, NUMBER)))) / 1e9


def volumes() -> None:
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    inner = N * DIM * NUMBER
    axes.plot(RANKS, [6 * inner * (r - 1) / r / 1e9 for r in RANKS], "k--", label="ring attention")
    axes.plot(RANKS, [8 * inner * (r - 1) / r**2 / 1e9 for r in RANKS], "k:", label="Ulysses")
    for slots, colour in ((1024, SKY), (8192, BLUE), (32768, PURPLE), (N // 8, ORANGE)):
        found = [gigabytes(slots, r) for r in RANKS]
        axes.plot(RANKS, found, "o-", color=colour, label=f"this layer, K = {slots}")
        print(slots, [f"{g:.3g}" for g in found])
    aligned = [gigabytes(N // 8, r, N // r) for r in RANKS]
    axes.plot(RANKS, aligned, "s--", color=ORANGE, label=f"the same, K = {N // 8}, blocks aligned")
    print("aligned", [f"{g:.3g}" for g in aligned])
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="GB that a rank sends, forward + backward")
    axes.set_xticks(RANKS, [str(r) for r in RANKS])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"What a rank sends, computed: N = {N} tokens, D {DIM}, E {EXPERTS}, bfloat16", fontsize=10)
    figure.legend(fontsize=9, loc="outside lower center", ncols=3, frameon=False)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(PICTURES / "volumes.png", dpi=110)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    diagram()
    volumes()
