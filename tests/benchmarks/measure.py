"""Time, memory, kernels and host time of a call.

Time: the call is warm; between repetitions gradients are dropped and the L2 cache is overwritten; the interval between
two CUDA events around one call is a sample (on the CPU: between two readings of the clock); the median is reported with
the 20th and 80th percentile. Nothing waits between repetitions, so that the events also see a GPU that waits for its
host. The clock is waited for before anything is read.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from . import stages

Call = Callable[[], Any]
FLUSHED = 256 * 2**20  # bytes: several times any L2 cache, and what Triton's do_bench writes
LEAD = 200_000  # cycles, about 0.1 ms: the host is ahead of the GPU by then


class Timing(NamedTuple):
    """Milliseconds."""

    p20: float
    p50: float
    p80: float
    repetitions: int


class Clock(Protocol):
    def flush(self, lead: bool = False) -> None:
        """Overwrite the cache; lead: and keep the device busy until the host has enqueued a short call."""

    def mark(self) -> Any:
        """A point of time on the device."""

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks, after `wait`."""

    def wait(self) -> None:
        """Until everything enqueued is done."""


class CpuClock:
    def flush(self, lead: bool = False) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, start: float, end: float) -> float:
        return 1e3 * (end - start)

    def wait(self) -> None:
        pass


class CudaClock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.scratch = torch.empty(FLUSHED, dtype=torch.int8, device=device)

    def flush(self, lead: bool = False) -> None:
        self.scratch.zero_()
        if lead:
            torch.cuda._sleep(LEAD)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def nothing() -> None:
    pass


def time_call(
    call: Call, clock: Clock, *, before: Call = nothing, budget_ms: float = 60.0, least: int = 5, most: int = 200,
    lead: bool = False,
) -> Timing:  # fmt: skip
    """before: runs ahead of every repetition, and is not timed. budget_ms: spent on repetitions, beyond `least`."""
    return interleaved([call], clock, before=before, budget_ms=budget_ms, least=least, most=most, lead=lead)[0]


def interleaved(
    calls: list[Call], clock: Clock, *, before: Call = nothing, budget_ms: float = 60.0, least: int = 5,
    most: int = 200, lead: bool = False,
) -> list[Timing]:  # fmt: skip
    """Each call in turn, so that what disturbs the machine disturbs all; budget_ms for each of them."""
    for call in calls:  # compiles, loads code, probes
        before()
        call()
    clock.wait()
    start = time.perf_counter()
    warm = 0
    while warm < 3 and (warm < 1 or 1e3 * (time.perf_counter() - start) < budget_ms / 2):
        for call in calls:
            before()
            call()
        clock.wait()
        warm += 1
    estimate = 1e3 * (time.perf_counter() - start) / warm / len(calls)
    repetitions = int(min(max(budget_ms / max(estimate, 1e-3), least), most))
    marks: list[list[tuple[Any, Any]]] = [[] for _ in calls]
    for _ in range(repetitions):
        for call, taken in zip(calls, marks):
            before()
            clock.flush(lead)
            first = clock.mark()
            call()
            taken.append((first, clock.mark()))
    clock.wait()
    return [percentiles([clock.between(*pair) for pair in taken]) for taken in marks]


def percentiles(samples: list[float]) -> Timing:
    p20, p50, p80 = (float(p) for p in np.quantile(samples, (0.2, 0.5, 0.8)))
    return Timing(p20, p50, p80, len(samples))


def peak_bytes(call: Call, device: torch.device) -> int:
    """The allocator's peak above what was allocated before: without inputs and parameters."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    in_use = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(in_use, default=0)


class Profile(NamedTuple):
    """Of one call. kernels: launches; copies: memcpy and memset; stage_ms: time of either by stage, see `stages`.

    names: launches of each, so that a kernel under "other" can be found.
    """

    kernels: int
    copies: int
    stage_ms: dict[str, float]
    names: dict[str, float]


def profile_kernels(call: Call, clock: Clock, *, before: Call = nothing, calls: int = 3) -> Profile:
    """CUDA only. Runs back to back, caches warm: the shares matter here, `time_call` has the sum."""
    before()
    call()
    clock.wait()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            before()
            call()
        clock.wait()
    return summarise(profile.profiler.kineto_results.events(), calls)


def summarise(events: list[Any], calls: int) -> Profile:
    """events: of Kineto, those of the device counted."""
    stage_ms: dict[str, float] = {}
    names: dict[str, int] = {}
    copies = 0
    for event in events:
        if event.device_type() != DeviceType.CUDA or event.is_user_annotation():
            continue
        name = event.name()
        copies += stages.is_copy(name)
        names[name] = names.get(name, 0) + 1
        stage = stages.stage_of(name)
        stage_ms[stage] = stage_ms.get(stage, 0.0) + event.duration_ns() / 1e6 / calls
    launches = sum(names.values())
    often = {name[:100]: round(count / calls, 2) for name, count in sorted(names.items(), key=lambda item: -item[1])}
    return Profile(round((launches - copies) / calls), round(copies / calls), stage_ms, often)


def host_ms(call: Call, clock: Clock, *, before: Call = nothing, launches: int = 100) -> float:
    """Time until a call has been enqueued: nothing waits, and the queue (about 1000 launches) does not fill."""
    calls = max(1, min(8, 600 // max(launches, 1)))
    means = []
    for _ in range(5):
        clock.wait()
        taken = 0.0
        for _ in range(calls):
            before()
            start = time.perf_counter()
            call()
            taken += time.perf_counter() - start
        means.append(1e3 * taken / calls)
    clock.wait()
    return statistics.median(means)
