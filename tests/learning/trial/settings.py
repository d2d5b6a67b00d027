"""What one run is, as JSON has it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from reference.contract import describe, reject

TASKS = ("recall", "text", "encoder", "packages")
MIXTURES = (
    "sigmoid", "straight-through", "iterative", "iterative-cold", "exact", "exact-cold", "default", "few-queries",
    "random-memory", "window-top-k",
)  # fmt: skip
MODELS = ("dense", "local", *MIXTURES, "optimized", "reference")
PRECISIONS = ("bfloat16", "float32")


@dataclass(frozen=True)
class Settings:
    """Of a model and its training.

    Args:
        task, model: one of TASKS and of MODELS. seed: of parameters and data.
        steps: of training. batch, n: sequences of a step, and tokens of each.
        layers, dim, heads, dim_head: of the model; the experts of a layer share the heads.
        hidden: width of the feed-forward of the sigmoid mixture, 0 for the model's default; that of the others makes
            their parameters as many.
        window: w, and W of the causal layer. experts, keys, queries: E, K, and Kq, which in an encoder is of the whole
            sequence; 0 for models without a mixture.
        pairs, symbols: of recall: pairs of a key and a value, and how many keys there are; 0 elsewhere.
        rate: largest learning rate; it rises over the first `warmup` of the steps and falls to 0 over the last `decay`.
        every: steps between two looks at what was not trained on. unseen: sequences that are looked at.
        prefixes: places whose loss is computed from prefixes too, which no model can cheat at.
        precision: bfloat16 is autocast.
    Raises ValueError naming the argument.
    """

    task: str
    model: str
    seed: int = 0
    steps: int = 4000
    batch: int = 32
    n: int = 1024
    layers: int = 4
    dim: int = 256
    heads: int = 4
    dim_head: int = 64
    hidden: int = 0
    window: int = 128
    experts: int = 4
    keys: int = 64
    queries: int = 128
    pairs: int = 0
    symbols: int = 0
    rate: float = 1e-3
    warmup: float = 0.05
    decay: float = 0.2
    every: int = 200
    unseen: int = 256
    prefixes: int = 64
    precision: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, known in (("task", TASKS), ("model", MODELS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                reject(name, f"one of {', '.join(known)}", describe(getattr(self, name)))
        for name in ("steps", "batch", "n", "layers", "dim", "heads", "dim_head", "window", "every", "unseen"):
            if getattr(self, name) < 1:
                reject(name, "an integer >= 1", getattr(self, name))
        if self.n % self.window:
            reject("n", f"a multiple of the window, {self.window}", self.n)
        if self.unseen % self.batch:
            reject("unseen", f"a multiple of the batch, {self.batch}", self.unseen)
        if self.mixture:
            for name in ("experts", "keys", "queries"):
                if getattr(self, name) < 1:
                    reject(name, f"an integer >= 1 for the model {self.model}", getattr(self, name))
            if self.heads % self.experts:
                reject("experts", f"a divisor of the {self.heads} heads, which experts share", self.experts)
        if self.task == "recall":
            self._check_recall()

    def _check_recall(self) -> None:
        if not 1 <= self.pairs <= self.symbols:
            reject("pairs", f"an integer in [1, {self.symbols}], of distinct keys", self.pairs)
        if self.pairs > min(self.n // 4, self.window):
            reject("pairs", f"at most {min(self.n // 4, self.window)}: a quarter of n, and the window", self.pairs)
        if self.distance <= self.layers * self.window:
            reject(
                "n",
                f"tokens between pairs and questions that {self.layers} windows of {self.window} don't reach across",
                f"{self.n}, which leaves {self.distance}",
            )

    @property
    def mixture(self) -> bool:
        return self.model not in ("dense", "local")

    @property
    def distance(self) -> int:
        """Of recall: tokens between the last that may be a pair and the first question."""
        return self.n - self.window - self.n // 4

    def key(self) -> str:
        """A name for its file."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def label(self) -> str:
        parts: list[Any] = [self.task, self.model, f"N {self.n}"]
        parts += [f"P {self.pairs}"] if self.pairs else []
        parts += [f"E {self.experts} K {self.keys} Kq {self.queries}"] if self.mixture else []
        return ", ".join([*parts, f"seed {self.seed}"])
