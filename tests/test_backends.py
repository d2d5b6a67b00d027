"""Backends, and the layer as a citizen of PyTorch: autocast, state, copies, determinism, imports, signatures."""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import inspect
import io
import pickle
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from harness import BOTH, DTYPES, KERNELS, check_identical, stages_by
from runs import LayerRun, baseline_layer, compare, oracle_layer, run_layer
from strategies import LayerCase, generator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import optimized
import reference
from optimized import plan
from optimized.attention import Adapter, Request, adapter, flash_attn_2
from optimized.explain import StageReport
from reference import contract

ROOT = Path(optimized.__file__).parent.parent
ATTENTION = optimized.backends()["routed_attention"]
LOCAL_ATTENTION = optimized.backends()["local_attention"]
OPERATORS = {  # what the profiler calls the kernel of a backend, on the CPU and on CUDA
    "torch_flash": ("_scaled_dot_product_flash_attention_for_cpu", "_flash_attention_forward"),
    "torch_cudnn": (None, "_scaled_dot_product_cudnn_attention"),
    "torch_efficient": (None, "_efficient_attention_forward"),
    "flash_attn_2": (None, "flash_attn::_flash_attn_forward"),
    "cudnn_flash_attn_4": (None, "_scaled_dot_product_cudnn_attention"),
    "flash_attn_4": (None, None),  # launched without PyTorch's dispatcher
    "math": (None, None),
    "triton": (None, "_attention_kernel"),
    "triton_interpreted": (None, None),
}
CASE = LayerCase(n=40, k_q=9, k_kv=11, dim_head=8, options={"cosine_sim_routing": True})
LOCAL = replace(CASE, window=6)


def build(
    implementation: ModuleType,
    case: LayerCase,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    **arguments: object,
) -> nn.Module:
    layer = implementation.MixtureOfAttention(**(case.arguments() | arguments), device=device, dtype=dtype)
    layer.load_state_dict({name: t.to(dtype) for name, t in case.state().items()})
    return layer.eval()


