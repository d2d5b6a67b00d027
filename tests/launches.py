"""Which kernels there are, which of them a call launches with what constants, and the sizes at which these change."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from cases import Inputs, Sizes, all_on, each

import optimized.kernels as package
from optimized.kernels.launch import CHUNK, MAX_BLOCK_D, ROWS_IN_REGISTERS


def modules() -> dict[str, ModuleType]:
    """Of the kernels."""
    return {
        entry.name: importlib.import_module(f"{package.__name__}.{entry.name}")
        for entry in pkgutil.iter_modules(package.__path__)
    }


def kernels_of(module: ModuleType) -> set[str]:
    """Names of Triton functions, compiled or interpreted, that end in `_kernel`: those that are launched."""
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    found = ((name, value) for name, value in vars(module).items() if name.endswith("_kernel"))
    return {name for name, value in found if isinstance(value, (JITFunction, InterpretedFunction))}


def all_kernels() -> set[str]:
    return set().union(*map(kernels_of, modules().values()))


def name_of(kernel: Any) -> str:
    return kernel.fn.__name__


@contextmanager
def launching_by(replacement: Callable[..., None]) -> Iterator[None]:
    """The wrappers launch by another function."""
    with ExitStack() as patches:
        for module in modules().values():
            if hasattr(module, "launch") and not hasattr(module, "launch_compiled"):
                patches.enter_context(mock.patch.object(module, "launch", replacement))
        yield


def reached(call: Callable[[], Any]) -> set[tuple[Any, ...]]:
    """Kernel, and constants but for the sizes of blocks, of all that a call launches; nothing runs."""
    found = set()

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        named = {n: str(value) for n, value in constants.items() if n == "ONE_BLOCK" or "BLOCK" not in n}
        found.add((name_of(kernel), *sorted(named.items())))

    with launching_by(record):
        call()
    return found


class Axis(NamedTuple):
    """Along which the cases of a family change configuration; field: the size that does it."""

    field: str
    sizes: list[int]
    base: Sizes

    def at(self, size: int) -> Sizes:
        return self.base._replace(**{self.field: size})


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


AXES = {
    "rows": Axis("n", [*_powers(most := max(ROWS_IN_REGISTERS // 4, CHUNK)), most + 1], Sizes(batch=1, steps=5)),
    "channels": Axis("dim", [*_powers(MAX_BLOCK_D), MAX_BLOCK_D + 1], Sizes(n=20)),
    "heads": Axis("dim_head", _powers(512)[1:], Sizes()),
}


@functools.cache
def configurations(family: str, size: int) -> set[tuple[Any, ...]]:
    """In float32 (of float64: test_boundaries.py), on zeros."""
    x, s = Inputs(torch.device("cpu"), torch.float32, blank=True), AXES[family].at(size)
    return set().union(*(reached(lambda c=c, on=on: c.results(x, s, **on)) for _, c, on in each([family], all_on)))


def sizes_of(family: str) -> list[int]:
    """The smallest and the largest size at which a kernel has some number of warps, rows of a tile, or loop."""
    classes: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for size in AXES[family].sizes:
        for configuration in configurations(family, size):
            classes[configuration].append(size)
    return sorted({size for found in classes.values() for size in (min(found), max(found))})
