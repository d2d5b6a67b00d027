"""`ContextParallel` of the causal layer: what one process computes, its blocks aligned with the shards or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from parallel.cases import Case, check, styled
from programs.ranks import Ranks

pytestmark = pytest.mark.cpu

CASES = [
    Case(32),  # aligned with 2 and with 4 shards
    Case(29, given=("rotary_emb",)),
    Case(13),
    Case(5),  # a rank without tokens
    Case(3),
    Case(1),
    Case(29, {"routed_window_size": 3}),
    Case(29, {"routed_window_size": 9, "num_routed_key_values": 20}, ("rotary_emb",)),
    Case(16, {"routed_window_size": 9, "num_routed_key_values": 20}),  # blocks longer than shards
    Case(22, {"local_attn_window_size": 9, "routed_window_size": 4}),
    Case(24, {"num_routed_queries": 4, "average_routed": True}, plain=True),
    Case(29, {"solver": "iterative"}, ("rotary_emb",)),
    Case(29, {"solver": "exact", "straight_through": True}),
    Case(21, {"prenorm": False, "cosine_sim_routing": False}, experts=3),
]
CASES = [replace(case, causal=True) for case in CASES]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_one_process(ranks: Ranks, world: int) -> None:
    check(ranks, world, CASES if world != 3 else [case for case in CASES[:9] if not case.plain])


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_experts(ranks: Ranks, world: int) -> None:
    """Every rank has tokens for all experts, so it gathers what the others hold."""
    cases = [replace(CASES[i], experts=4) for i in (1, 3, 6, 11)]
    check(ranks, world, styled(cases, "sharded"))
