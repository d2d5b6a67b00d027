"""Bad use gets an error that names the argument, on all ranks alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel.cases import Case
from programs.ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import optimized
import reference
from optimized.parallel import ContextParallel, ExpertParallel

pytestmark = pytest.mark.cpu


def refused(rank: int) -> None:
    """Without a collective in between, or with the same on all ranks."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    x = Case(8).call()["x"].detach()

    def spread(style: ParallelStyle, layer: nn.Module | None = None, over: Any = mesh) -> Any:
        return parallelize_module(Case().layer() if layer is None else layer, over, style)

    def expect(error: type[Exception], match: str, call: Callable[[], Any]) -> None:
        with pytest.raises(error, match=match):
            call()

    context = spread(ContextParallel())
    expect(
        TypeError,
        "module: expected optimized.MixtureOfAttention or",
        lambda: spread(ContextParallel(), nn.Linear(2, 2)),
    )
    theirs = reference.MixtureOfAttention(16, num_routed_queries=2, num_routed_key_values=2, num_experts=2)
    expect(TypeError, "module: expected .* got reference", lambda: spread(ContextParallel(), theirs))
    expect(TypeError, "before fully_shard", lambda: spread(ContextParallel(), fully_shard(Case().layer(), mesh=mesh)))
    expect(TypeError, "module: expected", lambda: parallelize_module(context, mesh, ContextParallel()))
    both = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "cp"))
    expect(ValueError, "device_mesh: expected a mesh of one dimension", lambda: spread(ContextParallel(), over=both))
    for style in (ContextParallel(shard_experts=True), ExpertParallel()):
        layer = Case(experts=3).layer()
        expect(ValueError, "num_experts: expected a multiple of the 2 ranks", lambda s=style, m=layer: spread(s, m))
    expect(TypeError, "shard_experts: expected True or False", lambda: ContextParallel(shard_experts=1))  # type: ignore[arg-type]
    expect(
        ValueError, r"x: expected equally long plain shards .* lengths \[8, 7\] by rank", lambda: context(x[:, rank:])
    )
    expect(
        ValueError, "x: expected a DTensor with placements", lambda: context(distribute_tensor(x, mesh, [Replicate()]))
    )
    expect(ValueError, "x: expected a DTensor with placements", lambda: context(distribute_tensor(x, mesh, [Shard(2)])))
    experts = spread(ExpertParallel())
    expect(ValueError, "x: expected a DTensor with placements", lambda: experts(distribute_tensor(x, mesh, [Shard(1)])))
    expect(ValueError, "x: expected shape", lambda: context(x[..., 1:]))
    expect(ValueError, "rotary_emb: expected shape", lambda: context(x, rotary_emb=torch.zeros(9, 8)))
    expect(ValueError, "context_mask: expected None without", lambda: context(x, context_mask=torch.ones(2, 8) > 0))
    expect(TypeError, "module: expected a layer before parallelize_module", lambda: optimized.explain(context, x))
    hooked = spread(ContextParallel())
    hooked.query_router.register_forward_pre_hook(lambda *_: None)
    expect(
        TypeError, "query_router: expected a plain Router, .* got one that has a forward pre-hook", lambda: hooked(x)
    )
    differing = spread(ContextParallel())
    differing.key_value_router.options = optimized.RouterOptions(n_iters=3)
    expect(ValueError, "key_value_router.options: expected those of the query router", lambda: differing(x))
    for style in (ContextParallel(shard_experts=True), ExpertParallel()):
        layer = spread(style)
        expect(
            RuntimeError, "DistributedDataParallel: expected fully_shard", lambda m=layer: DistributedDataParallel(m)
        )
    causal = Case(causal=True).layer()
    for style in (ContextParallel(), ExpertParallel()):
        layer = spread(style, copy.deepcopy(causal))
        expect(ValueError, "use_cache: expected nothing under", lambda m=layer: m(x, use_cache=True))
        expect(ValueError, "return_routes: expected nothing under", lambda m=layer: m(x, return_routes=True))
    expect(
        ValueError,
        "mask: expected nothing under ContextParallel",
        lambda: spread(ContextParallel(), copy.deepcopy(causal))(x, mask=torch.ones(2, 8) > 0),
    )
    for layer in (Case().layer(), causal, theirs.double()):
        part = x.clone()
        with context_parallel(mesh, buffers=[part], buffer_seq_dims=[1]):
            expect(
                RuntimeError,
                r"x: expected a call outside of torch's context_parallel\(\)",
                lambda m=layer, t=part: m(t),
            )
    assert Case().layer()(x).isfinite().all()  # outside again


def test_bad_use(ranks: Ranks) -> None:
    ranks.run(refused, world=2)
