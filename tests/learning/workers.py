"""Runs side by side: a process for each place on a device takes one after the other."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .trial.settings import Settings
from .trial.training import Run

LEAST = 20.0  # seconds between two savings of a run on its way
Told = Callable[[Settings, int, float], None]


class Places(NamedTuple):
    """Where runs are made. states: folder of runs on their way. deadline: of `time.time`, when to put them aside."""

    devices: tuple[str, ...]  # one for each run at a time
    states: Path | None
    deadline: float


def perform(s: Settings, device: torch.device, places: Places, told: Told) -> dict[str, Any] | None:
    """The figures of a run, or None where it was put aside; what went wrong as `reason`."""
    if time.time() >= places.deadline:
        return None
    state = None if places.states is None else places.states / f"{s.key()}.pt"
    try:
        return _perform(s, device, state, places.deadline, told)
    except Exception as error:  # whatever it is, the other runs go on
        return {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _perform(
    s: Settings, device: torch.device, state: Path | None, deadline: float, told: Told
) -> dict[str, Any] | None:
    found = None
    if state is not None and state.exists():
        found = torch.load(state, map_location=device, weights_only=True)
    run, kept = Run(s, device, found), time.monotonic()

    def enough() -> bool:
        nonlocal kept
        over = time.time() >= deadline
        if state is not None and (over or time.monotonic() - kept > LEAST):
            kept = time.monotonic()
            state.parent.mkdir(parents=True, exist_ok=True)
            partial = state.with_suffix(".partial")
            torch.save(run.saved(), partial)
            partial.replace(state)
        return over

    if not run.train(lambda step, loss: told(s, step, loss), enough):
        return None
    figures = run.figures()
    if state is not None:
        state.unlink(missing_ok=True)
    return figures


def perform_all(todo: list[Settings], places: Places, told: Told) -> Iterator[tuple[Settings, dict[str, Any] | None]]:
    """As they end. One place: in this process."""
    if len(places.devices) == 1:
        device = _entered(places.devices[0])
        for s in todo:
            yield s, perform(s, device, places, told)
        return
    context = multiprocessing.get_context("spawn")
    devices, notes = context.Queue(), context.Queue()
    for name in places.devices:
        devices.put(name)
    with ProcessPoolExecutor(len(places.devices), context, _begin, (devices, notes)) as pool:
        waiting: dict[Future[Any], Settings] = {pool.submit(_work, s, places): s for s in todo}
        while waiting:
            done, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            while not notes.empty():
                told(*notes.get())
            for future in done:
                yield waiting.pop(future), future.result()


def _entered(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


# In a worker

_own: dict[str, Any] = {}


def _begin(devices: Any, notes: Any) -> None:
    _own.update(device=_entered(devices.get()), notes=notes)


def _work(s: Settings, places: Places) -> dict[str, Any] | None:
    return perform(s, _own["device"], places, lambda *note: _own["notes"].put(note))
