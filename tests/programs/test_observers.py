"""What looks on, or takes the place of tensors: saved-tensor hooks, offload, fake tensors, tracing, counting, frozen
weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from programs.layers import (
    DIM,
    DIM_HEAD,
    EXPERTS,
    HEADS,
    K_KV,
    K_Q,
    OPTIONS,
    PACKAGES,
    assert_agrees,
    assert_all_agree,
    call_of,
    gradients_of,
    injected,
    layer_of,
    loss_of,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.cpu

EVERY_OPTION = pytest.mark.parametrize("option", OPTIONS)
LENGTHS = pytest.mark.parametrize("n", [12, 4])
INNER = HEADS * DIM_HEAD


def to_numpy(t: Tensor) -> tuple[np.ndarray, torch.dtype]:
    return t.detach().numpy().copy(), t.dtype


def from_numpy(packed: tuple[np.ndarray, torch.dtype]) -> Tensor:
    return torch.from_numpy(packed[0].copy()).to(packed[1])


@PACKAGES
@EVERY_OPTION
@LENGTHS
def test_saved_tensors_elsewhere(package: str, option: str, n: int) -> None:
    """What the backward needs is handed to the hooks, and read back from them; a copy may lie in another order."""
    of = OPTIONS[option]
    layer, call = layer_of(package, **of.arguments), call_of(of, n)
    expected = gradients_of(layer, call)
    packed = []

    def pack(t: Tensor) -> tuple[np.ndarray, torch.dtype]:
        packed.append(t.numel())
        return to_numpy(t)

    for hooks in (saved_tensors_hooks(pack, from_numpy), save_on_cpu()):
        with hooks:
            found = gradients_of(layer, call)
        assert_all_agree(found, expected)
    assert sum(packed) > call["x"].numel()


@PACKAGES
def test_the_backward_reads_what_was_unpacked(package: str) -> None:
    """Nothing is kept beside the hooks: where they give back other numbers, gradients change."""
    layer, call = layer_of(package), call_of(OPTIONS["default"], 12)
    expected = gradients_of(layer, call)
    with saved_tensors_hooks(lambda t: t, lambda t: t * 2 if t.is_floating_point() else t):
        found = gradients_of(layer, call)
    for name in ("attn.to_q.weight", "attn.to_kv.weight", "attn.to_out.weight", "query_router.routing_token"):
        assert not torch.equal(found[name], expected[name]), name


@PACKAGES
def test_parameters_offloaded(package: str) -> None:
    """Weights live elsewhere and come for a call: hooks around the call move them, as offloading does."""
    of = OPTIONS["local mask"]
    layer, call = layer_of(package, **of.arguments), call_of(of, 12)
    expected = layer(**call).detach()
    shelf = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for p in layer.parameters():
        p.data = torch.empty(0, dtype=p.dtype)

    def fetch(module: nn.Module, *_: Any) -> None:
        for name, p in module.named_parameters():
            p.data = shelf[name].clone()

    def release(module: nn.Module, *_: Any) -> None:
        for p in module.parameters():
            p.data = torch.empty(0, dtype=p.dtype)

    layer.register_forward_pre_hook(fetch)
    layer.register_forward_hook(release)
    with torch.no_grad():
        assert torch.equal(layer(**call), expected)


def fake_of(mode: FakeTensorMode, layer: nn.Module) -> nn.Module:
    """A copy with the shapes of the parameters alone."""
    fake = copy.deepcopy(layer)
    for name, p in layer.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(fake.get_submodule(owner), leaf, nn.Parameter(mode.from_tensor(p.detach())))
    return fake


def run_fake(option: str, n: int, inject: bool) -> None:
    """Forward and backward."""
    of = OPTIONS[option]
    layer, call = layer_of("optimized", **of.arguments), call_of(of, n)
    routes = injected("optimized", layer, call) if inject else ()
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    fake, given = fake_of(mode, layer), {name: mode.from_tensor(t) for name, t in call.items()}
    if inject:
        given["routes"] = tuple(type(r)(*(mode.from_tensor(t) for t in r)) for r in routes)
    with mode:
        out = fake(**given)
        loss_of(out).backward()
    assert (out.shape, out.dtype) == (call["x"].shape, call["x"].dtype)
    for name, p in fake.named_parameters():
        assert p.grad is not None, name
        assert p.grad.shape == p.shape, name


@EVERY_OPTION
@LENGTHS
def test_fake_tensors(option: str, n: int) -> None:
    """Shapes without numbers."""
    run_fake(option, n, inject=False)


@pytest.mark.parametrize("option", ["default", "soft", "blocks", "local mask", "cross"])
def test_fake_tensors_with_routes(option: str) -> None:
    """Whose indices can't be looked at."""
    run_fake(option, 12, inject=True)


