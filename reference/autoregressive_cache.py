"""What a strictly causal layer remembers of a sequence: of constant size, a value that is never changed in place.

Of the tokens before the unfinished block each expert keeps its memory, with rotated keys, and the rank's logits; of the
unfinished block, tokens and logits, since a block joins the memory as a whole. It does so when the first token of the
next block comes: until then the newest tokens, up to W, can be taken back (`crop`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int64, Integer
from torch import Tensor

from reference import contract
from reference.autoregressive_contract import AutoregressiveConfig

if TYPE_CHECKING:
    from typing_extensions import Self

    from reference.autoregressive import Laid, Memory


def take(t: Tensor, dim: int, index: Tensor) -> Tensor:
    """Along dim, by an index that has all dimensions up to it and takes its place; dimensions behind come along."""
    index = index.expand(*t.shape[:dim], *index.shape[dim:])
    flat, behind = index.flatten(dim), t.shape[dim + 1 :]
    wide = flat.reshape(*flat.shape, *(1 for _ in behind)).expand(*flat.shape, *behind)
    return t.gather(dim, wide).reshape(*index.shape, *behind)


@dataclass(frozen=True, eq=False)
class Cache:
    """Letters: B batch, E experts, K places of memory, H heads, d head dimension, W block size; w window and h heads of
    local attention.
    """

    length: Int64[Tensor, " B"]  # valid tokens so far
    start: Int64[Tensor, " B"]  # position of the unfinished block's first token
    keys: Float[Tensor, "B E K H d"]  # of the memory, rotated
    values: Float[Tensor, "B E K H d"]  # not scored
    logits: Float[Tensor, "B E K"]
    positions: Int64[Tensor, "B E K"]  # ascending; -1 where empty
    poisoned: Bool[Tensor, "B E"]  # whether a key/value logit before the unfinished block was NaN
    threshold: Float[Tensor, "B E"]  # for queries of the unfinished block
    dual: Float[Tensor, "B E"]  # of a solver, for their scores
    tail: Float[Tensor, "B W D"]  # tokens of the unfinished block
    tail_q_logits: Float[Tensor, "B E W"]
    tail_kv_logits: Float[Tensor, "B E W"]
    local_keys: Float[Tensor, "B w+W h d"]  # of positions start - w and on, rotated
    local_values: Float[Tensor, "B w+W h d"]
    passed: int  # tokens ever passed, masked ones too
    rotary: bool  # whether rotary_emb is given

    @classmethod
    def empty(cls, c: AutoregressiveConfig, x: Tensor, rotary: bool) -> Self:
        """Before the first token of x's batch."""
        batch, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
        width, near = c.routed_window_size, c.local_attn_window_size + c.routed_window_size

        def zeros(*shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=x.device)

        memory = c.num_experts, c.num_routed_key_values
        return cls(
            length=zeros(dtype=torch.int64),
            start=zeros(dtype=torch.int64),
            keys=zeros(*memory, c.heads, c.dim_head),
            values=zeros(*memory, c.heads, c.dim_head),
            logits=zeros(*memory, dtype=wide),
            positions=zeros(*memory, dtype=torch.int64) - 1,
            poisoned=zeros(c.num_experts, dtype=torch.bool),
            threshold=zeros(c.num_experts, dtype=wide) + torch.nan,
            dual=zeros(c.num_experts, dtype=wide),
            tail=zeros(width, c.dim),
            tail_q_logits=zeros(c.num_experts, width, dtype=wide),
            tail_kv_logits=zeros(c.num_experts, width, dtype=wide),
            local_keys=zeros(near, c.local_attn_heads, c.dim_head),
            local_values=zeros(near, c.local_attn_heads, c.dim_head),
            passed=0,
            rotary=rotary,
        )

    def select(self, index: Integer[Tensor, " B2"]) -> Self:
        """Of these batch items, in this order: some repeated, or left out. Raises ValueError beyond."""
        contract.tensor("index", index, "B", dtypes=(torch.int64, torch.int32), beside=self.length)
        items = self.length.shape[0]
        if ((index < 0) | (index >= items)).any():
            contract.reject("index", f"from 0 to {items - 1}, items of the batch", str(index.tolist()))
        return self._each(lambda t: t.index_select(0, index))

    def crop(self, n: int | Integer[Tensor, " B"]) -> Self:
        """Without the newest n valid tokens: as many as came since a block last joined the memory, or fewer.

        n: of all items, or of each. Raises ValueError beyond.
        """
        kept = self.length - self.start
        if not isinstance(n, Tensor):
            n = torch.full_like(kept, contract.integer("n", n, least=0))
        contract.tensor("n", n, kept.shape[0], dtypes=(torch.int64, torch.int32), beside=kept)
        if ((n < 0) | (n > kept)).any():
            contract.reject("n", f"from 0 to {kept.tolist()}, the tokens of the unfinished block", str(n.tolist()))
        return replace(self, length=self.length - n)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {name: change(t) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **changed)

    def sizes(self) -> tuple[int, ...]:
        """(D, W, w, E, K, H, d, h)."""
        _, experts, slots, heads, dim = self.keys.shape
        _, width, model = self.tail.shape
        return model, width, self.local_keys.shape[1] - width, experts, slots, heads, dim, self.local_keys.shape[2]

    @staticmethod
    def made_for(c: AutoregressiveConfig) -> tuple[int, ...]:
        """`sizes` of a cache of such a layer."""
        return (
            c.dim, c.routed_window_size, c.local_attn_window_size, c.num_experts, c.num_routed_key_values, c.heads,
            c.dim_head, c.local_attn_heads,
        )  # fmt: skip

    def after(
        self,
        count: Int64[Tensor, " B"],
        passed: int,
        laid: Laid,
        memory: Memory,
        rows: tuple[Tensor, Tensor],
        limits: tuple[Tensor, Tensor],
        local: tuple[Tensor, Tensor],
    ) -> Self:
        """With `count` more valid tokens of `passed`.

        rows: keys and values of the stored memory and what is laid out, (B, E, K + L, H, d). limits: thresholds and
        duals of each block, (B, E, J). local: keys and values (B, w + W + N, h, d) of what is stored and what came.
        """
        passed, width = passed + self.passed, self.tail.shape[1]
        if not memory.places.shape[2]:
            return replace(self, passed=passed)
        length = self.length + count
        start = torch.maximum(self.start, (length - 1).clamp_min(0) // width * width)
        block = (start - self.start) // width  # of those laid out, that which is unfinished now
        chosen = take(memory.places.transpose(1, 2), 1, block[:, None])[:, 0]
        there = take(memory.mask.transpose(1, 2), 1, block[:, None])[:, 0]
        ranks = torch.cat((self.logits, laid.kv_logits), -1)
        by_expert = block[:, None, None]
        place = block[:, None] * width + torch.arange(width, device=start.device)
        window = self.local_keys.shape[1] - width
        wanted = start[:, None] - window + torch.arange(window + width, device=start.device)
        since = wanted - self.length[:, None]
        at = torch.where(since < 0, wanted - self.start[:, None] + window, window + width + since)
        at = at.clamp(0, local[0].shape[1] - 1)
        known = ((wanted >= 0) & (wanted < length[:, None]))[..., None, None]
        keys, values = (torch.where(there[..., None, None], take(t, 2, chosen), 0) for t in rows)
        local_keys, local_values = (torch.where(known, take(t, 1, at), 0) for t in local)
        return replace(
            self,
            length=length,
            start=start,
            keys=keys,
            values=values,
            logits=torch.where(there, ranks.gather(-1, chosen), 0),
            positions=take(memory.positions.transpose(1, 2), 1, block[:, None])[:, 0],
            poisoned=take(memory.poisoned, 2, by_expert)[..., 0],
            threshold=take(limits[0], 2, by_expert)[..., 0],
            dual=take(limits[1], 2, by_expert)[..., 0],
            tail=take(laid.x, 1, place),
            tail_q_logits=take(laid.q_logits, 2, place[:, None]),
            tail_kv_logits=take(laid.kv_logits, 2, place[:, None]),
            local_keys=local_keys,
            local_values=local_values,
            passed=passed,
        )
