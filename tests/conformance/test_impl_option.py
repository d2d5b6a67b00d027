"""`pytest --impl`: what it accepts, selects, says and writes; and that its documentation runs."""

from __future__ import annotations

import html
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import reference
from tests.conformance import plugin, report
from tests.conformance.causal.subject import FEATURES, CausalSubject
from tests.conformance.examine import FAILS, HOLDS, NOT_OFFERED, Verdict, examine
from tests.conformance.process import Examiner
from tests.conformance.properties import PROPERTIES
from tests.conformance.sets import SETS
from tests.conformance.subject import NotOffered, Subject, call, factory_of
from tests.faults.layers import LAYERS

ROOT = Path(__file__).parents[2]
MIXED = "experts_read_their_own_tokens"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "reference"}, "--impl: expected module:callable, .* got 'reference'"),
        ({"impl": ""}, "--impl: expected module:callable, .* got ''"),
        ({"impl": "reference:"}, "--impl: expected module:callable, .* got 'reference:'"),
        ({"impl": ":Layer"}, "--impl: expected module:callable, .* got ':Layer'"),
        ({"impl_report": Path("a.md")}, "--impl-report: expected together with --impl, got 'a.md' alone"),
        (
            {"impl": "reference:MixtureOfAttention", "impl_report": Path("a.txt")},
            "--impl-report: expected a file in .md, .json, .html, got 'a.txt'",
        ),
        ({"impl": "reference:MixtureOfAttention", "report": Path("a.json")}, "--report: expected without --impl"),
        ({"impl_timeout": 3.0}, "--impl-timeout: expected together with --impl, got '3.0' alone"),
        ({"causal": True}, "--causal: expected together with --impl, got it alone"),
        *(
            ({"impl": "a:B", "impl_timeout": float(bad)}, f"--impl-timeout: expected a finite number > 0, got {bad}")
            for bad in ("0.0", "-1.0", "nan", "inf")
        ),
    ],
)
def test_bad_values(options: dict[str, object], message: str) -> None:
    unset = {"impl": None, "causal": False, "impl_report": None, "impl_timeout": None, "report": None}
    given = SimpleNamespace(**(unset | options))
    with pytest.raises(pytest.UsageError, match=message):
        plugin.check_options(given)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", r"AttributeError: module '\w+' has no attribute 'Layer'\)"),
        ("Layer = 3", "which is 3"),
        ("import no_such_module", r"ModuleNotFoundError: No module named 'no_such_module'\)"),
        ("raise RuntimeError('no [/x] driver\\x1b[2J')", r"RuntimeError: no \[/x\] driver\\x1b\[2J\)"),
        ("def Layer(:", r"SyntaxError: "),
        ("import sys; sys.exit()", r"SystemExit: \)"),
        ("import pytest; pytest.importorskip('no_such_module')", "Skipped: could not import 'no_such_module'"),
        ("import unittest; raise unittest.SkipTest('no')", "SkipTest: no"),
    ],
)
def test_modules_without_a_layer(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"theirs_{abs(hash(source))}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"^--impl: expected module:callable, .* got '{module}:Layer'.*{message}"):
        factory_of(f"{module}:Layer")


# One process imports once for several sessions. Each ends its output with a line of its exit status.
SESSIONS = """
import json, sys, pytest
for options in json.loads(sys.argv[1]):
    print("ended with", int(pytest.main(["-p", "no:cacheprovider", *options])), flush=True)
"""
MIXES, AHEAD, WIDTH = "mixed", "ahead", "wide"
SOURCES = {
    MIXES: "from tests.faults.layers import LAYERS\nLayer = LAYERS['experts are mixed']\n",
    AHEAD: "from tests.noise.layers import SequenceTopK as Layer\n",  # which says nothing of itself
    WIDTH: "def Layer(width):\n    pass\n",
}


@pytest.mark.cpu  # whatever the device, the child runs on the CPU; what it shrinks to is that of a Hypothesis
def test_runs_on_layers_that_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One across processes too. The snippets of the reports raise what they say, without pytest."""
    for name, source in SOURCES.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # which --impl may refuse
    monkeypatch.syspath_prepend(tmp_path)
    mixed, ahead = tmp_path / "mixed.md", tmp_path / "ahead.md"
    here = ["tests/conformance", "tests/test_launch.py"]  # of the repository's own tests a few would do
    few = ["--impl-report", str(mixed), "-k", "experts or batch", "--max-examples", "5"]
    law = ["--causal", "--impl-report", str(ahead), "-k", "later_one or items_and", "--max-examples", "20"]
    options = [
        [*here, "-n", "1", "--impl", f"{MIXES}:Layer", *few],
        ["tests/conformance", "--impl", f"{AHEAD}:Layer", *law],
        ["tests/conformance", "--impl", f"{WIDTH}:Layer", "-k", "dtype", "--max-examples", "1"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", SESSIONS, json.dumps(options)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said = re.split(r"^(?<=\n)ended with (\d+)\n", done.stdout, flags=re.MULTILINE)
    assert said[1::2] == ["1", "1", str(int(pytest.ExitCode.NO_TESTS_COLLECTED))], done.stdout + done.stderr
    check_run_of_mixed_experts(said[0], mixed)
    check_run_of_one_that_looks_ahead(said[2], ahead)
    check_run_that_checks_nothing(said[4])


def check_run_of_mixed_experts(stdout: str, written: Path) -> None:
    assert f"its {len(PROPERTIES)} properties and no other tests are selected" in stdout
    assert f"conformance of {MIXES}:Layer: 4 hold, 1 fail, 0 not offered" in stdout
    assert re.search(r"experts read their own tokens +│ FAILS +│ B=1 N=3 D=8 E=2", stdout)
    assert re.search(r"=+ 1 failed, 4 passed\b", stdout), "tests of this repository ran as well"
    [snippet] = blocks(written)
    with pytest.raises(AssertionError, match="the output of other experts changed by"):
        exec(snippet, {})


def check_run_of_one_that_looks_ahead(stdout: str, written: Path) -> None:
    """Its report names the cut, and its snippet raises."""
    assert f"its {len(SETS[True].properties)} properties and no other tests are selected" in stdout
    assert f"conformance of {AHEAD}:Layer: 1 hold, 1 fail, 1 not offered" in stdout
    assert re.search(r"=+ 1 failed, 1 passed, 1 skipped\b", stdout)
    text = written.read_text()
    assert f"pytest --impl {AHEAD}:Layer --causal --impl-report FILE" in text
    cut = int(re.search(r"Smallest example: B=1 N=\d+ .* w=\d W=\d .*cut=(\d+)", text)[1])
    [snippet] = blocks(written)
    assert f"    cut={cut},\n" in snippet
    with pytest.raises(AssertionError, match=rf"^tokens from {cut} on changed \(.*\): token \d+ changed by "):
        exec(snippet, {})


def check_run_that_checks_nothing(stdout: str) -> None:
    assert f"conformance of {WIDTH}:Layer: 0 hold, 0 fail, 5 not offered" in stdout
    assert "nothing was checked" in stdout
    assert re.search(r"SKIPPED .* not offered: constructor: got an unexpected keyword argument", stdout)
    assert re.search(r"=+ 5 skipped, \d+ deselected", stdout)


def test_a_module_without_the_layer_is_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    given = {"impl": "theirs:NoLayer", "causal": False, "impl_report": None, "impl_timeout": None, "report": None}
    option = SimpleNamespace(**given, device="cpu", numprocesses=None)
    with pytest.raises(pytest.UsageError, match=r"^--impl: expected module:callable"):
        plugin.pytest_configure(SimpleNamespace(option=option, stash={}))


# What it raises is asked of a file, so that one process sees several of them.
DOES_NOT_RETURN = """
import os, signal, sys, time, unittest
from pathlib import Path
import hypothesis, pytest, reference

KIND, ASLEEP = (Path(__file__).with_suffix(suffix) for suffix in (".txt", ".asleep"))

class Layer(reference.MixtureOfAttention):
    def forward(self, x, **given):
        kind = KIND.read_text()
        if x.shape[1] > 3 and kind:
            exec(kind)
        return super().forward(x, **given)
"""


class Patient:
    """The end of a pipe whose time begins when the layer sleeps, however slow the machine is until then."""

    def __init__(self, connection: Any, asleep: Path) -> None:
        self._connection, self._asleep = connection, asleep

    def poll(self, timeout: float) -> bool:
        while not (self._connection.poll(0.05) or self._asleep.exists()):
            pass
        return self._connection.poll(timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@pytest.mark.cpu
def test_layers_that_do_not_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fails its property with a configuration of N > 3; the next one is examined as ever."""
    (tmp_path / "stops.py").write_text(DOES_NOT_RETURN)
    monkeypatch.syspath_prepend(tmp_path)
    examiner = Examiner("stops:Layer", "cpu", 300.0)
    kinds = {
        "sys.exit(0)": "SystemExit: 0",
        "pytest.importorskip('no_such_module')": "Skipped: could not import 'no_such_module': No module named",
        "raise unittest.SkipTest('a')": "SkipTest: a",
        "hypothesis.assume(False)": "UnsatisfiedAssumption: ",
        "raise KeyboardInterrupt": "KeyboardInterrupt: ",
        "os._exit(0)": "the process ended, exit code 0",
        "os.kill(os.getpid(), signal.SIGSEGV)": "the process ended, by SIGSEGV",
        "ASLEEP.touch(); time.sleep(3600)": "no answer within 0.5 seconds",
    }
    try:
        for kind, reason in kinds.items():
            (tmp_path / "stops.txt").write_text("")
            assert examiner.examine("inputs_are_left_alone", 2).verdict == HOLDS
            (tmp_path / "stops.txt").write_text(kind)
            if "sleep" in kind:
                examiner.timeout = 0.5
                examiner._connection = Patient(examiner._connection, tmp_path / "stops.asleep")
            found = examiner.examine("inputs_are_left_alone", 10)
            assert (found.verdict, found.reason[: len(reason)]) == (FAILS, reason)
            assert int(re.search(r"n=(\d+),", found.snippet)[1]) > 3
            assert f"N={re.search(r'n=([0-9]+),', found.snippet)[1]} " in found.example
    finally:
        examiner.close()


@pytest.mark.cpu
def test_a_module_that_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quits.py").write_text("import os; os._exit(7)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"got 'quits:Layer' \(the process ended, exit code 7\)"):
        Examiner("quits:Layer", "cpu", 300.0).start()


