"""Selection of the K best tokens of a row, and the map from tokens to slots that it leaves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from optimized.ops.registration import fold_rule


@custom_op(
    "moa::select",
    mutates_args=(),
    schema="(Tensor logits, Tensor? mask, SymInt k, bool triton=False) -> (Tensor, Tensor, Tensor)",
)
def select(logits: Tensor, mask: Tensor | None, k: int, triton: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (B, E, K) int64 and slot mask of the k best, and the `inverse_map`.

    Order: valid before masked, larger logit, smaller index.

    The k-th largest key decides: all keys above it are in, and of its equals the first ones. A running count then gives
    each chosen token its slot, in index order, so no second sort. Keys are integers in the order of the floats.
    """
    if triton:
        from optimized.kernels import selection as kernel

        return kernel.select(logits, mask, k)
    key = _order_preserving(logits)
    valid = torch.ones_like(logits, dtype=torch.bool)
    if mask is not None:
        valid = mask[:, None].expand_as(logits)
        key = key.masked_fill(~valid, torch.iinfo(torch.int64).min)
    least = key.topk(k, dim=-1).values[..., -1:]
    above, equal = key > least, key == least
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    chosen_valid = chosen & valid
    slot_valid = chosen_valid.cumsum(-1)
    slot = torch.where(valid, slot_valid, slot_valid[..., -1:] + (chosen & ~valid).cumsum(-1)) - 1
    # Tokens that were not chosen write to one slot past the end.
    slot = torch.where(chosen, slot, k)
    position = torch.arange(logits.shape[-1], device=logits.device).expand_as(slot)
    indices = slot.new_empty(*slot.shape[:2], k + 1).scatter_(-1, slot, position)[..., :k].contiguous()
    inverse = torch.where(chosen_valid, slot, -1).int().contiguous()
    return indices, valid.gather(-1, indices), inverse


def _order_preserving(logits: Tensor) -> Tensor:
    """int64 keys with the order of the floats: -0.0 and 0.0 equal, NaN below -inf (and above the masked key)."""
    floats = logits + 0.0
    wide = torch.int32 if logits.dtype == torch.float32 else torch.int64
    bits = floats.view(wide)
    # Flipping all but the sign bit of a negative float turns sign-magnitude order into integer order.
    key = torch.where(bits < 0, bits ^ torch.iinfo(wide).max, bits).long()
    return key.masked_fill(logits.isnan(), torch.iinfo(torch.int64).min + 1)


@select.register_fake
def _(logits, mask, k, triton=False):  # type: ignore[no-untyped-def]
    shape = (*logits.shape[:2], k)
    inverse = torch.empty_like(logits, dtype=torch.int32, memory_format=torch.contiguous_format)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.bool), inverse


def inverse_map(indices: Tensor, mask: Tensor, n: int) -> Tensor:
    """(B, E, N) int32: the slot that holds a token, or -1. Masked slots hold nothing; indices are distinct in a row."""
    slots = torch.arange(indices.shape[-1], device=indices.device, dtype=torch.int32)
    empty = indices.new_full((*indices.shape[:2], n), -1, dtype=torch.int32)
    return empty.scatter(-1, indices, torch.where(mask, slots, -1))


select.register_vmap(fold_rule(select, (0, 0, 0, 0), (0, 0, 0)))
