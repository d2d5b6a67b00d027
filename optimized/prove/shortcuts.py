"""Triton's interpreter without the general case where an operation is of the common kind: operands of one shape, a
cast to the dtype that is there, a built-in function called with what it takes. The results are the same, or equal.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

SEMANTICS = ("cast", "broadcast_impl_value", "computation_type_impl")  # methods that are replaced
_general = {name: getattr(TritonSemantic, name, None) for name in SEMANTICS}
_unwrap = getattr(tl.core, "_unwrap_if_constexpr", None)
_equal = tl.dtype.__eq__
OURS = getattr(interpreter, "interpreter_semantic", None)  # what an interpreted function is given
_computed: dict[tuple[Any, ...], Any] = {}  # the dtype of a result, by those of the operands
_PLAIN = frozenset({int, float, bool, str, type(None), tl.tensor, tl.dtype, tl.block_type, tl.pointer_type})


def _wrappers() -> set[Any]:
    """Code of Triton's two decorators of built-in functions, which hand on what they are given."""
    made = [tl.core.builtin(len), *vars(tl.tensor).values()]
    forwards = [m for m in made[1:] if getattr(m, "__qualname__", "").startswith("_tensor_member_fn.")]
    return {f.__code__ for f in (made[0], *forwards) if f.__code__.co_freevars == ("fn",)}


_WRAPPERS = _wrappers() if hasattr(tl.core, "builtin") else set()


@functools.cache
def interpreted(member: Any) -> Callable[..., Any]:
    """A built-in function of triton.language as the interpreter calls it, with its own semantics whatever is given."""
    inner = member
    while getattr(inner, "__code__", None) in _WRAPPERS:
        inner = inspect.getclosurevars(inner).nonlocals["fn"]

    def call(*args: Any, _semantic: Any = None, **keywords: Any) -> Any:
        return inner(*args, _semantic=OURS, **keywords)

    return call


def cast(self: Any, input: Any, dst_ty: Any, *rest: Any, **keywords: Any) -> Any:  # noqa: A002 - as there
    if input.dtype is dst_ty:
        return input
    return _general["cast"](self, input, dst_ty, *rest, **keywords)  # type: ignore[misc]


def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
    of_left, of_right = lhs.type, rhs.type
    blocks = type(of_left) is tl.block_type, type(of_right) is tl.block_type
    if not any(blocks) or (all(blocks) and of_left.shape is of_right.shape):  # equal shapes are one: see lookups.py
        return lhs, rhs
    return _general["broadcast_impl_value"](self, lhs, rhs)  # type: ignore[misc]


def computation_type_impl(self: Any, a_ty: Any, a_is_scalar: bool, b_ty: Any, b_is_scalar: bool, division: bool) -> Any:
    key = a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, division
    if key not in _computed:
        general = _general["computation_type_impl"]
        _computed[key] = general(self, a_ty, a_is_scalar, b_ty, b_is_scalar, division)  # type: ignore[misc]
    return _computed[key]


def _unwrap_if_constexpr(o: Any) -> Any:
    kind = type(o)
    if kind in _PLAIN:
        return o
    return o.value if kind is tl.constexpr else _unwrap(o)  # type: ignore[misc]


def _equal_dtypes(self: Any, other: Any) -> Any:
    return True if self is other else _equal(self, other)


def take() -> None:
    """For this process, as far as its Triton has what is replaced."""
    for name, shorter in zip(SEMANTICS, (cast, broadcast_impl_value, computation_type_impl)):
        if _general[name] is not None:
            setattr(TritonSemantic, name, shorter)
    if _unwrap is not None:
        tl.core._unwrap_if_constexpr = _unwrap_if_constexpr
    tl.dtype.__eq__ = _equal_dtypes  # type: ignore[method-assign]
