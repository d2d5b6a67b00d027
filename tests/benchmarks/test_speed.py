"""Speed as tests: `pytest tests/benchmarks -m speed`, on a GPU with `--device cuda`; never part of an ordinary run.

Through pytest-benchmark: the layer, the reference and dense attention, whose table and statistics it prints
(`--benchmark-json FILE` and so on). On the CPU, assertions as well, on interleaved medians.
"""

from __future__ import annotations

import time
from typing import Any

import harness
import pytest
import torch

from .competitors import DIRECTIONS, FORWARD, enter
from .measure import Timing, clock_of, interleaved
from .shapes import LAYERS, Case, cases

pytestmark = pytest.mark.speed

NOISE = 1.1
CPU_CASES = {case.name: case for case in cases("cpu")}
COMPARED = {
    "cpu": ("N 2048", "N 8192 local", "tiny"),
    "cuda": ("tiny", "tiny 400", "2k", "8k", "8k local", "32k"),
}
PAIRS = [(device, name) for device, names in COMPARED.items() for name in names]


class EventTimer:
    """Seconds on the device for pytest-benchmark: CUDA events, each waited for; on the CPU the clock.

    An event is compared with the one before it: over minutes the difference in float32 would lose microseconds.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.last: torch.cuda.Event | None = None

    def __call__(self) -> float:
        if harness.DEVICE.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self.last is not None:
            self.seconds += self.last.elapsed_time(event) / 1e3
        self.last = event
        return self.seconds


@pytest.fixture
def case(request: pytest.FixtureRequest, device: torch.device) -> Case:
    """The case of this name on the device under test."""
    return next(case for case in cases(device.type) if case.name == request.param)


@pytest.mark.benchmark(timer=EventTimer(), warmup=False)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("competitor", [*LAYERS, "dense"])
@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=pytest.mark.gpu if device == "cuda" else pytest.mark.cpu) for device, name in PAIRS],
    indirect=True,
)
def test_benchmark(benchmark: Any, case: Case, competitor: str, direction: str, device: torch.device) -> None:
    clock = clock_of(device)
    benchmark.group = f"{case.name} {direction}"
    with enter(competitor, case, device) as steps:

        def fresh() -> None:
            steps.clear()
            clock.flush()
            clock.wait()

        rounds = 20 if device.type == "cuda" else 5
        benchmark.pedantic(steps.direction(direction), setup=fresh, rounds=rounds, warmup_rounds=2)


def compared(case: Case, direction: str) -> dict[str, Timing]:
    """Of the layer and of the reference, in turn."""
    cpu = torch.device("cpu")
    with enter("optimized", case, cpu) as ours, enter("reference", case, cpu) as theirs:

        def clear() -> None:
            ours.clear()
            theirs.clear()

        calls = [steps.direction(direction) for steps in (ours, theirs)]
        return dict(zip(LAYERS, interleaved(calls, clock_of(cpu), before=clear, budget_ms=1000, least=5)))


@pytest.mark.cpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", CPU_CASES)
def test_never_slower_than_the_reference(name: str, direction: str) -> None:
    """Three times as fast with local attention at N = 8192."""
    found = compared(CPU_CASES[name], direction)
    ratio = found["reference"].p50 / found["optimized"].p50
    assert ratio >= (3 if name == "N 8192 local" else 1 / NOISE), f"{ratio:.2f} times as fast: {found}"


@pytest.mark.cpu
@pytest.mark.parametrize("suffix", ["", " local"], ids=["routed", "local"])
def test_time_grows_linearly_at_fixed_slots(suffix: str) -> None:
    """Four times the tokens take four times as long, and a third more for caches that overflow; squares, 16 times."""
    cpu = torch.device("cpu")
    times = []
    for n in (2048, 8192):
        with enter("optimized", CPU_CASES[f"N {n}{suffix}"], cpu) as steps:
            times.append(interleaved([steps.direction(FORWARD)], clock_of(cpu), budget_ms=1000)[0].p50)
    assert times[1] <= 4 * 4 / 3 * times[0], times
