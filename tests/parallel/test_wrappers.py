"""PyTorch's wrappers around a layer in parallel: DDP, FSDP2, HSDP, checkpoints, compile; on meshes of one and two
dimensions. Every rank's loss is its own tokens', and the gradient that of the sum of all.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel.cases import STYLES, Case, alone, assert_equal, called, part, together
from programs.ranks import Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from optimized import ops

pytestmark = pytest.mark.cpu

LOCAL = {"local_attn": True, "local_attn_window_size": 4, "cosine_sim_routing": True}
MIXTURE = Case(24, LOCAL, ("mask",), experts=4, plain=True)
SHORT = Case(4, {}, experts=4, plain=True)  # nothing to choose: every parameter has a gradient still
CAUSAL = Case(24, causal=True, experts=4, plain=True)
ALL = [MIXTURE, SHORT, CAUSAL]


def spread(case: Case, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(case.layer(), mesh, STYLES[case.style]())


def grads_of(layer: nn.Module, case: Case, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Of the loss on the rank's tokens; DTensors whole."""
    call: dict[str, Any] = {name: part(t, mesh).detach() for name, t in case.call().items()}
    (layer(**call) * part(case.cotangent(), mesh)).sum().backward()
    names = {name.removeprefix("module."): p for name, p in layer.named_parameters()}
    assert all(p.grad is not None for p in names.values())
    return {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in names.items()}  # type: ignore[union-attr]


def expected(cases: list[Case]) -> dict[str, Tensor]:
    """The sum over the batches that the data-parallel ranks have."""
    each = [
        {name: g for name, g in alone(case).items() if not (name == "out" or ": " in name or name.startswith("d "))}
        for case in cases
    ]
    return {name: torch.stack([g[name] for g in each]).sum(0) for name in each[0]}


