"""Files that several runs want to write: nothing that one of them kept is lost."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from record import ROOT, read, write

from tests.statefile import StateError, StateFile

pytestmark = pytest.mark.cpu

# Opens the file as often as it gets it, and adds a line of its own: at the end, or by a file in place of it.
ADDS = """
import sys
from pathlib import Path
from tests.statefile import StateError, StateFile
name, done = sys.argv[2], 0
while done < 40:
    try:
        with StateFile(Path(sys.argv[1])) as file:
            line = f"{name} {done}\\n"
            file.append(line) if done % 2 else file.replace(file.content().decode() + line)
            done += 1
    except StateError as error:
        assert "no other run" in str(error), error
"""

HOLDS = """
import sys, time
from pathlib import Path
from tests.statefile import StateFile
file = StateFile(Path(sys.argv[1]))
file.replace("held\\n")
print("held", flush=True)
time.sleep(60)
"""


def started(program: str, *words: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", program, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_runs_at_once_add_up(tmp_path: Path) -> None:
    """Four processes; each gets the file while no other has it, also right after it was replaced."""
    path = tmp_path / "state"
    runs = [started(ADDS, str(path), name) for name in "abcd"]
    assert [run.wait(60) for run in runs] == [0] * 4
    lines = path.read_text().splitlines()
    assert sorted(lines) == sorted(f"{name} {i}" for name in "abcd" for i in range(40))
    for name in "abcd":
        assert [line for line in lines if line[0] == name] == [f"{name} {i}" for i in range(40)]
    assert [found.name for found in tmp_path.iterdir()] == ["state"], "nothing is left beside it"


def test_a_killed_run_leaves_the_file_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "state"
    run = started(HOLDS, str(path))
    assert run.stdout.readline() == "held\n"
    with pytest.raises(StateError, match=f"^{re.escape(str(path))}: expected a file that no other run writes"):
        StateFile(path)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    with StateFile(path) as file:
        assert file.content() == b"held\n"


@pytest.mark.parametrize("how", ["append", "replace"])
def test_a_file_that_was_removed_is_not_written(how: str, tmp_path: Path) -> None:
    """Neither where it is gone nor where another run has its name."""
    path = tmp_path / "state"
    with StateFile(path) as file:
        path.unlink()
        with pytest.raises(StateError, match="expected the file that this run holds"):
            getattr(file, how)("lost\n")
        assert not path.exists()
        with StateFile(path) as other:
            other.append("another\n")
            with pytest.raises(StateError, match="expected the file that this run holds"):
                getattr(file, how)("lost\n")
            other.append("run\n")
    assert path.read_text() == "another\nrun\n"


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "state"):
        with pytest.raises(StateError, match=f"^{re.escape(str(path))}: expected a file that can be written, got"):
            StateFile(path)


def test_a_report_is_whole_whoever_writes_it(tmp_path: Path) -> None:
    """By many at once; and one that is no JSON is named."""
    path, reports = tmp_path / "report.json", [{"of": i, "rows": [i] * 500} for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(write, path, report) for report in reports]:
            done.result()
            assert read(path) in reports
    assert [found.name for found in tmp_path.iterdir()] == ["report.json"]
    path.write_text('{"of": 3')
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: expected JSON, got"):
        read(path)
