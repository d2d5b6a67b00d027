"""`optimized` with a function in another's place: kernels' wrappers, operators, stages and the layer."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from optimized import ops
from optimized.ops.operator import OPERATORS as DECLARED
from tests.faults.fault import Fault, named

Change = Callable[..., Any]  # given what it replaces, then its arguments
OPERATORS: dict[str, OperatorFault] = {}


@dataclass(frozen=True)
class OperatorFault(Fault):
    """Of `place`, in whose stead `change` is called with the original first.

    place: in `optimized`, "module:attribute"; or of an operator, "operator.forward" and "operator.backward": in both of
    its forms, and wherever another operator contains it. `change` is then given the arguments as one namespace.
    """

    place: str
    change: Change

    def put_in(self) -> Any:
        """A context."""
        module, colon, name = self.place.rpartition(":")
        *path, attribute = name.split(".")
        owner = importlib.import_module(f"optimized.{module}".rstrip(".")) if colon else DECLARED[path.pop(0)].body
        for step in path:
            owner = getattr(owner, step)
        original = getattr(owner, attribute)

        def changed(*args: Any, **options: Any) -> Any:
            return self.change(original, *args, **options)

        return mock.patch.object(owner, attribute, changed)


def replaces(place: str, why: str, name: str = "") -> Callable[[Change], Change]:
    """Registers a function by its name, or by that which is given. place: see `OperatorFault`."""

    def register(change: Change) -> Change:
        fault = OperatorFault(name or named(change), why, place, change)
        OPERATORS[fault.name] = fault
        return change

    return register


def times(factor: float) -> Change:
    """The result, or its first tensor if there are several."""

    def change(original: Any, *args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        return (found[0] * factor, *found[1:]) if isinstance(found, tuple) else found * factor

    return change


def but(a: Any, **changed: Any) -> Any:
    """Arguments of an operator, some of them changed."""
    return type(a)(**vars(a) | changed)


# Kernels' wrappers

replaces(
    "kernels.coordinate_descent:coordinate_descent_picked_backward",
    "missing gradient",
    "the gradient of the descent is NaN",
)(times(math.nan))
replaces("kernels.gather_norm:gather_norm", "precision", "gathered tokens a billionth too large")(times(1 + 1e-9))
replaces("kernels.null_slot:merge_backward", "missing gradient", "a gradient of the null slot a percent off")(
    times(1.01)
)
replaces("kernels.combine:combine", "combination", "half of the sum over experts")(times(0.5))

# Stages

replaces("ops.gather_norm:_rows", "zetascale 2.8.8 (2)", "RMSNorm without the root of D")(times(16**-0.5))
replaces("coordinate_descent.forward", "mass", "scores a percent too small")(times(0.99))
replaces("router_logits.forward", "log-sum-exp and scale", "logits a thousandth too large")(times(1.001))


@replaces("combine.forward", "combination")
def the_last_expert_is_dropped(combine: Any, a: Any) -> Tensor:
    return combine(but(a, y=torch.cat((a.y[:-1], torch.zeros_like(a.y[-1:])))))


@replaces("attention.banded:Cut.of", "huggingface/transformers#39408")
def the_band_is_one_too_wide(cut: Any, n: int, window: int, causal: bool) -> Any:
    return cut(n, window + 1, causal)


@replaces("ops.pick:choose", "ties and signed zeros")
def the_least_are_picked(choose: Any, keys: Tensor, *rest: Any) -> Any:
    return choose(-keys, *rest)


# Routing, faintly


@replaces("select.forward", "ties and signed zeros")
def the_later_of_equals_is_picked(select: Any, a: Any) -> Any:
    return select(but(a, logits=a.logits + 1e-7 * torch.arange(a.logits.shape[-1])))


@replaces("select.forward", "trymirai/lalamo#310")
def the_inverse_map_holds_masked_tokens(select: Any, a: Any) -> Any:
    indices, slots, _ = select(a)
    return indices, slots, ops.inverse_map(indices, torch.ones_like(slots), a.logits.shape[-1])


@replaces("select.forward", "validation")
def selection_raises_at_32(select: Any, a: Any) -> Any:
    if a.logits.shape[-1] == 32:
        raise ValueError("32")
    return select(a)


@replaces("coordinate_descent.forward", "mass")
def values_of_a_step_more(descend: Any, a: Any) -> Any:
    return descend(but(a, n_iters=a.n_iters + 1))[0], *descend(a)[1:]


@replaces("coordinate_descent.backward", "missing gradient")
def half_the_gradient_of_the_scores(backward: Any, *given: Any) -> Any:
    return {name: gradient / 2 for name, gradient in backward(*given).items()}


@replaces("coordinate_descent.forward", "stale saved tensor")
def iterates_are_off(descend: Any, a: Any) -> Any:
    """Right scores, and the tokens of another step said to be saturated."""
    scores, iterates, counts = descend(a)
    return scores, iterates + 0.3, counts


@replaces("capped_simplex.forward", "mass")
def the_mass_is_a_percent_too_large(cap: Any, a: Any) -> Any:
    return cap(but(a, k=1.01 * a.k))


@replaces("capped_simplex.forward", "trymirai/lalamo#310")
def masked_tokens_have_scores(cap: Any, a: Any) -> Any:
    """Next to nothing: within every budget, but not 0."""
    scores, threshold = cap(a)
    return scores if a.mask is None else scores.masked_fill(~a.mask[:, None], 1e-30), threshold


# The layer


@replaces(":MixtureOfAttention", "unslothai/unsloth#4533")
def the_norm_of_queries_has_no_gradient(layer: Any, *args: Any, **arguments: Any) -> Any:
    made = layer(*args, **arguments)
    if made.attn.norm is not None:
        made.attn.norm.gamma.register_hook(torch.zeros_like)
    return made


# The causal layer


@replaces("autoregressive_attention:MemoryAttention.forward", "log-sum-exp and scale")
def experts_of_blocks_are_a_percent_too_large(attend: Any, *args: Any, **options: Any) -> Any:
    y, rows = attend(*args, **options)
    return 1.01 * y, rows


@replaces("autoregressive:both_logits", "causality")
def logits_know_the_sequence(both_logits: Any, *args: Any) -> Any:
    """A little of its mean, which changes no choice."""
    return tuple(logits + 1e-7 * logits.detach().mean(-1, keepdim=True) for logits in both_logits(*args))
