"""What is measured: cases as data, and who takes part in each."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import optimized

LAYERS = ("optimized", "reference")
DENSE = ("dense", "dense flash-attn 2", "dense flash-attn 4")
MODES = ("optimized graph", "optimized graphed", "optimized deterministic")
SPARSE = ("dense flex window", "dense flex blocks")
BY_COMPILER = ("optimized compiled", "optimized reduce-overhead")
COMPILED = (*BY_COMPILER, "reference compiled")


@dataclass(frozen=True)
class Case:
    """A shape, and who is measured on it. window: of local attention, None for none. mask: "none" or "holes".

    queries: Kq of the causal layer, whose blocks are as long as its window, and which this is about; 0 for the other.
    local_heads: of local attention and of dense attention, where they are not `heads`.
    """

    name: str
    group: str
    batch: int
    n: int
    dim: int
    heads: int
    experts: int
    slots: int
    dim_head: int = 64
    dtype: str = "bfloat16"
    window: int | None = None
    dropout: float = 0.0
    mask: str = "none"
    queries: int = 0
    local_heads: int = 0
    detail: bool = False  # kernels, their stages, and host time too
    competitors: tuple[str, ...] = LAYERS

    @property
    def taken(self) -> int:
        """Slots that are filled: all tokens where N <= K."""
        return min(self.slots, self.n)

    @property
    def reach(self) -> int:
        """Of a window that stands in for the layer: that of its local attention, or one of about K keys."""
        return max(self.slots // 2, 1) if self.window is None else self.window

    @property
    def inner(self) -> int:
        return self.heads * self.dim_head

    @property
    def causal(self) -> bool:
        return self.queries > 0

    @property
    def dense_heads(self) -> int:
        return self.local_heads or self.heads

    @property
    def blocks(self) -> int:
        """Of the causal layer, that have a memory."""
        assert self.window is not None
        return -(-self.n // self.window) - 1

    @property
    def admitted(self) -> int:
        """Tokens that are ever in an expert's memory, where logits come in random order."""
        k = self.taken
        return min(round(k * (1 + math.log(self.n / k))), self.n)

    def described(self) -> dict[str, Any]:
        return asdict(self)

    def layer_arguments(self) -> dict[str, Any]:
        """Keywords of both `MixtureOfAttention`, or of both causal layers."""
        sizes = {
            "dim": self.dim,
            "num_routed_key_values": self.slots,
            "num_experts": self.experts,
            "dim_head": self.dim_head,
            "heads": self.heads,
            "dropout": self.dropout,
        }
        if self.causal:
            sizes |= {"num_routed_queries": self.queries, "local_attn_window_size": self.window}
            return sizes | {"local_attn_heads": self.dense_heads}
        return sizes | {
            "num_routed_queries": self.slots,
            "local_attn": self.window is not None,
            "local_attn_window_size": self.window,
        }

    def make_x(self, device: torch.device) -> Tensor:
        """Random, never zeros: a GPU computes faster on zeros."""
        return torch.randn(self.batch, self.n, self.dim, device=device, dtype=getattr(torch, self.dtype))

    def make_mask(self, device: torch.device) -> Tensor | None:
        """A quarter of the tokens hidden, anywhere."""
        return None if self.mask == "none" else torch.rand(self.batch, self.n, device=device) > 0.25


def cases(device: str) -> list[Case]:
    """In order of importance: a run that is cut short keeps the first."""
    return _cuda() if device == "cuda" else _cpu()


