"""FLOPs of our operators for torch.utils.flop_counter, told when somebody imports it: it imports Triton."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def count(target: Any, formula: Callable[..., int]) -> None:
    """formula(*arguments of the operator `target`, out_val=its results): FLOPs."""
    _formulas[target] = formula
    if COUNTER in sys.modules:
        from torch.utils import flop_counter

        flop_counter.register_flop_formula(target, get_raw=True)(formula)


class _Finder(MetaPathFinder):
    """Finds that module by the other finders, and no other."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((s for s in found if s is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads by another, then tells all formulas that wait; whatever else it is asked for is the other's."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for target, formula in tuple(_formulas.items()):
            module.register_flop_formula(target, get_raw=True)(formula)


sys.meta_path.insert(0, _Finder())
