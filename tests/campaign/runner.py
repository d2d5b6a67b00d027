"""Chunks over processes. One that dies is a failure of its chunk, and another takes its place."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from record import made  # noqa: E402

from reference.contract import integer  # noqa: E402

from .kind import Setting  # noqa: E402
from .state import State  # noqa: E402
from .tally import Failure, Tally  # noqa: E402
from .worker import kind_of, run_chunk  # noqa: E402

ENOUGH = 25  # failures

Told = Callable[[str, int | None, Tally], None]


@dataclass(frozen=True)
class Job:
    """chunk None: what failed in earlier runs."""

    kind: str
    chunk: int | None


def jobs_of(kinds: Sequence[str], cases: int, state: State) -> Iterator[Job]:
    """What is not done yet, all kinds in step, as `cases` of each kind in whole chunks."""

    def of(kind: str) -> Iterator[tuple[float, str, int]]:
        chunks = -(-cases // kind_of(kind).CHUNK)
        return (((i + 0.5) / chunks, kind, i) for i in range(chunks))

    yield from (Job(kind, None) for kind in kinds if hasattr(kind_of(kind), "run_kept"))
    for _, kind, chunk in heapq.merge(*map(of, kinds)):
        if chunk not in state.done(kind):
            yield Job(kind, chunk)


def run(
    kinds: Sequence[str],
    cases: int,
    setting: Setting,
    state: State,
    *,
    jobs: int,
    seconds: float,
    told: Told = lambda kind, chunk, tally: None,
    command: Sequence[str] | None = None,
) -> list[Failure]:
    """Until all is done, the time is over or enough has failed; returns failures, those of earlier runs too.

    jobs: processes, or 0 for this one. command: of a worker, for tests. Raises ValueError or TypeError where nothing
    would be run.
    """
    cases, jobs = integer("cases", cases, least=1), integer("jobs", jobs, least=0)
    start = time.monotonic()
    kept: list[Failure] = []

    def failures() -> list[Failure]:
        return kept + [f for kind in kinds for f in state.parts[kind].tally.failures]

    for kind in kinds:
        state.done(kind)  # there is a part for it
    todo = jobs_of(kinds, cases, state)

    def next_job() -> Job | None:
        if time.monotonic() - start > seconds or len(failures()) >= ENOUGH:
            return None
        return next(todo, None)

    compiled = [kind for kind in kinds if setting.device.type == "cuda" and hasattr(kind_of(kind), "compiled_for")]
    if jobs == 0:
        results = _here(next_job, setting)
    else:
        results = _by_processes(next_job, setting, jobs, compiled if setting.triton else [], command)
    for job, tally in results:
        if job.chunk is None:
            kept += tally.failures
        else:
            state.add(job.kind, job.chunk, tally)
        told(job.kind, job.chunk, tally)
    return failures()


Results = Iterator[tuple[Job, Tally]]


def _here(next_job: Callable[[], Job | None], setting: Setting) -> Results:
    while (job := next_job()) is not None:
        yield job, run_chunk(job.kind, job.chunk, setting)


class Worker:
    """A process with one job at a time."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True, start_new_session=True,
        )  # fmt: skip
        self.job: Job | None = None

    def start(self, job: Job) -> None:
        self.job = job
        try:
            self.process.stdin.write(json.dumps({"kind": job.kind, "chunk": job.chunk}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # its end is noticed when it is read
            pass

    def answer(self) -> Tally | None:
        """None: it died."""
        line = self.process.stdout.readline()
        return Tally.of(json.loads(line)) if line.endswith("\n") else None

    def last_words(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        said = self.log.read().strip().splitlines()
        return f"the process ended with {code}: {' / '.join(said[-3:])}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            pipe.close()


def _by_processes(
    next_job: Callable[[], Job | None],
    setting: Setting,
    jobs: int,
    compiled: Sequence[str],
    command: Sequence[str] | None,
) -> Results:
    """compiled: kinds whose kernels are compiled first."""
    words = ("--device", setting.device.type, "--kernels", setting.kernels, "--seed", str(setting.seed))
    command = [*(command or (sys.executable, "-m", "tests.campaign.worker")), *words]
    environment = environment_of(setting)
    shares = itertools.count()
    selector = selectors.DefaultSelector()
    workers: set[Worker] = set()

    def employ(worker: Worker | None) -> None:
        """With the next job, if there is one."""
        job = next_job()
        if job is None:
            if worker is not None:
                dismiss(worker)
            return
        if worker is None:
            share = next(shares)
            # A process that takes the place of another finds everything compiled.
            warm = ("--warm", *compiled, "--share", str(share), "--of", str(jobs)) if share < jobs and compiled else ()
            worker = Worker([*command, *warm], environment)
            workers.add(worker)
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        worker.start(job)

    def dismiss(worker: Worker) -> None:
        selector.unregister(worker.process.stdout)
        workers.remove(worker)
        worker.end()

    try:
        for _ in range(jobs):
            employ(None)
        while workers:
            for key, _ in selector.select():
                worker: Worker = key.data
                job, tally = worker.job, worker.answer()
                if tally is not None:
                    yield job, tally
                    employ(worker)
                else:
                    message = worker.last_words()
                    dismiss(worker)
                    yield job, Tally(failures=[Failure(f"{job}: {message}", snippet_of(job, setting))])
                    employ(None)
    finally:
        for worker in list(workers):
            dismiss(worker)


def environment_of(setting: Setting) -> dict[str, str]:
    """Triton decides when it is imported whether it interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if setting.triton and setting.device.type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    return environment


def snippet_of(job: Job, setting: Setting) -> str:
    """All cases of a chunk."""
    size = kind_of(job.kind).CHUNK
    first = (job.chunk or 0) * size
    return setting.snippet(job.kind, f"{first}-{first + size - 1}")


def header(setting: Setting, commit: str | None = None) -> dict[str, Any]:
    """Of a state file: what must be the same for a run to go on, and where it runs."""
    environment = made(setting.device, ("optimized", "reference", "tests/campaign"), commit)
    return {
        "device": setting.device.type,
        "kernels": setting.kernels,
        "seed": setting.seed,
        "hashes": environment.pop("hashes")
        | {
            "the layer's properties": _hash_of("strategies", "runs", "harness", "test_mixture"),
            "the causal layer's properties": _hash_of("runs", "harness", "test_autoregressive", "test_causal_dtypes"),
        },
        "environment": environment,
    }


def _hash_of(*modules: str) -> str:
    digest = hashlib.sha256()
    for name in modules:
        digest.update((ROOT / "tests" / f"{name}.py").read_bytes())
    return digest.hexdigest()
