"""What the wrappers share: block sizes, dtypes, and numbers that Triton would round."""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK_D = 4096  # channels in registers at a time; longer rows are read in pieces
ROWS_IN_REGISTERS = 131072  # bytes: 64 float32 in each of 512 threads
CHUNK = 8192  # elements of a longer row that are read at a time
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def double_bits(value: float) -> int:
    """Triton passes a Python float as float32, so a double travels as the integer of its bits."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@triton.jit
def from_bits(bits):
    """The double; Triton passes the bits of one below 1e-314 as int32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as contiguous int8, which Triton loads on every target."""
    return None if mask is None else mask.contiguous().view(torch.int8)


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.promote_types(dtype, torch.float32)


def channel_constants(dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """DTYPE, BLOCK_D and num_warps of a kernel that handles rows of `dim` channels.

    A warp for 4 KB: with fewer threads more rows are in flight, and a sum over channels needs no shared memory.
    """
    block = min(triton.next_power_of_2(dim), MAX_BLOCK_D)
    arithmetic = tl.float64 if dtype == torch.float64 else tl.float32
    warps = max(block * wide(dtype).itemsize // 4096, 1)
    return {"DTYPE": arithmetic, "BLOCK_D": block, "num_warps": warps}
