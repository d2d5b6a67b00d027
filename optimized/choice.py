"""Which backends the user chose, here and now: in the blocks around a call, and for the process."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import NamedTuple

Stages = tuple[tuple[str, "str | None"], ...]  # stage and backend; None: the automatic choice, not that of others


class Block(NamedTuple):
    """An open block. owner: the object that opened it, and will close it."""

    owner: object
    stages: Stages


_blocks: ContextVar[_Chosen] = ContextVar("optimized.use_backends")


class _Chosen:
    """What the blocks of a context chose, outermost first; or the process, which has no blocks.

    `current` of the process' own is that of this context, or itself where no block is open: a property in C, which
    calls `_blocks.get(self)`. torch.compile can't ask a ContextVar, but reads such a property, and guards what it read.
    """

    current = property(_blocks.get)

    def __init__(self, stages: Stages, blocks: tuple[Block, ...] = ()) -> None:
        self.stages, self.blocks = stages, blocks


class Choices(NamedTuple):
    """Hashable: plans are kept by it."""

    blocks: Stages
    process: Stages  # counts where the blocks say nothing

    def of(self, stage: str) -> str | None:
        """Name of the backend; None: the automatic choice."""
        for stages in self:
            for name, backend in stages:
                if name == stage:
                    return backend
        return None


_process = _Chosen(())
_lock = threading.Lock()  # of who changes it


def choices() -> Choices:
    return Choices(_process.current.stages, _process.stages)


def open_block(owner: object, stages: dict[str, str | None]) -> None:
    _set((*_open(), Block(owner, tuple(stages.items()))))


def close_block(owner: object) -> bool:
    """The last that the owner opened here, wherever it stands among the others; False: there is none."""
    blocks = _open()
    for i in reversed(range(len(blocks))):
        if blocks[i].owner is owner:
            _set(blocks[:i] + blocks[i + 1 :])
            return True
    return False


def choose_for_process(stages: dict[str, str | None]) -> None:
    """Stages that are not named stay as they were; there is nothing behind it, so None is as if never chosen."""
    with _lock:
        made = _merged(_process.stages, tuple(stages.items()))
        _process.stages = tuple((stage, name) for stage, name in made if name is not None)


def _open() -> tuple[Block, ...]:
    here = _blocks.get(None)
    return () if here is None else here.blocks


def _set(blocks: tuple[Block, ...]) -> None:
    _blocks.set(_Chosen(_merged(*(block.stages for block in blocks)), blocks))


def _merged(*chosen: Stages) -> Stages:
    """The last word on each stage, in one order: equal choices are equal."""
    return tuple(sorted({stage: name for stages in chosen for stage, name in stages}.items()))
