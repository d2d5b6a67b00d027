"""What a run writes into its folder, as often as it writes a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimized.prove.environment import hardware, versions
from optimized.prove.text import visible
from optimized.train import checkpoints, curves, report, saved
from optimized.train.plan import Plan
from optimized.train.trainer import Trainer


class Keeper:
    """folder: None keeps nothing. kept: lines that say what was kept."""

    def __init__(self, folder: Path | None, plan: Plan, trainer: Trainer) -> None:
        self.folder, self.plan, self.trainer = folder, plan, trainer

    def keep(self) -> None:
        """All processes have to call it; the first one writes. OSError, NotFiniteError."""
        if self.folder is None:
            return
        with self.trainer.paused():
            state = checkpoints.save(self.folder, self.trainer)
            if self.trainer.ranks.first:
                saved.save(self.folder, self.plan.settings.model, state, self.plan.tokenizer_file)
                curves.write(self.folder, self._report())

    def _report(self) -> dict[str, Any]:
        plan, ranks = self.plan, self.trainer.ranks
        return {
            "described": report.described(plan, ranks),
            "settings": plan.settings.to_dict(),
            "hardware": hardware(ranks.device),
            "processes": ranks.size,
            "versions": versions(),
            "parameters": plan.parameters,
            "macs_per_token": plan.macs,
            "bytes_per_token": plan.bytes_per_token,
            **self.trainer.curve,
        }

    @property
    def kept(self) -> list[str]:
        if self.folder is None:
            return ["Nothing is kept without --out."]
        names = ", ".join(sorted(p.name for p in self.folder.iterdir() if p.suffix in (".pt", ".json", ".png")))
        return [
            f"{visible(str(self.folder))} has {names}",
            f"What the model writes: python -m optimized.train --out {visible(str(self.folder))} --generate 300",
        ]
