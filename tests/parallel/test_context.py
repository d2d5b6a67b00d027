"""`ContextParallel` of `MixtureOfAttention`: on 2, 3 and 4 processes what one process computes, gradients too."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from parallel.cases import STYLES, Case, alone, assert_equal, check, part, run, styled, together
from programs.ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import optimized

pytestmark = pytest.mark.cpu

WORLDS = pytest.mark.parametrize("world", [2, 4])
LOCAL = {"local_attn": True, "local_attn_window_size": 4}
SOFT = {"straight_through": False, "cosine_sim_routing": True}
# 21 tokens: shards of 11 and 10, of 6, 6, 6 and 3. 10 of 4 ranks: 3, 3, 3, 1. 5 of 4 ranks: 2, 2, 1 and none.
LENGTHS = [Case(n) for n in (21, 20, 10, 7, 6, 5, 3, 1)]
ROUTERS = [
    Case(arguments=SOFT),
    Case(arguments={"solver": "exact", **SOFT}),
    Case(arguments={"solver": "exact"}, given=("mask",)),
    Case(arguments={"solver": "sigmoid", **SOFT}, given=("mask",)),
    Case(5, {"solver": "sigmoid", "cosine_sim_routing": True}),
    Case(arguments={"learned_routing_tokens": True}, given=("query_routing_tokens", "key_value_routing_tokens")),
    Case(arguments={"num_routed_key_values": 30}),
    Case(arguments={"num_routed_queries": 30, **SOFT}, given=("mask",)),
]
INPUTS = [
    Case(given=("mask",)),
    Case(6, given=("mask",)),
    Case(5, given=("mask", "rotary_emb")),
    Case(given=("rotary_emb",)),
    Case(arguments={"dim_context": 12}, given=("context", "mask", "context_mask")),
    Case(6, {"dim_context": 12, **SOFT}, given=("context", "context_mask")),
    Case(arguments={"average_routed": True, "prenorm": False}, given=("mask",)),
    Case(24, given=("mask",), plain=True, hide=True),
    Case(24, LOCAL, given=("mask",), hide=True),
    Case(32, {"route_block_size": 8, **SOFT}, given=("mask",), hide=True),
    Case(inject=True),
    Case(given=("mask",), inject=True, arguments=SOFT),
    Case(
        24, {"num_routed_queries": 23, "num_routed_key_values": 23, **SOFT}, ("mask",), hide=True
    ),  # takes masked ones
]
NEIGHBOURS = [
    Case(arguments=LOCAL),
    Case(arguments={**LOCAL, "local_attn_window_size": 9}, given=("mask",)),  # over several ranks
    Case(9, {**LOCAL, "local_attn_window_size": 30, "average_routed": True}),
    Case(5, LOCAL, ("mask",)),
    Case(24, LOCAL, plain=True),
]
BLOCKS = [
    Case(32, {"route_block_size": 8}),
    Case(32, {"route_block_size": 4, **SOFT}, ("mask", "rotary_emb")),
    Case(30, {"route_block_size": 4, **SOFT}, ("mask",)),  # a last block of 2
    Case(28, {"route_block_size": 7}),  # aligned with 4 shards, and with 2
    Case(26, {"route_block_size": 4, "solver": "exact", **SOFT}),  # not aligned
    Case(32, {"route_block_size": 4, "solver": "sigmoid", "cosine_sim_routing": True}, ("mask",)),
    Case(32, {"route_block_size": 4, "num_routed_queries": 31}, ("mask",)),
    Case(9, {"route_block_size": 2, **SOFT}),
    Case(30, {"route_block_size": 5, "num_routed_key_values": 20, **SOFT}, ("mask",), hide=True),  # takes masked tokens
]


@WORLDS
@pytest.mark.parametrize(
    "cases",
    [LENGTHS, ROUTERS, INPUTS, NEIGHBOURS, BLOCKS],
    ids=["lengths", "routers", "inputs", "neighbours", "blocks"],
)
def test_one_process(ranks: Ranks, world: int, cases: list[Case]) -> None:
    check(ranks, world, cases)


EXPERTS = [
    Case(experts=experts, arguments=arguments, given=given)
    for experts in (1, 3, 4, 5)
    for arguments, given in ((SOFT, ("mask",)), ({}, ("rotary_emb",)))
]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_experts_that_ranks_do_not_divide(ranks: Ranks, world: int) -> None:
    """Query slots of an expert are cut into pieces; of blocks, too."""
    blocks = [Case(8 * world, {"route_block_size": 4, **SOFT}, ("mask", "rotary_emb"), experts=e) for e in (1, 3)]
    check(ranks, world, [*EXPERTS, *blocks] if world != 2 else [*EXPERTS[:4], *blocks])


@WORLDS
def test_sharded_experts(ranks: Ranks, world: int) -> None:
    """All parameters are DTensors, and have the sum over the ranks."""
    cases = [LENGTHS[0], LENGTHS[5], *ROUTERS[:2], ROUTERS[5], *INPUTS[:2], *INPUTS[4:7], INPUTS[10], *NEIGHBOURS[:3]]
    cases += BLOCKS[1:3]
    check(
        ranks,
        world,
        styled([Case(**{**vars(case), "experts": 4}) for case in cases if case is not ROUTERS[5]], "sharded"),
    )


def with_nan(rank: int, cases: list[Case]) -> list[tuple[torch.Tensor, ...]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    outs = []
    for case in cases:
        layer = parallelize_module(case.layer(), mesh, STYLES[case.style]())
        out, routes = layer(part(poisoned(case), mesh), return_routes=True)
        outs.append((out.detach(), *(r.scores.detach() for r in routes)))
    return outs


def poisoned(case: Case) -> torch.Tensor:
    """The first item's first token, which is in the first shard."""
    x = case.call()["x"].detach()
    x[0, 0] = torch.nan
    return x


def test_nan_poisons_what_it_does_in_one_process(ranks: Ranks) -> None:
    """The scores of its rows, on all ranks; where they route by themselves, too. No other item."""
    cases = [
        Case(32, {"route_block_size": 4, **SOFT}),
        Case(32, {"route_block_size": 4, "solver": "exact"}),
        Case(32, {"route_block_size": 4, "solver": "sigmoid", "cosine_sim_routing": True}),
        Case(32, SOFT),
    ]
    parts = ranks.run(with_nan, cases, world=2)
    for i, case in enumerate(cases):
        out, routes = case.layer()(poisoned(case), return_routes=True)
        found, expected = torch.cat([p[i][0] for p in parts], 1), out.detach()
        assert torch.equal(found.isnan(), expected.isnan()), case
        for j, r in enumerate(routes):
            assert all(torch.equal(p[i][1 + j].isnan(), r.scores.isnan()) for p in parts), case
        assert expected[0, 16:].isnan().any() == (case.arguments.get("solver") != "sigmoid"), case
        assert_equal({"out": found.nan_to_num()}, {"out": expected.nan_to_num()}, case)


def interpreted(rank: int, cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    from optimized.prove import lookups  # here: without Triton there is none

    lookups.look_up_once()
    with optimized.use_backends(**dict.fromkeys(("routing", "dispatch", "mixture"), "triton_interpreted")):
        return run(rank, cases)


@pytest.mark.slow
def test_kernels_of_ours(ranks: Ranks) -> None:
    """In Triton's interpreter, on rows of which most are another rank's."""
    cases = [Case(9, SOFT, ("mask",), experts=3)]
    parts = ranks.run(interpreted, cases, world=2)
    for i, case in enumerate(cases):
        assert_equal(together(case, [p[i] for p in parts]), alone(case), case)
