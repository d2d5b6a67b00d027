"""Properties examined in a process of its own: a layer that hangs, exits or crashes fails one property, not the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch

from tests.conformance.examine import Verdict, examine, failure
from tests.conformance.registry import Property
from tests.conformance.sets import SETS
from tests.conformance.subject import Subject, describe, factory_of
from tests.strategies import LayerCase

START = "import sys; sys.path[:] = {path!r}; from tests.conformance.process import serve; serve{arguments!r}"


class Lost(Exception):  # noqa: N818 (what became of the process)
    """The process does not answer any more, and has been ended."""


class Examiner:
    """Examines the layer of `spec` property by property. A process that was lost is replaced for the next.

    timeout: seconds that the import, or one configuration, may take. causal: which set of properties.
    """

    def __init__(self, spec: str, device: torch.device | str, timeout: float, causal: bool = False) -> None:
        self.spec, self.device, self.timeout, self.causal = spec, device, timeout, causal
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Imports the layer. Raises ValueError if there is none to import."""
        self._connection, theirs = Pipe()
        arguments = (theirs.fileno(), os.getpid(), self.spec, str(self.device), self.causal)
        self._process = subprocess.Popen(
            [sys.executable, "-c", START.format(path=sys.path, arguments=arguments)],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # its children are ended with it, and Ctrl-C is for this process alone
        )
        theirs.close()
        try:
            refusal = self._receive()
        except Lost as lost:
            refusal = f"--impl: expected a module that can be imported, got {self.spec!r} ({lost})"
        if refusal:
            self.close()
            raise ValueError(refusal)

    def examine(self, name: str, examples: int) -> Verdict:
        prop, case = SETS[self.causal].properties[name], None
        try:
            if self._process is None:
                self.start()
            self._connection.send((name, examples))
            while isinstance(answer := self._receive(), LayerCase):
                case = answer
        except (Lost, ValueError) as error:
            return failure(prop, str(error), self.spec, self.device, case)
        return answer

    def close(self) -> None:
        """Ends the process, and those that it started."""
        if self._process is None:
            return
        self._connection.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._process.kill()
        self._process.wait()
        self._process = None

    def _receive(self) -> Any:
        assert self._process is not None
        try:
            if self._connection.poll(self.timeout):
                return self._connection.recv()
            lost = f"no answer within {self.timeout:g} seconds"
        except (EOFError, OSError):
            lost = self._end()
        self.close()
        raise Lost(lost)

    def _end(self) -> str:
        """How the process ended. It has closed its connection, but may be on the way."""
        assert self._process is not None
        try:
            code = self._process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            return "the process closed its connection"
        return (
            f"the process ended, by {signal.Signals(-code).name}"
            if code < 0
            else f"the process ended, exit code {code}"
        )


def serve(handle: int, parent: int, spec: str, device: str, causal: bool) -> None:
    """In the process: answers "", or why there is no layer; then to every (name, examples) cases and a `Verdict`."""
    connection = Connection(handle)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    properties, kind = SETS[causal]
    try:
        subject = kind(factory_of(spec, kind.FEATURES), device)
    except ValueError as error:
        connection.send(str(error))
        return
    connection.send("")
    while True:
        try:
            name, examples = connection.recv()
        except EOFError:
            return
        connection.send(_examined(connection, properties[name], subject, spec, examples))


def _examined(connection: Connection, prop: Property, subject: Subject, spec: str, examples: int) -> Verdict:
    last: LayerCase | None = None

    def begin(case: LayerCase) -> None:
        nonlocal last
        last = case
        connection.send(case)

    try:
        return examine(prop, subject, spec, examples, begin=begin)
    except BaseException as error:  # Ctrl-C is not for this process: the layer has raised KeyboardInterrupt
        return failure(prop, describe(error), spec, subject.device, last)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