def test_tests_without_a_verdict_fail() -> None:
    """Those of a worker that crashed, or that another plugin skipped. What was not offered is no check."""

    def said(outcome: str, name: str, *verdicts: Verdict, text: str = "") -> tuple[str, Any]:
        properties = [("conformance", v.as_dict()) for v in verdicts]
        nodeid = f"tests/conformance/test_conformance.py::test_conformance[a:B-{name}]"
        return outcome, SimpleNamespace(nodeid=nodeid, user_properties=properties, longreprtext=text)

    first, second, third, *_ = PROPERTIES
    held, lacking = Verdict(first, "", "", HOLDS), Verdict(second, "", "", NOT_OFFERED, "no argument")
    for entries, expected in (
        ([said("passed", first, held), said("skipped", second, lacking)], {first: HOLDS, second: NOT_OFFERED}),
        ([said("failed", first, text="worker \x1b crashed")], {first: FAILS}),
        ([said("passed", first, held), said("error", first, text="teardown")], {first: FAILS}),
        ([said("error", first, text="teardown"), said("passed", first, held)], {first: FAILS}),
        ([said("skipped", third), said("skipped", second, lacking)], {second: NOT_OFFERED, third: FAILS}),
    ):
        stats: dict[str, list[Any]] = {}
        for outcome, entry in entries:
            stats.setdefault(outcome, []).append(entry)
        verdicts = plugin.verdicts_of(SimpleNamespace(stats=stats))
        assert {v.name: v.verdict for v in verdicts} == expected
        assert "\x1b" not in "".join(v.reason for v in verdicts)
    assert plugin.nothing_was_checked([])
    assert plugin.nothing_was_checked([lacking])
    assert not plugin.nothing_was_checked([lacking, held])


