"""The runner on a tree of its own: a package of one function, and tests of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mutants import __main__ as command
from mutants.child import is_assertion
from mutants.matrix import draw, joined, report, unexpected, verdict
from mutants.mutant import Mutant
from mutants.profiles import Profile
from mutants.runner import SECONDS, ControlError, Result, Runner
from tests.record import ROOT
from tests.statefile import StateError

ROOT_CONFTEST = str(ROOT / "conftest.py")
OLD = "return 2 * x"
KILLED = Mutant("killed", "toy/__init__.py", OLD, "return 3 * x", "mass")
SURVIVES = replace(KILLED, name="survives", new="return x + x")
RAISES = replace(KILLED, name="raises", new="raise ValueError")
BROKEN = replace(KILLED, name="broken", new="return 2 *")
ENDLESS = replace(KILLED, name="endless", new="while True: pass")
DIES = replace(KILLED, name="dies", new="import os; os._exit(7)")
TESTS = """
import toy

def test_twice():
    assert toy.twice(4) == 8
"""
PROFILE = Profile(("test_toy.py",))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "original"
    (root / "toy").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "toy" / "__init__.py").write_text(f"def twice(x):\n    {OLD}\n")
    (root / "tests" / "test_toy.py").write_text(TESTS)
    (root / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--max-examples')\n")
    return root


def runner(tree: Path, seconds: int = SECONDS) -> Runner:
    return Runner(tree, ("toy",), lambda file: PROFILE, tree.parent / "state.json", jobs=2, seconds=seconds)


def test_outcomes_are_told_apart(tree: Path) -> None:
    told: list[str] = []
    mutants = [KILLED, SURVIVES, RAISES, BROKEN, DIES]
    results = runner(tree).run(mutants, lambda name, result: told.append(f"{name}: {result.outcome}"))
    outcomes = {name: result.outcome for name, result in results.items()}
    assert outcomes == {
        "killed": "killed", "survives": "survived", "raises": "raised", "broken": "broken", "dies": "crashed"
    }  # fmt: skip
    assert told[0] == "control of test_toy.py: survived"
    assert set(told[1:]) == {f"{name}: {outcome}" for name, outcome in outcomes.items()}
    assert results["killed"].test == "tests/test_toy.py::test_twice"
    assert results["killed"].error.startswith("AssertionError")
    assert results["killed"].seconds > 0
    assert "SyntaxError" in results["broken"].error
    assert (tree / "toy" / "__init__.py").read_text().count(OLD) == 1, "the original is left alone"
    unwanted = [line.split()[0] for line in unexpected(mutants, results)]
    assert unwanted == ["survives", "broken", "dies"]
    assert not unexpected([replace(SURVIVES, equivalent="x + x is 2 x for every number")], results)
    assert unexpected([replace(KILLED, equivalent="wrongly said so")], results)


def test_endless_loops_end(tree: Path) -> None:
    """A limit of this machine's own: several times what the control takes, which has to end before its limit."""
    control = runner(tree)._measured(PROFILE, None)
    assert control.outcome == "survived"
    assert runner(tree, seconds=math.ceil(4 * control.seconds))._measured(PROFILE, ENDLESS).outcome == "timeout"


def test_a_red_control_stops_the_run(tree: Path) -> None:
    (tree / "toy" / "__init__.py").write_text("def twice(x):\n    return 2 * x + 1\n")
    told: list[str] = []
    with pytest.raises(ControlError, match=r"killed tests/test_toy.py::test_twice"):
        runner(tree).run([replace(KILLED, old="2 * x + 1")], lambda name, result: told.append(name))
    assert len(told) == 1


def test_a_package_from_elsewhere_is_noticed(tree: Path) -> None:
    """As by a conftest that puts the original first."""
    (tree / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(tree)!r})\n"
        "def pytest_addoption(parser):\n    parser.addoption('--max-examples')\n"
    )
    with pytest.raises(ControlError, match=r"toy comes from .*original.*, not from the copy"):
        runner(tree).run([KILLED])


