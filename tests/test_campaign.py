"""The campaign itself: what it draws, counts, finds, keeps and reports. The long run is `campaign/test_nightly.py`."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from campaign import __main__ as command
from campaign import draws, oracles, report, runner, selection, solver, state
from campaign.causal import KIND as causal  # noqa: N811
from campaign.chunks import Drawn, Lane
from campaign.comparison import Cases, compare
from campaign.kind import Setting, warm_up
from campaign.layer import KIND as layer  # noqa: N811
from campaign.oracles import Kinks, Rows
from campaign.state import Part, State, as_ranges, read
from campaign.tally import Band, Failure, Tally
from harness import check, check_identical, expectation
from hypothesis import Phase, given, settings
from strategies import LayerCase, layer_cases
from test_autoregressive import HARD, SMALL
from test_causal_dtypes import CausalCase, causal_cases

import reference
from optimized import ops
from reference import oracle
from reference.testing import assert_matches
from tests.faults.operators import OPERATORS
from tests.statefile import StateError

SETTING = Setting(torch.device("cpu"), "torch")
BATCHED = (selection, solver)
pytestmark = pytest.mark.cpu


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, size in ((selection, 60), (solver, 60), (layer, 15), (causal, 6)):
        monkeypatch.setattr(kind, "CHUNK", size)


# --- cases -----------------------------------------------------------------------------------------------------------


def data_of(case: Any) -> tuple[Any, ...]:
    """Comparable, NaN too."""
    arrays = [case.logits, case.mask, *([case.g] if hasattr(case, "g") else [])]
    return case.configuration, *(None if t is None else t.tobytes() for t in arrays)


@pytest.mark.parametrize("kind", BATCHED, ids=lambda kind: kind.NAME)
def test_a_case_is_a_function_of_seed_kind_and_index(kind: ModuleType) -> None:
    indices = [0, 1, 2, 77, 10**6, 2**40]
    first = [data_of(kind.draw(0, i)) for i in indices]
    assert [data_of(kind.draw(0, i)) for i in reversed(indices)] == first[::-1]
    others = [data_of(kind.draw(seed, i)) for seed in (1, 2, 2**31) for i in indices]
    assert len({repr(data) for data in first + others}) == 4 * len(indices)


@pytest.mark.parametrize("kind", BATCHED, ids=lambda kind: kind.NAME)
def test_kernels_are_compiled_once_over_all_processes(kind: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process runs one case of its share of the variants."""
    ran: list[int] = []
    monkeypatch.setattr(kind, "run", lambda first, count, setting: ran.append(first))
    for share in range(3):
        warm_up(kind, share, 3, SETTING)
    variants = [kind.compiled_for(kind.draw(0, index).configuration) for index in ran]
    assert len(variants) == len(set(variants)) > 50


def test_kinds_draw_apart() -> None:
    ours = [draws.generator(0, kind.NAME, 5).random() for kind in BATCHED]
    assert ours[0] != ours[1]


@pytest.mark.parametrize("kind", BATCHED, ids=lambda kind: kind.NAME)
def test_every_level_is_drawn(kind: ModuleType) -> None:
    tally = Tally()
    tally.cover(kind.LEVELS, [kind.draw(0, i).configuration.levels() for i in range(4000)])
    absent = [level for level, n in zip(tally.levels, tally.pairs.diagonal()) if not n]
    assert absent == []
    assert tally.pairs.diagonal().sum() == 4000 * len(kind.LEVELS)


@pytest.mark.parametrize("layout", draws.LAYOUTS)
def test_layouts_hold_the_same_values(layout: str) -> None:
    """In a buffer with others, as strided views; unaligned ones are not at a multiple of 16 bytes."""
    t = np.random.default_rng(0).standard_normal((2, 3, 5))
    if layout == "expanded":
        t = np.broadcast_to(t[:1], t.shape)
    storage = draws.Storage("float64")
    places = [storage.add(t, layout) for _ in range(2)]
    buffer = storage.to(torch.device("cpu"))
    views = [buffer.as_strided(t.shape, at.strides, at.offset) for at in places]
    for view in views:
        check_identical(view, torch.from_numpy(t.copy()))
        assert view.is_contiguous() == (layout in ("contiguous", "unaligned"))
    assert (views[0].data_ptr() % 16 == 0) == (layout not in ("unaligned", "sliced"))


# --- oracles and the comparator --------------------------------------------------------------------------------------


def problem(case: solver.Case) -> tuple[Rows, torch.Tensor, torch.Tensor | None]:
    """As rows of the batched oracle, and as arguments of the reference."""
    c = case.configuration
    s, valid = selection.rows_of([case], c.n)
    names = ("mass", "n_iters", "eps", "eps_init", "eps_decay")
    rows = Rows(s, valid, *(np.full(len(s), getattr(c, name)) for name in names))
    mask = None if case.mask is None else torch.from_numpy(case.mask)
    return rows, torch.from_numpy(case.logits.astype(np.float64)), mask


def small(kind: ModuleType, count: int, wanted: Callable[[Any], bool] = lambda c: True) -> list[Any]:
    """The first cases that are quick for an oracle with loops."""
    out, i = [], 0
    while len(out) < count:
        case = kind.draw(3, i)
        c = case.configuration
        if c.n * c.batch * c.experts < 200 and wanted(c):
            out.append(case)
        i += 1
    return out


