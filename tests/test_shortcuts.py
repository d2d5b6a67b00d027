"""`optimized.prove.shortcuts`: what Triton's interpreter does by them is what it does without."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

from optimized.prove import shortcuts

pytestmark = pytest.mark.cpu  # where kernels are interpreted
OURS = shortcuts.OURS
DTYPES = {tl.int1: np.bool_, tl.int32: np.int32, tl.int64: np.int64, tl.float32: np.float32, tl.float64: np.float64}
SHAPES = [(), (1,), (4,), (4, 1), (1, 2), (4, 2)]


def value(dtype: tl.dtype, shape: tuple[int, ...]) -> tl.tensor:
    data = np.arange(max(1, np.prod(shape, dtype=int))).reshape(shape).astype(DTYPES[dtype])
    return tl.tensor(interpreter.TensorHandle(data, dtype), tl.block_type(dtype, list(shape)) if shape else dtype)


def outcome(call: Any, *arguments: Any) -> Any:
    """What it returns, in words, or the kind and the text of what it raises."""
    try:
        found = call(OURS, *arguments)
    except Exception as error:
        return type(error), str(error)
    parts = found if isinstance(found, tuple) else (found,)
    return [(str(p.type), p.handle.data.tolist()) if isinstance(p, tl.tensor) else str(p) for p in parts]


def test_every_shortcut_is_taken() -> None:
    for name in shortcuts.SEMANTICS:
        assert getattr(type(OURS), name) is getattr(shortcuts, name)
        assert shortcuts._general[name] is not getattr(shortcuts, name)


def test_operands_of_any_shapes() -> None:
    for left, right in itertools.product(SHAPES, repeat=2):
        pair = value(tl.float32, left), value(tl.int32, right)
        expected = outcome(shortcuts._general["broadcast_impl_value"], *pair)
        assert outcome(shortcuts.broadcast_impl_value, *pair) == expected, (left, right)


def test_dtypes_of_results() -> None:
    for a, b in itertools.product([*DTYPES, tl.uint32, tl.float16, tl.bfloat16], repeat=2):
        for flags in itertools.product([False, True], repeat=3):
            given = a, flags[0], b, *flags[1:]
            expected = outcome(shortcuts._general["computation_type_impl"], *given)
            for _ in range(2):  # found, and remembered
                assert outcome(shortcuts.computation_type_impl, *given) == expected, given


def test_casts() -> None:
    for (a, b), shape in itertools.product(itertools.product(DTYPES, repeat=2), ((), (4, 2))):
        given = value(a, shape), b
        assert outcome(shortcuts.cast, *given) == outcome(shortcuts._general["cast"], *given), (a, b, shape)
    given = value(tl.float32, (4,)), tl.float64, "rtz"
    assert outcome(shortcuts.cast, *given) == outcome(shortcuts._general["cast"], *given)


def test_constants_are_unwrapped() -> None:
    for held in (3, True, None, "a", 2.5, tl.float32, [tl.constexpr(1), 2], (tl.constexpr(1), 2)):
        for given in (held, tl.constexpr(held)):
            found, expected = shortcuts._unwrap_if_constexpr(given), shortcuts._unwrap(given)
            assert (type(found), repr(found)) == (type(expected), repr(expected))  # a constant equals what it holds


def test_types_of_one_shape_share_it() -> None:
    first, second = tl.block_type(tl.float32, [4, 2]), tl.block_type(tl.int32, (4, 2))
    assert first.shape is second.shape
    assert first.with_element_ty(tl.int32) == second
    assert first != second
    assert tl.block_type(tl.int32, [2, 4]) != second
    assert str(second) == str(first).replace("fp32", "int32")
    with pytest.raises(ValueError, match="must be a power of 2"):
        tl.block_type(tl.int32, [3])
