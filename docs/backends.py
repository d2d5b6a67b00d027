"""Which backend serves each combination of dropout, mask and dtype: run, recorded, and its memory watched.

    python docs/backends.py --out cpu.json                    # every cell, on the CPU
    python docs/backends.py --device cuda --out gpu.json      # or on a GPU, with the flash-attn installed
    python docs/backends.py --table docs/generated/backends.md cpu.json gpu.json     # into it, a section for each

A cell is a layer, forward and backward. The backend is that of the plan of that very call. Its peak memory is
measured at N tokens and at 2 N, the slots doubled too: nothing N x N, nor slots x slots, may appear. Backends that
write attention out hold slots x slots (`SQUARE`); of these the tokens alone are doubled. Exit status: 1 if a cell
failed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


import optimized  # noqa: E402
from optimized.attention import math as written_out  # noqa: E402
from optimized.plan import REGISTRY, Kind, Plan, bind  # noqa: E402
from optimized.prove.environment import hardware, version, versions  # noqa: E402
from tests import record  # noqa: E402
from tests.benchmarks.measure import peak_bytes  # noqa: E402

STAGES = ("routed_attention", "local_attention")
DROPOUTS = (0.0, 0.1)
MASKS = ("none", "suffix", "holes")
DTYPES = ("bfloat16", "float16", "float32", "float64")
SQUARE = {"math"}  # holds slots x slots weights, but on the CPU
BITS = {"triton"}  # holds a bit of each weight that dropout may take
TOKENS = {"cpu": 2048, "cuda": 8192}
WINDOW = 64
GROWTH = 2.2  # of the peak, when everything doubles: 2 if linear; 4 where a square dominates, as it does at this size
GROWTH_OF_BITS = 2.5  # where a fifth of it is bits


def make_mask(kind: str, n: int, device: str) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "suffix":
        return (torch.arange(n, device=device) < n - n // 4).expand(2, n)
    return torch.rand(2, n, device=device) > 0.25


def run_layer(stage: str, dropout: float, mask: str, dtype: torch.dtype, device: str, n: int, slots: int) -> list[int]:
    """Forward and backward, once to load code and once measured: the peak in bytes."""
    local = stage == "local_attention"
    torch.manual_seed(0)
    layer = optimized.MixtureOfAttention(
        64, num_routed_queries=slots, num_routed_key_values=slots, num_experts=2, dim_head=64, heads=2,
        dropout=dropout, local_attn=local, local_attn_window_size=WINDOW if local else None, device=device, dtype=dtype,
    )  # fmt: skip
    x = torch.randn(2, n, 64, device=device, dtype=dtype, requires_grad=True)
    shown = make_mask(mask, n, device)

    def step() -> None:
        out = layer(x, mask=shown)
        grads = torch.autograd.grad(out, [x, *layer.parameters()], torch.ones_like(out), allow_unused=True)
        for t in (out, *grads):
            assert t is None or t.isfinite().all(), "not finite"

    step()
    return peak_bytes(step, torch.device(device))


@contextlib.contextmanager
def recorded(stage: str) -> Iterator[set[str]]:
    """Names of the backends of a stage in the plans that the layer gets meanwhile."""
    chosen: set[str] = set()

    def record(kind: Kind) -> Plan:
        plan = bind(kind)
        chosen.add(getattr(plan, stage))
        return plan

    with mock.patch.object(sys.modules["optimized.mixture"], "bind", record):
        yield chosen


def run_cell(stage: str, dropout: float, mask: str, dtype: str, device: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"stage": stage, "dropout": dropout, "mask": mask, "dtype": dtype}
    run = partial(run_layer, stage, dropout, mask, getattr(torch, dtype), device)
    n = TOKENS[device]
    slots = n // 2 if stage == "routed_attention" else 16
    try:
        with recorded(stage) as chosen:
            small = run(n, slots)
            if chosen & SQUARE and device != "cpu":
                small, large = run(n, WINDOW), run(2 * n, WINDOW)
            else:
                large = run(2 * n, 2 * slots)
        (cell["backend"],) = chosen
        cell |= {"peak": small, "growth": round(large / small, 2)}
    except Exception as error:
        cell["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return cell


def failure(cell: dict[str, Any]) -> str:
    """What is wrong with it, "" if nothing is."""
    most = GROWTH_OF_BITS if cell["dropout"] and cell.get("backend") in BITS else GROWTH
    if cell.get("growth", 0) > most:
        return f"peak memory grew by {cell['growth']:.2f} where all sizes doubled"
    return "" if "growth" in cell else cell["error"]


def flash_packages() -> str:
    found = [f"{name} {v}" for name in ("flash-attn", "flash-attn-4") if (v := version(name))]
    return ", ".join(found) or "no flash-attn"


def control(device: str) -> float:
    """Growth where slots x slots weights are held: unless it shows, no other number says anything."""
    n = TOKENS[device]
    at_once = mock.patch.object(written_out, "TILE", sys.maxsize)
    with at_once, optimized.use_backends(routed_attention="math"):
        small, large = (
            run_layer("routed_attention", 0.0, "none", torch.float32, device, size, size // 2) for size in (n, 2 * n)
        )
    return round(large / small, 2)


def run_all(device: str) -> dict[str, Any]:
    """The report of a device with what is installed here. The other stages are PyTorch's, to compile less."""
    start = time.monotonic()
    cells = []
    matrix = list(itertools.product(STAGES, DROPOUTS, MASKS, DTYPES))
    with optimized.use_backends(routing="torch", dispatch="torch", mixture="torch"):
        for key in matrix:
            cells.append(cell := run_cell(*key, device))
            took = f"{len(cells)} of {len(matrix)}, {time.monotonic() - start:.0f} s"
            said = failure(cell) or f"{cell['peak'] / 2**20:.0f} MiB, x {cell['growth']}"
            print(f"{took}: {' '.join(map(str, key))}: {cell.get('backend', '-')}, {said}", flush=True)
    return {
        "hardware": hardware(torch.device(device)),
        "flash": flash_packages(),
        "versions": versions(),
        "control": control(device),
        "seconds": round(time.monotonic() - start),
        "cells": cells,
    }