def test_selection_oracle_is_the_definition() -> None:
    for case in small(selection, 60):
        s, valid = selection.rows_of([case], case.configuration.n)
        n, k = np.full(len(s), s.shape[1]), np.full(len(s), case.configuration.k)
        indices, slots, inverse = oracles.select(s, valid, n, k)
        expected = [oracle.select(row, case.configuration.k, mask) for row, mask in zip(s, valid)]
        assert indices.tolist() == np.concatenate([e[0] for e in expected]).tolist()
        assert slots.tolist() == np.concatenate([e[1] for e in expected]).tolist()
        table = ops.inverse_map(
            *(torch.from_numpy(np.stack([e[i] for e in expected]))[None] for i in (0, 1)), s.shape[1]
        )
        assert inverse.tolist() == table[0].tolist()


def tame(c: solver.Configuration) -> bool:
    """Without NaN, whose gradient is not defined, and where budgets are tight."""
    return c.values not in ("NaN", "huge", "large", "outlier", "shifted")


def test_solver_oracles_are_the_definition() -> None:
    """Rows of one case at a time against loops; then many cases padded to one length, against each alone."""
    for case in small(solver, 60, tame):
        c = case.configuration
        rows, _, _ = problem(case)
        if c.solver == "iterative":
            options = {name: getattr(c, name) for name in ("n_iters", "eps", "eps_init", "eps_decay")}
            exact = [oracle.coordinate_descent(s, c.mass, v, **options) for s, v in zip(rows.s, rows.valid)]
            found = oracles.descend(rows).scores
        else:
            exact = [oracle.capped_simplex(s, c.mass, v, eps=c.eps) for s, v in zip(rows.s, rows.valid)]
            with np.errstate(divide="ignore"):
                found = oracles.cap(rows)[0]
        exact = torch.from_numpy(np.stack(exact))
        scale = (c.n + np.abs(rows.s).max() / c.coldest) * exact.abs().max().item()
        scale = 0.0 if expectation(exact) == "zeros" else scale
        check(
            torch.from_numpy(found), exact, exact.float(), stage="scores", scale=scale, expect=expectation(exact)
        )  # fmt: skip


def test_rows_of_many_cases_are_solved_as_if_alone() -> None:
    """Padded, and with numbers of steps of their own."""
    cases = small(solver, 40, lambda c: c.solver == "iterative")
    cases.sort(key=lambda case: -case.configuration.n_iters)
    found = [solver.Found(case.logits.ravel(), case.logits.ravel(), case.logits.ravel()) for case in cases]
    _, rows, many, _, _, g = solver._padded(cases, found)
    together = oracles.descend(rows)
    kinks = Kinks(np.nan_to_num(rows.s), together.a)
    gradients = oracles.descend_gradient(rows, kinks, g)[0]
    ends = np.append(many.starts[1:], len(rows.s))
    for case, first, last in zip(cases, many.starts, ends):
        own, n = problem(case)[0], case.configuration.n
        alone = oracles.descend(own)
        cotangent = np.where(own.valid, case.g.reshape(-1, n), 0)
        gradient = oracles.descend_gradient(own, Kinks(np.nan_to_num(own.s), alone.a), cotangent)[0]
        np.testing.assert_allclose(together.scores[first:last, :n], alone.scores, rtol=1e-12, atol=1e-300)
        np.testing.assert_allclose(together.drift[first:last], alone.drift, rtol=1e-9)
        np.testing.assert_allclose(gradients[first:last, :n], gradient, rtol=1e-9, atol=1e-9)
        assert not together.scores[first:last, n:].any()
        assert not gradients[first:last, n:].any()


def test_drift_bounds_the_iterates() -> None:
    """Of float32 against float64. A token that outweighs the others passes every rounding on: of 32 steps, not one."""
    for case in small(solver, 60, lambda c: c.solver == "iterative" and tame(c)):
        rows, _, _ = problem(case)
        exact, single = oracles.descend(rows), oracles.descend(rows._replace(s=rows.s.astype(np.float32)))
        known = rows.valid.any(-1)
        error = np.abs(single.a[-1] - exact.a[-1])[known]
        assert (error <= 4 * np.finfo(np.float32).eps * exact.drift[known]).all(), case.configuration
    rows, _, _ = problem(solver.draw(0, 82427))
    exact = oracles.descend(rows)
    held = 7  # its largest logit is 16.3, at -a of every step
    assert 0.8 < exact.drift[held] / (32 * 2 * 16.2) < 1.1
    equal = oracles.descend(rows._replace(s=np.ones_like(rows.s)))  # none is ever held
    np.testing.assert_allclose(equal.drift, np.abs(equal.a[-1]) + 1)


def test_solver_gradients_are_those_of_autograd() -> None:
    """Through the reference, with the same saturated sets."""
    tested = 0
    for case in small(solver, 60, tame):
        c = case.configuration
        rows, logits, mask = problem(case)
        leaf = logits.requires_grad_()
        g = torch.where(torch.from_numpy(rows.valid), torch.from_numpy(case.g).double().reshape(rows.s.shape), 0)
        if c.solver == "iterative":
            a = oracles.descend(rows).a
            sets = torch.from_numpy(np.stack([~(rows.s < -step[:, None]) for step in a])).view(c.n_iters, *logits.shape)
            options = {name: getattr(c, name) for name in ("n_iters", "eps", "eps_init", "eps_decay")}
            scores = reference.coordinate_descent(leaf, c.mass, mask, saturated=sets, **options)
            found = oracles.descend_gradient(rows, Kinks(rows.s, a), g.numpy())[0]
        else:
            with np.errstate(divide="ignore"):
                exact, free = oracles.cap(rows)
            if oracles.about_to_saturate(rows, exact, np.full(len(exact), 1e-9)).any():
                continue
            scores = reference.capped_simplex(leaf, c.mass, mask, eps=c.eps)
            found = oracles.cap_gradient(rows, exact, free, g.numpy())
        (expected,) = torch.autograd.grad(scores, leaf, g.view(logits.shape))
        scale = (g.abs().max() * scores.max() / c.coldest).item() * 40 * (c.n + np.abs(rows.s).max() / c.coldest)
        np.testing.assert_allclose(found, expected.reshape(found.shape).numpy(), rtol=1e-9, atol=1e-15 * scale)
        tested += bool(expected.any())
    assert tested > 20


