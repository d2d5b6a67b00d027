"""`explain` against the call: the same requests of the same stages, and the same refusals, whatever the arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from harness import counted
from hypothesis import given
from hypothesis import strategies as st
from strategies import LayerCase, layer_cases
from torch import Tensor

import optimized
from optimized import plan
from optimized.attention import Request


@contextmanager
def requests() -> Iterator[dict[str, Request]]:
    """What is asked for, by stage; no plan of an earlier call answers."""
    asked: dict[str, Request] = {}
    choose = plan.choose

    def record(stage: str, request: Request, *chosen: Any) -> plan.Backend:
        asked[stage] = request
        return choose(stage, request, *chosen)

    plan._plans.clear()
    explained = sys.modules["optimized.explain"]  # the package has a function of that name
    with mock.patch.object(plan, "choose", record), mock.patch.object(explained, "choose", record):
        yield asked


REFUSED: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "nothing": lambda x: {},
    "unknown": lambda x: {"maks": None},
    "mask": lambda x: {"mask": x[..., 0]},
    "slots": lambda x: {"num_routed_queries": 0},
    "routes": lambda x: {"routes": (x, x)},
    "angles": lambda x: {"rotary_emb": x[0, :0]},
    "tokens": lambda x: {"query_routing_tokens": x[0, :2]},
    "flag": lambda x: {"return_routes": "yes"},
}


@given(
    case=layer_cases(values=("normal",)),
    switches=st.fixed_dictionaries(
        {"dropout": st.sampled_from((0.0, 0.25)), "flash_attn": st.booleans(), "use_triton": st.booleans()}
    ),
    training=st.tuples(st.booleans(), st.booleans()),
    autocast=st.booleans(),
    injected=st.booleans(),
    learned=st.booleans(),
    refused=st.sampled_from(list(REFUSED)),
)
@counted
def test_explain_asks_what_the_call_asks(
    case: LayerCase,
    switches: dict[str, Any],
    training: tuple[bool, bool],
    autocast: bool,
    injected: bool,
    learned: bool,
    refused: str,
    device: torch.device,
) -> None:
    """The same requests of the same stages, or the same refusal. training: of the layer, and of what drops in it."""
    layer = optimized.MixtureOfAttention(**(case.arguments() | switches), device=device)
    arguments = {name: t.to(device) for name, t in case.inputs().items()}
    arguments = {name: t.float() if t.is_floating_point() else t for name, t in arguments.items()}
    if injected:
        with torch.no_grad():
            arguments["routes"] = layer(**arguments, return_routes=True)[1]
    if learned:  # and not handed over
        options = {**case.options, "learned_routing_tokens": True}
        layer = optimized.MixtureOfAttention(**(replace(case, options=options).arguments() | switches), device=device)
    layer.train(training[0]).attn.train(training[1])
    arguments |= REFUSED[refused](arguments["x"])
    found = []
    for ask in (layer, partial(optimized.explain, layer)):
        answer = "accepted"
        with requests() as asked, torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            try:
                ask(**arguments)
            except (TypeError, ValueError) as error:
                answer = f"{type(error).__name__}: {error}".replace("MixtureOfAttention.forward() ", "")
        found.append((answer, asked))
    assert found[0] == found[1]
    assert (found[0][0] == "accepted") == (refused == "nothing" and (injected or not learned))
