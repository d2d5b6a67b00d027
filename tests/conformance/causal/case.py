"""One call of a strictly causal layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.strategies import LayerCase, generator


@dataclass(frozen=True)
class CausalCase(LayerCase):
    """As `LayerCase`. window, block: w and W. cut: the first token that is changed. pieces: lengths, their sum N."""

    LETTERS: ClassVar[dict[str, str]] = LayerCase.LETTERS | {"window": "w", "block": "W"}

    window: int = 4
    block: int = 4
    cut: int | None = None
    pieces: tuple[int, ...] = ()

    def arguments(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "num_routed_queries": self.k_q,
            "num_routed_key_values": self.k_kv,
            "local_attn_window_size": self.window,
            "routed_window_size": self.block,
            "num_experts": self.experts,
            "dim_head": self.dim_head,
            "heads": self.heads,
            "dropout": 0.0,
            "prenorm": self.prenorm,
            "average_routed": self.average,
            **self.options,
        }

    def state(self) -> dict[str, Tensor]:
        """Parameters in float64, all of them random."""
        state = super().state()
        near = self.options.get("local_attn_heads", self.heads)
        if near != self.heads:
            other = LayerCase.state(replace(self, heads=near, options={}))
            state |= {name: t for name, t in other.items() if name.startswith("local_attn.")}
        state["null_tokens"] = torch.randn(
            self.experts, self.dim, generator=generator(self.seed + 12), dtype=torch.float64
        )
        return state
