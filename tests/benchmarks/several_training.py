"""Steps of training a language model over several devices: of DDP and FSDP2 beside one device, as many tokens on each.

A step is a whole one of `python -m optimized.train`: forward, backward, clipping and AdamW, on the text that comes with
Python, in bfloat16 on a GPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from optimized.train.arguments import parse
from optimized.train.plan import plan_of
from optimized.train.ranks import STYLES, joined
from optimized.train.trainer import Trainer

SEQUENCES = 4  # of a device
WARM, TIMED = 3, 6  # steps


def training(
    kind: str, ranks: int, size: str, most: Callable[[float], float], wait: Callable[[], None]
) -> list[dict[str, Any]]:
    """Rows, one of each style. most: of all ranks; wait: for all of them."""
    rows = []
    for style in STYLES if ranks > 1 else (None,):
        how = [] if style is None else ["--parallel", style]
        args, parser = parse(["--device", kind, "--size", size, "--batch", str(SEQUENCES * ranks), *how])
        plan = plan_of(args, parser)
        with joined(kind) as here:
            trainer = Trainer(plan.settings, plan.split, here, plan.way)
            if kind == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(WARM):
                trainer.train_step()
            wait()
            begun = time.perf_counter()
            for _ in range(TIMED):
                trainer.train_step()
            wait()
            seconds = most((time.perf_counter() - begun) / TIMED)
            peak = most(torch.cuda.max_memory_allocated() / 2**20 if kind == "cuda" else 0.0)
        row = {"ranks": ranks, "style": style, "size": size, "parameters": plan.parameters}
        row |= {"tokens": plan.settings.batch * plan.settings.context, "ms": seconds * 1000, "peak_mib": peak}
        rows.append(row | {"tokens_per_second": row["tokens"] / seconds})
        del trainer
        gc.collect()
        if kind == "cuda":
            torch.cuda.empty_cache()
    return rows
