"""The reference with one operation changed: what a kernel may get wrong, from gross to faint."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import reference
from tests.faults.fault import Fault, package

Patch = Callable[[], Any]  # a context
LOWER = {torch.float64: torch.float32, torch.float32: torch.bfloat16, torch.float16: torch.bfloat16}
FUNCTIONS = ("route", "routed_attention", "local_attention", "combine", "coordinate_descent", "capped_simplex")
SOFTMAX, EINSUM = Tensor.softmax, torch.einsum
ATTEND = sys.modules["reference.routed_attention"].attend  # the function has the module's name
COMBINE, DESCEND = reference.combine, reference.coordinate_descent


@dataclass(frozen=True)
class ComputationFault(Fault):
    """stages: a pattern of those of `reference.testing` that it reaches; not_in: dtypes that can't show it.

    patch: a context in which the reference computes with the fault.
    """

    stages: str
    patch: Patch
    not_in: tuple[str, ...] = ()

    def possible(self, stage: str, dtype: str) -> bool:
        return dtype not in self.not_in and re.search(self.stages, stage) is not None

    def package(self) -> ModuleType:
        patch = self.patch

        class Layer(reference.MixtureOfAttention):
            def forward(self, *args: Any, **keywords: Any) -> Any:
                with patch():
                    return super().forward(*args, **keywords)

        def under(name: str) -> Callable[..., Any]:
            def call(*args: Any, **keywords: Any) -> Any:
                with patch():
                    return getattr(reference, name)(*args, **keywords)

            return call

        return package(Layer, {name: under(name) for name in FUNCTIONS})


def _replaced(owner: Any, name: str, replacement: Callable[..., Any]) -> Patch:
    return lambda: mock.patch.object(owner, name, replacement)


def _everywhere(name: str, replacement: Callable[..., Any]) -> Patch:
    """A function that the layer's modules import by name."""

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module in [reference] + [m for key, m in sys.modules.items() if key.startswith("reference.")]:
                if callable(vars(module).get(name)):
                    stack.enter_context(mock.patch.object(module, name, replacement))
            yield

    return patched


def _softmax(change: Callable[[Tensor], Tensor]) -> Patch:
    return _replaced(Tensor, "softmax", lambda t, dim: SOFTMAX(change(t), dim))


def _column(column: int, amount: float) -> Patch:
    """Of the logits of attention."""

    def change(t: Tensor) -> Tensor:
        shift = torch.zeros(t.shape[-1], dtype=t.dtype)
        shift[column] = amount
        return t + shift if t.shape[-1] > 1 else t

    return _softmax(change)


def _weights_without_the_sum(t: Tensor, dim: int) -> Tensor:
    p = SOFTMAX(t, dim).detach()
    return p + p * torch.where(p > 0, t - t.detach(), 0)


def _lower(t: Tensor) -> Tensor:
    """Rounded to the next lower precision."""
    return t.to(LOWER.get(t.dtype, t.dtype)).to(t.dtype)


def _norm(eps: float, detached: bool) -> Patch:
    def rms_norm(x: Tensor, gamma: Tensor | None) -> Tensor:
        if gamma is None:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        size = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
        size = size.detach() if detached else size
        normed = torch.where(size > 0, wide / size.clamp_min(1e-30), 0)
        return (normed * gamma[:, None].to(wide.dtype)).to(x.dtype)

    return _replaced(sys.modules["reference.routed_attention"], "rms_norm", rms_norm)


def _summed_in_half(equation: str, x: Tensor, w: Tensor) -> Tensor:
    """Of the reference's products over channels, with a sum that is rounded after each term."""
    low = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
    total = EINSUM(equation, x[..., :1], w[..., :1]).to(low)
    for i in range(1, x.shape[-1]):
        total = (total + EINSUM(equation, x[..., i : i + 1], w[..., i : i + 1])).to(low)
    return total.to(x.dtype)


def _scores(side: int, change: Callable[[Tensor], Tensor]) -> Patch:
    def attend(x: Tensor, context: Tensor, q_routes: Any, kv_routes: Any, *rest: Any) -> Tensor:
        pair = [r._replace(scores=change(r.scores)) if i == side else r for i, r in enumerate((q_routes, kv_routes))]
        return ATTEND(x, context, *pair, *rest)

    return _replaced(sys.modules["reference.routed_attention"], "attend", attend)


def _without_gradient(t: Tensor) -> Tensor:
    return t.detach() + torch.where(t.isfinite(), 0 * t, 0)


def _one_expert_at_one(scores: Tensor) -> Tensor:
    return torch.cat((torch.ones_like(scores[:, :1]), scores[:, 1:]), 1)


def _combined(change: Callable[[Tensor], Tensor]) -> Patch:
    return _everywhere("combine", lambda y, routes, n, **options: COMBINE(change(y), routes, n, **options))


