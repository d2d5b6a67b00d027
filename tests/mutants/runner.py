"""Runs mutants: a copy of the tree, one fault, the tests of its profile in a child process, and what came of it.

Nothing runs before the unmutated copy is green under the same profile. Results are kept in a file as they come, with
hashes of what they depend on, so that an interrupted run goes on where it was, and another test lets the kills stand.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

from tests import record
from tests.statefile import StateError, StateFile

from .mutant import Mutant
from .profiles import Profile

# killed: a test failed by an assertion. raised: by another error, where it expected none or another. broken: no test
# ran: import, syntax, collection, fixtures. crashed: the process died. timeout: more CPU seconds than it may.
OUTCOMES = ("killed", "survived", "raised", "broken", "crashed", "timeout")
SECONDS = 600  # of one core for a mutant: it loops. A profile takes a tenth of that
IGNORED = shutil.ignore_patterns(
    ".git",
    ".*cache",
    ".hypothesis",
    ".mutants",
    ".campaign",
    "__pycache__",
    "*.png",
    "*.egg-info",
    ".venv",
    "build",
    "dist",
)
CHILD = Path(__file__).with_name("child.py")


class ControlError(Exception):
    """The unmutated tree is not green, so that a red mutant would say nothing."""


@dataclass(frozen=True)
class Result:
    outcome: str
    test: str = ""
    error: str = ""
    seconds: float = 0.0  # of a core


@dataclass
class Runner:
    """root: of the tree; packages: the mutated ones; profile_of: the tests that a file's faults face."""

    root: Path
    packages: tuple[str, ...]
    profile_of: Callable[[str], Profile]
    state: Path
    device: str = "cpu"
    jobs: int = os.cpu_count() or 1
    seconds: int = SECONDS

    def __post_init__(self) -> None:
        self._lock = Lock()
        self._running: set[subprocess.Popen] = set()
        self._known: dict[str, dict[str, Any]] = {}
        self._over = Event()

    def run(
        self, mutants: Sequence[Mutant], told: Callable[[str, Result], None] = lambda name, result: None
    ) -> dict[str, Result]:
        """Results by name, each passed on to `told` when it is there.

        Raises ControlError before any mutant runs, StateError where another run has the state or it is none.
        """
        with StateFile(self.state) as self._kept:
            self._known = _results(self.state, self._kept.content())
            return self._run(mutants, told)

    def _run(self, mutants: Sequence[Mutant], told: Callable[[str, Result], None]) -> dict[str, Result]:
        controls = {self.profile_of(mutant.file): None for mutant in mutants}
        names = {profile: f"control of {', '.join(profile.files)}" for profile in controls}
        for profile, result in self._all([(profile, None) for profile in controls]):
            told(names[profile], result)
            if result.outcome != "survived":
                raise ControlError(f"{names[profile]}: {result.outcome} {result.test} {result.error}".strip())
        found = {}
        for mutant, result in self._all([(self.profile_of(mutant.file), mutant) for mutant in mutants]):
            found[mutant.name] = result
            told(mutant.name, result)
        return {mutant.name: found[mutant.name] for mutant in mutants}

    def _all(self, jobs: list) -> object:
        """(what it was, result) of each pair (profile, mutant or None), in the order in which they end."""
        self._over.clear()
        with ThreadPoolExecutor(self.jobs) as pool:  # at its end all have kept what they found
            waiting = {pool.submit(self._recalled, *job): job for job in jobs}
            try:
                for future in as_completed(waiting):
                    profile, mutant = waiting[future]
                    yield mutant or profile, future.result()
            finally:
                self._over.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._running):
                    _end(process)

    def _recalled(self, profile: Profile, mutant: Mutant | None) -> Result:
        """From the state: a kill stands while its test does, all else while no test of the profile changed."""
        subject = hashlib.sha256(repr((self.device, mutant.digest() if mutant else profile)).encode()).hexdigest()
        packages = [path for name in self.packages for path in (self.root / name).rglob("*.py")]
        shared = [p for p in (self.root / "tests").glob("*.py") if not p.name.startswith("test_")]
        shared += (self.root / "tests" / "faults").glob("*.py")
        files = [self.root / "tests" / file for file in profile.files]
        code = self._digest(*packages, *shared, self.root / "conftest.py")
        tests = self._digest(*files) + repr((profile, self.seconds))
        with self._lock:
            known = self._known.get(subject)
        # A crash or a timeout may be the machine's fault: tried again.
        if known and known["code"] == code and known["result"]["outcome"] not in ("crashed", "timeout"):
            result = Result(**known["result"])
            if known["tests"] == tests or (result.outcome == "killed" and known["by"] == self._digest_of(result.test)):
                return result
        result = self._measured(profile, mutant)
        made = {"code": code, "tests": tests, "by": self._digest_of(result.test), "result": asdict(result)}
        with self._lock:
            self._known[subject] = made
            self._kept.replace(json.dumps(self._known, indent=1) + "\n")
        return result

    def _digest(self, *paths: Path) -> str:
        digest = hashlib.sha256()
        for path in sorted(filter(Path.exists, paths)):
            digest.update(str(path.relative_to(self.root)).encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()

    def _digest_of(self, test: str) -> str:
        """Of a test and all else in its file but other tests; "" where there is none."""
        file, _, name = test.partition("::")
        path = self.root / file
        if not name or not path.is_file():
            return ""
        parts = [ast.dump(part) for part in ast.parse(path.read_text()).body]
        own = f"FunctionDef(name={name.split('[')[0]!r},"
        kept = [part for part in parts if not part.startswith("FunctionDef(name='test_") or part.startswith(own)]
        return hashlib.sha256("".join(kept).encode()).hexdigest() if any(p.startswith(own) for p in kept) else ""

    def _measured(self, profile: Profile, mutant: Mutant | None) -> Result:
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            copy = Path(folder).resolve() / "tree"
            shutil.copytree(self.root, copy, ignore=IGNORED)
            if mutant is not None:
                mutant.apply(copy)
            return _judged(self._child(copy, profile), copy, self.packages)

    def _child(self, copy: Path, profile: Profile) -> int | None:
        """Exit status, or None beyond the time on the clock, which is long for one who shares the machine."""
        dropped = ("PYTEST", "TRITON", "PYTHONPATH", "HYPOTHESIS")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        environment |= {
            "CI": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TRITON_CACHE_DIR": str(copy.parent / "triton"),
            "HYPOTHESIS_STORAGE_DIRECTORY": str(copy.parent / "hypothesis"),
        }
        given = ["-x", "-q", "--rootdir", str(copy), "-p", "no:cacheprovider", *profile.arguments()]
        given += ["--device", self.device] if self.device != "cpu" else []
        command = [sys.executable, str(CHILD), str(copy.parent / "result.json"), str(copy), ",".join(self.packages)]
        with (copy.parent / "output").open("w") as output:
            process = subprocess.Popen(
                [*command, str(self.seconds), *given],
                cwd=copy, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
            if self._over.is_set():  # too late to be ended with the others
                _end(process)
            try:
                return process.wait(4 * self.seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                _end(process)
                self._running.discard(process)


def _results(path: Path, content: bytes) -> dict[str, dict[str, Any]]:
    """Of earlier runs, by subject; the file is empty before the first result."""
    try:
        known = json.loads(content) if content else {}
        for entry in known.values():
            result = Result(**entry["result"])
            texts = entry["code"], entry["tests"], entry["by"], result.outcome, result.test, result.error
            if result.outcome not in OUTCOMES or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"another result, {entry}")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise StateError(
            f"{path}: expected results of earlier runs, got {what[:200]}; remove it to start anew"
        ) from error
    return known


def _end(process: subprocess.Popen) -> None:
    """The child, and what it may have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _judged(code: int | None, copy: Path, packages: tuple[str, ...]) -> Result:
    written = copy.parent / "result.json"
    if code is None or code == -signal.SIGXCPU:
        return Result("timeout")
    if not written.exists():
        return Result("crashed", error=f"exit status {code}: " + (copy.parent / "output").read_text()[-300:])
    found = record.read(written)
    failure = found["failure"] or {"test": "", "when": "", "asserted": False, "error": ""}
    seconds = round(found["cpu"], 1)
    strangers = [file for file in found["loaded"].values() if copy not in Path(file).resolve().parents]
    missing = set(packages) - {name.split(".")[0] for name in found["loaded"]}
    if strangers or (missing and failure["when"] != "collect"):
        whose = ", ".join(packages)
        return Result("broken", "", f"{whose} comes from {strangers or 'nowhere'}, not from the copy", seconds)
    if found["status"] == 0:
        return Result("survived", seconds=seconds)
    if found["status"] != 1 or failure["when"] != "call":
        outcome = "broken"
    else:
        outcome = "killed" if failure["asserted"] else "raised"
    return Result(outcome, failure["test"], failure["error"], seconds)
