"""The text: files and folders that were given, or what comes with Python."""

from __future__ import annotations

import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from optimized.prove.text import visible

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Text(NamedTuple):
    """data: UTF-8."""

    name: str
    data: bytes


def read(paths: Sequence[Path], library: bool) -> Text:
    """All of these files, and of the files in these folders, by name, but for hidden ones. None given: Python's own.

    library: the standard library's sources after the documentation. Raises OSError, ValueError for what is no UTF-8,
    ImportError where this Python comes without its documentation.
    """
    if paths:
        files = [file for path in paths for file in _files(path)]
        if not files:
            raise ValueError(f"expected a file in {', '.join(map(str, paths))}, got none")
        name = str(files[0]) if len(files) == 1 else f"{len(files)} files of {', '.join(map(str, paths))}"
        return Text(visible(name), _joined(files))
    from pydoc_data.topics import topics

    documentation = "\n".join(topics[topic] for topic in sorted(topics)).encode()
    if not library:
        return Text("Python's documentation (pydoc_data.topics)", documentation)
    root = Path(sysconfig.get_path("stdlib"))
    sources = [p for p in sorted(root.rglob("*.py")) if not LEFT_OUT & set(p.relative_to(root).parts)]
    return Text(
        f"Python's documentation and {len(sources)} files of its library",
        b"\n".join((documentation, _joined(sources))),
    )


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for file in sorted(path.rglob("*")):
        if not any(part.startswith(".") for part in file.relative_to(path).parts) and file.is_file():
            yield file


def _joined(files: Iterable[Path]) -> bytes:
    return b"\n".join(map(_utf8, files))


def _utf8(file: Path) -> bytes:
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(f"expected a regular file, got {file}")  # a pipe may never end, nor begin
    data = file.read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8, got {file}: byte {error.start} is {data[error.start]:#04x}") from None
    return data
