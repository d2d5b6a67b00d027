"""Bad input is refused, before any work, with `argument: expected ..., got value`; legal edge input is taken.

Each table spoils one argument of a legal call. That the unspoilt calls are legal is a test of its own.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from functools import partial
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from harness import check, check_identical
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils._python_dispatch import TorchDispatchMode

import optimized
import reference

BOTH = pytest.mark.parametrize("implementation", [reference, optimized], ids=["reference", "optimized"])
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
B, N, M, D, E, H, d, KQ, KKV = 2, 8, 6, 16, 3, 2, 4, 4, 5
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SOLVERS = ("coordinate_descent", "capped_simplex")
STAGES = ("route", "select", *SOLVERS, "routed_attention", "local_attention", "combine")
LONGEST_MESSAGE = 500  # characters: it is read in a terminal, and holds no tensor's or list's contents
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Bad(NamedTuple):
    """A legal call with `changes`; the error must name `argument` and show `value`."""

    name: str
    changes: dict[str, Any]
    argument: str
    value: str
    layer: Mapping[str, Any] = NOTHING
    on_cpu: bool = False  # refused there alone


def spoil(cases: Iterable[Bad]) -> Any:
    marks = {True: pytest.mark.cpu, False: ()}
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=marks[c.on_cpu]) for c in cases])


class Watch(TorchDispatchMode):
    """Records operations that draw random numbers, or read floating-point data: a check needs neither."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        reads = any(isinstance(t, Tensor) and t.is_floating_point() for t in leaves)
        harmless = func.is_view or "empty" in str(func) or func is torch.ops.aten.detach.default
        harmless |= func.namespace == "prim"  # which asks for a layout
        # The test itself moves tensors to the device under test.
        harmless |= func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") not in (
            None,
            args[0].device,
        )
        if torch.Tag.nondeterministic_seeded in func.tags or (reads and not harmless):
            self.work.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def refused(argument: str, value: str) -> Iterator[None]:
    message = rf"(?s)^{re.escape(argument)}: expected .+, got .*{re.escape(value)}"
    state = torch.get_rng_state()
    with Watch() as watch, pytest.raises((ValueError, TypeError), match=message) as caught:
        yield
    assert watch.work == [], f"work before the refusal: {watch.work}"
    assert torch.equal(torch.get_rng_state(), state)
    assert len(str(caught.value)) <= LONGEST_MESSAGE


def place(value: Any, device: torch.device, implementation: ModuleType) -> Any:
    """Tensors on the device under test (a meta tensor stays, as the wrong device), routes as its own type."""
    if isinstance(value, Tensor):
        return value if value.is_meta or value.is_mkldnn else value.to(device)
    if isinstance(value, reference.Routes):
        return implementation.Routes(*(place(v, device, implementation) for v in value))
    if isinstance(value, dict):
        return {k: place(v, device, implementation) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(place(v, device, implementation) for v in value)
    return value


# Values that no integer, number or flag is


def integers(name: str, extra: dict[str, Any] | None = None, optional: bool = False) -> Iterator[Bad]:
    """Not an integer >= 1. A boolean is no integer; neither is a whole float."""
    strange = Fraction(2), np.timedelta64(2), np.float64(2), 2**63, -(10**400), 10**400
    for value in (0, -1, 2.0, 2.5, True, "2", *strange, *(() if optional else (None,))):
        yield Bad(f"{name}={shown(value)}", {name: value, **(extra or {})}, name, shown(value))


def numbers(name: str, *outside: float) -> Iterator[Bad]:
    strange = Fraction(1, 2), Decimal("0.5"), np.timedelta64(1), np.True_, 1j, 10**400, np.longdouble("1e400")
    for value in (*outside, float("nan"), float("inf"), True, "0.5", None, *strange):
        yield Bad(f"{name}={shown(value)}", {name: value}, name, shown(value))


def shown(value: object) -> str:
    """The beginning, of what fills lines."""
    return repr(value)[:60]


# Of a temperature or a scale: no double, or none that a solver can divide by or multiply.
BEYOND_DOUBLES = (np.longdouble("1e-400"), 5e-324, 1e-310, 1e307, 1.7e308)
BEYOND_FLOATS = (1e-100, 1e-39, 1e37, 1e39, 1e300)  # but float64 takes them


def flags(name: str) -> Iterator[Bad]:
    for value in ("yes", 1, None):
        yield Bad(f"{name}={value!r}", {name: value}, name, repr(value))


def router_options() -> Iterator[Bad]:
    """Of the constructor and of `route` alike."""
    for name in ("straight_through", "cosine_sim_routing"):
        yield from flags(name)
    yield from integers("n_iters")
    yield from integers("route_block_size", optional=True)
    yield from numbers("fetch_k_ratio", 0.99, 0, -1)
    for name in ("eps", "eps_init", "cosine_sim_scale"):
        yield from numbers(name, 0, -0.03, *BEYOND_DOUBLES)
    yield from numbers("eps_decay", 0, -0.5, 1.01, 2)
    for value in ("foo", "Exact", None, True, ["exact"]):
        yield Bad(f"solver={value!r}", {"solver": value}, "solver", repr(value))
    for value in ("foo", "head", "num_routed", "Eps"):
        yield Bad(f"option {value}", {value: 1}, "router_options", repr(value))


# Tensors that are wrong


def tensors(
    name: str,
    like: Tensor,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.int64, torch.bool, torch.complex64),
    other_dtype: bool = True,
    elsewhere: bool = True,
) -> Iterator[Bad]:
    """Wrong type, dtype, rank, layout and device; sizes are each argument's own.

    other_dtype: floating-point dtypes but float32 are wrong too. elsewhere: False for the argument that
    sets the device of the others.
    """
    for value in (like.tolist(), like.numpy(), "x"):
        yield Bad(f"{name} is a {type(value).__name__}", {name: value}, name, "")
    if other_dtype and like.is_floating_point():
        dtypes += (torch.float64, torch.float16, torch.bfloat16)
    for dtype in dtypes:
        yield Bad(f"{name} {dtype}", {name: like.to(dtype)}, name, str(dtype))
    for shape in (like.shape[:-1], (1, *like.shape)):
        yield Bad(f"{name} of rank {len(shape)}", {name: like.new_ones(shape)}, name, str(tuple(shape)))
    for layout, value in layouts(like):
        yield Bad(f"{name} {layout}", {name: value}, name, layout)
    if elsewhere:
        yield Bad(f"{name} elsewhere", {name: like.to("meta")}, name, "meta")