def test_verdicts() -> None:
    """A missing argument is no defect; an error of the layer's own is, with the smallest configuration."""

    def refuse(dim: int, **arguments: object) -> torch.nn.Module:
        if "solver" in arguments:
            raise TypeError("unexpected keyword argument 'solver'")
        return LAYERS["half precision raises"](dim, **arguments)

    subject = Subject(refuse)
    exact = examine(PROPERTIES["the_exact_solver_returns_the_limit"], subject, "a:b", 5)
    assert exact.verdict == NOT_OFFERED
    assert exact.reason == "constructor: unexpected keyword argument 'solver'"
    dtypes = examine(PROPERTIES["every_dtype"], subject, "a:b", 5)
    assert dtypes.verdict == FAILS
    assert dtypes.reason.splitlines() == [f"torch.{t}: expected scalar type Float" for t in ("bfloat16", "float16")]
    assert dtypes.example.startswith("B=1 N=12 D=16 E=1 H=2 d=8 Kq=6 Kkv=")
    assert examine(PROPERTIES["one_expert_equals_the_reference"], subject, "a:b", 5).verdict == HOLDS

    def only_one_head(dim: int, **arguments: object) -> torch.nn.Module:
        if arguments["heads"] != 1:
            raise NotOffered("one head only")
        return LAYERS["half precision raises"](dim, **arguments)

    partly = examine(PROPERTIES["one_expert_equals_the_reference"], Subject(only_one_head), "a:b", 20)
    assert partly.verdict == HOLDS
    assert re.fullmatch(r"\d+ of 20 configurations are not offered: one head only", partly.reason)


