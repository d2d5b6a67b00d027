"""Triton's interpreter without what it does again and again, which is half of the time of a small kernel.

It replaces the functions of triton.language at each launch, and asks for what is left to replace at each call of one
jitted function by another: it looks through all members of six namespaces. And it makes a table of dtypes at each
operation. Here both are looked up once.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_find_dtype = getattr(interpreter, "_get_np_dtype", None)
_dtypes: dict[str, Any] = {}  # NumPy's, by the name of Triton's


@functools.cache
def builtins_of(namespace: Any) -> list[tuple[str, Any]]:
    """Names and functions that are to be replaced; asked before any is."""
    return [(name, member) for name, member in inspect.getmembers(namespace) if tl.core.is_builtin(member)]


def _replace(namespace: Any, builder: Any, scope: Any) -> None:
    known = builtins_of(namespace)
    if known and getattr(namespace, known[0][0]) is not known[0][1]:
        return  # all are, by the launch or by an earlier call
    for name, member in known:
        interpreter._patch_attr(namespace, name, member, builder, scope)


def _dtype(dtype: Any) -> Any:
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    if scalar.name not in _dtypes:
        assert _find_dtype is not None
        _dtypes[scalar.name] = _find_dtype(scalar)
    return _dtypes[scalar.name]


def look_up_once() -> None:
    """For this process, as far as its Triton has these two: it may look up as often as it likes in another version."""
    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = _replace
    if _find_dtype is not None:
        interpreter._get_np_dtype = _dtype