def layouts(like: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same numbers, not dense: what an error shows of each."""
    yield "torch.sparse_coo", like.to_sparse()
    if like.dtype == torch.float32:
        yield "torch._mkldnn", like.to_mkldnn()
    if like.ndim > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that these are prototypes
            rows = list(like)
            csr = like.flatten(1).to_sparse_csr()
            nested = [torch.nested.nested_tensor(rows, layout=kind) for kind in (torch.strided, torch.jagged)]
        yield "torch.sparse_csr", csr
        yield from (("nested", t) for t in nested)


def sizes(name: str, like: Tensor, *dims: int) -> Iterator[Bad]:
    """One too many, and one alone (which must not broadcast), in each of `dims`."""
    for dim in dims:
        for size in (like.shape[dim] + 1, 1):
            shape = (*like.shape[:dim], size, *like.shape[dim + 1 :])
            yield Bad(f"{name} of {shape}", {name: like.new_ones(shape)}, name, str(shape))


def masks(name: str, batch: int, n: int) -> Iterator[Bad]:
    mask = torch.ones(batch, n, dtype=torch.bool)
    yield from tensors(name, mask, dtypes=(torch.float32, torch.float64, torch.complex64))
    yield from sizes(name, mask, 1)
    yield Bad(f"{name} of {batch + 1}", {name: torch.ones(batch + 1, n, dtype=torch.bool)}, name, str((batch + 1, n)))
    yield Bad(f"{name} of no item", {name: mask[:0]}, name, str((0, n)))
    yield Bad(f"{name} of ({batch}, 1, {n})", {name: mask[:, None]}, name, f"({batch}, 1, {n})")
    for dtype in INTEGERS:
        for value in (2, 100, *(() if dtype == torch.uint8 else (-1, -100))):
            counts = mask.to(dtype)
            counts[-1, -1] = value
            shown = f"values from {min(value, 1)} to {max(value, 1)}"
            yield Bad(f"{name} of {dtype} with {value}", {name: counts}, name, shown, on_cpu=True)


def make_routes(n: int, k: int, experts: int = E, batch: int = B) -> reference.Routes:
    indices = torch.arange(k).expand(batch, experts, k).contiguous()
    mask = torch.ones_like(indices, dtype=torch.bool)
    return reference.Routes(indices, mask, torch.ones(indices.shape), torch.zeros(batch, experts, n))


def bad_routes(name: str, good: reference.Routes) -> Iterator[tuple[str, Any, str, str]]:
    """(what is wrong, routes, argument, value)."""
    batch, experts, k = good.indices.shape
    n = good.logits.shape[-1]
    for value in (None, "routes", good.indices, tuple(good)[:3], list(good)):
        yield f"{name} is a {type(value).__name__}", value, name, ""
    yield f"{name} without field names", tuple(good), name, ""
    wrong = {
        "indices": (torch.int32, torch.float32),
        "mask": (torch.float32, torch.int64),
        "scores": (torch.int64, torch.bool, torch.complex64),
    }
    for field, dtypes in wrong.items():
        tensor, argument = getattr(good, field), f"{name}.{field}"
        changed = {dtype: tensor.to(dtype) for dtype in dtypes}
        shapes = [(batch + 1, experts, k), (1, experts, k), (batch, experts + 1, k), (batch, 1, k)]
        shapes += [(batch, k), (1, batch, experts, k)]
        if field != "indices":  # whose last size is free
            shapes += [(batch, experts, k + 1), (batch, experts, 1)]
        for shape in shapes:
            changed[shape] = torch.zeros(shape, dtype=tensor.dtype)
        for value, held in {None: None, "meta": tensor.to("meta"), **changed}.items():
            yield f"{argument} {value}", good._replace(**{field: held}), argument, str(value)
        yield f"{argument} a list", good._replace(**{field: tensor.tolist()}), argument, ""
    for position in (n, -1):
        indices = good.indices.clone()
        indices[-1, -1, 0] = position
        yield f"{name}.indices {position}", good._replace(indices=indices), f"{name}.indices", str(position)
    indices, mask = good.indices.clone(), good.mask.clone()
    indices[-1, -1, 0] = indices[-1, -1, -1]
    mask[-1, -1, 0] = False
    apart = good.indices.clone()
    apart[0, 0, :3] = torch.tensor([1, 0, 1])  # neither side by side nor in order
    for what, found, held in (
        ("", indices, good.mask),
        (", under the mask", indices, mask),
        (", apart", apart, good.mask),
    ):
        changed = good._replace(indices=found, mask=held)
        yield f"{name}.indices repeated{what}", changed, f"{name}.indices", "repeated"


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# The constructor

OPTIONS = (
    "straight_through",
    "n_iters",
    "fetch_k_ratio",
    "eps",
    "eps_init",
    "eps_decay",
    "solver",
    "cosine_sim_routing",
    "cosine_sim_scale",
    "route_block_size",
    "learned_routing_tokens",
)

LAYER: dict[str, Any] = {
    "dim": D,
    "num_routed_queries": KQ,
    "num_routed_key_values": KKV,
    "num_experts": E,
    "heads": H,
    "dim_head": d,
}
LOCAL = {"local_attn": True, "local_attn_window_size": 2}


def constructor_cases() -> Iterator[Bad]:
    for name in LAYER:
        yield from integers(name)
    yield from integers("dim_context", optional=True)
    yield from integers("local_attn_window_size", {"local_attn": True})
    for value in (0, 2, -1, "2"):
        changes = {"local_attn_window_size": value}
        yield Bad(f"window {value!r} without local_attn", changes, "local_attn_window_size", str(value))
    yield Bad("local_attn without a window", {"local_attn": True}, "local_attn_window_size", "None")
    yield Bad("local_attn with odd dim_head", {**LOCAL, "dim_head": 5}, "dim_head", "5")
    yield Bad("local_attn with dim_context", {**LOCAL, "dim_context": D + 1}, "dim_context", str(D + 1))
    for name in ("local_attn", "use_triton", "flash_attn", "prenorm", "average_routed", OPTIONS[-1]):
        yield from flags(name)
    yield from numbers("dropout", -0.1, 1.0, 1)
    for value in (torch.int64, torch.complex64, torch.float8_e4m3fn, "float32", float, np.float32):
        yield Bad(f"dtype={value!r}", {"dtype": value}, "dtype", str(value))
    yield from router_options()


@BOTH
@spoil(constructor_cases())
def test_constructor(implementation: ModuleType, device: torch.device, case: Bad) -> None:
    arguments = {**LAYER, **case.changes}
    with refused(case.argument, case.value):
        implementation.MixtureOfAttention(**arguments, device=device)


@BOTH
def test_unknown_option_lists_the_valid_ones(implementation: ModuleType, device: torch.device) -> None:
    with pytest.raises(TypeError) as caught:
        implementation.MixtureOfAttention(**LAYER, device=device, foo=1)
    assert [name for name in ("'foo'", *OPTIONS) if name not in str(caught.value)] == []
    with pytest.raises(TypeError) as caught:
        implementation.route(**place(ROUTE, device, implementation), foo=1)
    assert [name for name in ("'foo'", *OPTIONS[:-1]) if name not in str(caught.value)] == []
    assert OPTIONS[-1] not in str(caught.value)


# The layer's forward

X, CONTEXT = random(B, N, D), random(B, M, D)
MASK, CONTEXT_MASK = torch.ones(B, N, dtype=torch.bool), torch.ones(B, M, dtype=torch.bool)
ANGLES, TOKENS = random(N, d), random(E, D)
LEARNED = {"learned_routing_tokens": True}
BOTH_TOKENS = {"query_routing_tokens": TOKENS, "key_value_routing_tokens": TOKENS}


def forward_cases() -> Iterator[Bad]:
    yield from tensors("x", X)
    yield from sizes("x", X, 2)
    yield Bad("x is None", {"x": None}, "x", "None")
    yield Bad("x float8", {"x": X.to(torch.float8_e4m3fn)}, "x", "torch.float8_e4m3fn")
    yield from tensors("context", CONTEXT)
    yield from sizes("context", CONTEXT, 0, 2)
    yield Bad("context missing", {}, "context", "None", {"dim_context": D + 2})
    yield Bad("context of dim", {"context": CONTEXT}, "context", str((B, M, D)), {"dim_context": D + 2})
    for mask in (MASK, MASK.long(), MASK[:1], MASK[:1].byte()):
        for options in ({}, LOCAL):
            given, name = {"context": mask}, f"a mask of {mask.dtype} {tuple(mask.shape)} as context {options}"
            yield Bad(name, given, "context", str(tuple(mask.shape)), options)
    yield Bad("context with local attention", {"context": CONTEXT}, "context", str((B, M, D)), LOCAL)
    yield from masks("mask", B, N)
    for case in masks("context_mask", B, M):
        yield case._replace(changes={**case.changes, "context": CONTEXT})
    yield Bad("context_mask of N", {"context": CONTEXT, "context_mask": MASK}, "context_mask", str((B, N)))
    yield Bad("context_mask without context", {"context_mask": MASK}, "context_mask", str((B, N)))
    for name in ("num_routed_queries", "num_routed_key_values"):
        yield from integers(name, optional=True)
    yield from flags("return_routes")
    yield from rotary_cases()
    yield from token_cases()
    yield from route_cases()


def rotary_cases() -> Iterator[Bad]:
    yield from tensors("rotary_emb", ANGLES, other_dtype=False)
    yield from sizes("rotary_emb", ANGLES, 1)
    for rows in (N - 1, 1, 0):
        yield Bad(f"rotary_emb of {rows} rows", {"rotary_emb": random(rows, d)}, "rotary_emb", str((rows, d)))
    trained = {"rotary_emb": ANGLES.clone().requires_grad_()}
    yield Bad("rotary_emb requires grad", trained, "rotary_emb", "requires_grad=True")
    both = {"rotary_emb": ANGLES, "context": CONTEXT}
    yield Bad("rotary_emb with a context", both, "rotary_emb", str((N, d)))
    yield Bad("rotary_emb with a context of N", {**both, "context": X.clone()}, "rotary_emb", str((N, d)))
    yield Bad("rotary_emb with odd dim_head", {"rotary_emb": random(N, 5)}, "dim_head", "5", {"dim_head": 5})


def token_cases() -> Iterator[Bad]:
    for name in BOTH_TOKENS:
        yield Bad(f"{name} not expected", {name: TOKENS}, name, str((E, D)))
        missing = {other: TOKENS for other in BOTH_TOKENS if other != name}
        yield Bad(f"{name} missing", missing, name, "None", LEARNED)
        for case in (
            *tensors(name, TOKENS),
            *sizes(name, TOKENS, 0, 1),
            *sizes(name, TOKENS.repeat(B, 1, 1), 0, 1, 2),
        ):
            if not case.name.endswith("of rank 3"):  # the batched form
                yield case._replace(changes={**BOTH_TOKENS, **case.changes}, layer=LEARNED)
        routed = {name: TOKENS, "routes": (make_routes(N, KQ), make_routes(N, KKV))}
        yield Bad(f"{name} beside routes", routed, name, str((E, D)), LEARNED)
    name, layer = "key_value_routing_tokens", {"dim_context": D + 2, **LEARNED}
    yield Bad(f"{name} of dim", {**BOTH_TOKENS, "context": random(B, M, D + 2)}, name, str((E, D)), layer)


def route_cases() -> Iterator[Bad]:
    q, kv, cross = make_routes(N, KQ), make_routes(N, KKV), make_routes(M, KKV)
    for value in (q, (q, kv, kv), (q,), {0: q, 1: kv}, "qk", True):
        yield Bad(f"routes is {type(value).__name__}", {"routes": value}, "routes", "")
    for name, value, argument, shown in bad_routes("routes[0]", q):
        yield Bad(name, {"routes": (value, kv)}, argument, shown)
    for name, value, argument, shown in bad_routes("routes[1]", cross):
        yield Bad(name, {"routes": (q, value), "context": CONTEXT}, argument, shown)


@BOTH
@spoil(forward_cases())
def test_forward(implementation: ModuleType, device: torch.device, case: Bad) -> None:
    layer = implementation.MixtureOfAttention(**{**LAYER, **case.layer}, device=device)
    arguments = place({"x": X, **case.changes}, device, implementation)
    seen = {**dict(layer.named_parameters()), **{k: v for k, v in arguments.items() if isinstance(v, Tensor)}}
    versions = {name: t._version for name, t in seen.items()}
    with refused(case.argument, case.value):
        layer(**arguments)
    assert {name: t._version for name, t in seen.items()} == versions
    assert all(p.grad is None for p in layer.parameters())


@BOTH
@pytest.mark.usefixtures("deterministic")
def test_refusal_leaves_no_trace(implementation: ModuleType, device: torch.device) -> None:
    layer = implementation.MixtureOfAttention(**LAYER, device=device).eval()
    x = X.to(device)
    before, held = layer(x), {name: t.clone() for name, t in layer.state_dict().items()}
    state = torch.get_rng_state()
    for bad in ({"x": x[0]}, {"x": x, "num_routed_queries": 0}, {"x": x, "mask": x}, {"x": x, "routes": ()}):
        with pytest.raises((ValueError, TypeError), match="expected"):
            layer(**bad)
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, t in layer.state_dict().items() if not torch.equal(t, held[name])] == []
    check_identical(layer(x).detach(), before.detach())


# The parameters of a layer, for which both packages have one rule

PARAMETERS = [
    *dict.fromkeys(
        name
        for options in ({}, LOCAL)
        for name, _ in reference.MixtureOfAttention(**LAYER, **options, device="meta").named_parameters()
    )
]
# Those that are converted, whatever their dtype.
CONVERTED = [name for name in PARAMETERS if re.search(r"null|norm", name)]
BOUND = [name for name in PARAMETERS if name not in CONVERTED]
MODULES = sorted({name.rpartition(".")[0] for name in PARAMETERS if "." in name})


def with_parameter(
    implementation: ModuleType, device: torch.device, name: str, changed: Callable[[Tensor], Tensor]
) -> tuple[Any, Any]:
    """A layer, and a copy of it one parameter of which is changed."""
    options = {} if name == "null_routed_token" else LOCAL
    torch.manual_seed(3)
    layer = implementation.MixtureOfAttention(**LAYER, **options, device=device).eval()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    twin = copy.deepcopy(layer)
    owner, _, leaf = name.rpartition(".")
    value = changed(layer.get_parameter(name).detach())
    setattr(twin.get_submodule(owner), leaf, torch.nn.Parameter(value))
    return layer, twin


def test_every_parameter_is_of_one_kind() -> None:
    """Adding one asks for a decision."""
    tokens = ["query_router.routing_token", "key_value_router.routing_token"]
    projections = ["attn.to_q", "attn.to_kv", "attn.to_out", "local_attn.to_qkv", "local_attn.to_out"]
    assert sorted(BOUND) == sorted([*tokens, *(f"{name}.weight" for name in projections)])


@BOTH
@pytest.mark.parametrize("name", BOUND)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_parameter_of_another_dtype(
    implementation: ModuleType, device: torch.device, name: str, dtype: torch.dtype
) -> None:
    _, layer = with_parameter(implementation, device, name, lambda p: p.to(dtype))
    x = X.to(device)
    with refused(name, str(dtype)):
        layer(x)


@BOTH
@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.usefixtures("deterministic")
def test_parameter_that_is_converted(implementation: ModuleType, device: torch.device, name: str) -> None:
    """In float64 it holds the same numbers, so the result is the same."""
    plain, layer = with_parameter(implementation, device, name, Tensor.double)
    x = X.to(device)
    check_identical(layer(x).detach(), plain(x).detach())
    out = layer(x, mask=torch.zeros_like(MASK, device=device)) if "null_routed" in name else layer(x)
    out.square().sum().backward()
    assert layer.get_parameter(name).grad.dtype == torch.float64


@BOTH
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_elsewhere(implementation: ModuleType, device: torch.device, name: str) -> None:
    _, layer = with_parameter(implementation, device, name, lambda p: p.to("meta"))
    x = X.to(device)
    with refused(name, "meta"):
        layer(x)


@BOTH
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_of_another_layout(implementation: ModuleType, device: torch.device, name: str) -> None:
    _, layer = with_parameter(implementation, device, name, Tensor.to_sparse)
    x = X.to(device)
    with refused(name, "torch.sparse_coo"):
        layer(x)


@BOTH
@pytest.mark.parametrize("held", [torch.float64, torch.float16], ids=str)
def test_x_is_blamed_where_the_parameters_agree(
    implementation: ModuleType, device: torch.device, held: torch.dtype
) -> None:
    """Those that are converted, too, may be of x's dtype then."""
    layer = implementation.MixtureOfAttention(**LAYER, **LOCAL, device=device, dtype=held)
    x = X.to(device)
    for name in (name for name in CONVERTED if name != "null_routed_token"):
        owner, _, leaf = name.rpartition(".")
        with refused("x", str(torch.float32)):
            layer(x)
        setattr(layer.get_submodule(owner), leaf, torch.nn.Parameter(layer.get_parameter(name).detach().float()))


@BOTH
@pytest.mark.parametrize("path", [*MODULES, "attn", "local_attn"])
def test_replaced_module_of_another_dtype(implementation: ModuleType, device: torch.device, path: str) -> None:
    """Of the same class, and of the public class of a convolution or a linear layer."""
    layer = implementation.MixtureOfAttention(**LAYER, **LOCAL, device=device)
    own = layer.get_submodule(path)
    replaced = [copy.deepcopy(own)]
    if isinstance(own, torch.nn.Conv1d):
        replaced += [torch.nn.Conv1d(own.in_channels, own.out_channels, 1, groups=own.groups, device=device)]
    x = X.to(device)
    for module in replaced:
        layer.set_submodule(path, module.double())
        bound = [name for name in BOUND if name.startswith(f"{path}.")]
        if not bound:
            assert layer(x).dtype == x.dtype
            continue
        with refused(bound[0], "torch.float64"):
            layer(x)


@BOTH
@pytest.mark.parametrize("path", MODULES)
@pytest.mark.parametrize("how", ["pre-hook", "wrapper", "subclass", "forward"])
def test_module_that_casts_is_left_alone(implementation: ModuleType, device: torch.device, path: str, how: str) -> None:
    """Its parameters are float64, in a layer of float32: it converts what it is given and what it gives."""
    layer = implementation.MixtureOfAttention(**LAYER, **LOCAL, device=device).eval()
    x = X.to(device)
    exact, expected = copy.deepcopy(layer).double()(x.double()), layer(x)
    own = layer.get_submodule(path)
    convert = partial(torch.utils._pytree.tree_map_only, Tensor)
    wide = partial(convert, lambda t: t.double() if t.is_floating_point() else t)
    narrow = partial(convert, lambda t: t.float() if t.is_floating_point() else t)
    own.double()
    called = type(own).forward

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        return narrow(called(self, *wide(given), **wide(named)))

    if how == "pre-hook":
        own.register_forward_pre_hook(lambda _, given: wide(given))
        own.register_forward_hook(lambda *given: narrow(given[-1]))
    elif how == "subclass":
        own.__class__ = type("Casting", (type(own),), {"forward": forward})
    elif how == "forward":
        own.forward = forward.__get__(own)
    else:
        outer = torch.nn.Module()
        outer.own = own
        outer.forward = lambda *given, **named: narrow(own(*wide(given), **wide(named)))
        layer.set_submodule(path, outer)
    check(layer(x).detach(), exact.detach(), expected.detach(), stage="mixture")


# The stages as functions

SIDE = d * H
ROUTE: dict[str, Any] = {"x": X, "tokens": TOKENS, "k": 3}
SELECT: dict[str, Any] = {"logits": random(B, E, N), "k": 3}
SOLVE: dict[str, Any] = {"logits": random(B, E, N), "k": 3.5}
ATTEND: dict[str, Any] = {
    "x": X,
    "context": CONTEXT,
    "q_routes": make_routes(N, KQ),
    "kv_routes": make_routes(M, KKV),
    "w_q": random(E, SIDE, D),
    "w_kv": random(E, 2 * SIDE, D),
    "w_out": random(E, D, SIDE),
    "null_kv": random(2, E, H, d),
    "gamma": random(E, D),
    "context_gamma": random(E, D),
}
LOCAL_ATTEND: dict[str, Any] = {
    "x": X,
    "window_size": 2,
    "w_qkv": random(3 * SIDE, D),
    "w_out": random(D, SIDE),
    "heads": H,
    "norm_weight": random(D),
    "norm_bias": random(D),
}
COMBINE: dict[str, Any] = {"y": random(B, E, KQ, D), "q_routes": make_routes(N, KQ), "n": N}


def call(implementation: ModuleType, device: torch.device, stage: str, arguments: dict[str, Any]) -> Any:
    return getattr(implementation, stage)(**place(arguments, device, implementation))


@BOTH
def test_unspoilt_calls_are_legal(implementation: ModuleType, device: torch.device) -> None:
    assert call(implementation, device, "route", ROUTE).indices.shape == (B, E, 3)
    assert call(implementation, device, "select", SELECT)[0].shape == (B, E, 3)
    assert call(implementation, device, "coordinate_descent", SOLVE).shape == (B, E, N)
    assert call(implementation, device, "capped_simplex", SOLVE).shape == (B, E, N)
    assert call(implementation, device, "routed_attention", ATTEND).shape == (B, E, KQ, D)
    assert call(implementation, device, "local_attention", LOCAL_ATTEND).shape == (B, N, D)
    assert call(implementation, device, "combine", COMBINE).shape == (B, N, D)
    plain = {"x": X, "mask": MASK, "rotary_emb": ANGLES, "return_routes": False}
    forwards: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, plain),
        (LOCAL, plain),
        ({}, {"x": X, "context": CONTEXT, "context_mask": CONTEXT_MASK}),
        ({"dim_context": D + 2}, {"x": X, "context": random(B, M, D + 2)}),
        (LEARNED, {"x": X, **BOTH_TOKENS}),
        (LEARNED, {"x": X, **{name: t.repeat(B, 1, 1) for name, t in BOTH_TOKENS.items()}}),
        (LEARNED, {"x": X, "routes": (make_routes(N, KQ), make_routes(N, KKV))}),
        ({}, {"x": X, "context": CONTEXT, "routes": [make_routes(N, KQ), make_routes(M, KKV)]}),
    ]
    for options, arguments in forwards:
        layer = implementation.MixtureOfAttention(**LAYER, **options, device=device)
        assert layer(**place(arguments, device, implementation)).shape == X.shape


