"""How many bytes a rank sends in a call: by formulas, and counted.

An all-gather of t bytes, and a reduce-scatter to t bytes, send t (R - 1) of a rank; an all-reduce of t bytes
2 t (R - 1) / R; an exchange what is for others.

Letters: B batch, N tokens, R ranks, L = N / R rounded up, E experts, S = R / gcd(E, R) pieces of an expert's
query slots, c = B E / R rounded up rows of a side that a rank solves.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optimized.ops.blocks import sizes
from optimized.parallel.shards import Shard
from reference.autoregressive_contract import AutoregressiveConfig
from reference.contract import Config


class Sent(NamedTuple):
    """Bytes of a rank, either way."""

    forward: int
    backward: int


class Setting(NamedTuple):
    """What decides besides the layer. number: bytes of a number of x; masked: there is a mask."""

    ranks: int
    batch: int
    n: int
    number: int
    masked: bool = False
    rank: int = 0

    @property
    def each(self) -> int:
        return -(-self.n // self.ranks)

    @property
    def wide(self) -> int:
        """Of logits and scores."""
        return max(self.number, 4)

    def others(self, count: int) -> int:
        """What of `count` bytes for all ranks is for others."""
        return count * (self.ranks - 1) // self.ranks


def context_parallel(c: Config, s: Setting) -> dict[str, Sent]:
    """Of self-attention, by what is sent."""
    options = c.options
    found: dict[str, Sent] = {}
    pieces = s.ranks // math.gcd(c.num_experts, s.ranks)
    block, ks = options.route_block_size, (c.num_routed_queries, c.num_routed_key_values)
    own_blocks = block is not None and s.each < s.n and s.each % block == 0 and s.n > max(ks)
    if own_blocks:
        assert block is not None
        per_block = [-(-k // -(-s.n // block)) for k in ks]
        slots = [s.each // block * min(k, block) for k in per_block]
    else:
        slots = [sizes(s.n, k, block)[0] for k in ks]
    piece = -(-slots[0] // pieces)
    units = s.batch * c.num_experts * pieces
    if s.masked:
        found["mask"] = Sent(s.batch * s.each * (s.ranks - 1), 0)
    if own_blocks:
        scores = s.others(units * slots[1] * s.wide)
        found["decisions"] = Sent(scores + s.others(units * 4 * (piece + slots[1])), scores)
        if options.solver != "sigmoid":
            found["flags"] = Sent(2 * s.others(4 * s.batch * 2 * c.num_experts), 0)
    else:
        count = -(-s.batch * c.num_experts // s.ranks)
        logits = (s.ranks - 1) * 2 * count * s.each * s.wide
        found["logits"] = Sent(logits, logits)
        decided = (s.ranks - 1) * count * sum(slots)
        found["decisions"] = Sent(decided * (4 + s.wide), decided * s.wide)
    rows = s.others(units * (piece * c.dim + slots[1] * c.dim_context) * s.number)
    outputs = s.others(units * piece * c.dim * s.number)
    found |= {"rows": Sent(rows, rows), "outputs": Sent(outputs, outputs)}
    if c.local_attn_window_size is not None:
        found["neighbours"] = _neighbours(s, c.dim, c.local_attn_window_size, c.local_attn_window_size)
    return found


def sharded_experts(c: Config, s: Setting) -> dict[str, Sent]:
    """Besides: routing tokens and scales of all experts for all ranks, and the gradients of what is not by expert."""
    kinds = (not c.options.learned_routing_tokens) + c.prenorm
    by_expert = s.others(kinds * c.num_experts * (c.dim + c.dim_context) * s.number)
    common = c.dim
    if c.local_attn_window_size is not None:
        common = 4 * c.heads * c.dim_head * c.dim + 2 * c.dim * c.prenorm
    return {"parameters": Sent(by_expert, by_expert + 2 * s.others(common * s.number))}


def expert_parallel(c: Config | AutoregressiveConfig, s: Setting) -> dict[str, Sent]:
    """One all-reduce either way: forward in at least float32, with the number of terms where somebody asks for it."""
    numbers = s.batch * s.n * c.dim
    counted = isinstance(c, Config) and (c.local_attn_window_size is None or c.average_routed)
    forward = 2 * s.others((numbers + s.batch * s.n * counted) * s.wide)
    return {"sums": Sent(forward, 2 * s.others(numbers * s.number))}


def causal_context_parallel(c: AutoregressiveConfig, s: Setting) -> dict[str, Sent]:
    """Logits of all tokens for all ranks, the rows of every rank's memory, and neighbours."""
    logits = (s.ranks - 1) * s.batch * 2 * c.num_experts * s.each * s.wide
    rows = (s.ranks - 1) * s.batch * c.num_experts * c.num_routed_key_values * c.dim * s.number
    before = max(c.local_attn_window_size, c.routed_window_size - 1)
    return {
        "logits": Sent(logits, logits),
        "rows": Sent(rows, rows),
        "neighbours": _neighbours(s, c.dim, before, 0),
    }


def _neighbours(s: Setting, dim: int, before: int, after: int) -> Sent:
    """Forward what other ranks want of this one, backward what this one wanted of them."""
    shards = [Shard.of(s.n, s.ranks, r) for r in range(s.ranks)]
    own = shards[s.rank]

    def between(of: Shard, owner: Shard) -> int:
        if of is owner or not of.size:
            return 0
        return max(min(of.end + after, owner.end) - max(of.start - before, owner.start), 0)

    each = s.batch * dim * s.number
    return Sent(each * sum(between(q, own) for q in shards), each * sum(between(own, q) for q in shards))


def total(found: dict[str, Sent]) -> Sent:
    return Sent(sum(v.forward for v in found.values()), sum(v.backward for v in found.values()))


class Traffic(TorchDispatchMode):
    """Counts what this rank sends while it is entered, `bytes`, and by how many collectives, `calls`."""

    def __init__(self, ranks: int, rank: int) -> None:
        super().__init__()
        self.ranks, self.rank = ranks, rank
        self.bytes, self.calls = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(func).partition(".")
        name = name.partition(".")[0]
        if namespace == "_c10d_functional" and name in _SENT:
            self.calls += 1
            self.bytes += _SENT[name](self, args)
        return func(*args, **(kwargs or {}))


def _bytes(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()


_SENT: dict[str, Any] = {
    "all_gather_into_tensor": lambda t, args: _bytes(args[0]) * (t.ranks - 1),
    "reduce_scatter_tensor": lambda t, args: _bytes(args[0]) * (t.ranks - 1) // t.ranks,
    "all_reduce": lambda t, args: 2 * (_bytes(args[0]) * (t.ranks - 1) // t.ranks),
    "all_to_all_single": lambda t, args: (
        (sum(args[2]) - args[2][t.rank]) * args[0][:1].numel() * args[0].element_size()
    ),
}
