"""How a layer is spread over the ranks of a mesh: `parallelize_module(layer, mesh["cp"], style)`."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from optimized.autoregressive import MixtureOfAutoregressiveAttention
from optimized.mixture import MixtureOfAttention
from optimized.parallel import parameters
from optimized.parallel.arguments import Over
from optimized.parallel.causal import ContextParallelCausal
from optimized.parallel.causal_experts import ExpertParallelCausal
from optimized.parallel.collectives import Ranks
from optimized.parallel.experts import ExpertParallelMixture
from optimized.parallel.mixture import ContextParallelMixture
from reference import contract


class _Style(ParallelStyle):
    """Puts another class in place of a layer's own, as FSDP2 does; keys of the state dict stay."""

    classes: ClassVar[dict[type[nn.Module], type[nn.Module]]]
    shard_experts: bool

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name = type(self).__name__
        cls = self.classes.get(type(module))
        if cls is None:
            names = " or ".join(f"{c.__module__.split('.')[0]}.{c.__name__}" for c in self.classes)
            expected = f"{names}, before fully_shard and other wrappers"
            contract.reject("module", expected, f"{type(module).__module__}.{type(module).__name__}", TypeError)
        if not isinstance(device_mesh, DeviceMesh) or device_mesh.ndim != 1:
            contract.reject("device_mesh", f"a mesh of one dimension for {name}, say mesh['cp']", str(device_mesh))
        ranks = Ranks(device_mesh)
        experts = module.config.num_experts  # type: ignore[union-attr]
        if self.shard_experts:
            if experts % ranks.size:
                contract.reject(
                    "num_experts", f"a multiple of the {ranks.size} ranks among which {name} shards them", experts
                )
            parameters.shard(module, ranks, self.src_data_rank)
        module.__dict__["over"] = Over(ranks, name, self.shard_experts)
        module.__class__ = cls
        return module


class ContextParallel(_Style):
    """Every rank has a part of the sequence: x, its masks, and what it gets are sharded over dimension 1.

    shard_experts: every rank also keeps the parameters of E / R experts alone, and all parameters become DTensors;
        fully_shard goes around it, DistributedDataParallel does not.
    Without it parameters stay as they are, equal on all ranks, whose gradients are each rank's share: their sum over
    the mesh is the gradient of the sum of all ranks' losses.
    Raises TypeError or ValueError: a module that is not a layer of this package, a mesh of more than one dimension, R
    that does not divide E with shard_experts.
    """

    classes: ClassVar = {
        MixtureOfAttention: ContextParallelMixture,
        MixtureOfAutoregressiveAttention: ContextParallelCausal,
    }

    def __init__(self, *, shard_experts: bool = False) -> None:
        super().__init__()
        self.shard_experts = contract.flag("shard_experts", shard_experts)


class ExpertParallel(_Style):
    """Every rank has all tokens, and E / R experts: x, masks and what it gets are the same on all ranks.

    All parameters become DTensors, and have their full gradients everywhere; fully_shard goes around it,
    DistributedDataParallel does not. It sums as many numbers as x has in either direction: for short sequences.
    Raises TypeError or ValueError as `ContextParallel(shard_experts=True)`.
    """

    classes: ClassVar = {
        MixtureOfAttention: ExpertParallelMixture,
        MixtureOfAutoregressiveAttention: ExpertParallelCausal,
    }
    shard_experts = True
