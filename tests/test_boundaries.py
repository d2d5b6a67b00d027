"""Sizes on either side of every block constant that the kernels declare, found by introspection: a constant that is
added brings its own tests, or a reason why not. Our kernels against PyTorch's, in float64, values and gradients.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import draw, generator
from torch import Tensor

import optimized
from optimized import kernels, ops
from optimized.routed_attention import gather, rotate

# --- constants -------------------------------------------------------------------------------------------------------

MODULES = [importlib.import_module(f"optimized.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
NO_SIZE = {"launch.MOST_LAUNCHES"}  # entries of a table
BYTES = {"launch.ROWS_IN_REGISTERS": 8}  # constants that count bytes: of a float64


def constants() -> dict[str, int]:
    """Integers that the kernels' modules, and that of the banded attention, assign to a name in capitals."""
    found = {}
    for module in (*MODULES, importlib.import_module("optimized.local_attention")):
        tree = ast.parse(Path(module.__file__).read_text())
        targets = [t for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign)) for t in _targets(node)]
        for name in (t.id for t in targets if isinstance(t, ast.Name)):
            key = f"{module.__name__.rsplit('.', 1)[1]}.{name}"
            if type(getattr(module, name)) is int and key not in NO_SIZE:
                found[key] = getattr(module, name)
    return found


def _targets(node: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [t for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]


def sizes(names: Iterable[str] | None = None) -> list[int]:
    """Below, at, above, and beyond twice each of them, or each of these."""
    found = constants()
    units = {found[name] // BYTES.get(name, 1) for name in (found if names is None else names)}
    return sorted({size for c in units for size in (c - 1, c, c + 1, 2 * c + 1) if size > 0})


# --- what is run at each size ----------------------------------------------------------------------------------------


def leaf(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return draw(shape, "normal", seed).to(device).requires_grad_()


def by_both(call: Callable[[bool], Tensor], leaves: list[Tensor], terms: int) -> None:
    """Result and gradients by Triton and by PyTorch: sums of so many terms, in another order."""
    found = []
    for triton in (True, False):
        out = call(triton)
        g = draw(tuple(out.shape), "normal", 9).to(out.device)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, g)))
    for i, (actual, expected) in enumerate(zip(*found)):
        assert actual.shape == expected.shape
        assert expected.any()
        # 64: exponents of up to about 16, and the few operations of a term.
        budget = 64 * (terms + 16) * torch.finfo(torch.float64).eps * expected.abs().max().clamp_min(1)
        assert ((actual - expected).abs() <= budget).all(), f"result {i}"


def routing(n: int, k: int, device: torch.device, experts: int = 2) -> optimized.Routes:
    """Of one item; the last slot is masked. The last token is the last expert's alone, where k leaves a choice."""
    few = n - 1 if k < n else n
    rows = [torch.randperm(few, generator=generator(e))[:k].sort().values.roll(-1) for e in range(experts)]
    rows[-1][max(k - 2, 0)] = n - 1
    indices = torch.stack(rows)[None]
    slots = torch.ones(1, experts, k, dtype=torch.bool)
    slots[..., -1] = k == 1
    return optimized.Routes(indices.to(device), slots.to(device), slots.double().to(device), indices.to(device))