def _cuda() -> list[Case]:
    full = (*LAYERS, *DENSE, "upstream", *MODES)
    backends = _each_backend("routed_attention")
    by_torch = "optimized routing=torch dispatch=torch mixture=torch"
    standard = {"group": "standard", "detail": True, "competitors": full}
    large = {"dim": 1024, "heads": 16, "experts": 4}
    tiny = Case("tiny", batch=16, n=50, dim=512, heads=8, experts=4, slots=100, **standard)
    k8 = Case("8k", batch=4, n=8192, slots=1024, **large, **standard)
    competitors = (*full, "dense deterministic", by_torch, *backends, *COMPILED)
    out = [
        replace(k8, competitors=competitors),
        Case(
            "2k", batch=8, n=2048, dim=512, heads=8, experts=4, slots=256,
            **standard | {"competitors": (*full, by_torch, *backends, *COMPILED)},
        ),
        Case("32k", batch=1, n=32768, slots=2048, **large, **standard | {"competitors": (*full, *COMPILED, *SPARSE)}),
        replace(
            k8, name="8k local", window=128,
            competitors=(*full, *SPARSE[:1], *_each_backend("local_attention"), *BY_COMPILER),
        ),
        replace(tiny, competitors=(*full, *BY_COMPILER)),
        replace(tiny, name="tiny 400", n=400, competitors=(*full, *COMPILED)),
    ]  # fmt: skip
    # Its kernels take less than their launches: what is measured is the host.
    small = Case("small", batch=2, n=512, dim=256, heads=4, experts=4, slots=64, **standard)
    out.append(replace(small, competitors=("optimized", *MODES[:2], "dense", "dense graph", *BY_COMPILER)))
    variant = replace(k8, group="variants", competitors=(*LAYERS, *DENSE))
    out += [
        replace(variant, name="8k dropout 0.1", dropout=0.1),
        replace(variant, name="8k mask with holes", mask="holes"),
        replace(variant, name="8k d 128", heads=8, dim_head=128),
        replace(variant, name="8k float32", dtype="float32"),
    ]
    causal = {"group": "causal", "dim": 1024, "heads": 4, "local_heads": 16, "experts": 4, "slots": 512, "queries": 64}
    causal |= {"window": 256, "detail": True}
    taking_part = (*LAYERS, *MODES[:2], "dense", "dense graph", "dense flex window", "upstream")
    for name, n, batch in (("causal 2k", 2048, 16), ("causal 8k", 8192, 4), ("causal 32k", 32768, 1)):
        out.append(Case(name, n=n, batch=batch, **causal, competitors=taking_part))
    out.append(Case("causal 128k", n=131072, batch=1, **causal, competitors=taking_part))
    lengths = [1024 << i for i in range(8)]
    sweep = {"batch": 1, **large}
    for n in lengths:
        by_length = {"group": "sweep K = N/8", "competitors": (*LAYERS, "optimized graph", "dense")}
        out.append(Case(f"N {n} K N/8", n=n, slots=n // 8, **sweep, **by_length))
    fixed = {"slots": 1024, "group": "sweep K = 1024", "competitors": (*LAYERS, "optimized graph")}
    out += [Case(f"N {n} K 1024", n=n, **sweep, **fixed) for n in lengths[:-1]]
    fixed |= {"competitors": (*fixed["competitors"], "dense", *SPARSE)}
    out.append(Case(f"N {lengths[-1]} K 1024", n=lengths[-1], **sweep, **fixed))
    for experts in (1, 2, 4, 8, 16):
        out.append(
            replace(k8, name=f"8k E {experts}", group="sweep E", experts=experts, detail=False, competitors=LAYERS)
        )
    return out


def _cpu() -> list[Case]:
    shape = {"batch": 1, "dim": 256, "heads": 4, "experts": 2, "slots": 128, "dtype": "float32"}
    competitors = (*LAYERS, "dense")
    out = []
    for n in (512, 1024, 2048, 4096, 8192):
        out.append(Case(f"N {n}", "fixed K", n=n, **shape, competitors=competitors))
        out.append(Case(f"N {n} local", "fixed K, local", n=n, **shape, window=64, competitors=competitors))
    tiny = Case("tiny", "short", batch=16, n=50, dim=512, heads=8, experts=4, slots=100, dtype="float32")
    tiny = replace(tiny, competitors=competitors)
    compiled = "optimized compiled", "reference compiled"
    return [*out, tiny, replace(tiny, name="tiny 400", n=400, competitors=(*competitors, *compiled))]


def _each_backend(stage: str) -> tuple[str, ...]:
    """One competitor for each backend of a stage; those that can't run here become a row that says why."""
    return tuple(f"optimized {stage}={name}" for name in optimized.backends()[stage])