def test_other_parameter_names_are_not_offered() -> None:
    class Renamed(torch.nn.Module):
        def __init__(self, dim: int, **arguments: object) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(dim))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    found = {name: examine(p, Subject(Renamed), "a:b", 2) for name, p in PROPERTIES.items()}
    assert found["state_dict_has_the_names_and_shapes"].verdict == FAILS
    value = found["one_expert_equals_the_reference"]
    assert value.verdict == NOT_OFFERED
    assert value.reason.startswith("state dict: it has no ")


def test_reports(tmp_path: Path) -> None:
    verdicts = [
        Verdict("a_b", "a b", "What it checks.", HOLDS),
        Verdict("c_d", "c d", "Another | thing.", FAILS, "[x] is | wrong\nmore", "B=1", "code[0]()\n"),
        Verdict("e_f", "e f", "A third.", NOT_OFFERED, "no such argument"),
    ]
    spec = "reference:MixtureOfAttention"
    for suffix in report.SUFFIXES:
        report.write(tmp_path / "sub" / f"report{suffix}", spec, "cpu", verdicts)
    text = (tmp_path / "sub/report.md").read_text()
    assert "1 hold, 1 fail, 1 not offered" in text
    assert "| [c d](#c-d) | **FAILS** | <code>&#91;x&#93; is &#124; wrong</code> |" in text
    assert "```python\ncode[0]()\n```" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text
    found = json.loads((tmp_path / "sub/report.json").read_text())
    assert found["properties"] == [v.as_dict() for v in verdicts]
    page = (tmp_path / "sub/report.html").read_text()
    assert all(part in page for part in ("c d", "[x] is | wrong", "code[0]()", "no such argument"))
    assert not re.search(r"(src|href)=", page)


