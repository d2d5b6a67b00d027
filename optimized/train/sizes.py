"""What is trained unless options say otherwise."""

from __future__ import annotations

from typing import Any, NamedTuple


class Size(NamedTuple):
    """Of a model and its training. Letters as in docs/causal.md."""

    dim: int
    depth: int
    dim_head: int
    window: int  # w, and the length W of a block
    experts: int
    queries: int  # Kq
    memory: int  # K
    context: int
    batch: int
    steps: int
    rate: float
    evaluate_tokens: int
    library: bool  # whether Python's own text is its library too
    use: str

    @property
    def described(self) -> str:
        text = "Python's documentation" + " and library" * self.library
        return (
            f"D {self.dim}, {self.depth} layers, context {self.context}, {self.steps} steps of "
            f"{self.batch * self.context} tokens of {text}: {self.use}"
        )


SIZES = {
    "tiny": Size(128, 4, 32, 32, 4, 16, 64, 256, 4, 400, 3e-3, 2**13, False, "minutes on a CPU"),
    "base": Size(256, 6, 32, 64, 4, 32, 128, 512, 8, 1500, 2e-3, 2**15, False, "an hour or two on a CPU"),
    "small": Size(512, 8, 64, 128, 4, 64, 256, 2048, 16, 1200, 1e-3, 2**17, True, "minutes on a GPU"),
    "medium": Size(
        1024, 16, 64, 256, 4, 128, 512, 8192, 16, 2000, 5e-4, 2**18, True, "for GPUs, and a longer text of your own"
    ),
}

SHARED: dict[str, Any] = {
    "layers": ["mixture"],
    "capacity": 2.0,
    "solver": "sigmoid",
    "dropout": 0.0,
    "warmup": None,  # a tenth of the steps
    "decay": 0.1,
    "clip": 1.0,
    "accumulate": 1,
    "validation": 0.1,
    "evaluate_every": None,  # a tenth of the steps
    "log_every": 10,
    "seed": 0,
}
