"""Cases of the whole layer: the properties of `test_mixture`, run by hypothesis in chunks, each with a seed of its own.

A failing example is shrunk, and kept in `.hypothesis/campaign`, as by pytest; the next run tries it first. What was
drawn before counts once. An index finds its case with the same version of hypothesis; its repr, --example, with any.
"""

from __future__ import annotations

import ast
import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import Phase
from hypothesis.database import DirectoryBasedExampleDatabase

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import harness  # noqa: E402
import test_mixture  # noqa: E402
from strategies import COTANGENTS, LAYOUTS, MASKS, VALUES, LayerCase, layer_cases  # noqa: E402

import optimized  # noqa: E402
from reference.contract import Config, RouterOptions  # noqa: E402

from .kind import Setting, broke_the_device  # noqa: E402
from .tally import Failure, Tally  # noqa: E402

NAME = "layer"
CHUNK = 50
KEPT = ROOT / ".hypothesis" / "campaign"


@dataclass(frozen=True)
class Lane:
    """A property under a dtype; chunks take turns."""

    name: str
    dtype: str
    values: tuple[str, ...] = VALUES

    def check(self, case: LayerCase, setting: Setting) -> None:
        """Raises AssertionError."""
        if self.name == "injected routes":
            test = inner(test_mixture.test_optimized_matches_with_injected_routes)
            test(setting.kernels, case, getattr(torch, self.dtype), setting.device)
        else:
            inner(test_mixture.test_optimized_matches_with_its_own_routers)(setting.kernels, case, setting.device)

    def case_as_run(self, case: LayerCase) -> LayerCase:
        """What the property makes of it."""
        if self.name != "injected routes":
            return case
        return test_mixture.sized_for_half(case) if self.dtype in ("bfloat16", "float16") else case


LANES = (
    *(Lane("injected routes", dtype) for dtype in ("float64", "float32", "bfloat16", "float16")),
    Lane("own routers", "float64", ("normal",)),
)
CHOICE = ("N <= K", "K < N <= K * 9/8", "beyond")
LEVELS = {
    "property": tuple(dict.fromkeys(lane.name for lane in LANES)),
    "dtype": ("float64", "float32", "bfloat16", "float16"),
    "length": ("1", "2 - 16", "17 - 32", "33 and more"),
    "batch": ("1", "2", "3"),
    "experts": ("1", "2", "3"),
    "heads": ("1", "2", "3"),
    "dim_head": ("2", "8", "10"),
    "queries": CHOICE,
    "keys and values": CHOICE,
    "window": ("no local attention", "1 - 5", "more", "all tokens"),
    "context": ("x itself", "another"),
    "rotary": ("False", "True"),
    "prenorm": ("False", "True"),
    "average": ("False", "True"),
    "solver": ("iterative", "exact"),
    "straight through": ("False", "True"),
    "cosine": ("False", "True"),
    "values": VALUES,
    "mask": (*MASKS, "long_suffix"),
    "layout": LAYOUTS,
    "cotangent": COTANGENTS,
}


def levels(lane: Lane, case: LayerCase) -> tuple[int, ...]:
    case = lane.case_as_run(case)
    n, m = case.n, case.context or case.n
    choices = [CHOICE[(length > k) + (length > k * 9 / 8)] for length, k in ((n, case.k_q), (m, case.k_kv))]
    window = "no local attention"
    if case.window is not None:
        window = "all tokens" if case.window >= n - 1 else "1 - 5" if case.window <= 5 else "more"
    names = (
        lane.name,
        lane.dtype,
        LEVELS["length"][(n > 1) + (n > 16) + (n > 32)],
        *map(str, (case.batch, case.experts, case.heads, case.dim_head)),
        *choices,
        window,
        "x itself" if case.context is None else "another",
        *map(str, (case.rotary, case.prenorm, case.average)),
        case.options.get("solver", "iterative"),
        str(case.options.get("straight_through", True)),
        str(case.options.get("cosine_sim_routing", False)),
        case.values,
        case.mask,
        case.layout,
        case.cotangent,
    )
    return tuple(of.index(name) for of, name in zip(LEVELS.values(), names))


def inner(test: Any) -> Callable[..., None]:
    """The property beneath @given and the count of its examples."""
    return test.hypothesis.inner_test.__wrapped__


