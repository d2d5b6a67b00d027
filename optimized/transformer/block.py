"""A block: attention and a gated feed-forward, each of the normalised sum of all that came before, and added to it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from optimized.transformer.attentions import CALLS, Call, Load, attention_of
from optimized.transformer.config import TransformerConfig

EPS = 1e-6  # of all norms of the model
READS = ("to_q.weight", "to_kv.weight", "to_qkv.weight", "to_hidden.weight")
WRITES = "to_out.weight"


class SwiGLU(nn.Module):
    """to_out(silu(gate) * up).

    State: to_hidden.weight (2 hidden, D) with rows (gate, up), to_out.weight (D, hidden).
    """

    def __init__(self, dim: int, hidden: int, **where: Any) -> None:
        super().__init__()
        self.to_hidden = nn.Linear(dim, 2 * hidden, bias=False, **where)
        self.to_out = nn.Linear(hidden, dim, bias=False, **where)

    def reset_parameters(self) -> None:
        self.to_hidden.reset_parameters()
        self.to_out.reset_parameters()

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        gate, up = self.to_hidden(x).chunk(2, -1)
        return self.to_out(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), and then x + feed_forward(norm(x)).

    A mixture has no norm of its own here. So its router reads what its experts read, whatever the scale of the sum has
    become; a norm for each expert besides would only scale what the projections of that expert scale.
    """

    def __init__(self, config: TransformerConfig, kind: str, causal: bool, **where: Any) -> None:
        super().__init__()
        assert config.hidden is not None
        self.kind, self.causal, self.dropout, self.depth = kind, causal, config.dropout, len(config.layers)
        self.attention_norm = nn.RMSNorm(config.dim, EPS, **where)
        self.attention = attention_of(kind, causal, config, where)
        self.feed_forward_norm = nn.RMSNorm(config.dim, EPS, **where)
        self.feed_forward = SwiGLU(config.dim, config.hidden, **where)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As `Decoder` says."""
        part: Any
        for part in self.children():
            part.reset_parameters()
        for name, p in self.named_parameters():
            if name.endswith((*READS, WRITES)):
                scale = (2 * self.depth) ** -0.5 if name.endswith(WRITES) else 1.0
                nn.init.normal_(p, std=scale * p.shape[1] ** -0.5)  # the second size is the fan-in of convolutions too

    def forward(self, x: Float[Tensor, "B N D"], call: Call) -> tuple[Float[Tensor, "B N D"], Any, Load | None]:
        """x, valid tokens first; the cache and the load as far as the call asks for them."""
        attend = CALLS[self.kind, self.causal]
        out, cache, load = attend(self.attention, self.attention_norm(x), call.shared, call.cache)
        x = x + F.dropout(out, self.dropout, self.training)
        out = self.feed_forward(self.feed_forward_norm(x))
        return x + F.dropout(out, self.dropout, self.training), cache, load

    def extra_repr(self) -> str:
        return f"kind={self.kind}"
