"""Quantised projections: the result is that of the weights that they stand for."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from harness import check
from programs.layers import OPTIONS, PACKAGES, call_of, layer_of
from torch import Tensor, nn

pytestmark = pytest.mark.cpu

OPTION = OPTIONS["local mask"]
LINEAR = ("local_attn.to_qkv", "local_attn.to_out")


def layer(package: str) -> nn.Module:
    return layer_of(package, dtype=torch.float32, **OPTION.arguments).eval()


def call(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of numbers that float32 holds."""
    given = call_of(OPTION, 12, dtype=torch.float32)
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()}


def assert_is(found: Tensor, change: Callable[[nn.Module], object]) -> None:
    """What the reference gives once changed, within the budget of float32; and not what it gives unchanged."""
    results = []
    for dtype in (torch.float64, torch.float32):
        plain = layer("reference").to(dtype)
        before = plain(**call(dtype)).detach()
        change(plain)
        results.append(plain(**call(dtype)).detach())
        assert not torch.equal(results[-1], before)
    check(found.detach(), *results, stage="mixture")


def with_weights(weights: dict[str, Tensor]) -> Callable[[nn.Module], None]:
    def change(plain: nn.Module) -> None:
        for name, weight in weights.items():
            of = plain.get_submodule(name).weight
            of.data = weight.detach().to(of.dtype)

    return change


@PACKAGES
@pytest.mark.needs("torchao")
def test_int8_weights(package: str) -> None:
    """quantize_ of torchao replaces the weights of nn.Linear by tensors of its own."""
    from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_

    quantized = layer(package)
    quantize_(quantized, Int8WeightOnlyConfig(set_inductor_config=False))
    weights = {name: m.weight for name, m in quantized.named_modules() if isinstance(m, nn.Linear)}
    assert tuple(weights) == LINEAR
    assert all(isinstance(weight, Int8Tensor) for weight in weights.values())
    assert_is(quantized(**call()), with_weights({name: weight.dequantize() for name, weight in weights.items()}))


@PACKAGES
@pytest.mark.needs("torchao")
@pytest.mark.parametrize("projection", ["attn.to_q", "attn.to_kv", "attn.to_out"])
def test_int8_weights_of_an_expert(package: str, projection: str) -> None:
    """Torchao knows no grouped convolution. The layer uses its weight, or names the module that holds it."""
    from torchao.quantization import Int8WeightOnlyConfig, PerTensor, quantize_

    quantized = layer(package)
    config = Int8WeightOnlyConfig(granularity=PerTensor(), set_inductor_config=False)
    quantize_(quantized, config, filter_fn=lambda module, name: name == projection)
    weight = quantized.get_submodule(projection).weight
    try:
        found = quantized(**call())
    except (TypeError, NotImplementedError) as error:
        assert projection in str(error) or "Int8Tensor" in str(error), error  # noqa: PT017
    else:
        assert_is(found, with_weights({projection: weight.dequantize()}))


@PACKAGES
def test_dynamic_quantization(package: str) -> None:
    """torch.ao replaces nn.Linear by a module that has a method for a weight, and quantises activations too.

    So the plain layer gets the same two modules, as functions, in the place of its products.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another package takes over
        quantized = torch.ao.quantization.quantize_dynamic(layer(package), {nn.Linear}, dtype=torch.qint8)
    modules = {name: quantized.get_submodule(name) for name in LINEAR}
    assert all(callable(module.weight) for module in modules.values())

    def change(plain: nn.Module) -> None:
        for name, module in modules.items():
            plain.get_submodule(name).register_forward_hook(lambda _, given, out, m=module: m(given[0].float()).to(out))

    assert_is(quantized(**call()), change)
