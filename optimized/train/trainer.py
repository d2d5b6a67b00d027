"""Steps of training, evaluation, and the state that goes on as if nothing had happened.

Nothing here waits for the device but `note` and `evaluate`. Letters: M mixture layers, E experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from optimized.prove.arguments import DTYPES
from optimized.train.data import Batches, Split, seed_of, windows
from optimized.train.optimizer import optimizer_of, rate_at
from optimized.train.ranks import Ranks, without_sync, wrapped
from optimized.train.settings import Settings
from optimized.transformer import Decoder


class Way(NamedTuple):
    """How it is computed: of no effect on a curve but by rounding."""

    style: str | None = None  # "ddp", "fsdp"
    accumulate: int = 1
    compiled: bool = False
    checkpointing: bool = False


class NotFiniteError(ArithmeticError):
    """A loss that is no number."""


class Trainer:
    """step: steps done. curve: {"training": [...], "validation": [...]}, of what JSON has."""

    def __init__(self, settings: Settings, data: Split, ranks: Ranks, way: Way) -> None:
        self.settings, self.ranks, self.way = settings, ranks, way
        s = settings
        torch.manual_seed(seed_of("parameters", s.seed))
        self.model = Decoder(s.model, checkpointing=way.checkpointing, device=ranks.device)
        self.called: nn.Module = wrapped(self.model, way.style, ranks, way.compiled)
        self.optimizer = optimizer_of(self.model, s.rate, s.decay)
        self.batches = Batches(data.train, s.context, s.batch, s.seed)
        count = max(s.evaluate_tokens // (s.context * s.batch), 1) * s.batch
        self.unseen = windows(data.validation, s.context, count)
        self.step = 0
        self.curve: dict[str, list[dict[str, Any]]] = {"training": [], "validation": []}
        self.seconds = 0.0  # of steps
        self._loads: tuple[Tensor, Tensor] | None = None
        self._begin(torch.zeros((), dtype=torch.float64, device=ranks.device), 0)

    def _begin(self, total: Tensor, steps: int) -> None:
        """What goes into the next note. total: of this process's losses."""
        self.total, self.noted = total, self.step - steps
        self.since = 0.0
        self.clock: float | None = time.perf_counter()

    def _mixed(self) -> torch.autocast:
        s = self.settings
        return torch.autocast(self.ranks.device.type, DTYPES[s.dtype], enabled=s.dtype != "float32")

    def _losses(self, rows: Int64[Tensor, "B N+1"], watch: bool = False) -> tuple[Float[Tensor, "B N"], Any]:
        with self._mixed():
            found = self.called(rows[:, :-1], return_loads=True) if watch else self.called(rows[:, :-1])
            logits, loads = found if watch else (found, None)
            expected = rows[:, 1:].flatten()
            losses = F.cross_entropy(logits.float().flatten(0, 1), expected, reduction="none")
            return losses.view(len(rows), -1), loads

    def _moved(self, rows: Tensor) -> Tensor:
        if self.ranks.device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self.ranks.device, non_blocking=True)

    def train_step(self) -> None:
        """One batch of all processes together. What is random of it depends on the seed, the step and the process."""
        s, ranks = self.settings, self.ranks
        torch.manual_seed(seed_of("step", s.seed, self.step, ranks.rank))
        self.called.train()
        rows = self._moved(ranks.part(self.batches.at(self.step)))
        parts = rows.chunk(self.way.accumulate)
        due = self._due()
        for i, part in enumerate(parts):
            last = i + 1 == len(parts)
            with without_sync(self.called, last):
                losses, loads = self._losses(part, watch=due and last)
                loss = losses.mean() / len(parts)
                loss.backward()
            self.total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.step, s.steps, s.warmup, s.rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if due:
            self._loads = loads.queries.sum(1), loads.candidates.sum(1)
        self.step += 1

    def _due(self) -> bool:
        """Whether the step that comes next ends with a note."""
        s, step = self.settings, self.step + 1
        return step == s.steps or step % s.log_every == 0 or step % s.evaluate_every == 0

    @property
    def noting(self) -> bool:
        """Whether the step that was done is to be noted."""
        return self._loads is not None

    def note(self) -> dict[str, Any]:
        """The mean loss since the note before, of all processes, and loads of the last batch. NotFiniteError."""
        s, ranks = self.settings, self.ranks
        assert self._loads is not None
        steps = self.step - self.noted
        loss = ranks.sum(self.total).item() / (steps * ranks.size)
        if not math.isfinite(loss):
            raise self._not_finite(loss)
        queries, candidates = (ranks.sum(t).cpu().double() for t in self._loads)
        seconds = self._elapsed()  # the device is done only now
        self.seconds += seconds
        shares = queries / queries.sum(-1, keepdim=True).clamp_min(1)
        noted = {
            "step": self.step,
            "tokens": self.step * s.batch * s.context,
            "loss": loss,
            "rate": rate_at(self.step - 1, s.steps, s.warmup, s.rate),
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(steps * s.batch * s.context / max(seconds, 1e-9), 1),
            "loads": [[round(share, 4) for share in layer] for layer in shares.tolist()],
            "without_slot": [round(x, 4) for x in (1 - queries.sum(-1) / candidates.sum(-1).clamp_min(1)).tolist()],
        }
        self.curve["training"].append(noted)
        self._loads = None
        self._begin(torch.zeros_like(self.total), 0)
        return noted

    def _elapsed(self) -> float:
        return self.since + (0.0 if self.clock is None else time.perf_counter() - self.clock)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is not counted as training."""
        self.since, self.clock = self._elapsed(), None
        try:
            yield
        finally:
            self.clock = time.perf_counter()

    def _not_finite(self, loss: float) -> NotFiniteError:
        return NotFiniteError(f"the loss is {loss} at step {self.step}")

    def progress(self) -> dict[str, Any]:
        """All that is not of the model and the optimizer; all processes have to ask. Raises NotFiniteError."""
        total = self.ranks.sum(self.total.clone()).item() / self.ranks.size
        if not math.isfinite(total):
            raise self._not_finite(total)
        return {
            "step": self.step,
            "noted": self.noted,
            "total": total,
            "curve": self.curve,
            "seconds": self.seconds,
            "since": self._elapsed(),
        }

    def go_on(self, progress: dict[str, Any]) -> None:
        """From there, on as many processes as there are now."""
        self.step, self.curve, self.seconds = progress["step"], progress["curve"], progress["seconds"]
        self._begin(torch.full_like(self.total, progress["total"]), self.step - progress["noted"])
        self.since = progress["since"]

    @torch.no_grad()
    def evaluate(self, bytes_per_token: float) -> dict[str, Any]:
        """Mean loss of tokens of the validation part, always the same ones, in nats and bits per byte."""
        begun = time.perf_counter()
        self.called.eval()
        each = self.settings.batch // self.way.accumulate
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        with self.paused():
            for rows in self.unseen.split(each):
                total += self._losses(self._moved(self.ranks.part(rows)))[0].double().sum()
            loss = self.ranks.sum(total).item() / (len(self.unseen) * self.settings.context)
        found = {
            "step": self.step,
            "loss": loss,
            "bits_per_byte": loss / math.log(2) / bytes_per_token,
            "seconds": round(time.perf_counter() - begun, 3),
        }
        self.curve["validation"].append(found)
        return found

    def sequences(self) -> Int64[Tensor, "B N"]:
        """Some of the validation part, the same ones in every process, and as many as one evaluates at once."""
        each = self.settings.batch // self.way.accumulate // self.ranks.size
        return self._moved(self.unseen[:each, :-1])

    @torch.no_grad()
    def logits(self, tokens: Int64[Tensor, "B N"]) -> Float[Tensor, "B N V"]:
        """Computed as it is evaluated. All processes have to call it."""
        self.called.eval()
        with self._mixed():
            return self.called(tokens)
