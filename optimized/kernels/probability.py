"""Weights of a softmax, made again in a backward from a score and the log-sum-exp of its row.

No weight exceeds 1, yet of scores beyond 2**24 the difference to the log-sum-exp is no more than its rounding error:
where that is 128 and more, 2 to its power is infinite, and times a gradient of 0 that is NaN, for all keys of the tile.
So is what a result that overflowed makes of it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def at_most_one(exponent):
    """2**exponent, 1 for what is above 0. NaN stays NaN."""
    return tl.exp2(tl.where(exponent > 0, 0.0, exponent))


@triton.jit
def along(dout, out):
    """<dout, out> of rows (M, D): where dout is 0, whatever out is."""
    return tl.sum(tl.where(dout == 0, 0.0, dout * out), 1)
