"""Hypothesis strategies: configurations that are valid by construction, small enough to run by the hundred.

A case is a frozen dataclass whose repr is Python, so that a failure can be pasted back. Its data come from its seed:
drawn in float64 on the CPU, then rounded to the dtype under test, so that every implementation and the oracle read the
same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

VALUES = ("normal", "large", "tiny", "integer", "constant", "outlier", "ties")
MASKS = ("none", "all", "random", "all_but_one", "none_valid", "suffix")
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "unaligned")
COTANGENTS = ("dense", "one_hot", "sum")
# Around every block constant of the banded local attention (32 and 256), and primes.
LENGTHS = (1, 2, 3, 5, 7, 13, 16, 17, 29, 31, 32, 33, 47, 61, 63, 64, 65)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(shape: tuple[int, ...], values: str, seed: int) -> Tensor:
    """float64 numbers of a value regime; the last dimension is the channel, the one before it the token."""
    g = generator(seed)
    t = torch.randn(shape, generator=g, dtype=torch.float64)
    if values == "large":
        t *= 30
    elif values == "tiny":
        t *= 1e-3
    elif values == "integer":
        t = torch.randint(-3, 4, shape, generator=g).double()
    elif values == "constant":
        t = t[..., :1, :].expand(shape).clone()
    elif values == "outlier" and t.numel():
        t.view(-1)[int(torch.randint(t.numel(), (1,), generator=g))] = 1000.0
    elif values == "ties" and len(shape) > 1 and shape[-2]:
        t = t[..., torch.randint(max(shape[-2] // 3, 1), (shape[-2],), generator=g), :]
    return t


def draw_mask(batch: int, n: int, kind: str, seed: int) -> Tensor | None:
    g = generator(seed + 1)
    if kind == "none":
        return None
    if kind == "all":
        return torch.ones(batch, n, dtype=torch.bool)
    if kind == "none_valid":
        mask = torch.rand(batch, n, generator=g) < 0.7
        if batch:
            mask[int(torch.randint(batch, (1,), generator=g))] = False
        return mask
    if kind == "all_but_one":
        return ~torch.nn.functional.one_hot(torch.randint(max(n, 1), (batch,), generator=g), max(n, 1)).bool()[:, :n]
    if kind == "suffix":
        return torch.arange(n) < torch.randint(0, n + 1, (batch, 1), generator=g)
    if kind == "long_suffix":
        return torch.arange(n) < torch.randint(n // 2, n + 1, (batch, 1), generator=g)
    return torch.rand(batch, n, generator=g) < 0.7


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout (expanded: batch item 0 for all, with stride 0)."""
    if layout == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        buffer = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan"), dtype=t.dtype, device=t.device)
        view = buffer[..., 1 : 1 + 2 * t.shape[-1] : 2]
        view.copy_(t)
        return view
    if layout == "gapped":
        view = torch.full((*t.shape[:-1], t.shape[-1] + 1), float("nan"), dtype=t.dtype, device=t.device)[..., :-1]
        view.copy_(t)
        return view
    if layout == "expanded" and t.shape[0] > 1:
        return t[:1].expand_as(t)
    if layout == "unaligned":
        buffer = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype, device=t.device)
        view = buffer[1:].view(t.shape)
        view.copy_(t)
        return view
    return t