@EVERY_OPTION
@LENGTHS
def test_meta(option: str, n: int) -> None:
    """A layer on the meta device tells the shape of what it would give."""
    of = OPTIONS[option]
    layer = layer_of("optimized", **of.arguments).to("meta")
    out = layer(**{name: t.to("meta") for name, t in call_of(of, n).items()})
    assert (out.shape, out.dtype, out.device.type) == ((2, n, DIM), torch.float64, "meta")


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
@EVERY_OPTION
def test_traced(option: str, tracing: str) -> None:
    """The graph that make_fx writes down computes the same on other numbers; so with routes from outside."""
    of = OPTIONS[option]
    layer = layer_of("optimized", **of.arguments).eval()
    call, other = call_of(of, 12), call_of(of, 12, seed=1)
    names = list(call)

    def run(*values: Tensor) -> Tensor:
        return layer(**dict(zip(names, values)))

    graph = make_fx(run, tracing_mode=tracing, _allow_non_fake_inputs=True)(*call.values())
    assert_agrees(graph(*other.values()).detach(), layer(**other).detach())


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_traced_with_routes(tracing: str) -> None:
    layer = layer_of("optimized", straight_through=False).eval()
    call, other = (call_of(OPTIONS["default"], 12, seed) for seed in range(2))
    make = type(injected("optimized", layer, call)[0])

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return layer(x, routes=(make(*values[:4]), make(*values[4:])))

    flat = [[given["x"], *(t for r in injected("optimized", layer, given) for t in r)] for given in (call, other)]
    graph = make_fx(run, tracing_mode=tracing, _allow_non_fake_inputs=True)(*flat[0])
    assert_agrees(graph(*flat[1]).detach(), layer(**other).detach())


def flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@PACKAGES
@pytest.mark.parametrize("option", ["default", "exact", "local mask", "cross"])
def test_counted_flops(package: str, option: str) -> None:
    """The projections at least, forward; twice these and more, backward; in proportion to the batch."""
    of, n = OPTIONS[option], 12
    layer = layer_of(package, **of.arguments)
    dim_context = layer.dim_context
    projections = 2 * 2 * EXPERTS * INNER * (K_Q * (DIM + DIM) + K_KV * 2 * dim_context)
    projections += 2 * 2 * n * DIM * 4 * INNER if "local_attn" in of.arguments else 0
    counted = []
    for batch in (2, 4):
        given = call_of(of, n, batch=batch)
        given["x"].requires_grad_()
        forward = flops(lambda given=given: layer(**given))
        both = flops(lambda given=given: loss_of(layer(**given)).backward())
        assert forward >= projections * batch // 2
        assert both - forward >= 2 * projections * batch // 2
        counted.append((forward, both))
    assert counted[1] == tuple(2 * count for count in counted[0])


def frozen_products(n: int) -> dict[str, int]:
    """Multiply-adds of each weight's gradient, twice: what a backward need not do. A batch of 2."""
    routed = 2 * 2 * EXPERTS * INNER
    return {
        "attn.to_q.weight": routed * K_Q * DIM,
        "attn.to_kv.weight": 2 * routed * K_KV * DIM,
        "attn.to_out.weight": routed * K_Q * DIM,
        "local_attn.to_qkv.weight": 2 * 2 * n * DIM * 3 * INNER,
        "local_attn.to_out.weight": 2 * 2 * n * DIM * INNER,
    }


@PACKAGES
@pytest.mark.parametrize("weight", [*frozen_products(0), "all"])
def test_frozen_weights_cost_no_product(package: str, weight: str) -> None:
    """No gradient, the others' as before, and exactly that much less to compute."""
    of, n = OPTIONS["local mask"], 12
    layer, call = layer_of(package, **of.arguments), call_of(of, n)
    call["x"].requires_grad_()
    products = frozen_products(n)
    frozen = set(products) if weight == "all" else {weight}
    expected = {name: g for name, g in gradients_of(layer, call).items() if name not in frozen}
    before = flops(lambda: loss_of(layer(**call)).backward())
    layer.zero_grad()
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    after = flops(lambda: loss_of(layer(**call)).backward())
    assert all(layer.get_parameter(name).grad is None for name in frozen)
    assert_all_agree({name: p.grad for name, p in layer.named_parameters() if name not in frozen}, expected)
    assert before - after == sum(products[name] for name in frozen)
