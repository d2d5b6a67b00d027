"""Sizes on either side of every block constant that the kernels declare, found by introspection: a constant that is
added brings its own tests, or a reason why not. Every case of cases.py, in float64, values and gradients.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import Inputs, Sizes, all_on, each, one_by_one
from launches import modules
from strategies import draw

import optimized
from optimized.attention import banded

# --- constants -------------------------------------------------------------------------------------------------------

NO_SIZE = {  # entries of a table, warps, bits; chunks of a row are few only where they are small: test_rows.py
    "launch.MOST_LAUNCHES",
    *("long_selection.WARPS", "long_selection.DIGIT", "long_selection.CHUNKS"),
    *(
        "memory_keys.ALONE",
        "memory_keys.PROGRAMS",
        "memory_keys.SPAN",
        "admitted_rows.PROGRAMS",
    ),  # how many share the blocks: test_memory_attention.py
    "step_attention.MOST_PARTS",  # programs that share the keys of a head
    *("long_descent.WARPS", "long_descent.CHUNKS", "coordinate_descent.PARTS"),
}
BYTES = {"launch.ROWS_IN_REGISTERS": 8, "selection.ALONE": 8}  # constants that count bytes: of a float64


@functools.cache
def constants() -> dict[str, int]:
    """Integers that the kernels' modules, and that of the banded attention, assign to a name in capitals."""
    found = {}
    for module in (*modules().values(), banded):
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


class Axis(NamedTuple):
    """sizes: with its own at a given value. interpreted: these cases, of a family all of which a GPU runs; the largest
    size for the interpreter, and for a GPU, beyond which nothing is left to cross.
    """

    family: str
    interpreted: tuple[str, ...]
    sizes: Callable[[int], Sizes]
    most_interpreted: int
    most: int


# Of long rows, in small blocks: test_rows.py.
ROWS = (
    "selection", "coordinate_descent", "capped_simplex", "sigmoid", "memory", "candidates", "memory_places", "admitted"
)  # fmt: skip
SLOTS = ("gather_norm", "combine")
CHANNELS = (
    *SLOTS,
    "router_logits",
    "router_gradient",
    "token_gradient",
    "layer_norm",
    "blend",
    "partial_sums",
    "admitted_rows",
    "scaled_weight",
    "step_tokens",
)
TOKENS = (*SLOTS, "router_gradient", "layer_norm", "blend", "partial_sums", "admitted_rows", "scaled_weight")
HEADS = (
    "null_slot", "rotary", "value_score", "window", "attention", "keep", "memory_attention", "memory_keys", "finite"
)  # fmt: skip
FEW = Sizes(batch=1, n=5, group=1, steps=5, dim=3, experts=2, ks=(3, 2), heads=2, dim_head=4, length=2)
AXES = {
    "rows": Axis("rows", ROWS, lambda n: FEW._replace(n=n), 17000, 66000),
    "steps": Axis("rows", ("coordinate_descent",), lambda count: FEW._replace(n=9, steps=count), 70, 600),
    "router": Axis("channels", ("router_logits",), lambda n: FEW._replace(n=n), 1100, 33000),
    "channels": Axis("channels", CHANNELS, lambda dim: FEW._replace(n=3, ks=(2, 1), dim=dim), 4100, 33000),
    "slots": Axis("channels", SLOTS, lambda k: FEW._replace(n=k + 3, ks=(k, k + 1)), 130, 8200),
    "tokens": Axis("channels", TOKENS, lambda n: FEW._replace(n=n, ks=(min(n, 2), 1)), 260, 33000),
    "queries": Axis("heads", HEADS, lambda length: FEW._replace(length=length), 70, 8200),
    "head_channels": Axis("heads", HEADS, lambda dim: FEW._replace(heads=1, dim_head=dim), 4100, 4100),
    "heads": Axis("heads", HEADS, lambda count: FEW._replace(heads=count), 20, 600),
    # One slot each, so that some tokens are taken by the last experts alone.
    "experts": Axis("channels", CHANNELS, lambda count: FEW._replace(experts=count, n=30, ks=(1, 1)), 70, 70),
}
CROSSED = {  # constant: the axis along which something of ours changes there
    "admitted.LANES": "rows",
    "blend.CHANNELS": "channels",
    "blend.CHUNK": "tokens",
    "blend.EXPERTS": "experts",
    "blend.ROWS": "tokens",
    "finite.NUMBERS": "head_channels",
    "finite.TOKENS": "queries",
    "finite.HEADS": "heads",
    "combine.CHUNK": "tokens",
    "combine.ROWS": "tokens",
    "coordinate_descent.ALONE": "rows",
    "coordinate_descent.TOKENS": "rows",
    "coordinate_descent.STEPS": "steps",
    "coordinate_descent.SCALARS": "steps",
    "gather_norm.NORM_TOKENS": "tokens",
    "gather_norm.CHUNK": "slots",
    "gather_norm.MOST_ROWS": "slots",
    "gather_norm.TILE": "channels",
    "launch.CHUNK": "rows",
    "layer_norm.CHUNK": "tokens",
    "layer_norm.TILE": "channels",
    "keep.QUERIES": "queries",
    "keep.WORDS": "queries",
    "launch.MAX_BLOCK_D": "channels",
    "memory.KEYS": "rows",
    "memory.GROUP": "rows",
    "memory.LONG": "rows",
    "memory.VERY_LONG": "rows",
    "memory_places.LANES": "rows",
    "launch.ROWS_IN_REGISTERS": "rows",
    "long_descent.BLOCK": "rows",
    "long_selection.BLOCK": "rows",
    "null_slot.ROWS": "queries",
    "null_slot.TILE": "head_channels",
    "partial_sums.COLUMNS": "channels",
    "partial_sums.ROWS": "tokens",
    "partial_sums.FEW": "tokens",
    "partial_sums.WIDER": "channels",
    "partial_sums.MOST": "tokens",
    "partial_sums.SHARE": "tokens",
    "admitted_rows.UNITS": "channels",
    "router_gradient.CHANNELS": "channels",
    "router_gradient.TOKENS": "tokens",
    "router_logits.CHUNK_N": "router",
    "scaled_weight.CHANNELS": "channels",
    "scaled_weight.CHUNK": "tokens",
    "scaled_weight.ROWS": "tokens",
    "selection.ALONE": "rows",
    "sigmoid.BLOCK": "rows",
    "token_gradient.EXPERTS": "experts",
    "token_gradient.MOST_CHANNELS": "channels",
    "value_score.SLOTS": "queries",
}
SMALL = 20  # sizes up to here are interpreted along every axis
ROUTED = 300  # channels: the router takes them in small pieces
WINDOWS = ("banded.MIN_BLOCK", "banded.MAX_BLOCK")


