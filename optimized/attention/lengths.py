"""Rows of different lengths for kernels that take cumulative sequence offsets."""

from __future__ import annotations

import torch
from torch import Tensor


def offsets(
    rows: int, q_length: int, k_length: int, lengths: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cumulative offsets, int32, of queries (R L) and keys (R S) laid end to end.

    With lengths every row is two sequences: its L queries with its first keys, and no query with the hidden keys. So
    nothing moves, no size depends on data, and the backward writes zeros for the hidden keys.
    """
    starts = [torch.arange(rows + 1, device=device, dtype=torch.int32) * size for size in (q_length, k_length)]
    if lengths is None:
        return starts[0], starts[1]
    q_starts, k_starts = starts
    q = torch.cat((q_starts[:1], q_starts[1:].repeat_interleave(2)))
    k = torch.cat((k_starts[:1], torch.stack((k_starts[:-1] + lengths, k_starts[1:]), 1).flatten()))
    return q, k
