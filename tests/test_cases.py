"""Every case of cases.py: that its wrappers are right, in every dtype and layout, and that no wrapper lacks one."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import cases
import pytest
import torch
from cases import CASES, DTYPES, SMALL, WIDE, Inputs, Truth, all_on, differences, each, one_by_one
from harness import check_identical
from launches import all_kernels, kernels_of, launching_by, modules, name_of
from strategies import generator, lay_out
from zones import new_memory_in_zones

from optimized.kernels import launch

TRITON = pytest.mark.parametrize("kernels", ["triton"], indirect=True)
EVERY_CASE = pytest.mark.parametrize("name", CASES)


@TRITON
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name, case in CASES.items() for dtype in (WIDE if case.family == "rows" else DTYPES)],
    ids=str,
)
def test_is_right(kernels: str, name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Interpreted or on a GPU; every switch alone in float32, all of them in others."""
    case = CASES[name]
    for values in (one_by_one if dtype == torch.float32 else all_on)(len(case.switches)):
        switches = dict(zip(case.switches, values))
        assert not case.differences(Inputs(device, dtype), SMALL, **switches), switches


@TRITON
@pytest.mark.interpreted
def test_blocks_that_drop_several_columns_at_once(kernels: str, device: torch.device) -> None:
    """Whose places go to as many others, each to one: rows of 17 columns, as above, are too short for that."""
    for n in (31, 40, 129):
        assert not CASES["memory_places"].differences(Inputs(device, torch.float64), SMALL._replace(n=n)), n


@TRITON
@EVERY_CASE
@pytest.mark.parametrize("layout", ["transposed", "unaligned"])
def test_layouts(kernels: str, name: str, layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values alone decide, bit for bit, wherever they lie in memory; not what new memory holds, nor is any written to
    beyond its end."""
    ((_, case, switches),) = [c for c in each([CASES[name].family], all_on) if c[0] == name]
    plain = case.results(Inputs(device, torch.float32), SMALL, **switches)
    laid = Inputs(
        device, torch.float32, lay=lambda t: lay_out(t, layout) if t.ndim > 1 and t.is_floating_point() else t
    )
    with new_memory_in_zones(monkeypatch) as memory:
        found = case.results(laid, SMALL, **switches)
    for key, value in plain.items():
        check_identical(found[key].contiguous(), value.contiguous(), key)
    assert all(untouched() for untouched in memory)


@TRITON
def test_routing_tokens_of_more_channels_than_a_program_holds(
    kernels: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are so many that the interpreter would take minutes."""
    monkeypatch.setattr(launch, "MAX_BLOCK_D", 8)
    assert not CASES["router_logits"].differences(Inputs(device, torch.float32), SMALL, masked=False, cosine=True)


@TRITON
@pytest.mark.parametrize("name", ["blend", "layer_norm", "router_logits", "scaled_weight"])
def test_parameters_of_more_digits(kernels: str, name: str, device: torch.device) -> None:
    """Their gradients have these, too."""
    ((_, case, switches),) = [c for c in each(["channels"], all_on) if c[0] == name]
    assert not case.differences(Inputs(device, torch.bfloat16, torch.float32), SMALL, **switches)


def test_every_kernel_has_a_case() -> None:
    """Files that launch something have one, all kernels are launched, and all wrappers called."""
    files = {name: module for name, module in modules().items() if kernels_of(module)}
    assert set(files) == set(CASES), "a new kernel brings a case in cases.py"
    calls = {
        node.attr for node in ast.walk(ast.parse(Path(cases.__file__).read_text())) if isinstance(node, ast.Attribute)
    }
    for name, module in files.items():
        wrappers = {n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
        public = {n for n in wrappers if not n.startswith("_")} - {"item_rows", "token_gradient"}
        assert public <= calls, f"{name}: a wrapper that its case does not call"


@TRITON
def test_every_kernel_is_launched(kernels: str) -> None:
    seen: set[str] = set()
    with launching_by(lambda kernel, *_, **__: seen.add(name_of(kernel))):
        for dtype in (torch.float32, torch.bfloat16):  # of one kernel half precision alone
            x = Inputs(torch.device("cpu"), dtype, blank=True)
            for _, case, switches in each(("rows", "channels", "heads"), all_on):
                case.results(x, SMALL, **switches)
    assert seen == all_kernels()


def test_a_difference_is_seen() -> None:
    """In an integer, beyond its slack, a NaN; not within."""
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    for actual, expected, words in (
        (one.int(), Truth(2 * one.int()), "2 of 2 elements"),
        (one, Truth(one + 1e-3, 1e-4), "2 of 2 elements"),
        (one, Truth(nan, 1.0), "NaN in other places"),
    ):
        (found,) = differences({"it": actual}, {"it": expected})
        assert words in found
    assert not differences({"it": one}, {"it": Truth(one + 1e-5, 1e-4)})
    assert not differences({"it": nan}, {"it": Truth(nan)})
    x = torch.randn(5, generator=generator(0))
    assert not differences({"it": x}, {"it": Truth(x.clone())})
