"""Memory of blocks: the best of all that came before each.

Letters: B batch, E experts, L columns, J blocks, W length of a block, K slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized.ops.operator import operator
from optimized.ops.select import _order_preserving


@operator(
    "(Tensor logits, Tensor? valid, SymInt k, SymInt block, SymInt prior, bool triton)"
    " -> (Tensor indices, Tensor counts)",
    folds=dict.fromkeys(("logits", "valid", "indices", "counts"), 0),
)
class memory:
    """Of each block, the k best of the columns before it.

    Rank: number before NaN, larger logit, later column.

    Args:
        logits: (B, E, L), float32 or float64: of `prior` columns, then of J blocks, L = prior + J W.
        valid: (B, L) bool, None for all: other columns are never chosen.
        k: K, at least 1. block: W, at least 1.
    Returns, without gradient, indices (B, E, J, K) int32, columns ascending, and counts (B, E, J) int32, how many there
    are, the first ones; the other places hold 0.
    """

    def forward(a: Any) -> Any:
        if a.triton:
            from optimized.kernels import memory as kernel

            return kernel.memory(a.logits, a.valid, a.k, a.block, a.prior)
        keys = _order_preserving(a.logits.contiguous())
        valid = torch.ones_like(keys, dtype=torch.bool) if a.valid is None else a.valid[:, None].expand_as(keys)
        columns = torch.arange(keys.shape[-1], device=keys.device).expand_as(keys)
        held, there = columns[..., :0], valid[..., :0]
        indices, counts, end = [], [], 0
        for start in range(a.prior, keys.shape[-1], a.block):
            held = torch.cat((held, columns[..., end:start]), -1)
            there = torch.cat((there, valid[..., end:start]), -1)
            end = start
            held, there = _best(keys, held, there, a.k)
            padding = (0, a.k - held.shape[-1])
            indices.append(torch.nn.functional.pad(torch.where(there, held, 0), padding).int())
            counts.append(there.sum(-1).int())
        if not indices:
            empty = a.logits.new_empty(*a.logits.shape[:2], 0, a.k, dtype=torch.int32)
            return empty, empty.new_empty(empty.shape[:3])
        return torch.stack(indices, 2), torch.stack(counts, 2)

    def fake(a: Any) -> Any:
        batch, experts, n = a.logits.shape
        blocks = (n - a.prior) // a.block
        indices = a.logits.new_empty(batch, experts, blocks, a.k, dtype=torch.int32)
        return indices, a.logits.new_empty(batch, experts, blocks, dtype=torch.int32)


def _best(keys: Tensor, held: Tensor, there: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """At most k of the columns `held`, ascending, those that are there first."""
    if held.shape[-1] > k:
        key = torch.where(there, keys.gather(-1, held), torch.iinfo(torch.int64).min).flip(-1)
        least = key.topk(k, dim=-1).values[..., -1:]
        above, equal = key > least, key == least
        room = k - above.sum(-1, keepdim=True)
        there = there & (above | (equal & (equal.cumsum(-1) <= room))).flip(-1)  # of equals, the later ones
    order = (~there).byte().argsort(dim=-1, stable=True)[..., :k]
    return held.gather(-1, order), there.gather(-1, order)