HOSTILE = "<img src=x onerror=alert(1)> [/x] [red]y[/] :ok: `a|b` \\| ```` *c* _d_ ~~e~~ &amp; $f$ [g](http://h)"


def test_texts_of_errors_are_no_markup(tmp_path: Path) -> None:
    verdicts = [Verdict("a_b", "a b", "What.", FAILS, f"{HOSTILE}\n```\n# h", "B=1", "code()\n```\n")]
    verdicts.append(Verdict("c_d", "c d", "What.", NOT_OFFERED, HOSTILE))
    spec = "reference:MixtureOfAttention"
    terminal = Console(file=io.StringIO(), width=400)
    terminal.print(report.table(spec, verdicts))
    assert terminal.file.getvalue().count(HOSTILE) == 2
    cell, fence = report.code(HOSTILE), "\n".join(report.block("a ```` b"))
    assert not re.search(r"[<>|`*_~$\[\]\\]", cell.removeprefix("<code>").removesuffix("</code>"))
    assert html.unescape(cell) == f"<code>{HOSTILE}</code>"
    assert fence == "`````\na ```` b\n`````"
    for suffix in report.SUFFIXES:
        report.write(tmp_path / f"report{suffix}", spec, "cpu", verdicts)
    text = (tmp_path / "report.md").read_text()
    assert text.count(f"| {cell} |") == 2
    outside = re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<img" not in outside
    assert "# h" not in outside.replace("## ", "")
    page = (tmp_path / "report.html").read_text()
    assert "<img" not in page
    # The table is narrow and breaks lines; the text below it is whole up to its width.
    shown = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert re.sub(r"\s", "", HOSTILE) in re.sub(r"\s", "", shown)
    assert json.loads((tmp_path / "report.json").read_text())["properties"] == [v.as_dict() for v in verdicts]


def test_documentation_runs() -> None:
    kernel, _, adapter, _ = blocks(ROOT / "docs" / "check-your-own.md")
    exec(kernel, {"__name__": "documentation"})
    made: dict[str, object] = {"__name__": "documentation"}
    exec(adapter, made)
    subject = Subject(made["Adapted"])
    verdicts = {name: examine(p, subject, "a:b", 5, shrink=False).verdict for name, p in PROPERTIES.items()}
    assert FAILS not in verdicts.values()
    assert verdicts["gradients_of_attention"] == verdicts["masked_tokens_take_no_part"] == HOLDS
    assert verdicts["context_is_attended_to"] == NOT_OFFERED


NEEDS_NO_STATE_DICT = {
    "documented_examples_run",
    "inputs_are_left_alone",
    "no_items_and_no_tokens_are_legal",
    "batch_items_are_isolated",
    "batch_size_changes_nothing",
    "content_of_masked_tokens_does_not_matter",
    "masked_padding_changes_nothing",
    "the_output_has_the_dtype_of_x",
    "forward_is_deterministic",
    "a_deep_copy_computes_the_same",
    "strides_do_not_matter",
}


def test_any_attention_layer_can_be_checked() -> None:
    """That of the documentation, with its features and without; and it is found out where it is wrong."""
    _, dense, *_ = blocks(ROOT / "docs" / "check-your-own.md")
    made: dict[str, Any] = {"__name__": "documentation"}
    exec(dense, made)
    layer = made["Dense"]

    def held(factory: Any) -> dict[str, str]:
        found = {name: examine(p, Subject(factory), "a:b", 5, shrink=False) for name, p in PROPERTIES.items()}
        assert all(v.reason.startswith("features: no ") for v in found.values() if v.verdict == NOT_OFFERED)
        return {name: v.verdict for name, v in found.items() if v.verdict != NOT_OFFERED}

    assert held(layer) == dict.fromkeys(NEEDS_NO_STATE_DICT, HOLDS)

    class Mixed(layer):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x, mask) + x.mean()

    wrong = {name for name, v in held(Mixed).items() if v == FAILS}
    assert {"batch_items_are_isolated", "content_of_masked_tokens_does_not_matter"} <= wrong

    class Silent(layer):
        features = None

    for name in NEEDS_NO_STATE_DICT - {"documented_examples_run"}:
        assert examine(PROPERTIES[name], Subject(Silent), "a:b", 5, shrink=False).verdict == HOLDS


