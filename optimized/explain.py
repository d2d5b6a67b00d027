"""What a call would run: the backend of each stage, why not the others, and which path it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optimized.attention import Request, note
from optimized.autoregressive import MixtureOfAutoregressiveAttention
from optimized.mixture import MixtureOfAttention
from optimized.plan import BY_TRITON, REGISTRY, Backend, choose


@dataclass(frozen=True)
class StageReport:
    """backend: what runs. reasons: of every other backend, why it does not. note: what else is to be known of it."""

    backend: str
    reasons: dict[str, str]
    note: str = ""


@dataclass(frozen=True)
class Explanation:
    """stages: stage name to its report. path: "fused", or why modules are called one by one. str() is a table."""

    stages: dict[str, StageReport]
    path: str = "fused"

    def __str__(self) -> str:
        rows = [("stage", "backend", "why not the others")]
        for stage, report in self.stages.items():
            why = [f"{name}: {reason}" for name, reason in report.reasons.items()] or ["-"]
            why += [f"note: {report.note}"] if report.note else []
            rows.append((stage, report.backend, why[0]))
            rows += [("", "", reason) for reason in why[1:]]
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        table = "\n".join(f"{a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows)
        return f"{table}\n{'path':<{first}}  {self.path}"


Layer = (MixtureOfAttention, MixtureOfAutoregressiveAttention)


def explain(
    module: MixtureOfAttention | MixtureOfAutoregressiveAttention, x: Any, **forward_arguments: Any
) -> Explanation:
    """Report the backend of each stage for `module(x, **forward_arguments)`, without running it.

    Autocast, training mode (dropout), masks, what is attached to modules, and `use_backends` are taken into account.
    Raises TypeError or ValueError as the call would, for arguments and for a chosen backend that can't serve it.
    """
    if not isinstance(module, (MixtureOfAttention, MixtureOfAutoregressiveAttention)):
        raise TypeError(f"module: expected a layer of optimized, got {type(module).__name__}")
    kind, path = module.kind_of_call(x, **forward_arguments)
    stages = {}
    for stage in kind.stages:
        request = kind.request(stage)
        taken = choose(stage, request).name
        reasons = {b.name: _why_not(b, taken, request) for b in REGISTRY[stage] if b.name != taken}
        stages[stage] = StageReport(taken, reasons, "" if stage in BY_TRITON else note(taken))
    return Explanation(stages, path)


def _why_not(backend: Backend, taken: str, request: Request) -> str:
    obstacle, reservation = backend.obstacle(request), backend.reservation(request)
    return obstacle or f"{taken} is preferred" + (f": {reservation}" if reservation else "")
