"""Looks for the smallest example that breaks a property."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any
from unittest import SkipTest

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis.errors import HypothesisException, Unsatisfiable

from tests.conformance.registry import Property
from tests.conformance.subject import NotOffered, Subject, describe
from tests.strategies import LayerCase

HOLDS, FAILS, NOT_OFFERED = "holds", "FAILS", "not offered"


@dataclass(frozen=True)
class Verdict:
    """reason: of a failure, or of what is not offered. example, snippet: of a failure, the smallest case found."""

    name: str
    title: str
    what: str
    verdict: str
    reason: str = ""
    example: str = ""
    snippet: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def examine(
    prop: Property,
    subject: Subject,
    spec: str,
    examples: int,
    *,
    shrink: bool = True,
    begin: Callable[[LayerCase], None] = lambda case: None,
) -> Verdict:
    """Draws the same configurations in every run. spec: module:callable, for the snippet. begin: told of each."""
    last: list[LayerCase] = []
    lacking: list[str] = []
    checked = 0
    declared, undeclared = subject.features, set()
    if declared is not None and (missing := prop.needs - declared):
        return verdict(prop, NOT_OFFERED, f"features: no {', '.join(sorted(missing))}")

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(prop.cases)
    def run(case: LayerCase) -> None:
        nonlocal checked
        if declared is not None and (missing := subject.asked_by(case) - declared):
            undeclared.update(missing)
            hypothesis.reject()
        last[:] = [case]
        begin(case)
        try:
            prop.check(subject, case)
        except NotOffered as error:
            if declared is not None and error.lacks in declared:
                raise AssertionError(f"features has {error.lacks}, but {error}") from error
            lacking.append(describe(error).removeprefix("NotOffered: ").partition("\n")[0])
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, (HypothesisException, SkipTest)):
                raise
            # It ends the interpreter, or the test: by sys.exit, pytest.skip, hypothesis.assume. What has not been run
            # to its end is no pass.
            raise AssertionError(describe(error)) from error
        else:
            checked += 1

    try:
        run()
    except Exception as error:
        if isinstance(error, Unsatisfiable) and undeclared and not last:
            return verdict(prop, NOT_OFFERED, f"features: no {', '.join(sorted(undeclared))}")
        # Hypothesis has run the smallest example last.
        return failure(prop, describe(error), spec, subject.device, last[0] if last else None)
    if not checked:
        return verdict(prop, NOT_OFFERED, lacking[0])
    part = f"{len(lacking)} of {checked + len(lacking)} configurations are not offered: {lacking[0]}" if lacking else ""
    return verdict(prop, HOLDS, part)


def verdict(prop: Property, kind: str, reason: str = "", example: str = "", snippet: str = "") -> Verdict:
    return Verdict(prop.name, prop.title, prop.what, kind, reason, example, snippet)


def failure(
    prop: Property, reason: str, spec: str, device: torch.device | str, case: LayerCase | None = None
) -> Verdict:
    """case: None, if it failed before there was any."""
    if case is None:
        return verdict(prop, FAILS, reason)
    return verdict(prop, FAILS, reason, brief(case), snippet(prop, spec, device, case))


def _unusual(case: LayerCase) -> dict[str, Any]:
    default = type(case)()
    given = {f.name: getattr(case, f.name) for f in fields(case) if f.name not in case.LETTERS}
    return {name: value for name, value in given.items() if value != getattr(default, name)}


def brief(case: LayerCase) -> str:
    """The case for a reader: sizes, and whatever is not at its default."""
    sizes = " ".join(f"{letter}={getattr(case, name)}" for name, letter in case.LETTERS.items())
    return " ".join((sizes, *(f"{name}={value}" for name, value in _unusual(case).items())))


def as_python(case: LayerCase) -> str:
    """Python that rebuilds the case, formatted as a formatter would."""
    given = {name: getattr(case, name) for name in case.LETTERS} | _unusual(case)
    lines = (f"    {name}={value!r},\n".replace("'", '"') for name, value in given.items())
    return f"{type(case).__name__}(\n{''.join(lines)})"


def snippet(prop: Property, spec: str, device: torch.device | str, case: LayerCase) -> str:
    module, _, name = spec.partition(":")
    drawn, subject = type(case), prop.subject
    imports = [(module, name), (prop.module, prop.name), *((c.__module__, c.__name__) for c in (subject, drawn))]
    return (
        "".join(f"from {module} import {name}\n" for module, name in imports)
        + f"\ncase = {as_python(case)}\n"
        + f'{prop.name}({subject.__name__}({name}, "{device}"), case)\n'
    )