def cotangent(shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    """float64. "sum" is what .sum().backward() sends: a one with stride 0 in every dimension."""
    if kind == "sum":
        return torch.ones((), dtype=torch.float64).expand(shape)
    g = generator(seed + 2)
    if kind == "one_hot":
        t = torch.zeros(shape, dtype=torch.float64)
        if t.numel():
            t.view(-1)[int(torch.randint(t.numel(), (1,), generator=g))] = 1.0
        return t
    return torch.randn(shape, generator=g, dtype=torch.float64)


@dataclass(frozen=True)
class RouterCase:
    """One call of the router."""

    batch: int = 2
    n: int = 17
    dim: int = 8
    experts: int = 2
    k: int = 5
    values: str = "normal"
    mask: str = "none"
    layout: str = "contiguous"
    tokens_per_item: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, routing tokens, mask."""
        x = draw((self.batch, self.n, self.dim), self.values, self.seed)
        shape = (self.batch, self.experts, self.dim) if self.tokens_per_item else (self.experts, self.dim)
        tokens = draw(shape, "integer" if self.values == "integer" else "normal", self.seed + 7)
        return x, tokens, draw_mask(self.batch, self.n, self.mask, self.seed)


@dataclass(frozen=True)
class LayerCase:
    """One call of the whole layer. LETTERS: what a report calls the sizes."""

    LETTERS: ClassVar[dict[str, str]] = {
        "batch": "B", "n": "N", "dim": "D", "experts": "E", "heads": "H", "dim_head": "d", "k_q": "Kq", "k_kv": "Kkv",
    }  # fmt: skip

    batch: int = 2
    n: int = 17
    dim: int = 16
    experts: int = 2
    heads: int = 2
    dim_head: int = 8
    k_q: int = 5
    k_kv: int = 7
    window: int | None = None
    context: int | None = None  # M of cross-attention
    dim_context: int | None = None
    rotary: bool = False
    prenorm: bool = True
    average: bool = False
    values: str = "normal"
    mask: str = "none"
    layout: str = "contiguous"
    cotangent: str = "dense"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Of the constructor."""
        local = {} if self.window is None else {"local_attn": True, "local_attn_window_size": self.window}
        return {
            "dim": self.dim,
            "num_routed_queries": self.k_q,
            "num_routed_key_values": self.k_kv,
            "num_experts": self.experts,
            "dim_context": self.dim_context,
            "dim_head": self.dim_head,
            "heads": self.heads,
            "dropout": 0.0,
            "prenorm": self.prenorm,
            "average_routed": self.average,
            **local,
            **self.options,
        }

    def state(self) -> dict[str, Tensor]:
        """Parameters in float64, all of them random: no scale is 1 and no bias is 0."""
        e, h, d, hd = self.experts, self.heads, self.dim_head, self.heads * self.dim_head
        dim, dim_context = self.dim, self.dim_context or self.dim
        shapes: dict[str, tuple[tuple[int, ...], float]] = {
            "query_router.routing_token": ((e, dim), 1.0),
            "key_value_router.routing_token": ((e, dim_context), 1.0),
            "attn.null_kv": ((2, e, h, 1, d), 1.0),
            "attn.to_q.weight": ((e * hd, dim, 1), dim**-0.5),
            "attn.to_kv.weight": ((e * 2 * hd, dim_context, 1), dim_context**-0.5),
            "attn.to_out.weight": ((e * dim, hd, 1), hd**-0.5),
        }
        if self.prenorm:
            shapes |= {"attn.norm.gamma": ((e, dim, 1), 1.0), "attn.context_norm.gamma": ((e, dim_context, 1), 1.0)}
        if self.window is None:
            shapes["null_routed_token"] = ((1, 1, dim), 1.0)
        else:
            shapes |= {
                "local_attn.to_qkv.weight": ((3 * hd, dim), dim**-0.5),
                "local_attn.to_out.weight": ((dim, hd), hd**-0.5),
            }
            if self.prenorm:
                shapes |= {"local_attn.norm.weight": ((dim,), 1.0), "local_attn.norm.bias": ((dim,), 0.3)}
        g = generator(self.seed + 11)
        return {
            name: torch.randn(shape, generator=g, dtype=torch.float64) * scale
            for name, (shape, scale) in shapes.items()
        }

    def inputs(self) -> dict[str, Tensor]:
        """Arguments of forward in float64 (rotary angles float32, masks bool); absent ones are left out."""
        out: dict[str, Tensor | None] = {"x": draw((self.batch, self.n, self.dim), self.values, self.seed)}
        out["mask"] = draw_mask(self.batch, self.n, self.mask, self.seed)
        if self.context is not None:
            shape = (self.batch, self.context, self.dim_context or self.dim)
            out["context"] = draw(shape, self.values, self.seed + 3)
            out["context_mask"] = draw_mask(self.batch, self.context, self.mask, self.seed + 4)
        if self.rotary:
            out["rotary_emb"] = 10 * torch.randn(self.n, self.dim_head, generator=generator(self.seed + 5))
        return {name: t for name, t in out.items() if t is not None}


SEEDS = st.integers(0, 2**20)
SOLVER_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "straight_through": st.booleans(),
        "n_iters": st.integers(1, 20),
        "fetch_k_ratio": st.sampled_from((1.0, 9 / 8, 1.5)),
        "eps": st.sampled_from((0.03, 0.1, 1.0)),
        "eps_init": st.sampled_from((0.01, 1.0, 4.0)),
        "eps_decay": st.sampled_from((0.5, 0.7, 1.0)),
        "solver": st.sampled_from(("iterative", "exact")),
        "cosine_sim_routing": st.booleans(),
        "cosine_sim_scale": st.sampled_from((1.0, 8.0)),
    },
)


