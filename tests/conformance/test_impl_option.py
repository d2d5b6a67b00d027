"""`pytest --impl`: what it accepts, selects, says and writes; and that its documentation runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conformance import plugin, report
from tests.conformance.examine import FAILS, HOLDS, NOT_OFFERED, Verdict, examine
from tests.conformance.properties import PROPERTIES
from tests.conformance.subject import NotOffered, Subject, call
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
        (
            {"impl": "no_such:Layer"},
            r"--impl: .* got 'no_such:Layer' \(No module named 'no_such'\)",
        ),
        ({"impl": "reference:NoSuchLayer"}, "--impl: .* has no attribute 'NoSuchLayer'"),
        ({"impl": "reference.testing:STAGES"}, "--impl: .* got 'reference.testing:STAGES', which is"),
        ({"impl_report": Path("a.md")}, "--impl-report: expected together with --impl, got 'a.md' alone"),
        (
            {"impl": "reference:MixtureOfAttention", "impl_report": Path("a.txt")},
            "--impl-report: expected a file in .md, .json, .html, got 'a.txt'",
        ),
        ({"impl": "reference:MixtureOfAttention", "report": Path("a.json")}, "--report: expected without --impl"),
    ],
)
def test_bad_values(options: dict[str, object], message: str) -> None:
    given = SimpleNamespace(**({"impl": None, "impl_report": None, "report": None} | options))
    with pytest.raises(pytest.UsageError, match=message):
        plugin.pytest_configure(SimpleNamespace(option=given))


@pytest.mark.cpu  # whatever the device, the child runs on the CPU; what it shrinks to is that of a Hypothesis
def test_a_run_on_a_faulty_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across processes too. The snippets of the report raise what they say, without pytest."""
    (tmp_path / "theirs.py").write_text("from tests.faults.layers import LAYERS\nLayer = LAYERS['experts are mixed']\n")
    written = tmp_path / "report.md"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # options of this run, which --impl may refuse
    options = ["--impl", "theirs:Layer", "--impl-report", str(written), "-k", "experts or batch", "--max-examples", "5"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "1", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"its {len(PROPERTIES)} properties and no other tests are selected" in done.stdout
    assert "conformance of theirs:Layer: 4 hold, 1 fail, 0 not offered" in done.stdout
    assert re.search(r"experts read their own tokens +│ FAILS +│ B=1 N=3 D=8 E=2", done.stdout)
    assert re.search(r"=+ 1 failed, 4 passed\b", done.stdout), "tests of this repository ran as well"
    [snippet] = blocks(written)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match="the output of other experts changed by"):
        exec(snippet, {})


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
            raise TypeError("one head only")
        return LAYERS["half precision raises"](dim, **arguments)

    partly = examine(PROPERTIES["one_expert_equals_the_reference"], Subject(only_one_head), "a:b", 20)
    assert partly.verdict == HOLDS
    assert re.fullmatch(r"\d+ of 20 configurations are not offered: constructor: one head only", partly.reason)


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
    assert "| [c d](#c-d) | **FAILS** | [x] is \\| wrong |" in text
    assert "```python\ncode[0]()\n```" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text
    found = json.loads((tmp_path / "sub/report.json").read_text())
    assert found["properties"] == [v.as_dict() for v in verdicts]
    page = (tmp_path / "sub/report.html").read_text()
    assert all(part in page for part in ("c d", "[x] is | wrong", "code[0]()", "no such argument"))
    assert not re.search(r"(src|href)=", page)


def test_documentation_runs() -> None:
    kernel, adapter = blocks(ROOT / "docs" / "check-your-own.md")
    exec(kernel, {"__name__": "documentation"})
    made: dict[str, object] = {"__name__": "documentation"}
    exec(adapter, made)
    subject = Subject(made["Adapted"])
    verdicts = {name: examine(p, subject, "a:b", 5, shrink=False).verdict for name, p in PROPERTIES.items()}
    assert FAILS not in verdicts.values()
    assert verdicts["gradients_of_attention"] == verdicts["masked_tokens_take_no_part"] == HOLDS
    assert verdicts["context_is_attended_to"] == NOT_OFFERED


def test_the_published_report_is_of_these_properties() -> None:
    page = ROOT / "docs" / "generated" / "conformance" / "mixture-of-attention-0.0.25.md"
    rows = re.findall(r"^\| (.*?) \| (.*?) \|", page.read_text(), re.MULTILINE)[1:]
    assert [re.sub(r"\[(.*)\]\(.*\)", r"\1", name) for name, _ in rows] == [p.title for p in PROPERTIES.values()]
    assert f"checks {len(PROPERTIES)} properties" in (ROOT / "docs" / "check-your-own.md").read_text()
    snippets = blocks(page)
    assert len(snippets) == sum("FAILS" in verdict for _, verdict in rows) > 0
    for snippet in snippets:
        compile(snippet, str(page), "exec")


def test_what_the_forward_lacks_is_told_from_what_it_raises() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise TypeError("of its own")

    x = torch.zeros(1, 2, 3)
    with pytest.raises(NotOffered, match="forward: got an unexpected keyword argument 'mask'"):
        call(Layer(), x, mask=None)
    with pytest.raises(TypeError, match="of its own"):
        call(Layer(), x)
