"""Models by name: a transformer of this repository, whose kinds of layers differ and whose parameters are as many."""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from optimized import Decoder, Encoder, TransformerConfig

from . import controls, recall, text
from .settings import Settings

# What a router's scores are, beside the number of queries. At the default temperature of 0.03 cosines times 8 saturate.
SOLVERS: dict[str, dict[str, Any]] = {
    "straight-through": {"solver": "sigmoid", "straight_through": True},
    "iterative": {"solver": "iterative", "straight_through": True, "eps": 0.5},
    "iterative-cold": {"solver": "iterative", "straight_through": True},
    "exact": {"solver": "exact", "straight_through": True, "eps": 0.5},
    "exact-cold": {"solver": "exact", "straight_through": True},
    "default": {},
}
CONTROLS = {"random-memory": controls.RandomMemory, "window-top-k": controls.WindowTopK}
ROUND = 8  # a feed-forward is a multiple of it wide


class Pairs(nn.Module):
    """The embedding of a token of recall: that of its symbol plus that of its attribute."""

    def __init__(self, symbols: int, dim: int) -> None:
        super().__init__()
        self.symbol, self.attribute = nn.Embedding(symbols, dim), nn.Embedding(recall.VALUES, dim)
        for table in (self.symbol, self.attribute):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Int64[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
        return self.symbol(tokens // recall.VALUES) + self.attribute(tokens % recall.VALUES)


def config_of(s: Settings, hidden: int | None) -> TransformerConfig:
    kind = s.model if s.model in ("dense", "local") else "mixture"
    mixture: dict[str, Any] = {}
    if kind == "mixture":
        mixture = {"num_routed_queries": s.queries, "num_routed_key_values": s.keys, "num_experts": s.experts}
        mixture |= {"heads": s.heads // s.experts, **SOLVERS.get(s.model, {"solver": "sigmoid"})}
        if s.task == "encoder":
            mixture |= {"cosine_sim_routing": True}
    vocabulary = recall.VALUES * recall.symbols_of(s) if s.task == "recall" else text.VOCABULARY[s.task]
    return TransformerConfig(
        vocabulary,
        s.dim,
        (kind,) * s.layers,
        heads=s.heads,
        dim_head=s.dim_head,
        hidden=hidden,
        window=s.window,
        mixture=mixture,
        tied=s.task != "recall",
        package="reference" if s.model == "reference" else "optimized",
    )


def _made(s: Settings, hidden: int | None, **where: Any) -> nn.Module:
    model: Any = (Encoder if s.task == "encoder" else Decoder)(config_of(s, hidden), **where)
    if s.task == "recall":
        with torch.device(where.get("device", "cpu")):
            model.embedding, model.head = Pairs(recall.symbols_of(s), s.dim), nn.Linear(s.dim, recall.VALUES)
    return model


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@functools.cache
def hidden_of(s: Settings) -> int:
    """The width of the feed-forward that gives a model as many parameters as a sigmoid mixture of width `hidden`."""
    ours = TransformerConfig(1, s.dim, ("dense",)).hidden if not s.hidden else s.hidden
    assert ours is not None
    base = dict(vars(s)) | {"model": "sigmoid", "experts": 1, "keys": s.window, "queries": s.window}
    wanted = parameters_of(_made(Settings(**base), ours, device="meta"))
    least, more = (parameters_of(_made(s, width, device="meta")) for width in (ROUND, 2 * ROUND))
    return max(round((wanted - least) / (more - least)) + 1, 1) * ROUND


def build(s: Settings) -> nn.Module:
    """On the CPU, from torch's seed."""
    model: Any = _made(s, hidden_of(s))
    if s.model in CONTROLS:
        for block in model.blocks:
            block.attention.__class__ = CONTROLS[s.model]
    return model


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, N, classes)."""
    return model(tokens, logits=True) if isinstance(model, Encoder) else model(tokens)