def ddp(rank: int, cases: list[Case]) -> None:
    """Over all ranks of dp x cp. It divides by their number."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "cp"))
    for case in cases:
        mine = [replace(case, seed=case.seed) for _ in range(mesh["dp"].size())]
        layer = DistributedDataParallel(spread(case, mesh["cp"]))
        found = grads_of(layer, mine[mesh["dp"].get_local_rank()], mesh["cp"])
        assert_equal({name: g * dist.get_world_size() for name, g in found.items()}, expected(mine), case)


@pytest.mark.parametrize("world", [2, 4])
def test_distributed_data_parallel(ranks: Ranks, world: int) -> None:
    ranks.run(ddp, ALL, world=world)


def fsdp(rank: int, cases: list[Case], how: str) -> None:
    """Sums, not means: divide factor 1. Over dp x cp at once; over both as HSDP; or, with sharded experts, over dp."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "cp"))
    for case in cases:
        layer = spread(case, mesh["cp"])
        if how == "flat":
            over = mesh["dp", "cp"]._flatten("dp_cp")
        elif how == "hybrid":
            over = mesh["dp", "cp"]
        else:
            over = mesh["dp"]
        wrapped: Any = fully_shard(layer, mesh=over)
        wrapped.set_gradient_divide_factor(1.0)
        found = grads_of(wrapped, case, mesh["cp"])
        assert_equal(found, expected([case] * (world // 2)), (case, how))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("how", ["flat", "hybrid", "experts"])
def test_fully_shard(ranks: Ranks, how: str, world: int) -> None:
    style = "sharded" if how == "experts" else "context"
    ranks.run(fsdp, [replace(case, style=style) for case in ALL], how, world=world)


def stack(rank: int, style: str) -> None:
    """Two layers with a residual, each a unit and computed again in the backward; clipped, and a step of AdamW."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    case = replace(MIXTURE, style=style)
    plain = nn.ModuleList(replace(case, seed=s).layer() for s in range(2))
    layers = nn.ModuleList(spread(replace(case, seed=s), mesh) for s in range(2))
    if style == "context":
        for layer in layers:
            fully_shard(layer, mesh=mesh).set_gradient_divide_factor(1.0)
    call = case.call()
    whole = {name: t.detach() for name, t in call.items()}
    own = {name: part(t, mesh) for name, t in whole.items()}
    for blocks, given, cotangent in ((plain, whole, case.cotangent()), (layers, own, part(case.cotangent(), mesh))):
        x = given["x"]
        for block in blocks:
            x = x + checkpoint(block, x, mask=given["mask"], use_reentrant=False)
        (x * cotangent).sum().backward()
        norm = nn.utils.clip_grad_norm_(blocks.parameters(), 0.1)
        torch.optim.AdamW(blocks.parameters(), lr=0.01).step()
        assert (norm.full_tensor() if isinstance(norm, DTensor) else norm) > 0.1
    found = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in layers.named_parameters()}
    assert_equal({n: p.detach() for n, p in found.items()}, {n: p.detach() for n, p in plain.named_parameters()}, style)


@pytest.mark.parametrize("style", ["context", "sharded"])
def test_blocks_computed_again_and_a_step(ranks: Ranks, style: str) -> None:
    ranks.run(stack, style, world=2)


def save(rank: int, case: Case, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    dcp.save(get_model_state_dict(spread(replace(case, seed=1), mesh)), checkpoint_id=folder)


def load(rank: int, case: Case, folder: Path) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = spread(replace(case, seed=2), mesh)
    state = get_model_state_dict(layer)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(layer, state)
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in layer.named_parameters()}


@pytest.mark.parametrize("case", [MIXTURE, CAUSAL], ids=["mixture", "causal"])
@pytest.mark.parametrize("style", ["sharded", "experts"])
def test_distributed_checkpoint(ranks: Ranks, style: str, case: Case, tmp_path: Path) -> None:
    """Saved in shards by two, loaded whole by one process; saved whole, and loaded in shards by four."""
    case = replace(case, style=style)
    ranks.run(save, case, tmp_path / "shards", world=2)
    layer = case.layer()
    state = layer.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "shards", no_dist=True)
    for name, p in replace(case, seed=1).layer().named_parameters():
        assert torch.equal(state[name], p), name
    whole = replace(case, seed=3).layer()
    dcp.save(whole.state_dict(), checkpoint_id=tmp_path / "whole", no_dist=True)
    for found in ranks.run(load, case, tmp_path / "whole", world=4):
        assert found.keys() == dict(whole.named_parameters()).keys()
        for name, p in whole.named_parameters():
            assert torch.equal(found[name], p), name


def test_one_device_decodes(ranks: Ranks, tmp_path: Path) -> None:
    """What was saved by ranks with sharded experts goes on, token by token, in one process."""
    case = replace(CAUSAL, style="sharded")
    ranks.run(save, case, tmp_path / "shards", world=2)
    layer, trained = case.layer(), replace(case, seed=1).layer()
    state = layer.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "shards", no_dist=True)
    layer.load_state_dict(state)
    x, cache, outs = case.call()["x"].detach(), None, []
    for i in range(x.shape[1]):
        out, cache = layer(x[:, i : i + 1], cache=cache, use_cache=True)
        outs.append(out)
    assert_equal({"out": torch.cat(outs, 1).detach()}, {"out": trained(x).detach()})


def again(rank: int, case: Case) -> None:
    """Compiled without a break: as eager, either way."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = spread(case, mesh)
    eager = grads_of(layer, case, mesh)
    layer.zero_grad()
    compiled: Mapping[str, Tensor] = grads_of(torch.compile(layer, fullgraph=True, backend="aot_eager"), case, mesh)
    assert_equal({n.removeprefix("_orig_mod."): g for n, g in compiled.items()}, eager, case)


COMPILED = [
    pytest.param(MIXTURE, id="mixture", marks=pytest.mark.thorough),
    pytest.param(replace(SHORT, n=16, style="sharded"), id="sharded"),
    pytest.param(CAUSAL, id="causal"),
    pytest.param(replace(CAUSAL, style="experts"), id="experts", marks=pytest.mark.thorough),
]


@pytest.mark.parametrize("case", COMPILED)
def test_compiled(ranks: Ranks, case: Case) -> None:
    if case.style == "experts":
        ranks.run(again_whole, case, world=2)
    else:
        ranks.run(again, case, world=2)


def again_whole(rank: int, case: Case) -> None:
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = spread(case, mesh)
    found = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        out = call(**{name: t.detach() for name, t in case.call().items()})
        (out * case.cotangent()).sum().backward()
        grads = {name: p.grad.full_tensor() for name, p in layer.named_parameters()}  # type: ignore[union-attr]
        found.append({"out": out.detach(), **grads})
    assert_equal(found[1], found[0], case)


def half(rank: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    case = Case(24, plain=True)
    layer = case.layer(dtype=torch.float32)
    other = parallelize_module(copy.deepcopy(layer), mesh, STYLES["context"]())
    x = case.call()["x"].detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        out, own = layer(x), other(part(x, mesh))
    assert own.dtype == torch.float32
    assert torch.equal(own, part(out, mesh))


def test_autocast(ranks: Ranks) -> None:
    """Every product is of the same rows as in one process, so not a bit is another."""
    ranks.run(half, world=2)


DROPPING = Case(24, {**LOCAL, "dropout": 0.5}, ("mask",))


def drop(rank: int, seeds: tuple[int, int]) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = spread(DROPPING, mesh)
    torch.manual_seed(seeds[rank])
    return called(layer, DROPPING, mesh)


def test_dropout(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank draws for its own experts: given what it drew, all is what one process computes."""
    attend = ops.expert_attention

    def by_expert(
        queries: Tensor, keys: Tensor, scores: Tensor, w_q: Tensor, w_kv: Tensor, w_out: Tensor, *rest: Any
    ) -> Tensor:
        null_kv, lengths, *more = rest
        outs = []
        for e in range(2):
            torch.manual_seed(seeds[e])
            own = [w.chunk(2)[e] for w in (w_q, w_kv, w_out)]
            given = queries[e : e + 1], keys[e : e + 1], scores[:, e : e + 1].contiguous()
            outs.append(attend(*given, *own, null_kv[:, e : e + 1].contiguous(), lengths.chunk(2)[e], *more)[0])
        return torch.cat(outs)

    monkeypatch.setattr(attend, "first", by_expert)
    found = []
    for seeds in ((3, 4), (3, 3)):
        parts = ranks.run(drop, seeds, world=2)
        found.append(together(DROPPING, parts))
        assert_equal(found[-1], alone(DROPPING), seeds)
    assert not torch.equal(found[0]["out"], found[1]["out"])  # who seeds ranks alike gets alike draws
