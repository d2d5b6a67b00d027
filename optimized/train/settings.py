"""All that decides a curve, but for the text itself: written beside it, and compared when a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from optimized.transformer import TransformerConfig


@dataclass(frozen=True)
class Settings:
    """Of a training. A step is a batch of `batch` sequences of `context` tokens, on however many devices."""

    model: TransformerConfig
    context: int
    batch: int
    steps: int
    rate: float  # of learning, at its highest
    warmup: int  # steps in which it rises
    decay: float  # of weights
    clip: float  # norm of all gradients together, at most
    dtype: str  # of autocast; parameters are float32
    seed: int
    validation: float  # share of the text
    evaluate_every: int
    evaluate_tokens: int
    log_every: int
    text: str  # digest of the tokens

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON has."""
        return {**asdict(self), "model": self.model.to_dict()}

    def unlike(self, other: Mapping[str, Any]) -> list[str]:
        """`name: this, there that` for each setting that `other`, as `to_dict` made it, has differently."""
        ours, theirs = _flat(self.to_dict()), _flat(other)
        names = dict.fromkeys([*ours, *theirs])
        return [f"{n}: {ours.get(n)}, there {theirs.get(n)}" for n in names if ours.get(n) != theirs.get(n)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found
