"""Losses of what was not trained on, as a whole sequence shows them and as its prefixes do."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from optimized import Encoder

from .batch import IGNORED, Batch
from .models import logits_of
from .settings import Settings


def by_sequence(logits: Float[Tensor, "B N V"], targets: Int64[Tensor, "B N"]) -> Float[Tensor, "3 B"]:
    """Losses in nats, right answers and questions, summed over each sequence; in float64."""
    losses = F.cross_entropy(logits.float().mT, targets, ignore_index=IGNORED, reduction="none")
    right = (logits.argmax(-1) == targets) & (targets != IGNORED)
    return torch.stack([t.double().sum(1) for t in (losses, right, targets != IGNORED)])


def summed(rows: Float[Tensor, "3 B"]) -> dict[str, float]:
    """Loss and accuracy of a question, and the standard error of the loss over sequences."""
    loss, right, asked = rows.sum(1).tolist()
    deviations = rows[0] - rows[2] * loss / asked  # of a ratio of sums
    error = deviations.square().sum().sqrt().item() / asked
    return {"loss": loss / asked, "standard_error": error, "accuracy": right / asked, "questions": asked}


def by_prefixes(s: Settings, model: nn.Module, batch: Batch) -> dict[str, Any] | None:
    """The losses of some tokens twice: in whole sequences, and each as the last token of what came before it.

    The second is what a model would do that generates: nothing comes after. A causal one does the same in both. Tokens
    are the same place of all sequences of the batch, evenly spaced beyond the first block. None for an encoder.
    """
    if isinstance(model, Encoder):
        return None
    places = (batch.targets != IGNORED).all(0).nonzero()[:, 0]
    places = places[places >= s.window]
    chosen = places[torch.linspace(0, len(places) - 1, min(s.prefixes, len(places))).long().to(places.device)]
    whole = logits_of(model, batch.tokens)
    pairs = []
    for place in chosen.tolist():
        alone: Any = model(batch.tokens[:, : place + 1], last=True)  # type: ignore[call-arg]
        answers = batch.targets[:, place]
        losses = (F.cross_entropy(t.double(), answers, reduction="none") for t in (whole[:, place], alone[:, 0]))
        pairs.append(torch.stack(list(losses)).mean(1))
    told, honest = torch.stack(pairs, 1).cpu()
    differences = honest - told
    error = differences.std().item() / math.sqrt(len(chosen)) if len(chosen) > 1 else None
    return {
        "teacher_forced": told.mean().item(),
        "honest": honest.mean().item(),
        "difference": differences.mean().item(),
        "standard_error_of_the_difference": error,
        "places": len(chosen),
        "sequences": len(batch.tokens),
    }
