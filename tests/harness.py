"""What the tests share: the comparator with a ledger of how much of each budget was used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reference.testing import Match, assert_identical, assert_matches

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Ledger:
    """Of one test: examples run, and the worst fraction of a budget by (stage, dtype, backend)."""

    examples: int = 0
    worst: dict[tuple[str, str, str], float] = field(default_factory=dict)


current = Ledger()


def begin() -> Ledger:
    """A fresh ledger for the test that starts now."""
    global current
    current = Ledger()
    return current


def check(
    actual: Tensor,
    oracle: Tensor,
    baseline: Tensor,
    *,
    stage: str,
    name: str = "",
    backend: str = "torch",
    expect: str | None = None,
    scale: float = 0.0,
    precision: torch.dtype | None = None,
) -> Match:
    """`reference.testing.assert_matches`, entered into the ledger."""
    key = (stage, str(precision or actual.dtype).removeprefix("torch."), backend)
    try:
        match = assert_matches(
            actual, oracle, baseline, stage=stage, name=name, expect=expect, scale=scale, precision=precision
        )
    except AssertionError:
        current.worst[key] = float("inf")
        raise
    current.worst[key] = max(current.worst.get(key, 0.0), match.fraction)
    return match


check_identical = assert_identical


def expectation(exact: Tensor) -> str | None:
    """What the comparator must be told of a degenerate but legitimate oracle."""
    if exact.numel() == 0:
        return "empty"
    if not exact.any():
        return "zeros"
    return "constant" if exact.numel() > 1 and bool((exact == exact.flatten()[0]).all()) else None


def counted(test: Callable[..., None]) -> Callable[..., None]:
    """Beneath @given: counts examples in the ledger."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        current.examples += 1
        test(*args, **kwargs)

    return run
