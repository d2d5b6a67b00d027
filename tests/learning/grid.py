"""Which runs there are: the sizes of a task, what is varied, and who takes part."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from .trial import macs
from .trial.settings import Settings

FULL: dict[str, dict[str, Any]] = {
    "recall": {"pairs": 16, "symbols": 64},
    "text": {
        "layers": 6,
        "heads": 8,
        "dim_head": 32,
        "n": 2048,
        "batch": 16,
        "keys": 128,
        "steps": 12000,
        "every": 400,
    },
}
FULL["encoder"] = FULL["text"] | {"experts": 2, "queries": 1024, "keys": 256}
FULL["packages"] = FULL["text"] | {
    "layers": 3, "dim": 128, "heads": 4, "n": 512, "window": 64, "queries": 64, "steps": 2000, "every": 100,
    "precision": "float32", "keys": 64,
}  # fmt: skip
_TINY: dict[str, Any] = {
    "layers": 2, "dim": 64, "heads": 4, "dim_head": 16, "experts": 2, "batch": 16, "unseen": 64, "prefixes": 8,
    "precision": "float32", "rate": 3e-3, "every": 50,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "recall": _TINY
    | {
        "dim": 32,
        "heads": 2,
        "n": 96,
        "window": 8,
        "queries": 8,
        "keys": 8,
        "pairs": 4,
        "symbols": 8,
        "steps": 1000,
    },
    "text": _TINY | {"n": 128, "window": 16, "queries": 16, "keys": 16, "batch": 8, "unseen": 32, "steps": 400},
}
SMALL["encoder"] = SMALL["text"] | {"queries": 64}
SMALL["packages"] = SMALL["text"] | {"n": 64, "keys": 8, "steps": 100, "every": 20}
SIZES = {"small": SMALL, "full": FULL}

WITHOUT_TELLING = ("dense", "local", "sigmoid", "iterative", "exact")
TAKE_PART = {
    "recall": (*WITHOUT_TELLING, "iterative-cold", "exact-cold", "few-queries", "random-memory", "window-top-k"),
    "text": (*WITHOUT_TELLING, "straight-through", "few-queries", "window-top-k"),
    "encoder": ("dense", "local", "sigmoid", "straight-through", "iterative", "default"),
    "packages": ("optimized", "reference"),
}

# What is varied, besides `base`, which varies nothing.
SWEEPS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("distance", "full"): [{"n": n, "batch": min(32, 65536 // n)} for n in (1024, 2048, 4096, 8192)],
    ("distance", "small"): [{"n": n} for n in (96, 192, 384)],
    ("pairs", "full"): [{"pairs": p, "keys": k} for k in (4, 16, 64) for p in (8, 16, 32, 64)],
    ("pairs", "small"): [{"pairs": p, "keys": k} for k in (1, 4) for p in (2, 4, 8)],
    ("experts", "full"): [{"experts": e} for e in (2, 4, 8)],
    ("experts", "small"): [{"experts": e} for e in (1, 2)],
    ("keys", "full"): [{"keys": k} for k in (32, 64, 128, 256)],
    ("keys", "small"): [{"keys": k} for k in (8, 32)],
}
OF_TASK = {
    "recall": ("base", "distance", "pairs"),
    "text": ("base", "experts", "keys"),
    "encoder": ("base", "experts", "keys"),
    "packages": ("base",),
}


def settings_of(task: str, size: str, model: str, seed: int, changed: dict[str, Any]) -> Settings:
    """changed: over those of the size. Raises ValueError naming the argument."""
    given = SIZES[size][task] | changed
    window, experts = given.get("window", Settings.window), given.get("experts", Settings.experts)
    if model in ("few-queries", "window-top-k") and "queries" not in changed:
        given["queries"] = max(window // experts, 1)  # of the second some: all would leave nothing to choose
    if model in ("dense", "local"):
        given |= {"experts": 0, "keys": 0, "queries": 0}
    return Settings(task, model, seed, **given)


def runs(
    task: str,
    size: str,
    sweeps: Iterable[str],
    models: Iterable[str],
    seeds: Iterable[int],
    changed: dict[str, Any],
    equal_macs: bool = False,
) -> list[Settings]:
    """In order, a seed after the other, without repetition. equal_macs: as many steps as take those of the sigmoid
    mixture of the size, in multiply-accumulates."""
    varied = [step for sweep in sweeps for step in ([{}] if sweep == "base" else SWEEPS[sweep, size])]
    found: dict[Settings, None] = {}
    for seed, step, model in itertools.product(seeds, varied, models):
        s = settings_of(task, size, model, seed, step | changed)
        if equal_macs:
            ours = macs.of_a_step(settings_of(task, size, "sigmoid", seed, changed))
            steps = max(round(s.steps * ours / macs.of_a_step(s)), 1)
            s = settings_of(task, size, model, seed, step | changed | {"steps": steps})
        found[s] = None
    return list(found)