INTRODUCTION = f"""# Which backend serves what

Every cell below was run: a layer, forward and backward, in training mode. The name is that of the backend in the
plan of this very call; nothing is forced (`optimized.use_backends` does that). The order of preference:

{{order}}

`explain(layer, x)` says for a call of yours what serves it and why not another.

Masks: none; a quarter of the tokens padded at the end (suffix); a quarter anywhere (holes). Dropout acts on the weights
of routed attention; local attention has none, and its rows show that it does not mind.

**Memory.** The number is the growth of peak memory, as the allocator counts it, from N to 2 N tokens with the slots
doubled too: 2 is linear, and more than {GROWTH} fails. So nothing N x N, nor slots x slots, is held. Names with \\*
write attention out: on a GPU they do hold slots x slots weights, and growth is that of the tokens alone, with the slots
fixed. Names with \\+ hold a bit of each weight, whether dropout keeps it; up to {GROWTH_OF_BITS} is allowed there.

Written by `python docs/backends.py`, one section for each device and installation of flash-attn.
"""


def section(report: dict[str, Any]) -> str:
    """Heading and table of a report."""
    cells = {(c["stage"], c["dropout"], c["mask"], c["dtype"]): c for c in report["cells"]}
    rows = []
    for key in itertools.product(STAGES, DROPOUTS, MASKS):
        stage, *rest = map(str, key)
        rows.append([stage.replace("_", " "), *rest, *(describe(cells[(*key, dtype)]) for dtype in DTYPES)])
    table = record.table(["stage", "dropout", "mask", *DTYPES], rows)
    control = f"`math` with its slots doubled, as a control: {report['control']:.2f}"
    said = f"{report['versions']}. {len(cells)} cells, {report['seconds']} s. {control}."
    return f"## {title(report)}\n\n{said}\n\n{table}\n"


def title(report: dict[str, Any]) -> str:
    return f"{report['hardware']}; {report['flash']}"


def describe(cell: dict[str, Any]) -> str:
    if failure(cell):
        return f"FAILED {cell.get('backend', '')}: {failure(cell)}"
    star = "\\*" * (cell["backend"] in SQUARE) + "\\+" * (cell["dropout"] > 0 and cell["backend"] in BITS)
    return f"`{cell['backend']}`{star} {cell['growth']:.2f}"


def render(path: Path, reports: list[dict[str, Any]]) -> None:
    """Rewrite the introduction and the sections of these reports; keep other sections."""
    order = [f"- {stage.replace('_', ' ')}: {', '.join(f'`{b.name}`' for b in REGISTRY[stage])}" for stage in STAGES]
    text = path.read_text() if path.exists() else ""
    kept = dict(re.findall(r"<!-- begin: (.*?) -->\n(.*?)<!-- end -->", text, re.DOTALL))
    kept |= {title(report): section(report) for report in reports}
    parts = [f"<!-- begin: {name} -->\n{body}<!-- end -->\n" for name, body in sorted(kept.items())]
    path.write_text("\n".join([INTRODUCTION.format(order="\n".join(order)), *parts]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=TOKENS, default="cpu", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="run, and write JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="Markdown, of these reports")
    parser.add_argument("reports", type=Path, nargs="*", metavar="REPORT", help="JSON written by --out")
    given = parser.parse_args()
    if given.table and given.reports:
        reports = [record.read(path) for path in given.reports]
        render(given.table, reports)
    elif given.out:
        reports = [run_all(given.device)]
        record.write(given.out, reports[0])
    else:
        parser.error("expected --out FILE, or --table FILE and reports")
    blind = any(report["control"] <= GROWTH for report in reports)
    return int(blind or any(failure(cell) for report in reports for cell in report["cells"]))


if __name__ == "__main__":
    sys.exit(main())
