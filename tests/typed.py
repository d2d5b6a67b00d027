"""What a type checker makes of a call: `mypy` reads this, and nothing runs it."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import assert_type

import optimized
import reference
from reference import Routes

Pair = tuple[Routes, Routes]


def fast(layer: optimized.MixtureOfAttention, x: Tensor, ask: bool) -> None:
    assert_type(layer(x), Tensor)
    assert_type(layer(x, return_routes=False).shape[0], int)
    assert_type(layer(x, x, mask=x, return_routes=True), tuple[Tensor, Pair])
    assert_type(layer(x, return_routes=ask), Tensor | tuple[Tensor, Pair])
    assert_type(layer.forward(x), Tensor)
    assert_type(layer.forward(x, return_routes=True), tuple[Tensor, Pair])
    layer.dropout = 0.5


def readable(layer: reference.MixtureOfAttention, x: Tensor, ask: bool) -> None:
    assert_type(layer(x), Tensor)
    assert_type(layer(x, return_routes=False).shape[0], int)
    assert_type(layer(x, x, mask=x, return_routes=True), tuple[Tensor, Pair])
    assert_type(layer(x, return_routes=ask), Tensor | tuple[Tensor, Pair])
    assert_type(layer.forward(x), Tensor)
    assert_type(layer.forward(x, return_routes=True), tuple[Tensor, Pair])
    layer.dropout = 0.5
