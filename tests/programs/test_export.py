"""torch.export with a dynamic batch and length, and the exported program as machine code of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs.layers import COMPILED, K_KV, K_Q, OPTIONS, WINDOW, Option, assert_same, call_of, layer_of
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

pytestmark = pytest.mark.cpu

# Batch and length: on either side of every K, a window, a block.
SIZES = ((2, 17), (1, 2), (3, WINDOW), (2, K_Q), (5, K_Q + 1), (1, K_KV + 1), (4, 33))


def exported(layer: nn.Module, option: Option, n: int, least: int = 2) -> ExportedProgram:
    """From one example of n tokens, for at least `least`; a context's length is a size of its own."""
    given = call_of(option, n, batch=3)
    batch, length, other = Dim("batch", min=1, max=1024), Dim("length", min=least), Dim("other", min=2)
    sizes = {
        "x": {0: batch, 1: length},
        "mask": {0: batch, 1: length},
        "context": {0: batch, 1: other},
        "context_mask": {0: batch, 1: other},
        "rotary_emb": {0: length},
        "query_routing_tokens": {},
        "key_value_routing_tokens": {},
    }
    return export(layer, (), given, dynamic_shapes={name: sizes[name] for name in given})


LONG = [(option, 12) for option in COMPILED]
SHORT = [(option, 3) for option in ("default", "local mask")]  # from which nothing is chosen


@pytest.mark.parametrize(("option", "example"), LONG + SHORT)
def test_any_size(option: str, example: int) -> None:
    of = OPTIONS[option]
    layer = layer_of("optimized", **of.arguments).eval()
    program = exported(layer, of, example).module()
    for batch, n in SIZES:
        given = call_of(of, n, n, batch=batch)
        assert_same(program(**given), layer(**given).detach(), f"B = {batch}, N = {n}")


def test_slots_from_the_length() -> None:
    """From 4 tokens on, which are 2 slots: PyTorch makes a graph of its own for sizes of 1."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer_of("optimized")

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, num_routed_queries=x.shape[1] // 2, num_routed_key_values=x.shape[1] // 2 + 1)

    layer = Half()
    program = exported(layer, Option(), 12, least=4).module()
    for batch, n in [(batch, n) for batch, n in SIZES if n >= 4]:
        given = call_of(Option(), n, n, batch=batch)
        assert_same(program(**given), layer(**given).detach(), f"B = {batch}, N = {n}")


def test_saved(tmp_path: Path) -> None:
    """A program in a file holds the operators by their names."""
    of = OPTIONS["local mask"]
    layer = layer_of("optimized", **of.arguments).eval()
    torch.export.save(exported(layer, of, 12), tmp_path / "layer.pt2")
    program = torch.export.load(tmp_path / "layer.pt2").module()
    for batch, n in SIZES[:3]:
        given = call_of(of, n, n, batch=batch)
        assert_same(program(**given), layer(**given).detach(), f"B = {batch}, N = {n}")


@pytest.mark.thorough  # by day machine code is that of torch.compile
@pytest.mark.slow
def test_machine_code(tmp_path: Path) -> None:
    """AOTInductor, with a C++ compiler: in float64, so that another order of sums is all that differs."""
    of = OPTIONS["local mask"]
    layer = layer_of("optimized", **of.arguments).eval()
    with torch.no_grad():
        program = exported(layer, of, 12)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        run = torch._inductor.aoti_load_package(package)
        for batch, n in SIZES:
            given = call_of(of, n, n, batch=batch)
            assert_same(run(**given), layer(**given), f"B = {batch}, N = {n}")