def rows(n: int, device: torch.device, n_iters: int = 5) -> None:
    """Selection and both solvers, on rows of n tokens."""
    logits = leaf(device, 1, 2, n)
    mask = (torch.arange(n, device=device) % 7 != 3)[None]
    for k in sorted({1, n // 2 or 1, n}):
        # Few values: the last one taken has equals that are not.
        for actual, expected in zip(
            *(ops.select(logits.detach().round(), mask, k, triton) for triton in (True, False))
        ):
            assert torch.equal(actual, expected)
    mass = 0.4 * n
    by_both(lambda triton: ops.descend(logits, mask, mass, n_iters, 0.3, 4.0, 0.7, triton)[0], [logits], n + n_iters)
    by_both(lambda triton: ops.cap(logits, mask, mass, 0.3, triton)[0], [logits], n)


def steps(count: int, device: torch.device) -> None:
    rows(9, device, count)


def router(n: int, device: torch.device, dim: int = 3, experts: int = 2) -> None:
    x, tokens = leaf(device, 1, n, dim), leaf(device, experts, dim, seed=1)
    # Logits close to one another beside eps: no score of 1, which had no gradient.
    options = {"straight_through": False, "cosine_sim_routing": True, "cosine_sim_scale": 1.0, "eps": 2.0}

    def call(triton: bool) -> Tensor:
        name = ("triton" if device.type == "cuda" else "triton_interpreted") if triton else "torch"
        with optimized.use_backends(routing=name):
            k = max(n // 3, 1)
            return optimized.route(x, tokens, k, **options).scores

    if n > max(n // 3, 1):
        by_both(call, [x, tokens], n + dim + 20)


def channels(dim: int, device: torch.device) -> None:
    if dim <= 300 or device.type == "cuda":  # the router takes channels in small pieces
        router(3, device, dim)
    slots(2, device, dim, 3)


def slots(k: int, device: torch.device, dim: int = 3, n: int | None = None, experts: int = 2) -> None:
    """Gather with the norm, and combination, of k slots among n tokens."""
    n = n or k + 3
    routes = routing(n, k, device, experts)
    inverse = ops.inverse_map(routes.indices, routes.mask, n)
    x, gamma = leaf(device, 1, n, dim), leaf(device, experts, dim, 1, seed=1)
    by_both(lambda triton: gather(x, routes, inverse, gamma, triton), [x, gamma], k + dim + experts)
    y, null = leaf(device, 1, experts, k, dim, seed=2), leaf(device, dim, seed=3)

    def call(triton: bool) -> Tensor:
        name = ("triton" if device.type == "cuda" else "triton_interpreted") if triton else "torch"
        with optimized.use_backends(mixture=name):
            return optimized.combine(y, routes, n, null_routed_token=null, average_routed=True)

    by_both(call, [y, null], n + experts)


def tokens(n: int, device: torch.device) -> None:
    slots(min(n, 2), device, n=n)


def queries(length: int, device: torch.device, heads: int = 2, dim: int = 4, keys: int = 3) -> None:
    """The null slot merged into attention, rotation, value scores."""
    q, k, v = leaf(device, 2, length, heads, dim), *(leaf(device, 2, keys, heads, dim, seed=i) for i in (1, 2))
    null_k, null_v = (leaf(device, 1, heads, dim, seed=i) for i in (3, 4))
    lengths = torch.tensor([keys, 0], dtype=torch.int32, device=device)

    def attend(triton: bool) -> Tensor:
        return ops.attend(q, k, v, null_k, null_v, lengths, 0.0, -1, False, "math", triton)[0]

    by_both(attend, [q, k, v, null_k, null_v], length + dim)
    angles = draw((length, dim), "normal", 5).to(device)
    if dim % 2 == 0:
        by_both(lambda triton: rotate(q, angles.cos(), angles.sin(), None, triton), [q], 2)
    scores = leaf(device, 1, 2, length, seed=6)
    inner = heads * dim
    weights = [leaf(device, *shape, seed=7) for shape in ((2 * inner, 1, 1), (4 * inner, 1, 1), (2, inner, 1))]
    rows_ = [leaf(device, 2, 1, n, 1, seed=8) for n in (2, length)]
    null = leaf(device, 2, 2, heads, 1, dim, seed=9)

    def by_experts(triton: bool) -> Tensor:
        rest = (None,) * 5
        return ops.attend_by_experts(*rows_, scores, *weights, null, *rest, 0.0, False, "math", triton)[0]

    by_both(by_experts, [*rows_, scores, *weights, null], length + inner)


def head_channels(dim: int, device: torch.device) -> None:
    queries(2, device, 1, dim)


def heads(count: int, device: torch.device) -> None:
    queries(2, device, count)


def experts(count: int, device: torch.device) -> None:
    router(7, device, experts=count)
    slots(3, device, experts=count)


# Of each: the largest size for the interpreter, and for a GPU, beyond which nothing is left to cross.
AXES: dict[str, tuple[Callable[[int, torch.device], None], int, int]] = {
    "rows": (rows, 17000, 33000),
    "steps": (steps, 70, 600),
    "router": (router, 1100, 33000),
    "channels": (channels, 4100, 33000),
    "slots": (slots, 130, 8200),
    "tokens": (tokens, 130, 33000),
    "queries": (queries, 70, 8200),
    "head_channels": (head_channels, 4100, 4100),
    "heads": (heads, 20, 600),
    "experts": (experts, 70, 70),
}
CROSSED = {  # constant: the axis along which something of ours changes there
    "combine.CHUNK": "tokens",
    "combine.ROWS": "tokens",
    "coordinate_descent.TOKENS": "rows",
    "coordinate_descent.STEPS": "steps",
    "coordinate_descent.SCALARS": "steps",
    "gather_norm.NORM_TOKENS": "tokens",
    "gather_norm.CHUNK": "slots",
    "gather_norm.MOST_ROWS": "slots",
    "gather_norm.TILE": "channels",
    "launch.CHUNK": "rows",
    "launch.MAX_BLOCK_D": "channels",
    "launch.ROWS_IN_REGISTERS": "rows",
    "null_slot.ROWS": "queries",
    "null_slot.TILE": "head_channels",
    "router_logits.CHUNK_N": "router",
    "token_gradient.EXPERTS": "experts",
    "token_gradient.MOST_CHANNELS": "channels",
    "value_score.SLOTS": "queries",
}
FEW = 20  # sizes up to here are interpreted along every axis
WINDOWS = ("local_attention.MIN_BLOCK", "local_attention.MAX_BLOCK")


def cases(interpreted: bool) -> Iterator[Any]:
    """Axis and size: those for the interpreter, or all others. It takes those of the axis' own constants, and few."""
    for axis, (_, most_interpreted, most) in AXES.items():
        own = sizes(name for name in CROSSED if CROSSED[name] == axis)
        for size in sizes():
            taken = size <= most_interpreted and (size in own or size <= FEW)
            if size <= most and taken == interpreted:
                yield pytest.param("triton", axis, size, id=f"triton-{axis}-{size}")


@pytest.mark.parametrize(("kernels", "axis", "size"), list(cases(interpreted=True)), indirect=["kernels"])
def test_around_every_block(kernels: str, axis: str, size: int, device: torch.device) -> None:
    AXES[axis][0](size, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("kernels", "axis", "size"), list(cases(interpreted=False)), indirect=["kernels"])
def test_around_every_other_block(kernels: str, axis: str, size: int, device: torch.device) -> None:
    AXES[axis][0](size, device)


def window_sizes() -> list[int]:
    units = [constants()[name] for name in WINDOWS]
    return sorted({size for c in units for size in (c - 1, c, c + 1, 2 * c + 1)})


@pytest.mark.parametrize("n", window_sizes())
@pytest.mark.parametrize("window", [1, *window_sizes()])
def test_local_attention_around_its_blocks(n: int, window: int, device: torch.device) -> None:
    """Against attention over all pairs that lie in the window, from the same projections."""
    x, w_qkv, w_out = leaf(device, 1, n, 3), leaf(device, 6, 3, seed=1), leaf(device, 3, 2, seed=2)
    cos, sin = (t[:, None] for t in ops.rotary_tables(n, 2, device, torch.float64))
    q, k, v = (x[0] @ w_qkv.mT).view(n, 3, 2).unbind(1)
    q, k = (t * cos[:, 0] + torch.stack((-t[:, 1], t[:, 0]), -1) * sin[:, 0] for t in (q, k))
    offset = torch.arange(n, device=device) - torch.arange(n, device=device)[:, None]
    logits = (q @ k.mT / 2**0.5).masked_fill(offset.abs() > window, -torch.inf)
    expected = (logits.softmax(-1) @ v @ w_out.mT)[None]
    actual = optimized.local_attention(x, window, w_qkv=w_qkv, w_out=w_out, heads=1)
    g = draw((1, n, 3), "normal", 9).to(device)
    leaves = [x, w_qkv, w_out]
    results = [(out, *torch.autograd.grad(out, leaves, g)) for out in (actual, expected)]
    scale = 64 + logits.detach().nan_to_num(neginf=0.0).abs().max()
    for a, e in zip(*results):
        assert ((a - e).abs() <= scale * (n + 16) * torch.finfo(torch.float64).eps * e.abs().max().clamp_min(1)).all()


# --- nothing is missed -----------------------------------------------------------------------------------------------


def test_every_constant_is_crossed() -> None:
    """Below, at and above, by the interpreter or on a GPU."""
    assert set(constants()) == {*CROSSED, *WINDOWS}, "a new constant: name the axis along which it matters"
    for name, axis in CROSSED.items():
        c = constants()[name] // BYTES.get(name, 1)
        assert {c - 1, c, c + 1} <= {size for size in sizes() if size <= AXES[axis][2]}, name


def test_introspection_sees_what_it_should() -> None:
    found = constants()
    assert found["launch.MAX_BLOCK_D"] == 4096
    assert "rows.CHUNK" not in found, "imported, not declared"
    assert found["local_attention.MIN_BLOCK"] < found["local_attention.MAX_BLOCK"]
