"""A run on its way: trained in steps, looked at between them, put aside and taken up again.

On CUDA a step and a look are recorded once and replayed. A batch is drawn on the host by the number of its step, and
the state of the device's generator is kept, which random memories draw from: so a run that was put aside goes on as if
it had not been.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tests.graphs import recorded

from . import evaluation, macs, tasks, watched
from .batch import IGNORED, Batch
from .models import build, logits_of, parameters_of
from .settings import Settings

CLIP = 1.0  # norm of a gradient
BETAS = (0.9, 0.95)
FIRST = 20  # steps whose losses are kept one by one
LOOKED_INTO = 4  # sequences that routes are counted of
Note = Callable[[int, float], None]


class Run:
    """Of `s` on a device. `train` until it says that it is done, then `figures`."""

    def __init__(self, s: Settings, device: torch.device, saved: dict[str, Any] | None = None) -> None:
        self.s, self.device = s, device
        torch.manual_seed(s.seed)
        self.model = build(s).to(device)
        self.rate = torch.zeros((), device=device)
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), self.rate, BETAS, fused=True, capturable=cuda)
        self.shown = Batch(*(torch.zeros(s.batch, s.n, dtype=torch.int64, device=device) for _ in range(2)))
        self.loss = torch.zeros((), device=device)
        self.unseen = tasks.unseen(s, s.unseen)
        self.kept: dict[str, Any] = {"step": 0, "seconds": 0.0, "first": [], "curve": [], "loads": [], "picks": {}}
        if saved is not None:
            self.kept = saved["kept"]
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.optimizer.param_groups[0]["lr"] = self.rate
        self._step: Callable[[], Any] = self._train_on_shown
        self._look: Callable[[], Any] = self._look_at_shown
        if cuda:
            self._record()
        if saved is not None:
            self._generator().set_state(saved["generator"].cpu())

    def saved(self) -> dict[str, Any]:
        """For `torch.save`."""
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**states, "generator": self._generator().get_state(), "kept": self.kept}

    def _generator(self) -> torch.Generator:
        cuda = self.device.type == "cuda"
        return torch.cuda.default_generators[torch.cuda.current_device()] if cuda else torch.default_generator

    def train(self, note: Note = lambda step, loss: None, enough: Callable[[], bool] = lambda: False) -> bool:
        """Whether all steps are done; enough: asked after every look whether to put the run aside."""
        s, kept = self.s, self.kept
        if not kept["step"]:
            self._watch("seeded")
        while kept["step"] < s.steps:
            self._train(min(s.every - kept["step"] % s.every, s.steps - kept["step"]))
            found = self.look()
            kept["curve"].append([kept["step"], found["loss"], found["accuracy"]])
            kept["loads"].append([kept["step"], *self._loads()])
            note(kept["step"], found["loss"])
            if kept["step"] < s.steps and enough():
                return False
        self._watch("trained")
        return True

    def _train(self, steps: int) -> None:
        self._wait()
        begun = time.monotonic()
        for step in range(self.kept["step"], self.kept["step"] + steps):
            self._show(tasks.batch(self.s, step))
            self.rate.fill_(rate_at(self.s, step))
            self._step()
            if step < FIRST:
                self.kept["first"].append(self.loss.item())
        self._wait()
        self.kept["seconds"] += time.monotonic() - begun
        self.kept["step"] += steps

    def look(self) -> dict[str, float]:
        """Mean loss in nats and accuracy of what was not trained on, and the standard error of the loss."""
        rows = []
        for start in range(0, self.s.unseen, self.s.batch):
            self._show(Batch(*(t[start : start + self.s.batch] for t in self.unseen)))
            self._look()
            rows.append(self.seen.clone())
        return evaluation.summed(torch.cat(rows, 1).cpu())

    def figures(self) -> dict[str, Any]:
        """All that a report keeps of a finished run, but for where it was made."""
        kept, found = self.kept, self.look()
        self.model.eval()
        with torch.no_grad(), self._precision():
            honest = evaluation.by_prefixes(self.s, self.model, self._first(self.s.batch))
        return {
            **found,
            "honest": honest,
            "parameters": parameters_of(self.model),
            "macs_of_a_step": macs.of_a_step(self.s),
            "seconds": kept["seconds"],
            "first": kept["first"],
            "curve": kept["curve"],
            "loads": kept["loads"],
            "picks": kept["picks"],
        }

    # What is recorded

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, self.s.precision == "bfloat16", cache_enabled=False)

    def _train_on_shown(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self._precision():
            logits = logits_of(self.model, self.shown.tokens)
        loss = F.cross_entropy(logits.float().flatten(0, 1), self.shown.targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    @torch.no_grad()
    def _look_at_shown(self) -> None:
        with self._precision():
            logits = logits_of(self.model, self.shown.tokens)
        self.seen = evaluation.by_sequence(logits, self.shown.targets)

    def _record(self) -> None:
        """Recording takes steps, which are undone: parameters and moments stay where they are, with what they held."""
        weights = {name: t.clone() for name, t in self.model.state_dict().items()}
        moments = {p: {k: t.clone() for k, t in state.items()} for p, state in self.optimizer.state.items()}
        self._show(tasks.batch(self.s, 0))
        self._step, self._look = recorded(self._train_on_shown), recorded(self._look_at_shown)
        self.model.load_state_dict(weights)
        for p, state in self.optimizer.state.items():
            for name, t in state.items():
                t.copy_(moments[p][name]) if p in moments else t.zero_()

    def _show(self, batch: Batch) -> None:
        """Pinned, so that the host need not wait for the step before."""
        for held, t in zip(self.shown, batch):
            held.copy_(t.pin_memory() if held.is_cuda else t, non_blocking=True)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # What routers do

    def _first(self, count: int) -> Batch:
        return Batch(*(t[:count].to(self.device) for t in self.unseen))

    @torch.no_grad()
    def _loads(self) -> tuple[Any, Any]:
        if not self.s.mixture:
            return [], []
        with self._precision():
            return watched.loads(self.model, self._first(min(LOOKED_INTO, self.s.batch)).tokens)

    @torch.no_grad()
    def _watch(self, when: str) -> None:
        if self.s.mixture and self.s.seed == 0:
            with self._precision():
                self.kept["picks"][when] = watched.picks(self.model, self._first(1).tokens)


def rate_at(s: Settings, step: int) -> float:
    """It rises, stays, and falls to 0 in a straight line."""
    rise, fall = max(s.warmup * s.steps, 1), max(s.decay * s.steps, 1)
    return s.rate * min(1.0, (step + 1) / rise, (s.steps - step) / fall)
