"""`ContextParallel` of the causal layer: what one process computes, its blocks aligned with the shards or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel.cases import Case, alone, assert_equal, check, run_one, styled, together
from programs.ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh

import optimized
from optimized.autoregressive_attention import MemoryAttention

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
    Case(19, {"routed_window_size": 9, "num_routed_key_values": 20}),  # a block in three of four shards
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


# Shards that end inside of a block, of which one rank has the first slots and another the last ones; then with few
# queries, aligned, plain shards; rotated, which no operator takes as a whole; a block longer than shards; no query.
KERNELS = [Case(10, {"routed_window_size": 3, "num_routed_key_values": 2})]
MORE = [
    Case(12, {"num_routed_queries": 1, "average_routed": True, "prenorm": False}, plain=True),
    Case(29, given=("rotary_emb",)),
    Case(16, {"routed_window_size": 9, "num_routed_key_values": 20}),
    Case(3),
]
KERNELS, MORE = ([replace(case, causal=True, seed=1) for case in cases] for cases in (KERNELS, MORE))


def interpreted(rank: int, cases: list[Case]) -> tuple[int, list[dict[str, torch.Tensor]]]:
    """How often the experts ran as one operator, and what the rank has."""
    from optimized.prove import lookups  # here: without Triton there is none

    lookups.look_up_once()
    mesh, calls, fused = init_device_mesh("cpu", (dist.get_world_size(),)), 0, MemoryAttention._fused

    def counted(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return fused(*args)  # type: ignore[arg-type]

    MemoryAttention._fused = counted  # type: ignore[method-assign]
    stages = "routing", "dispatch", "local_attention", "mixture"
    try:
        with optimized.use_backends(**dict.fromkeys(stages, "triton_interpreted")):
            found = [run_one(case, mesh) for case in cases]
    finally:
        MemoryAttention._fused = fused  # type: ignore[method-assign]
    return calls, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "cases"),
    [
        ("context", KERNELS),
        ("experts", KERNELS),
        pytest.param("context", MORE, marks=pytest.mark.thorough),
    ],
    ids=["context", "experts", "more"],
)
def test_kernels(ranks: Ranks, style: str, cases: list[Case]) -> None:
    """In Triton's interpreter: the operator for all experts, of a shard's tokens behind those that were remembered."""
    cases = styled(cases, style)
    answers = ranks.run(interpreted, cases, world=2)
    for i, case in enumerate(cases):
        assert_equal(together(case, [found[i] for _, found in answers]), alone(case), case)
    assert all(calls == sum("rotary_emb" not in case.given for case in cases) for calls, _ in answers)


NAN = [
    Case(26, {"routed_window_size": 3}),
    Case(26, {"num_routed_queries": 1}),
    Case(26, {"solver": "iterative", "num_routed_key_values": 9}),
]


def as_chosen(rank: int, cases: list[Case]) -> tuple[int, list[dict[str, torch.Tensor]]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return 0, [run_one(case, mesh) for case in cases]


@pytest.mark.parametrize(
    ("style", "answer"),
    [
        ("context", as_chosen),
        ("sharded", as_chosen),
        pytest.param("context", interpreted, marks=pytest.mark.thorough),
    ],
)
def test_nan_poisons_what_it_does_in_one_process(ranks: Ranks, style: str, answer: Callable[..., Any]) -> None:
    """Outputs, and gradients, of who sees it; slots that are another rank's see it, too, and pass on nothing of it."""
    cases = [replace(case, causal=True, experts=2, style=style, nan=(2, 15)) for case in NAN]
    parts = ranks.run(answer, cases, world=2)
    for i, case in enumerate(cases):
        found, expected = together(case, [p[i] for _, p in parts]), alone(case)
        assert expected["out"].isnan().any()
        assert not expected["out"].isnan().all(), case
        assert all(torch.equal(found[name].isnan(), t.isnan()) for name, t in expected.items()), case
        assert_equal(*({name: t.nan_to_num() for name, t in those.items()} for those in (found, expected)), case)
