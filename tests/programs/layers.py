"""Small layers and calls of them, by option, and the comparison that all programs share."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from strategies import draw
from torch import Tensor, nn

import optimized
import reference

PACKAGES = pytest.mark.parametrize("package", ["reference", "optimized"])
# By day, where it takes long, the reference stands behind the optimized package: other tests here have both.
OPTIMIZED_FIRST = pytest.mark.parametrize(
    "package", ["optimized", pytest.param("reference", marks=pytest.mark.thorough)]
)
DIM, DIM_CONTEXT, EXPERTS, HEADS, DIM_HEAD, K_Q, K_KV, WINDOW = 16, 12, 2, 2, 8, 5, 7, 4
# What every call is made of two computations of, in float64, in another order of rounding.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@dataclass(frozen=True)
class Option:
    """arguments: of the constructor. given: of forward, besides x."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = ()


OPTIONS = {
    "default": Option(),
    "cosine": Option({"cosine_sim_routing": True}),
    "exact": Option({"solver": "exact"}),
    "soft": Option({"straight_through": False, "cosine_sim_routing": True}),
    "blocks": Option({"route_block_size": 8}),
    "local": Option({"local_attn": True, "local_attn_window_size": WINDOW}),
    "rotary": Option(given=("rotary_emb",)),
    "mask": Option(given=("mask",)),
    "local mask": Option({"local_attn": True, "local_attn_window_size": WINDOW}, ("mask",)),
    "cross": Option({"dim_context": DIM_CONTEXT}, ("context", "mask", "context_mask")),
    "average": Option({"average_routed": True, "prenorm": False}),
    "learned": Option({"learned_routing_tokens": True}, ("query_routing_tokens", "key_value_routing_tokens")),
    "many": Option(
        {
            "cosine_sim_routing": True,
            "solver": "exact",
            "straight_through": False,
            "average_routed": True,
            "prenorm": False,
        },
        ("rotary_emb", "mask"),
    ),
}
COMPILED = (
    "default",
    "many",
    "blocks",
    "local mask",
    "cross",
    "learned",
)  # every option, in few: a graph takes seconds


def package_of(name: str) -> ModuleType:
    return {"reference": reference, "optimized": optimized}[name]


def layer_of(package: str, seed: int = 0, dtype: torch.dtype = torch.float64, **arguments: Any) -> nn.Module:
    """A layer whose parameters are all random: no scale is 1, no bias is 0. The same for either package."""
    sizes = {"num_routed_queries": K_Q, "num_routed_key_values": K_KV, "num_experts": EXPERTS}
    sizes |= {"heads": HEADS, "dim_head": DIM_HEAD, "dropout": 0.0, "dtype": dtype}
    layer = package_of(package).MixtureOfAttention(DIM, **{**sizes, **arguments})
    for i, (name, p) in enumerate(sorted(layer.named_parameters())):
        fan_in = p.shape[1] if p.ndim == 3 and name.endswith("weight") else 1
        p.data = draw(tuple(p.shape), "normal", 100 * seed + i).to(dtype) * fan_in**-0.5
    return layer


def call_of(
    option: Option, n: int, seed: int = 0, *, batch: int = 2, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Arguments of forward, x of n tokens among them; a context has one token more; masks hide some tokens."""
    dim_context = option.arguments.get("dim_context", DIM)
    floats = {
        "x": (batch, n, DIM),
        "context": (batch, n + 1, dim_context),
        "rotary_emb": (n, DIM_HEAD),
        "query_routing_tokens": (EXPERTS, DIM),
        "key_value_routing_tokens": (EXPERTS, dim_context),
    }
    call = {
        name: draw(shape, "normal", 1000 * seed + i).to(dtype)
        for i, (name, shape) in enumerate(floats.items())
        if name == "x" or name in option.given
    }
    if "mask" in option.given:
        call["mask"] = torch.arange(n) < torch.tensor([max(n - 2, 1), n, *[n] * batch])[:batch, None]
    if "context_mask" in option.given:
        call["context_mask"] = torch.arange(n + 1) != torch.tensor([1, 0, *[0] * batch])[:batch, None]
    return call


def loss_of(out: Tensor) -> Tensor:
    """Every element counts, each with its own weight."""
    weights = torch.arange(1, 1 + out[0].numel(), device=out.device).cos().view(out.shape[1:]).to(out.dtype)
    return (out * weights).sum() / out.shape[0] / out.shape[1]


def gradients_of(layer: nn.Module, call: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of `loss_of`, by parameter; those of the layer itself stay as they are."""
    layer = copy.deepcopy(layer)
    layer.zero_grad()
    loss_of(layer(**call)).backward()
    return {name: zero_if_none(p) for name, p in layer.named_parameters() if p.requires_grad}


def zero_if_none(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def assert_same(actual: Tensor, expected: Tensor, name: str = "", **tolerance: float) -> None:
    """Float64 results of one computation made in two ways; `tolerance` for others."""
    assert actual.isfinite().all(), f"{name}: not finite"
    torch.testing.assert_close(actual, expected, **{**CLOSE, **tolerance}, msg=lambda text: f"{name}: {text}")


def assert_all_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    assert actual, "nothing to compare"
    for name, value in expected.items():
        assert_same(actual[name], value, name, **tolerance)


def injected(package: str, layer: nn.Module, call: Mapping[str, Any]) -> tuple[Any, Any]:
    """The routes that the layer takes by itself, as decisions from outside."""
    with torch.no_grad():
        _, routes = layer(**call, return_routes=True)
    make = package_of(package).Routes
    return tuple(make(r.indices.clone(), r.mask.clone(), r.scores.clone(), r.logits.clone()) for r in routes)


def moves(names: Iterable[str], before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Those of the names whose value changed."""
    return {name for name in names if not torch.equal(before[name], after[name])}
