"""Files that are whole at every moment: the one before, or the new one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Into a file beside it, which takes its place once the disk has it. OSError leaves the one before."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)  # the name is of the folder, not of the file
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1) + "\n"
    write(path, lambda file: file.write(text.encode()))
