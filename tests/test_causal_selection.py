"""Memory and candidates of the causal layer against lists that are sorted token by token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from harness import EVERY_KERNEL, check_identical, counted
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import SEEDS, draw, generator
from torch import Tensor

from optimized import ops

TRITON = pytest.mark.parametrize("kernels", ["triton"], indirect=True)
CONTENTS = ("numbers", "ties", "special", "constant", "nan")


def logits_of(shape: tuple[int, ...], content: str, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """special: NaN, infinities and zeros of both signs among small integers."""
    logits = draw(shape, "normal", seed)
    if content == "ties":
        logits = logits.round()
    elif content == "constant":
        logits = torch.full(shape, 0.5, dtype=torch.float64)
    elif content == "nan":
        logits = torch.full(shape, math.nan, dtype=torch.float64)
    elif content == "special":
        values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1.0], dtype=torch.float64)
        logits = values[torch.randint(len(values), shape, generator=generator(seed))]
    return logits.to(dtype)


def mask_of(batch: int, n: int, kind: str, seed: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "few":  # so that lists of groups have room, and what is there hides nothing
        return (torch.arange(n) % 11 == 0).expand(batch, -1)
    if kind == "nobody":
        return torch.zeros(batch, n, dtype=torch.bool)
    return torch.rand(batch, n, generator=generator(seed)) < 0.6


def remembered(logits: Tensor, valid: Tensor | None, k: int, block: int, prior: int) -> tuple[Tensor, Tensor]:
    """By sorting what came before each block."""
    batch, experts, n = logits.shape
    blocks = (n - prior) // block
    indices = torch.zeros(batch, experts, blocks, k, dtype=torch.int32)
    counts = torch.zeros(batch, experts, blocks, dtype=torch.int32)
    for b, e, j in itertools.product(range(batch), range(experts), range(blocks)):
        row = logits[b, e].tolist()
        columns = [t for t in range(prior + j * block) if valid is None or valid[b, t]]
        ranked = sorted(
            ((not math.isnan(row[t]), 0 if math.isnan(row[t]) else row[t], t) for t in columns), reverse=True
        )
        best = sorted(t for _, _, t in ranked[:k])
        indices[b, e, j, : len(best)] = torch.tensor(best, dtype=torch.int32)
        counts[b, e, j] = len(best)
    return indices, counts


def reached(
    logits: Tensor, valid: Tensor | None, first: Tensor | None, kq: int, capacity: int, block: int
) -> tuple[Tensor, ...]:
    """Token by token."""
    skipped = 1 if first is None else 0
    batch, experts, n = logits.shape
    shape = (batch, experts, n // block)
    indices = torch.zeros(*shape, capacity, dtype=torch.int64)
    slots = torch.zeros(*shape, capacity, dtype=torch.bool)
    inverse = torch.full((batch, experts, n), -1, dtype=torch.int32)
    thresholds = torch.full(shape, math.nan, dtype=logits.dtype)
    counts = torch.zeros(shape, dtype=torch.int32)
    for b, e, j in itertools.product(*map(range, shape)):
        row, there = logits[b, e].tolist(), [valid is None or bool(valid[b, t]) for t in range(n)]
        threshold = math.nan if first is None else first[b, e].item()
        if j > 0:
            before = [row[t] + 0.0 for t in range((j - 1) * block, j * block) if there[t] and not math.isnan(row[t])]
            threshold = sorted(before, reverse=True)[kq - 1] if len(before) >= kq else math.nan
        thresholds[b, e, j] = threshold
        for t in range(j * block, (j + 1) * block):
            if there[t] and row[t] >= threshold:
                slot = int(counts[b, e, j])
                if slot < capacity:
                    counts[b, e, j] += 1
                    indices[b, e, j, slot], slots[b, e, j, slot] = t, True
                    inverse[b, e, t] = (j - skipped) * capacity + slot
    return indices[:, :, skipped:], slots[:, :, skipped:], inverse, thresholds, counts[:, :, skipped:]


def half(logits: Tensor) -> Tensor:
    """The same, as those of one router lie beside those of the other."""
    return torch.cat((torch.zeros_like(logits), logits), 1)[:, logits.shape[1] :]


def small_blocks(kernels: str, **changes: int) -> Any:
    """Kernels that hold few keys, so that rows of a dozen columns are long."""
    from optimized.kernels import memory

    assert kernels in ("torch", "triton")
    return mock.patch.multiple(memory, **({"KEYS": 8, "LONG": 8, "GROUP": 4} | changes))


def check_all(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        check_identical(a.cpu(), e)


MEMORY = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "blocks": st.integers(0, 9),
        "block": st.integers(1, 5),
        "prior": st.integers(0, 6),
        "k": st.integers(1, 9),
        "content": st.sampled_from(CONTENTS),
        "mask": st.sampled_from(("none", "random", "few", "nobody")),
        "seed": SEEDS,
    }
)
COMMON = {"shape": (2, 1), "seed": 3}


@EVERY_KERNEL
@pytest.mark.interpreted
@example(c={**COMMON, "blocks": 9, "block": 2, "prior": 3, "k": 3, "content": "special", "mask": "random"})
@example(c={**COMMON, "blocks": 9, "block": 2, "prior": 0, "k": 3, "content": "numbers", "mask": "few"})
@example(c={**COMMON, "blocks": 6, "block": 4, "prior": 0, "k": 3, "content": "ties", "mask": "none"})  # KEYS, and K
@example(c={**COMMON, "blocks": 4, "block": 5, "prior": 5, "k": 1, "content": "constant", "mask": "none"})
@example(c={**COMMON, "blocks": 3, "block": 2, "prior": 1, "k": 9, "content": "nan", "mask": "random"})
@given(c=MEMORY)
@counted
def test_memory_is_the_best_of_what_came_before(kernels: str, device: torch.device, c: dict[str, Any]) -> None:
    """In groups of blocks and without."""
    n = c["prior"] + c["blocks"] * c["block"]
    logits = logits_of((*c["shape"], n), c["content"], c["seed"], torch.float32)
    valid = mask_of(c["shape"][0], n, c["mask"], c["seed"])
    there = None if valid is None else valid.to(device)
    expected = remembered(logits, valid, c["k"], c["block"], c["prior"])
    for long in (8, 2**20) if kernels == "triton" else (8,):
        with small_blocks(kernels, LONG=long):
            found = ops.memory(half(logits.to(device)), there, c["k"], c["block"], c["prior"], kernels == "triton")
        check_all(found, expected)


CANDIDATES = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "blocks": st.integers(0, 4),
        "block": st.integers(1, 9),
        "kq": st.integers(1, 10),
        "capacity": st.integers(1, 10),
        "content": st.sampled_from(CONTENTS),
        "mask": st.sampled_from(("none", "random", "nobody")),
        "first": st.booleans(),
        "seed": SEEDS,
    }
)
SOME = {"shape": (2, 1), "blocks": 3, "seed": 5}


@EVERY_KERNEL
@pytest.mark.interpreted
@example(c={**SOME, "block": 7, "kq": 2, "capacity": 2, "content": "special", "mask": "random", "first": True})
@example(c={**SOME, "block": 5, "kq": 5, "capacity": 9, "content": "numbers", "mask": "none", "first": False})
@given(c=CANDIDATES)
@counted
def test_candidates_reach_the_threshold_of_the_block_before(
    kernels: str, device: torch.device, c: dict[str, Any]
) -> None:
    batch, n = c["shape"][0], c["blocks"] * c["block"]
    logits = logits_of((*c["shape"], n), c["content"], c["seed"], torch.float32)
    valid = mask_of(batch, n, c["mask"], c["seed"])
    first = logits_of(c["shape"], "special", c["seed"] + 1, torch.float32) if c["first"] else None
    there, begin = (None if t is None else t.to(device) for t in (valid, first))
    options = c["kq"], c["capacity"], c["block"]
    found = ops.candidates(half(logits.to(device)), there, begin, *options, kernels == "triton")
    check_all(found, reached(logits, valid, first, *options))


@TRITON
@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_candidates_of_long_blocks(kernels: str, dtype: torch.dtype, device: torch.device) -> None:
    """Which are read in chunks: the least of those that reach it may lie in any."""
    from optimized.kernels import candidates as kernel

    chunk = 8
    for seed, width in enumerate((chunk, chunk + 1, 3 * chunk)):
        logits = logits_of((1, 1, 3 * width), "ties" if seed % 2 else "numbers", seed, dtype).to(device)
        first = logits[..., 0].clone()
        for kq, capacity in ((1, 3), (width, width), (3, chunk + 1)):
            with mock.patch.object(kernel, "CHUNK", chunk):
                found = ops.candidates(logits, None, first, kq, capacity, width, True)
            check_all(found, reached(logits.cpu(), None, first.cpu(), kq, capacity, width))


def later_values(n: int, cut: int, few: bool) -> Iterator[Tensor]:
    """What may come from a cut on, of rows of n."""
    for value in (math.nan,) if few else (math.nan, math.inf, -math.inf, 1e300):
        yield torch.full((n - cut,), value, dtype=torch.float64)
    yield draw((n - cut,), "normal", 17)


@EVERY_KERNEL
@pytest.mark.interpreted
def test_no_block_is_told_of_later_ones(kernels: str, device: torch.device) -> None:
    """Whatever stands from a cut on, memories of blocks until there and candidates before it are the same."""
    block, prior, blocks, triton = 3, 2, 5, kernels == "triton"
    n = prior + blocks * block
    logits = draw((1, 2, n), "normal", 3).round().to(device)
    first = torch.zeros(1, 2, dtype=torch.float64, device=device)
    with small_blocks(kernels):
        whole = ops.memory(logits, None, 4, block, prior, triton)
        taken = ops.candidates(logits[..., prior:], None, first, 2, 2, block, triton)
        for cut in range(prior, n, 5 if triton else 1):
            for later in later_values(n, cut, triton):
                changed = torch.cat((logits[..., :cut], later.to(device).expand(1, 2, -1)), -1)
                until = (cut - prior) // block + 1  # the block of the cut itself knows what came before it
                for a, e in zip(ops.memory(changed, None, 4, block, prior, triton), whole):
                    check_identical(a[:, :, :until], e[:, :, :until])
                _, _, inverse, thresholds, _ = ops.candidates(
                    changed[..., prior:], None, first, 2, 2, block, triton
                )  # fmt: skip
                check_identical(inverse[..., : cut - prior], taken[2][..., : cut - prior])
                check_identical(thresholds[..., :until], taken[3][..., :until])


@TRITON
@pytest.mark.gpu
def test_memory_of_a_long_row(kernels: str, device: torch.device) -> None:
    """In groups, on the GPU, against PyTorch; also of few distinct logits."""
    for content, k in (("numbers", 512), ("ties", 512), ("numbers", 5000), ("special", 1)):
        logits = logits_of((1, 2, 100 + 256 * 300), content, k, torch.float32).to(device)
        valid = mask_of(1, logits.shape[-1], "random", 3)
        assert valid is not None
        for there in (None, valid.to(device)):
            expected = ops.memory(logits, there, k, 256, 100, False)
            check_all(ops.memory(logits, there, k, 256, 100, True), tuple(t.cpu() for t in expected))


@TRITON
@pytest.mark.interpreted
def test_rows_that_lie_apart(kernels: str, device: torch.device) -> None:
    """As those of a length that does not divide among devices."""
    logits = draw((2, 2, 6), "normal", 0)
    given = torch.nn.functional.pad(logits, (0, 1)).to(device)[..., :6]
    check_all(ops.memory(given, None, 2, 2, 2, True), remembered(logits, None, 2, 2, 2))
    check_all(ops.candidates(given, None, None, 1, 2, 2, True), reached(logits, None, None, 1, 2, 2))


@pytest.mark.parametrize("blocks", [0, 1])
def test_shapes_of_few_blocks_are_known_ahead(blocks: int) -> None:
    logits = torch.zeros(2, 3, 4 * blocks)
    for call in (
        lambda t: ops.candidates(t, None, None, 1, 2, 4, False),
        lambda t: ops.memory(t, None, 2, 4, t.shape[2], False),
    ):
        known = [(t.shape, t.dtype) for t in call(logits.to("meta"))]
        assert known == [(t.shape, t.dtype) for t in call(logits)]
