"""torch.func around the layer: gradients by sample, and random numbers under vmap."""

from __future__ import annotations

import pytest
import torch
from programs.layers import OPTIONS, PACKAGES, assert_all_same, call_of, gradients_of, layer_of, loss_of
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

SAMPLES = 3
# Without Python that asks a tensor for its value: the exact solver of the reference does.
EVERY_OPTION = pytest.mark.parametrize("option", [name for name in OPTIONS if name not in ("exact", "many", "cross")])


def by_sample(layer: nn.Module, calls: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """vmap(grad) over the samples; what they have in common is shared."""
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    shared = {name: t for name, t in calls[0].items() if name != "x"}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(functional_call(layer, parameters, (x,), shared))

    return vmap(grad(loss), in_dims=(None, 0))(parameters, torch.stack([call["x"] for call in calls]))


@PACKAGES
@EVERY_OPTION
@pytest.mark.parametrize("n", [12, 4])
def test_gradients_by_sample(package: str, option: str, n: int) -> None:
    """As differentially private training takes them; of few tokens too, where routers choose nothing."""
    of = OPTIONS[option]
    layer = layer_of(package, **of.arguments)
    calls = [call_of(of, n, batch=1)]
    calls += [calls[0] | {"x": call_of(of, n, seed, batch=1)["x"]} for seed in range(1, SAMPLES)]
    found = by_sample(layer, calls)
    for i, call in enumerate(calls):
        assert_all_same({name: g[i] for name, g in found.items()}, gradients_of(layer, call))


@PACKAGES
def test_gradient_and_value(package: str) -> None:
    of = OPTIONS["local mask"]
    layer, call = layer_of(package, **of.arguments), call_of(of, 12)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return loss_of(functional_call(layer, parameters, (), call))

    found, value = grad_and_value(loss)({name: p.detach() for name, p in layer.named_parameters()})
    assert_all_same(found, gradients_of(layer, call))
    assert_all_same({"loss": value}, {"loss": loss_of(layer(**call)).detach()})


def dropped(package: str, randomness: str) -> Tensor:
    """Of equal items, in training: (SAMPLES, 1, N, D)."""
    layer = layer_of(package, dropout=0.5).train()
    x = call_of(OPTIONS["default"], 12, batch=1)["x"]
    return vmap(layer, randomness=randomness)(x.expand(SAMPLES, *x.shape)).detach()


@PACKAGES
def test_dropout_is_refused(package: str) -> None:
    """As vmap's default has it, and as nn.Dropout does; in evaluation nothing is drawn."""
    with pytest.raises(RuntimeError, match="randomness"):
        dropped(package, "error")
    layer = layer_of(package, dropout=0.5).eval()
    x = call_of(OPTIONS["default"], 12, batch=1)["x"]
    out = vmap(layer)(x.expand(SAMPLES, *x.shape)).detach()
    assert_all_same({str(i): t for i, t in enumerate(out)}, {str(i): layer(x).detach() for i in range(SAMPLES)})


@PACKAGES
def test_same_dropout(package: str) -> None:
    """One draw for all: equal items stay equal, and are not what they are without dropout; the next call draws anew."""
    out, again = dropped(package, "same"), dropped(package, "same")
    for item in out[1:]:
        assert torch.equal(item, out[0])
    assert not torch.equal(out, again)
    assert not torch.equal(out[0], layer_of(package)(call_of(OPTIONS["default"], 12, batch=1)["x"]).detach())


@PACKAGES
def test_different_dropout(package: str) -> None:
    """A draw for each."""
    out = dropped(package, "different")
    for i in range(SAMPLES):
        assert not torch.equal(out[i], out[i - 1])
