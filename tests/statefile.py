"""A file of results that one run at a time writes, so that no run undoes what another one kept."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO


class StateError(ValueError):
    """Of a file of results: in use, not readable, or of something else. The message begins with its path."""


class StateFile:
    """Held until `close`, or until the process ends, however it ends; made, empty, where there is none.

    The lock is on the file itself, so that nothing is left behind. A file that replaces it is locked before it takes
    the name: whoever then holds the old one looks again. Readers need no lock: they see one file or the other, at
    worst with its last line torn.

    Raises StateError where another run holds it, or where it can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
        except BlockingIOError:
            raise StateError(f"{path}: expected a file that no other run writes, got one in use") from None
        except OSError as error:
            raise StateError(f"{path}: expected a file that can be written, got {error.strerror}") from error

    def _open(self) -> BinaryIO:
        while True:
            file = self.path.open("ab")
            try:
                _lock(file)
            except OSError:
                file.close()
                raise
            if self._is_named(file):
                return file
            file.close()  # it was replaced between the two

    def _is_named(self, file: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def content(self) -> bytes:
        return self.path.read_bytes()

    def append(self, text: str) -> None:
        """At its end, and onto the disk."""
        self._still_there()
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def replace(self, text: str) -> None:
        """All of it, in one step."""
        self._still_there()
        partial = self.path.with_name(self.path.name + ".partial")  # of whoever holds the lock: of nobody else
        file = partial.open("wb")
        _lock(file)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
        partial.replace(self.path)
        self._file.close()
        self._file = file

    def _still_there(self) -> None:
        """Where it was removed meanwhile, a run that began since may have its name."""
        if not self._is_named(self._file):
            raise StateError(f"{self.path}: expected the file that this run holds, got another or none")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _lock(file: BinaryIO) -> None:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
