"""Time and peak memory of a call."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Measured(NamedTuple):
    """mebibytes: None where the system does not tell."""

    value: Any
    milliseconds: float
    mebibytes: float | None


def measure(call: Callable[[], Any], device: torch.device) -> Measured:
    """Result and peak memory above the start of a first call; median time of up to five more, none if it took long."""
    before = reset_peak(device)
    start = now(device)
    value = call()
    times = [now(device) - start]
    after = peak(device)
    patience = 3.0 if device.type == "cuda" else 0.5  # on a GPU the first call loads the kernels
    while len(times) < 6 and sum(times) < patience:
        start = now(device)
        call()
        times.append(now(device) - start)
    memory = None if before is None or after is None else max(after - before, 0) / 2**20
    return Measured(value, 1e3 * statistics.median(times[1:] or times), memory)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> int | None:
    """Set the peak back to what is in use; returns that in bytes. On the CPU: of the whole process, on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that glibc keeps would not be seen to grow again
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return peak(device)
    return None


def peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return None
