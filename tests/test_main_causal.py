"""`python -m optimized --causal`: that it passes, what it prints, and that a layer that looks ahead fails."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import optimized
from optimized.prove import causal
from tests.test_main import LINES, SMALL, run, table

SHORT = (*SMALL, "--causal", "--no-color", "--tokens", "256", "--slots", "12")


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"Chapter {i}. {LINES}" for i in range(12)), encoding="utf-8")
    return str(path)


def test_the_past_stands_still(book: str) -> None:
    status, printed = run(book, *SHORT, "--dtype", "float32", "bfloat16")
    assert status == 0, printed
    rows = [row for row in table(printed, 6) if row[2] in ("float32", "bfloat16")]  # not those of the experts
    assert [row[1] for row in rows] == list(causal.FUTURES) * 4
    assert {row[5] for row in rows} == {"identical"}
    fractions = re.findall(r"Decoded in pieces from a cache, \w+: (\d\.\d\d) of its budget", printed)
    assert len(fractions) == 2
    assert all(0 < float(found) <= 1 for found in fractions)
    assert f"{2 * len(causal.FUTURES) * 2} futures replaced, the past unchanged" in printed


class LooksAhead(optimized.MixtureOfAutoregressiveAttention):
    """Adds a little of the last token."""

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Any:
        found = super().forward(x, *args, **named)
        return found + 1e-3 * x[:, -1:] if isinstance(found, Tensor) else (found[0], *found[1:])


def test_a_layer_that_looks_ahead_fails(book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "MixtureOfAutoregressiveAttention", LooksAhead)
    status, printed = run(book, *SHORT)
    assert status == 1
    assert re.search(r"future of token \d+ replaced by noise: \d+ outputs and", printed)


def test_a_cache_that_forgets_fails(book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgets(optimized.MixtureOfAutoregressiveAttention):
        def forward(self, x: Tensor, *args: Any, cache: Any = None, **named: Any) -> Any:
            return super().forward(x, *args, cache=None, **named)

    monkeypatch.setattr(causal, "MixtureOfAutoregressiveAttention", Forgets)
    status, printed = run(book, *SHORT)
    assert status == 1
    assert "Decoded in pieces from a cache, float32: FAIL" in printed


def test_a_plot_is_refused(book: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(book, *SHORT, "--plot", str(tmp_path / "a.png"))
    assert "--plot: expected without --causal" in capsys.readouterr().err


def test_determinism_is_set_back(book: str) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    run(book, *SHORT)
    assert not torch.are_deterministic_algorithms_enabled()
