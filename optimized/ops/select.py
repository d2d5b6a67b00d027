"""Selection of the K best tokens of a row, and the map from tokens to slots that it leaves.

Letters: B batch, N tokens, E experts, K slots per expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimized.ops.operator import operator


@operator(
    "(Tensor logits, Tensor? mask, SymInt k, bool triton) -> (Tensor indices, Tensor slots, Tensor inverse)",
    folds={"logits": 0, "mask": 0, "indices": 0, "slots": 0, "inverse": 0},
)
class select:
    """Indices (B, E, K) int64 and slot mask of the k best of logits (B, E, N), and the `inverse_map`. No gradient.

    Rank: valid before masked, larger logit, smaller index; NaN below every number. logits: float32 or float64.
    """

    def forward(a):  # type: ignore[no-untyped-def]
        if a.triton:
            from optimized.kernels import selection as kernel

            return kernel.select(a.logits, a.mask, a.k)
        logits = a.logits.contiguous()
        return place(choose(logits, a.mask, a.k), a.mask, a.k)

    def fake(a):  # type: ignore[no-untyped-def]
        shape = (*a.logits.shape[:2], a.k)
        inverse = torch.empty_like(a.logits, dtype=torch.int32, memory_format=torch.contiguous_format)
        return a.logits.new_empty(shape, dtype=torch.int64), a.logits.new_empty(shape, dtype=torch.bool), inverse


def choose(logits: Tensor, mask: Tensor | None, k: int) -> Tensor:
    """Which tokens are among the k best, (B, E, N).

    The k-th largest key decides: all keys above it are in, and of its equals the first ones.
    """
    key = _order_preserving(logits)
    if mask is not None:
        key = key.masked_fill(~mask[:, None], torch.iinfo(torch.int64).min)
    least = key.topk(k, dim=-1).values[..., -1:]
    above, equal = key > least, key == least
    room = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def place(chosen: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots of the chosen tokens, k in each row: indices and slot mask (B, E, K), and the inverse map (B, E, N).

    Valid tokens ascending, then masked ones ascending. A running count gives each its slot, so no sort.
    """
    valid = chosen if mask is None else chosen & mask[:, None]
    slot_valid = valid.cumsum(-1)
    slot = slot_valid - 1
    if mask is not None:
        masked = slot_valid[..., -1:] + (chosen & ~mask[:, None]).cumsum(-1) - 1
        slot = torch.where(mask[:, None], slot, masked)
    # Tokens that were not chosen write to one slot past the end.
    position = torch.arange(chosen.shape[-1], device=chosen.device).expand_as(slot)
    scattered = slot.new_empty(*slot.shape[:2], k + 1).scatter_(-1, torch.where(chosen, slot, k), position)
    indices = scattered[..., :k].contiguous()
    inverse = torch.where(valid, slot, -1).int().contiguous()
    return indices, valid.gather(-1, indices), inverse


def _order_preserving(logits: Tensor) -> Tensor:
    """int64 keys with the order of the floats: -0.0 and 0.0 equal, NaN below -inf (and above the masked key)."""
    floats = logits + 0.0
    wide = torch.int32 if logits.dtype == torch.float32 else torch.int64
    bits = floats.view(wide)
    # Flipping all but the sign bit of a negative float turns sign-magnitude order into integer order.
    key = torch.where(bits < 0, bits ^ torch.iinfo(wide).max, bits).long()
    return key.masked_fill(logits.isnan(), torch.iinfo(torch.int64).min + 1)
