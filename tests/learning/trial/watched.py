"""What routers do: how many tokens each expert takes, how much experts remember apart, and whom they remember."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor


def routes_of(model: Any, tokens: Tensor) -> list[tuple[Any, Any]]:
    """Query routes, and those of keys and values, of every layer of mixtures for what it gets in a call."""
    inputs: list[Tensor] = []
    handles = [
        block.attention.register_forward_pre_hook(lambda layer, given: inputs.append(given[0]))
        for block in model.blocks
    ]
    try:
        model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return [block.attention(x, return_routes=True)[-1] for block, x in zip(model.blocks, inputs)]


def loads(model: Any, tokens: Tensor) -> tuple[list[list[float]], list[float]]:
    """By layer: the share of tokens that each expert takes as queries; and how far apart experts remember.

    Apart is the number of different tokens in all memories at the end, as a part of their slots: 1 where no two experts
    remember the same token, 1 / E where all remember the same.
    """
    _, found = model(tokens, return_loads=True)
    taken = found.queries.double().mean(1) / tokens.shape[1]
    apart = []
    for _, memory in routes_of(model, tokens):
        held = _held(memory)
        different = [len(row[row >= 0].unique()) / max(int((row >= 0).sum()), 1) for row in held.flatten(1)]
        apart.append(sum(different) / len(different))
    return taken.tolist(), apart


def _held(memory: Any) -> Int64[Tensor, "B E K"]:
    """Tokens remembered at the end, -1 in empty slots."""
    if hasattr(memory, "positions"):
        return memory.positions[:, :, -1]
    return memory.indices.masked_fill(~memory.mask, -1)


def picks(model: Any, tokens: Tensor) -> dict[str, Any]:
    """Of one sequence (1, N), for each layer and expert: how many blocks remember a token, and who is a query.

    As text, a number for each token. In an encoder, which has no blocks, a token is remembered once or not.
    """
    n, layers = tokens.shape[1], []
    for queries, memory in routes_of(model, tokens):
        if hasattr(memory, "positions"):
            stays = stays_of(memory.positions[0], n)
        else:
            stays = _members(memory.indices[0], memory.mask[0], n)
        asked = _members(queries.indices[0].flatten(1), queries.mask[0].flatten(1), n)
        layers.append([{"stays": _written(a), "queries": _written(b)} for a, b in zip(stays.cpu(), asked.cpu())])
    return {"tokens": _written(tokens[0].cpu()), "layers": layers}


def stays_of(positions: Int64[Tensor, "E J K"], n: int) -> Int64[Tensor, "E N"]:
    """For how many blocks an expert remembers each token. From the block after its own on, without a gap."""
    return _members(positions.flatten(1), positions.flatten(1) >= 0, n)


def _members(indices: Tensor, there: Tensor, n: int) -> Tensor:
    """How often each of n tokens is among those of its row that are there."""
    counts = torch.zeros(len(indices), n, dtype=torch.int64, device=indices.device)
    return counts.scatter_add(1, indices.clamp_min(0), there.long())


def _written(numbers: Tensor) -> str:
    return " ".join(str(n) for n in numbers.tolist())


def read(text: str) -> list[int]:
    return [int(n) for n in text.split()]
