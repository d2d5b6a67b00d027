"""Draws docs/pictures/saturation.png: how far 20 iterations of coordinate descent are from a soft top-k.

Run from the repository root.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from reference import capped_simplex, coordinate_descent

N, K = 8192, 1024 * 9 / 8
SPREADS = {1.0: "#0072B2", 8.0: "#E69F00", 32.0: "#CC79A7"}  # Okabe and Ito's


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    unit = torch.randn(1, 1, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5.0), layout="constrained")
    iterations = [*range(1, 31), 35, 40, 50, 70, 100, 150, 200, 300, 500, 1000]
    for spread, colour in SPREADS.items():
        logits = spread * unit
        scores = coordinate_descent(logits, K).flatten()
        saturated = int((scores == 1).sum())
        label = f"std {spread:g}: mass {scores.sum():.0f}, {saturated} tokens at exactly 1"
        left.plot(scores.sort(descending=True).values[:3200], color=colour, label=label)
        left.plot(capped_simplex(logits, K).flatten().sort(descending=True).values[:3200], color=colour, ls=":")
        mass = [coordinate_descent(logits, K, n_iters=n).sum().item() for n in iterations]
        right.plot(iterations, mass, color=colour, label=f"std {spread:g}")
        print(f"std {spread:g}: mass {scores.sum():.1f} of {K:g}, {saturated} saturated")
    left.plot([], [], color="grey", ls=":", label='solver="exact": mass 1152')
    left.set(xlabel="token, best first", ylabel="soft score", title="Soft scores after 20 iterations")
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    right.axhline(K, color="grey", ls=":", label="target mass")
    right.axvline(20, color="grey", lw=0.8)
    right.set(xscale="log", xlabel="iterations (default 20)", ylabel="mass", title="Total mass against iterations")
    right.legend(fontsize=8)
    figure.suptitle(f"N = {N} tokens, K = 1024 slots, target mass K * 9/8 = {K:g}, Gaussian logits")
    figure.savefig(Path(__file__).parent / "pictures" / "saturation.png", dpi=110)


if __name__ == "__main__":
    main()
