"""Pictures of a report, by name. Each is drawn into a file, of a task; those of routers are of one model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import report as reports
from . import losses, recall, routers

TASKS = {"recall": recall.draw, "text": losses.draw, "encoder": losses.draw, "packages": losses.packages}
OF_A_RUN = {"loads": routers.loads, "picks": routers.picks, "memory": routers.memory}


def _runs(report: dict[str, Any], task: str) -> list[dict[str, Any]]:
    found = reports.of_task(report, task)
    if not found:
        raise ValueError(f"--plot: expected finished runs of {task}, got none")
    return found


def _of_task(path: Path, report: dict[str, Any], task: str, model: str) -> None:
    TASKS[task](path, report, _runs(report, task))


def _of_a_run(draw: Callable[..., None]) -> Callable[..., None]:
    def drawn(path: Path, report: dict[str, Any], task: str, model: str) -> None:
        draw(path, report, routers.chosen(_runs(report, task), model))

    return drawn


PICTURES: dict[str, Callable[[Path, dict[str, Any], str, str], None]] = {
    "task": _of_task,
    **{name: _of_a_run(draw) for name, draw in OF_A_RUN.items()},
}