NEEDS_NO_FEATURE = {name for name, p in SETS[True].properties.items() if not p.needs}


def test_any_causal_layer_can_be_checked() -> None:
    """That of the documentation; and it is found out where it is wrong. Nothing is read off a signature."""
    *_, window = blocks(ROOT / "docs" / "check-your-own.md")
    made: dict[str, Any] = {"__name__": "documentation"}
    exec(window, made)
    assert f"{len(NEEDS_NO_FEATURE) - 1} others ask no more" in (ROOT / "docs" / "check-your-own.md").read_text()

    class Silent(made["Window"]):
        features = None

        def forward(self, x: torch.Tensor, mask: object = None, cache: object = None) -> torch.Tensor:
            return super().forward(x)

    class Ahead(made["Window"]):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.roll(-1, 1)

    def said(factory: Any, verdict: str) -> set[str]:
        found = (examine(p, CausalSubject(factory), "a:b", 3, shrink=False) for p in SETS[True].properties.values())
        return {v.name for v in found if v.verdict == verdict}

    assert said(made["Window"], HOLDS) == said(Silent, HOLDS) == NEEDS_NO_FEATURE
    of_the_law = {"no_token_sees_a_later_one", "gradients_of_the_past_take_no_later_token"}
    assert of_the_law | {"a_prefix_has_the_output_of_the_whole"} <= said(Ahead, FAILS)


