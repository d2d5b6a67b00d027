"""What a parallel layer is given: DTensors or plain shards, checked, as what this rank has and as what all have.

Letters: B batch, N tokens of the sequence, n of this rank, R ranks, D model dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Sharded
from torch.nn.parallel import DistributedDataParallel

from optimized.parallel.collectives import Ranks
from optimized.parallel.shards import Shard
from reference import contract

SEQUENCE = 1  # the dimension of tokens


class Spread(nn.Module):
    """What all layers in parallel are."""

    over: Over

    def kind_of_call(self, x: Any, **forward_arguments: Any) -> Any:
        """For `explain`, which is to be asked before: stages and their backends stay the same."""
        contract.reject("module", "a layer before parallelize_module", f"one under {self.over.style}", TypeError)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> Any:
        """DistributedDataParallel asks for it first of all."""
        self.over.refuse_sharded_in_ddp()
        raise AttributeError("_ddp_params_and_buffers_to_ignore")


class Over:
    """How a layer is spread: over which ranks, and whether its experts are."""

    def __init__(self, ranks: Ranks, style: str, sharded: bool) -> None:
        self.ranks, self.style, self.sharded = ranks, style, sharded
        self.lengths: set[int] = set()  # of plain shards that all ranks were found to have

    def __deepcopy__(self, memo: Any) -> Over:
        return Over(self.ranks, self.style, self.sharded)

    def refuse_ddp(self) -> None:
        """In a call, when the layer is a part of what DistributedDataParallel wraps."""
        if self.sharded and DistributedDataParallel._active_ddp_module is not None:
            self.refuse_sharded_in_ddp()

    def refuse_sharded_in_ddp(self) -> None:
        """It would average over ranks that hold other experts."""
        if self.sharded:
            raise RuntimeError(
                "DistributedDataParallel: expected fully_shard (FSDP2) around a layer whose experts are sharded by "
                f"{self.style}, since no two ranks hold the same parameters"
            )

    def own(self, name: str, t: Any, *shape: int | str) -> tuple[Tensor, Shard]:
        """The rank's tokens (B, n, ...), and where they stand."""
        ranks = self.ranks
        if not isinstance(t, DTensor):
            contract.tensor(name, t, *shape)
            self._equal(name, t)
            return t, Shard.of(t.shape[SEQUENCE] * ranks.size, ranks.size, ranks.rank)
        if t.device_mesh != ranks.mesh or t.placements != (Sharded(SEQUENCE),):
            expected = f"a DTensor with placements (Shard(dim={SEQUENCE}),) on the mesh of the layer, or a plain shard"
            contract.reject(name, expected, f"placements {t.placements} on {t.device_mesh}")
        local = t.to_local()
        contract.tensor(name, local, *shape)
        return local, Shard.of(t.shape[SEQUENCE], ranks.size, ranks.rank)

    def mask(self, name: str, mask: Any, x: Tensor) -> Tensor | None:
        """Of the rank's tokens x, (B, n)."""
        if isinstance(mask, DTensor):
            if mask.device_mesh != self.ranks.mesh or mask.placements != (Sharded(SEQUENCE),):
                expected = f"a DTensor with placements (Shard(dim={SEQUENCE}),) on the mesh of the layer"
                contract.reject(name, expected, f"placements {mask.placements} on {mask.device_mesh}")
            mask = mask.to_local()
        return contract.token_mask(name, mask, x)

    def whole_mask(self, mask: Tensor | None, shard: Shard) -> Tensor | None:
        """(B, N) of the masks (B, n) of all ranks."""
        if mask is None:
            return None
        parts = self.ranks.masks(F.pad(mask, (0, shard.each - shard.size)))
        return parts.transpose(0, 1).flatten(1)[:, : shard.n]

    def out(self, out: Tensor, given: Any) -> Tensor:
        """As x was given."""
        if not isinstance(given, DTensor):
            return out
        shape = torch.Size((*given.shape[:2], out.shape[-1]))
        stride = (shape[1] * shape[2], shape[2], 1)
        return DTensor.from_local(
            out, self.ranks.mesh, (Sharded(SEQUENCE),), run_check=False, shape=shape, stride=stride
        )

    def _equal(self, name: str, t: Tensor) -> None:
        """That plain shards are equally long, by a look at all of them when a length is new: the host waits once."""
        n = t.shape[SEQUENCE]
        if torch.compiler.is_compiling() or n in self.lengths:
            return
        everyones = self.ranks.gather(torch.tensor([n], device=t.device)).flatten().tolist()
        if len(set(everyones)) > 1:
            contract.reject(name, "equally long plain shards (a DTensor may be uneven)", f"lengths {everyones} by rank")
        self.lengths.add(n)


def stand_in(x: Tensor, n: int) -> Tensor:
    """Of the whole sequence (B, N, D), for checks of sizes: no memory, one number."""
    return x.new_empty(()).expand(x.shape[0], n, x.shape[2])
