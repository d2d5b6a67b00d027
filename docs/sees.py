"""docs/pictures/causal.png: what each token of the causal layer sees, of a small layer as it is seeded.

Run from the repository root: `python docs/sees.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from reference import MixtureOfAutoregressiveAttention  # noqa: E402

N, W, WINDOW, K, KQ, EXPERTS = 80, 16, 10, 12, 5, 2
NOTHING, NEAR, REMEMBERED, BOTH = range(4)
COLOURS = ("#ffffff", "#9ecae9", "#e69f00", "#8a5a00")


def seen() -> torch.Tensor:
    """(E, N, N): what token i sees of token j, as an expert and the window show it."""
    torch.manual_seed(4)
    layer = MixtureOfAutoregressiveAttention(
        32, num_routed_queries=KQ, num_routed_key_values=K, local_attn_window_size=WINDOW, routed_window_size=W,
        num_experts=EXPERTS, dim_head=8, heads=2,
    )  # fmt: skip
    with torch.no_grad():
        _, (queries, memory) = layer(torch.randn(1, N, 32), return_routes=True)
    back = torch.arange(N)[:, None] - torch.arange(N)
    near = ((back >= 0) & (back <= WINDOW)).expand(EXPERTS, N, N)
    remembered = torch.zeros(EXPERTS, N, N, dtype=torch.bool)
    for e in range(EXPERTS):
        for block in range(N // W):
            rows = queries.indices[0, e, block][queries.mask[0, e, block]]
            columns = memory.positions[0, e, block][memory.mask[0, e, block]]
            remembered[e, rows[:, None], columns] = True
    return near.long() * NEAR + remembered.long() * REMEMBERED


def draw(path: Path) -> None:
    figure = Figure(figsize=(9, 5.1), dpi=130, layout="constrained")
    for e, axis in enumerate(figure.subplots(1, EXPERTS, sharey=True)):
        axis.imshow(seen()[e], cmap=ListedColormap(COLOURS), vmin=NOTHING, vmax=BOTH, interpolation="nearest")
        for border in range(W, N, W):
            axis.axhline(border - 0.5, color="0.45", linewidth=0.8)
            axis.axvline(border - 0.5, color="0.8", linewidth=0.5)
        axis.set(title=f"expert {e + 1}", xlabel="token that is seen")
        axis.set_xticks(range(0, N + 1, W))
        axis.set_yticks(range(0, N + 1, W))
    figure.axes[0].set_ylabel("token that sees; a line begins a block")
    named = {NEAR: f"window: the {WINDOW} tokens before, and itself", REMEMBERED: f"memory of the expert: {K} tokens"}
    handles = [Patch(color=COLOURS[kind], label=label) for kind, label in (*named.items(), (BOTH, "both"))]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(
        f"What a token sees: N {N}, W {W}, w {WINDOW}, K {K}, Kq {KQ}. Rows with a memory are the expert's queries;\n"
        "its memory changes from block to block, and a token that was dropped never comes back (seeded, not trained)",
        fontsize=9.5,
    )
    figure.savefig(path)


if __name__ == "__main__":
    draw(ROOT / "docs" / "pictures" / "causal.png")
