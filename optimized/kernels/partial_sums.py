"""Partial sums that the programs of a kernel have written, added up in the order of the programs and rounded once.

One or two results of a kernel in one launch: partial sums (groups, rows, width), with `stride` numbers from a row to
the next, to (groups, width) in the dtype of the result. A program per group and block of columns, ROWS rows at a time;
where there are FEW it reads them all, of more columns: as many programs with little to read would take longer. Of more
than MOST rows several programs add up SHARE each, and another launch what they found: one program would go through the
rows of a million tokens while the GPU rests.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import cdiv, launch

COLUMNS = 32  # of a program: a sector of memory in float32
ROWS = 64
FEW, WIDER = 8, 256  # rows, and columns of a program of no more
MOST, SHARE = 512, 256  # rows of a program, and of one of several


class Sum(NamedTuple):
    """out (groups, width), contiguous; first: where its partial sums begin."""

    out: Tensor
    groups: int
    rows: int
    first: int = 0


@triton.jit(do_not_specialize=["groups_0", "rows_0", "rows_1", "first_0", "first_1", "stride", "share"])
def _add_up_kernel(
    partial_ptr, out_0, out_1, groups_0, rows_0, rows_1, first_0, first_1, width, stride, share,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out (groups, parts, width): a part has `share` rows."""
    blocks = tl.cdiv(width, COLUMNS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    rows = rows_0
    first = first_0.to(tl.int64)
    if group >= groups_0:
        group -= groups_0
        out_0 = out_1
        rows = rows_1
        first = first_1.to(tl.int64)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    partial_ptr += first + group * rows * stride
    total = tl.zeros((ROWS, COLUMNS), partial_ptr.dtype.element_ty)
    part = tl.program_id(1)
    end = tl.minimum(rows, (part + 1) * share)
    for start in range(part * share, end, ROWS):
        row = start + tl.arange(0, ROWS)
        tile = row[:, None].to(tl.int64) * stride + columns[None, :]
        total += tl.load(partial_ptr + tile, mask=(row < end)[:, None] & inside[None, :], other=0.0)
    out_0 += (group * tl.num_programs(1) + part) * width
    tl.store(out_0 + columns, tl.sum(total, 0).to(out_0.dtype.element_ty), mask=inside)


def add_up(partial: Tensor, width: int, stride: int, *sums: Sum) -> None:
    """out[group, c] = the sum over its rows of partial[first + (group rows + row) stride + c], for one or two sums.

    partial: contiguous, float32 or float64.
    """
    one, other = sums[0], sums[-1]
    # A kernel has one type of a result, and one number of parts.
    if len(sums) == 2 and (one.out.dtype != other.out.dtype or max(one.rows, other.rows) > MOST):
        for each in sums:
            add_up(partial, width, stride, each)
        return
    groups = sum([each.groups for each in sums])
    if not groups or not width:
        return
    parts = cdiv(one.rows, SHARE) if one.rows > MOST else 1
    out = one.out if parts == 1 else partial.new_empty(groups, parts, width)
    tile, columns = (FEW, WIDER) if max(one.rows, other.rows) <= FEW else (ROWS, COLUMNS)
    also = out if len(sums) == 1 else other.out
    launch(
        _add_up_kernel, (groups * cdiv(width, columns), parts),
        partial, out, also, one.groups, one.rows, other.rows, one.first, other.first, width, stride,
        SHARE if parts > 1 else MOST, ROWS=tile, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    if parts > 1:
        add_up(out, width, width, one._replace(rows=parts, first=0))
