"""The measurement of the bands: see `bands.py`. A process of its own, for it changes hypothesis's settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.cpu
def test_bands_of_one_property(tmp_path: Path) -> None:
    """Correct results within the budget, faults beyond it; resumed, nothing is measured again; the table has a row."""
    out, page = tmp_path / "bands.json", tmp_path / "page.md"
    command = [sys.executable, "-m", "tests.bands", "--out", str(out), "--fault-examples", "40"]
    wanted = ["--examples", "40", "--only", r"combine\w+ 0 (-|last slot)"]
    subprocess.run([*command, *wanted], cwd=ROOT, check=True, capture_output=True)
    first = json.loads(out.read_text())
    assert len(first["chunks"]) == 3
    cell = first["bands"]["combine float32"]
    assert 0 < cell["worst"] <= 1
    assert cell["examples"] > 10
    assert set(cell["faults"]) >= {"last slot not combined", "last slot combined twice", "1% too large"}
    assert min(fault["fraction"] for fault in cell["faults"].values()) > 1
    subprocess.run([*command, *wanted], cwd=ROOT, check=True, capture_output=True)
    assert json.loads(out.read_text()) == first
    page.write_text("before\n<!-- bands:begin -->\nold\n<!-- bands:end -->\nafter\n")
    subprocess.run([*command, "--table", str(page)], cwd=ROOT, check=True, capture_output=True)
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1], "old" in lines) == ("before", "after", False)
    assert sum(line.startswith("| combine |") for line in lines) == 4


@pytest.mark.cpu
def test_what_is_no_state_of_its_own_is_refused(tmp_path: Path) -> None:
    """Another run's, another report, another seed, and a pattern that nothing matches; the file stays as it was."""
    code = f"""
import sys
from pathlib import Path

from tests import bands
from tests.statefile import StateFile

out = Path({str(tmp_path / "bands.json")!r})

def refused(only="combine"):
    before = out.read_bytes()
    sys.argv = ["bands", "--out", str(out), "--only", only, "--examples", "100", "--minutes", "0"]
    try:
        bands.main()
    except SystemExit as stop:
        assert stop.code == 2, stop.code
    else:
        raise AssertionError("not refused")
    assert out.read_bytes() == before

with StateFile(out):
    refused()
for text in ('[]', '{{"kind": "tests"}}', '{{"kind": "bands", "seed": 7, "chunks": {{}}}}', "torn {{"):
    out.write_text(text)
    refused()
out.write_text("")
refused("nothing_such")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = ("no other run writes", "TypeError", "KeyError", "of seed 7", "JSONDecodeError", "got 'nothing_such'")
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == len(words)
    for line, word in zip(errors, words):
        assert word in line
        assert word == "got 'nothing_such'" or "bands.json" in line