def inputs(case: LayerCase, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return case.inputs()["x"].to(dtype).to(device)


# --- choosing a backend ----------------------------------------------------------------------------------------------


def serves(report: StageReport, name: str) -> bool:
    """Whether a stage, as `explain` reports it, could be done by the backend: chosen, or only not preferred."""
    return report.backend == name or " is preferred" in report.reasons[name]


def masked_or_not(window: int | None, mask: str) -> LayerCase:
    return replace(CASE, window=window, mask=mask, seed=3)


@functools.cache
def reference_runs(
    window: int | None, mask: str, dtype: torch.dtype, device: torch.device
) -> tuple[Any, LayerRun, LayerRun]:
    """Routes, and with them what is exact and what is as good as it gets in the dtype; the same for all backends."""
    case = masked_or_not(window, mask)
    routes = oracle_layer(case, dtype, device).routes
    return routes, *(run(case, dtype, device, routes=routes) for run in (oracle_layer, baseline_layer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "random"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("name", ATTENTION)
def test_every_backend_matches_or_refuses(
    name: str, window: int | None, mask: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Values and every gradient; a backend that can't serve says so and computes nothing."""
    case = masked_or_not(window, mask)
    layer = build(optimized, case, device, dtype)
    given = {"mask": case.inputs()["mask"].to(device)} if mask != "none" else {}
    x = inputs(case, device, dtype)
    shown = torch.ones(case.batch, case.n, dtype=torch.bool, device=device)
    report = optimized.explain(layer, x, **given).stages["routed_attention"]
    masked = optimized.explain(layer, x, mask=shown).stages["routed_attention"]
    if not serves(report, name):
        refused = pytest.raises(ValueError, match="routed_attention: expected a backend that can run")
        with refused, optimized.use_backends(routed_attention=name):
            layer(x, **given)
        return
    with optimized.use_backends(routed_attention=name):
        # Its own routes keep the layer on the path without a mask.
        own = layer(x, **given)
        if not serves(masked, name):
            assert own.isfinite().all()
            return  # injected routes come with a mask
        routes, exact, baseline = reference_runs(window, mask, dtype, device)
        actual = run_layer(optimized, case, dtype, device, routes=routes)
    compare(actual, exact, baseline, stage="mixture", dtype=dtype, backend=name)


@pytest.mark.parametrize("name", ATTENTION)
def test_explain_tells_what_runs(name: str, device: torch.device) -> None:
    """The kernel that the profiler sees is the one that `explain` names."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer, x = build(optimized, CASE, device, dtype), inputs(CASE, device, dtype)
    if not serves(optimized.explain(layer, x).stages["routed_attention"], name):
        return  # covered by test_every_backend_matches_or_refuses
    with optimized.use_backends(routed_attention=name):
        assert optimized.explain(layer, x).stages["routed_attention"].backend == name
        with torch.profiler.profile() as profile, torch.no_grad():
            layer(x)
    seen = {event.key.removeprefix("aten::") for event in profile.key_averages()}
    known = {operator for pair in OPERATORS.values() for operator in pair if operator}
    expected = OPERATORS[name][device.type == "cuda"]
    assert seen & known == ({expected} if expected else set())


def test_explain_prints_an_aligned_table(device: torch.device) -> None:
    layer = build(optimized, LOCAL, device)
    explanation = optimized.explain(layer, inputs(LOCAL, device))
    assert set(explanation.stages) == set(optimized.backends())
    *lines, path = str(explanation).splitlines()
    column = lines[0].index("why")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)
    assert path.split(maxsplit=1) == ["path", explanation.path]
    assert path.index(explanation.path) == lines[0].index("backend")
    assert "local_attention" not in optimized.explain(build(optimized, CASE, device), inputs(CASE, device)).stages
    with pytest.raises(TypeError, match="module"):
        optimized.explain(nn.Linear(2, 2), inputs(CASE, device))
    with pytest.raises(ValueError, match="x: expected"):
        optimized.explain(layer, inputs(CASE, device)[0])
    with pytest.raises(TypeError, match="maks"):
        optimized.explain(layer, inputs(CASE, device), maks=None)


class Weight(nn.Parameter):
    """As quantization makes them: what its numbers mean, its class knows."""


ATTACHED = {  # attachment to a layer: what `explain` says of it
    "pre-hook": (lambda m: m.attn.to_q.register_forward_pre_hook(lambda *_: None), "attn.to_q has a forward pre-hook"),
    "hook": (lambda m: m.query_router.register_forward_hook(lambda *_: None), "query_router has a forward hook"),
    "backward hook": (
        lambda m: m.attn.context_norm.register_full_backward_hook(lambda *_: None),
        "attn.context_norm has a backward hook",
    ),
    "backward pre-hook": (
        lambda m: m.attn.to_kv.register_full_backward_pre_hook(lambda *_: None),
        "attn.to_kv has a backward pre-hook",
    ),
    "bias": (lambda m: setattr(m.attn.to_q, "bias", nn.Parameter(m.attn.to_q.weight[:, 0, 0])), "attn.to_q has a bias"),
    "weight of another class": (
        lambda m: setattr(m.attn.to_q, "weight", Weight(m.attn.to_q.weight.detach())),
        "attn.to_q has a weight of class Weight",
    ),
    "replaced module": (
        lambda m: setattr(m.local_attn, "to_out", nn.Sequential(m.local_attn.to_out)),
        "local_attn.to_out is of class Sequential, not Linear",
    ),
    "replaced forward": (
        lambda m: setattr(m.key_value_router, "forward", m.key_value_router.forward),
        "key_value_router has a replaced forward",
    ),
    "other options": (
        lambda m: setattr(m.query_router, "options", replace(m.query_router.options, eps=0.5)),
        "the routers have different options",
    ),
    "parametrization": (
        lambda m: nn.utils.parametrizations.weight_norm(m.attn.to_out),
        "attn.to_out is of class ParametrizedExpertProjection, not ExpertProjection",
    ),
}


@pytest.mark.parametrize("name", ATTACHED)
def test_explain_tells_why_modules_are_called(name: str, device: torch.device) -> None:
    layer, x = build(optimized, LOCAL, device), inputs(LOCAL, device)
    assert optimized.explain(layer, x).path == "fused"
    attach, reason = ATTACHED[name]
    attach(layer)
    assert optimized.explain(layer, x).path == reason


def test_explain_tells_which_calls_are_not_fused(device: torch.device) -> None:
    layer, x = build(optimized, CASE, device), inputs(CASE, device)
    mask, other = (torch.ones(x.shape[:2], dtype=torch.bool, device=device) for _ in range(2))
    _, routes = layer(x, return_routes=True)
    context = "keys and values come from a context"
    for given, path in (
        ({}, "fused"),
        ({"mask": mask, "return_routes": True, "num_routed_queries": 50}, "fused"),
        ({"routes": routes}, "routes are injected"),
        ({"context": x.clone()}, context),
        ({"context": x, "mask": mask, "context_mask": other}, context),
        ({"context": x, "mask": mask, "context_mask": mask}, "fused"),
    ):
        assert optimized.explain(layer, x, **given).path == path, given
    if device.type == "cpu":
        with optimized.use_backends(routing="triton_interpreted"):
            assert optimized.explain(layer, x).path == "routing and dispatch have different backends"


def test_explain_notes_what_else_is_to_be_known(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of cuDNN: that its backward is another's where it would give NaN."""
    layer, x = build(optimized, CASE, device), inputs(CASE, device)
    with optimized.use_backends(routed_attention="math"):
        report = optimized.explain(layer, x)
        assert report.stages["routed_attention"].note == ""
        assert "note:" not in str(report)
    only = plan.Backend("torch_cudnn", lambda request: None)
    monkeypatch.setitem(plan.REGISTRY, "routed_attention", (only,))
    monkeypatch.setattr(plan, "_plans", {})
    report = optimized.explain(layer, x)
    assert "backward is torch_flash's where 64 keys are left over by 128" in report.stages["routed_attention"].note
    assert f"note: {report.stages['routed_attention'].note}" in str(report)


# --- what a call does once -------------------------------------------------------------------------------------------


@pytest.fixture(params=["fused", "composed"])
def path(request: pytest.FixtureRequest) -> str:
    return request.param


def on_path(path: str, device: torch.device) -> nn.Module:
    layer = build(optimized, LOCAL, device)
    if path == "composed":
        for module in layer.modules():
            module.register_forward_pre_hook(lambda *_: None)
    return layer


def test_backends_are_chosen_once_for_a_kind_of_call(
    path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One choice a stage in the first call, none in the next; another where anything changes that decides."""
    layer, x = on_path(path, device), inputs(LOCAL, device)
    asked: list[str] = []
    choose = plan.choose

    def counting(stage: str, *rest: Any) -> plan.Backend:
        asked.append(stage)
        return choose(stage, *rest)

    monkeypatch.setattr(plan, "choose", counting)
    monkeypatch.setattr(plan, "_plans", {})
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=device)
    layer(x)
    assert sorted(asked) == sorted(optimized.backends())
    for change, count in ((dict, 0), (lambda: {"mask": mask}, 5), (dict, 0), (lambda: {"mask": mask}, 0)):
        asked.clear()
        layer(x, **change()).sum().backward()
        assert len(asked) == count
    for _ in range(2):
        with optimized.use_backends(routed_attention="math"):
            layer(x)
        assert sorted(asked) == sorted(optimized.backends())


def test_stages_are_asked_for_what_the_call_needs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys to hide and dropout, each by the stage that has them: a library that can't would ignore them."""
    asked: dict[str, plan.Request] = {}
    choose = plan.choose

    def noting(stage: str, request: plan.Request, *rest: Any) -> plan.Backend:
        asked[stage] = request
        return choose(stage, request, *rest)

    monkeypatch.setattr(plan, "choose", noting)
    monkeypatch.setattr(plan, "_plans", {})
    layer, x = build(optimized, LOCAL, device, dropout=0.5), inputs(LOCAL, device)
    crossed = build(optimized, CASE, device, dropout=0.5).train()
    shown = {name: torch.ones(x.shape[:2], dtype=torch.bool, device=device) for name in ("mask", "context_mask")}
    mask, context_mask = ({name: value} for name, value in shown.items())
    _, routes = layer(x, return_routes=True)
    for module, given, routed, local in (
        (layer, {}, (False, 0.0), False),
        (layer, mask, (True, 0.0), True),
        (layer, {"routes": routes}, (True, 0.0), False),
        (crossed, {"context": x} | mask, (False, 0.5), None),
        (crossed, {"context": x} | context_mask, (True, 0.5), None),
    ):
        asked.clear()
        plan._plans.clear()
        module(x, **given)
        assert (asked["routed_attention"].masked, asked["routed_attention"].dropout) == routed
        found = asked.get("local_attention")
        assert (found and found.masked) == local


def test_arguments_are_checked_once(path: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the layer. A module with a pre-hook looks at the parameters of its own beside what it is given, once."""
    layer, x = on_path(path, device), inputs(LOCAL, device)
    checked: list[str] = []
    real, beside, of_modules = contract.tensor, contract.beside_parameters, contract.parameters

    def counting(argument: str, *given: object, **named: object) -> None:
        checked.append(argument)
        real(argument, *given, **named)

    def counting_beside(argument: str, value: Tensor, parameter: Tensor | None, what: str) -> None:
        beside(argument, value, parameter, what)
        checked.append(what)

    def counting_parameters(module: nn.Module, x: Tensor, classes: contract.Classes) -> None:
        of_modules(module, x, classes)
        checked.extend(name for name, *_ in contract._read(module, classes))

    monkeypatch.setattr(contract, "tensor", counting)
    monkeypatch.setattr(contract, "parameters", counting_parameters)
    monkeypatch.setattr(contract, "beside_parameters", counting_beside)
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=device)
    layer(x, mask=mask)
    assert checked.count("x") == checked.count("mask") == 1
    # Routers and projections ask by themselves; scales of norms are converted.
    composed = ["the routing token"] * 2 + ["weight"] * 3 + ["null_kv"]
    expected = [name for name, _ in layer.named_parameters()] if path == "fused" else composed
    assert sorted(checked) == sorted(["x", "mask", *expected])


def test_flash_attn_false_keeps_flash_out(device: torch.device) -> None:
    layer = build(optimized, LOCAL, device, flash_attn=False)
    stages = optimized.explain(layer, inputs(LOCAL, device)).stages
    for stage in ("routed_attention", "local_attention"):
        assert "flash" not in stages[stage].backend
        assert any(reason == "flash_attn=False" for reason in stages[stage].reasons.values())
    with pytest.raises(ValueError, match="flash_attn=False"), optimized.use_backends(routed_attention="torch_flash"):
        layer(inputs(LOCAL, device))


def test_use_backends_sets_restores_and_refuses(device: torch.device) -> None:
    layer, x = build(optimized, CASE, device), inputs(CASE, device)
    automatic = optimized.explain(layer, x).stages["routed_attention"].backend

    def current() -> str:
        return optimized.explain(layer, x).stages["routed_attention"].backend

    with optimized.use_backends(routed_attention="math"):
        assert current() == "math"
        with optimized.use_backends(routed_attention=None):
            assert current() == automatic
        assert current() == "math"
    assert current() == automatic
    with pytest.raises(RuntimeError), optimized.use_backends(routed_attention="math"):
        raise RuntimeError
    assert current() == automatic
    optimized.set_default_backends(routed_attention="math")
    assert current() == "math"
    optimized.set_default_backends(routed_attention=None)
    assert current() == automatic
    with pytest.raises(TypeError, match="routed_attention, local_attention"):
        optimized.use_backends(attention="math")
    with pytest.raises(ValueError, match="routing: expected one of triton, torch, triton_interpreted or None, got 'c'"):
        optimized.use_backends(routing="c")
    assert current() == automatic
    if device.type == "cpu":
        with pytest.raises(ValueError, match="got 'torch_cudnn': runs on CUDA"):
            optimized.use_backends(routed_attention="torch_cudnn")


def test_an_interpreter_that_fails_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton 3.6 does with NumPy 2.4 or newer."""
    from optimized.kernels import value_score

    def fail(*_: object) -> None:
        raise TypeError("only 0-dimensional arrays can be converted")

    monkeypatch.setattr(value_score, "value_score", fail)
    probe = plan._interpreter_obstacle.__wrapped__
    assert probe() == "Triton's interpreter fails here: only 0-dimensional arrays can be converted"


def test_adapters_keep_the_contract() -> None:
    """All of them are made here, whatever is installed: they import their libraries when they are asked."""
    methods = ("obstacle", "state", "forward", "backward")
    libraries = {name.removeprefix("banded_") for names in (ATTENTION, LOCAL_ATTENTION) for name in names}
    for name in (libraries | {"torch_flash_cpu", "triton_kernel"}) - {"flex_attention", "triton", "triton_interpreted"}:
        library = adapter(name)
        assert type(library).__module__ == f"optimized.attention.{name}"
        for method in methods:
            expected = inspect.signature(getattr(Adapter, method))
            assert inspect.signature(getattr(type(library), method)) == expected, f"{name}: {method}"
            if method != "state":
                assert getattr(type(library), method) is not getattr(Adapter, method), f"{name}: {method}"
        given = {attribute: getattr(library, attribute) for attribute in vars(Adapter) if not attribute.startswith("_")}
        for attribute, value in vars(Adapter).items():
            if attribute in given and not callable(value):
                assert type(given[attribute]) is type(value), f"{name}: {attribute}"


def test_the_probe_of_flash_attn_2_runs_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a made-up package: the probe once called the backward without its buffers, and took the layer down."""
    called = []

    def run_forward(q: Tensor, *_: object, **__: object) -> tuple[Tensor, ...]:
        called.append("forward")
        return q, q.new_zeros(q.shape[0], q.shape[2], q.shape[1]), q, q

    def run_backward(dout: Tensor, *given: Tensor, **_: object) -> None:
        called.append("backward")
        assert len(given) == 8
        assert all(buffer.shape == dout.shape for buffer in given[-3:])

    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_forward = run_forward
    interface._flash_attn_backward = run_backward
    package = types.ModuleType("flash_attn")
    package.flash_attn_interface = interface
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(flash_attn_2, "import_obstacle", lambda *_: None)
    probe = flash_attn_2._build_obstacle.__wrapped__
    assert probe(torch.device("cpu"), torch.float16, 64) is None
    assert called == ["forward", "backward"]


def test_a_chosen_backend_never_gives_way(device: torch.device) -> None:
    """Dropout rules flash out on the CPU, a mask on CUDA: explicitly chosen, it raises; by itself, another serves."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = build(optimized, CASE, device, dtype, dropout=0.5).train(device.type == "cpu")
    x = inputs(CASE, device, dtype)
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=device)
    name, reason = "torch_flash", "no dropout on the CPU"
    if device.type == "cuda":
        name, reason = "torch_cudnn", "without dropout and mask only"
    assert layer(x, mask=mask).shape == x.shape
    with optimized.use_backends(routed_attention=name), pytest.raises(ValueError, match=reason):
        layer(x, mask=mask)


# --- autocast --------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASE, LOCAL], ids=["routed", "local"])
def test_autocast(implementation: ModuleType, case: LayerCase, low: torch.dtype, device: torch.device) -> None:
    """Output in x's dtype, gradients in the parameters'; the routers decide in float32 all the same."""
    layer, x = build(implementation, case, device), inputs(case, device).requires_grad_()
    plain, (q_plain, kv_plain) = layer(x, return_routes=True)
    with torch.autocast(device.type, dtype=low):
        out, (q_routes, kv_routes) = layer(x, return_routes=True)
    for a, b in ((q_routes, q_plain), (kv_routes, kv_plain)):
        check_identical(a.indices, b.indices)
        check_identical(a.logits.detach(), b.logits.detach())
    assert out.dtype == torch.float32
    assert not torch.equal(out, plain), "autocast changed nothing"
    assert (out - plain).norm() / plain.norm() < 0.03
    out.square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in (x, *layer.parameters()))
    # Half-precision input beside float32 parameters is autocast's business too.
    with torch.autocast(device.type, dtype=low):
        assert layer(x.detach().to(low)).dtype == low


@BOTH
@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("case", [CASE, LOCAL], ids=["routed", "local"])
@pytest.mark.usefixtures("deterministic")
def test_float64_under_autocast_is_as_outside(
    implementation: ModuleType, case: LayerCase, hooked: bool, device: torch.device
) -> None:
    """Bit by bit, gradients too; where modules are called one by one as where they are not."""
    layer, x = build(implementation, case, device, torch.float64), inputs(case, device, torch.float64).requires_grad_()
    if hooked:
        for module in layer.modules():
            module.register_forward_hook(lambda *given: None)
    found = []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            out = layer(x)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    for outside, inside in zip(*found):
        check_identical(inside, outside)


# --- state and copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASE, LOCAL, replace(CASE, prenorm=False, dim_context=6, context=9)], ids=repr)
def test_state_dict_both_ways(case: LayerCase, device: torch.device) -> None:
    """The documented names and shapes; each implementation loads the other's, and computes the same with it."""
    layers = {}
    for implementation, other in ((reference, optimized), (optimized, reference)):
        source = implementation.MixtureOfAttention(**case.arguments(), device=device)
        assert {k: tuple(v.shape) for k, v in source.state_dict().items()} == {
            k: tuple(v.shape) for k, v in case.state().items()
        }
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        target = other.MixtureOfAttention(**case.arguments(), device=device)
        target.load_state_dict(torch.load(buffer, weights_only=True))
        given = {k: v.to(device).float() if v.is_floating_point() else v.to(device) for k, v in case.inputs().items()}
        torch.testing.assert_close(target.eval()(**given), source.eval()(**given), rtol=1e-4, atol=1e-5)
        layers[implementation] = source
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layers[optimized].load_state_dict(layers[reference].state_dict() | {"surplus": torch.zeros(1)})


@BOTH
def test_public_checkpoint_loads(implementation: ModuleType, device: torch.device) -> None:
    """Checkpoints of mixture-of-attention 0.0.25 hold the rotary frequencies, which are dropped; nothing else is."""
    layer = implementation.MixtureOfAttention(**LOCAL.arguments(), device=device)
    state = LOCAL.state()
    public = state | {"local_attn.attn_fn.rel_pos.inv_freq": torch.arange(4.0)}
    layer.load_state_dict(public)
    assert "local_attn.attn_fn.rel_pos.inv_freq" in public, "the caller's dict is left alone"
    with pytest.raises(RuntimeError, match="inv_freq"):
        layer.load_state_dict(state | {"local_attn.other.inv_freq": torch.arange(4.0)})


@BOTH
def test_copies(implementation: ModuleType, device: torch.device) -> None:
    layer, x = build(implementation, LOCAL, device), inputs(LOCAL, device)
    out = layer(x).detach()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        check_identical(twin(x).detach(), out.clone())
        with torch.no_grad():
            twin.attn.to_q.weight.add_(1.0)
        check_identical(layer(x).detach(), out.clone())
    double = copy.deepcopy(layer).to(torch.float64)
    torch.testing.assert_close(double(x.double()).float(), out, rtol=1e-4, atol=1e-5)


@BOTH
def test_meta_construction_and_reset(implementation: ModuleType, device: torch.device) -> None:
    """Built without memory, materialised, initialised: as if built at once, with the same random numbers."""
    arguments = LOCAL.arguments()
    layer = implementation.MixtureOfAttention(**arguments, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device=device)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(float("nan"))
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    bound = arguments["dim"] ** -0.5
    assert layer.attn.to_q.weight.abs().max() <= bound
    assert layer.attn.to_q.weight.abs().max() > 0.8 * bound
    assert 0.5 < layer.attn.null_kv.std() < 1.5


@BOTH
@pytest.mark.usefixtures("deterministic")
def test_functional_forms_agree(
    implementation: ModuleType, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """no_grad, inference_mode, functional_call: the same output; checkpointing: the same gradients too.

    On a GPU autograd recomputes in a thread of its own, which sees no block of this one unless it is handed over.
    """
    kernels = request.node.callspec.params["implementation"]

    def blocks() -> tuple[Any, Any]:
        chosen = stages_by(kernels) if kernels in KERNELS else {}
        return contextlib.nullcontext(), optimized.use_backends(**chosen)

    layer, x = build(implementation, LOCAL, device), inputs(LOCAL, device).requires_grad_()
    out = layer(x)
    with torch.no_grad():
        check_identical(layer(x), out.detach().clone())
    with torch.inference_mode():
        check_identical(layer(x).clone(), out.detach().clone())
    check_identical(
        torch.func.functional_call(layer, dict(layer.named_parameters()), (x,)).detach(), out.detach().clone()
    )
    g = torch.randn(out.shape, generator=generator(1)).to(device)
    leaves = [x, *layer.parameters()]
    recomputed = checkpoint(layer, x, use_reentrant=False, context_fn=blocks)
    for a, b in zip(torch.autograd.grad(recomputed, leaves, g), torch.autograd.grad(out, leaves, g)):
        check_identical(a, b)


@BOTH
def test_subsets_of_gradients(implementation: ModuleType, device: torch.device) -> None:
    """A gradient exactly where one is asked for, equal to that of the full run."""
    layer, x = build(implementation, LOCAL, device), inputs(LOCAL, device).requires_grad_()
    g = torch.randn(x.shape, generator=generator(1)).to(device)
    names = {"x": x, **dict(layer.named_parameters())}
    full = dict(zip(names, torch.autograd.grad(layer(x), list(names.values()), g)))
    for wanted in names:
        for name, t in names.items():
            t.requires_grad_(name == wanted)
        layer(x).backward(g)
        for name, t in names.items():
            assert (t.grad is not None) == (name == wanted), f"{wanted} wanted, {name} looked at"
        torch.testing.assert_close(names[wanted].grad, full[wanted], rtol=1e-4, atol=1e-5)
        names[wanted].grad = None


@BOTH
def test_inputs_are_left_alone_and_calls_repeat(implementation: ModuleType, device: torch.device) -> None:
    case = replace(CASE, mask="random", rotary=True)
    layer = build(implementation, case, device)
    given = {k: (v.float() if v.is_floating_point() else v).to(device) for k, v in case.inputs().items()}
    before = {k: v.clone() for k, v in given.items()}
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    first = layer(**given)
    first.sum().backward()
    check_identical(layer(**given).detach(), first.detach().clone())
    for name, t in given.items():
        check_identical(t, before[name])
    for name, t in layer.state_dict().items():
        check_identical(t, state[name])


@pytest.mark.cpu
def test_a_plan_holds_for_the_determinism_it_was_made_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first choice is one that deterministic algorithms rule out, as cuDNN's backward is on a GPU."""

    def ruled_out(request: Request) -> str | None:
        return "not deterministic" if torch.are_deterministic_algorithms_enabled() else None

    options = plan.Backend("fast", ruled_out), plan.Backend("slow", lambda request: None)
    monkeypatch.setitem(plan.REGISTRY, "routed_attention", options)
    monkeypatch.setattr(plan, "_plans", {})
    kind, found = plan.Kind(torch.device("cpu"), torch.float32, ("routed_attention",), 64), []
    for deterministic in (False, True, False):
        torch.use_deterministic_algorithms(deterministic)
        try:
            found.append(plan.bind(kind).routed_attention)
        finally:
            torch.use_deterministic_algorithms(False)
    assert found == ["fast", "slow", "fast"]


@BOTH
@pytest.mark.parametrize("case", [CASE, LOCAL], ids=["routed", "local"])
def test_determinism(
    implementation: ModuleType, case: LayerCase, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward bitwise always; backward under use_deterministic_algorithms, which fills new memory with NaN."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    layer, x = build(implementation, case, device), inputs(case, device).requires_grad_()
    g = torch.randn(x.shape, generator=generator(1)).to(device)
    out = layer(x).detach()
    for _ in range(3):
        check_identical(layer(x).detach(), out.clone())
    leaves = [x, *layer.parameters()]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        runs = [torch.autograd.grad(layer(x), leaves, g) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        for a, b in zip(other, runs[0]):
            assert a.isfinite().all()
            check_identical(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_in_half_precision(low: torch.dtype, device: torch.device) -> None:
    """The probes of the CUDA backends are traced too: no graph break, and the same numbers as eager."""
    torch.compiler.reset()
    layer, x = build(optimized, LOCAL, device, low), inputs(LOCAL, device, low)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    check_identical(compiled(x).detach(), layer(x).detach())


@pytest.mark.gpu
def test_cuda_graph_replays_new_values(device: torch.device) -> None:
    layer, x = build(optimized, LOCAL, device, torch.bfloat16), inputs(LOCAL, device, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = layer(x)
    for seed in (1, 2):
        x.copy_(torch.randn(x.shape, generator=generator(seed)))
        graph.replay()
        with torch.no_grad():
            check_identical(out, layer(x))


# --- the packages ----------------------------------------------------------------------------------------------------


Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(package: str) -> dict[str, ast.Module]:
    """Modules of a package by name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All beneath, but for what only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield from (other, *nodes(other))
            continue
        yield node
        yield from nodes(node)


def imported(tree: ast.AST) -> set[str]:
    """Full names: what `from a import b` takes is a.b. Imports in functions included."""
    names: set[str] = set()
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return names


def of_package(names: set[str], package: str) -> set[str]:
    return {name for name in names if name.split(".")[0] == package}


CONTRACTS = ("contract", "autoregressive_contract", "autoregressive_call")  # refusals and types: no arithmetic
# And the value that a cache is, which a call of one package may get from the other, with what it is told of a call.
VALUES = {"reference.autoregressive_cache"}
VALUES |= {f"reference.autoregressive.{name}" for name in ("Laid", "Memory", "MemoryRoutes", "QueryRoutes")}


def of_contract(name: str) -> bool:
    modules = {f"reference.{c}" for c in CONTRACTS} | VALUES
    return name in {"reference.autoregressive", *modules} or any(name.startswith(f"{module}.") for module in modules)


def test_packages_share_the_contract_alone() -> None:
    """The reference imports nothing of the other; this takes refusals, types and the cache from the reference.

    Only the job that compares them has both. What is shared of the contract computes nothing, and the oracle is NumPy.
    """
    for name, tree in sources("reference").items():
        assert not of_package(imported(tree), "optimized"), name
    shared = set()
    for name, tree in sources("optimized").items():
        if name.startswith("optimized.prove"):
            continue
        taken = of_package(imported(tree), "reference")
        assert all(of_contract(t) for t in taken), f"{name}: {taken}"
        shared |= taken
    assert shared
    assert not of_package(imported(sources("reference")["reference.contract"]), "reference")
    arithmetic = {ast.MatMult, ast.Pow}
    for module in CONTRACTS:
        nodes = ast.walk(sources("reference")[f"reference.{module}"])
        assert not [node for node in nodes if isinstance(node, ast.BinOp) and type(node.op) in arithmetic]
    oracle = {name.split(".")[0] for name in imported(sources("reference")["reference.oracle"])}
    assert oracle <= {"__future__", "math", "numpy", "typing", "collections"}


@pytest.mark.parametrize("package", ["reference", "optimized"])
def test_no_module_imports_itself_by_way_of_others(package: str) -> None:
    """Imports in functions count."""
    modules = sources(package)
    needs = {}
    for name, tree in modules.items():
        taken = imported(tree)
        # `from package import module` needs the module, `from module import thing` that module.
        needs[name] = {t if t in modules else t.rpartition(".")[0] for t in taken} & modules.keys()
    while needs:
        leaves = {name for name, others in needs.items() if not others & needs.keys()}
        assert leaves, f"in circles: {needs}"
        needs = {name: others for name, others in needs.items() if name not in leaves}


# Stages as functions of tensors, which users and the oracle call.
STAGES = {"route", "routed_attention", "local_attention", "combine", "mixture_of_attention"}
STAGES |= {"mixture_of_autoregressive_attention", "newest_token"}  # of the causal oracle


@pytest.mark.parametrize("package", ["reference", "optimized"])
def test_functions_take_few_arguments(package: str) -> None:
    """Ten at most, but for constructors, `forward` and call of a layer, stages, and kernels."""
    public = {"__init__", "forward", "__call__", *STAGES}
    for name, tree in sources(package).items():
        for node in ast.walk(tree):
            if not isinstance(node, Function) or "triton.jit" in map(jitted, node.decorator_list):
                continue
            given = node.args
            count = len([*given.posonlyargs, *given.args, *given.kwonlyargs]) + bool(given.vararg) + bool(given.kwarg)
            assert count <= 10 or node.name in public, f"{name}: {node.name} takes {count} arguments"


def jitted(decorator: ast.expr) -> str:
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


def child(program: str, *arguments: str) -> str:
    """Output of a Python program run from the checkout."""
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_optional_parts_are_imported_lazily() -> None:
    out = child("""
        import sys
        import optimized, reference, reference.testing, reference.oracle
        print([name for name in ("matplotlib", "flash_attn", "hypothesis", "pytest", "rich") if name in sys.modules])
    """)
    assert out.strip() == "[]"


def test_signatures_hold_at_run_time() -> None:
    """jaxtyping checks every annotated shape and dtype while both layers run, and rejects a wrong one."""
    every = sources("reference") | sources("optimized")
    annotated = [name for name, tree in every.items() if any(n.startswith("jaxtyping.") for n in imported(tree))]
    assert {"optimized.mixture", "reference.mixture"} <= set(annotated)
    out = child(
        """
        import sys
        from jaxtyping import install_import_hook
        with install_import_hook(sys.argv[1:], "beartype.beartype"):
            import optimized, reference
            from optimized.routed_attention import RMSNorm
        import torch
        torch.set_num_threads(1)
        runs = 0
        for package in (reference, optimized):
            for options in (
                {}, {"local_attn": True, "local_attn_window_size": 3}, {"solver": "exact", "route_block_size": 7},
                {"dim_context": 6}, {"learned_routing_tokens": True}, {"num_routed_queries": 50, "prenorm": False},
            ):
                arguments = {"num_routed_queries": 5, "num_routed_key_values": 4, "num_experts": 3} | options
                layer = package.MixtureOfAttention(16, **arguments, dim_head=4, heads=2)
                x = torch.randn(2, 20, 16, requires_grad=True)
                given = {"mask": (torch.rand(1, 20) < 0.8).long()}
                if "dim_context" in options:
                    given |= {"context": torch.randn(2, 9, 6), "context_mask": torch.rand(2, 9) < 0.8}
                else:
                    given["rotary_emb"] = torch.randn(23, 4)
                if "learned_routing_tokens" in options:
                    given["query_routing_tokens"] = torch.randn(3, 16)
                    given["key_value_routing_tokens"] = torch.randn(2, 3, 16)
                out, routes = layer(x, **given, return_routes=True)
                out.square().sum().backward()
                runs += 1
        try:
            RMSNorm(3, 16)(torch.randn(2, 4, 16))
        except Exception as error:
            print(runs, type(error).__name__)
    """,
        *annotated,
    )
    assert out.split() == ["12", "TypeCheckError"]
