"""Rows of N logits for kernels of whole rows: loads, sums, block sizes, and arguments common to them.

Rows (B, R, N) are those of one or two groups of E = R / groups experts, whose logits lie one after the other.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import (
    CHUNK,
    INTERPRETED,
    ROWS_IN_REGISTERS,
    cdiv,
    contiguous,
    double_bits,
    from_bits,
    next_power_of_2,
)


@triton.jit
def load_row(s_ptr, mask_ptr, offsets, n, HAS_MASK: tl.constexpr):
    """Logits with -inf for masked tokens and past the end, and which tokens are valid."""
    valid = offsets < n
    if HAS_MASK:
        valid = tl.load(mask_ptr + offsets, mask=valid, other=0) != 0
    return tl.load(s_ptr + offsets, mask=valid, other=-float("inf")), valid


@triton.jit
def mass_of_row(row, experts, group, mass_0_bits, mass_1_bits):
    return from_bits(tl.where(row % experts < group, mass_0_bits, mass_1_bits))


@triton.jit
def gradient_of_row(
    grad_0, grad_1, inverse_0, inverse_1, row, experts, group, n, k_0, k_1, PICKED: tl.constexpr,
):  # fmt: skip
    """Where the gradient of the row's scores begins, and its inverse map. Not PICKED: grad_0 (B, R, N) has them all."""
    expert = row % experts
    place = row // experts * group + expert % group
    width = k_0.to(tl.int64)
    if PICKED:
        if expert >= group:
            grad_0 = grad_1
            inverse_0 = inverse_1
            width = k_1.to(tl.int64)
    else:
        place = row
        width = n.to(tl.int64)
    return grad_0 + place * width, inverse_0 + place * n


@triton.jit
def load_gradient(grad_ptr, inverse_ptr, offsets, valid, PICKED: tl.constexpr):
    """The gradient of valid tokens' scores. PICKED: that of its slot, 0 for a token without one.

    Masked lanes are not read: a cotangent may be NaN there, and 0 * NaN is NaN.
    """
    if PICKED:
        offsets = tl.load(inverse_ptr + offsets, mask=valid, other=-1)
        valid = offsets >= 0
    return tl.load(grad_ptr + offsets, mask=valid, other=0.0)


@triton.jit
def _add_pairs(x, y, more_x, more_y):
    return x + more_x, y + more_y


@triton.jit
def sum_both(x, y):
    """Two sums for the price of one; the interpreter is slow at any reduction but the plain ones."""
    if INTERPRETED:
        return tl.sum(x), tl.sum(y)
    else:  # noqa: RET505 - the compiler drops the other branch only so
        return tl.reduce((x, y), 0, _add_pairs)


def fits(n: int, element_size: int) -> bool:
    """Whether a row stays in registers."""
    return n * element_size <= ROWS_IN_REGISTERS


def row_arguments(
    logits: Tensor, mask: Tensor | None, longest: int, most_warps: int = 16
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Contiguous logits and mask (as bytes), and HAS_MASK, BLOCK and num_warps for blocks of at most `longest`.

    There are fewer rows than multiprocessors, so a row gets many threads: down to 8 numbers for each.
    """
    block = min(next_power_of_2(max(logits.shape[-1], 1)), longest)
    constants = {"HAS_MASK": mask is not None, "BLOCK": block, "num_warps": min(max(block // 256, 1), most_warps)}
    return logits.contiguous(), contiguous(mask), constants


def block_of_row(n: int, element_size: int) -> int:
    """The whole row where it stays in registers, else a chunk."""
    return next_power_of_2(max(n, 1)) if fits(n, element_size) else CHUNK


def part_length(n: int, block: int, parts: int) -> int:
    """Of one of at most so many parts of a row, in whole blocks."""
    return cdiv(n, block * parts) * block


def mass_arguments(experts: int, masses: float | tuple[float, ...]) -> tuple[int, int, int]:
    """Rows of a group in a batch item, and the masses of the first and of the last group as bits of doubles."""
    each = masses if isinstance(masses, tuple) else (masses,)
    return experts // len(each), double_bits(each[0]), double_bits(each[-1])


def gradient_arguments(
    grads: tuple[Tensor, ...], inverses: tuple[Tensor, ...] | None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[int, int], dict[str, bool]]:
    """Pointers, widths and constants for `gradient_of_row`. Without an inverse map: one dense gradient (B, R, N)."""
    grads = tuple([grad.contiguous() for grad in grads])
    maps = grads if inverses is None else tuple([inverse.contiguous() for inverse in inverses])
    widths = grads[0].shape[-1], grads[-1].shape[-1]
    return (grads[0], grads[-1], maps[0], maps[-1]), widths, {"PICKED": inverses is not None}
