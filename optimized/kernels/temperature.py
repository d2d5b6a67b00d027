"""The temperature of a step of the iterative solver."""

from __future__ import annotations

import triton
import triton.language as tl

from optimized.kernels.launch import from_bits


@triton.jit
def temperature_of(t, eps_bits, eps_init_bits, eps_decay_bits, DTYPE: tl.constexpr):
    """max(eps_init * eps_decay ** t, eps), in double until the end."""
    decay = tl.exp2(t * tl.log2(from_bits(eps_decay_bits)))
    return tl.maximum(from_bits(eps_init_bits) * decay, from_bits(eps_bits)).to(DTYPE)
