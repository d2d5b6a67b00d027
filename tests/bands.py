"""The band of every error budget: how much of it correct results use, and how much the faintest of known faults does.

    python -m tests.bands --examples 10000 --out tests/reports/bands-cpu.json    # resumes where FILE ends
    python -m tests.bands --table docs/generated/bands.md                        # the table there, from the report

The suite's own properties run, under the suite's own strategies, with the comparator told to return fractions beyond 1
instead of failing. Each example is compared as it is, then with faults of `RESULTS` in its result; the first chunks run
again with faults of `COMPUTATIONS` inside the reference, which then stands for the implementation. Chunks of 100
examples, as many as an ordinary run has; the same seed draws the same ones.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import hypothesis
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CHUNK = 100
# Before the properties are imported, which take their settings from it.
hypothesis.settings.register_profile(
    "bands",
    max_examples=CHUNK,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("bands")

import harness  # noqa: E402
import record  # noqa: E402
import runs  # noqa: E402
import test_local_attention  # noqa: E402
import test_mixture  # noqa: E402
import test_routed_attention  # noqa: E402
import test_routing  # noqa: E402
from rich.progress import Progress  # noqa: E402

import optimized  # noqa: E402
import reference  # noqa: E402
from reference.testing import STAGES, assert_matches  # noqa: E402

HUGE = 2.0**200  # budgets are linear in c and floor: with both as many times as large nothing fails
LOWER = {torch.float64: torch.float32, torch.float32: torch.bfloat16, torch.float16: torch.bfloat16}
DEVICE = torch.device("cpu")
SOFTMAX = Tensor.softmax


# --- faults of a result ----------------------------------------------------------------------------------------------


def _rows(t: Tensor) -> Tensor:
    """A copy as the rows that the comparator takes."""
    width = next((size for size in reversed(t.shape) if size > 1), 1)
    return t.clone().reshape(-1, width) if t.ndim > 1 else t.clone().reshape(1, -1)


def _row_zeroed(t: Tensor) -> Tensor:
    """That of the median size, of those that are not zero."""
    rows = _rows(t)
    sizes = rows.double().norm(dim=-1)
    rows[(sizes - sizes[sizes > 0].median()).abs().argmin()] = 0
    return rows.view(t.shape)


def _rows_exchanged(t: Tensor) -> Tensor | None:
    """The first two that are not zero."""
    rows = _rows(t)
    found = rows.any(-1).nonzero().flatten()[:2]
    if len(found) < 2 or torch.equal(rows[found[0]], rows[found[1]]):
        return None
    rows[found] = rows[found.flip(0)]
    return rows.view(t.shape)


def _element_lost(t: Tensor) -> Tensor:
    """The largest."""
    out = t.clone()
    out.view(-1)[out.abs().argmax()] = 0
    return out


RESULTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "a row of median size zeroed": _row_zeroed,
    "two rows exchanged": _rows_exchanged,
    "the largest element zeroed": _element_lost,
    "1% too large": lambda t: t * 1.01,
    "10% too large": lambda t: t * 1.1,
    "the next lower precision": lambda t: t.to(LOWER[t.dtype]).to(t.dtype) if t.dtype in LOWER else None,
}


# --- faults of a computation -----------------------------------------------------------------------------------------


def _softmax(change: Callable[[Tensor], Tensor]) -> Any:
    return mock.patch.object(Tensor, "softmax", lambda t, dim: SOFTMAX(change(t), dim))


def _column(t: Tensor, column: int, amount: float) -> Tensor:
    shift = torch.zeros(t.shape[-1], dtype=t.dtype)
    shift[column] = amount
    return t + shift if t.shape[-1] > 1 else t


def _weights_without_the_sum(t: Tensor, dim: int) -> Tensor:
    p = SOFTMAX(t, dim).detach()
    shift = torch.where(p > 0, t - t.detach(), 0)
    return p + p * shift


def _rounded_weights(t: Tensor, dim: int) -> Tensor:
    p = SOFTMAX(t, dim)
    return p.to(LOWER[p.dtype]).to(p.dtype)


def _norm(eps: float, detached: bool) -> Callable[[Tensor, Tensor | None], Tensor]:
    def rms_norm(x: Tensor, gamma: Tensor | None) -> Tensor:
        if gamma is None:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        size = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
        size = size.detach() if detached else size
        normed = torch.where(size > 0, wide / size.clamp_min(1e-30), 0)
        return (normed * gamma[:, None].to(wide.dtype)).to(x.dtype)

    return rms_norm


EINSUM, COMBINE = torch.einsum, reference.combine
ATTEND = sys.modules["reference.routed_attention"].attend  # the function has the module's name


def _summed_in_half(equation: str, x: Tensor, w: Tensor) -> Tensor:
    """Of the reference's products over channels, with a sum that is rounded after each term."""
    low = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
    total = EINSUM(equation, x[..., :1], w[..., :1]).to(low)
    for i in range(1, x.shape[-1]):
        total = (total + EINSUM(equation, x[..., i : i + 1], w[..., i : i + 1])).to(low)
    return total.to(x.dtype)


