"""Rows of N logits for kernels with one program per row: loads, block sizes, and arguments common to them."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import CHUNK, ROWS_IN_REGISTERS, as_bytes


@triton.jit
def load_row(s_ptr, mask_ptr, offsets, n, HAS_MASK: tl.constexpr):
    """Logits with -inf for masked tokens and past the end, and which tokens are valid."""
    valid = offsets < n
    if HAS_MASK:
        valid = tl.load(mask_ptr + offsets, mask=valid, other=0) != 0
    return tl.load(s_ptr + offsets, mask=valid, other=-float("inf")), valid


def fits(n: int, element_size: int) -> bool:
    """Whether a row stays in registers."""
    return n * element_size <= ROWS_IN_REGISTERS


def row_arguments(logits: Tensor, mask: Tensor | None, longest: int) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Contiguous logits and mask (as bytes), and HAS_MASK, BLOCK and num_warps for blocks of at most `longest`."""
    block = min(triton.next_power_of_2(max(logits.shape[-1], 1)), longest)
    constants = {"HAS_MASK": mask is not None, "BLOCK": block, "num_warps": min(max(block // 1024, 1), 16)}
    return logits.contiguous(), as_bytes(mask), constants


def block_of_row(n: int, element_size: int) -> int:
    """The whole row where it stays in registers, else a chunk."""
    return triton.next_power_of_2(max(n, 1)) if fits(n, element_size) else CHUNK
