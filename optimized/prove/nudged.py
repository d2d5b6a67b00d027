"""By how much results change where every sum and every exponential is a little off, as by rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NUDGE = 2.0**-20  # small enough for a result to change in proportion, and far above rounding in float64
DRAWS = 2  # of the signs of the nudges: one may cancel by chance, as a rounding may
aten = torch.ops.aten
# Where terms are summed up, or an exponent makes its absolute error a relative one. Nothing that angles or indices,
# which all parties have in float64 or exactly, are made by. First those whose results are rounded to the dtype, then
# those that are computed, and kept, in at least float32.
IN_DTYPE = {
    aten.mm.default,
    aten.bmm.default,
    aten._softmax.default,
    aten._softmax_backward_data.default,
    aten.native_layer_norm.default,
    aten.native_layer_norm_backward.default,
}
IN_WIDE = {aten.sum.dim_IntList, aten.exp.default, aten.logsumexp.default}


class Nudged(TorchDispatchMode):
    """Float64 results of these operations are nudged, backward too: by `NUDGE` for a rounding to `dtype`, and in
    proportion for one to float32. The draws of the signs are the same on every device.

    Of an even seed every number has a sign of its own. Of an odd one all rows have the same signs: rows that are alike,
    as those of a word that is repeated, are rounded alike, and their errors add up.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.wide = size_of(torch.promote_types(dtype, torch.float32), dtype)
        self.size = NUDGE
        self.alike = bool(seed % 2)

    def nudge(self, t: Tensor, size: float) -> Tensor:
        """Every element a relative `size` up or down."""
        up = torch.randint(2, t.shape[-1:] if self.alike else t.shape, generator=self.generator, dtype=torch.int8)
        return t * (1 - size + 2 * size * up.to(t))

    @contextlib.contextmanager
    def widely(self) -> Iterator[None]:
        """Inside, everything is computed in at least float32."""
        self.size = self.wide
        yield
        self.size = NUDGE

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **kwargs or {})
        if func not in IN_DTYPE | IN_WIDE:
            return result
        size = self.wide if func in IN_WIDE else self.size
        if func is aten._softmax_backward_data.default:
            # dS = P (dP - delta). A flash backward sums delta up apart, from dO and O, with one error for all keys.
            grad, probs, dim, _ = args
            delta = (grad.abs() * probs).sum(dim, keepdim=True)
            result = result + probs * (self.nudge(delta, size) - delta)
        results = result if isinstance(result, tuple) else (result,)
        nudged = tuple(self.nudge(t, size) if isinstance(t, Tensor) else t for t in results)
        return nudged if isinstance(result, tuple) else nudged[0]


def size_of(result: torch.dtype, dtype: torch.dtype) -> float:
    """Nudge of what is rounded to one dtype, where `NUDGE` stands for a rounding to the other."""
    return NUDGE * torch.finfo(result).eps / torch.finfo(dtype).eps
