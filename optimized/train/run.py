"""A run from its first step, or from a checkpoint, to what became of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from optimized.train import checkpoints, law, report
from optimized.train.keeping import Keeper
from optimized.train.plan import Plan
from optimized.train.ranks import Ranks
from optimized.train.stopping import Stopping
from optimized.train.trainer import NotFiniteError, Trainer


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms, without NaN in new memory."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for in deterministic mode
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


def run(plan: Plan, ranks: Ranks, folder: Path | None, console: Console) -> int:
    """Exit status. All processes have to call it."""
    begun, steps = time.perf_counter(), plan.settings.steps
    console.print(report.header(report.described(plan, ranks)))
    console.print()
    trainer = Trainer(plan.settings, plan.split, ranks, plan.way)
    if plan.state is not None:
        checkpoints.load(plan.state, trainer)
        console.print(f"Goes on at step {trainer.step} of {steps}, from the checkpoint in {folder}", markup=False)
    keeper = Keeper(folder, plan, trainer)
    try:
        number = _train(trainer, plan, console, keeper)
    except NotFiniteError as error:
        return report.verdict(console, [f"{error}: try a lower --rate"], "")
    except OSError as error:
        return report.verdict(console, [f"{error}: step {trainer.step} is not kept, what was kept before is whole"], "")
    if number:
        kept = "Nothing is kept without --out." if folder is None else f"The checkpoint in {folder} goes on from there."
        console.print(f"\nStopped at step {trainer.step} of {steps}. {kept}", style="yellow", markup=False)
        return 128 + number
    console.print()
    console.print(report.losses(trainer.curve, console.width))
    s = plan.settings
    cuts = law.cuts(trainer.logits, trainer.sequences(), s.model.vocab_size, s.model.window or 1)
    console.print()
    console.print(law.table(cuts, console.width))
    for line in keeper.kept:
        console.print(line, markup=False)
    first, last = (trainer.curve["validation"][i]["loss"] for i in (0, -1))
    failures = [cut.failure for cut in cuts if cut.failure]
    if not last < first:
        failures.append(f"the validation loss did not fall: {first:.4f} nats at first, {last:.4f} at last")
    said = f"validation loss from {first:.4f} to {last:.4f} nats, {report.unmoved(cuts)}"
    return report.verdict(console, failures, f"{said}, {time.perf_counter() - begun:.1f} s")


def _train(trainer: Trainer, plan: Plan, console: Console, keeper: Keeper) -> int:
    """The number of the signal that stopped it, or 0."""
    s, ranks = plan.settings, trainer.ranks
    columns = TextColumn("step {task.completed:.0f} of {task.total:.0f}"), BarColumn(), TextColumn("{task.description}")
    hidden = console.quiet or not console.is_terminal
    with (
        Stopping() as stopping,
        Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as progress,
    ):
        task = progress.add_task("", total=s.steps, completed=trainer.step)
        if not trainer.curve["validation"]:
            console.print(report.evaluated(trainer.evaluate(plan.bytes_per_token), s.steps, None))
        while trainer.step < s.steps:
            trainer.train_step()
            noted = None
            if trainer.noting:
                noted = trainer.note()
                progress.update(task, description=report.line(noted))
            progress.update(task, completed=trainer.step)
            ended = trainer.step == s.steps
            if ended or trainer.step % s.evaluate_every == 0:
                found = trainer.evaluate(plan.bytes_per_token)
                console.print(report.evaluated(found, s.steps, noted))
            # Processes are not told at the same step; where they wait for one another anyway, they agree.
            number = ranks.most(stopping.number) if noted is not None or ranks.size == 1 else 0
            if ended or number or trainer.step % plan.checkpoint_every == 0:
                keeper.keep()
            if number:
                return number
    return 0
