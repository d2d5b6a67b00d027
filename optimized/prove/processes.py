"""`python -m optimized --processes R`: a text sharded over R processes, held against one process.

Outputs and all gradients in float64, with what was sent, beside the formulas of it, and the time. gloo on a CPU, NCCL
on GPUs, one for each process.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console, RenderableType
from rich.text import Text as Styled
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from optimized.mixture import MixtureOfAttention
from optimized.parallel import ContextParallel, ExpertParallel, volume
from optimized.parallel.volume import Sent, Setting, Traffic
from optimized.prove import report
from optimized.prove.setup import Setup, prepare
from optimized.prove.tables import Column, Form, fitted
from optimized.prove.text import Text

BOUND = 1e-11  # of the largest number: float64, in another order of rounding, of sums over all tokens
STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "ContextParallel": ContextParallel,
    "ContextParallel, sharded experts": lambda: ContextParallel(shard_experts=True),
    "ExpertParallel": ExpertParallel,
}


class Compared(NamedTuple):
    """A style against one process. error: the largest of all outputs and gradients, of the largest of each.

    sent: the most that a rank sent; formula: the same as computed. milliseconds: forward and backward, of the slowest.
    """

    style: str
    error: float
    worst: str  # where it is
    sent: Sent
    formula: Sent
    milliseconds: float

    @property
    def failure(self) -> str | None:
        if not self.error <= BOUND:
            return f"{self.style}: {self.worst} differs by {self.error:.1e} of its largest number, beyond {BOUND:.0e}"
        if self.sent != self.formula:
            return f"{self.style}: sent {self.sent}, by the formulas {self.formula}"
        return None


def run(args: argparse.Namespace, text: Text, console: Console) -> int:
    """Exit status: 0 if all styles agree with one process."""
    started = time.perf_counter()
    console.print(report.header(args, text, f"{report.described(args)}; over {args.processes} processes, float64"))
    console.print()
    with tempfile.TemporaryDirectory() as folder:
        given = prepare(args, text), args.processes, Path(folder)
        torch.multiprocessing.spawn(serve, given, args.processes)
        alone, found = torch.load(Path(folder, "found.pt"), weights_only=False)
    console.print(table(alone, found, console.width))
    failures = [c.failure for c in found if c.failure]
    for failure in failures:
        console.print(f"\n{failure}", style="red", markup=False)
    seconds = time.perf_counter() - started
    if failures:
        console.print(f"\n[bold red]FAIL[/]  {len(failures)} of {len(found)} styles, {seconds:.1f} s")
        return 1
    console.print(f"\n[bold green]PASS[/]  {len(found)} styles are what one process computes, {seconds:.1f} s")
    return 0


def styles_of(experts: int, processes: int) -> list[str]:
    """Experts are sharded where the processes divide them."""
    return [name for name in STYLES if name == "ContextParallel" or experts % processes == 0]


def serve(rank: int, setup: Setup, processes: int, folder: Path) -> None:
    """One of the processes; the first writes what was found."""
    cuda = setup.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max((os.cpu_count() or 1) // processes, 1))
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group("nccl" if cuda else "gloo", init_method=meeting, rank=rank, world_size=processes)
    try:
        device = torch.device("cuda", rank) if cuda else setup.device
        mesh = init_device_mesh(setup.device.type, (processes,))
        expected, milliseconds = called(layer_of(setup, device), *tensors(setup, device))
        styles = styles_of(setup.arguments["num_experts"], processes)
        found = [compare(name, setup, device, mesh, expected) for name in styles]
        if rank == 0:
            torch.save((milliseconds, found), folder / "found.pt")
    finally:
        dist.destroy_process_group()


def tensors(setup: Setup, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and the cotangent."""
    return setup.x.to(device, torch.float64), setup.cotangent.to(device, torch.float64)


def layer_of(setup: Setup, device: torch.device) -> MixtureOfAttention:
    layer = MixtureOfAttention(**setup.arguments, device=device, dtype=torch.float64)
    layer.load_state_dict(setup.state)
    return layer


