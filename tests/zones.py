"""Memory that is filled with a huge number, between zones of it, which nothing may read or write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

ZONE = 64  # elements, so that what lies between two zones is as aligned as it was


def huge(dtype: torch.dtype) -> float | bool:
    """Finite: a product with 0 hides it, where NaN would not; a comparison sees it, where NaN is seen by none."""
    if dtype == torch.bool:
        return True
    return torch.finfo(dtype).max / 2 if dtype.is_floating_point else torch.iinfo(dtype).max // 2


def same(a: Tensor, value: float | bool) -> bool:
    return bool((a.isnan() if math.isnan(value) else a == value).all())


def zoned(t: Tensor, value: float | bool) -> tuple[Tensor, Callable[[], bool]]:
    """Memory of t's shape and strides, filled with the value like the zones around it; whether these are untouched."""
    needed = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) if t.numel() else 0
    buffer = REAL["full"]((needed + 2 * ZONE,), value, dtype=t.dtype, device=t.device)
    inside = REAL["empty"]((0,), dtype=t.dtype, device=t.device)
    inside.set_(buffer.untyped_storage(), ZONE, t.shape, t.stride())  # no view: as a tensor of its own is
    return inside, lambda: same(buffer[:ZONE], value) and same(buffer[ZONE + needed :], value)


REAL = {"full": torch.full, "empty": torch.empty, "empty_like": torch.empty_like, "new_empty": Tensor.new_empty}


@contextmanager
def new_memory_in_zones(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], bool]]]:
    """torch.empty and its like give memory filled with a huge number, between zones of it."""
    made: list[Callable[[], bool]] = []

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            if t.device.type == "meta" or not t.numel():
                return t
            inside, untouched = zoned(t, huge(t.dtype))
            made.append(untouched)
            return inside

        return call

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(REAL["empty"]))
        patch.setattr(torch, "empty_like", poisoned(REAL["empty_like"]))
        patch.setattr(Tensor, "new_empty", poisoned(REAL["new_empty"]))
        yield made
