"""Tells how far a run is: a bar for each kind on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .state import State
from .tally import Tally
from .worker import kind_of

EVERY = 10  # seconds


class Reporter:
    """`told` goes to `runner.run`. Counts cases in whole chunks, those of earlier runs too."""

    def __init__(self, console: Console, kinds: Sequence[str], cases: int, state: State) -> None:
        self.console, self.kinds = console, kinds
        self.total = {kind: -(-cases // kind_of(kind).CHUNK) * kind_of(kind).CHUNK for kind in kinds}
        self.done = {kind: min(len(state.done(kind)) * kind_of(kind).CHUNK, self.total[kind]) for kind in kinds}
        self.failures = 0
        self.last = self.start = time.monotonic()
        self.fresh = 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bars = Progress(*columns, console=console) if console.is_terminal else None
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Reporter:
        if self.bars is not None:
            self.bars.start()
            for kind in self.kinds:
                self.tasks[kind] = self.bars.add_task(kind, total=self.total[kind], completed=self.done[kind])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bars is not None:
            self.bars.stop()
        else:
            self._line()

    def told(self, kind: str, chunk: int | None, tally: Tally) -> None:
        for failure in tally.failures:
            self.failures += 1
            self.console.print(f"{failure.message}\n    {failure.snippet}", style="red", markup=False, highlight=False)
        if chunk is None:
            return
        size = kind_of(kind).CHUNK
        self.done[kind] += size
        self.fresh += size
        if self.bars is not None:
            self.bars.update(self.tasks[kind], completed=self.done[kind])
        elif time.monotonic() - self.last > EVERY:
            self._line()

    def _line(self) -> None:
        self.last = time.monotonic()
        rate = self.fresh / max(self.last - self.start, 1e-9)
        counts = ", ".join(f"{kind} {self.done[kind]:,} of {self.total[kind]:,}" for kind in self.kinds)
        self.console.print(f"{counts}; {rate:,.0f} cases a second; {self.failures} failed", highlight=False)
