"""Memory of blocks: of every block, the K best of the columns before it, in ascending order.

Rank: number before NaN, larger logit, later column. A column that was dropped never returns, so the best of a prefix
are among the best of its parts, and whatever was found of a part may stand for it. A program finds those of one prefix:
it builds the K-th largest key (`ranks`), all keys above it are in, and of its equals the last ones; a running count
gives each its place, so that the result depends on no order of execution.

A short row takes one launch, in which every block searches its whole prefix. A long one takes three, by groups of
blocks: the best of each group alone; of the blocks at which a group starts, from the lists of the groups before; of all
others, from the list of their group's start and the columns since. At 131,072 columns and K 512 that is 1/30 of the
comparisons, and no chain of 512 merges, of which each would wait for the one before.

Blind spots: K close to the length of a group, whose list then is as long as the group.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.kernels.launch import by_item, cdiv, contiguous, launch, next_power_of_2
from optimized.kernels.ranks import counts_of, elements, kth_largest

KEYS = 4096  # in registers at a time
GROUP = 2048  # columns of a group, at least, and four times K: then a list is a quarter of it at most
VERY_LONG = 65536  # columns of a row whose groups are twice as long
LONG = 4096  # columns beyond which a row is searched in groups


@triton.jit(do_not_specialize=["item", "n", "k", "prior", "width", "blocks", "group", "targets", "experts"])
def _memory_kernel(
    s_ptr, mask_ptr, list_ptr, list_counts_ptr, indices_ptr, counts_ptr,
    item, n, k, prior, width, blocks, group, targets, experts,
    BITS: tl.constexpr, STAGE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """STAGE 0: of each group alone, to lists (targets, K). 1: of blocks at which a group starts, but the first, from
    these lists. 2: of other blocks; lists are the results of stage 1 then, and group that of all of them without it.
    item: see `by_item`.
    """
    row = (tl.program_id(0) // targets).to(tl.int64)
    target = tl.program_id(0) % targets
    s_ptr += row // experts * item + row % experts * n
    if HAS_MASK:
        mask_ptr += row // experts * n
    end = prior + target * width
    start = tl.full((), 0, tl.int32)
    listed = tl.full((), 0, tl.int32)
    place = row * blocks + target
    wanted = tl.full((), 1, tl.int32)
    if STAGE == 0:
        start = tl.where(target > 0, prior + target * group * width, 0)
        end = prior + (target + 1) * group * width
        place = row * targets + target
    elif STAGE == 1:
        list_ptr += row * targets * k
        list_counts_ptr += row * targets
        listed = (target + 1) * k
        start = prior + (target + 1) * group * width
        end = start
        place = row * blocks + (target + 1) * group
    else:
        origin = target // group * group
        wanted = tl.where((target == 0) | (origin < target), 1, 0)
        start = tl.where(origin > 0, prior + origin * width, 0)
        listed = tl.where(origin > 0, k, 0)
        list_ptr += (row * blocks + origin) * k
        list_counts_ptr += row * blocks + origin
    size = listed + end - start
    indices_ptr += place * k
    if wanted > 0:
        lanes = tl.arange(0, BLOCK)
        listing: tl.constexpr = STAGE > 0
        key, _ = elements(
            s_ptr, mask_ptr, list_ptr, list_counts_ptr, lanes, n, k, listed, start, size, HAS_MASK, listing
        )
        key_type: tl.constexpr = key.dtype
        lowest = (tl.full((), 1, key_type) << (BITS - 1)).to(key_type)
        token = lowest + 2  # NaN, and beyond it numbers
        there, _, _ = counts_of(
            key, token, token, token, s_ptr, mask_ptr, list_ptr, list_counts_ptr, n, k, listed, start, size,
            HAS_MASK, listing, BLOCK, ONE_BLOCK,
        )  # fmt: skip
        count = tl.minimum(there, k)
        least = token
        found = count
        if there > k:
            least, found = kth_largest(
                key, k, s_ptr, mask_ptr, list_ptr, list_counts_ptr, n, k, listed, start, size,
                BITS, HAS_MASK, listing, BLOCK, ONE_BLOCK,
            )  # fmt: skip
        too_many = found - count  # of the equals, the first ones, which are left out
        seen = tl.full((), 0, tl.int32)
        seen_equal = tl.full((), 0, tl.int32)
        for begin in range(0, size, BLOCK):
            more, columns = elements(
                s_ptr, mask_ptr, list_ptr, list_counts_ptr, begin + lanes, n, k, listed, start, size, HAS_MASK, listing
            )
            chosen = more >= least
            if too_many > 0:
                equal = (more == least).to(tl.int32)
                chosen = (more > least) | ((equal > 0) & (seen_equal + tl.cumsum(equal) > too_many))
                seen_equal += tl.sum(equal)
            at = seen + tl.cumsum(chosen.to(tl.int32)) - 1
            tl.store(indices_ptr + at, columns, mask=chosen)
            seen += tl.sum(chosen.to(tl.int32))
        for begin in range(0, k, BLOCK):
            tl.store(indices_ptr + begin + lanes, 0, mask=(begin + lanes >= count) & (begin + lanes < k))
        tl.store(counts_ptr + place, count)


def memory(logits: Tensor, valid: Tensor | None, k: int, block: int, prior: int) -> tuple[Tensor, Tensor]:
    """Indices and counts; see `optimized.ops.memory`."""
    batch, experts, n = logits.shape
    rows, blocks = batch * experts, (n - prior) // block
    indices = torch.empty(batch, experts, blocks, k, dtype=torch.int32, device=logits.device)
    counts = torch.empty(batch, experts, blocks, dtype=torch.int32, device=logits.device)
    if not counts.numel():
        return indices, counts
    (s, item), mask = by_item(logits), contiguous(valid)

    def search(
        stage: int, targets: int, longest: int, lists: tuple[Tensor, Tensor], into: tuple[Tensor, Tensor]
    ) -> None:
        launch(
            _memory_kernel, (rows * targets,), s, mask, *lists, *into,
            item, n, k, prior, block, blocks, group, targets, experts,
            BITS=8 * s.element_size(), STAGE=stage, HAS_MASK=mask is not None, **_sizes(longest),
        )  # fmt: skip

    found, group = (indices, counts), cdiv(max(GROUP if n <= VERY_LONG else 2 * GROUP, 4 * k), block)
    before = prior
    if n <= LONG or group >= blocks:
        group = blocks
    else:
        before = max(prior, k)
        groups = cdiv(blocks, group) - 1  # the last sets no start
        lists = indices.new_empty(rows, groups, k), counts.new_empty(rows, groups)
        search(0, groups, prior + group * block, lists, lists)
        search(1, groups, groups * k, lists, found)
    search(2, blocks, before + (group - 1) * block, found, found)
    return found


def _sizes(longest: int) -> dict[str, Any]:
    """Of a search among so many elements at most."""
    block = min(next_power_of_2(max(longest, 1)), KEYS)
    return {"BLOCK": block, "ONE_BLOCK": longest <= block, "num_warps": max(block // 256, 1)}
