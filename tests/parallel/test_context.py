"""`ContextParallel` of `MixtureOfAttention`: on 2, 3 and 4 processes what one process computes, gradients too."""

from __future__ import annotations

import pytest
from parallel.cases import Case, check, styled
from programs.ranks import Ranks

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
    Case(24, given=("mask",), plain=True),
    Case(inject=True),
    Case(given=("mask",), inject=True, arguments=SOFT),
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
    cases = [LENGTHS[0], LENGTHS[5], *ROUTERS[:2], ROUTERS[5], *INPUTS[:2], *INPUTS[4:7], INPUTS[8], *NEIGHBOURS[:3]]
    cases += BLOCKS[1:3]
    check(
        ranks,
        world,
        styled([Case(**{**vars(case), "experts": 4}) for case in cases if case is not ROUTERS[5]], "sharded"),
    )
