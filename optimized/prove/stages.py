"""Every stage of the layer in one dtype against the reference in float64.

Three parties compute the same: the reference in float64 (oracle), the reference in the dtype under test (baseline), and
this package. `reference.testing` says how far the last may be from the first. Decisions are compared apart from values,
and then the oracle and the baseline are handed those of the package.

Where terms cancel (a softmax over keys that are nearly alike, the norm of a token whose channels are) or a cold
exponential multiplies (the solver's), rounding costs many units in the last place of the result, and in few numbers the
baseline may be spared by chance. So the oracle computes everything again with each number a relative 2^-20 off
(`nudged`). By how much a result changes, over that, is the budget's `scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import optimized
import reference
from optimized.prove.arguments import DTYPES
from optimized.prove.decisions import SIDES, check_selection, decide
from optimized.prove.measure import Measured, measure
from optimized.prove.nudged import DRAWS, Nudged, size_of
from optimized.prove.party import Decision, Party
from optimized.prove.setup import Setup
from optimized.routing import Routes
from reference.testing import assert_matches, kind_of

STEPS = 7  # that `tick` is told of


@dataclass
class Row:
    """A stage compared. verdict: largest fraction of the budget that an error took, or what else was found.

    note: which results the oracle says are all zero, or all the same, if any.
    """

    stage: str
    backend: str
    dtype: str
    verdict: str
    failure: str | None = None
    note: str | None = None
    measured: tuple[Measured, Measured] | None = None  # reference, optimized


class Proof(NamedTuple):
    """rows: one for each stage. routes: the package's, without graph. soft: its query soft scores (1, E, N), which aim
    at a sum of mass. backends: of the layer's own call, in words.
    """

    rows: list[Row]
    routes: tuple[Routes, Routes]
    soft: Tensor
    mass: float
    backends: str


def prove(setup: Setup, name: str, tick: Callable[[str], None]) -> Proof:
    """Compare all stages in one dtype. `tick` is told what comes next, STEPS times."""
    dtype = DTYPES[name]
    oracle, baseline = (Party(reference, d, dtype, setup) for d in (torch.float64, dtype))
    actual = Party(optimized, dtype, dtype, setup)
    roundings = [Nudged(dtype, draw) for draw in range(DRAWS)]
    nudged = [Party(reference, torch.float64, dtype, setup, rounding) for rounding in roundings]
    parties = (actual, oracle, baseline, *nudged)
    rows: list[Row] = []

    def compare(call: Callable[[Party], Any]) -> tuple[list[Any], tuple[Measured, Measured]]:
        """Results of all parties, actual first, and the figures of (reference, optimized)."""
        base, mine = (measure(partial(call, party), setup.device) for party in (baseline, actual))
        values = [mine.value, call(oracle), base.value]
        for rounding, party in zip(roundings, nudged):
            with rounding:
                values.append(call(party))
        return values, (base, mine)

    def handed(party: Party) -> list[Decision] | None:
        return None if party is actual else decisions

    def add(stage: str, part: str, result: tuple[str | None, ...], measured: Any = None) -> None:
        verdict, failure, note = (*result, None)[:3]
        assert verdict is not None
        rows.append(Row(stage, backends[part].backend, name, verdict, failure, note, measured))

    tick("warming up")
    for party in (baseline, actual):
        party.warm_up()
    backends = optimized.explain(actual.layer, actual.x).stages
    own_call = ", ".join(f"{part} {report.backend}" for part, report in backends.items())
    with torch.no_grad():
        tick("routing")
        routes, measured = compare(Party.route)
        logits = [by_side(r.logits for r in pair) for pair in routes]
        add("routing logits", "routing", fraction("logits", dtype, *logits))
        soft = [by_side(party.soft_scores(pair)) for party, pair in zip(parties, routes)]
        decisions, failure = decide(actual, *routes[:2])
        result = fraction("scores", dtype, *soft)
        add("routing scores", "routing", ("FAIL", failure) if failure and not result[1] else result)
        add("selection", "routing", check_selection(*routes[:2]), measured)

        tick("routed attention")
        injected = tuple(map(actual.fixed, decisions))
        # Injected routes may hold masked slots, which not every backend can hide.
        backends = optimized.explain(actual.layer, actual.x, routes=injected).stages
        y, measured = compare(lambda party: party.routed_attention(decisions))
        add(
            "routed attention",
            "routed_attention",
            fraction("routed_attention", dtype, *({"y": t} for t in y)),
            measured,
        )
        tick("local attention")
        local, measured = compare(Party.local_attention)
        add(
            "local attention",
            "local_attention",
            fraction("local_attention", dtype, *({"y": t} for t in local)),
            measured,
        )
        tick("combination")
        terms, beside = (exact.to(dtype) for exact in (y[1], local[1]))
        del y, local
        out, measured = compare(lambda party: party.combine(terms, beside, decisions[0]))
        add("combination", "mixture", fraction("combine", dtype, *({"out": t} for t in out)), measured)

        tick("layer, forward")
        forward = [measure(partial(party.forward, handed(party)), setup.device) for party in (baseline, actual)]
    tick("layer, forward and backward")
    runs, measured = compare(lambda party: party.backward(handed(party)))
    add("layer output", "mixture", fraction("mixture", dtype, *({"out": out} for out, _ in runs)), forward)
    routers = [parameter for parameter in setup.state if "router" in parameter]
    for title, stage, names in (
        ("gradients (x)", "mixture_gradient", ["x"]),
        ("gradients (parameters)", "mixture_gradient", [p for p in setup.state if p not in routers]),
        ("gradients (routers)", "router_gradient", routers),
    ):
        add(title, "mixture", fraction(stage, dtype, *({n: gradients[n] for n in names} for _, gradients in runs)))
    rows[-1].measured = measured
    return Proof(rows, tuple(routes[0]), soft[0]["query"], actual.mass, own_call)


def fraction(
    stage: str,
    dtype: torch.dtype,
    actual: dict[str, Tensor],
    oracle: dict[str, Tensor],
    baseline: dict[str, Tensor],
    *nudged: dict[str, Tensor],
) -> tuple[str, str | None, str | None]:
    """Verdict, failure and note for tensors by name. dtype: what a nudge stands for a rounding to."""
    used: dict[str, float] = {}
    failures, degenerate = [], {}
    for name, exact in oracle.items():
        kind = kind_of(exact)
        if kind in ("zeros", "constant"):
            degenerate[name] = kind
        size = size_of(actual[name].dtype, dtype)
        scale = max((other[name] - exact).abs().max().item() / size for other in nudged)
        try:
            match = assert_matches(
                actual[name], exact, baseline[name], stage=stage, name=name, expect=degenerate.get(name), scale=scale
            )
            used[name] = match.fraction
        except AssertionError as error:
            failures.append(str(error))
    note = "; ".join(f"{name}: expected {kind}" for name, kind in degenerate.items()) or None
    if failures:
        return "FAIL", "\n".join(failures), note
    if set(degenerate.values()) == {"zeros"} and len(degenerate) == len(oracle):
        return "zeros", None, note
    return f"{max(used.values()):.2f}", None, note


def by_side(values: Iterable[Tensor]) -> dict[str, Tensor]:
    return dict(zip(SIDES, values))
