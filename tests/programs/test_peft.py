"""LoRA of peft on the projections of the layer.

An adapter is a second way beside the module that it wraps: y = W x + s B A x. In a grouped convolution of E > 1
experts peft makes A a convolution without groups, over the channels of all experts; only where A is zero between the
experts is the sum another weight of the layer, and peft merges no grouped convolution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from programs.layers import EXPERTS, OPTIONS, PACKAGES, assert_agrees, assert_all_agree, call_of, layer_of, loss_of
from strategies import draw
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.needs("peft"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning"),
]

RANK, ALPHA = 4, 6  # divisible by the experts; the scale s is ALPHA / RANK
TARGETS = ("to_q", "to_kv", "to_out", "to_qkv")
OPTION = OPTIONS["local mask"]
EVERY_TARGET = pytest.mark.parametrize("targets", [*((t,) for t in TARGETS), TARGETS], ids="-".join)


def plain(package: str, experts: int = EXPERTS) -> nn.Module:
    return layer_of(package, num_experts=experts, **OPTION.arguments)


def adapted(package: str, targets: tuple[str, ...], experts: int = EXPERTS) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), lora_dropout=0.0)
    return get_peft_model(plain(package, experts), config, autocast_adapter_dtype=False)


def adapters(model: nn.Module) -> dict[str, Any]:
    """Wrapped modules by their name in the layer."""
    prefix = "base_model.model."
    return {name.removeprefix(prefix): m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def fill(model: nn.Module) -> None:
    """Random A and B, A zero between the experts: rows of expert e read channels of expert e only."""
    for i, module in enumerate(adapters(model).values()):
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        groups = getattr(module.get_base_layer(), "groups", 1)
        own = torch.block_diag(*[torch.ones(RANK // groups, a.shape[1] // groups)] * groups)
        a.data = draw(tuple(a.shape), "normal", i) * own.view(a.shape) * 0.3
        b.data = draw(tuple(b.shape), "normal", 100 + i) * 0.3


def merged(package: str, model: nn.Module) -> nn.Module:
    """The plain layer with s B A added to its weights, by hand, expert by expert."""
    layer = plain(package)
    for name, module in adapters(model).items():
        weight = layer.get_submodule(name).weight
        groups = getattr(module.get_base_layer(), "groups", 1)
        a = module.lora_A["default"].weight.detach().flatten(1)
        b = module.lora_B["default"].weight.detach().flatten(1)
        rows, columns = RANK // groups, a.shape[1] // groups
        for e in range(groups):
            own = a[e * rows : (e + 1) * rows, e * columns : (e + 1) * columns]
            part = slice(e * b.shape[0] // groups, (e + 1) * b.shape[0] // groups)
            weight.data[part] += (ALPHA / RANK * b[part] @ own).view(weight.data[part].shape)
    return layer


def test_targets_are_the_projections() -> None:
    found = set(adapters(adapted("reference", TARGETS)))
    assert found == {"attn.to_q", "attn.to_kv", "attn.to_out", "local_attn.to_qkv", "local_attn.to_out"}


@PACKAGES
@EVERY_TARGET
def test_at_first_nothing_changes(package: str, targets: tuple[str, ...]) -> None:
    """B is zero: the output of the plain layer; B alone has a gradient, the frozen weights none."""
    model, call = adapted(package, targets), call_of(OPTION, 12)
    out = model(**call)
    assert_agrees(out.detach(), plain(package)(**call).detach())
    loss_of(out).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_B." in name}
    assert all(p.grad is None for name, p in model.named_parameters() if ".lora_" not in name)


@PACKAGES
@EVERY_TARGET
def test_adapters_add_to_the_weights(package: str, targets: tuple[str, ...]) -> None:
    """The output, and the gradient of x, of a layer with those weights; the adapters' gradients by the chain rule."""
    model, call = adapted(package, targets), call_of(OPTION, 12)
    fill(model)
    layer = merged(package, model)
    results = {}
    for name, module in (("adapted", model), ("merged", layer)):
        x = call["x"].clone().requires_grad_()
        out = module(**{**call, "x": x})
        loss_of(out).backward()
        results[name] = {"out": out.detach(), "x": x.grad}
    assert_all_agree(results["adapted"], results["merged"])
    assert not torch.equal(results["merged"]["out"], plain(package)(**call).detach())
    for name, module in adapters(model).items():
        assert_agrees(*gradient_of_b(module, layer.get_submodule(name).weight.grad), name)


def gradient_of_b(module: Any, weight_grad: Tensor) -> tuple[Tensor, Tensor]:
    """That of the adapter, and s dW A^T of the merged weights."""
    b, a = module.lora_B["default"].weight, module.lora_A["default"].weight.detach().flatten(1)
    groups = getattr(module.get_base_layer(), "groups", 1)
    rows, columns = RANK // groups, a.shape[1] // groups
    parts = weight_grad.flatten(1).chunk(groups)
    own = [a[e * rows : (e + 1) * rows, e * columns : (e + 1) * columns] for e in range(groups)]
    expected = torch.cat([ALPHA / RANK * part @ t.mT for part, t in zip(parts, own)])
    assert b.grad is not None, "no gradient"
    return b.grad.flatten(1), expected


@PACKAGES
def test_switched_off(package: str) -> None:
    model, call = adapted(package, TARGETS), call_of(OPTION, 12)
    fill(model)
    with model.disable_adapter():
        assert_agrees(model(**call).detach(), plain(package)(**call).detach())


@PACKAGES
def test_merge_and_unload(package: str) -> None:
    """Of one expert, whose convolutions have no groups: the plain layer again, with the adapted output."""
    model, call = adapted(package, TARGETS, experts=1), call_of(OPTION, 12)
    fill(model)
    expected = model(**call).detach()
    unloaded = model.merge_and_unload()
    assert unloaded.state_dict().keys() == plain(package, 1).state_dict().keys()
    assert_agrees(unloaded(**call).detach(), expected)
    assert not torch.equal(expected, plain(package, 1)(**call).detach())


@PACKAGES
def test_peft_merges_no_groups(package: str) -> None:
    """Peft refuses in words, before it touches a weight."""
    model = adapted(package, ("to_q",))
    with pytest.raises(NotImplementedError, match="groups > 1"):
        model.merge_and_unload()