def test_features_of_a_causal_layer_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is asked for by some property; and what a layer says that it has, it must have."""
    asked = frozenset().union(*(p.needs for p in SETS[True].properties.values()))
    by_cases = {"average_routed", "local_attn_heads", "capacity_factor", "solver", "eps"}
    assert asked | by_cases == set(FEATURES)

    class Claims(reference.MixtureOfAutoregressiveAttention):
        features = ("cache",)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    found = examine(SETS[True].properties["a_cache_is_a_value"], CausalSubject(Claims), "a:b", 2, shrink=False)
    assert found.verdict == FAILS
    assert found.reason.startswith("features has cache, but forward: got an unexpected keyword argument")
    (tmp_path / "crosswise.py").write_text("class Layer:\n    features = {'context'}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert factory_of("crosswise:Layer").features == {"context"}
    with pytest.raises(ValueError, match=r"expected names among state_dict, mask, rotary_emb, .*, got 'context'"):
        factory_of("crosswise:Layer", FEATURES)


def test_features_restrict_what_is_drawn() -> None:
    drawn = []

    class Layer(reference.MixtureOfAttention):
        features = ("state_dict", "mask", "prenorm", "context")

        def __init__(self, dim: int, **given: Any) -> None:
            super().__init__(dim, **given)
            drawn.append(given)

    for name, expected in {
        "batch_items_are_isolated": (HOLDS, ""),
        "masked_tokens_take_no_part": (HOLDS, ""),
        "context_is_attended_to": (HOLDS, ""),
        "average_routed_divides_by_the_number_of_terms": (NOT_OFFERED, "features: no average_routed, local_attn"),
        "local_attention_sees_no_padding": (NOT_OFFERED, "features: no local_attn"),
        "slots_can_be_overridden_at_forward": (
            NOT_OFFERED,
            "features: no num_routed_key_values, num_routed_queries",
        ),
        "device_and_dtype_at_construction": (NOT_OFFERED, "features: no device, dtype"),
    }.items():
        found = examine(PROPERTIES[name], Subject(Layer), "a:b", 10)
        assert (found.verdict, found.reason) == expected
    sizes = {"num_routed_queries", "num_routed_key_values", "num_experts", "dim_head", "heads"}
    assert frozenset().union(*drawn) == sizes | {"prenorm"}
    assert {True, False} == {given.get("prenorm", True) for given in drawn}

    class Claims(Layer):
        features = (*Layer.features, "rotary_emb")

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x, mask=mask)

    rotary = examine(PROPERTIES["rotary_positions_are_those_of_the_tokens"], Subject(Claims), "a:b", 5)
    assert rotary.verdict == FAILS
    assert rotary.reason.startswith("features has rotary_emb, but forward: got an unexpected keyword argument")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("'mask'", "expected a set of names, got 'mask'"),
        ("3", "expected a set of names, got 3"),
        ("{'mask', 'window'}", "expected names among state_dict, mask, .*, got 'window'"),
        ("[None]", "expected names among state_dict, mask, .*, got None"),
    ],
)
def test_features_are_names_that_are_known(
    features: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"featured_{abs(hash(features))}"
    (tmp_path / f"{module}.py").write_text(f"class Layer:\n    features = {features}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"^features of {module}:Layer: {message}$"):
        factory_of(f"{module}:Layer")


@pytest.mark.parametrize("causal", SETS)
def test_the_published_report_is_of_these_properties(causal: bool) -> None:
    page = ROOT / "docs" / "generated" / "conformance" / f"mixture-of-attention-0.0.25{'-causal' * causal}.md"
    rows = re.findall(r"^\| (.*?) \| (.*?) \|", page.read_text(), re.MULTILINE)[1:]
    properties = SETS[causal].properties
    assert [re.sub(r"\[(.*)\]\(.*\)", r"\1", name) for name, _ in rows] == [p.title for p in properties.values()]
    assert f"checks {len(properties)} properties" in (ROOT / "docs" / "check-your-own.md").read_text()
    assert not causal or "[no token sees a later one]" in {name.partition("(")[0] for name, _ in rows}
    snippets = blocks(page)
    assert len(snippets) == sum("FAILS" in verdict for _, verdict in rows) > 0
    for snippet in snippets:
        compile(snippet, str(page), "exec")


def test_what_is_lacking_is_told_from_what_is_raised() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise TypeError("of its own")

    x = torch.zeros(1, 2, 3)
    with pytest.raises(NotOffered, match="forward: got an unexpected keyword argument 'mask'"):
        call(Layer(), x, mask=None)
    with pytest.raises(TypeError, match="of its own"):
        call(Layer(), x)

    class HandsOn(torch.nn.Module):
        def forward(self, x: torch.Tensor, context: object = None, **rest: object) -> torch.Tensor:
            return len(x, context=context) if context else reference.combine(x, **rest)

    with pytest.raises(NotOffered, match=r"forward: .* got an unexpected keyword argument 'return_routes'"):
        call(HandsOn(), x, return_routes=True)
    with pytest.raises(TypeError, match="keyword"):  # it says that it takes a context
        call(HandsOn(), x, context=x[:1, :1, :1] + 1)


@pytest.mark.parametrize(
    "error",
    [TypeError("of its own"), TypeError("f() got an unexpected keyword argument 'depth'"), TypeError(), KeyError("a")],
    ids=repr,
)
def test_errors_of_a_constructor_fail(error: Exception) -> None:
    def make(dim: int, **arguments: object) -> torch.nn.Module:
        raise error

    found = examine(PROPERTIES["one_expert_equals_the_reference"], Subject(make), "a:b", 2)
    assert found.verdict == FAILS
    assert found.reason == f"{type(error).__name__}: {error}"


def test_a_refusal_without_a_text_is_one() -> None:
    def make(dim: int, **arguments: object) -> torch.nn.Module:
        raise NotOffered

    assert examine(PROPERTIES["every_dtype"], Subject(make), "a:b", 2).verdict == NOT_OFFERED