def _without_last_slot(y: Tensor, routes: Any, n: int, **options: Any) -> Tensor:
    slots = torch.cat((routes.mask[..., :-1], torch.zeros_like(routes.mask[..., -1:])), -1)
    return COMBINE(y, routes._replace(mask=slots), n, **options)


def _twice_last_slot(y: Tensor) -> Tensor:
    return torch.cat((y[:, :, :-1], 2 * y[:, :, -1:]), 2)


def _without_the_normaliser(logits: Tensor, k: float, mask: Tensor | None = None, **options: Any) -> Tensor:
    """The same scores min(1, exp((s + a) / eps)); their gradient takes a for a constant."""
    scores = DESCEND(logits, k, mask, **options).detach()
    return scores * (1 + (logits - logits.detach()) / options.get("eps", 0.03) * (scores < 1))


def _options(names: tuple[str, ...], **change: Callable[[Any], Any]) -> Patch:
    """These functions with other options; those not given have their defaults."""
    defaults = {"eps": 0.03, "n_iters": 20}

    def changed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            return function(*args, **options | {n: f(options.get(n, defaults[n])) for n, f in change.items()})

        return call

    return lambda: mock.patch.multiple(reference, **{name: changed(getattr(reference, name)) for name in names})


def _routed(change: Callable[[Tensor], Tensor]) -> Patch:
    route = reference.route
    return _replaced(reference, "route", lambda x, *args, **options: route(change(x), *args, **options))


ATTENTION = "attention|mixture"
ROUTED = "routed_attention|mixture"
SOLVER = "scores|solver_gradient|router_gradient"
ROUTED_GRADIENT = "(routed_attention|mixture)_gradient"
DESCENT = ("route", "coordinate_descent")
LAYER_NORM = torch.nn.functional.layer_norm

COMPUTATIONS: dict[str, ComputationFault] = {}
for name, given in {
    "attention logits 1% too large": ("log-sum-exp and scale", ATTENTION, _softmax(lambda t: t * 1.01)),
    "softmax to base 2": ("sgl-project/sglang#33064", ATTENTION, _softmax(lambda t: t * math.log(2))),
    "first key weighs twice": ("log-sum-exp and scale", ATTENTION, _column(0, math.log(2))),
    "last key lost": ("tail mask", ATTENTION, _column(-1, -30.0)),
    "weights in the next lower precision": (
        "precision",
        ATTENTION,
        _replaced(Tensor, "softmax", lambda t, dim: _lower(SOFTMAX(t, dim))),
        ("bfloat16", "float16"),
    ),
    "softmax gradient without its sum": (
        "missing gradient",
        "(attention|mixture)_gradient",
        _replaced(Tensor, "softmax", _weights_without_the_sum),
    ),
    "RMSNorm with eps 1e-5": ("precision", ROUTED, _norm(1e-5, False)),
    "RMSNorm gradient without its second term": ("unslothai/unsloth#10617", ROUTED_GRADIENT, _norm(0.0, True)),
    "products summed in half precision": ("precision", ROUTED, _replaced(torch, "einsum", _summed_in_half)),
    "query score of one expert ignored": ("expert mix-up", ROUTED, _scores(0, _one_expert_at_one)),
    "key/value score of one expert ignored": ("expert mix-up", ROUTED, _scores(1, _one_expert_at_one)),
    "no gradient of the key/value scores": ("missing gradient", ROUTED_GRADIENT, _scores(1, _without_gradient)),
    "LayerNorm with eps 1e-3": (
        "precision",
        "local_attention|mixture",
        _replaced(torch.nn.functional, "layer_norm", lambda *args: LAYER_NORM(*args[:4], 1e-3)),
    ),
    "last slot not combined": ("combination", "combine|mixture", _everywhere("combine", _without_last_slot)),
    "last slot combined twice": ("combination", "combine|mixture", _combined(_twice_last_slot)),
    "terms in the next lower precision": ("precision", "combine", _combined(_lower), ("bfloat16",)),
    "temperature 1% too high": ("mass", SOLVER, _options((*DESCENT, "capped_simplex"), eps=lambda v: 1.01 * v)),
    "one iteration more": ("mass", "scores|router_gradient", _options(DESCENT, n_iters=lambda v: v + 1)),
    "x in the next lower precision": ("precision", "logits", _routed(_lower)),
    "the last channel of x lost": (
        "tail mask",
        "logits",
        _routed(lambda x: torch.cat((x[..., :-1], torch.zeros_like(x[..., -1:])), -1)),
    ),
    "the normaliser of the scores has no gradient": (
        "colt5-attention 0.11.2 (7)",
        "router_gradient",
        _everywhere("coordinate_descent", _without_the_normaliser),
    ),
}.items():
    COMPUTATIONS[name] = ComputationFault(name, *given)
