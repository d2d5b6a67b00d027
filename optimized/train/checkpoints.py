"""All that a run needs to go on, in one file: whole parameters by name, so that any number of processes reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from optimized.train import files
from optimized.train.settings import Settings
from optimized.train.trainer import Trainer

FILE = "checkpoint.pt"
SHOWN = 4  # settings that differ


def save(folder: Path, trainer: Trainer) -> dict[str, Any]:
    """By the first process; all have to call it. Returns the parameters there. NotFiniteError, OSError."""
    from torch.distributed.checkpoint import state_dict as states  # costs a second, and not all runs keep anything

    progress = trainer.progress()
    whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = states.get_state_dict(trainer.model, trainer.optimizer, options=whole)
    if trainer.ranks.first:
        state = {"settings": trainer.settings.to_dict(), "progress": progress, "model": model, "optimizer": optimizer}
        files.write(folder / FILE, lambda file: torch.save(state, file))
    return model


def read(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """None: there is none. ValueError for one of other settings, naming them, or a file that is none."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        unlike = settings.unlike(state["settings"])
    except Exception as error:  # of many kinds, by what is in the file
        raise ValueError(f"expected a checkpoint of a training, got {path}: {error}") from None
    if unlike:
        more = f", and {len(unlike) - SHOWN} more" * (len(unlike) > SHOWN)
        raise ValueError(
            f"expected the settings of the checkpoint in {folder}, got {'; '.join(unlike[:SHOWN])}{more} "
            "(choose another folder, or remove it)"
        )
    return state


def load(state: dict[str, Any], trainer: Trainer) -> None:
    """What `read` found, into a trainer that has done nothing yet."""
    from torch.distributed.checkpoint import state_dict as states

    options = states.StateDictOptions(full_state_dict=True)
    states.set_state_dict(
        trainer.model,
        trainer.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )
    trainer.go_on(state["progress"])
