"""Selection from long rows by many programs each: the same results as `selection`, bit for bit.

The K-th largest key (see `slots`) is found from the top, a digit of 8 bits at a time. Programs (row, chunk) count the
digits of those keys of their chunk that have the digits found so far; a row has at most `CHUNKS` chunks. The next
launch begins with the sums of these counts over the row, by every one of its programs alike: the digit is the last one
that K keys reach, together with all that lie above. The same table says how many keys of earlier chunks are in: so
after the last digit every chunk knows its first slot, and places its tokens. Once exactly K keys reach what is found
the rest of the digits need no count.

5 launches for float32, 9 for float64. Between launches lie, for each row: the threshold so far, as an unsigned number,
and the room left among the keys that begin like it, 0 once these are all in; for each chunk: its counts, twice since
one is read while the other is written, how many keys before it are in, and whether it holds a NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import cdiv, launch
from optimized.kernels.rows import part_length, row_arguments
from optimized.kernels.slots import Group, load_keys, lowest_key, new_groups, of_group, place, pointers

BLOCK = 2048  # keys of a chunk at a time
CHUNKS = 32  # of a row, at most
WARPS = 8
DIGIT = 8  # bits
VALUES = tl.constexpr(1 << DIGIT)


@triton.jit
def _decide(counts_ptr, least, room, shift, chunk, chunks, KEY: tl.constexpr, CHUNKS: tl.constexpr):
    """Threshold and room with one digit more, and how many keys of the chunks before this one are in, or equal it."""
    values = tl.arange(0, VALUES)
    each = tl.arange(0, CHUNKS)[:, None]
    table = tl.load(counts_ptr + each * VALUES + values[None, :], mask=each < chunks, other=0)
    reach = tl.cumsum(tl.sum(table, 0), reverse=True)  # keys with this digit, or a larger one
    digit = tl.sum((reach >= room).to(tl.int32)) - 1
    larger = tl.max(tl.where(values > digit, reach, 0))
    reaching = tl.max(tl.where(values == digit, reach, 0))
    least |= digit.to(KEY) << shift.to(KEY)
    # Not where masked tokens are among them, whose number is 1: these have other slots.
    all_in = (reaching == room) & (least != 0) & (least != 1)
    earlier = tl.where(each < chunk, table, 0)
    inside = tl.where(all_in, values >= digit, values > digit)
    before = tl.sum(tl.where(inside, tl.sum(earlier, 0), 0))
    equal = tl.sum(tl.where(values == digit, tl.sum(earlier, 0), 0))
    return tl.where(all_in, least - 1, least), tl.where(all_in, 0, room - larger), before, equal


@triton.jit(do_not_specialize=["n", "k_0", "k_1", "experts", "group", "length", "turn", "shift"])
def _digits_kernel(
    s_ptr, mask_ptr, counts_ptr, least_ptr, room_ptr, before_ptr, nan_ptr,
    n, k_0, k_1, experts, group, length, turn, shift,
    BITS: tl.constexpr, FIRST: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    DIGIT: tl.constexpr,
):  # fmt: skip
    """Counts of the digit at bit `shift`, the turn-th. length: of a chunk."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    rows = tl.num_programs(0)
    chunks = tl.num_programs(1)
    s_ptr += row * n
    if HAS_MASK:
        mask_ptr += row // experts * n
    here = turn % 2 * rows + row
    table = chunks * VALUES
    key_type: tl.constexpr = least_ptr.dtype.element_ty
    lowest = lowest_key(key_type, BITS)
    least = tl.full((), 0, key_type)
    room = tl.where(row % experts < group, k_0, k_1)
    before = tl.full((), 0, tl.int32)
    if not FIRST:
        there = (turn + 1) % 2 * rows + row
        least = tl.load(least_ptr + there)
        room = tl.load(room_ptr + there)
        before = tl.load(before_ptr + row * CHUNKS + chunk)
        if room > 0:
            least, room, more, _ = _decide(
                counts_ptr + there * table, least, room, shift + DIGIT, chunk, chunks, key_type, CHUNKS
            )
            before += more
    tl.store(before_ptr + row * CHUNKS + chunk, before)
    tl.store(least_ptr + here, least, mask=chunk == 0)
    tl.store(room_ptr + here, room, mask=chunk == 0)

    if room > 0:
        counts = tl.zeros((VALUES,), tl.int32)
        poisoned = tl.full((), 0, tl.int32)
        for start in range(chunk * length, tl.minimum(chunk * length + length, n), BLOCK):
            key, _, inside = load_keys(s_ptr, mask_ptr, start + tl.arange(0, BLOCK), n, HAS_MASK)
            number = key ^ lowest
            if FIRST:
                poisoned = tl.maximum(poisoned, tl.max((key == lowest + 2).to(tl.int32)))
            else:
                inside &= ((number ^ least) >> (shift + DIGIT).to(key_type)) == 0
            digit = (number >> shift.to(key_type)) & (VALUES - 1)
            counts += tl.histogram(digit.to(tl.int32), VALUES, mask=inside)
        tl.store(counts_ptr + here * table + chunk * VALUES + tl.arange(0, VALUES), counts)
        if FIRST:
            tl.store(nan_ptr + row * CHUNKS + chunk, poisoned)


