"""FSDP2, `fully_shard`, on the whole layer and on each of its parts: every rank holds half of a parameter, gathers it
for the module that owns it, and gets its half of the mean gradient. So weights may be read in their module's call only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from programs.layers import (
    K_Q,
    OPTIMIZED_FIRST,
    OPTIONS,
    PACKAGES,
    Option,
    assert_all_same,
    assert_same,
    call_of,
    gradients_of,
    injected,
    layer_of,
    loss_of,
)
from programs.ranks import WORLD, Ranks, mean_over_ranks, two_ranks
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from reference.testing import assert_matches

pytestmark = pytest.mark.cpu

SHORT = K_Q - 1
SCHEDULE = ((12, 17), (SHORT, 12), (SHORT, SHORT), (9, SHORT))  # lengths of rank 0 and of rank 1, step by step
LOCAL = OPTIONS["local mask"]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with two_ranks() as pair:
        yield pair


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (WORLD,))


def parts(layer: nn.Module) -> list[str]:
    """Named submodules that hold parameters, their own or of their own modules; inner ones first."""
    names = [name for name, m in layer.named_modules() if name and next(m.parameters(), None) is not None]
    return sorted(names, key=lambda name: -name.count("."))


def sharded(layer: nn.Module, units: list[str], **settings: Any) -> nn.Module:
    """A copy whose units are sharded each on its own, in this order; "" is the whole layer, and comes last."""
    layer, over = copy.deepcopy(layer), mesh()
    for name in units:
        fully_shard(layer.get_submodule(name), mesh=over, **settings)
    return layer


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def gradients(layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of sharded parameters, whole again, and of the others."""
    split, rest = {}, {}
    for name, p in layer.named_parameters():
        assert p.grad is not None, f"{name}: no gradient"
        (split if isinstance(p, DTensor) else rest)[name] = whole(p.grad)
    return split, rest


def train(rank: int, package: str, option: Option, units: list[str], schedule: tuple, inject: bool = False) -> None:
    """Output and gradients of each step are those of the plain layer, sharded gradients the mean over the ranks'."""
    plain = layer_of(package, **option.arguments)
    split = sharded(plain, units)
    for step, lengths in enumerate(schedule):
        calls: list[dict[str, Any]] = [call_of(option, n, WORLD * step + r) for r, n in enumerate(lengths)]
        if inject:
            calls = [call | {"routes": injected(package, plain, call)} for call in calls]
        by_rank = [gradients_of(plain, call) for call in calls]
        split.zero_grad()
        out = split(**calls[rank])
        assert_same(out.detach(), plain(**calls[rank]).detach(), f"step {step}")
        loss_of(out).backward()
        found, own = gradients(split)
        mean = mean_over_ranks(by_rank)
        assert_all_same(found, {name: mean[name] for name in found})
        if own:
            assert_all_same(own, {name: by_rank[rank][name] for name in own})


@OPTIMIZED_FIRST
@pytest.mark.parametrize("option", ["default", "local mask", "rotary", "cross"])
def test_whole(ranks: Ranks, package: str, option: str) -> None:
    """Lengths differ between the ranks, and on some there is nothing to choose: none waits for another."""
    ranks.run(train, package, OPTIONS[option], [""], SCHEDULE)


@PACKAGES
def test_injected_routes(ranks: Ranks, package: str) -> None:
    ranks.run(train, package, OPTIONS["soft"], [""], SCHEDULE[:2], True)


@PACKAGES
@pytest.mark.parametrize("part", parts(layer_of("reference", **LOCAL.arguments)))
def test_part(ranks: Ranks, package: str, part: str) -> None:
    """One submodule alone; the rest of the layer is every rank's own."""
    ranks.run(train, package, LOCAL, [part], SCHEDULE[:2])


@PACKAGES
def test_every_part(ranks: Ranks, package: str) -> None:
    """Units within units."""
    units = parts(layer_of(package, **LOCAL.arguments))
    ranks.run(train, package, LOCAL, [*units, ""], SCHEDULE)