def stage_cases(base: dict[str, Any], cases: Iterable[Bad]) -> Any:
    return spoil(case._replace(changes={**base, **case.changes}) for case in cases)


def route_function_cases() -> Iterator[Bad]:
    yield from tensors("x", X, other_dtype=False, elsewhere=False)
    yield from tensors("tokens", TOKENS)
    yield from sizes("tokens", TOKENS, 1)
    yield from sizes("tokens", TOKENS.repeat(B, 1, 1), 0, 2)
    yield Bad("no expert", {"tokens": TOKENS[:0]}, "tokens", str((0, D)))
    yield from integers("k")
    yield from masks("mask", B, N)
    yield from flags("random_route")
    yield from generator_cases()
    for value in (True, False):
        given = {"learned_routing_tokens": value}
        yield Bad(f"learned_routing_tokens={value}", given, "router_options", "learned_routing_tokens")
    yield from {case.argument: case for case in router_options()}.values()


def generator_cases() -> Iterator[Bad]:
    yield Bad("generator without random_route", {"generator": torch.Generator()}, "generator", "Generator")
    for value in (0, "seed", np.random.default_rng(0), True):
        given = {"generator": value, "random_route": True}
        yield Bad(f"generator is a {type(value).__name__}", given, "generator", repr(value))


