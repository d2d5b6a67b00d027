"""What a call would run: the backend of each stage, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optimized.backends import REGISTRY, choose
from optimized.mixture import MixtureOfAttention


@dataclass(frozen=True)
class StageReport:
    """backend: what runs. reasons: of every other backend, why it does not."""

    backend: str
    reasons: dict[str, str]


@dataclass(frozen=True)
class Explanation:
    """stages: stage name to its report. str() is an aligned table."""

    stages: dict[str, StageReport]

    def __str__(self) -> str:
        rows = [("stage", "backend", "why not the others")]
        for stage, report in self.stages.items():
            why = [f"{name}: {reason}" for name, reason in report.reasons.items()] or ["-"]
            rows.append((stage, report.backend, why[0]))
            rows += [("", "", reason) for reason in why[1:]]
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows)


def explain(module: MixtureOfAttention, x: Tensor, **forward_arguments: Any) -> Explanation:
    """Report the backend of each stage for `module(x, **forward_arguments)`, without running it.

    Autocast, training mode (dropout), masks and `use_backends` are taken into account. Raises TypeError or ValueError
    as the call would for x, masks, context and a chosen backend that can't serve it.
    """
    if not isinstance(module, MixtureOfAttention):
        raise TypeError(f"module: expected an optimized.MixtureOfAttention, got {type(module).__name__}")
    a = forward_arguments
    checked = ("context", "mask", "context_mask", "num_routed_queries", "num_routed_key_values", "rotary_emb", "routes")
    module._check(x, *(a.get(name) for name in checked))
    context_mask = a.get("mask") if a.get("context") is None else a.get("context_mask")
    masked = context_mask is not None or a.get("routes") is not None
    requests = module._requests(x, masked, a.get("mask") is not None)
    stages = {}
    for stage, request in requests.items():
        taken = choose(stage, request).name
        reasons = {b.name: b.obstacle(request) or f"{taken} is preferred" for b in REGISTRY[stage] if b.name != taken}
        stages[stage] = StageReport(taken, reasons)
    return Explanation(stages)
