"""`python -m optimized --processes R`: that it passes, what it prints, and that a rank that errs fails it."""

from __future__ import annotations

import re

import pytest

from optimized.parallel.volume import Sent
from optimized.prove import processes
from optimized.prove.processes import BOUND, STYLES, Compared
from tests.test_main import LINES, SMALL, run, table

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"Chapter {i}. {LINES}" for i in range(12)), encoding="utf-8")
    return str(path)


def test_it_is_what_one_process_computes(book: str) -> None:
    """Tokens that the processes don't divide are left out."""
    status, printed = run(book, *SMALL, "--no-color", "--tokens", "257", "--slots", "12", "--processes", "2")
    assert status == 0, printed
    assert "the first 256 tokens" in printed
    rows = [row for row in table(printed, 6) if row[-1] == "ok"]
    assert [row[0] for row in rows] == list(STYLES)
    for row in rows:
        assert 0 < float(row[1]) < BOUND
        assert row[2] == row[3]
        assert re.fullmatch(r"\d+\.\d{3} / \d+\.\d{3}", row[2])


def test_what_differs_fails() -> None:
    fine = Compared("ContextParallel", 1e-15, "out", Sent(3, 4), Sent(3, 4), 1.0)
    assert fine.failure is None
    for wrong in (fine._replace(error=1e-9), fine._replace(error=float("nan")), fine._replace(sent=Sent(3, 5))):
        assert wrong.failure is not None
        assert wrong.failure.startswith("ContextParallel: ")


def test_experts_are_sharded_where_they_can_be() -> None:
    assert processes.styles_of(4, 2) == list(STYLES)
    assert processes.styles_of(3, 2) == ["ContextParallel"]


def test_with_other_jobs_it_is_refused(book: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(book, *SMALL, "--processes", "2", "--causal")
    assert "--processes: expected without --causal" in capsys.readouterr().err
