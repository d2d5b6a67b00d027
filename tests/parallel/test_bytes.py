"""What a rank sends is what the formulas say, either way."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from parallel.cases import STYLES, Case, as_dtensor, part
from programs.ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from optimized.parallel import volume
from optimized.parallel.volume import Sent, Setting, Traffic
from reference.contract import Config

pytestmark = pytest.mark.cpu

LOCAL = {"local_attn": True, "local_attn_window_size": 3}
TOKENS = ("query_routing_tokens", "key_value_routing_tokens")
CASES = [
    Case(21),
    Case(10, LOCAL, ("mask",)),
    Case(24, {**LOCAL, "local_attn_window_size": 9}, plain=True),
    Case(24, {"route_block_size": 5}),
    Case(32, {"route_block_size": 4}, ("mask",)),
    Case(32, {"route_block_size": 4, "solver": "sigmoid", "cosine_sim_routing": True}, experts=3),
    Case(21, experts=3),
    Case(5, experts=5),
    Case(21, LOCAL, style="sharded", experts=4),
    Case(21, {"learned_routing_tokens": True, "prenorm": False}, TOKENS, style="sharded"),
    Case(20, style="experts", experts=4),
    Case(20, LOCAL, style="experts", experts=4),
    Case(21, causal=True, style="experts", experts=4),
    Case(21, causal=True),
    Case(22, {"routed_window_size": 9}, causal=True),
]


def count(rank: int, cases: list[Case]) -> list[Sent]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for case in cases:
        layer = parallelize_module(copy.deepcopy(case.layer()), mesh, STYLES[case.style]())
        call = dict(case.call())
        if case.style != "experts":
            for name in ("x", "mask"):
                if name in call:
                    own = part(call[name], mesh).detach()
                    call[name] = own if case.plain else as_dtensor(own, call[name], mesh)
            call["x"].requires_grad_()
            layer(**call)  # lengths of plain shards are compared once
        with Traffic(mesh.size(), rank) as forward:
            out = layer(**call)
        cotangent = torch.randn_like(out.detach())
        with Traffic(mesh.size(), rank) as backward:
            out.backward(cotangent)
        found.append(Sent(forward.bytes, backward.bytes))
    return found


def worlds(case: Case) -> list[int]:
    """Numbers of processes that it can be spread over."""
    return [2, 4] if case.style == "context" or case.experts % 4 == 0 else [2]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["one each", "every"])
@pytest.mark.parametrize("world", [2, 4])
def test_bytes_are_those_of_the_formulas(ranks: Ranks, world: int, every: bool) -> None:
    """In the one number of processes or the other, in turn; or in both."""
    cases = [case for i, case in enumerate(CASES) if world in (worlds(case) if every else [worlds(case)[i % 2 - 1]])]
    for rank, counted in enumerate(ranks.run(count, cases, world=world)):
        for case, sent in zip(cases, counted):
            setting = Setting(world, 2, case.n, 8, "mask" in case.given, rank)
            config = case.layer().config
            found = formula_of(case)(config, setting)
            if case.style == "sharded":
                found |= volume.sharded_experts(config, setting)
            assert sent == volume.total(found), (case, rank)


def formula_of(case: Case):  # type: ignore[no-untyped-def]
    if case.style == "experts":
        return volume.expert_parallel
    return volume.causal_context_parallel if case.causal else volume.context_parallel


@pytest.mark.parametrize(("k", "gigabytes"), [(1024, 0.074), (8192, 0.49), (32768, 1.9), (2**17, 7.6)])
def test_formulas_by_hand(k: int, gigabytes: float) -> None:
    """Of one million tokens, D 1024, on 8 ranks in bfloat16: as written out, and rounded to two digits."""
    n, dim, experts, ranks = 2**20, 1024, 4, 8
    c = Config.of(dim=dim, num_routed_queries=k, num_routed_key_values=k, num_experts=experts)
    sent = volume.total(volume.context_parallel(c, Setting(ranks, 1, n, 2)))
    rows = 2 * experts * (2 * k + 2 * k) * dim * 2 * (ranks - 1) // ranks
    rest = 16 * math.ceil(experts / ranks) * n * (ranks - 1) // ranks + 12 * (2 * k) * (ranks - 1)
    assert sum(sent) == rows + rest
    assert f"{sum(sent) / 1e9:.2g}" == f"{gigabytes:.2g}"


@pytest.mark.parametrize(("experts", "gigabytes"), [(4, 0.94), (8, 0.70)])
def test_aligned_blocks_by_hand(experts: int, gigabytes: float) -> None:
    """K = N / 8: an eighth of the rows, less where the ranks divide the experts."""
    n, k = 2**20, 2**17
    c = Config.of(dim=1024, num_routed_queries=k, num_routed_key_values=k, num_experts=4, route_block_size=2**17)
    c = c if experts == 4 else c.__class__(**{**vars(c), "num_experts": 8})
    sent = volume.context_parallel(c, Setting(8, 1, n, 2))
    rows = sum(sent["rows"]) + sum(sent["outputs"])
    assert f"{rows / 1e9 * 4 / experts:.2f}" == f"{gigabytes:.2f}"
