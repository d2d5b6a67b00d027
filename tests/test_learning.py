"""The measurements of what models learn (tests/learning): data, counts, and that a run goes on where it was."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import check_identical
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import optimized
from tests.learning import __main__ as command
from tests.learning import grid, report, summary, workers
from tests.learning.pictures import PICTURES
from tests.learning.trial import macs, recall, tasks, text, watched
from tests.learning.trial.batch import IGNORED
from tests.learning.trial.controls import RandomMemory, WindowTopK
from tests.learning.trial.models import ROUND, build, logits_of, parameters_of
from tests.learning.trial.settings import Settings
from tests.learning.trial.training import Run
from tests.noise.layers import WindowTopK as ReferenceWindowTopK
from tests.record import REPORTS

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "steps": 2, "batch": 2, "n": 32, "layers": 1, "dim": 16, "heads": 2, "dim_head": 8, "window": 8, "experts": 2,
    "every": 1, "unseen": 2, "prefixes": 2, "precision": "float32",
}  # fmt: skip
OF_RECALL = {"pairs": 5, "symbols": 7}


def small(task: str, model: str, seed: int = 0, **changed: Any) -> Settings:
    shape: dict[str, Any] = {"queries": 8, "keys": 6} if model not in ("dense", "local") else {"experts": 0, "keys": 0}
    shape |= {"queries": 0} if model in ("dense", "local") else {}
    if model in ("few-queries", "window-top-k"):
        shape["queries"] = 3
    return Settings(task, model, seed, **SMALL | shape | (OF_RECALL if task == "recall" else {}) | changed)


# Data


def test_answers_of_recall_follow_from_its_tokens() -> None:
    s = small("recall", "dense", batch=20, unseen=20)
    tokens, targets = tasks.batch(s, 3)
    assert tokens.shape == targets.shape == (20, s.n)
    for row, answers in zip(tokens.tolist(), targets.tolist()):
        table, asked = {}, []
        for place, token in enumerate(row):
            symbol, attribute = divmod(token, recall.VALUES)
            if symbol < s.symbols:  # a key
                assert place < s.n // 4
                assert symbol not in table
                table[symbol] = attribute
            elif symbol < 2 * s.symbols:  # a question
                assert place >= s.n - s.window
                assert attribute == 0  # nothing of the answer
                assert answers[place] == table[symbol - s.symbols]
                asked.append(symbol)
                continue
            assert answers[place] == IGNORED
        assert len(table) == s.pairs
        assert len(asked) == s.window
        assert len(set(asked[: s.pairs])) == s.pairs  # all, before one comes again


def test_answers_of_recall_are_a_guess_without_the_pairs() -> None:
    """Given all but the values of the keys, every value is as likely: they are drawn on their own."""
    s = small("recall", "dense", batch=400, unseen=400)
    tokens, targets = tasks.batch(s, 0)
    answers, distractors = targets[:, -1], tokens[:, s.n // 4] % recall.VALUES
    assert len(answers.unique()) == recall.VALUES
    assert 5 <= (answers == distractors).sum() <= 60  # 25 expected


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"layers": 2}, r"n: expected tokens between pairs and questions that 2 windows of 8 don't reach"),
        ({"pairs": 8}, r"pairs: expected an integer in \[1, 7\]"),
        ({"n": 36}, r"n: expected a multiple of the window, 8, got 36"),
        ({"experts": 3}, r"experts: expected a divisor of the 2 heads"),
        ({"unseen": 3}, r"unseen: expected a multiple of the batch"),
        ({"keys": 0}, r"keys: expected an integer >= 1 for the model sigmoid"),
        ({"precision": "half"}, r"precision: expected one of bfloat16, float32"),
    ],
)
def test_settings_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small("recall", "sigmoid", **changed)


def test_held_out_text_is_apart() -> None:
    trained, held_out = text.parts()
    assert trained.data_ptr() + len(trained) == held_out.data_ptr()
    assert len(trained) + len(held_out) == text.described()["bytes"] > 4_000_000
    s = small("text", "dense", batch=8, unseen=8)
    for part, (tokens, targets) in ((trained, tasks.batch(s, 5)), (held_out, tasks.unseen(s, 8))):
        whole = part.numpy().tobytes()
        check_identical(tokens[:, 1:], targets[:, :-1].clone())
        for row in torch.cat((tokens, targets[:, -1:]), 1).to(torch.uint8):
            assert row.numpy().tobytes() in whole
    check_identical(tokens[0], held_out[: s.n].long())
    assert not torch.equal(tasks.batch(s, 5).tokens, tasks.batch(s, 6).tokens)
    check_identical(tasks.batch(s, 5).tokens, tasks.batch(replace(s, model="local"), 5).tokens)


def test_masked_bytes() -> None:
    s = small("encoder", "dense", batch=100, unseen=100)
    shown, targets = tasks.batch(s, 0)
    asked = targets != IGNORED
    whole = torch.where(asked, targets, shown)
    check_identical(shown[~asked], whole[~asked])
    assert whole.max() < text.MASK
    assert 0.12 < asked.double().mean() < 0.18
    share = {"masked": (shown == text.MASK), "kept": (shown == targets)}
    assert 0.75 < (share["masked"] & asked).sum() / asked.sum() < 0.85
    assert 0.07 < (share["kept"] & asked).sum() / asked.sum() < 0.14
    assert not (share["masked"] & ~asked).any()


# Models


@pytest.mark.parametrize("task", ["recall", "encoder"])
def test_models_have_equal_parameters(task: str) -> None:
    counts = [parameters_of(build(small(task, model))) for model in grid.TAKE_PART[task]]
    assert max(counts) - min(counts) <= 3 * ROUND * SMALL["dim"] * SMALL["layers"]


@pytest.mark.parametrize(
    ("task", "model"),
    [("text", "dense"), ("text", "local"), ("text", "sigmoid"), ("encoder", "dense"), ("encoder", "sigmoid")],
)
def test_counts_of_macs(task: str, model: str) -> None:
    """Half of what a counter sees, but for what it counts as if it were whole."""
    s = small(task, model)
    parts = macs.forward(s)
    if model == "dense" and task == "text":  # of a triangle it counts the square
        parts["attention"] *= 2 * s.n / (s.n + 1)
    if model == "sigmoid" and task == "text":  # without our kernels keys of all tokens are projected, once an expert
        parts["routed keys"] = 2 * s.layers * s.n * s.dim * s.heads * s.dim_head
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        logits_of(build(s), tasks.unseen(s, 1).tokens)
    assert counter.get_total_flops() == round(2 * sum(parts.values()))


def test_the_leaking_control_is_that_of_the_noise() -> None:
    """The optimized layer with another choice of queries, and the reference with it, in float64."""
    sizes: dict[str, Any] = {"num_routed_queries": 3, "num_routed_key_values": 6, "num_experts": 2}
    sizes |= {"local_attn_window_size": 8, "dim_head": 8, "heads": 2, "dtype": torch.float64}
    torch.manual_seed(0)
    ours, theirs = optimized.MixtureOfAutoregressiveAttention(16, **sizes), ReferenceWindowTopK(16, **sizes)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 37, 16, dtype=torch.float64)
    strict = ours(x)
    ours.__class__ = WindowTopK
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
    assert not torch.equal(ours(x), strict)


def test_random_memories_are_of_the_past() -> None:
    torch.manual_seed(0)
    layer = optimized.MixtureOfAutoregressiveAttention(
        16, num_routed_queries=8, num_routed_key_values=6, local_attn_window_size=8, dim_head=8, heads=2
    )
    layer.__class__ = RandomMemory
    x = torch.randn(1, 32, 16)
    found = [layer(x, return_routes=True)[1][1].positions for _ in range(2)]
    assert not torch.equal(*found)
    before = 8 * torch.arange(4)[:, None]
    assert (found[0] < before).all()
    assert (found[0] >= 0).sum() == 2 * 3 * 6


# What is watched


def test_stays_are_those_of_the_memory() -> None:
    torch.manual_seed(0)
    s = small("text", "sigmoid")
    model: Any = build(s).eval()
    tokens = tasks.unseen(s, 1).tokens
    with torch.no_grad():
        ((_, memory),) = watched.routes_of(model, tokens)
        found = watched.picks(model, tokens)
    assert watched.read(found["tokens"]) == tokens[0].tolist()
    for expert, written in enumerate(found["layers"][0]):
        stays = watched.read(written["stays"])
        for block in range(s.n // s.window):
            seen = {p for p, n in enumerate(stays) if p // s.window < block <= p // s.window + n}
            assert seen == set(memory.positions[0, expert, block].tolist()) - {-1}
        assert watched.read(written["queries"]) == [int(p >= s.window) for p in range(s.n)]


def test_losses_from_prefixes() -> None:
    """A model that looks ahead shows it; a strict one says the same of a prefix and of the whole."""
    found = {}
    for model in ("sigmoid", "window-top-k"):
        run = Run(small("text", model, batch=8, unseen=8, prefixes=10, rate=0.1, steps=3), CPU)
        run.train()
        found[model] = run.figures()["honest"]
    assert abs(found["sigmoid"]["difference"]) < 1e-5
    assert abs(found["window-top-k"]["difference"]) > 1e-5
    assert found["sigmoid"]["places"] == 10


# Runs

KINDS = [("recall", m) for m in grid.TAKE_PART["recall"]]
KINDS += [("encoder", "sigmoid"), ("packages", "reference")]


@pytest.mark.parametrize(("task", "model"), KINDS, ids=lambda value: value)
def test_a_run_goes_on_where_it_was(task: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s, whole = small(task, model), workers.Places(("cpu",), None, float("inf"))
    expected = workers.perform(s, CPU, whole, lambda *told: None)
    assert expected is not None
    assert "reason" not in expected, expected
    clock = iter((0.0, 2.0))
    with monkeypatch.context() as patch:
        patch.setattr(workers.time, "time", lambda: next(clock))
        assert workers.perform(s, CPU, workers.Places(("cpu",), tmp_path, 1.0), lambda *told: None) is None
    (state,) = tmp_path.iterdir()
    assert torch.load(state, weights_only=True)["kept"]["step"] == 1
    found = workers.perform(s, CPU, workers.Places(("cpu",), tmp_path, float("inf")), lambda *told: None)
    assert found is not None
    assert list(tmp_path.iterdir()) == []
    assert found | {"seconds": 0.0} == expected | {"seconds": 0.0}


def test_a_run_that_fails_says_why() -> None:
    s = small("text", "sigmoid")
    found = workers.perform(s, torch.device("meta"), workers.Places(("meta",), None, float("inf")), lambda *told: None)
    assert found is not None
    assert "Error" in found["reason"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two steps of some models of every task."""
    path = tmp_path_factory.mktemp("learning") / "report.json"
    options = ["--device", "cpu", "--steps", "2", "--every", "1", "--batch", "2", "--unseen", "2"]
    options += ["--layers", "1", "--out", str(path)]
    models = ["--models", "sigmoid", "window-top-k", "optimized", "reference"]
    assert command.main(["--size", "small", *options, *models]) == 0
    assert command.main(["packages", "--seeds", "1", "--size", "small", *options]) == 0
    some = ["--models", "dense", "--n", "192", "--pairs", "2"]
    assert command.main(["recall", "--size", "small", *some, *options]) == 0
    assert list(path.parent.iterdir()) == [path]  # no run is on its way
    return path


