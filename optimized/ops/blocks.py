"""Blocks of tokens that are routed one by one: how a row falls into them, and how many slots they have together.

Letters: B batch, N tokens, E experts, K slots per expert, W block length. Without blocks, with W >= N, and where all
tokens are taken (N <= K), the row is its only part. Else K_W = ceil(K / blocks) tokens come from each whole block, and
min(K_W, length) from a short last one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Blocks of one length, side by side, each with a K of its own. Those of length <= K give all of their tokens."""

    start: int
    length: int
    count: int  # type: ignore[assignment]  # tuples have a method of that name
    k: int

    @property
    def slots(self) -> int:
        return self.count * min(self.k, self.length)

    @property
    def takes_all(self) -> bool:
        return self.length <= self.k

    def fold(self, rows: Tensor) -> Tensor:
        """(B count, ..., length) of rows (B, ..., N): blocks are items of the batch."""
        rows = rows[..., self.start : self.start + self.length * self.count]
        if self.count > 1:
            rows = rows.unflatten(-1, (self.count, -1)).movedim(-2, 1).flatten(0, 1)
        return rows.contiguous()

    def unfold(self, rows: Tensor) -> Tensor:
        """The opposite for rows of three dimensions."""
        return rows if self.count == 1 else rows.unflatten(0, (-1, self.count)).movedim(1, -2).flatten(-2)


def split(n: int, k: int, block: int | None) -> list[Part]:
    """The whole blocks, and a shorter one where there is one."""
    if block is None or block >= n or n <= k:
        return [Part(0, n, 1, k)]
    each, whole = -(-k // -(-n // block)), n // block
    parts = [Part(0, block, whole, each)]
    return parts if n == whole * block else [*parts, Part(whole * block, n - whole * block, 1, each)]


def sizes(n: int, k: int, block: int | None) -> tuple[int, int]:
    """Slots and number of blocks. By arithmetic without a decision: sizes may be symbols."""
    if block is None:
        return torch.sym_min(k, n), 1
    blocks = torch.sym_max((n + block - 1) // block, 1)
    takes_all = torch.sym_min(k // torch.sym_max(n, 1), 1)  # 1 where N <= K, 0 else
    each = torch.sym_max((k + blocks - 1) // blocks, block * takes_all)
    slots = n // block * torch.sym_min(each, block) + torch.sym_min(each, n % block)
    if not (isinstance(k, int) and isinstance(block, int)):
        return slots, blocks
    # Never less than min(K, N, 2), which is said for an export: PyTorch can't tell from the sum that it is not 0 or 1.
    least = torch.sym_min(n, min(k, 2))
    return least + torch.sym_max(slots - least, 0), blocks