def test_fractions_are_those_of_the_comparator() -> None:
    """Of cases of several lengths and both dtypes at once."""
    rng = np.random.default_rng(0)
    shapes = [(2, 7), (1, 5), (3, 12)]
    dtypes = ["float32", "float64", "float32"]
    parts, fractions = [], []
    for shape, dtype in zip(shapes, dtypes):
        exact = rng.standard_normal(shape)
        baseline = (exact + 1e-7 * rng.standard_normal(shape)).astype(np.float32)
        actual = (exact + np.finfo(dtype).eps * 10 ** rng.uniform(-1, 1) * rng.standard_normal(shape)).astype(dtype)
        parts.append((actual.astype(np.float64), exact, baseline))
        tensors = [torch.from_numpy(t) for t in (actual, exact, baseline)]
        fractions.append(assert_matches(*tensors, stage="scores", scale=0.3).fraction)
    width = max(shape[1] for shape in shapes)
    actual, exact, baseline = (draws.padded([p[i] for p in parts], width, 0.0, np.float64) for i in range(3))
    n = np.array([shape[1] for shape in shapes])
    inside = np.arange(width) < np.repeat(n, [shape[0] for shape in shapes])[:, None]
    cases = Cases(np.array([0, 2, 3]), n, np.array(dtypes), inside)
    options = {"stage": "scores", "scale": np.full(3, 0.3)}
    compared = compare(cases, actual, exact, baseline, **options)
    assert compared.fraction.tolist() == pytest.approx(fractions)

    for spoilt, of in ((np.nan, 0), (np.inf, 1), (7.0, 2)):
        wrong = actual.copy()
        wrong[cases.starts[of], 3] = spoilt
        found = compare(cases, wrong, exact, baseline, **options)
        assert (found.fraction > 1).tolist() == [i == of for i in range(3)]
        assert (found.row[of], found.token[of]) == (cases.starts[of], 3)
    poisoned = exact.copy()
    poisoned[2, 1] = np.nan
    assert (compare(cases, actual, poisoned, baseline, **options).fraction > 1).tolist() == [False, True, False]
    both = np.where(np.isnan(poisoned), np.nan, actual)
    assert (compare(cases, both, poisoned, baseline, **options).fraction <= 1).all()
    lost = actual.copy()
    lost[3] = 0  # one row of three
    assert (compare(cases, lost, exact, baseline, **options).fraction > 1).tolist() == [False, False, True]


# --- what a run finds ------------------------------------------------------------------------------------------------


FAULTS = [
    (selection, "the later of equals is picked", "indices: "),
    (selection, "the inverse map holds masked tokens", "inverse map: "),
    (solver, "values of a step more", "scores: "),
    (solver, "half the gradient of the scores", "gradient: "),
    (solver, "iterates are off", "changed sides"),
    (solver, "the mass is a percent too large", "scores: "),
    (solver, "masked tokens have scores", "not 0 where masked"),
]


def command_of(failure: Failure) -> list[str]:
    """Arguments of the snippet."""
    words = shlex.split(failure.snippet)
    assert words[:3] == ["python", "-m", "tests.campaign"]
    return words[3:]


