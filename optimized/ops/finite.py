"""What is not finite, kept from those that do not see it.

A kernel that hides a key by a weight of 0 multiplies it by 0, and 0 times NaN is NaN; so does a sum over keys in a
backward. What is not finite is therefore taken out before an attention, and results that see it become NaN after. Of a
query, key or value also numbers count whose products may overflow: more than 2**60, in float64 more than 2**500.
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest(dtype: torch.dtype) -> float:
    """A number that may be multiplied by another, added up over channels, and once more by a gradient."""
    if dtype == torch.float16:  # products are in float32
        return torch.finfo(dtype).max
    return 2.0**500 if dtype == torch.float64 else 2.0**60


def odd_rows(t: Tensor) -> Tensor:
    """Rows (...) of t (..., d) with a number that is not finite, or too large."""
    return ~(t.abs() <= largest(t.dtype)).all(-1)
