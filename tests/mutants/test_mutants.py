"""Every mutant is killed: `pytest tests/mutants --mutants`, half an hour on two cores."""

from __future__ import annotations

import os

import pytest
from rich.console import Console

from mutants import __main__ as command
from mutants import matrix


@pytest.mark.mutants
def test_every_mutant_is_killed(pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    """By an assertion; and those that are argued to be equivalent survive."""
    device = pytestconfig.option.device
    mutants = command.chosen(pytestconfig.option.only, device)
    assert mutants, f"no mutant has {pytestconfig.option.only!r} in its name, class or file"
    with capsys.disabled():
        console = Console(width=160)
        results = command.run(mutants, device, os.cpu_count() or 1, console)
        console.print(matrix.table(mutants, results), matrix.totals(mutants, results))
    wrong = matrix.unexpected(mutants, results)
    assert not wrong, "\n".join(wrong)