@BOTH
@stage_cases(ROUTE, (c for c in route_function_cases() if c.name != "tokens of rank 3"))
def test_route(implementation: ModuleType, device: torch.device, case: Bad) -> None:
    with refused(case.argument, case.value):
        call(implementation, device, "route", case.changes)


def select_cases() -> Iterator[Bad]:
    yield from tensors("logits", SELECT["logits"], other_dtype=False, elsewhere=False)
    yield from integers("k")
    yield Bad("k > N", {"k": N + 1}, "k", str(N + 1))
    yield from masks("mask", B, N)


@BOTH
@stage_cases(SELECT, select_cases())
def test_select(implementation: ModuleType, device: torch.device, case: Bad) -> None:
    with refused(case.argument, case.value):
        call(implementation, device, "select", case.changes)


def solver_cases() -> Iterator[Bad]:
    yield from tensors("logits", SOLVE["logits"], other_dtype=False, elsewhere=False)
    yield from numbers("k", 0, -1, 1e-39, 1e-200, 2**63, 1e19, 1e30)
    yield from masks("mask", B, N)
    yield from numbers("eps", 0, -0.03, *BEYOND_DOUBLES, *BEYOND_FLOATS)


def descent_cases() -> Iterator[Bad]:
    yield from integers("n_iters")
    yield from numbers("eps_init", 0, -4.0, *BEYOND_DOUBLES, *BEYOND_FLOATS)
    yield from numbers("eps_decay", 0, -0.5, 1.01)


@BOTH
@pytest.mark.parametrize("solver", SOLVERS)
@stage_cases(SOLVE, solver_cases())
def test_solvers(implementation: ModuleType, device: torch.device, solver: str, case: Bad) -> None:
    with refused(case.argument, case.value):
        call(implementation, device, solver, case.changes)


@BOTH
@stage_cases(SOLVE, descent_cases())
def test_coordinate_descent(implementation: ModuleType, device: torch.device, case: Bad) -> None:
    with refused(case.argument, case.value):
        call(implementation, device, "coordinate_descent", case.changes)


