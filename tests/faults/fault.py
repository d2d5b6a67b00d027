"""What a fault is, and an implementation that has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import optimized
import reference
from tests.faults.taxonomy import classify

FAULTS: dict[str, Fault] = {}  # every one of the files beside this, once `registry` is imported


@dataclass(frozen=True)
class Fault:
    """why: a class of bugs or a public bug (see `taxonomy.classify`). Registers itself by its name, which is unique."""

    name: str
    why: str

    def __post_init__(self) -> None:
        classify(self.why)
        if FAULTS.setdefault(self.name, self) is not self:
            raise ValueError(f"name: expected that of no other fault, got {self.name!r}")


def named(function: Callable[..., Any]) -> str:
    """a_percent_off -> "a percent off"."""
    return function.__name__.replace("_", " ")


def package(layer: Callable[..., Any], functions: Mapping[str, Callable[..., Any]]) -> ModuleType:
    """In place of an implementation: the layer, the functions, then the reference, then what `optimized` alone has."""
    made = ModuleType("faulty")
    for source in (optimized, reference):
        vars(made).update({name: getattr(source, name) for name in source.__all__})
    vars(made).update({**functions, "MixtureOfAttention": layer})
    return made
