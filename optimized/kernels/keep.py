"""Which weights of an attention dropout keeps: a bit for each, 32 keys to a word, made anew wherever it is asked for.

Numbers of a random generator, int32, for each of R H items, with L queries and W words of 32 keys:

    m, a, c (L each), the null slot's (L), then b (8 W) and n (8 W)

For a query and each of the eight pairs b, n of a word, `attention.draws` has the hash x of 32 bits, uniform whatever
else is known. Bit j of the eight x are the digits of a number 255 - U of key j; the key is kept if U < t. All 32 are
compared at once, digit by digit from the last one: with T the digit of t, in every bit,

    less = majority(less, x, T)

The share that is kept is no multiple of 2^-8, but exact to 2^-24: t is rounded up or down by bits of a, of which x
knows nothing. That two weights of a query share this rounding makes their covariance 2^-18 at most.

A hash costs six operations and serves four keys. Blind spots: none known.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.attention.draws import FACTOR
from optimized.kernels.launch import cdiv, double_bits, from_bits, launch

QUERIES = 64  # of a program
WORDS = 32
DIGITS = tl.constexpr(8)
MIX = tl.constexpr(FACTOR)


@triton.jit(do_not_specialize=["queries", "words", "whole", "rest", "kept_bits"])
def _keep_kernel(
    numbers_ptr, words_ptr, keep_ptr, queries, words, whole, rest, kept_bits,
    QUERIES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """whole, rest: 2^8 and 2^24 times the share that is kept."""
    blocks = tl.cdiv(queries, QUERIES)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    here = i < queries
    w = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    there = w < words
    numbers_ptr += item * (4 * queries + 2 * DIGITS * words)
    m = (tl.load(numbers_ptr + i, mask=here, other=0) | 1)[:, None]
    a = tl.load(numbers_ptr + queries + i, mask=here, other=0)[:, None]
    c = tl.load(numbers_ptr + 2 * queries + i, mask=here, other=0)[:, None]
    t = whole + (((a & 0xFFFFFF) + rest) >> 24)
    less = tl.zeros((QUERIES, WORDS), tl.int32)
    for digit in tl.static_range(DIGITS):
        at = numbers_ptr + 4 * queries + w * DIGITS + digit
        b = tl.load(at, mask=there, other=0)[None, :]
        n = (tl.load(at + DIGITS * words, mask=there, other=0) | 1)[None, :]
        x = m * b + a
        x = x * n + (x >> 16)
        x = x * MIX + (x >> 15)
        x = x ^ c
        less = (less & x) | ((less | x) & -((t >> digit) & 1))
    less = tl.where(t >= 256, -1, less)
    place = (item * queries + i[:, None]) * words + w[None, :]
    tl.store(words_ptr + place, less, mask=here[:, None] & there[None, :])
    if tl.program_id(1) == 0:
        number = tl.load(numbers_ptr + 3 * queries + i, mask=here, other=0).to(tl.int64) + 2147483648
        z = tl.where(number < tl.cast(whole, tl.int64) * 16777216 + rest, 1.0, 0.0) / from_bits(kept_bits)
        tl.store(keep_ptr + item * queries + i, z.to(keep_ptr.dtype.element_ty), mask=here)


def numbers(rows: int, heads: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """(R, H, 4 L + 16 W) int32, W = S / 32 rounded up; not drawn yet: all their bits are to be random."""
    return torch.empty((rows, heads, 4 * queries + 16 * cdiv(keys, 32)), dtype=torch.int32, device=device)


def kept(drawn: Tensor, queries: int, keys: int, dropout: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bits (R, H, L, W) int32 of the routed keys, and the null slot's (R, H, L) in `dtype`: 0, or 1 / (1 - dropout)."""
    words = cdiv(keys, 32)
    bits = torch.empty((*drawn.shape[:2], queries, words), dtype=torch.int32, device=drawn.device)
    keep = torch.empty((*drawn.shape[:2], queries), dtype=dtype, device=drawn.device)
    if keep.numel():
        whole, rest = divmod(round((1 - dropout) * 2**32), 2**24)
        launch(
            _keep_kernel, (drawn.shape[0] * drawn.shape[1] * cdiv(queries, QUERIES), max(cdiv(words, WORDS), 1)),
            drawn, bits, keep, queries, words, whole, rest, double_bits(1 - dropout),
            QUERIES=QUERIES, WORDS=WORDS, num_warps=4,
        )  # fmt: skip
    return bits, keep