def test_the_report(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report.read(made)
    assert set(found["hashes"]) == set(report.SOURCES)
    assert found["corpus"]["sha256"] == text.described()["sha256"]
    for run in found["runs"]:
        s = Settings(**run["settings"])
        assert [step for step, _, _ in run["curve"]] == [1, 2]
        assert len(run["first"]) == 2
        assert run["macs_of_a_step"] == pytest.approx(macs.of_a_step(s), rel=1e-4)
        assert set(run["picks"]) == ({"seeded", "trained"} if s.mixture and s.seed == 0 else set())
        assert (run["honest"] is None) == (s.task == "encoder")
    before = made.read_text()
    assert command.main(["text", "--read", str(made)]) == 0
    assert "window-top-k" in capsys.readouterr().out
    again = ["text", "--size", "small", "--device", "cpu", "--steps", "2", "--every", "1", "--batch", "2"]
    assert command.main([*again, "--unseen", "2", "--layers", "1", "--models", "sigmoid", "--out", str(made)]) == 0
    assert json.loads(made.read_text())["runs"] == json.loads(before)["runs"]


@pytest.mark.parametrize(
    ("task", "picture"),
    [
        *((task, "task") for task in ("recall", "text", "packages")),
        *(("text", name) for name in PICTURES if name != "task"),
    ],
)
def test_pictures(task: str, picture: str, made: Path, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    given = [task, "--read", str(made), "--plot", str(path), "--picture", picture]
    assert command.main(given) == 0
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert path.stat().st_size > 10_000


def test_runs_in_another_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A place of two takes a run, and gives it back, since there is no time."""
    given = ["recall", "--models", "dense", "--size", "small", "--device", "cpu", "--devices", "0", "0"]
    assert command.main([*given, "--budget", "1e-9", "--out", str(tmp_path / "report.json")]) == 1
    assert "1 runs were put aside" in capsys.readouterr().out


@pytest.mark.nightly
def test_runs_on_several_devices(tmp_path: Path) -> None:
    """Here two processes, which import all that they need: half a minute."""
    path = tmp_path / "report.json"
    options = ["--size", "small", "--device", "cpu", "--devices", "0", "0", "--steps", "1", "--batch", "2"]
    given = ["recall", "--models", "dense", "local", *options, "--unseen", "2", "--out", str(path)]
    assert command.main(given) == 0
    assert {run["settings"]["model"] for run in report.read(path)["runs"]} == {"dense", "local"}


def test_what_has_no_time_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    given = ["text", "--size", "small", "--device", "cpu", "--budget", "1e-9", "--models", "dense", "--out", str(path)]
    assert command.main(given) == 1
    assert not path.exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["speech"], "TASK: expected one of recall, text"),
        (["text", "--sweeps", "pairs"], "--sweeps: expected some of"),
        (["text", "--models", "gpt"], "--models: expected some of dense"),
        (["recall", "--n", "640"], "n: expected tokens between pairs and questions"),
        (["--plot", "a.png"], "--plot: expected one task"),
        (["encoder", "--models", "exact"], "--models, --sweeps: expected some of the task"),
    ],
)
def test_bad_arguments(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.arguments(["--size", "full", *given])
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_report_of_other_sources_is_refused(tmp_path: Path, made: Path) -> None:
    path = tmp_path / "report.json"
    found = report.read(made)
    assert report.states(path, found) != report.states(path, found | {"hashes": {"another": "0"}})
    path.write_text(made.read_text().replace('"hashes": {', '"hashes": {"another": "0", ', 1))
    assert command.main(["text", "--size", "small", "--device", "cpu", "--out", str(path)]) == 2


# Summaries


@pytest.mark.parametrize("size", grid.SIZES)
def test_all_runs_that_are_offered_are_legal(size: str) -> None:
    for task, sweeps in grid.OF_TASK.items():
        found = grid.runs(task, size, sweeps, grid.TAKE_PART[task], [0, 1], {})
        assert {s.model for s in found} == set(grid.TAKE_PART[task])
        assert len({s.key() for s in found}) == len(found)
        dense = [s for s in found if s.model == "dense" and s.seed == 0]
        assert len(dense) == len({(s.n, s.pairs) for s in dense})  # once, whatever K is


def test_equal_macs_are_equal() -> None:
    found = grid.runs("text", "small", ["base"], ["dense", "local", "sigmoid"], [0], {}, equal_macs=True)
    spent = [s.steps * macs.of_a_step(s) for s in found]
    assert max(spent) - min(spent) < max(macs.of_a_step(s) for s in found)
    assert len({s.steps for s in found}) == 3


def test_summary_by_hand() -> None:
    settings = {**asdict(small("text", "dense")), "steps": 10, "decay": 0.5}
    run = {"settings": settings, "curve": [[5, 3.0, 0.0], [10, 1.0, 0.0]], "macs_of_a_step": 2.0, "seconds": 20.0}
    run |= {"loss": 1.0, "accuracy": 0.5, "parameters": 7, "honest": None, "side_by_side": 1}
    other = {**run, "settings": settings | {"model": "local"}, "macs_of_a_step": 1.0, "loss": 2.0, "seconds": 40.0}
    dense, local = summary.rows([run, other])
    assert (dense["at_equal_macs"], local["at_equal_macs"]) == (3.0, 1.0)
    assert (dense["at_equal_seconds"], local["at_equal_seconds"]) == (1.0, 3.0)
    for name in ("n", "pairs"):  # each by itself
        elsewhere = {**other, "settings": other["settings"] | {name: settings[name] + 1}}
        assert summary.rows([run, elsewhere])[0]["at_equal_macs"] == 1.0
    shared = other | {"side_by_side": 2, "seconds": 90.0}
    dense, local = summary.rows([run, shared])  # what shared its device has no seconds to compare
    assert dense["at_equal_seconds"] == 1.0
    assert "at_equal_seconds" not in local
    again = shared | {"settings": other["settings"] | {"seed": 1}}  # a seed that shared it adds a loss, no seconds
    local = summary.rows([run, other, again])[1]
    assert (local["seeds"], local["seconds"], local["at_equal_seconds"]) == (2, 40.0, 3.0)
    assert report.joined([{"a": 1, "runs": [run]}, {"a": 2, "runs": [run | {"loss": 9.0}, other]}]) == {
        "a": 1,
        "runs": [run, other],
    }
    assert dense["still_falling"] == 0.0  # both before the first look
    assert summary.at(run, 7.5, 1.0) == 2.0
    runs = [
        {"settings": {**settings, "seed": seed, "model": model}, "first": [1.0, value], "loss": value}
        for seed, model, value in ((0, "optimized", 1.5), (0, "reference", 1.0), (1, "optimized", 1.0),
                                   (1, "reference", 1.5), (2, "optimized", 9.0))
    ]  # fmt: skip
    assert summary.compared(runs) == {"seeds": 2, "first": 0.5, "difference": 0.0, "standard_error": 0.5}


@pytest.mark.parametrize("path", sorted(REPORTS.glob("learning-*.json")), ids=lambda path: path.stem)
def test_reports_that_are_committed(path: Path) -> None:
    found = report.read(path)
    assert found["runs"]
    for run in found["runs"]:
        s = Settings(**run["settings"])
        assert run["curve"][-1][0] == s.steps
        if s.task != "encoder" and s.model not in ("window-top-k", "random-memory"):
            honest = run["honest"]
            error = honest["standard_error_of_the_difference"]
            assert -5 * error - 1e-3 <= honest["difference"] <= 5 * error + 1e-3  # a strict model can't cheat
