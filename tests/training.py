"""What the tests of `python -m optimized.train` share: a small model, a short text, and runs in this process."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch

from optimized.train import job
from optimized.train.arguments import parse
from optimized.train.plan import Plan, plan_of
from optimized.train.ranks import Ranks
from optimized.train.trainer import Trainer, Way
from tests.test_main import LINES

SIZES = "--depth 2 --dim 16 --dim-head 8 --window 8 --experts 2 --queries 2 --memory 8"
STEPS = "--context 32 --batch 4 --steps 12 --rate 0.02 --log-every 5 --evaluate-every 6 --evaluate-tokens 128"
SMALL = f"{SIZES} {STEPS} --device cpu --no-color".split()
ALONE = Ranks(0, 1, torch.device("cpu"))


def book_in(folder: Path) -> str:
    """A text, as a file."""
    path = folder / "book.txt"
    path.write_text("".join(f"Chapter {i}. {LINES}" for i in range(12)), encoding="utf-8")
    return str(path)


def run(*argv: str) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = job.main(argv)
    return status, printed.getvalue()


def planned(*argv: str) -> Plan:
    return plan_of(*parse(argv))


def trainer_of(plan: Plan, ranks: Ranks = ALONE, way: Way | None = None) -> Trainer:
    return Trainer(plan.settings, plan.split, ranks, way or plan.way)
