"""Triton's interpreter without what it does again and again, which is more than half of the time of a small kernel.

It replaces the functions of triton.language at each launch, and asks for what is left to replace at each call of one
jitted function by another: it looks through all members of six namespaces. It makes a table of dtypes at each
operation, and checks and prints the shape of each result. Here all are looked up once. And it computes whether a sum
overflows, for an assertion that it makes in debug mode alone.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

from optimized.prove import shortcuts

_find_dtype = getattr(interpreter, "_get_np_dtype", None)
_patch_lang = getattr(interpreter, "_patch_lang", None)
_make_block, _make_tensor = tl.block_type.__init__, tl.tensor.__init__
_dtypes: dict[str, Any] = {}  # NumPy's, by the name of Triton's
_blocks: dict[Any, dict[str, Any]] = {}  # attributes of a type, by its elements' and its shape
_shapes: dict[tuple[int, ...], Any] = {}  # of them, one object for equal ones
_blocks_at: dict[Any, dict[str, Any]] = {}  # as _blocks, by the identity of such an object
_tensors: dict[tuple[Any, str], tuple[Any, ...]] = {}  # what a tensor knows of its type, by the type


@functools.cache
def builtins_of(namespace: Any) -> list[tuple[str, Any]]:
    """Names and functions that are to be replaced; asked before any is."""
    return [(name, member) for name, member in inspect.getmembers(namespace) if tl.core.is_builtin(member)]


def _is_replaced(namespace: Any) -> bool:
    known = builtins_of(namespace)
    return bool(known) and getattr(namespace, known[0][0]) is not known[0][1]


def _replace(namespace: Any, builder: Any, scope: Any) -> None:
    if _is_replaced(namespace):
        return  # all are, by the launch or by an earlier call
    for name, member in builtins_of(namespace):
        scope.set_attr(namespace, name, shortcuts.interpreted(member))


@functools.cache
def _languages(function: Any) -> list[Any]:
    """What it knows of triton.language: its functions are there too, where its own file is of Triton's."""
    return [
        tl.tensor,
        *(value for value in function.__globals__.values() if any(value is known for known in (tl, tl.core))),
    ]


def _replace_all(function: Any) -> Any:
    """Nothing where the launch, or an earlier call, has replaced all that the function knows."""
    if all(_is_replaced(language) for language in _languages(function)):
        return interpreter._LangPatchScope()
    assert _patch_lang is not None
    return _patch_lang(function)


def _dtype(dtype: Any) -> Any:
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    if scalar.name not in _dtypes:
        assert _find_dtype is not None
        _dtypes[scalar.name] = _find_dtype(scalar)
    return _dtypes[scalar.name]


def _block(self: Any, element_ty: Any, shape: Any) -> None:
    """Of a type that is known, what was found of the first of its kind."""
    kind, name = type(element_ty), element_ty.name
    at = kind, name, id(shape)
    known = _blocks_at.get(at)
    if known is None:
        if any(type(size) is not int for size in shape):
            _make_block(self, element_ty, shape)
            return
        sizes = tuple(shape)
        known = _blocks.get((kind, name, sizes))
        if known is None:
            _make_block(self, element_ty, shape)
            self.shape = _shapes.setdefault(sizes, self.shape)
            known = _blocks[kind, name, sizes] = dict(vars(self))
        if shape is known["shape"]:
            _blocks_at[at] = known
    vars(self).update(known)


def _tensor(self: Any, handle: Any, type: Any) -> None:  # noqa: A002 - as there
    key = type.__class__, type.name
    known = _tensors.get(key)
    if known is None:
        _make_tensor(self, handle, type)
        _tensors[key] = self.shape, self.numel, self.dtype
        return
    self.handle, self.type = handle, type
    self.shape, self.numel, self.dtype = known


def look_up_once() -> None:
    """For this process, as far as its Triton has these: it may look up as often as it likes in another version."""
    has_scopes = hasattr(getattr(interpreter, "_LangPatchScope", None), "set_attr")
    if hasattr(interpreter, "_patch_builtin") and has_scopes and shortcuts.OURS is not None:
        interpreter._patch_builtin = _replace
        if _patch_lang is not None:
            interpreter._patch_lang = _replace_all
    if _find_dtype is not None:
        interpreter._get_np_dtype = _dtype
    tl.block_type.__init__, tl.tensor.__init__ = _block, _tensor
    shortcuts.take()
    builder: Any = getattr(interpreter, "interpreter_builder", None)
    options: Any = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not options.debug:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
