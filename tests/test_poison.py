"""What nothing may read: uninitialised memory, memory around a tensor, masked tokens and slots, masked lanes; and the
layouts in which every argument may come.

Each is filled with NaN, or with a huge number, and nothing may change, bit for bit. What is known of the layer alone is
in test_mixture.py and test_backends.py, of attention over lengths in test_attention.py.
"""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import harness
import pytest
import samples
import torch
from harness import DEVICE, EVERY_KERNEL, check_identical, counted, interpreted
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stages import LAYERS, STAGES, Stage, cotangent_of, stage
from strategies import LAYOUTS, lay_out
from torch import Tensor
from zones import ZONE, huge, new_memory_in_zones, zoned

import optimized
from optimized import kernels as package
from optimized.ops.operator import OPERATORS

EVERY_STAGE = pytest.mark.parametrize("name", list(STAGES))
KERNEL_FILES = sorted(Path(package.__file__).parent.glob("*.py"))

# --- memory ----------------------------------------------------------------------------------------------------------


def check_runs(actual: tuple[Tensor, dict[str, Any]], expected: tuple[Tensor, dict[str, Any]]) -> None:
    check_identical(actual[0], expected[0], "out")
    assert actual[1].keys() == expected[1].keys()
    for leaf, gradient in expected[1].items():
        check_identical(actual[1][leaf], gradient, leaf)


