"""Partial sums that the programs of a kernel have written, added up in the order of the programs and rounded once.

One or two results of a kernel in one launch: partial sums (groups, rows, width), with `stride` numbers from a row to
the next, to (groups, width) in the dtype of the result. A program per group and block of columns, ROWS rows at a time.

Blind spots: a program reads all rows of its columns, so few columns and many rows leave most of a GPU idle.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import cdiv, launch

COLUMNS = 32  # of a program: a sector of memory in float32
ROWS = 64


class Sum(NamedTuple):
    """out (groups, width), contiguous; first: where its partial sums begin."""

    out: Tensor
    groups: int
    rows: int
    first: int = 0


@triton.jit(do_not_specialize=["groups_0", "rows_0", "rows_1", "first_0", "first_1", "stride"])
def _add_up_kernel(
    partial_ptr, out_0, out_1, groups_0, rows_0, rows_1, first_0, first_1, width, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    rows = rows_0
    first = first_0.to(tl.int64)
    if group >= groups_0:
        group -= groups_0
        out_0 = out_1
        rows = rows_1
        first = first_1.to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    partial_ptr += first + group * rows * stride
    total = tl.zeros((ROWS, COLUMNS), partial_ptr.dtype.element_ty)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        tile = row[:, None].to(tl.int64) * stride + columns[None, :]
        total += tl.load(partial_ptr + tile, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    tl.store(out_0 + group * width + columns, tl.sum(total, 0).to(out_0.dtype.element_ty), mask=inside)


def add_up(partial: Tensor, width: int, stride: int, *sums: Sum) -> None:
    """out[group, c] = the sum over its rows of partial[first + (group rows + row) stride + c], for one or two sums.

    partial: contiguous, float32 or float64.
    """
    if len(sums) == 2 and sums[0].out.dtype != sums[1].out.dtype:  # a kernel has one type of a result
        for each in sums:
            add_up(partial, width, stride, each)
        return
    groups, (one, other) = sum([each.groups for each in sums]), (sums[0], sums[-1])
    if groups and width:
        launch(
            _add_up_kernel, (groups, cdiv(width, COLUMNS)),
            partial, one.out, other.out, one.groups, one.rows, other.rows, one.first, other.first, width, stride,
            ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
