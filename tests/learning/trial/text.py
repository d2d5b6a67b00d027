"""Bytes of what CPython ships: the topics of its documentation, then the sources of its standard library.

No download, and the same for everybody with the same release: a report states the release, the number of bytes and
their hash. Tests of the library are left out, as distributions do. The last part is held out; it is not trained on.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .batch import IGNORED, Batch
from .settings import Settings

HELD_OUT = 16  # one part of so many
MASK = 256  # the token in place of a byte that is masked
VOCABULARY = {"text": 256, "packages": 256, "encoder": 257}
MASKED, REPLACED, KEPT = 0.15, 0.1, 0.1  # of the bytes; of those asked for: by another byte, by itself
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def _files(folder: Path) -> Iterator[Path]:
    """Of a folder those by name, then those of folders in it; without what tells of the machine."""
    inside = sorted(folder.iterdir())
    yield from (p for p in inside if p.suffix == ".py" and not p.name.startswith(("topics", "_sysconfigdata")))
    for path in inside:
        if path.is_dir() and path.name not in LEFT_OUT and not path.name.startswith("config-"):
            yield from _files(path)


@functools.cache
def corpus() -> Tensor:
    """All of it, uint8."""
    from pydoc_data import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [text.encode() for _, text in sorted(topics.topics.items())]
    whole = b"\n\n".join([*texts, *(path.read_bytes() for path in _files(root))])
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8)


@functools.cache
def described() -> dict[str, Any]:
    """For a report."""
    whole = corpus().numpy().tobytes()
    return {"python": platform.python_version(), "bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}


def parts() -> tuple[Tensor, Tensor]:
    """What is trained on, and what is held out: one contiguous part each."""
    whole = corpus()
    border = len(whole) - len(whole) // HELD_OUT
    return whole[:border], whole[border:]


def _windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    return text[starts[:, None] + torch.arange(length)].long()


def trained(s: Settings, count: int, generator: torch.Generator) -> Batch:
    text, _ = parts()
    starts = torch.randint(len(text) - s.n, (count,), generator=generator)
    return _asked(s, _windows(text, starts, s.n + 1), generator)


def held_out(s: Settings, count: int, generator: torch.Generator) -> Batch:
    """Evenly spaced."""
    _, text = parts()
    room = len(text) - s.n - 1
    return _asked(s, _windows(text, torch.arange(count) * room // max(count - 1, 1), s.n + 1), generator)


def _asked(s: Settings, windows: Tensor, generator: torch.Generator) -> Batch:
    if s.task != "encoder":
        return Batch(windows[:, :-1], windows[:, 1:])
    tokens = windows[:, :-1]
    asked = torch.rand(tokens.shape, generator=generator) < MASKED
    how = torch.rand(tokens.shape, generator=generator)
    other = torch.randint(256, tokens.shape, generator=generator)
    shown = torch.where(how < REPLACED, other, torch.where(how < REPLACED + KEPT, tokens, MASK))
    return Batch(torch.where(asked, shown, tokens), tokens.masked_fill(~asked, IGNORED))