def cases_of(interpreted: bool) -> Iterator[Any]:
    """Axis and size: those for the interpreter, or all others. It takes those of the axis' own constants, and few."""
    for name, axis in AXES.items():
        own = sizes(constant for constant in CROSSED if CROSSED[constant] == name)
        for size in sizes():
            taken = size <= axis.most_interpreted and (size in own or size <= SMALL)
            if size <= axis.most and taken == interpreted:
                yield pytest.param("triton", name, size, id=f"triton-{name}-{size}")


def check(axis: Axis, size: int, device: torch.device) -> None:
    x, here = Inputs(device, torch.float64), axis.sizes(size)
    for name, case, switches in each([axis.family], one_by_one if device.type == "cuda" else all_on):
        if device.type == "cpu":
            if name not in axis.interpreted or (name == "router_logits" and here.dim > ROUTED):
                continue
            switches |= {"local": False} if "local" in switches else {}  # beside which the null token counts nowhere
        assert not case.differences(x, here, **switches), (name, switches)


@pytest.mark.parametrize(("kernels", "axis", "size"), list(cases_of(interpreted=True)), indirect=["kernels"])
def test_around_every_block(kernels: str, axis: str, size: int, device: torch.device) -> None:
    check(AXES[axis], size, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("kernels", "axis", "size"), list(cases_of(interpreted=False)), indirect=["kernels"])
def test_around_every_other_block(kernels: str, axis: str, size: int, device: torch.device) -> None:
    check(AXES[axis], size, device)


def window_sizes() -> list[int]:
    units = [constants()[name] for name in WINDOWS]
    return sorted({size for c in units for size in (c - 1, c, c + 1, 2 * c + 1)})


@pytest.mark.parametrize("n", window_sizes())
@pytest.mark.parametrize("window", [1, *window_sizes()])
def test_local_attention_around_its_blocks(n: int, window: int, device: torch.device) -> None:
    """Against attention over all pairs that lie in the window, from the same projections."""
    shapes = (1, n, 3), (6, 3), (3, 2)
    x, w_qkv, w_out = (draw(shape, "normal", i).to(device).requires_grad_() for i, shape in enumerate(shapes))
    angles = torch.arange(n, device=device)[:, None].double()
    q, k, v = (x[0] @ w_qkv.mT).view(n, 3, 2).unbind(1)
    q, k = (t * angles.cos() + torch.stack((-t[:, 1], t[:, 0]), -1) * angles.sin() for t in (q, k))
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
        assert {c - 1, c, c + 1} <= {size for size in sizes() if size <= AXES[axis].most}, name


def test_introspection_sees_what_it_should() -> None:
    found = constants()
    assert found["launch.MAX_BLOCK_D"] == 4096
    assert "rows.CHUNK" not in found, "imported, not declared"
    assert found["banded.MIN_BLOCK"] < found["banded.MAX_BLOCK"]
