"""torch.compile over the lengths of a corpus: one graph for the first length, one for all others.

Whatever depends on how N compares with K, with a block or with a window has to be decided inside of operators; a graph
that holds such a decision is compiled again on its other side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from harness import check
from programs.layers import (
    COMPILED,
    K_KV,
    K_Q,
    OPTIONS,
    WINDOW,
    Option,
    assert_all_same,
    assert_same,
    call_of,
    injected,
    layer_of,
    loss_of,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# Below, at and above the K of either router and its multiple by fetch_k_ratio, a window, a block.
LENGTHS = (17, 2, WINDOW, K_Q, K_Q + 1, K_KV, 8, 9, 33)
BY_DAY = ("local mask", "cross")
LONG_FIRST = [
    pytest.param(option, LENGTHS, marks=() if option in BY_DAY else pytest.mark.thorough) for option in COMPILED
]
SHORT_FIRST = [
    pytest.param("default", (3, *LENGTHS)),
    pytest.param("local mask", (3, *LENGTHS), marks=pytest.mark.thorough),
]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def outcome(layer: nn.Module, call: Callable[..., Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, and the gradients of x and of every parameter."""
    x = given["x"].clone().requires_grad_()
    layer.zero_grad()
    out = call(**{**given, "x": x})
    loss_of(out).backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **grads}


def assert_two_graphs(layer: nn.Module, call: Callable[..., Tensor], calls: list[dict[str, Tensor]]) -> None:
    """At most; and each call as it is in eager mode."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for given in calls:
        assert_all_same(outcome(layer, compiled, given), outcome(layer, call, given))
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs"


@pytest.mark.parametrize(("option", "lengths"), LONG_FIRST + SHORT_FIRST)
def test_two_graphs(option: str, lengths: tuple[int, ...]) -> None:
    of = OPTIONS[option]
    layer = layer_of("optimized", **of.arguments)
    assert_two_graphs(layer, layer, [call_of(of, n, n) for n in lengths])


def test_slots_from_the_length() -> None:
    """K that a program computes of N is a SymInt. From 4 tokens on: PyTorch makes a graph of its own for sizes of 1."""
    layer = layer_of("optimized")

    def call(x: Tensor) -> Tensor:
        return layer(x, num_routed_queries=x.shape[1] // 4 + 1, num_routed_key_values=x.shape[1] // 2 + 1)

    assert_two_graphs(layer, call, [call_of(Option(), n, n) for n in LENGTHS if n >= 4])


def test_injected_routes() -> None:
    """Of one K, for any length above."""
    layer = layer_of("optimized", straight_through=False)
    calls = []
    for n in (17, 9, 24, 12):
        given = call_of(Option(), n, n)
        calls.append(given | {"routes": injected("optimized", layer, given)})
    assert_two_graphs(layer, layer, calls)


def test_batches_of_any_size() -> None:
    layer = layer_of("optimized")
    calls = [call_of(Option(), n, n, batch=b) for b, n in ((2, 17), (3, 9), (5, 4), (2, 24), (7, 6))]
    assert_two_graphs(layer, layer, calls)


@pytest.mark.slow
def test_inductor() -> None:
    """Compiled to machine code, which sums in another order: the comparator's budget."""
    of = OPTIONS["local mask"]
    layer = layer_of("optimized", **of.arguments)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    exact = layer_of("reference", **of.arguments)
    baseline = layer_of("reference", dtype=torch.float32, **of.arguments)
    for n in (17, 5, 33):
        given = call_of(of, n, n)
        low = {name: t.float() if t.is_floating_point() else t for name, t in given.items()}
        results = [outcome(layer, compiled, given), outcome(exact, exact, given), outcome(baseline, baseline, low)]
        for name, t in results[1].items():
            if t.any():
                stage = "mixture" if name == "out" else "mixture_gradient"
                largest = max(g.abs().max().item() for g in results[1].values())
                check(*(r[name] for r in results), stage=stage, name=f"{name}, N = {n}", scale=largest)
            else:
                assert_same(results[0][name], t, name)
