"""The long run: `pytest -m nightly --max-examples 100000 tests/campaign`."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch
from rich.console import Console

from campaign import __main__ as command
from campaign import report
from campaign.kind import Setting, default_kernels
from campaign.state import read


@pytest.mark.nightly
def test_campaign(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    """--max-examples cases of each kind, in whole chunks, from where the last run of the same sources was stopped."""
    setting = Setting(device, default_kernels(device.type))
    cases = hypothesis.settings.default.max_examples
    with capsys.disabled():
        console = Console(soft_wrap=True)
        path, failures = command.campaign(command.KINDS, cases, setting, console, jobs=os.cpu_count() or 1)
        page = path.with_suffix(".html")
        page.write_text(report.html([read(path)]))
        console.print(f"report: {page}", highlight=False)
    assert not failures, "\n".join(f"{f.message}\n    {f.snippet}" for f in failures)
