"""DistributedDataParallel as people use it, without find_unused_parameters: gradients are the mean over the ranks, for
any lengths. A parameter without a gradient on some rank would leave the reducer waiting, or be left out in silence.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from programs.layers import (
    K_Q,
    OPTIMIZED_FIRST,
    OPTIONS,
    PACKAGES,
    Option,
    assert_all_same,
    call_of,
    gradients_of,
    injected,
    layer_of,
    loss_of,
    zero_if_none,
)
from programs.ranks import WORLD, Ranks, mean_over_ranks, two_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import optimized

pytestmark = pytest.mark.cpu

SHORT = K_Q - 1  # nothing to choose, for neither router
# Lengths of rank 0 and of rank 1, step by step.
SCHEDULES = {
    "uneven": ((12, 17), (20, 9), (12, 17)),
    "short on every rank, then long": ((SHORT, SHORT - 1), (12, 17), (11, 10)),
    "short on one rank": ((SHORT, 12), (17, SHORT), (SHORT, 9)),
    "long, then short": ((12, 17), (SHORT, SHORT), (SHORT, 12), (13, 9)),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with two_ranks() as pair:
        yield pair


def step_of(plain: nn.Module, wrapped: nn.Module, rate: float = 0.05) -> None:
    """The same step of gradient descent on both."""
    for layer in (plain, wrapped):
        torch.optim.SGD(layer.parameters(), lr=rate).step()


def calls_at(package: str, plain: nn.Module, option: Option, lengths: tuple[int, ...], seed: int, inject: bool) -> list:
    calls: list[dict[str, Any]] = [call_of(option, n, WORLD * seed + rank) for rank, n in enumerate(lengths)]
    return [call | ({"routes": injected(package, plain, call)} if inject else {}) for call in calls]


def train(
    rank: int, package: str, option: Option, schedule: tuple, inject: bool = False, **settings: Any
) -> dict[str, torch.Tensor]:
    """Steps of DDP beside steps of the plain layer on the mean of all ranks' gradients; returns the parameters."""
    plain = layer_of(package, **option.arguments)
    wrapped = DistributedDataParallel(copy.deepcopy(plain), **settings)
    for step, lengths in enumerate(schedule):
        calls = calls_at(package, plain, option, lengths, step, inject)
        expected = mean_over_ranks([gradients_of(plain, call) for call in calls])
        wrapped.zero_grad()
        loss_of(wrapped(**calls[rank])).backward()
        assert_all_same({name: zero_if_none(p) for name, p in wrapped.module.named_parameters()}, expected)
        for name, p in plain.named_parameters():
            p.grad = expected[name]
        step_of(plain, wrapped)
    return {name: p.detach() for name, p in wrapped.module.named_parameters()}


def assert_trained(results: list[dict[str, torch.Tensor]], package: str, option: Option) -> None:
    """Every rank holds the same parameters, and every one of them has learned."""
    before = dict(layer_of(package, **option.arguments).named_parameters())
    for name, p in results[0].items():
        assert torch.equal(p, results[1][name]), name
        assert not torch.equal(p, before[name]), name


@OPTIMIZED_FIRST
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("option", ["default", "local mask"])
def test_any_lengths(ranks: Ranks, package: str, option: str, schedule: str) -> None:
    results = ranks.run(train, package, OPTIONS[option], SCHEDULES[schedule])
    assert_trained(results, package, OPTIONS[option])


def train_static_graph(rank: int, package: str, schedule: tuple) -> dict[str, torch.Tensor]:
    return train(rank, package, OPTIONS["default"], schedule, static_graph=True)


@PACKAGES
def test_static_graph(ranks: Ranks, package: str) -> None:
    """It learns in the first step which parameters take part, and never looks again."""
    results = ranks.run(train_static_graph, package, SCHEDULES["long, then short"])
    assert_trained(results, package, OPTIONS["default"])


@PACKAGES
def test_injected_routes(ranks: Ranks, package: str) -> None:
    """The routers take no part, and still have gradients to reduce: zeros."""
    schedule = SCHEDULES["uneven"]
    results = ranks.run(train, package, OPTIONS["soft"], schedule, True)
    before = dict(layer_of(package, **OPTIONS["soft"].arguments).named_parameters())
    moved = {name for name, p in results[0].items() if not torch.equal(p, before[name])}
    assert before.keys() - moved == {"query_router.routing_token", "key_value_router.routing_token"}


def accumulate(rank: int, package: str, lengths: tuple) -> None:
    plain = layer_of(package)
    wrapped = DistributedDataParallel(copy.deepcopy(plain))
    total: dict[str, torch.Tensor] = {}
    for step, pair in enumerate(lengths):
        calls = calls_at(package, plain, OPTIONS["default"], pair, step, inject=False)
        with wrapped.no_sync() if step < len(lengths) - 1 else contextlib.nullcontext():
            loss_of(wrapped(**calls[rank])).backward()
        means = mean_over_ranks([gradients_of(plain, call) for call in calls])
        total = {name: total.get(name, 0) + value for name, value in means.items()}
    assert_all_same({name: zero_if_none(p) for name, p in wrapped.module.named_parameters()}, total)


@PACKAGES
def test_no_sync(ranks: Ranks, package: str) -> None:
    """Gradients add up within a rank, then over the ranks; the last call chooses nothing on one of them."""
    ranks.run(accumulate, package, ((12, 17), (SHORT, 9), (11, SHORT)))


def live(rank: int, package: str, schedule: tuple) -> None:
    """One rank chooses its backends in blocks, the other for the process; both are told of dropout after wrapping."""
    option = OPTIONS["local mask"]
    plain = layer_of(package, **option.arguments)
    wrapped = DistributedDataParallel(layer_of(package, **option.arguments, dropout=0.5).train())
    wrapped.module.dropout = 0
    chosen = {"routed_attention": "math", "local_attention": "banded_math"}
    if rank:
        optimized.set_default_backends(**chosen)
    for step, lengths in enumerate(schedule):
        calls = calls_at(package, plain, option, lengths, step, inject=False)
        calls = [call | {"mask": call["mask"][:1]} for call in calls]
        expected = mean_over_ranks([gradients_of(plain, call) for call in calls])
        wrapped.zero_grad()
        own = calls[rank] | {"mask": calls[rank]["mask"].long()}
        with contextlib.nullcontext() if rank else optimized.use_backends(**chosen):
            out = wrapped(**own)
        loss_of(out).backward()
        assert_all_same({name: zero_if_none(p) for name, p in wrapped.module.named_parameters()}, expected)
    optimized.set_default_backends(**dict.fromkeys(chosen))


@PACKAGES
def test_live_options(ranks: Ranks, package: str) -> None:
    """Dropout switched off on the wrapped layer, one mask of integers for all items, backends of each rank's own."""
    ranks.run(live, package, SCHEDULES["short on one rank"])