def called(layer: nn.Module, x: Tensor, cotangent: Tensor) -> tuple[dict[str, Tensor], float]:
    """out, dx and gradients of parameters; and milliseconds of the second of two calls."""
    found: dict[str, Tensor] = {}
    for _ in range(2):
        layer.zero_grad()
        x = x.detach().requires_grad_()
        synchronize(x)
        begun = time.perf_counter()
        out = layer(x)
        out.backward(cotangent)
        synchronize(x)
        milliseconds = 1000 * (time.perf_counter() - begun)
    assert x.grad is not None
    found = {"out": out.detach(), "dx": x.grad}
    for name, p in layer.named_parameters():
        assert p.grad is not None
        found[name] = p.grad
    return found, milliseconds


def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def compare(style: str, setup: Setup, device: torch.device, mesh: DeviceMesh, expected: dict[str, Tensor]) -> Compared:
    layer = parallelize_module(layer_of(setup, device), mesh, STYLES[style]())
    x, cotangent = tensors(setup, device)
    rank, size, n = mesh.get_local_rank(), mesh.size(), x.shape[1]
    of_context = style != "ExpertParallel"
    if of_context:  # plain shards are equal, so the text is cut where it must be
        each = n // size
        x, cotangent = (t[:, rank * each : (rank + 1) * each].contiguous() for t in (x, cotangent))
    found, milliseconds = called(layer, x, cotangent)
    largest = {}
    for name, g in found.items():
        right = expected[name]
        if of_context and name in ("out", "dx"):
            right = right[:, rank * each : (rank + 1) * each]
        elif isinstance(g, DTensor):
            g = g.full_tensor()
        elif of_context:
            g = g.clone()
            dist.all_reduce(g)
        error = (g - right).abs().max() / expected[name].abs().max().clamp_min(1e-300)
        largest[name] = float(error) if not math.isnan(float(error)) else math.inf
    worst = max(largest, key=lambda name: largest[name])
    sent = traffic(layer, x, cotangent, size, rank)
    mine = Compared(style, largest[worst], worst, sent, formula_of(style, layer, size, rank, n), milliseconds)
    every: list[Any] = [None] * size
    dist.all_gather_object(every, mine)
    slowest = max(c.milliseconds for c in every)
    odd = next((c for c in every if c.failure), max(every, key=lambda c: sum(c.sent)))
    return odd._replace(milliseconds=slowest, error=max(c.error for c in every))


def formula_of(style: str, layer: Any, size: int, rank: int, n: int) -> Sent:
    setting = Setting(size, 1, n, 8, rank=rank)
    if style == "ExpertParallel":
        return volume.total(volume.expert_parallel(layer.config, setting))
    found = volume.context_parallel(layer.config, setting)
    if style != "ContextParallel":
        found |= volume.sharded_experts(layer.config, setting)
    return volume.total(found)


def traffic(layer: nn.Module, x: Tensor, cotangent: Tensor, size: int, rank: int) -> Sent:
    x = x.detach().requires_grad_()
    with Traffic(size, rank) as forward:
        out = layer(x)
    with Traffic(size, rank) as backward:
        out.backward(cotangent)
    return Sent(forward.bytes, backward.bytes)


def table(alone: float, found: list[Compared], width: int) -> RenderableType:
    caption = (
        "largest error: from one process, of outputs and all gradients, over the largest number of each; "
        f"{BOUND:.0e} is the limit. sent: by the rank that sends most, forward / backward, counted, and by the "
        f"formulas of docs/parallel.md. Times: forward and backward, in float64; one process takes {alone:.1f} ms."
    )
    columns = [Column("style", room=16), Column("largest\nerror", right=True)]
    columns += [Column(name, right=True) for name in ("sent, MB", "by formula", "ms")] + [Column("")]
    rows = []
    for c in found:
        verdict = Styled("FAIL", style="bold red") if c.failure else Styled("ok", style="green")
        sent = [" / ".join(f"{b / 1e6:.3f}" for b in of) for of in (c.sent, c.formula)]
        rows.append([*map(Styled, (c.style, f"{c.error:.1e}", *sent, f"{c.milliseconds:.1f}")), verdict])
    return fitted(width, "Over several processes", caption, Form(columns, rows))
