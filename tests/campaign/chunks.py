"""Kinds whose cases hypothesis draws: properties of the suite, run in chunks with a seed of their own.

A failing example is shrunk, and kept in `.hypothesis/campaign`, as by pytest; the next run tries it first. What was
drawn before counts once. An index finds its case with the same version of hypothesis; its repr, --example, with any.
"""

from __future__ import annotations

import ast
import hashlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import hypothesis
import numpy as np
from hypothesis import Phase
from hypothesis.database import DirectoryBasedExampleDatabase

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import harness  # noqa: E402

import optimized  # noqa: E402

from .kind import Setting, broke_the_device  # noqa: E402
from .tally import Failure, Tally  # noqa: E402


@dataclass(frozen=True)
class Lane:
    """A property under a dtype; chunks take turns."""

    name: str
    dtype: str

    @property
    def option(self) -> str:
        """The name on the command line."""
        return self.name.replace(" ", "-")


class Drawn(ABC):
    """A kind of case that hypothesis draws. CASE: a dataclass, whose repr is Python made of literals alone.

    LANES: the first one of a dtype is what --dtype means without --property. LEVELS: of each parameter.
    """

    NAME: ClassVar[str]
    CASE: ClassVar[type]
    LANES: ClassVar[tuple[Lane, ...]]
    LEVELS: ClassVar[Mapping[str, Sequence[str]]]
    CHUNK = 50
    KEPT = ROOT / ".hypothesis" / "campaign"

    @abstractmethod
    def cases(self, lane: Lane) -> Any:
        """The strategy of its cases."""

    @abstractmethod
    def check(self, lane: Lane, case: Any, setting: Setting) -> None:
        """Raises AssertionError, or UnsatisfiedAssumption for what is no case of the lane."""

    @abstractmethod
    def names(self, lane: Lane, case: Any) -> Sequence[str]:
        """Levels of a case, one of each parameter."""

    @abstractmethod
    def expected(self, name: str, value: Any) -> str | None:
        """What a field may be; None where the value is that."""

    @abstractmethod
    def validate(self, case: Any) -> None:
        """Raises TypeError or ValueError where fields don't fit one another."""

    def quantity(self, lane: Lane, stage: str) -> str:
        """What a report calls the errors of a stage."""
        return stage

    def run(self, first: int, count: int, setting: Setting) -> Tally:
        """Whole chunks: examples depend on those before them."""
        tally = Tally()
        for chunk in range(first // self.CHUNK, -(-(first + count) // self.CHUNK)):
            self._run_chunk(self._lane(chunk), chunk, setting, tally, (Phase.generate, Phase.shrink))
        return tally

    def run_kept(self, setting: Setting) -> Tally:
        """Examples that failed in earlier runs."""
        tally = Tally()
        for lane in self.LANES:
            self._run_chunk(lane, 0, setting, tally, (Phase.reuse,))
        return Tally(failures=tally.failures)

    def run_example(self, case: Any, lane: Lane, setting: Setting) -> Tally:
        """One case."""
        tally = Tally()
        self._run_chunk(lane, 0, setting, tally, (Phase.explicit,), given=case)
        return tally

    def describe(self, index: int, setting: Setting) -> str:
        """By running its chunk: what hypothesis draws depends on what became of earlier draws."""
        cases: list[Any] = []
        chunk = index // self.CHUNK
        lane = self._lane(chunk)
        self._run_chunk(lane, chunk, setting, Tally(), (Phase.generate,), cases.append)
        if index % self.CHUNK >= len(cases):
            return f"chunk {chunk} ends after {len(cases)} cases"
        case = cases[index % self.CHUNK]
        return f"{lane.name}, {lane.dtype}: {case}\n{self.snippet(lane, case, setting)}"

    def lane(self, dtype: str | None, name: str | None) -> Lane:
        """As the command line names it. Raises ValueError."""
        name = name or self.LANES[0].option
        found = [lane for lane in self.LANES if lane.option == name]
        if not found:
            known = ", ".join(dict.fromkeys(lane.option for lane in self.LANES))
            raise ValueError(f"--property: expected one of {known}, got {name}")
        fitting = [lane for lane in found if lane.dtype == (dtype or "float64")]
        if not fitting:
            known = ", ".join(lane.dtype for lane in found)
            raise ValueError(f"--dtype: expected {known} with --property {name}, got {dtype}")
        return fitting[0]

    def snippet(self, lane: Lane, case: Any, setting: Setting) -> str:
        """A repr has no double quotes."""
        name = "" if lane.name == self.LANES[0].name else f" --property {lane.option}"
        return f'{setting.command(self.NAME)}{name} --dtype {lane.dtype} --example "{case!r}"'

    def parse(self, text: str) -> Any:
        """The repr of a case, of which nothing but literals is read. Raises ValueError."""
        title = self.CASE.__name__
        try:
            call = ast.parse(text.strip(), mode="eval").body
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == title):
                raise ValueError("another expression")
            if call.args or any(keyword.arg is None for keyword in call.keywords):
                raise ValueError("arguments without a name")
            given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
            if len(given) != len(call.keywords):
                raise ValueError("an argument twice")
        except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"expected {title}(name=literal, ...), got {text!r} ({error})") from None
        known = [f.name for f in fields(self.CASE)]
        for name, value in given.items():
            expected = self.expected(name, value) if name in known else f"one of {', '.join(known)}"
            if expected:
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        try:
            case = self.CASE(**given)
            self.validate(case)
        except TypeError as error:
            raise ValueError(str(error)) from None
        return case

    def _lane(self, chunk: int) -> Lane:
        return self.LANES[chunk % len(self.LANES)]

    def _run_chunk(
        self,
        lane: Lane,
        chunk: int,
        setting: Setting,
        tally: Tally,
        phases: tuple[Phase, ...],
        seen: Callable[[Any], None] = lambda case: None,
        given: Any = None,
    ) -> None:
        """given: the only case, by Phase.explicit."""
        failing: list[Any] = []
        covered: list[tuple[int, ...]] = []

        def example(case: Any) -> None:
            ledger = harness.begin(setting.kernels)
            try:
                self.check(lane, case, setting)
            except hypothesis.errors.UnsatisfiedAssumption:
                raise
            except Exception as error:
                seen(case)
                if not failing:
                    excess = Failure(str(error), "").excess()
                    enter(case, ledger, excess[2] if excess else math.inf)
                failing.append(case)
                raise
            if not failing:  # what shrinking tries is no case of its own
                seen(case)
                enter(case, ledger)

        def enter(case: Any, ledger: harness.Ledger, missed: float = math.inf) -> None:
            """missed: the fraction of the budget that was missed, which the ledger does not tell."""
            digest = hashlib.blake2b(f"{lane.name} {case!r}".encode(), digest_size=6).hexdigest()
            if digest in tally.small.get(lane.dtype, ()):
                return
            tally.count(lane.dtype, digest)
            levels = zip(self.LEVELS.values(), self.names(lane, case), strict=True)
            covered.append(tuple(of.index(name) for of, name in levels))
            for (stage, dtype, _), fraction in ledger.worst.items():
                fraction = missed if math.isinf(fraction) else fraction
                again = [self.snippet(lane, case, setting)]
                tally.enter(self.quantity(lane, stage), dtype, np.array([fraction]), again)

        before, device = harness.current, harness.DEVICE
        harness.DEVICE = setting.device
        name = f"{self.NAME}-{lane.option}-{lane.dtype}-{setting.device.type}-{setting.kernels}"
        settings = hypothesis.settings(
            max_examples=self.CHUNK,
            database=DirectoryBasedExampleDatabase(self.KEPT / name),
            deadline=None,
            derandomize=False,
            phases=phases,
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        property_ = hypothesis.given(case=self.cases(lane))(example)
        if given is not None:
            property_ = hypothesis.example(case=given)(property_)
        try:
            with optimized.use_backends(**harness.stages_by(setting.kernels)):
                # In this order: a seed takes the database away from the settings that are there.
                settings(hypothesis.seed(setting.seed * 1_000_003 + chunk)(property_))()
        except Exception as error:
            if broke_the_device(error):
                raise
            if phases == (Phase.reuse,) and not failing:  # nothing was kept
                return
            case = failing[-1] if failing else None
            again = setting.snippet(self.NAME, str(chunk * self.CHUNK))
            again = again if case is None else self.snippet(lane, case, setting)
            tally.failures.append(Failure(f"{lane.name} {lane.dtype} {case}: {error}", again))
        finally:
            harness.current, harness.DEVICE = before, device
            tally.cover(self.LEVELS, covered)


def inner(test: Any) -> Callable[..., None]:
    """The property beneath @given and the count of its examples."""
    return test.hypothesis.inner_test.__wrapped__


def whole(value: Any, least: int) -> str | None:
    """What a field that is an integer may be; None where the value is that."""
    return None if type(value) is int and value >= least else f"an integer >= {least}"


def truth(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def word(value: Any, words: Sequence[str]) -> str | None:
    return None if value in words else f"one of {', '.join(words)}"


def named(value: Any, what: str) -> str | None:
    fits = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    return None if fits else f"{what} by name"
