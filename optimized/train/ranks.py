"""One process or several, as torchrun starts them, and how the model is spread over them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optimized.transformer import Decoder

STYLES = ("ddp", "fsdp")


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, t: Tensor) -> Tensor:
        """Over all; in place."""
        if self.size > 1:
            dist.all_reduce(t)
        return t

    def most(self, number: int) -> int:
        """Over all."""
        if self.size == 1:
            return number
        t = torch.tensor(number, device=self.device)
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return int(t)

    def part(self, rows: Tensor) -> Tensor:
        """The rows of this process. Their number is a multiple of that of the processes."""
        each = len(rows) // self.size
        return rows[self.rank * each : (self.rank + 1) * each]


def world() -> tuple[int, int]:
    """Rank and number of processes, before they know one another."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def joined(kind: str) -> Iterator[Ranks]:
    """Of a kind of device, each process with its own: gloo on CPUs, NCCL on GPUs. A group that is there is used."""
    rank, size = world()
    device = torch.device(kind)
    if kind == "cuda" and size > 1:
        device = torch.device(kind, int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    starts = size > 1 and not dist.is_initialized()
    if starts:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", rank=rank, world_size=size)
    try:
        yield Ranks(rank, size, device)
    finally:
        if starts:
            dist.destroy_process_group()


def wrapped(model: Decoder, style: str | None, ranks: Ranks, compiled: bool) -> nn.Module:
    """What is called to train. `model` keeps its parameters' names; under fsdp they become DTensors."""
    if style == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(ranks.device.type, (ranks.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if compiled:
        model.compile()
    if style == "ddp":
        own: Any = [ranks.device] if ranks.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=own)
    return model


@contextmanager
def without_sync(model: nn.Module, last: bool) -> Iterator[None]:
    """Around a backward: gradients of all but the last part of a batch stay where they are, under ddp."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield
