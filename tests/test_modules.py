"""Modules are called: whatever is attached to a module of the layer, or put in its place, takes part in a call.

So is what programs do to a layer as a whole: other default dtypes, transforms, tracing, other kinds of tensors.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from harness import BOTH, KERNELS, check_identical
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import optimized
import reference
from reference import contract

B, N, D, E, KQ, KKV = 2, 11, 6, 3, 4, 5
LAYER: dict[str, Any] = {
    "dim": D,
    "num_routed_queries": KQ,
    "num_routed_key_values": KKV,
    "num_experts": E,
    "dim_head": 4,
    "heads": 2,
    "dropout": 0.0,
    "straight_through": False,
    "cosine_sim_routing": True,
    "cosine_sim_scale": 3.0,
    "eps": 1.0,  # scores are soft, few saturate, so that the routers matter
}
LOCAL = {"local_attn": True, "local_attn_window_size": 2}
KINDS = pytest.mark.parametrize("options", [{}, LOCAL], ids=["", "local"])
ROUTED = ("attn.to_q", "attn.to_kv", "attn.to_out")
PROJECTIONS = (*ROUTED, "local_attn.to_qkv", "local_attn.to_out")
HALF = (torch.float16, torch.bfloat16)


def build(implementation: ModuleType, device: torch.device, **options: Any) -> Any:
    torch.manual_seed(1)
    layer = implementation.MixtureOfAttention(**{**LAYER, "dtype": torch.float64, **options}, device=device).eval()
    for name, p in layer.named_parameters():
        if name.endswith(("gamma", "norm.weight", "norm.bias")):  # ones and zeros would hide which is used
            nn.init.normal_(p)
    return layer


# Steps of the solver, each of which the reference puts into a graph by itself.
TRACED = {"n_iters": 2}
IN_GRAPHS = pytest.mark.parametrize(
    "implementation", [pytest.param("reference", marks=pytest.mark.thorough), *KERNELS], indirect=True
)


def tokens(device: torch.device, n: int = N, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(B, n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(device)


def assert_agrees(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def submodules(layer: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in layer.named_modules() if name}


def decided(layer: nn.Module, x: Tensor) -> Any:
    return tuple(type(r)(*(t.detach() for t in r)) for r in layer(x, return_routes=True)[1])


# Hooks and other modules


@BOTH
@KINDS
@pytest.mark.parametrize("how", ["routed", "nothing to choose", "injected", "one expert"])
def test_every_module_is_called_once(
    implementation: ModuleType, device: torch.device, options: dict[str, Any], how: str
) -> None:
    layer = build(implementation, device, **options, **({"num_experts": 1} if how == "one expert" else {}))
    x = tokens(device, KQ if how == "nothing to choose" else N)
    arguments = {"routes": decided(layer, x)} if how == "injected" else {}
    plain = layer(x, **arguments)
    calls: list[str] = []
    for name, module in submodules(layer).items():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(f"before {name}"))
        module.register_forward_hook(lambda *_, name=name: calls.append(f"after {name}"))
    assert_agrees(layer(x, **arguments), plain)
    assert sorted(calls) == sorted(f"{when} {name}" for name in submodules(layer) for when in ("before", "after"))


@BOTH
@KINDS
@pytest.mark.parametrize("how", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"])
def test_global_hooks_see_every_module(
    implementation: ModuleType, device: torch.device, options: dict[str, Any], how: str
) -> None:
    layer, calls = build(implementation, device, **options), []
    handle = getattr(nn.modules.module, f"register_module_{how}")(lambda module, *_: calls.append(module))
    try:
        layer(tokens(device).requires_grad_()).square().sum().backward()
    finally:
        handle.remove()
    assert all(sum(module is called for called in calls) == 1 for module in layer.modules())


@BOTH
@KINDS
def test_hooks_change_the_result(implementation: ModuleType, device: torch.device, options: dict[str, Any]) -> None:
    """Of modules that return a tensor: the output, seen by the next module, is what the hook returned."""
    x = tokens(device)
    for name in submodules(build(implementation, device, **options)):
        if name.endswith("router"):
            continue
        layer = build(implementation, device, **options)
        plain = layer(x)
        handle = layer.get_submodule(name).register_forward_hook(lambda _, inputs, out: 1.5 * out.roll(1, -1))
        assert (layer(x) - plain).abs().max() > 1e-3, name
        handle.remove()
        assert_agrees(layer(x), plain)


@BOTH
@pytest.mark.parametrize("side", [0, 1], ids=["query", "key_value"])
def test_replaced_router_decides(implementation: ModuleType, device: torch.device, side: int) -> None:
    """By a subclass that sees x backwards, and by a module that is no router at all."""
    layer, x = build(implementation, device), tokens(device)
    name = ("query_router", "key_value_router")[side]
    backwards = getattr(layer, name)(x.flip(2), (KQ, KKV)[side])
    routes = list(decided(layer, x))
    routes[side] = backwards

    class Subclass(implementation.Router):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
            return super().forward(x.flip(2), *args, **options)

    class Other(nn.Module):
        def forward(self, x: Tensor, k: int, mask: Any, routing_tokens: Any) -> Any:
            return backwards

    expected = layer(x, routes=routes)
    assert (expected - layer(x)).abs().max() > 1e-3
    own = getattr(layer, name)
    subclass = Subclass(D, E, own.options, device=device, dtype=torch.float64)
    subclass.load_state_dict(own.state_dict())
    for router in (subclass, Other()):
        setattr(layer, name, router)
        assert_agrees(layer(x), expected)


class Adapted(nn.Module):
    """A projection and a low-rank adapter beside it, of matching kind."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        groups = getattr(base, "groups", None)
        rows, columns = base.weight.shape[:2]
        self.down = nn.Parameter(torch.randn(groups or 1, 2, columns, dtype=torch.float64, device=base.weight.device))
        self.up = nn.Parameter(torch.randn(groups or 1, rows // (groups or 1), 2, dtype=torch.float64).to(self.down))
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if self.groups is None:
            return self.base(x) + x @ self.down[0].T @ self.up[0].T
        rows = x.unflatten(1, (self.groups, -1))
        return self.base(x) + (self.up @ (self.down @ rows)).flatten(1, 2)

    def dense(self) -> Tensor:
        return self.base.weight + (self.up @ self.down).flatten(0, 1).view_as(self.base.weight)


class Mixed(nn.Module):
    """A parametrization, which counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.computed += 1
        return 1.5 * weight.roll(1, -1) + 0.25 * weight


def pruned(module: nn.Module) -> None:
    prune.random_unstructured(module, "weight", amount=0.5)


def old_weight_norm(module: nn.Module) -> None:
    weight_norm(module)
    module.weight_g.data.mul_(1.7)


def new_weight_norm(module: nn.Module) -> None:
    parametrizations.weight_norm(module)
    module.parametrizations.weight.original0.data.mul_(1.7)


ATTACHED: dict[str, Callable[[nn.Module], Any]] = {
    "parametrization": lambda module: parametrize.register_parametrization(module, "weight", Mixed()),
    "prune": pruned,
    "weight_norm": old_weight_norm,
    "parametrizations.weight_norm": new_weight_norm,
    "spectral_norm": spectral_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
}


@BOTH
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("how", [*ATTACHED, "adapter"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_attached_to_a_projection(implementation: ModuleType, device: torch.device, name: str, how: str) -> None:
    """The result is that of the equivalent dense weight, in a second training step too."""
    options = LOCAL if name.startswith("local") else {}
    layer, x = build(implementation, device, **options), tokens(device)
    plain, dense = layer(x), copy.deepcopy(layer)
    parent, leaf = name.split(".")
    if how == "adapter":
        module = Adapted(layer.get_submodule(name))
        setattr(layer.get_submodule(parent), leaf, module)
    else:
        module = layer.get_submodule(name)
        ATTACHED[how](module)
    trained = list(module.parameters())
    for step in range(2):
        out = layer(x)
        with torch.no_grad():
            dense.get_parameter(f"{name}.weight").copy_(module.dense() if how == "adapter" else module.weight)
        assert_agrees(out, dense(x))
        assert (out - plain).abs().max() > 1e-3
        gradients = torch.autograd.grad(out.square().sum(), trained)
        assert all(g.any() for g in gradients), f"step {step}"
        with torch.no_grad():
            for p, g in zip(trained, gradients):
                p.sub_(0.05 * g / g.norm())


@BOTH
@pytest.mark.parametrize("name", [name for name in PROJECTIONS if name not in ROUTED])
def test_bias_put_on_a_projection(implementation: ModuleType, device: torch.device, name: str) -> None:
    layer, x = build(implementation, device, **LOCAL), tokens(device)
    plain, module = layer(x), layer.get_submodule(name)
    bias = torch.randn(module.weight.shape[0], dtype=torch.float64, device=device)
    handle = module.register_forward_hook(lambda _, inputs, out: out + bias)
    expected = layer(x)
    handle.remove()
    module.bias = nn.Parameter(bias)
    assert_agrees(layer(x), expected)
    assert (expected - plain).abs().max() > 1e-3


@BOTH
@KINDS
@pytest.mark.parametrize("how", ["register_full_backward_pre_hook", "register_full_backward_hook"])
def test_backward_hooks_see_every_module(
    implementation: ModuleType, device: torch.device, options: dict[str, Any], how: str
) -> None:
    """Of modules that return a tensor, each with a hook of its own."""
    for name in submodules(build(implementation, device, **options)):
        if name.endswith("router"):
            continue
        layer, calls = build(implementation, device, **options), Counter()
        getattr(layer.get_submodule(name), how)(lambda *_, calls=calls: calls.update(["called"]))
        layer(tokens(device).requires_grad_()).square().sum().backward()
        assert calls == {"called": 1}, name
        assert not [path for path, p in layer.named_parameters() if p.grad is None], name


@BOTH
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_norms_round_once(implementation: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """Called as modules, too, they compute in float32."""
    layer, x = build(implementation, device, dtype=dtype), tokens(device, dtype=dtype)
    for norm in (layer.attn.norm, layer.attn.context_norm):
        rows = {}
        norm.register_forward_hook(lambda _, inputs, out, rows=rows: rows.update(before=inputs[0], after=out))
        with torch.no_grad():
            layer(x)
        wide, gamma = rows["before"].double(), norm.gamma.squeeze(-1).double()
        gamma = gamma[:, None, None] if implementation is not reference else gamma[:, None]
        expected = wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * D**0.5 * gamma
        error = (rows["after"].double() - expected).abs()
        assert (error <= torch.finfo(dtype).eps / 2 * 1.01 * expected.abs()).all(), norm


class Doubled(Tensor):
    """A weight of a class of its own, as quantised ones are: a linear layer multiplies by twice of it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function is not nn.functional.linear:
            return super().__torch_function__(function, types, args, kwargs)
        x, weight, *rest = args
        return nn.functional.linear(x, 2 * weight.as_subclass(Tensor), *rest)


@BOTH
@pytest.mark.parametrize("name", [name for name in PROJECTIONS if name not in ROUTED])
def test_weight_of_another_class(implementation: ModuleType, device: torch.device, name: str) -> None:
    layer, x = build(implementation, device, **LOCAL), tokens(device)
    module = layer.get_submodule(name)
    with torch.no_grad():
        module.weight.mul_(2)
        expected = layer(x)
        module.weight = nn.Parameter((module.weight / 2).as_subclass(Doubled))
        assert_agrees(layer(x), expected)


@BOTH
@KINDS
def test_parametrizations_are_computed_once(
    implementation: ModuleType, device: torch.device, options: dict[str, Any]
) -> None:
    """Of every parameter of the layer."""
    x = tokens(device)
    for path, _ in build(implementation, device, **options).named_parameters():
        owner, _, leaf = path.rpartition(".")
        layer = build(implementation, device, **options)
        dense, mixed = copy.deepcopy(layer), Mixed()
        with torch.no_grad():
            dense.get_parameter(path).copy_(Mixed()(dense.get_parameter(path)))
        parametrize.register_parametrization(layer.get_submodule(owner), leaf, mixed, unsafe=True)
        mixed.computed = 0
        out = layer(x)
        assert mixed.computed == 1, path
        assert_agrees(out, dense(x))


OTHER_OPTIONS: list[dict[str, Any]] = [
    {"solver": "exact"},
    {"n_iters": 2},
    {"fetch_k_ratio": 1.5},
    {"eps": 0.7},
    {"eps_init": 0.5},
    {"eps_decay": 0.2, "n_iters": 3},
    {"straight_through": True},
    {"cosine_sim_routing": False},
    {"cosine_sim_scale": 2.0},
    {"route_block_size": 4},
]


@BOTH
@pytest.mark.parametrize("side", [0, 1], ids=["query", "key_value"])
@pytest.mark.parametrize("changed", OTHER_OPTIONS, ids=str)
def test_each_router_has_its_own_options(
    implementation: ModuleType, device: torch.device, side: int, changed: dict[str, Any]
) -> None:
    """Value and gradients are those of routes that `route` makes with the options of each."""
    layer, x = build(implementation, device), tokens(device)
    before = layer(x)
    shared = {name: LAYER[name] for name in ("straight_through", "cosine_sim_routing", "cosine_sim_scale", "eps")}
    options = [shared, shared]
    options[side] = {**shared, **changed}
    routers = layer.query_router, layer.key_value_router
    routers[side].options = implementation.RouterOptions(**options[side])
    held = [router.routing_token for router in routers]
    out = layer(x)
    got = torch.autograd.grad(out.square().sum(), held)
    made = [implementation.route(x, t, k, **o) for t, k, o in zip(held, (KQ, KKV), options)]
    expected = layer(x, routes=made)
    assert_agrees(out, expected)
    assert (out - before).abs().max() > 1e-7
    for a, b in zip(got, torch.autograd.grad(expected.square().sum(), held)):
        assert a.any()
        assert_agrees(a, b)


# Zero gradients


def assert_zeros(layer: nn.Module, gradients: dict[str, Tensor]) -> None:
    """For routing tokens, and for them alone; nothing is missing."""
    assert gradients.keys() == dict(layer.named_parameters()).keys()
    for name, g in gradients.items():
        unused = name == "null_routed_token"  # every token is routed
        assert g.shape[-len(layer.get_parameter(name).shape) :] == layer.get_parameter(name).shape, name
        assert g.isfinite().all()
        assert bool(g.any()) != (name.endswith("routing_token") or unused), name


def gradients(layer: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*layer.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))  # raises for those that are missing


def loss_of(out: Any) -> Tensor:
    return (out[0] if isinstance(out, tuple) else out).square().sum()


@BOTH
@KINDS
@pytest.mark.parametrize("return_routes", [False, True])
@pytest.mark.parametrize("straight_through", [False, True])
def test_undecided_routing_tokens_get_zeros(
    implementation: ModuleType,
    device: torch.device,
    options: dict[str, Any],
    return_routes: bool,
    straight_through: bool,
) -> None:
    """Where N <= K, where every block is taken whole, and with injected routes."""
    layer = build(implementation, device, **options, straight_through=straight_through)
    short, x = tokens(device, KQ), tokens(device)
    keywords: dict[str, Any] = {"return_routes": return_routes}
    assert_zeros(layer, gradients(layer, loss_of(layer(short, **keywords))))
    everywhere = decided(layer, short)
    assert_zeros(layer, gradients(layer, loss_of(layer(short, routes=everywhere, **keywords))))
    blocks = build(implementation, device, **options, straight_through=straight_through, route_block_size=1)
    assert_zeros(blocks, gradients(blocks, loss_of(blocks(x, **keywords))))


@BOTH
def test_undecided_routing_tokens_get_zeros_in_transforms(implementation: ModuleType, device: torch.device) -> None:
    layer = build(implementation, device)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    short = tokens(device, KQ)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    whole = grad(loss)(parameters, short)
    assert_zeros(layer, whole)
    for name, g in gradients(layer, loss_of(layer(short))).items():
        assert_agrees(whole[name], g)
    each = vmap(grad(loss), (None, 0))(parameters, short[:, None])
    assert_zeros(layer, each)
    for name, g in whole.items():
        assert_agrees(each[name].sum(0), g)


@IN_GRAPHS
def test_undecided_routing_tokens_get_zeros_compiled(implementation: ModuleType, device: torch.device) -> None:
    layer = build(implementation, device, **TRACED)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    short = tokens(device, KQ)
    assert_zeros(layer, gradients(layer, loss_of(compiled(short))))
    routes = decided(layer, short)
    assert_zeros(layer, gradients(layer, loss_of(compiled(short, routes=routes))))


@BOTH
def test_frozen_routing_tokens_get_nothing(implementation: ModuleType, device: torch.device) -> None:
    layer = build(implementation, device)
    layer.query_router.routing_token.requires_grad_(False)
    loss_of(layer(tokens(device, KQ))).backward()
    assert layer.query_router.routing_token.grad is None
    assert layer.key_value_router.routing_token.grad is not None


# Random numbers


@pytest.fixture(params=[*HALF, torch.float64], ids=str)
def other_default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@BOTH
@pytest.mark.usefixtures("deterministic")
def test_random_numbers_of_any_default_dtype(
    implementation: ModuleType, device: torch.device, other_default: torch.dtype
) -> None:
    """Neither a random route nor dropout takes the default dtype."""
    x = tokens(device, dtype=torch.float32)
    layer = build(implementation, device, dropout=0.3, dtype=torch.float32).train()
    made = []
    for dtype in (torch.get_default_dtype(), other_default):
        torch.set_default_dtype(dtype)
        torch.manual_seed(3)
        g = torch.Generator(device).manual_seed(4)
        token = layer.query_router.routing_token
        routes = implementation.route(x, token, KQ, random_route=True, generator=g)
        made.append((layer(x).detach(), routes.indices, routes.scores.detach()))
    for a, b in zip(*made):
        check_identical(a, b)


@BOTH
def test_randomness_of_vmap(implementation: ModuleType, device: torch.device) -> None:
    """As torch.nn.Dropout: refused, the same mask for equal items, or another for each."""
    layer = build(implementation, device, dropout=0.5).train()
    x = tokens(device).expand(3, B, N, D)
    with pytest.raises(RuntimeError, match="random"):
        vmap(layer)(x)
    same = vmap(layer, randomness="same")(x)
    assert_agrees(same, same[:1].expand_as(same))
    assert (vmap(layer, randomness="same")(x)[0] - same[0]).abs().max() > 1e-3, "the generator stood still"
    different = vmap(layer, randomness="different")(x)
    assert (different[0] - different[1]).abs().max() > 1e-3

    def each(x: Tensor) -> Tensor:
        """Of a level that the layer's input knows nothing of."""
        return vmap(lambda _: layer(x), randomness="different")(torch.zeros(2, device=device))

    nested = vmap(each, randomness="different")(x).flatten(0, 1)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(nested, 2))


# Other tensors


@BOTH
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_angles_and_scores_of_half_precision(
    implementation: ModuleType, device: torch.device, dtype: torch.dtype
) -> None:
    """Promoted before anything is computed from them."""
    layer, x = build(implementation, device), tokens(device)
    angles = torch.randn(N, LAYER["dim_head"], dtype=dtype, device=device)
    routes = [r._replace(scores=r.scores.to(dtype)) for r in decided(layer, x)]
    wide = [r._replace(scores=r.scores.float()) for r in routes]
    assert_agrees(layer(x, rotary_emb=angles, routes=routes), layer(x, rotary_emb=angles.float(), routes=wide))
    with torch.no_grad():
        layer.to(dtype)
        x, routes = x.to(dtype), [r._replace(scores=r.scores.to(dtype)) for r in wide]
        actual = layer(x, rotary_emb=angles, routes=routes)
        check_identical(actual, layer(x, rotary_emb=angles.float(), routes=wide))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_large_angles_of_float64(implementation: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """Sine and cosine are taken of the angles as they are, whatever the layer's dtype: positions near 1e6."""
    layer, x = build(implementation, device, dtype=dtype), tokens(device, dtype=dtype)
    positions = 1e6 + torch.arange(N, dtype=torch.float64, device=device)
    angles = positions[:, None] / torch.tensor([1.0, 7.0, 1.0, 7.0], dtype=torch.float64, device=device)
    with torch.no_grad():
        small = layer(x, rotary_emb=angles % (2 * torch.pi))
        own, rounded = ((layer(x, rotary_emb=a) - small).abs().mean() for a in (angles, angles.float()))
    assert own < 0.05 * rounded


@IN_GRAPHS
@KINDS
@pytest.mark.parametrize("injected", [False, True])
def test_tensors_without_data(
    implementation: ModuleType, device: torch.device, options: dict[str, Any], injected: bool
) -> None:
    """Fake tensors, tensors on the meta device, and those that make_fx traces: nothing reads them."""
    layer, x = build(implementation, device, **options, **TRACED), tokens(device)
    keywords = {"routes": decided(layer, x)} if injected else {}
    state = {name: t.detach() for name, t in layer.state_dict().items()}
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(t) for name, t in state.items()}
        pairs = [type(r)(*(mode.from_tensor(t) for t in r)) for r in keywords.get("routes", ())]
        made = {"routes": pairs} if injected else {}
        assert functional_call(layer, fake, (mode.from_tensor(x),), made).shape == x.shape
    away = copy.deepcopy(layer).to("meta")
    made = {"routes": [type(r)(*(t.to("meta") for t in r)) for r in keywords["routes"]]} if injected else {}
    with optimized.use_backends(**dict.fromkeys(optimized.backends())):  # a kernel that was asked for can't run there
        assert away(x.to("meta"), **made).is_meta
    call = state, x, keywords
    mode_name = "symbolic" if implementation is optimized or (options and not injected) else "real"  # ten seconds more
    traced = make_fx(lambda state, *given: functional_call(layer, state, *given), tracing_mode=mode_name)(*call)
    assert_agrees(traced(*call), layer(x, **keywords))


class HalfOfTheTokens(nn.Module):
    """K computed from the length, which is symbolic where a graph serves all lengths."""

    def __init__(self, called: Callable[..., Any]) -> None:
        super().__init__()
        self.called = called

    def forward(self, x: Tensor) -> Any:
        k = x.shape[1] // 2
        return self.called(x, num_routed_queries=k, num_routed_key_values=k + 1)


@IN_GRAPHS
def test_slots_computed_from_a_compiled_length(implementation: ModuleType, device: torch.device) -> None:
    half = HalfOfTheTokens(build(implementation, device, **LOCAL, **TRACED))
    compiled = torch.compile(half, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for n in (12, 15):
            assert_agrees(compiled(tokens(device, n)), half(tokens(device, n)))


@pytest.mark.parametrize("strict", [False, True])
def test_checks_of_a_call_leave_its_sizes_free(strict: bool) -> None:
    """One graph, and one exported program, for all batches and lengths."""
    config = contract.Config.of(**{name: v for name, v in LAYER.items() if name != "dtype"})
    names = inspect.signature(reference.MixtureOfAttention.forward).parameters

    def slots(x: Tensor, **keywords: Any) -> Tensor:
        given = {**{name: p.default for name, p in names.items() if name != "self"}, "x": x, **keywords}
        call = contract.check_call(config, {**given, "mask": torch.ones(x.shape[:2], dtype=torch.bool)})
        return x.new_zeros(call.queries.k, call.keys_values.k)

    torch._dynamo.reset()
    half, graphs = HalfOfTheTokens(slots), CompileCounterWithBackend("eager")
    compiled = torch.compile(half, fullgraph=True, dynamic=True, backend=graphs)
    x = tokens(torch.device("cpu"))
    sizes = {"x": {0: torch.export.Dim("b", min=2), 1: torch.export.Dim("n", min=6)}}
    exported = torch.export.export(half, (x,), dynamic_shapes=sizes, strict=strict).module()
    for batch, n in ((2, 8), (3, 15), (5, 40)):  # none is D, which would tie the two
        assert compiled(x.new_zeros(batch, n, D)).shape == (n // 2, n // 2 + 1)
        assert exported(x.new_zeros(batch, n, D)).shape == (n // 2, n // 2 + 1)
    assert graphs.frame_count == 1


@pytest.mark.cpu
@BOTH
def test_distributed_tensors_are_refused(implementation: ModuleType) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    cpu = torch.device("cpu")
    layer, x = build(implementation, cpu), tokens(cpu)
    mask, context = torch.ones(B, N, dtype=torch.bool), tokens(cpu, 7, seed=1)
    routes = decided(layer, x)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def spread(t: Tensor) -> Tensor:
            return distribute_tensor(t, mesh)

        spread_routes = routes[0]._replace(scores=spread(routes[0].scores)), routes[1]
        for argument, given in {
            "x": {"x": spread(x)},
            "mask": {"x": x, "mask": spread(mask)},
            "context": {"x": x, "context": spread(context)},
            "context_mask": {"x": x, "context": x, "context_mask": spread(mask)},
            "routes[0].scores": {"x": x, "routes": spread_routes},
        }.items():
            with pytest.raises(TypeError) as caught:
                layer(**given)
            assert str(caught.value).startswith(f"{argument}: expected an ordinary tensor")
        for name, _ in list(layer.named_parameters()):
            twin = copy.deepcopy(layer)
            owner, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(owner), leaf, nn.Parameter(spread(twin.get_parameter(name).detach())))
            with pytest.raises(TypeError, match="expected an ordinary tensor"):
                twin(x)
    finally:
        dist.destroy_process_group()
