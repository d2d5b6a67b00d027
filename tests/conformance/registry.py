"""A property is a function of a `Subject` and a `LayerCase` that raises where the layer is wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.conformance.subject import Subject
from tests.strategies import LayerCase

Check = Callable[[Subject, LayerCase], None]


@dataclass(frozen=True)
class Property:
    """needs: features of a layer (`Subject.FEATURES`), beside those that a case shows. subject: what is checked."""

    check: Check
    cases: st.SearchStrategy[LayerCase]
    needs: frozenset[str] = frozenset()
    subject: type[Subject] = Subject

    @property
    def name(self) -> str:
        return self.check.__name__

    @property
    def module(self) -> str:
        return self.check.__module__

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    @property
    def what(self) -> str:
        return inspect.getdoc(self.check) or ""


REGISTERED: list[Property] = []


def checked_on(
    cases: st.SearchStrategy[LayerCase], needs: tuple[str, ...] = ("state_dict",), subject: type[Subject] = Subject
) -> Callable[[Check], Check]:
    """Registers a property under the name of its function. The docstring is what the report says that it checks."""

    def register(check: Check) -> Check:
        REGISTERED.append(Property(check, cases, frozenset(needs), subject))
        return check

    return register
