"""What the tests share: the comparator with a ledger of how much of each budget was used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

import optimized
from optimized.plan import Request, obstacle
from reference.testing import Match, assert_identical, assert_matches

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.float16, torch.bfloat16)
DEVICE = torch.device("cpu")  # that the tests run on; conftest sets it before it collects any
INTERPRETED_SHARE = 20
KERNELS = ("torch", "triton")  # who computes the stages that have kernels of ours; "triton" is interpreted on the CPU

# The reference, and the optimized package with either kind of kernels (fixtures of conftest).
BOTH = pytest.mark.parametrize("implementation", ["reference", *KERNELS], indirect=True)
EVERY_KERNEL = pytest.mark.parametrize("kernels", KERNELS, indirect=True)


def stages_by(kernels: str) -> dict[str, str]:
    """Keywords of `use_backends` that make one of KERNELS compute every stage that has a choice of them, but for routed
    attention: libraries serve it on every device, and tests of its backends name each.
    """
    name = "triton_interpreted" if kernels == "triton" and DEVICE.type == "cpu" else kernels
    every = {stage: names for stage, names in optimized.backends().items() if stage != "routed_attention"}
    return {stage: name for stage, names in every.items() if name in names}


def attention_backends(stage: str, **request: Any) -> list[Any]:
    """Parameters (backend, dtype): all pairs that can run here."""
    pairs = []
    for name in optimized.backends()[stage]:
        for dtype in DTYPES:
            if obstacle(stage, name, Request(DEVICE, dtype, **{"dim_head": 64, **request})) is None:
                pairs.append(pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}"))
    return pairs


@dataclass
class Ledger:
    """Of one test: examples run, and the worst fraction of a budget by (stage, dtype, backend).

    explicit: how many examples are written down, which are run before any is drawn.
    """

    backend: str = "-"
    explicit: int = 0
    failed: bool = False
    examples: int = 0
    worst: dict[tuple[str, str, str], float] = field(default_factory=dict)


current = Ledger()


def begin(backend: str, explicit: int = 0) -> Ledger:
    """A fresh ledger for the test that starts now."""
    global current
    current = Ledger(backend, explicit)
    return current


def check(
    actual: Tensor,
    oracle: Tensor,
    baseline: Tensor,
    *,
    stage: str,
    name: str = "",
    backend: str | None = None,
    expect: str | None = None,
    scale: float = 0.0,
    precision: torch.dtype | None = None,
) -> Match:
    """`reference.testing.assert_matches`, entered into the ledger."""
    key = (stage, str(precision or actual.dtype).removeprefix("torch."), backend or current.backend)
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
    """Beneath @given: counts examples in the ledger.

    Interpreted kernels take a thousand times as long, so of the examples that are drawn only every
    `INTERPRETED_SHARE`-th part is run, and the ledger says how many: the rest is the business of a GPU. A failing one
    is still shrunk.
    """

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        enough = current.explicit + max(hypothesis.settings.default.max_examples // INTERPRETED_SHARE, 1)
        if interpreted() and current.examples >= enough and not current.failed:
            return
        current.examples += 1
        try:
            test(*args, **kwargs)
        except hypothesis.errors.UnsatisfiedAssumption:  # neither an example nor a failure
            current.examples -= 1
            raise
        except Exception:
            current.failed = True
            raise

    return run


def interpreted() -> bool:
    """Whether the test that runs has its kernels interpreted."""
    return current.backend.startswith("triton") and DEVICE.type == "cpu"