def attention_cases() -> Iterator[Bad]:
    yield from tensors("x", X, other_dtype=False, elsewhere=False)
    yield from tensors("context", CONTEXT)
    yield from sizes("context", CONTEXT, 0)
    for name, dims in (("w_q", (0, 1, 2)), ("w_kv", (0, 1, 2)), ("w_out", (0, 1, 2))):
        yield from tensors(name, ATTEND[name])
        yield from sizes(name, ATTEND[name], *dims)
        yield Bad(f"{name} is None", {name: None}, name, "None")
    for name in ("gamma", "context_gamma"):
        yield from tensors(name, ATTEND[name], other_dtype=False)
        yield from sizes(name, ATTEND[name], 0, 1)
    yield from tensors("null_kv", ATTEND["null_kv"], other_dtype=False)
    yield from sizes("null_kv", ATTEND["null_kv"], 0)
    for shape in ((2, 0, H, d), (2, E, 0, d), (2, E, H, 0)):
        yield Bad(f"null_kv of {shape}", {"null_kv": torch.ones(shape)}, "null_kv", str(shape))
    yield from numbers("dropout", -0.1, 1.0, 1)
    for name in ("q_routes", "kv_routes"):
        for what, value, argument, shown in bad_routes(name, ATTEND[name]):
            yield Bad(what, {name: value}, argument, shown)
    for case in rotary_cases():
        if not case.layer and "context" not in case.changes:
            yield case._replace(changes={"context": X.clone(), **case.changes})
    yield Bad("rotary_emb with a context of M", {"rotary_emb": ANGLES}, "rotary_emb", "")


@BOTH
@stage_cases(ATTEND, attention_cases())
def test_routed_attention(implementation: ModuleType, device: torch.device, case: Bad) -> None:
    with refused(case.argument, case.value):
        call(implementation, device, "routed_attention", case.changes)


def dropout_mask_cases() -> Iterator[Bad]:
    mask = torch.ones(B, E, H, KQ, 1 + KKV, dtype=torch.bool)
    yield from tensors("dropout_mask", mask, dtypes=(torch.float32,))
    yield from sizes("dropout_mask", mask, 0, 1, 2, 3, 4)


@stage_cases({**ATTEND, "dropout": 0.5}, dropout_mask_cases())
def test_dropout_mask_of_the_reference(device: torch.device, case: Bad) -> None:
    with refused(case.argument, case.value):
        call(reference, device, "routed_attention", case.changes)


@BOTH
def test_routed_attention_refuses_odd_dim_head_with_rotary_emb(
    implementation: ModuleType, device: torch.device
) -> None:
    odd = {
        "context": X.clone(),
        "w_q": random(E, 3 * H, D),
        "w_kv": random(E, 6 * H, D),
        "w_out": random(E, D, 3 * H),
        "null_kv": random(2, E, H, 3),
        "rotary_emb": random(N, 3),
    }
    with refused("dim_head", "3"):
        call(implementation, device, "routed_attention", {**ATTEND, **odd})


def local_attention_cases() -> Iterator[Bad]:
    yield from tensors("x", X, other_dtype=False, elsewhere=False)
    yield from integers("window_size")
    yield from masks("mask", B, N)
    yield from flags("causal")
    yield from integers("heads")
    for name in ("w_qkv", "w_out"):
        yield from tensors(name, LOCAL_ATTEND[name])
        yield Bad(f"{name} is None", {name: None}, name, "None")
    yield from sizes("w_qkv", LOCAL_ATTEND["w_qkv"], 0, 1)
    yield from sizes("w_out", LOCAL_ATTEND["w_out"], 0)
    odd = {"w_out": random(D, 3 * H), "w_qkv": random(9 * H, D)}
    yield Bad("odd dim_head", odd, "w_out", str(3 * H))
    yield Bad("heads do not divide", {"heads": 3}, "w_out", str(SIDE))
    empty = {"w_out": torch.ones(D, 0), "w_qkv": torch.ones(0, D)}
    yield Bad("dim_head 0", empty, "w_out", "0")
    for name in ("norm_weight", "norm_bias"):
        yield from tensors(name, LOCAL_ATTEND[name], other_dtype=False)
        yield from sizes(name, LOCAL_ATTEND[name], 0)
    yield Bad("norm_bias without norm_weight", {"norm_weight": None}, "norm_bias", str((D,)))


@BOTH
@stage_cases(LOCAL_ATTEND, local_attention_cases())
def test_local_attention(implementation: ModuleType, device: torch.device, case: Bad) -> None:
    with refused(case.argument, case.value):
        call(implementation, device, "local_attention", case.changes)


def combine_cases() -> Iterator[Bad]:
    yield from tensors("y", COMBINE["y"], other_dtype=False, elsewhere=False)
    yield from sizes("y", COMBINE["y"], 2)
    for value in (-1, 8.0, 2.5, True, "8", None):
        yield Bad(f"n={value!r}", {"n": value}, "n", repr(value))
    yield Bad("n below an index", {"n": KQ - 1}, "q_routes.indices", str(KQ - 1))
    for what, value, argument, shown in bad_routes("q_routes", COMBINE["q_routes"]):
        yield Bad(what, {"q_routes": value}, argument, shown)
    local, null = random(B, N, D), random(D)
    yield from tensors("local", local, other_dtype=False)
    yield from sizes("local", local, 0, 1, 2)
    yield from tensors("null_routed_token", null, other_dtype=False)
    yield from sizes("null_routed_token", null, 0)
    yield from flags("average_routed")
    yield from masks("mask", B, N)


@BOTH
@stage_cases(COMBINE, combine_cases())
def test_combine(implementation: ModuleType, device: torch.device, case: Bad) -> None:
    with refused(case.argument, case.value):
        call(implementation, device, "combine", case.changes)


# Router, the module


def router_cases() -> Iterator[Bad]:
    yield from tensors("x", X)
    yield from sizes("x", X, 2)
    yield from integers("k")
    yield from masks("mask", B, N)
    yield from flags("random_route")
    yield from generator_cases()
    yield Bad("routing_tokens not expected", {"routing_tokens": TOKENS}, "routing_tokens", str((E, D)))
    yield Bad("routing_tokens missing", {}, "routing_tokens", "None", LEARNED)
    yield Bad("routing_tokens, x a list", {"routing_tokens": TOKENS, "x": X.tolist()}, "x", "", LEARNED)
    wrong = (*tensors("routing_tokens", TOKENS), *sizes("routing_tokens", TOKENS, 0, 1))
    for case in (*wrong, *sizes("routing_tokens", TOKENS.repeat(B, 1, 1), 0, 1, 2)):
        if not case.name.endswith("of rank 3"):
            yield case._replace(layer=LEARNED)


@BOTH
@stage_cases({"x": X, "k": 3}, router_cases())
def test_router(implementation: ModuleType, device: torch.device, case: Bad) -> None:
    router = implementation.Router(D, E, implementation.RouterOptions(**case.layer), device=device)
    arguments = place(case.changes, device, implementation)
    with refused(case.argument, case.value):
        router(**arguments)


@BOTH
@spoil([*integers("dim"), *integers("num_experts"), *flags("options")])
def test_router_constructor(implementation: ModuleType, device: torch.device, case: Bad) -> None:
    arguments = {"dim": D, "num_experts": E, "options": implementation.RouterOptions(), **case.changes}
    with refused(case.argument, case.value):
        implementation.Router(**arguments, device=device)


@pytest.mark.gpu
@BOTH
def test_generator_of_another_device(implementation: ModuleType, device: torch.device) -> None:
    given = {**ROUTE, "random_route": True, "generator": torch.Generator("cpu")}
    with refused("generator", "cpu"):
        call(implementation, device, "route", given)


# A kernel asked for explicitly that can't run


def test_unknown_backends_are_refused() -> None:
    choices: dict[str, tuple[dict[str, Any], str]] = {
        "routing": ({"routing": "foo"}, "'foo'"),
        "routed_attention": ({"routed_attention": "torch"}, "'torch'"),
        "local_attention": ({"local_attention": 3}, "3"),
        "stage": ({"rooting": "torch"}, "'rooting'"),
    }
    for choose in (optimized.use_backends, optimized.set_default_backends):
        for argument, (stages, value) in choices.items():
            with refused(argument, value):
                choose(**stages)
        with refused("mixture", "'foo'"):  # and the legal half of it is not kept
            choose(routed_attention="math", mixture="foo")
    report = optimized.explain(optimized.MixtureOfAttention(**LAYER).eval(), X)
    assert report.stages["routed_attention"].backend != "math"