def everything(made: Stage, tensors: dict[str, Tensor], g: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
    return made.run(optimized, tensors, made.leaves, g)


@EVERY_STAGE
@EVERY_KERNEL
@pytest.mark.usefixtures("deterministic")
def test_uninitialised_memory(kernels: str, name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled with NaN by PyTorch, then with huge numbers between zones, which are found untouched."""
    made = stage(name, torch.float32, device)
    plain = everything(made, made.tensors)
    assert plain[0].isfinite().all()
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, device=device).isnan().all()
    check_runs(everything(made, made.tensors), plain)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with new_memory_in_zones(monkeypatch) as memory:
        run = everything(made, made.tensors)
    check_runs(run, plain)
    assert all(untouched() for untouched in memory)
    assert memory or kernels == "torch"


def test_a_write_into_a_zone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with new_memory_in_zones(monkeypatch) as memory:
        t = torch.empty(2, 3)
    assert t.eq(huge(t.dtype)).all()
    assert memory[0]()
    t.as_strided((1,), (1,), ZONE + 6).zero_()
    assert not memory[0]()


@EVERY_STAGE
@EVERY_KERNEL
def test_red_zones_around_inputs(kernels: str, name: str, device: torch.device) -> None:
    """NaN (of integers: numbers beyond any index) before and after every argument."""
    made = stage(name, torch.float64, device)
    plain = everything(made, made.tensors)
    tensors, zones = {}, []
    for key, t in made.tensors.items():
        inside, untouched = zoned(t, math.nan if t.is_floating_point() else huge(t.dtype))
        inside.copy_(t)
        tensors[key] = inside
        zones.append(untouched)
    check_runs(everything(made, tensors), plain)
    assert all(untouched() for untouched in zones)
    for key, t in made.tensors.items():
        assert torch.equal(tensors[key], t), key


# --- what is masked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in STAGES if stage(name, torch.float64, DEVICE).unread])
@EVERY_KERNEL
def test_what_is_masked_may_hold_anything(kernels: str, name: str, device: torch.device) -> None:
    """Masked tokens of x and of a context, masked slots; and the cotangent of what they get."""
    made = stage(name, torch.float64, device)
    g = cotangent_of(made.call(optimized, made.tensors))
    plain = everything(made, made.tensors, g)
    for filler in (math.nan,) if interpreted() else (math.nan, math.inf, 1e30):
        dirty = {
            key: t.masked_fill(made.unread[key], filler) if key in made.unread else t for key, t in made.tensors.items()
        }
        out, gradients = everything(made, dirty, g if made.hidden is None else g.masked_fill(made.hidden, filler))
        check_runs((out, gradients), plain)
        for key, unread in made.unread.items():
            assert not gradients[key][unread].any(), f"{key}: a gradient of what is masked"


# --- masked lanes ----------------------------------------------------------------------------------------------------


def loads_of(source: str) -> list[ast.Call]:
    """Calls of tl.load."""
    return [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (node.func.attr, ast.unparse(node.func.value)) == ("load", "tl")
    ]


def leaves_lanes_undefined(load: ast.Call) -> bool:
    named = {keyword.arg for keyword in load.keywords}
    return len(load.args) != 1 or None in named or ("mask" in named) != ("other" in named)


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.stem)
def test_every_masked_load_says_what_masked_lanes_hold(path: Path) -> None:
    source = path.read_text()
    found = [ast.unparse(load) for load in loads_of(source) if leaves_lanes_undefined(load)]
    assert not found, f"{path.name}: mask= without other="
    aliases = [line for line in source.splitlines() if "import" in line and " load" in line and "triton" in line]
    assert not aliases, "tl.load by another name would not be found"


def test_the_scan_sees_what_it_should() -> None:
    assert sum(len(loads_of(path.read_text())) for path in KERNEL_FILES) > 50
    for text, wrong in (
        ("tl.load(p)", False),
        ("tl.load(p, mask=m, other=0)", False),
        ("tl.load(p, mask=m)", True),
        ("tl.load(p, m, 0)", True),
        ("tl.load(p, **rest)", True),
    ):
        (load,) = loads_of(text)
        assert leaves_lanes_undefined(load) == wrong, text


@pytest.mark.cpu
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@EVERY_STAGE
def test_masked_lanes_hold_nothing(
    kernels: str, name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter gives 0 for a masked lane without `other`; here NaN, or the largest integer."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    made = stage(name, torch.float64, device)
    plain = everything(made, made.tensors)
    load, masked = InterpreterBuilder.create_masked_load, [0]

    def poisoned(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        masked[0] += 1
        if other is None:
            dtype = _get_np_dtype(ptrs.get_element_ty())
            value = math.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max
            other = TensorHandle(np.full_like(ptrs.data, value, dtype=dtype), ptrs.get_element_ty())
        return load(self, ptrs, mask, other, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", poisoned)
    check_runs(everything(made, made.tensors), plain)
    assert masked[0]


# --- layouts ---------------------------------------------------------------------------------------------------------


def laid_out(t: Tensor, layout: str) -> Tensor:
    """`lay_out`; a tensor of one dimension can't be transposed, and an integer's surroundings hold no NaN.

    reversed: the last dimension is stored first.
    """
    if layout == "reversed":
        turned = tuple(range(t.ndim))[::-1]
        return t.permute(turned).contiguous().permute(turned)
    if layout == "transposed" and t.ndim < 2:
        layout = "sliced"
    if not t.is_floating_point():
        return _integers(t, layout)
    return lay_out(t, layout)


def _integers(t: Tensor, layout: str) -> Tensor:
    if layout in ("contiguous", "transposed", "expanded"):
        return lay_out(t, layout)
    step = 2 if layout == "sliced" else 1
    buffer = torch.full((step * t.numel() + 3,), huge(t.dtype), dtype=t.dtype, device=t.device)
    view = buffer[1 : 1 + step * t.numel() : step].view(t.shape)
    return view.copy_(t)


MOST = max(len(make(torch.float32).tensors) for make in STAGES.values())  # tensors of one
OURS = ("route", "coordinate_descent", "capped_simplex", "combine", "combine_local")  # where Triton computes all of it


@EVERY_STAGE
@EVERY_KERNEL
@example(layouts=["transposed"] * (MOST + 1))
@given(layouts=st.lists(st.sampled_from(LAYOUTS), min_size=MOST + 1, max_size=MOST + 1))
@counted
def test_stages_take_every_layout(kernels: str, name: str, device: torch.device, layouts: list[str]) -> None:
    """Every argument in a layout of its own, and the cotangent. Bit for bit where our kernels compute.

    Whole layers are interpreted with every argument transposed, where each copy matters, and no more: half a minute
    for draws of which `test_operators_take_every_layout` makes enough.
    """
    if interpreted() and name in LAYERS and harness.current.examples > 1:
        harness.current.examples -= 1
        return
    made = stage(name, torch.float64, device)
    drawn = dict(zip((*made.tensors, "cotangent"), layouts))
    tensors = {key: laid_out(t, drawn[key]) for key, t in made.tensors.items()}
    plain = {key: t.clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}

    like = plain["x"] if name in LAYERS else made.call(optimized, plain)
    g = laid_out(cotangent_of(like), drawn["cotangent"])
    out, gradients = everything(made, tensors, g)
    expected, wanted = everything(made, plain, g.clone(memory_format=torch.contiguous_format))
    if kernels == "triton" and name in OURS:
        check_runs((out, gradients), (expected, wanted))
        return
    # Sums of at most 64 terms in another order, through at most ten stages that lose a digit each at worst.
    for key, a, e in (("out", out, expected), *((key, gradients[key], t) for key, t in wanted.items())):
        assert (a is None) == (e is None), key
        if e is not None:
            assert (a.shape, a.dtype, a.device) == (e.shape, e.dtype, e.device), key
            assert ((a - e).abs() <= 640 * torch.finfo(e.dtype).eps * (1 + e.abs().max())).all(), key


@pytest.mark.parametrize(
    ("layout", "masked"),
    [("transposed", True), ("sliced", False), ("expanded", True), ("reversed", False)],
)
@pytest.mark.parametrize("name", list(OPERATORS))
def test_operators_take_one_layout_of_all(name: str, layout: str, masked: bool, device: torch.device) -> None:
    """Every tensor argument in the same layout, whatever the draws below come to."""
    arguments = samples.arguments_of(name, samples.Sample(masked=masked, batch=2, n=7, experts=2), device)
    check_layouts(name, [laid_out(a, layout) if isinstance(a, Tensor) else a for a in arguments])


@pytest.mark.parametrize("name", list(OPERATORS))
def test_operators_take_every_layout(name: str, device: torch.device) -> None:
    """Every tensor argument in a layout of its own; whatever the values, they alone decide."""
    share = 1 if device.type == "cuda" else 50  # most of them are interpreted

    @settings(max_examples=max(settings.default.max_examples // share, 1))
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        check_operator(name, device, data)

    check()


def check_operator(name: str, device: torch.device, data: st.DataObject) -> None:
    sample = samples.Sample(masked=data.draw(st.booleans(), label="masked"), batch=2, n=7, experts=2)
    arguments = samples.arguments_of(name, sample, device)
    drawn = [data.draw(st.sampled_from(LAYOUTS)) if isinstance(a, Tensor) else "" for a in arguments]
    given_ = [laid_out(a, how) if isinstance(a, Tensor) else a for a, how in zip(arguments, drawn)]
    check_layouts(name, given_)


BY_KERNELS = ("router_logits", "gather_norm", "rotary", "routed_rows", "combine")  # of ours alone


def check_layouts(name: str, given_: list[Any]) -> None:
    plain = [a.clone(memory_format=torch.contiguous_format) if isinstance(a, Tensor) else a for a in given_]
    call = OPERATORS[name]
    for a, e in zip(*((t,) if isinstance(t, Tensor) else t for t in (call.op(*given_), call.op(*plain)))):
        assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())
        if samples.forward_of(name) in BY_KERNELS and given_[call.names.index("triton")]:
            check_identical(a, e)
        else:
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, equal_nan=True)