def run(first: int, count: int, setting: Setting) -> Tally:
    """Whole chunks: examples depend on those before them."""
    tally = Tally()
    for chunk in range(first // CHUNK, -(-(first + count) // CHUNK)):
        _run_chunk(LANES[chunk % len(LANES)], chunk, setting, tally, (Phase.generate, Phase.shrink))
    return tally


def run_kept(setting: Setting) -> Tally:
    """Examples that failed in earlier runs."""
    tally = Tally()
    for lane in LANES:
        _run_chunk(lane, 0, setting, tally, (Phase.reuse,))
    return Tally(failures=tally.failures)


def snippet(lane: Lane, case: LayerCase, setting: Setting) -> str:
    """A repr has no double quotes."""
    own = " --own-routers" if lane.name == "own routers" else f" --dtype {lane.dtype}"
    return f'{setting.command(NAME)}{own} --example "{case!r}"'


def _run_chunk(
    lane: Lane,
    chunk: int,
    setting: Setting,
    tally: Tally,
    phases: tuple[Phase, ...],
    seen: Callable[[LayerCase], None] = lambda case: None,
    given: LayerCase | None = None,
) -> None:
    """given: the only case, by Phase.explicit."""
    failing: list[LayerCase] = []
    covered = []

    def example(case: LayerCase) -> None:
        ledger = harness.begin(setting.kernels)
        try:
            lane.check(case, setting)
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

    def enter(case: LayerCase, ledger: harness.Ledger, missed: float = math.inf) -> None:
        """missed: the fraction of the budget that was missed, which the ledger does not tell."""
        digest = hashlib.blake2b(f"{lane.name} {case!r}".encode(), digest_size=6).hexdigest()
        if digest in tally.small.get(lane.dtype, ()):
            return
        tally.count(lane.dtype, digest)
        covered.append(levels(lane, case))
        for (stage, dtype, _), fraction in ledger.worst.items():
            name = stage if lane.name == "injected routes" else f"{stage} with its own routers"
            fraction = missed if math.isinf(fraction) else fraction
            tally.enter(name, dtype, np.array([fraction]), [snippet(lane, case, setting)])

    before, device = harness.current, harness.DEVICE
    harness.DEVICE = setting.device
    where = KEPT / f"{lane.name}-{lane.dtype}-{setting.device.type}-{setting.kernels}".replace(" ", "-")
    settings = hypothesis.settings(
        max_examples=CHUNK,
        database=DirectoryBasedExampleDatabase(where),
        deadline=None,
        derandomize=False,
        phases=phases,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    property_ = hypothesis.given(case=layer_cases(values=lane.values))(example)
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
        again = setting.snippet(NAME, str(chunk * CHUNK)) if case is None else snippet(lane, case, setting)
        tally.failures.append(Failure(f"{lane.name} {lane.dtype} {case}: {error}", again))
    finally:
        harness.current, harness.DEVICE = before, device
        tally.cover(LEVELS, covered)


def parse_example(text: str) -> LayerCase:
    """The repr of a case, of which nothing but literals is read. Raises ValueError."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "LayerCase"):
            raise ValueError("another expression")
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("arguments without a name")
        given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if len(given) != len(call.keywords):
            raise ValueError("an argument twice")
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"expected LayerCase(name=literal, ...), got {text!r} ({error})") from None
    for name, value in given.items():
        expected = _expected(name, value)
        if expected:
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
    case = LayerCase(**given)
    try:
        RouterOptions.of_module(case.options)
        Config.of(**case.arguments())
    except TypeError as error:
        raise ValueError(str(error)) from None
    return case


def _expected(name: str, value: Any) -> str | None:
    """What a field may be; None where the value is that."""
    words = {"values": VALUES, "mask": (*MASKS, "long_suffix"), "layout": LAYOUTS, "cotangent": COTANGENTS}
    known = {f.name: f for f in fields(LayerCase)}
    if name not in known:
        return f"one of {', '.join(known)}"
    if name in words:
        return None if value in words[name] else f"one of {', '.join(words[name])}"
    if name == "options":
        fits = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        return None if fits else "options of the routers by name"
    if isinstance(known[name].default, bool):
        return None if isinstance(value, bool) else "True or False"
    if value is None and known[name].default is None:
        return None
    least = 0 if name == "seed" else 1
    return None if type(value) is int and value >= least else f"an integer >= {least}"


def run_example(case: LayerCase, dtype: str, own_routers: bool, setting: Setting) -> Tally:
    """One case."""
    lane = LANES[-1] if own_routers else next(lane for lane in LANES if lane.dtype == dtype)
    tally = Tally()
    _run_chunk(lane, 0, setting, tally, (Phase.explicit,), given=case)
    return tally


def describe(index: int, setting: Setting) -> str:
    """By running its chunk: what hypothesis draws depends on what became of earlier draws."""
    cases: list[LayerCase] = []
    chunk = index // CHUNK
    lane = LANES[chunk % len(LANES)]
    _run_chunk(lane, chunk, setting, Tally(), (Phase.generate,), cases.append)
    if index % CHUNK >= len(cases):
        return f"chunk {chunk} ends after {len(cases)} cases"
    case = cases[index % CHUNK]
    return f"{lane.name}, {lane.dtype}: {case}\n{snippet(lane, case, setting)}"
