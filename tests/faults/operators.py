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
from tests.faults.fault import Fault, named

Change = Callable[..., Any]  # given what it replaces, then its arguments
OPERATORS: dict[str, OperatorFault] = {}


@dataclass(frozen=True)
class OperatorFault(Fault):
    """Of `module`.`attribute`, in whose place `change` is called with the original first."""

    module: str
    attribute: str
    change: Change

    def put_in(self) -> Any:
        """A context."""
        module = importlib.import_module(self.module)
        original = getattr(module, self.attribute)

        def changed(*args: Any, **options: Any) -> Any:
            return self.change(original, *args, **options)

        return mock.patch.object(module, self.attribute, changed)


def replaces(place: str, why: str, name: str = "") -> Callable[[Change], Change]:
    """Registers a function by its name, or by that which is given. place: module and attribute, in `optimized`."""

    def register(change: Change) -> Change:
        module, _, attribute = f"optimized.{place}".rpartition(".")
        fault = OperatorFault(name or named(change), why, module, attribute, change)
        OPERATORS[fault.name] = fault
        return change

    return register


def times(factor: float) -> Change:
    """The result, or its first tensor if there are several."""

    def change(original: Any, *args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        return (found[0] * factor, *found[1:]) if isinstance(found, tuple) else found * factor

    return change


# Kernels' wrappers

replaces(
    "kernels.coordinate_descent.coordinate_descent_backward", "missing gradient", "the gradient of the descent is NaN"
)(times(math.nan))
replaces("kernels.gather_norm.gather_norm", "precision", "gathered tokens a billionth too large")(times(1 + 1e-9))
replaces("kernels.null_slot.merge_backward", "missing gradient", "a gradient of the null slot a percent off")(
    times(1.01)
)
replaces("kernels.combine.combine", "combination", "half of the sum over experts")(times(0.5))

# Stages

replaces("routed_attention.rms_norm", "zetascale 2.8.8 (2)", "RMSNorm without the root of D")(times(16**-0.5))
replaces("ops.descend", "mass", "scores a percent too small")(times(0.99))
replaces("routing._logits", "log-sum-exp and scale", "logits a thousandth too large")(times(1.001))


@replaces("mixture._combine", "combination")
def the_last_expert_is_dropped(combine: Any, y: Tensor, *rest: Any, **options: Any) -> Tensor:
    return combine(torch.cat((y[:-1], torch.zeros_like(y[-1:]))), *rest, **options)


@replaces("local_attention._banded", "huggingface/transformers#39408")
def the_band_is_one_too_wide(banded: Any, q: Tensor, k: Tensor, v: Tensor, w: int, *rest: Any) -> Tensor:
    return banded(q, k, v, w + 1, *rest)


@replaces("ops.select", "ties and signed zeros")
def the_least_are_picked(select: Any, logits: Tensor, *rest: Any) -> Any:
    return select(-logits, *rest)


# Routing, faintly


@replaces("ops.select", "ties and signed zeros")
def the_later_of_equals_is_picked(select: Any, logits: Tensor, *rest: Any) -> Any:
    return select(logits + 1e-7 * torch.arange(logits.shape[-1]), *rest)


@replaces("ops.select", "trymirai/lalamo#310")
def the_inverse_map_holds_masked_tokens(select: Any, logits: Tensor, *rest: Any) -> Any:
    indices, slots, _ = select(logits, *rest)
    return indices, slots, ops.inverse_map(indices, torch.ones_like(slots), logits.shape[-1])


@replaces("ops.select", "validation")
def selection_raises_at_32(select: Any, logits: Tensor, *rest: Any) -> Any:
    if logits.shape[-1] == 32:
        raise ValueError("32")
    return select(logits, *rest)


@replaces("ops.descend", "mass")
def values_of_a_step_more(descend: Any, logits: Tensor, mask: Any, k: float, n_iters: int, *rest: Any) -> Any:
    return descend(logits, mask, k, n_iters + 1, *rest)[0], *descend(logits, mask, k, n_iters, *rest)[1:]


@replaces("ops.descend", "missing gradient")
def half_the_gradient_of_the_scores(descend: Any, *given: Any) -> Any:
    scores, *rest = descend(*given)
    return scores / 2 + scores.detach() / 2, *rest


@replaces("ops.descend", "stale saved tensor")
def iterates_are_off(descend: Any, *given: Any) -> Any:
    """Right scores, and the tokens of another step said to be saturated."""
    scores, a, counts = descend(*given)
    return scores, a + 0.3, counts


@replaces("ops.cap", "mass")
def the_mass_is_a_percent_too_large(cap: Any, logits: Tensor, mask: Any, k: float, *rest: Any) -> Any:
    return cap(logits, mask, 1.01 * k, *rest)


@replaces("ops.cap", "trymirai/lalamo#310")
def masked_tokens_have_scores(cap: Any, logits: Tensor, mask: Any, *rest: Any) -> Any:
    """Next to nothing: within every budget, but not 0."""
    scores, threshold = cap(logits, mask, *rest)
    return scores if mask is None else scores.masked_fill(~mask[:, None], 1e-30), threshold


# The layer


@replaces("MixtureOfAttention", "unslothai/unsloth#4533")
def the_norm_of_queries_has_no_gradient(layer: Any, *args: Any, **arguments: Any) -> Any:
    made = layer(*args, **arguments)
    if made.attn.norm is not None:
        made.attn.norm.gamma.register_hook(torch.zeros_like)
    return made