def _scores(side: int, change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def attend(x: Tensor, context: Tensor, q_routes: Any, kv_routes: Any, *rest: Any) -> Tensor:
        pair = [r._replace(scores=change(r.scores)) if i == side else r for i, r in enumerate((q_routes, kv_routes))]
        return ATTEND(x, context, *pair, *rest)

    return attend


def _without_gradient(t: Tensor) -> Tensor:
    return t.detach() + torch.where(t.isfinite(), 0 * t, 0)


def _one_expert_at_one(scores: Tensor) -> Tensor:
    return torch.cat((torch.ones_like(scores[:, :1]), scores[:, 1:]), 1)


def _without_last_slot(y: Tensor, routes: Any, n: int, **options: Any) -> Tensor:
    slots = torch.cat((routes.mask[..., :-1], torch.zeros_like(routes.mask[..., -1:])), -1)
    return COMBINE(y, routes._replace(mask=slots), n, **options)


def _twice_last_slot(y: Tensor, routes: Any, n: int, **options: Any) -> Tensor:
    factor = torch.ones(y.shape[2], 1, dtype=y.dtype)
    factor[-1:] = 2
    return COMBINE(y * factor, routes, n, **options)


def _terms_in_half(y: Tensor, routes: Any, n: int, **options: Any) -> Tensor:
    """Of the wide sum: each term is rounded to the next lower precision."""
    return COMBINE(y.to(LOWER.get(y.dtype, y.dtype)).to(y.dtype), routes, n, **options)


def _attention(name: str, replacement: Any) -> Any:
    return mock.patch.object(sys.modules["reference.routed_attention"], name, replacement)


def _everywhere(name: str, replacement: Any) -> Any:
    """A function that the layer's modules import by name."""
    stack = contextlib.ExitStack()
    for module in [reference] + [m for key, m in sys.modules.items() if key.startswith("reference.")]:
        if callable(vars(module).get(name)):
            stack.enter_context(mock.patch.object(module, name, replacement))
    return stack


def _layer_norm() -> Any:
    norm = torch.nn.functional.layer_norm
    return mock.patch.object(torch.nn.functional, "layer_norm", lambda *args: norm(*args[:4], 1e-3))


class Fault(NamedTuple):
    """patch: a context in which the reference computes with the fault."""

    stages: str  # a pattern of the properties' stages
    patch: Callable[[], Any]
    not_in: tuple[str, ...] = ()


ATTENTION = "attention|mixture"
ROUTED = "routed_attention|mixture"
SOLVER = "scores|solver_gradient|router_gradient"
WIDE_ONLY = ("bfloat16", "float16")


def _options(**change: Callable[[Any], Any]) -> Any:
    """The solvers and `route` with other options; those not given have their defaults."""
    stack = contextlib.ExitStack()
    defaults = {"eps": 0.03, "n_iters": 20}

    def changed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            new = {n: f(options.get(n, defaults[n])) for n, f in change.items()}
            return function(*args, **options | new)

        return call

    for name in ("route", "coordinate_descent", "capped_simplex"):
        if name != "capped_simplex" or "n_iters" not in change:
            stack.enter_context(mock.patch.object(reference, name, changed(getattr(reference, name))))
    return stack


def _route(change: Callable[[Tensor], Tensor]) -> Any:
    route = reference.route
    return mock.patch.object(reference, "route", lambda x, *args, **options: route(change(x), *args, **options))


COMPUTATIONS: dict[str, Fault] = {
    "attention logits 1% too large": Fault(ATTENTION, lambda: _softmax(lambda t: t * 1.01)),
    "softmax to base 2": Fault(ATTENTION, lambda: _softmax(lambda t: t * math.log(2))),
    "first key weighs twice": Fault(ATTENTION, lambda: _softmax(lambda t: _column(t, 0, math.log(2)))),
    "last key lost": Fault(ATTENTION, lambda: _softmax(lambda t: _column(t, -1, -30.0))),
    "weights in the next lower precision": Fault(
        ATTENTION, lambda: mock.patch.object(Tensor, "softmax", _rounded_weights), WIDE_ONLY
    ),
    "softmax gradient without its sum": Fault(
        "(attention|mixture)_gradient", lambda: mock.patch.object(Tensor, "softmax", _weights_without_the_sum)
    ),
    "RMSNorm with eps 1e-5": Fault(ROUTED, lambda: _attention("rms_norm", _norm(1e-5, False))),
    "RMSNorm gradient without its second term": Fault(
        "(routed_attention|mixture)_gradient", lambda: _attention("rms_norm", _norm(0.0, True))
    ),
    "products summed in half precision": Fault(ROUTED, lambda: mock.patch.object(torch, "einsum", _summed_in_half)),
    "query score of one expert ignored": Fault(ROUTED, lambda: _attention("attend", _scores(0, _one_expert_at_one))),
    "key/value score of one expert ignored": Fault(
        ROUTED, lambda: _attention("attend", _scores(1, _one_expert_at_one))
    ),
    "no gradient of the key/value scores": Fault(
        "(routed_attention|mixture)_gradient", lambda: _attention("attend", _scores(1, _without_gradient))
    ),
    "LayerNorm with eps 1e-3": Fault("local_attention|mixture", _layer_norm),
    "last slot not combined": Fault("combine|mixture", lambda: _everywhere("combine", _without_last_slot)),
    "last slot combined twice": Fault("combine|mixture", lambda: _everywhere("combine", _twice_last_slot)),
    "terms in the next lower precision": Fault(
        "combine", lambda: _everywhere("combine", _terms_in_half), ("bfloat16",)
    ),
    "temperature 1% too high": Fault(SOLVER, lambda: _options(eps=lambda v: 1.01 * v)),
    "one iteration more": Fault("scores|router_gradient", lambda: _options(n_iters=lambda v: v + 1)),
    "x in the next lower precision": Fault("logits", lambda: _route(lambda x: x.to(LOWER[x.dtype]).to(x.dtype))),
    "the last channel of x lost": Fault(
        "logits", lambda: _route(lambda x: torch.cat((x[..., :-1], torch.zeros_like(x[..., -1:])), -1))
    ),
}


class Faulty(ModuleType):
    """In place of `optimized`: the reference, computing under a patch."""

    OURS = ("route", "routed_attention", "local_attention", "combine", "coordinate_descent", "capped_simplex")

    def __init__(self, patch: Callable[[], Any]) -> None:
        super().__init__("faulty")
        self.Routes = reference.Routes
        for name in self.OURS:
            setattr(self, name, self._under(patch, name))

        class Layer(reference.MixtureOfAttention):
            def forward(self, *args: Any, **keywords: Any) -> Any:
                with patch():
                    return super().forward(*args, **keywords)

        self.MixtureOfAttention = Layer

    def __getattr__(self, name: str) -> Any:
        return getattr(optimized, name)

    @staticmethod
    def _under(patch: Callable[[], Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            with patch():
                return getattr(reference, name)(*args, **keywords)

        return call


# --- measuring -------------------------------------------------------------------------------------------------------


class Property(NamedTuple):
    """A property of the suite, and parameters to run it under.

    rarely: only one in so many examples makes an ordinary comparison of each stage and dtype. untouched: by these
    faults, since it calls something else.
    """

    module: ModuleType
    test: str
    stages: tuple[str, ...]
    parameters: tuple[dict[str, Any], ...]
    rarely: int = 1
    untouched: tuple[str, ...] = ()


def _by_dtype(*dtypes: torch.dtype, **more: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"dtype": dtype, "kernels": "torch", **more} for dtype in dtypes)


def _by_backend(stage: str, **request: Any) -> tuple[dict[str, Any], ...]:
    pairs = [p.values for p in harness.attention_backends(stage, **request)]
    return tuple({"backend": backend, "dtype": dtype, "kernels": "torch"} for backend, dtype in pairs)


WIDE = harness.DTYPES[:2]
PROPERTIES = (
    Property(test_routing, "test_logits_match", ("logits",), _by_dtype(*WIDE)),
    Property(test_routing, "test_solver_scores_match", ("scores",), _by_dtype(*WIDE, solver="iterative")),
    Property(
        test_routing,
        "test_solver_scores_match",
        ("scores",),
        _by_dtype(*WIDE, solver="exact"),
        untouched=("one iteration more",),
    ),
    Property(test_routing, "test_exact_gradient_matches", ("solver_gradient",), _by_dtype(*WIDE)),
    Property(
        test_routing,
        "test_descent_gradient_matches",
        ("solver_gradient",),
        _by_dtype(*WIDE),
        untouched=("temperature 1% too high",),
    ),
    Property(test_routing, "test_optimized_route_matches", ("scores", "router_gradient"), ({"kernels": "torch"},), 3),
    Property(
        test_routed_attention,
        "test_optimized_matches",
        ("routed_attention", "routed_attention_gradient"),
        _by_backend("routed_attention", masked=True),
    ),
    Property(
        test_local_attention,
        "test_optimized_matches",
        ("local_attention", "local_attention_gradient"),
        _by_backend("local_attention", dim_head=8),
    ),
    Property(test_mixture, "test_combine_matches_the_oracle", ("combine",), ({},), 4),
    Property(
        test_mixture,
        "test_optimized_matches_with_injected_routes",
        ("mixture", "mixture_gradient"),
        _by_dtype(*harness.DTYPES),
    ),
)


class Recorder:
    """In place of `check`: worst fraction, by stage and dtype and fault, and in how many examples there was any."""

    def __init__(self, fault: str | None, spoil: bool) -> None:
        self.fault = fault
        self.spoil = spoil
        self.example = 0
        self.case = ""
        self.beyond: list[list[Any]] = []  # stage, dtype, name, fraction and case of correct results above 1
        self.worst: dict[tuple[str, str, str], float] = {}
        self.examples: dict[tuple[str, str, str], set[int]] = {}
        self.otherwise = 0  # examples that another assertion of the property stopped

    def check(
        self, actual: Tensor, oracle: Tensor, baseline: Tensor, *, stage: str, backend: str | None = None, **rest: Any
    ) -> None:
        dtype = str(rest.get("precision") or actual.dtype).removeprefix("torch.")
        if backend == "reference":
            return
        fraction = _fraction(actual, oracle, baseline, stage, rest)
        self._enter((stage, dtype, self.fault or ""), fraction)
        if self.fault is None and not fraction <= 1:
            self.beyond.append([stage, dtype, rest.get("name", ""), fraction, self.case])
        ordinary = rest.get("expect") is None and oracle.isfinite().all() and actual.isfinite().all()
        if self.spoil and ordinary:
            for name, spoil in RESULTS.items():
                spoiled = spoil(actual.detach().contiguous())
                if spoiled is not None:
                    self._enter((stage, dtype, name), _fraction(spoiled, oracle, baseline, stage, rest))

    def _enter(self, key: tuple[str, str, str], fraction: float) -> None:
        self.worst[key] = max(self.worst.get(key, 0.0), fraction)
        self.examples.setdefault(key, set()).add(self.example)


def _fraction(actual: Tensor, oracle: Tensor, baseline: Tensor, stage: str, rest: dict[str, Any]) -> float:
    budget = STAGES[stage]
    large = budget._replace(c=budget.c * HUGE, floor=budget.floor * HUGE)
    with mock.patch.dict(STAGES, {stage: large}):
        try:
            return assert_matches(actual, oracle, baseline, stage=stage, **rest).fraction * HUGE
        except AssertionError:  # NaN or a non-zero where it must not be
            return math.inf


def run_chunk(which: Property, parameters: dict[str, Any], seed: int, fault: str | None, spoil: bool) -> Recorder:
    """100 examples, with the fault in the computation if there is one; spoil: also with those of results."""
    recorder = Recorder(fault, spoil)
    property_ = getattr(which.module, which.test)
    inner = property_.hypothesis.inner_test

    def example(*args: Any, **keywords: Any) -> None:
        recorder.example += 1
        recorder.case = repr(keywords.get("case", keywords))
        try:
            inner.__wrapped__(*args, **keywords)
        except AssertionError:
            recorder.otherwise += 1

    property_.hypothesis.inner_test = example
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(optimized.use_backends(**harness.stages_by("torch")))
            for module in {which.module, runs}:
                if hasattr(module, "check"):
                    stack.enter_context(mock.patch.object(module, "check", recorder.check))
            if fault is not None:
                faulty = Faulty(COMPUTATIONS[fault].patch)
                stack.enter_context(mock.patch.object(which.module, "optimized", faulty))
            torch.manual_seed(seed)
            hypothesis.seed(seed)(property_)(**parameters, device=DEVICE)
    finally:
        property_.hypothesis.inner_test = inner
    return recorder


class Job(NamedTuple):
    name: str
    which: Property
    parameters: dict[str, Any]
    chunk: int
    fault: str | None


def jobs(chunks: int, fault_chunks: int) -> Iterator[Job]:
    """A little of everything first. Backends share the examples of a dtype; faults are run once a dtype."""
    for chunk in range(4 * chunks):
        for which in PROPERTIES:
            seen: dict[str, int] = {}
            for parameters in which.parameters:
                dtype = str(parameters.get("dtype", "")).removeprefix("torch.")
                seen[dtype] = seen.get(dtype, 0) + 1
                share = len(which.parameters) // len({str(p.get("dtype")) for p in which.parameters})
                names: list[str | None] = [None] if chunk * share < chunks * which.rarely else []
                if chunk < fault_chunks * which.rarely and seen[dtype] == 1:
                    names += [
                        name
                        for name in COMPUTATIONS
                        if name not in which.untouched and any(possible(name, stage, dtype) for stage in which.stages)
                    ]
                for fault in names:
                    words = (which.module.__name__, which.test, *parameters.values(), chunk, fault or "-")
                    yield Job(" ".join(map(str, words)), which, parameters, chunk, fault)


def measure(examples: int, fault_examples: int, out: Path, seed: int, minutes: float, only: str) -> None:
    """Every chunk is written as soon as it is done, and what the file has is not measured again."""
    report = record.read(out) if out.exists() else {"kind": "bands", "seed": seed, "chunks": {}}
    made = record.made(DEVICE, ("optimized", "reference"))
    if report["seed"] != seed or report.get("hashes", made["hashes"]) != made["hashes"]:
        raise SystemExit(f"{out}: of another seed or another state of the code; remove it to start anew")
    report |= made
    torch.set_num_threads(1)
    fault_chunks = -(-fault_examples // CHUNK)
    every = jobs(-(-examples // CHUNK), fault_chunks)
    todo = [job for job in every if job.name not in report["chunks"] and re.search(only, job.name)]
    start = time.monotonic()
    with Progress() as progress:
        for job in progress.track(todo, description="chunks"):
            begun = time.process_time()
            spoil = job.fault is None and job.chunk < fault_chunks * job.which.rarely
            done = run_chunk(job.which, job.parameters, seed * 1_000_003 + job.chunk, job.fault, spoil)
            report["chunks"][job.name] = {
                "cpu_seconds": round(time.process_time() - begun, 2),
                "otherwise": done.otherwise,
                "beyond": done.beyond,
                "cells": [[*key, len(done.examples[key]), float(f"{w:.4g}")] for key, w in done.worst.items()],
            }
            if done.beyond or (job.fault is None and done.otherwise):
                progress.console.print(f"[red]{job.name}: {done.otherwise} failed otherwise, beyond: {done.beyond}")
            record.write(out, report | {"bands": bands(report["chunks"])}, indent=0)
            if time.monotonic() - start > 60 * minutes:
                break


# --- what was measured -----------------------------------------------------------------------------------------------


def possible(name: str, stage: str, dtype: str) -> bool:
    if name in RESULTS:  # a float32 gradient of a bfloat16 chain may well be rounded to bfloat16
        return name != "the next lower precision" or dtype != "bfloat16"
    fault = COMPUTATIONS[name]
    return dtype not in fault.not_in and re.search(fault.stages, stage) is not None


def bands(chunks: dict[str, Any]) -> dict[str, Any]:
    """By "stage dtype": correct results at their worst; each fault's worst in a chunk, the median over chunks.

    The median: what an ordinary run of 100 examples is likely to see of a fault.
    """
    cells: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for chunk in chunks.values():
        for stage, dtype, fault, examples, worst in chunk["cells"]:
            cells.setdefault(f"{stage} {dtype}", {}).setdefault(fault, []).append((examples, worst))
    out = {}
    for cell, by_fault in cells.items():
        stage, dtype = cell.split()
        faults = {
            name: {
                "examples": sum(n for n, _ in found),
                "fraction": statistics.median(w for _, w in found),
                "runs": len(found),
                "rejected": sum(w > 1 for _, w in found),
            }
            for name, found in by_fault.items()
            if name and possible(name, stage, dtype)
        }
        correct = by_fault.get("", [(0, 0.0)])
        out[cell] = {"examples": sum(n for n, _ in correct), "worst": max(w for _, w in correct), "faults": faults}
    return out


def weakest(faults: dict[str, Any]) -> tuple[str, float]:
    """Of those that are rejected, or of all if none is."""
    seen = {name: fault["fraction"] for name, fault in faults.items()}
    rejected = {name: fraction for name, fraction in seen.items() if fraction > 1} or seen
    return min(rejected.items(), key=lambda item: item[1])


def render(report: dict[str, Any]) -> str:
    """Markdown."""
    heading = ("stage", "dtype", "c, floor", "correct at worst", "cases", "weakest fault rejected", "not rejected")
    rows = []
    for stage, budget in STAGES.items():
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            if (cell := report["bands"].get(f"{stage} {dtype}")) is None:
                continue
            name, fraction = weakest(cell["faults"])
            below = [f"{n} ({f['fraction']:.2g})" for n, f in cell["faults"].items() if not f["fraction"] > 1]
            below += [
                f"{n} (but by {f['rejected']} of {f['runs']} runs)"
                for n, f in cell["faults"].items()
                if f["fraction"] > 1 and f["rejected"] < f["runs"]
            ]
            words = (stage.replace("_", " "), dtype, f"{budget.c:g}, {budget.floor:g}", f"{cell['worst']:.2f}")
            rows.append((*words, cell["examples"], f"{fraction:.3g}: {name}", "; ".join(below) or "-"))
    return record.table(heading, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10000, help="of each property and dtype (default: 10000)")
    parser.add_argument("--fault-examples", type=int, default=300, help="of each fault in a computation (default: 300)")
    parser.add_argument("--out", type=Path, default=record.REPORTS / "bands-cpu.json", metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after the chunk that passes this")
    parser.add_argument("--only", default="", metavar="PATTERN", help="chunks whose names match, as in FILE")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: write the table of --out into it")
    given = parser.parse_args()
    if given.table:
        report = record.read(given.out)
        record.write_between(given.table, "bands", render(report | {"bands": bands(report["chunks"])}))
    else:
        measure(given.examples, given.fault_examples, given.out, given.seed, given.minutes, given.only)


if __name__ == "__main__":
    main()
