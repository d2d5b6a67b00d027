"""`ExpertParallel`: all tokens on every rank, some of the experts; full gradients everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from parallel.cases import Case, check, styled
from parallel.test_context import BLOCKS, INPUTS, LENGTHS, NEIGHBOURS, ROUTERS
from programs.ranks import Ranks

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("world", [2, 4])
def test_one_process(ranks: Ranks, world: int) -> None:
    cases = [LENGTHS[0], LENGTHS[6], *ROUTERS, *INPUTS[:7], *INPUTS[8:], *NEIGHBOURS[:2], *BLOCKS[:3]]
    of_four = [replace(case, experts=4) for case in cases if "query_routing_tokens" not in case.given]
    check(ranks, world, styled(of_four if world == 4 else cases, "experts"))


@pytest.mark.parametrize("world", [2, 4])
def test_causal(ranks: Ranks, world: int) -> None:
    cases = [
        Case(21),
        Case(21, given=("mask",)),
        Case(3, given=("mask",)),
        Case(22, {"average_routed": True, "num_routed_queries": 4}, ("rotary_emb",)),
        Case(21, {"solver": "iterative"}),
        Case(21, {"prenorm": False, "cosine_sim_routing": False}),
    ]
    check(ranks, world, styled([replace(case, causal=True, experts=4) for case in cases], "experts"))