def in_bfloat16(rank: int, package: str, units: list[str], given: tuple[str, ...], inject: bool) -> None:
    """What bfloat16 costs, no more: parameters in float32, cast for a call, as are all of its arguments."""
    option = Option(OPTIONS["soft"].arguments, given)
    plain = layer_of(package, dtype=torch.float32, **option.arguments)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    split = sharded(plain, units, mp_policy=policy)
    rounded = {name: p.detach().bfloat16() for name, p in plain.named_parameters()}
    # In each of two precisions the reference on numbers that bfloat16 holds.
    results: dict[torch.dtype, list[Any]] = {torch.float64: [], torch.bfloat16: []}
    calls = [call_of(option, n, r, dtype=torch.float32) for r, n in enumerate((12, 17))]
    routes: list[Any] = [None] * WORLD
    if inject:
        routes = [
            injected("reference", layer_of("reference", dtype=torch.float32, **option.arguments), c) for c in calls
        ]
        routes = [tuple(r._replace(scores=r.scores.bfloat16().float()) for r in pair) for pair in routes]
    for dtype, found in results.items():
        layer = layer_of("reference", dtype=dtype, **option.arguments)
        layer.load_state_dict(rounded)
        for call, pair in zip(calls, routes):
            low = {name: t.bfloat16().to(dtype) if t.is_floating_point() else t for name, t in call.items()}
            if "rotary_emb" in low:
                low["rotary_emb"] = call["rotary_emb"].bfloat16().float()
            if pair is not None:
                wide = torch.promote_types(dtype, torch.float32)
                low["routes"] = tuple(r._replace(scores=r.scores.to(wide), logits=r.logits.to(wide)) for r in pair)
            found.append((layer(**low).detach(), gradients_of(layer, low)))
    mine = dict(calls[rank])
    if inject:
        make = type(injected(package, plain, calls[rank])[0])
        mine["routes"] = tuple(make(*r) for r in routes[rank])
    out = split(**mine)
    assert out.dtype == torch.bfloat16
    exact, low = results[torch.float64], results[torch.bfloat16]
    assert_matches(out.detach(), exact[rank][0], low[rank][0], stage="mixture")
    loss_of(out).backward()
    found, own = gradients(split)
    assert not own
    mean, baseline = (mean_over_ranks([g for _, g in pair]) for pair in (exact, low))
    largest = max(g.abs().max().item() for g in mean.values())
    for name, g in found.items():
        assert g.dtype == torch.float32, name
        if not mean[name].any():
            assert not g.any(), name
            continue
        assert_matches(
            g, mean[name], baseline[name].float(), stage="mixture_gradient", name=name, scale=largest,
            precision=torch.bfloat16,
        )  # fmt: skip


@PACKAGES
@pytest.mark.parametrize("inject", [False, True], ids=["routed", "routes"])
@pytest.mark.parametrize("given", [(), ("rotary_emb", "mask")], ids=["plain", "rotary"])
def test_bfloat16(ranks: Ranks, package: str, given: tuple[str, ...], inject: bool) -> None:
    """FSDP casts every floating argument, angles of rotation and scores of routes among them."""
    ranks.run(in_bfloat16, package, [""], given, inject)


@PACKAGES
def test_bfloat16_in_parts(ranks: Ranks, package: str) -> None:
    """Outside their calls, parts hold float32 beside an x in bfloat16."""
    units = parts(layer_of(package, **OPTIONS["soft"].arguments))
    ranks.run(in_bfloat16, package, [*units, ""], ("rotary_emb", "mask"), False)


def train_checkpointed(rank: int, package: str) -> None:
    """Two layers, each computed again in the backward, each a unit."""
    plain = nn.Sequential(*(layer_of(package, seed, **LOCAL.arguments) for seed in range(2)))
    split = nn.Sequential(*(fully_shard(checkpoint_wrapper(copy.deepcopy(layer)), mesh=mesh()) for layer in plain))
    fully_shard(split, mesh=mesh())
    for step, lengths in enumerate(SCHEDULE[:2]):
        xs = [call_of(OPTIONS["default"], n, WORLD * step + r)["x"] for r, n in enumerate(lengths)]
        by_rank = [gradients_of(plain, {"input": x}) for x in xs]
        split.zero_grad()
        loss_of(split(xs[rank])).backward()
        found, _ = gradients(split)
        found = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in found.items()}
        assert_all_same(found, mean_over_ranks(by_rank))


@PACKAGES
def test_activation_checkpointing(ranks: Ranks, package: str) -> None:
    ranks.run(train_checkpointed, package)


def save(rank: int, package: str, folder: Path) -> None:
    units = parts(layer_of(package, **LOCAL.arguments))
    layer = sharded(layer_of(package, seed=1, **LOCAL.arguments), [*units, ""])
    dcp.save(get_model_state_dict(layer), checkpoint_id=folder)


def load(rank: int, package: str, folder: Path) -> None:
    layer = sharded(layer_of(package, seed=2, **LOCAL.arguments), [""])
    state = get_model_state_dict(layer)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(layer, state)
    call = call_of(LOCAL, 12)
    assert_same(layer(**call).detach(), layer_of(package, seed=3, **LOCAL.arguments)(**call).detach())


@PACKAGES
def test_distributed_checkpoint(ranks: Ranks, package: str, tmp_path: Path) -> None:
    """Saved in shards and loaded whole, by one process; saved whole and loaded in shards."""
    ranks.run(save, package, tmp_path / "shards")
    layer = layer_of(package, **LOCAL.arguments)
    state = layer.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "shards", no_dist=True)
    layer.load_state_dict(state)
    for name, p in layer_of(package, seed=1, **LOCAL.arguments).named_parameters():
        assert torch.equal(layer.get_parameter(name), p), name
    dcp.save(layer_of(package, seed=3, **LOCAL.arguments).state_dict(), checkpoint_id=tmp_path / "whole", no_dist=True)
    ranks.run(load, package, tmp_path / "whole")
