"""What a query does not see, as an addition of -inf to its logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from optimized.attention.interface import Visible


def bias(q: Tensor, k: Tensor, visible: Visible, aligned_to: int = 1) -> Tensor | None:
    """(R, 1, 1 or L, S) in q's dtype, None where all is seen; its rows start at multiples of `aligned_to` numbers."""
    keys = k.shape[1]
    surplus = -keys % aligned_to
    seen = None
    if visible.lengths is not None:
        seen = (torch.arange(keys + surplus, device=q.device) < visible.lengths[:, None])[:, None]
    if visible.mask is not None:
        mask = F.pad(visible.mask, (0, surplus)) if surplus else visible.mask
        seen = mask if seen is None else mask & seen
    if seen is None:
        return None
    # Filled, not chosen from two numbers: those would be copied from the host, which no CUDA graph allows.
    return q.new_zeros(seen.shape).masked_fill_(~seen, -math.inf)[:, None, :, :keys]