@triton.jit(do_not_specialize=["n", "k_0", "k_1", "experts", "group", "length", "turn"])
def _place_kernel(
    s_ptr, mask_ptr, scores_ptr, indices_0, slots_0, inverse_0, picked_0, indices_1, slots_1, inverse_1, picked_1,
    counts_ptr, least_ptr, room_ptr, before_ptr, nan_ptr, n, k_0, k_1, experts, group, length, turn,
    BITS: tl.constexpr, UNIT: tl.constexpr, SIGMOID: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SCORES: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """turn: that of the last digit."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    s_ptr += row * n
    scores_ptr += row * n
    if HAS_MASK:
        mask_ptr += row // experts * n
    k, indices_ptr, slots_ptr, inverse_ptr, picked_ptr = of_group(
        indices_0, slots_0, inverse_0, picked_0, indices_1, slots_1, inverse_1, picked_1,
        row, experts, group, n, k_0, k_1,
    )  # fmt: skip
    there = turn % 2 * tl.num_programs(0) + row
    key_type: tl.constexpr = least_ptr.dtype.element_ty
    lowest = lowest_key(key_type, BITS)
    least = tl.load(least_ptr + there)
    room = tl.load(room_ptr + there)
    before = tl.load(before_ptr + row * CHUNKS + chunk)
    equal = tl.full((), 0, tl.int32)
    if room > 0:
        least, room, more, equal = _decide(
            counts_ptr + there * chunks * VALUES, least, room, tl.full((), 0, tl.int32), chunk, chunks, key_type, CHUNKS
        )
        before += more
    each = tl.arange(0, CHUNKS)
    poisoned = tl.max(tl.load(nan_ptr + row * CHUNKS + each, mask=each < chunks, other=0))
    for start in range(chunk * length, tl.minimum(chunk * length + length, n), BLOCK):
        before, equal = place(
            s_ptr, mask_ptr, scores_ptr, indices_ptr, slots_ptr, inverse_ptr, picked_ptr,
            start + tl.arange(0, BLOCK), n, k, least ^ lowest, room, before, equal, lowest, poisoned,
            UNIT, SIGMOID, HAS_MASK, HAS_SCORES,
        )  # fmt: skip


def select_long(
    logits: Tensor,
    mask: Tensor | None,
    ks: tuple[int, ...],
    scores: Tensor | None,
    unit: bool = False,
    sigmoid: bool = False,
) -> tuple[Group, ...]:
    """See `selection.select_groups`."""
    batch, experts, n = logits.shape
    bits, rows = 8 * logits.element_size(), batch * experts
    s, mask, _ = row_arguments(logits, mask, BLOCK)
    groups = new_groups(s, ks, unit or sigmoid or scores is not None)
    if s.numel():
        length = part_length(n, BLOCK, CHUNKS)
        grid = rows, cdiv(n, length)
        counts = torch.empty(2, *grid, VALUES.value, dtype=torch.int32, device=s.device)
        least = torch.empty(2, rows, dtype=torch.int64 if bits == 64 else torch.int32, device=s.device)
        room, each = (torch.empty(2, rows, width, dtype=torch.int32, device=s.device) for width in (1, CHUNKS))
        state = counts, least, room, *each
        sizes = n, ks[0], ks[-1], experts, experts // len(ks), length
        constants = {"BITS": bits, "HAS_MASK": mask is not None, "BLOCK": BLOCK, "CHUNKS": CHUNKS, "num_warps": WARPS}
        turns = bits // DIGIT
        for turn in range(turns):
            shift = bits - DIGIT * (turn + 1)
            launch(
                _digits_kernel, grid, s, mask, *state, *sizes, turn, shift,
                FIRST=turn == 0, DIGIT=DIGIT, **constants,
            )  # fmt: skip
        launch(
            _place_kernel, grid,
            s, mask, s if scores is None else scores.contiguous(), *pointers(groups), *state, *sizes, turns - 1,
            UNIT=unit, SIGMOID=sigmoid, HAS_SCORES=scores is not None, **constants,
        )  # fmt: skip
    return tuple(groups)