def test_results_are_kept_while_they_hold(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs again after an interruption; another test concerns survivors only, another function all."""
    runs: list[str] = []

    def measured(self: Runner, profile: Profile, mutant: Mutant | None) -> Result:
        runs.append(mutant.name if mutant else "control")
        if mutant is KILLED:
            return Result("killed", "tests/test_toy.py::test_twice[1]")
        if mutant is ENDLESS:
            raise KeyboardInterrupt
        return Result("survived")

    def ran(*mutants: Mutant) -> list[str]:
        runs.clear()
        runner(tree).run(mutants)
        return sorted(runs)

    monkeypatch.setattr(Runner, "_measured", measured)
    with pytest.raises(KeyboardInterrupt):
        ran(KILLED, ENDLESS)
    assert "killed" in json.dumps(json.loads((tree.parent / "state.json").read_text()))
    assert ran(KILLED, SURVIVES) == ["survives"]
    assert ran(KILLED, SURVIVES) == []
    assert ran(KILLED, replace(SURVIVES, new="return 2 * (x)")) == ["survives"]
    tests = tree / "tests" / "test_toy.py"
    tests.write_text(TESTS + "\ndef test_more():\n    assert toy.twice(1) == 2\n")
    assert ran(KILLED, SURVIVES) == ["control", "survives"]
    tests.write_text(TESTS.replace("4) == 8", "5) == 10"))
    assert ran(KILLED, SURVIVES) == ["control", "killed", "survives"]
    (tree / "toy" / "__init__.py").write_text(f"def twice(x):\n    {OLD}  # again\n")
    assert ran(KILLED, SURVIVES) == ["control", "killed", "survives"]


def test_a_second_run_is_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it runs anything; the first one keeps all of its results."""
    runs: list[str] = []

    def measured(self: Runner, profile: Profile, mutant: Mutant | None) -> Result:
        runs.append(mutant.name if mutant else "control")
        if mutant is RAISES:
            with pytest.raises(StateError, match=r"state\.json: expected a file that no other run writes"):
                runner(tree).run([ENDLESS])
        return Result("survived" if mutant is None else "killed")

    monkeypatch.setattr(Runner, "_measured", measured)
    first = [KILLED, RAISES, SURVIVES]
    assert {name: result.outcome for name, result in runner(tree).run(first).items()} == {
        mutant.name: "killed" for mutant in first
    }
    assert "endless" not in runs
    runs.clear()
    runner(tree).run([ENDLESS, *first])
    assert "endless" in runs
    assert not {"control", "survives"} & set(runs), "kept: a survivor, and kills by a test that is there"


@pytest.mark.parametrize(
    "content",
    [
        '{"a": ', "[]", '{"a": 3}', '{"a": {"code": "c", "tests": "t", "by": "b"}}', "\u00ff\x00",
        '{"a": {"code": "c", "tests": "t", "by": "b", "result": {"outcome": "won"}}}',
        '{"a": {"code": 1, "tests": "t", "by": "b", "result": {"outcome": "killed"}}}',
    ],
)  # fmt: skip
def test_corrupt_results_are_named(
    content: str, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And left as they were."""
    state = tree.parent / "state.json"
    state.write_bytes(content.encode("latin-1"))
    with pytest.raises(StateError, match=rf"^{state}: expected results of earlier runs, got .*; remove it"):
        runner(tree).run([KILLED])
    monkeypatch.setattr(command, "STATE", state)
    with pytest.raises(SystemExit) as ended:
        command.main(["--only", "gather-tokens"])
    assert ended.value.code == 2
    assert f"{state}: expected results of earlier runs" in capsys.readouterr().err
    assert state.read_bytes() == content.encode("latin-1")


CPU, GPU = ({"device": device, "hardware": {"name": device}} for device in ("cpu", "cuda"))


def test_what_needs_a_gpu_comes_from_its_report() -> None:
    """And only that: what the first report says of another stands."""
    gpu = replace(KILLED, name="gpu", device="cuda")
    cpu = report([KILLED, gpu], {"killed": Result("killed", "tests/test_toy.py::test_twice")}, CPU)
    cuda = report([KILLED, gpu], {"gpu": Result("survived"), "killed": Result("raised")}, GPU)
    assert [row["outcome"] for row in joined([cpu])["mutants"]] == ["killed", "needs a GPU"]
    both = joined([cpu, cuda])
    assert [row["outcome"] for row in both["mutants"]] == ["killed", "survived"]
    assert (both["totals"], both["device"]) == ({"killed": 1, "survived": 1}, "cpu")


def test_report_and_picture(tmp_path: Path) -> None:
    results = {"killed": Result("killed", "tests/test_a.py::test_b[c]", "AssertionError: no", 1.5)}
    mutants = (KILLED, replace(SURVIVES, device="cuda"))
    assert [verdict(m, None) for m in (SURVIVES, mutants[1])] == ["not run", "needs a GPU"]
    found = report(mutants, results, CPU)
    assert found["kind"] == "mutants"
    assert found["totals"] == {"killed": 1, "needs a GPU": 1}
    assert found["mutants"][0]["test"] == "tests/test_a.py::test_b[c]"
    draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_report_goes_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what can't be run or written is refused before anything runs."""
    path = tmp_path / "own.json"
    monkeypatch.setattr(command, "run", lambda *given: {"gather-tokens-of-item-0": Result("killed", "a::b")})
    assert command.main(["--only", "gather-tokens", "--jobs", "3", "--report", str(path)]) == 0
    totals = json.loads(path.read_text())["totals"]
    assert totals["killed"] == 1
    assert set(totals) == {"killed", "not run", "needs a GPU"}
    wrong = (["--jobs", "0"], ["--jobs", "-1"], ["--seconds", "0"], ["--only", "nothing_such"])
    for words in (*wrong, ["--report", str(tmp_path / "nowhere" / "own.json")]):
        with pytest.raises(SystemExit) as ended:
            command.main(words)
        assert ended.value.code == 2
        assert f"{words[0]}: expected" in capsys.readouterr().err


def test_wrong_use_of_pytest_is_refused(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line in a process of its own; once it is parsed, here."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "--max-examples=-5", "tests/test_docs.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--max-examples: expected an integer >= 1, got '-5'" in done.stderr
    assert "Traceback" not in done.stderr
    monkeypatch.setattr(pytestconfig.option, "only", "window")
    (root,) = (p for p in pytestconfig.pluginmanager.get_plugins() if getattr(p, "__file__", "") == ROOT_CONFTEST)
    with pytest.raises(pytest.UsageError, match=r"^--only: expected with --mutants, got 'window' without it"):
        root.pytest_configure(pytestconfig)


@pytest.mark.parametrize("error", [AssertionError(), pytest.fail.Exception("did not raise")])
def test_assertions(error: BaseException) -> None:
    assert is_assertion(error)
    assert not is_assertion(ValueError())
