"""Processes that run functions side by side, in a process group of gloo: what a cluster does, on one machine."""

from __future__ import annotations

import datetime
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2
# Seconds, and of failures only: for ranks that wait for ever, and for one whose neighbour has failed.
PATIENCE, GRACE = 1500, 5


class Ranks:
    """`run(function, *args)` calls function(rank, *args) in each process; functions of modules, picklable arguments."""

    def __init__(self, most: int = WORLD) -> None:
        self.most = most
        self.folder = tempfile.TemporaryDirectory()
        self.calls = 0
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def _start(self, world: int) -> None:
        """As many processes as are asked for, and are not there yet."""
        context = torch.multiprocessing.get_context("spawn")
        new = range(len(self.processes), world)
        pairs = [context.Pipe() for _ in new]
        self.pipes += [ours for ours, _ in pairs]
        started = [
            context.Process(target=serve, args=(rank, theirs), daemon=True) for rank, (_, theirs) in zip(new, pairs)
        ]
        for process in started:
            process.start()
        self.processes += started
        for _, theirs in pairs:
            theirs.close()  # so that the end of a process is seen

    def run(self, function: Callable[..., Any], *args: Any, world: int | None = None) -> list[Any]:
        """What each rank returned; of the first `world` processes. AssertionError with the tracebacks of who failed."""
        self.calls += 1
        world = self.most if world is None else world
        self._start(world)
        meeting = Path(self.folder.name, str(self.calls)).as_uri()
        for pipe in self.pipes[:world]:
            pipe.send((function, args, meeting, world))
        answers = self._answers(world)
        silent = set(range(world)) - answers.keys()
        if silent or not all(process.is_alive() for process in self.processes):
            self._stop()
        failed = [f"rank {rank}:\n{answer}" for rank, (fine, answer) in sorted(answers.items()) if not fine]
        if failed or silent:
            raise AssertionError("\n".join(failed) or f"no answer of ranks {silent}")
        return [answers[rank][1] for rank in range(world)]

    def _answers(self, world: int) -> dict[int, tuple[bool, Any]]:
        """(whether it returned, what it returned or its traceback), by rank. Once one failed, others may hang."""
        answers: dict[int, tuple[bool, Any]] = {}
        patience = PATIENCE
        while len(answers) < world:
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes[:world]) if rank not in answers}
            ready = wait(list(waiting), patience)
            if not ready:
                break
            for pipe in ready:
                try:
                    answers[waiting[pipe]] = pipe.recv()
                except (EOFError, ConnectionError):
                    answers[waiting[pipe]] = (False, "the process ended")
            if not all(fine for fine, _ in answers.values()):
                patience = GRACE
        return answers

    def _stop(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()
        self.pipes, self.processes = [], []

    def close(self) -> None:
        self._stop()
        self.folder.cleanup()


@contextmanager
def two_ranks() -> Iterator[Ranks]:
    with several_ranks(WORLD) as ranks:
        yield ranks


@contextmanager
def several_ranks(most: int) -> Iterator[Ranks]:
    ranks = Ranks(most)
    try:
        yield ranks
    finally:
        ranks.close()


def serve(rank: int, pipe: Connection) -> None:
    """Of a child process: a process group for each function, so that none sees what another left."""
    torch.set_num_threads(1)
    while True:
        function, args, meeting, world = pipe.recv()
        patience = datetime.timedelta(seconds=PATIENCE / 2)
        try:
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=patience)
            answer = True, function(rank, *args)
        except Exception:
            answer = False, traceback.format_exc()
        if dist.is_initialized():  # a rank that waits for this one fails too, at once
            dist.destroy_process_group()
        pipe.send(answer)


def mean_over_ranks(values: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: sum(value[name] for value in values) / len(values) for name in values[0]}