@pytest.mark.parametrize(("kind", "fault", "words"), FAULTS, ids=[fault.replace(" ", "-") for _, fault, _ in FAULTS])
def test_a_fault_is_found_and_its_snippet_shows_it(
    kind: ModuleType, fault: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = Setting(SETTING.device, SETTING.kernels, seed=4)
    assert kind.run(0, 100, setting).failures == []
    with OPERATORS[fault].put_in():
        failures = kind.run(0, 100, setting).failures
        assert len(failures) > 2
        assert any(words in failure.message for failure in failures)
        assert command.main(command_of(failures[-1])) == 1
        assert "Configuration(" in capsys.readouterr().out
    assert command.main(command_of(failures[-1])) == 0


def test_an_error_is_a_failure_of_its_case() -> None:
    with OPERATORS["selection raises at 32"].put_in():
        tally = selection.run(0, 100, SETTING)
    assert len(tally.failures) == sum(selection.draw(0, i).configuration.n == 32 for i in range(100)) > 0
    assert all("ValueError('32')" in failure.message for failure in tally.failures)
    assert sum(tally.cases.values()) == 100


# Kind, a fault that its first lane finds, the words that the failure has, and the stage whose budget is missed.
FAULTS_OF_LAYERS = [
    (layer, "the norm of queries has no gradient", ("prenorm=True", "gamma"), "mixture_gradient"),
    (causal, "experts of blocks are a percent too large", ("mixture out", "CausalCase("), "mixture"),
]


@pytest.mark.parametrize(("kind", "fault", "words", "stage"), FAULTS_OF_LAYERS, ids=["layer", "causal"])
def test_a_fault_of_a_layer_is_shrunk_kept_and_tried_first(
    kind: Drawn,
    fault: str,
    words: tuple[str, ...],
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kind, "KEPT", tmp_path)
    monkeypatch.setattr(kind, "CHUNK", 12)
    assert kind.run_kept(SETTING).failures == []
    sound = kind.run(0, kind.CHUNK, SETTING)
    with OPERATORS[fault].put_in():
        tally = kind.run(0, kind.CHUNK, SETTING)
        (failure,) = tally.failures
        assert all(word in failure.message for word in words)
        assert tally.small.get("float64", set()) <= sound.small["float64"], "what shrinking tried is no case"
        worst = tally.band(stage, "float64").worst[0]
        assert 1 < worst[0] < math.inf, "what was drawn and failed is among the worst"
        assert tally.band(stage, "float64").counts[-1] == 1
        assert command.main(command_of(failure)) == 1
        assert re.search(rf"{stage}, float64: [\d.e+]+ of the budget", capsys.readouterr().out)
        assert [f.snippet for f in kind.run_kept(SETTING).failures] == [failure.snippet]
    assert command.main(command_of(failure)) == 0
    assert kind.run_kept(SETTING).failures == []
    capsys.readouterr()


@pytest.mark.parametrize("dtype", ["float64", pytest.param("bfloat16", marks=pytest.mark.thorough)])
def test_a_leak_is_found_where_no_budget_shows_it(
    dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the law: a ten millionth of the mean of the logits, of which NaN is not small."""
    monkeypatch.setattr(causal, "KEPT", tmp_path)
    monkeypatch.setattr(causal, "CHUNK", 12)
    place = causal.LANES.index(Lane("law", dtype))
    with OPERATORS["logits know the sequence"].put_in():
        (failure,) = causal.run(place * causal.CHUNK, causal.CHUNK, SETTING).failures
        assert failure.message.startswith(f"law {dtype} CausalCase(")
        assert command.main(command_of(failure)) == 1
    assert command.main(command_of(failure)) == 0
    capsys.readouterr()


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("kind", [layer, causal], ids=["layer", "causal"])
def test_layers_draw_by_their_seed_and_chunk(kind: Drawn) -> None:
    size, turn = kind.CHUNK, len(kind.LANES)
    first, again, other = (kind.run(chunk * size, size, SETTING) for chunk in (0, 0, 3 * turn))
    assert first.failures == other.failures == []
    assert first.small == again.small
    assert len(first.small["float64"] - other.small["float64"]) > size // 3
    assert f"{kind.LANES[0].name}, float64: {kind.CASE.__name__}(" in kind.describe(size // 2, SETTING)
    assert {key for key, _ in first.bands} == {"mixture", "mixture_gradient"}


def test_every_level_of_the_causal_layer_is_drawn() -> None:
    """By few examples of every property."""
    tally = Tally()
    for lane in causal.LANES:
        found: list[CausalCase] = []
        draw = given(case=causal.cases(lane))(lambda case: found.append(case))  # noqa: B023 - called at once
        settings(max_examples=60, phases=[Phase.generate], derandomize=True, database=None)(draw)()
        names = [causal.names(lane, case) for case in found]
        places = [[of.index(name) for of, name in zip(causal.LEVELS.values(), of_case)] for of_case in names]
        tally.cover(causal.LEVELS, places)
    absent = [level for level, n in zip(tally.levels, tally.pairs.diagonal()) if not n]
    assert absent == []


# --- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_chunks")
def test_what_is_drawn_twice_counts_once() -> None:
    """In a tally, when tallies are merged, and over runs of one seed on two devices."""
    case = next(case for case in (selection.draw(0, i) for i in range(1000)) if case.logits.size == 1)
    assert case.digest() == case.digest() is not None
    tally = Tally()
    for digest in (case.digest(), case.digest(), "another", None, None):
        tally.count("float32", digest)
    assert (tally.cases, tally.distinct()) == ({"float32": 5}, {"float32": 4})
    more = Tally()
    more.count("float32", case.digest())
    more.count("float64", case.digest())
    tally.merge(more)
    assert tally.distinct() == {"float32": 4, "float64": 1}

    chunk = layer.run(0, 15, SETTING)
    twice = Tally.of(chunk.json())
    twice.merge(chunk)
    assert twice.distinct() == chunk.distinct()


HEADER = {"device": "cpu", "kernels": "torch", "seed": 0, "hashes": {"optimized": "0" * 64}}
HEADER["environment"] = {"commit": None, "hardware": {"name": "a processor"}, "versions": {"python": "3"}}


def part_of(kind: ModuleType, chunks: Sequence[int]) -> Part:
    part = Part()
    for chunk in chunks:
        part.merge([chunk], kind.run(chunk * kind.CHUNK, kind.CHUNK, SETTING))
    return part


def test_runs_of_one_seed_share_their_cases() -> None:
    part, later = part_of(selection, [0]), part_of(selection, [1])
    own = sum(part.tally.distinct().values())
    gpu, reseeded = HEADER | {"device": "cuda"}, HEADER | {"device": "cuda", "seed": 1}
    cpu = (HEADER, {"selection": part})
    assert report.distinct([cpu], "selection") == own
    assert report.distinct([cpu, (gpu, {"selection": part})], "selection") == own
    assert report.distinct([cpu, (gpu, {"selection": later})], "selection") > 1.9 * own
    large = own - sum(map(len, part.tally.small.values()))
    assert report.distinct([cpu, (reseeded, {"selection": part})], "selection") == own + large


def without_time(tally: Tally) -> dict[str, Any]:
    return tally.json() | {"seconds": 0}


@pytest.mark.usefixtures("short_chunks")
def test_a_torn_run_goes_on_and_counts_the_same(tmp_path: Path) -> None:
    """Killed in the middle of a line; and after lines were merged."""
    kinds, cases = ["selection", "solver"], 180
    whole, torn = State(tmp_path / "whole", HEADER), State(tmp_path / "torn", HEADER)
    assert runner.run(kinds, cases, SETTING, whole, jobs=0, seconds=math.inf) == []

    def stop(kind: str, chunk: int | None, tally: Tally) -> None:
        if len(torn.done("selection")) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(kinds, cases, SETTING, torn, jobs=0, seconds=math.inf, told=stop)
    torn.close()
    text = torn.path.read_text()
    torn.path.write_text(text + text.splitlines()[-1][:-20])
    again = State(torn.path, HEADER)
    assert len(again.done("selection")) == 2
    assert len(torn.path.read_text().splitlines()) == 3, "merged: a line for the header and for each kind"
    told: list[tuple[str, int | None]] = []
    runner.run(
        kinds, cases, SETTING, again, jobs=0, seconds=math.inf, told=lambda kind, chunk, _: told.append((kind, chunk))
    )
    assert len(told) == 6 - len(torn.done("selection")) - len(torn.done("solver"))
    for path in (again.path, whole.path):
        found = read(path)[1]
        for kind in kinds:
            assert found[kind].done == {0, 1, 2}
            assert without_time(found[kind].tally) == without_time(whole.parts[kind].tally)
    with pytest.raises(ValueError, match="done already"):
        again.add("solver", 1, Tally())


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    """It is left as it was."""
    kept = State(tmp_path / "state", HEADER)
    kept.add("selection", 3, selection.run(0, 20, SETTING))
    kept.close()
    content = kept.path.read_bytes()
    for other, words in (
        ({"seed": 1}, "expected a state of seed 1, got one of seed 0"),
        ({"kernels": "triton"}, "expected a state of kernels 'triton', got one of kernels 'torch'"),
        ({"hashes": {"optimized": "1" * 64, "reference": "0" * 64}}, "another state of optimized and reference"),
    ):
        with pytest.raises(StateError, match=f"{kept.path}: .*{words}; remove it"):
            State(kept.path, HEADER | other)
        assert kept.path.read_bytes() == content
    with State(kept.path, HEADER | {"environment": {**HEADER["environment"], "commit": "f00"}}) as again:
        assert again.done("selection") == {3}


def test_a_second_run_on_a_state_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before it runs anything. What the first one keeps, before and after, is there."""
    path, tally = tmp_path / "state", solver.run(0, 20, SETTING)
    words = ["--kind", "selection", "--cases", "500", "--jobs", "0", "--state", str(path)]
    with State(path, runner.header(SETTING)) as first:
        first.add("solver", 0, tally)
        for _ in range(2):
            with pytest.raises(SystemExit) as ended:
                command.main(words)
            assert ended.value.code == 2
            told = capsys.readouterr()
            assert f"--state: {path}: expected a file that no other run writes" in told.err
            assert "distinct cases" not in told.out
        first.add("solver", 7, tally)
    assert command.main(words) == 0
    found = read(path)[1]
    assert {kind: part.done for kind, part in found.items()} == {"solver": {0, 7}, "selection": {0}}
    assert sum(found["solver"].tally.cases.values()) == 2 * sum(tally.cases.values())


@pytest.fixture(scope="module")
def lines_of_a_state(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A header, one of selection and one of the solver."""
    with State(tmp_path_factory.mktemp("state") / "whole", HEADER) as state:
        for kind in BATCHED:
            state.add(kind.NAME, 0, kind.run(0, 20, SETTING))
        return state.path.read_bytes().splitlines(keepends=True)


def changed(line: bytes, **parts: Any) -> bytes:
    return json.dumps(json.loads(line) | parts).encode() + b"\n"


def in_tally(line: bytes, **parts: Any) -> bytes:
    return changed(line, tally=json.loads(line)["tally"] | parts)


CORRUPT: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "no header": lambda lines: lines[1:],
    "a torn header": lambda lines: [lines[0][:-9]],
    "a header of another program": lambda lines: [b'{"benchmarks": {}}\n', *lines[1:]],
    "a header without hashes": lambda lines: [b'{"campaign": {"device": "cpu", "seed": 0}}\n', *lines[1:]],
    "a list": lambda lines: [lines[0], b"[]\n"],
    "no JSON": lambda lines: [lines[0], b"once upon a time\n", *lines[1:]],
    "two lines in one": lambda lines: [lines[0], lines[1][:-40], lines[2]],
    "no text": lambda lines: [lines[0], b"\xff\xfe\x00\n", *lines[1:]],
    "a chunk twice": lambda lines: [*lines, lines[1]],
    "chunks backwards": lambda lines: [lines[0], changed(lines[1], done=[[5, 1]])],
    "chunks that are words": lambda lines: [lines[0], changed(lines[1], done=["ab"])],
    "an unknown kind": lambda lines: [lines[0], changed(lines[1], kind="attention")],
    "the levels of another kind": lambda lines: [*lines, changed(lines[2], kind="selection", done=[[3, 3]])],
    "a count that is none": lambda lines: [lines[0], in_tally(lines[1], cases={"float32": -3})],
    "half a count": lambda lines: [lines[0], in_tally(lines[2], notes={"rows": 0.5})],
    "no failures": lambda lines: [lines[0], changed(lines[1], tally={"cases": {}})],
    "a failure of one word": lambda lines: [lines[0], in_tally(lines[1], failures=["what"])],
    "a bin that is not there": lambda lines: [
        lines[0], in_tally(lines[2], bands=[["scores", "float32", [[99, 1]], []]])
    ],
    "a bin from the end": lambda lines: [lines[0], in_tally(lines[2], bands=[["scores", "float32", [[-1, 1]], []]])],
}  # fmt: skip


@pytest.mark.parametrize("how", CORRUPT.values(), ids=[name.replace(" ", "-") for name in CORRUPT])
def test_a_corrupt_state_is_named(
    how: Callable[[list[bytes]], list[bytes]],
    lines_of_a_state: list[bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And left as it was, by a run as by a report."""
    path = tmp_path / "state"
    content = b"".join(how(lines_of_a_state))
    path.write_bytes(content)
    with pytest.raises(StateError, match=rf"^{path}: expected the state of a campaign, got another line \d"):
        State(path, HEADER)
    for words in (["--state", str(path)], ["--of", str(path), "--report", str(tmp_path / "page.html")]):
        with pytest.raises(SystemExit) as ended:
            command.main(words)
        assert ended.value.code == 2
        assert f"{words[0]}: {path}: expected the state of a campaign" in capsys.readouterr().err
    assert path.read_bytes() == content
    assert not (tmp_path / "page.html").exists()


def test_a_state_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For a report. A run makes it, with its folder, but not of a folder."""
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SystemExit) as ended:
            command.main(["--of", str(path), "--report", str(tmp_path / "page.html")])
        assert ended.value.code == 2
        assert f"--of: {path}: expected the state of a campaign, got" in capsys.readouterr().err
    with pytest.raises(StateError, match=f"{tmp_path}: expected a file that can be written"):
        State(tmp_path, HEADER)
    (tmp_path / "begun").touch()  # by a run that was killed right then
    for name in ("begun", "folder/new"):
        with State(tmp_path / name, HEADER) as state:
            assert read(state.path) == (HEADER, {})


def test_a_state_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are merged while it runs; a state of a million cases is a matter of one tally and its digests."""
    monkeypatch.setattr(state, "MANY", 3)
    kept = State(tmp_path / "state", HEADER)
    tally = selection.run(0, 50, SETTING)
    for chunk in range(10):
        kept.add("selection", chunk, tally)
        assert len(kept.path.read_text().splitlines()) <= 5
        assert read(kept.path)[1]["selection"].done == set(range(chunk + 1))
    assert sum(read(kept.path)[1]["selection"].tally.cases.values()) == 500


def test_time_and_failures_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State(tmp_path / "state", HEADER)
    with monkeypatch.context() as patch:
        seconds = itertools.count()  # the clock is looked at before each chunk
        patch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
        assert runner.run(["selection"], 10**9, SETTING, state, jobs=0, seconds=3.5) == []
    assert state.done("selection") == {0, 1, 2}
    failing = State(tmp_path / "failing", HEADER)
    with OPERATORS["the later of equals is picked"].put_in():
        assert runner.ENOUGH <= len(runner.run(["selection"], 10**9, SETTING, failing, jobs=0, seconds=math.inf)) < 500
    assert len(failing.done("selection")) == 1


DYING = f"""
import json, os, signal, sys
for line in sys.stdin:
    if json.loads(line)["chunk"] == 1:
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    print({json.dumps(Tally(cases={"float32": 500}).json())!r}, flush=True)
"""


def test_a_process_that_dies_is_a_failure_of_its_chunk(tmp_path: Path) -> None:
    state = State(tmp_path / "state", HEADER)
    worker = [sys.executable, "-c", DYING]
    (failure,) = runner.run(["selection"], 2500, SETTING, state, jobs=2, seconds=math.inf, command=worker)
    assert "ended with -11: last words" in failure.message
    assert command_of(failure) == ["--kind", "selection", "--case", "500-999", "--seed", "0"]
    assert state.done("selection") == {0, 1, 2, 3, 4}
    assert state.parts["selection"].tally.cases == {"float32": 2000}


NOISY = """
from tests.campaign import selection, worker
run = selection.run
selection.run = lambda *given: (print("noise"), run(*given))[1]
worker.main()
"""


@pytest.mark.usefixtures("short_chunks")
def test_what_a_process_prints_is_no_answer(tmp_path: Path) -> None:
    state = State(tmp_path / "state", HEADER)
    worker = [sys.executable, "-c", NOISY]
    assert runner.run(["selection"], 60, SETTING, state, jobs=1, seconds=math.inf, command=worker) == []
    assert sum(state.parts["selection"].tally.cases.values()) == 500, "its chunks are not short"


@pytest.mark.usefixtures("short_chunks")
def test_the_worst_of_a_report_is_what_failed() -> None:
    """Also where the state tells of it in its list of failures only."""
    tally = layer.run(0, 15, SETTING)
    title = ": torch.float32 (2, 5, 4): error is {} of its budget by element, {} by row\n  3 of 40 elements"
    for lane, told in (
        ("injected routes", "mixture out" + title.format("2.31", "0.5")),
        ("injected routes", "mixture_gradient attn.norm.gamma" + title.format("0.02", "17.4")),
        ("own routers", "mixture_gradient x" + title.format("inf", "inf")),
        ("own routers", "RuntimeError: out of memory"),
    ):
        tally.failures.append(Failure(f"{lane} float32 {LayerCase()}: {told}", "again"))
    run = (HEADER, {"layer": Part({0}, tally)})
    told = report.markdown([run]).splitlines()[-1]
    for words in (
        "mixture, float32: 2.31;",
        "mixture gradient, float32: 17.40;",
        "mixture gradient with its own routers, float32: inf |",
        f"mixture, float64: {max(f for f, _ in tally.band('mixture', 'float64').worst):.2f}",
        "| 4 |",
    ):
        assert words in told
    assert "<td>17.4</td>" in report.worst([run], "layer")


def test_tallies_survive_json() -> None:
    tally = solver.run(0, 50, SETTING)
    tally.failures.append(Failure("what", "again"))
    tally.band("scores", "float32").enter(np.array([0.5, np.inf]), ["half", "broken"])
    there = json.loads(json.dumps(tally.json()))
    assert Tally.of(there).json() == tally.json()
    assert as_ranges({1, 2, 3, 7, 9, 10}) == [[1, 3], [7, 7], [9, 10]]
    assert (Tally.of(there).pairs == tally.pairs).all()
    assert (tally.pairs == tally.pairs.T).all()


def test_bands_bin_by_fraction() -> None:
    band = Band()
    band.enter(np.array([0.0, 1e-7, 0.9, 1.0, 1.1, np.inf]), list("abcdef"))
    assert band.counts[[0, 1, -2, -1]].tolist() == [1, 1, 2, 2]
    assert [snippet for _, snippet in band.worst] == ["f", "e", "d", "c", "b"]


# --- the command and its report --------------------------------------------------------------------------------------


def test_processes_find_what_one_finds_and_the_report_stands_alone(tmp_path: Path) -> None:
    """Two processes, then a report from their state and another's."""
    state, page, image = tmp_path / "state.jsonl", tmp_path / "page.html", tmp_path / "page.png"
    words = ["--kind", "selection", "layer", "--cases", "20", "--jobs", "2", "--state", str(state)]
    assert command.main(words) == 0
    header, parts = read(state)
    assert {kind: sorted(part.done) for kind, part in parts.items()} == {"selection": [0], "layer": [0]}
    assert without_time(parts["selection"].tally) == without_time(selection.run(0, 500, SETTING))
    assert sum(parts["layer"].tally.distinct().values()) > 15

    other = State(tmp_path / "gpu.jsonl", HEADER | {"device": "cuda", "kernels": "triton"})
    tally = solver.run(0, 60, SETTING)
    tally.failures.append(Failure("<wrong> & bad", 'python -m tests.campaign --example "LayerCase(n=1)"'))
    other.add("solver", 0, tally)
    table = tmp_path / "page.md"
    table.write_text("before\n<!-- campaign:begin -->\nold\n<!-- campaign:end -->\nafter\n")
    words = ["--of", str(state), str(other.path), "--report", str(page), "--picture", str(image)]
    assert command.main([*words, "--table", str(table)]) == 1
    lines = table.read_text().splitlines()
    assert (lines[0], lines[-1], "old" in lines) == ("before", "after", False)
    assert "| selection | cpu, torch | 500 | 0 | exact |" in lines
    text = page.read_text()
    assert "http" not in text
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)', text))
    assert len(re.findall("<img", text)) == len(re.findall(r'src="', text)) == 2 + 3 * 2
    assert not re.search(r"<(script|link|iframe)|url\(|@import", text)
    assert "&lt;wrong&gt; &amp; bad" in text
    assert header["environment"]["versions"]["torch"] in text
    assert header["hashes"]["optimized"][:12] in text
    for words in ("cuda, triton", "cpu, torch", "selection 500", "--example &quot;LayerCase(n=1)&quot;"):
        assert words in text
    assert image.read_bytes().startswith(b"\x89PNG")


WRONG_USE = {
    "--cases -5": "--cases: expected an integer >= 1, got '-5'",
    "--cases 0": "--cases: expected an integer >= 1, got '0'",
    "--cases 1e6": "--cases: expected an integer >= 1, got '1e6'",
    "--jobs -1": "--jobs: expected an integer >= 0, got '-1'",
    "--seconds 0": "--seconds: expected a number > 0, got '0'",
    "--seconds nan": "--seconds: expected a number > 0, got 'nan'",
    "--seed -1": "--seed: expected an integer from 0 to 4294967295, got '-1'",
    "--seed 4294967296": "--seed: expected an integer from 0 to 4294967295, got '4294967296'",
    "--kind attention": "--kind: invalid choice: 'attention'",
    "--kind solver solver": "--kind: expected each kind once, got solver solver",
    "--kind solver --case -3": "--case: expected an index >= 0, or FIRST-LAST, got '-3'",
    "--kind solver --case 5-2": "--case: expected an index >= 0, or FIRST-LAST, got '5-2'",
    "--kind solver --case all": "--case: expected an index >= 0, or FIRST-LAST, got 'all'",
    "--case 5": "--kind: expected one kind with --case, got selection solver layer causal",
    "--kind solver --case 5 --cases 7": "--cases: expected with a run, got it with --case",
    "--kind solver --case 5 --report page.html": "--report: expected with --of or a run, got it with --case",
    "--kind solver --example LayerCase()": "--kind: expected layer or causal with --example, got solver",
    "--example LayerCase() --dtype float8": "--dtype: invalid choice: 'float8'",
    "--example LayerCase() --property own-routers --dtype float16": "--dtype: expected float64 with",
    "--example LayerCase() --property law": "--property: expected one of injected-routes, own-routers, got law",
    "--dtype float16": "--dtype: expected with --example, got it with a run",
    "--kind layer --property own-routers": "--property: expected with --example, got it with a run",
    "--of state": "--of: expected with --report, --picture or --table, got none of them",
    "--of state --report page.html --seed 4": "--seed: expected with --case or a run, got it with --of",
    "--report .": "--report: expected a file, got the folder .",
    "--table nowhere.md": "--table: nowhere.md: expected a page, got No such file",
    "--table unmarked.md": "unmarked.md: expected <!-- campaign:begin --> and <!-- campaign:end --> once",
}


@pytest.mark.parametrize("words", WRONG_USE)
def test_wrong_use_ends_with_status_2_and_runs_nothing(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unmarked.md").write_text("a page\n")
    for kind in (*BATCHED, Drawn):
        monkeypatch.delattr(kind, "run")
    with pytest.raises(SystemExit) as ended:
        command.main(words.split())
    assert ended.value.code == 2
    assert WRONG_USE[words] in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["unmarked.md"]


@pytest.mark.parametrize(("name", "value"), [("cases", 0), ("cases", -5), ("cases", 2.5), ("jobs", -1)])
def test_a_run_of_nothing_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    numbers = {"cases": 500, "jobs": 0, name: value}
    with State(tmp_path / "state", HEADER) as state, pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
        runner.run(["selection"], numbers["cases"], SETTING, state, jobs=numbers["jobs"], seconds=1)


@given(case=layer_cases(), other=causal_cases())
@settings(max_examples=20)
def test_an_example_is_read_as_it_was_written(case: LayerCase, other: CausalCase) -> None:
    assert layer.parse(repr(case)) == case
    assert causal.parse(repr(other)) == other


OPTIONS = {**SMALL, **HARD, "solver": "sigmoid"}
NO_EXAMPLES = {
    "open('made', 'w')": "expected LayerCase(name=literal, ...)",
    "LayerCase(n=open('made', 'w').close())": "expected LayerCase(name=literal, ...)",
    "LayerCase(options={'eps': open('made', 'w')})": "expected LayerCase(name=literal, ...)",
    "(lambda: LayerCase())()": "expected LayerCase(name=literal, ...)",
    "layer.LayerCase()": "expected LayerCase(name=literal, ...)",
    "RouterCase(n=3)": "expected LayerCase(name=literal, ...)",
    "LayerCase(2, 17)": "expected LayerCase(name=literal, ...)",
    "LayerCase(**{'n': 3})": "expected LayerCase(name=literal, ...)",
    "LayerCase(n=3": "expected LayerCase(name=literal, ...)",
    "LayerCase(n=3, n=4)": "expected LayerCase(name=literal, ...)",
    "LayerCase(rows=3)": "rows: expected one of batch, n, dim",
    "LayerCase(n=0)": "n: expected an integer >= 1, got 0",
    "LayerCase(n='3')": "n: expected an integer >= 1, got '3'",
    "LayerCase(heads=True)": "heads: expected an integer >= 1, got True",
    "LayerCase(batch=None)": "batch: expected an integer >= 1, got None",
    "LayerCase(window=-1)": "window: expected an integer >= 1, got -1",
    "LayerCase(seed=-1)": "seed: expected an integer >= 0, got -1",
    "LayerCase(prenorm=1)": "prenorm: expected True or False, got 1",
    "LayerCase(mask='some')": "mask: expected one of none, all",
    "LayerCase(options=[])": "options: expected options of the routers by name, got []",
    "LayerCase(options={'dim': 3})": "router_options: expected names among",
    "LayerCase(options={'eps': -1.0})": "eps: expected a finite number > 0, in [2.2e-308, 2.8e+306], got -1.0",
    "LayerCase(window=3, dim_head=7)": "dim_head: expected an even number with local attention",
}


NO_CAUSAL_EXAMPLES = {
    "LayerCase(n=3)": "expected CausalCase(name=literal, ...)",
    "CausalCase(n=open('made', 'w').close())": "expected CausalCase(name=literal, ...)",
    "CausalCase(options={}, batch=1, n=3)": "CausalCase.__init__() missing 1 required positional argument: 'seed'",
    "CausalCase(options={}, batch=1, n=3, seed=0)": "options: expected average_routed, capacity_factor,",
    "CausalCase(batch=0)": "batch: expected an integer >= 1, got 0",
    "CausalCase(n=-1)": "n: expected an integer >= 0, got -1",
    "CausalCase(masked=1)": "masked: expected True or False, got 1",
    "CausalCase(mask='prefix')": "mask: expected one of random, left, right",
    "CausalCase(odd='huge')": "odd: expected one of none, nan, inf, got 'huge'",
    "CausalCase(cut=2.0)": "cut: expected a float from 0 to 1, got 2.0",
    "CausalCase(lengths=[3])": "lengths: expected a tuple of integers >= 0, got [3]",
    "CausalCase(lengths=(2, -1))": "lengths: expected a tuple of integers >= 0, got (2, -1)",
    f"CausalCase(options={OPTIONS}, batch=1, n=3, seed=0, lengths=(1, 1))": "lengths: expected a sum of 3 tokens",
    f"CausalCase(options={OPTIONS | {'heads': 0}}, batch=1, n=3, seed=0)": "heads: expected an integer >= 1, got 0",
}


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        *(("layer", text, said) for text, said in NO_EXAMPLES.items()),
        *(("causal", text, said) for text, said in NO_CAUSAL_EXAMPLES.items()),
    ],
)
def test_an_example_is_read_as_literals_only(
    kind: str, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command.main(["--kind", kind, "--example", text])
    assert ended.value.code == 2
    assert f"--example: {said}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "what stands there was run"
