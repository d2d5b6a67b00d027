"""By how much results change where every sum and every exponential is a little off, as by rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NUDGE = 2.0**-20  # small enough for a result to change in proportion, and far above rounding in float64
DRAWS = 2  # of the signs of the nudges: one may cancel by chance, as a rounding may
aten = torch.ops.aten
# Where terms are summed up, or an exponent makes its absolute error a relative one. Nothing that angles or indices,
# which all parties have in float64 or exactly, are made by.
ROUNDED = {
    aten.mm.default,
    aten.bmm.default,
    aten.sum.dim_IntList,
    aten.exp.default,
    aten.logsumexp.default,
    aten._softmax.default,
    aten._softmax_backward_data.default,
    aten.native_layer_norm.default,
    aten.native_layer_norm_backward.default,
}


def nudge(t: Tensor, generator: torch.Generator) -> Tensor:
    """Every element a relative `NUDGE` up or down. The same on every device."""
    up = torch.randint(2, t.shape, generator=generator, dtype=torch.int8)
    return t * (1 - NUDGE + 2 * NUDGE * up.to(t.device))


class Nudged(TorchDispatchMode):
    """The float64 results of `ROUNDED` are nudged, backward too."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **kwargs or {})
        if func not in ROUNDED:
            return result
        if func is aten._softmax_backward_data.default:
            # dS = P (dP - delta). A flash backward sums delta up apart, from dO and O, with one error for all keys.
            grad, probs, dim, _ = args
            delta = (grad.abs() * probs).sum(dim, keepdim=True)
            result = result + probs * (nudge(delta, self.generator) - delta)
        results = result if isinstance(result, tuple) else (result,)
        nudged = tuple(nudge(t, self.generator) if isinstance(t, Tensor) else t for t in results)
        return nudged if isinstance(result, tuple) else nudged[0]
