"""What docs/fast.md says, as it stands there."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import optimized

PAGE = (Path(optimized.__file__).parent.parent / "docs/fast.md").read_text()
GRAPHED, RECORDED, PADDED, BY_HAND = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
K = 8


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def layer_on(device: torch.device) -> optimized.MixtureOfAttention:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float64
    return optimized.MixtureOfAttention(
        32, num_routed_queries=K, num_routed_key_values=K, num_experts=2, dim_head=16, heads=2, dropout=0.0,
        local_attn=True, local_attn_window_size=5, device=device, dtype=dtype,
    )  # fmt: skip


def run(said: str, **names: Any) -> dict[str, Any]:
    names = {"torch": torch, "F": F, **names}
    exec(compile(said, "docs/fast.md", "exec"), names)
    return names


def drawn(n: int, layer: torch.nn.Module) -> Tensor:
    weight = next(layer.parameters())
    return torch.randn(2, n, 32, device=weight.device, dtype=weight.dtype, requires_grad=True)


def close(found: Tensor, expected: Tensor) -> None:
    """Up to rounding, and in bfloat16 to the order of the sums in a flash backward."""
    tolerance = 1e-10 if found.dtype == torch.float64 else 0.02
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_padding_bounds_the_compilations(device: torch.device) -> None:
    """By as many as there are lengths, and what is left of the result is that of the bare batch."""
    layer = layer_on(device)
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(layer, fullgraph=True, dynamic=False, backend=counter)
    batches = [drawn(n, layer) for n in (30, 17, 32, 33, 50, 64, 20, 128, 65)]
    results: list[Tensor] = []

    def kept(given: Tensor, mask: Tensor) -> Tensor:
        results.append(fast(given, mask=mask))
        return results[-1]

    run(PADDED, fast=kept, batches=batches)
    assert counter.frame_count == 3
    for x, out in zip(batches, results, strict=True):
        close(out[:, : x.shape[1]], layer(x))
        assert (out[:, x.shape[1] :] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("said", [RECORDED, GRAPHED], ids=["compiler", "graphed callable"])
def test_recorded_in_both_directions(said: str, device: torch.device) -> None:
    layer = layer_on(device)
    x, eager = drawn(64, layer), copy.deepcopy(layer)  # whose graph would tie the layer's parameters to this stream
    expected = eager(x)
    gradients = torch.autograd.grad(expected.float().square().mean(), [x, *eager.parameters()])
    made, step = said.split("\n", 1)
    fast = run(made, layer=layer, x=x)
    for _ in range(4):  # the first calls compile and record
        x.grad = None
        layer.zero_grad()
        out = run(step, **fast | {"x": x})["out"]
    close(out, expected)
    for leaf, gradient in zip([x, *layer.parameters()], gradients):
        close(leaf.grad, gradient)


@pytest.mark.gpu
def test_recorded_by_hand(device: torch.device) -> None:
    layer = layer_on(device)
    x = drawn(64, layer).detach()
    with torch.no_grad():
        found = run(BY_HAND, layer=layer, x=x)
        close(found["static_out"], layer(x))