@pytest.mark.parametrize(
    ("stage", "name"), [("routed_attention", "torch_flash"), ("local_attention", "banded_torch_cudnn")]
)
def test_backend_that_cannot_serve_is_refused(device: torch.device, stage: str, name: str) -> None:
    """Neither has dropout on the CPU, masks on CUDA, nor float32 there; nothing else takes its place."""
    layer = optimized.MixtureOfAttention(**LAYER, **LOCAL, device=device)
    x, mask = X.to(device), MASK.to(device)
    with refused(stage, f"'{name}'"), optimized.use_backends(**{stage: name}):
        layer(x, mask=mask)
    assert layer(x, mask=mask).shape == x.shape


# Legal input


def test_a_mask_as_context_is_guessed(device: torch.device) -> None:
    """Whatever looks like one; a context that is wrong otherwise is not taken for it."""
    for implementation in (reference, optimized):
        layer = implementation.MixtureOfAttention(**LAYER, device=device)
        for context in (MASK, MASK.int(), MASK[:1]):
            with pytest.raises(TypeError, match=r"did you mean mask=\?"):
                layer(X.to(device), context.to(device))
        for context in (MASK.float(), CONTEXT_MASK, X.bool(), X[0]):
            with pytest.raises((TypeError, ValueError), match=r"^context: expected ((?!did you mean).)*$"):
                layer(X.to(device), context.to(device))


HIDDEN = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 1, 1, 1]])  # (B, N)
MASKED: dict[str, dict[str, Any]] = (
    {"route": ROUTE, "select": SELECT, "local_attention": LOCAL_ATTEND}
    | dict.fromkeys(SOLVERS, SOLVE)
    | {"combine": COMBINE}
)


def leaves(result: Any) -> list[Tensor]:
    return [t.detach() for t in torch.utils._pytree.tree_leaves(result) if t is not None]


def assert_equal_results(actual: Any, expected: Any) -> None:
    for a, e in zip(leaves(actual), leaves(expected), strict=True):
        check_identical(a, e)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS], ids=str)
@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.usefixtures("deterministic")
def test_masks_of_integers_and_of_one_row(
    implementation: ModuleType, device: torch.device, dtype: torch.dtype, rows: int
) -> None:
    """Give what the bool mask (B, N) does: in the layer, in a router, and in every stage."""
    given = HIDDEN[:rows].to(device, dtype)
    full = HIDDEN[:rows].bool().expand(B, N).contiguous().to(device)
    x = X.to(device)
    for options in ({}, LOCAL, {"num_experts": 1, "average_routed": True}):
        layer = implementation.MixtureOfAttention(**{**LAYER, **options}, device=device).eval()
        results = [layer(x, mask=mask, return_routes=True) for mask in (given, full)]
        assert_equal_results(*results)
        assert not torch.equal(results[0][0], layer(x))
    crossed = implementation.MixtureOfAttention(**LAYER, device=device).eval()
    context = random(B, N, D).to(device)
    assert_equal_results(*(crossed(x, context, context_mask=mask, return_routes=True) for mask in (given, full)))
    assert_equal_results(*(crossed.query_router(x, 3, mask) for mask in (given, full)))
    for stage, base in MASKED.items():
        made = [call(implementation, device, stage, {**base, "mask": mask}) for mask in (given, full)]
        assert_equal_results(*made)


@BOTH
@pytest.mark.usefixtures("deterministic")
def test_values_of_a_mask_are_not_read_in_tracing(implementation: ModuleType, device: torch.device) -> None:
    """There whatever is not 0 is valid, as on a device for which the host would wait."""
    layer = implementation.MixtureOfAttention(**LAYER, n_iters=2, device=device).eval()
    x, ones = X.to(device), HIDDEN.to(device)
    expected = layer(x, mask=ones).detach()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for mask in (ones, ones * 2, ones * -8):
        check_identical(compiled(x, mask=mask).detach(), expected)
    assert layer.to("meta")(x.to("meta"), mask=(ones * 3).to("meta")).is_meta


