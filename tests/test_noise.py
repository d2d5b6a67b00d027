"""The proof by training (tests/noise): its controls leak, the strict layer does not, and its report says both."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import check_identical
from noise import __main__ as command
from noise.layers import LAYERS, OPTIMIZED, STRICT
from noise.training import Model, Run, Settings, verdict

from tests.record import REPORTS, read

CPU = torch.device("cpu")
SMALL = Settings(steps=3, n=32, batch=4, window=8, queries=2, keys=8, unseen=100)


def outputs_before(name: str, cut: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer returns before the cut, for two sequences that differ after it."""
    torch.manual_seed(0)
    layer = LAYERS[name](
        16, num_routed_queries=2, num_routed_key_values=8, num_experts=2, local_attn_window_size=8, dim_head=8, heads=2,
        dtype=torch.float64,
    )  # fmt: skip
    x = torch.randn(16, 32, 16, dtype=torch.float64)
    other = x.clone()
    other[:, cut:] = torch.randn_like(other[:, cut:])
    return layer(x)[:, :cut], layer(other)[:, :cut]


@pytest.mark.cpu
@pytest.mark.parametrize("name", STRICT)
def test_the_strict_layer_sees_no_later_token(name: str) -> None:
    for cut in (9, 20, 31):
        check_identical(*outputs_before(name, cut))


@pytest.mark.cpu
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in STRICT])
def test_controls_do(name: str) -> None:
    assert any(not torch.equal(*outputs_before(name, cut)) for cut in (13, 20, 27))


@pytest.mark.cpu
@pytest.mark.parametrize("name", LAYERS)
def test_a_model_learns(name: str) -> None:
    """Every parameter moves, and the curve is that of its steps."""
    run = Run(name, SMALL, CPU)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.train()
    assert [step for step, _ in run.curve] == [3]
    assert all(not torch.equal(before[key], value) for key, value in run.model.state_dict().items())
    found = run.evaluate()
    assert found["tokens"] >= SMALL.unseen
    assert abs(found["loss"] - math.log(SMALL.vocabulary)) < 1


@pytest.mark.cpu
def test_the_optimized_layer_trains_as_the_reference() -> None:
    """From the same parameters, on the same tokens; longer, rounding makes other models of them."""
    runs = [Run(name, SMALL, CPU) for name in STRICT]
    for p, other in zip(*(run.model.parameters() for run in runs)):
        check_identical(p.detach(), other.detach())
    for run in runs:
        torch.manual_seed(1)
        run.train()
    (_, loss), (_, other) = (run.curve[-1] for run in runs)
    assert loss == pytest.approx(other, abs=1e-4)
    for p, q in zip(*(run.model.parameters() for run in runs)):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.cpu
def test_a_model_that_is_told_is_found_out() -> None:
    """The measure itself: a model that knows half of the next token, and one that knows none of it."""
    torch.manual_seed(0)
    run = Run("strict", SMALL, CPU)

    class Told(Model):
        def losses(self, tokens: torch.Tensor) -> torch.Tensor:
            known = torch.rand(tokens[:, 1:].shape) < 0.5
            return torch.where(known, 0.0, math.log(SMALL.vocabulary))

    run.model.__class__ = Told
    assert verdict(run.evaluate()) == "leaks"


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("below", "said"),
    [(-50.0, "sees nothing"), (3.9, "sees nothing"), (7.0, "undecided"), (11.0, "leaks"), (math.nan, "no number")],
)
def test_verdicts(below: float, said: str) -> None:
    assert verdict({"errors_below_ln_v": below}) == said


@pytest.mark.cpu
def test_the_command(tmp_path: Path) -> None:
    report, plot = tmp_path / "noise.json", tmp_path / "noise.png"
    options: list[Any] = ["--device", "cpu", "--steps", "2", "--layers", "strict", "--unseen", "100"]
    assert command.main([*options, "--out", str(report), "--plot", str(plot)]) in (0, 1)
    assert read(report)["runs"][0]["steps"] == 2
    assert plot.stat().st_size > 1000


@pytest.mark.cpu
def test_a_report_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs that it has are not run again; one of other sources is refused, and left as it was."""
    report = tmp_path / "noise.json"
    options = ["--device", "cpu", "--steps", "1", "--unseen", "100", "--out", str(report)]
    command.main([*options, "--layers", "strict", "--seeds", "0"])
    (first,) = read(report)["runs"]
    both = [*options, "--layers", "strict", OPTIMIZED, "--seeds", "0", "1", "--plot", str(tmp_path / "noise.png")]
    command.main(both)
    runs = read(report)["runs"]
    assert runs[0] == first
    asked = {(name, seed) for name in STRICT for seed in (0, 1)}
    assert {(run["layer"], run["settings"]["seed"]) for run in runs} == asked
    with monkeypatch.context() as patch:
        patch.setattr(command, "Run", None)
        command.main(both)
    text = report.read_text()
    report.write_text(text.replace('"hashes": {', '"hashes": {"another": "0", ', 1))
    changed = report.read_text()
    with pytest.raises(SystemExit):
        command.main(both)
    assert "remove it to start anew" in capsys.readouterr().err
    assert report.read_text() == changed != text


@pytest.mark.cpu
def test_the_report_that_is_committed() -> None:
    """The strict layer is at ln V, the best of its own window is not; both after as many steps."""
    names = {"strict", "window top-k", "sequence top-k"}
    runs = [run for path in sorted(REPORTS.glob("noise-*.json")) for run in read(path)["runs"]]
    assert names <= {run["layer"] for run in runs} <= set(LAYERS)
    for run in runs:
        assert run["tokens"] >= 10**6
        assert verdict(run) == run["verdict"]
    assert {run["verdict"] for run in runs if run["layer"] in STRICT} == {"sees nothing"}
    assert {run["verdict"] for run in runs if run["layer"] == "window top-k"} == {"leaks"}