@st.composite
def lengths_and_slots(draw_: Any) -> tuple[int, int]:
    """N and K on every side of N <= K and of K < N <= K * 9/8."""
    n = draw_(st.sampled_from(LENGTHS))
    k = draw_(st.sampled_from(sorted({1, max(1, n // 4), max(1, n // 2), max(1, n - 1), n, n + 1, 2 * n})))
    return n, k


@st.composite
def router_cases(draw_: Any, *, blocks: bool = True, values: tuple[str, ...] = VALUES) -> RouterCase:
    n, k = draw_(lengths_and_slots())
    options = dict(draw_(SOLVER_OPTIONS))
    if blocks and draw_(st.booleans()):
        options["route_block_size"] = draw_(st.integers(1, n + 2))
    return RouterCase(
        batch=draw_(st.integers(1, 3)),
        n=n,
        dim=draw_(st.sampled_from((1, 8, 13))),
        experts=draw_(st.integers(1, 3)),
        k=k,
        values=draw_(st.sampled_from(values)),
        mask=draw_(st.sampled_from(MASKS)),
        layout=draw_(st.sampled_from(LAYOUTS)),
        tokens_per_item=draw_(st.booleans()),
        options=options,
        seed=draw_(SEEDS),
    )


@st.composite
def layer_cases(draw_: Any, *, local: bool | None = None, values: tuple[str, ...] = VALUES) -> LayerCase:
    """local: with, without, or either."""
    n, k_q = draw_(lengths_and_slots())
    k_kv = draw_(st.sampled_from(sorted({1, 2, max(1, n // 3), max(1, n - 1), n + 1})))
    with_local = draw_(st.booleans()) if local is None else local
    cross = not with_local and draw_(st.booleans())
    case = LayerCase(
        batch=draw_(st.integers(1, 3)),
        n=n,
        dim=draw_(st.sampled_from((4, 16, 19))),
        experts=draw_(st.integers(1, 3)),
        heads=draw_(st.integers(1, 3)),
        dim_head=draw_(st.sampled_from((2, 8, 10))),
        k_q=k_q,
        k_kv=k_kv,
        rotary=draw_(st.booleans()) and not cross,
        prenorm=draw_(st.booleans()),
        average=draw_(st.booleans()),
        values=draw_(st.sampled_from(values)),
        mask=draw_(st.sampled_from(MASKS)),
        layout=draw_(st.sampled_from(LAYOUTS)),
        cotangent=draw_(st.sampled_from(COTANGENTS)),
        options=dict(draw_(SOLVER_OPTIONS)),
        seed=draw_(SEEDS),
    )
    if with_local:
        return replace(case, window=draw_(st.sampled_from((1, 2, 5, 31, 32, 33, n, n + 5))))
    if cross:
        return replace(
            case, context=draw_(st.sampled_from((1, 5, 16, 33))), dim_context=draw_(st.sampled_from((None, 6)))
        )
    return case