@BOTH
@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_values_of_a_mask_are_not_waited_for(implementation: ModuleType, device: torch.device) -> None:
    layer = implementation.MixtureOfAttention(**LAYER, device=device).eval()
    x, ones = X.to(device), HIDDEN.to(device)
    plain = layer(x, mask=ones)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = reference.contract.token_mask("mask", ones * 3, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(made, ones.bool())
    check_identical(layer(x, mask=ones * 3).detach(), plain.detach())


@BOTH
@pytest.mark.parametrize("rows", [N + 1, 3 * N])
@pytest.mark.usefixtures("deterministic")
def test_longer_rotary_tables(implementation: ModuleType, device: torch.device, rows: int) -> None:
    """The first N rows are used; the others may hold anything."""
    layer = implementation.MixtureOfAttention(**LAYER, device=device).eval()
    x, angles = X.to(device), ANGLES.to(device)
    table = torch.cat((angles, torch.full((rows - N, d), torch.nan, device=device)))
    expected = layer(x, rotary_emb=angles)
    check_identical(layer(x, rotary_emb=table).detach(), expected.detach())
    assert not torch.equal(expected, layer(x))
    context = {"context": X.clone(), "kv_routes": make_routes(N, KKV)}
    made = [
        call(implementation, device, "routed_attention", {**ATTEND, **context, "rotary_emb": t})
        for t in (table, angles)
    ]
    assert_equal_results(*made)


@BOTH
@pytest.mark.usefixtures("deterministic")
def test_dropout_is_live(implementation: ModuleType, device: torch.device) -> None:
    """On the layer and on the module that drops, which may be wrapped; what holds is what was assigned last."""
    layer = implementation.MixtureOfAttention(**LAYER, dropout=0.7, device=device).train()
    x = X.to(device)

    def drops(module: Any = layer) -> bool:
        """A wrapped module is called as one, which may sum in another order than its kernels without it."""
        trained, expected = module.train()(x), module.eval()(x)
        module.train()
        return not torch.equal(trained, expected)

    assert drops()
    assert (layer.dropout, layer.attn.dropout) == (0.7, 0.7)
    layer.dropout = 0
    assert not drops()
    assert layer.attn.dropout == 0
    assert "dropout=0" in layer.extra_repr()
    layer.attn.dropout = 0.6
    assert drops()
    assert layer.dropout == 0.6
    twin = copy.deepcopy(layer)
    twin.dropout = 0.0
    assert drops()
    assert not drops(twin)
    layer.attn = CheckpointWrapper(layer.attn)
    assert layer.dropout == 0.6
    layer.dropout = 0.0
    assert not drops()


@BOTH
@pytest.mark.usefixtures("deterministic")
def test_dropout_is_by_the_mode_of_the_module_that_drops(implementation: ModuleType, device: torch.device) -> None:
    """Whatever the mode of the layer around it, as with modules of PyTorch."""
    layer, x = implementation.MixtureOfAttention(**LAYER, dropout=0.7, device=device), X.to(device)
    expected = layer.eval()(x)
    layer.train().attn.eval()
    check_identical(layer(x), expected)
    layer.eval().attn.train()
    torch.manual_seed(5)
    dropped = layer(x)
    torch.manual_seed(5)
    check_identical(layer.train()(x), dropped)
    assert not torch.equal(dropped, expected)


@BOTH
@spoil(numbers("dropout", -0.1, 1.0, 1))
def test_dropout_is_checked_when_assigned(implementation: ModuleType, device: torch.device, case: Bad) -> None:
    layer = implementation.MixtureOfAttention(**LAYER, dropout=0.3, device=device)
    for module in (layer, layer.attn):
        with refused("dropout", case.value):
            module.dropout = case.changes["dropout"]
    assert layer.dropout == layer.attn.dropout == 0.3


@BOTH
def test_dropout_of_a_foreign_attention_is_its_own(implementation: ModuleType, device: torch.device) -> None:
    layer = implementation.MixtureOfAttention(**LAYER, device=device)
    layer.attn = torch.nn.Identity()
    with refused("attn", "Identity"):
        layer.dropout = 0.5


@pytest.mark.parametrize(
    "name",
    [
        "dim",
        "dim_context",
        "num_experts",
        "num_routed_queries",
        "num_routed_key_values",
        "heads",
        "dim_head",
        "average_routed",
    ],
)
def test_what_has_no_effect_cannot_be_assigned(device: torch.device, name: str) -> None:
    for implementation in (reference, optimized):
        layer = implementation.MixtureOfAttention(**LAYER, device=device)
        assert getattr(layer, name) == getattr(layer.config, name)
        with pytest.raises(AttributeError):
            setattr(layer, name, 1)


def test_explain_sees_the_dropout_of_now(device: torch.device) -> None:
    layer = optimized.MixtureOfAttention(**LAYER, dropout=0.0, device=device).train()
    kinds = []
    for value in (0.0, 0.5):
        layer.dropout = value
        kinds.append(layer.kind_of_call(X.to(device))[0].dropout)
    assert kinds == [0.0, 0.5]


class Legal(NamedTuple):
    name: str
    shape: tuple[int, int]  # B, N
    layer: Mapping[str, Any] = NOTHING
    m: int | None = None  # tokens of a context
    forward: Mapping[str, Any] = NOTHING


EDGES = [
    Legal("B = 0", (0, 8)),
    Legal("N = 0", (2, 0)),
    Legal("B = N = 0", (0, 0)),
    Legal("N = 1", (2, 1)),
    Legal("N = K", (2, KQ)),
    Legal("N = K + 1", (2, KQ + 1)),
    Legal("K > N", (2, 3), NOTHING, None, {"num_routed_queries": 100, "num_routed_key_values": 100}),
    Legal("K = 1", (2, 8), NOTHING, None, {"num_routed_queries": 1, "num_routed_key_values": 1}),
    Legal("M = 0", (2, 8), NOTHING, 0),
    Legal("M = 1", (2, 8), NOTHING, 1),
    Legal("M > N", (2, 8), NOTHING, 13),
    Legal("M = N = 0", (2, 0), NOTHING, 0),
    Legal("N = 0 of a context", (2, 0), NOTHING, 6),
    Legal("B = 0 with a context", (0, 8), NOTHING, 6),
    Legal("Dc != D", (2, 8), {"dim_context": 12}, 6),
    Legal("E = H = 1", (2, 8), {"num_experts": 1, "heads": 1}),
    Legal("d = 1", (2, 8), {"dim_head": 1}),
    Legal("D = 1", (2, 8), {"dim": 1}),
    Legal("odd d", (2, 8), {"dim_head": 3}),
    Legal("window > N", (2, 8), {"local_attn": True, "local_attn_window_size": 100}),
    Legal("window = N", (2, 8), {"local_attn": True, "local_attn_window_size": 8}),
    Legal("window 1, N prime", (2, 7), {"local_attn": True, "local_attn_window_size": 1}),
    Legal("local, N = 0", (2, 0), LOCAL),
    Legal("local, B = 0", (0, 8), LOCAL),
    Legal("local, N = 1", (2, 1), LOCAL),
    Legal("local, dim_context = dim", (2, 8), {**LOCAL, "dim_context": D}),
    Legal("N = 0 with rotary_emb", (2, 0), NOTHING, None, {"rotary_emb": torch.zeros(0, d)}),
    Legal("rotary_emb float64", (2, 8), NOTHING, None, {"rotary_emb": ANGLES.double()}),
    Legal("one valid token", (2, 8), NOTHING, None, {"mask": torch.arange(8).eq(5).expand(2, 8)}),
    Legal("no valid token", (2, 8), LOCAL, None, {"mask": torch.zeros(2, 8, dtype=torch.bool)}),
    Legal("no valid context", (2, 8), NOTHING, 6, {"context_mask": torch.zeros(2, 6, dtype=torch.bool)}),
    Legal("empty mask", (2, 0), NOTHING, None, {"mask": torch.zeros(2, 0, dtype=torch.bool)}),
    Legal("no prenorm", (2, 8), {**LOCAL, "prenorm": False}),
    Legal("dropout 0", (2, 8), {"dropout": 0}),
    Legal("dropout 0.99", (2, 8), {"dropout": 0.99}),
    Legal("n_iters 1", (2, 8), {"n_iters": 1}),
    Legal("fetch_k_ratio 1", (2, 8), {"fetch_k_ratio": 1}),
    Legal("fetch_k_ratio 1000", (2, 8), {"fetch_k_ratio": 1000.0}),
    Legal("eps_decay 1", (2, 8), {"eps_decay": 1}),
    Legal("eps > eps_init", (2, 8), {"eps": 5, "eps_init": 1}),
    Legal("exact", (2, 8), {"solver": "exact"}),
    Legal("exact, B = 0", (0, 8), {"solver": "exact"}),
    Legal("block 1", (2, 8), {"route_block_size": 1}),
    Legal("block 3 of 8", (2, 8), {"route_block_size": 3}),
    Legal("block > N", (2, 8), {"route_block_size": 100}),
    Legal("block, B = 0", (0, 8), {"route_block_size": 3}),
    Legal("block, N = 0", (2, 0), {"route_block_size": 3}),
    Legal("no kernels", (2, 8), {**LOCAL, "use_triton": False, "flash_attn": False}),
]


@BOTH
@pytest.mark.parametrize("case", EDGES, ids=lambda case: case.name)
def test_edges_are_legal(implementation: ModuleType, device: torch.device, case: Legal) -> None:
    layer = implementation.MixtureOfAttention(**{**LAYER, **case.layer}, device=device)
    batch, n = case.shape
    x = random(batch, n, layer.dim).to(device).requires_grad_()
    arguments = place(dict(case.forward), device, implementation)
    if case.m is not None:
        arguments["context"] = random(batch, case.m, layer.dim_context).to(device)
    out = layer(x, **arguments)
    assert out.shape == (batch, n, layer.dim)
    assert out.dtype == x.dtype
    assert out.device == x.device
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert bool(torch.isfinite(out).all())


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, LOCAL], ids=["", "local"])
def test_dtypes_are_legal(
    implementation: ModuleType, device: torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    layer = implementation.MixtureOfAttention(**LAYER, **options, device=device, dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    out, routes = layer(X.to(device, dtype), return_routes=True)
    assert out.dtype == dtype
    assert {r.scores.dtype for r in routes} == {torch.promote_types(dtype, torch.float32)}


AUTOCAST = [(a, b) for a in DTYPES[1:] for b in DTYPES[1:]] + [(torch.float64, torch.float64)]


@BOTH
@pytest.mark.parametrize(("held", "given"), AUTOCAST, ids=str)
@pytest.mark.parametrize("options", [{}, LOCAL], ids=["", "local"])
def test_autocast_is_legal(
    implementation: ModuleType,
    device: torch.device,
    held: torch.dtype,
    given: torch.dtype,
    options: dict[str, Any],
) -> None:
    """x's dtype may differ from that of the parameters there, and is the result's."""
    layer = implementation.MixtureOfAttention(**LAYER, **options, device=device, dtype=held)
    with torch.autocast(device.type, torch.bfloat16):
        out = layer(X.to(device, given))
    assert out.dtype == given
    assert bool(torch.isfinite(out).all())


@BOTH
@pytest.mark.parametrize(("held", "given"), [DTYPES[:2], DTYPES[1::-1]], ids=str)
def test_autocast_with_float64(
    implementation: ModuleType, device: torch.device, held: torch.dtype, given: torch.dtype
) -> None:
    """Autocast leaves float64 alone, so that the dtypes must agree as they must outside."""
    layer = implementation.MixtureOfAttention(**LAYER, device=device, dtype=held)
    x = X.to(device, given)
    with torch.autocast(device.type, torch.bfloat16), refused("x", str(given)):
        layer(x)


@BOTH
def test_autocast_takes_another_context_dtype(implementation: ModuleType, device: torch.device) -> None:
    layer = implementation.MixtureOfAttention(**LAYER, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out = layer(X.to(device), CONTEXT.to(device, torch.bfloat16))
    assert out.dtype == torch.float32


def strided(x: Tensor, how: str) -> Tensor:
    """Equal to x, laid out otherwise."""
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x.flip(1).flip(1) if how == "copied" else x[:1].expand_as(x)


@BOTH
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded", "copied"])
@pytest.mark.parametrize("options", [{}, LOCAL], ids=["", "local"])
def test_strides_are_legal(
    implementation: ModuleType,
    device: torch.device,
    how: str,
    options: dict[str, Any],
) -> None:
    layer = implementation.MixtureOfAttention(**LAYER, **options, device=device, dtype=torch.float64).eval()
    x = X.to(device, torch.float64)
    mask = torch.arange(N, device=device).ne(3).expand(B, N)
    x, mask = strided(x, how), strided(mask, how)
    rotary_emb = strided(ANGLES.to(device).expand(B, N, d), how)[0]
    out = layer(x, mask=mask, rotary_emb=rotary_emb)
    plain = layer(x.contiguous(), mask=mask.contiguous(), rotary_emb=rotary_emb.contiguous())
    assert out.shape == x.shape
    assert (out - plain).abs().max().item() <= 1e-12


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numbers_of_options_are_pythons(integer: type) -> None:
    """A NumPy integer that reached a Triton kernel could not be specialised there."""
    options = optimized.RouterOptions(n_iters=integer(3), route_block_size=integer(4), eps=np.float32(0.5))
    assert (options.n_iters, options.route_block_size, options.eps) == (3, 4, 0.5)
    assert [type(v) for v in (options.n_iters, options.route_block_size, options.eps)] == [int, int, float]


@BOTH
@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
@pytest.mark.usefixtures("deterministic")  # the reference adds by atomics on a GPU
def test_numpy_integers_are_legal(implementation: ModuleType, device: torch.device, integer: type) -> None:
    numbers = {"n_iters": 3, "route_block_size": 4, **LOCAL, "local_attn": True}
    plain = {**LAYER, **numbers, "device": device}
    twin = {k: integer(v) if type(v) is int else v for k, v in plain.items()}
    layers = [implementation.MixtureOfAttention(**arguments).eval() for arguments in (plain, twin)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = X.to(device)
    outs = [layer(x, num_routed_queries=k) for layer, k in zip(layers, (5, integer(5)))]
    check_identical(*outs)
    assert repr(layers[0].attn) == repr(layers[1].attn)
    stages = {"route": ROUTE, "select": SELECT, "local_attention": LOCAL_ATTEND, "combine": COMBINE}
    for stage, base in stages.items():
        numpy = {k: integer(v) if type(v) is int else v for k, v in base.items()}
        got, expected = (call(implementation, device, stage, arguments) for arguments in (numpy, base))
        for a, b in zip(*([t] if isinstance(t, Tensor) else t for t in (got, expected))):
            check_identical(a, b)


@BOTH
@pytest.mark.parametrize("real", [np.float64, np.float32, int])
def test_any_real_number_is_legal(implementation: ModuleType, device: torch.device, real: type) -> None:
    options = {"fetch_k_ratio": real(2), "eps": real(1), "eps_init": real(4), "eps_decay": real(1)}
    for solver in ("iterative", "exact"):
        arguments = {**LAYER, **options, "dropout": real(0), "cosine_sim_scale": real(2), "solver": solver}
        layer = implementation.MixtureOfAttention(**arguments, cosine_sim_routing=True, device=device)
        assert layer(X.to(device)).shape == X.shape
    given = {**SOLVE, "k": real(3), "eps": real(1)}
    assert call(implementation, device, "coordinate_descent", given).shape == (B, E, N)
    assert call(implementation, device, "capped_simplex", given).shape == (B, E, N)


@BOTH
@pytest.mark.parametrize("value", BEYOND_FLOATS)
@pytest.mark.parametrize("name", ["eps", "eps_init", "cosine_sim_scale"])
@pytest.mark.parametrize("solver", ["iterative", "exact"])
def test_numbers_that_only_float64_holds(
    implementation: ModuleType, device: torch.device, solver: str, name: str, value: float
) -> None:
    """Refused at the call, wherever scores are made in float32; taken in float64, without a NaN."""
    options = {name: value, "solver": solver, "cosine_sim_routing": True}
    layer = implementation.MixtureOfAttention(**LAYER, **options, device=device).eval()
    x = X.to(device)
    _, routes = implementation.MixtureOfAttention(**LAYER, device=device).eval()(x, return_routes=True)
    with refused(name, repr(value)):
        layer(x)
    with refused(name, repr(value)):
        layer.query_router(x, 3)
    with refused(name, repr(value)):
        call(implementation, device, "route", {**ROUTE, **options})
    assert layer(x, routes=routes).isfinite().all()  # nothing is solved
    _, made = layer.double()(x.double(), return_routes=True)
    assert all(r.scores.isfinite().all() for r in made)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_numbers_at_the_edges_of_a_dtype(
    implementation: ModuleType, device: torch.device, solver: str, dtype: torch.dtype
) -> None:
    """The smallest and largest that are taken give scores and gradients that are finite, and scores in [0, 1]."""
    info = torch.finfo(dtype)
    edges = ("eps", info.tiny), ("eps", info.max / 64), ("k", info.tiny), ("k", 2.0**62)
    edges += (("eps_init", info.tiny), ("eps_init", info.max / 64)) if solver == "coordinate_descent" else ()
    for name, value in edges:
        logits = SOLVE["logits"].to(device, dtype).detach().requires_grad_()
        scores = call(implementation, device, solver, {**SOLVE, "logits": logits, name: value})
        scores.square().sum().backward()
        assert scores.isfinite().all(), (name, value)
        assert ((scores >= 0) & (scores <= 1)).all(), (name, value)
        assert not logits.grad.isnan().any(), (name, value)


@BOTH
@pytest.mark.usefixtures("deterministic")  # the reference adds by atomics on a GPU
def test_routes_of_either_package_are_legal(implementation: ModuleType, device: torch.device) -> None:
    layer = implementation.MixtureOfAttention(**LAYER, device=device).eval()
    x, mask = X.to(device), MASK.to(device)
    outs = []
    for package in (reference, optimized):
        pair = place((make_routes(N, 2), make_routes(N, 7)), device, package)
        outs.append(layer(x, mask=mask, routes=pair))
    check_identical(*outs)


@BOTH
@pytest.mark.parametrize("options", [{}, LOCAL, LEARNED, {"prenorm": False}], ids=str)
def test_meta_device(implementation: ModuleType, device: torch.device, options: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    layer = implementation.MixtureOfAttention(**LAYER, **options, device="meta")
    assert torch.equal(torch.get_rng_state(), state)
    plain = implementation.MixtureOfAttention(**LAYER, **options, device=device)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (layer, plain)]
    assert shapes[0] == shapes[1]

    layer = layer.to_empty(device=device)
    for p in layer.parameters():
        torch.nn.init.constant_(p, float("nan"))
    layer.reset_parameters()
    assert [name for name, p in layer.named_parameters() if not torch.isfinite(p).all()] == []


@BOTH
def test_extra_repr_has_the_main_numbers(implementation: ModuleType) -> None:
    arguments = {
        "num_routed_queries": 101,
        "num_routed_key_values": 103,
        "num_experts": 7,
        "heads": 3,
        "dim_head": 22,
    }
    layer = implementation.MixtureOfAttention(
        dim=37, **arguments, local_attn=True, local_attn_window_size=109, average_routed=True, device="meta"
    )
    text = layer.extra_repr()
    for name, value in {"dim": 37, **arguments, "average_routed": True}.items():
        assert re.search(rf"\b{name}={value}\b", text), f"{name} is missing: {text}"
    assert text in repr(layer)
    assert "109" in repr(layer)


def test_both_take_the_same_arguments() -> None:
    """The reference has two besides, by which tests inject decisions; a layer hands its plan to routers."""
    for path in ("MixtureOfAttention", "MixtureOfAttention.forward", "Router.forward", *STAGES):
        parameters = []
        for implementation in (reference, optimized):
            found: Any = implementation
            for part in path.split("."):
                found = getattr(found, part)
            signature = inspect.signature(found).parameters.values()
            own = ("dropout_mask", "saturated", "plan")
            parameters.append([(p.name, p.kind, p.default) for p in signature if p.name not in own])
        assert parameters[0] == parameters[1], path
