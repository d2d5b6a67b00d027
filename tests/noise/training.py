"""A small model of one of the layers, trained on noise, and the loss of tokens that it has not seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graphs import recorded

from .layers import LAYERS

CHUNK = 50  # steps between two readings of the loss


@dataclass(frozen=True)
class Settings:
    """Of a model and its training. `unseen`: tokens that the loss is measured on, at least."""

    steps: int = 4000
    vocabulary: int = 16
    dim: int = 64
    layers: int = 2
    n: int = 128
    batch: int = 64
    window: int = 16
    queries: int = 4
    keys: int = 32
    experts: int = 2
    rate: float = 2e-3
    unseen: int = 2**20
    seed: int = 0


class Block(nn.Module):
    def __init__(self, s: Settings, mixture: nn.Module) -> None:
        super().__init__()
        self.mixture, self.norm = mixture, nn.LayerNorm(s.dim)
        self.mlp = nn.Sequential(nn.Linear(s.dim, 4 * s.dim), nn.GELU(), nn.Linear(4 * s.dim, s.dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixture(x)
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    """Token t of the result is a guess at token t + 1."""

    def __init__(self, s: Settings, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(s.vocabulary, s.dim)
        sizes = {"num_routed_queries": s.queries, "num_routed_key_values": s.keys, "num_experts": s.experts}
        sizes |= {"local_attn_window_size": s.window, "dim_head": 16, "heads": 2}
        self.blocks = nn.Sequential(*(Block(s, make(s.dim, **sizes)) for _ in range(s.layers)))
        self.norm, self.head = nn.LayerNorm(s.dim), nn.Linear(s.dim, s.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))

    def losses(self, tokens: Tensor) -> Tensor:
        """Of each guess, (B, N)."""
        guesses = self(tokens[:, :-1])
        return F.cross_entropy(guesses.mT, tokens[:, 1:], reduction="none")


class Run:
    """A layer by name, on its way. On CUDA a step is recorded once and replayed."""

    def __init__(self, name: str, s: Settings, device: torch.device) -> None:
        self.name, self.s, self.device = name, s, device
        torch.manual_seed(s.seed)
        self.model = Model(s, LAYERS[name]).to(device)
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), s.rate, capturable=on_gpu)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.step: Callable[[], None] = recorded(self._step) if on_gpu else self._step
        self.curve: list[tuple[int, float]] = []
        self.seconds = 0.0

    def tokens(self) -> Tensor:
        return torch.randint(self.s.vocabulary, (self.s.batch, self.s.n + 1), device=self.device)

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model.losses(self.tokens()).mean()
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()

    def train(self, note: Callable[[int, float], None] = lambda step, loss: None) -> None:
        start = time.monotonic()
        for done in range(0, self.s.steps, CHUNK):
            self.total.zero_()
            steps = min(CHUNK, self.s.steps - done)
            for _ in range(steps):
                self.step()
            self.curve.append((done + steps, self.total.item() / steps))
            note(*self.curve[-1])
        self.seconds = time.monotonic() - start

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Mean loss of unseen tokens in nats, its standard error over sequences, and how far it lies from ln V."""
        per_sequence = []
        rounds = math.ceil(self.s.unseen / (self.s.batch * self.s.n))
        self.model.eval()
        for _ in range(rounds):
            per_sequence.append(self.model.losses(self.tokens()).double().mean(1))
        means = torch.cat(per_sequence).cpu()
        loss, error = means.mean().item(), means.std().item() / math.sqrt(len(means))
        below = (math.log(self.s.vocabulary) - loss) / error
        return {
            "layer": self.name, "loss": loss, "standard_error": error, "errors_below_ln_v": below,
            "ln_v": math.log(self.s.vocabulary), "tokens": len(means) * self.s.n, "steps": self.s.steps,
            "seconds": round(self.seconds, 1), "settings": asdict(self.s), "curve": self.curve,
        }  # fmt: skip


STRICT, LEAK = 4.0, 10.0  # standard errors below ln V: nothing is seen up to here, something from here on


def verdict(found: dict[str, Any]) -> str:
    """Of an evaluation: what its loss says of the layer."""
    if not math.isfinite(found["errors_below_ln_v"]):
        return "no number"
    if found["errors_below_ln_v"] <= STRICT:
        return "sees nothing"
    return "leaks" if found["errors_below_ln_v"] > LEAK else "undecided"
