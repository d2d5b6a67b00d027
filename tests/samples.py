"""Arguments for every operator of `optimized.ops`, by name: one function for each forward operator, whose declaration
gives those of its backward. Shared by the tests of what all operators must stand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from strategies import draw, draw_mask, generator, lay_out
from torch import Tensor

from optimized import ops
from optimized.ops.operator import OPERATORS, Operator

HEADS, DIM_HEAD, DIM = 2, 4, 5


@dataclass(frozen=True)
class Sample:
    """What arguments are to be like. masked: with masks, lengths and the like.

    triton: who computes; by default Triton what is masked, and PyTorch the rest. variant: one of VARIANTS. seed: of
    the values. n = 0 and batch = 0 are legal in the layer, and so here.
    """

    dtype: torch.dtype = torch.float64
    masked: bool = False
    layout: str = "contiguous"
    batch: int = 2
    n: int = 6
    experts: int = 3
    variant: str = ""
    seed: int = 0
    triton: bool | None = None

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def by_triton(self) -> bool:
        return self.masked if self.triton is None else self.triton

    @property
    def rows(self) -> int:
        return self.batch * self.experts

    def floats(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """In the layout."""
        return lay_out(draw(shape, "normal", 100 * self.seed + seed).to(dtype or self.dtype), self.layout)

    def integers(self, most: int, *shape: int, seed: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(most, shape, generator=generator(100 * self.seed + seed), dtype=dtype)

    def token_mask(self) -> Tensor | None:
        if not self.masked:
            return None
        mask = draw_mask(self.batch, self.n, "random", 5 + self.seed)
        return mask.T.contiguous().T if self.layout != "contiguous" else mask

    def lengths(self, most: int) -> Tensor | None:
        return self.integers(most + 1, self.rows, seed=8, dtype=torch.int32) if self.masked else None

    def routing(self) -> dict[str, Tensor]:
        """indices and slots (B, E, K), inverse (B, E, N)."""
        k = min(4, self.n)
        order = torch.rand(self.batch, self.experts, self.n, generator=generator(20 + self.seed)).argsort(-1)
        indices = order[..., :k].contiguous()
        slots = torch.ones_like(indices, dtype=torch.bool)
        if self.masked:
            slots = torch.rand(indices.shape, generator=generator(9 + self.seed)) < 0.6
        found = {"indices": indices, "slots": slots, "inverse": ops.inverse_map(indices, slots, self.n)}
        if self.layout != "contiguous":
            found = {name: t.mT.contiguous().mT for name, t in found.items()}
        return found

    def routing_tokens(self, seed: int) -> Tensor:
        """Of every item its own if masked."""
        return self.floats(*((self.batch, self.experts) if self.masked else (self.experts,)), DIM, seed=seed)


EPSILONS = {"eps": 0.1, "eps_init": 4.0, "eps_decay": 0.7}


def solver(s: Sample) -> dict[str, Any]:
    """Exact, with soft scores, if masked; iterative, straight-through, if not."""
    return {
        "ratio": 1.125,
        "straight_through": not s.masked,
        "solver": "exact" if s.masked else "iterative",
        "n_iters": 6,
        **EPSILONS,
    }


def router_logits(s: Sample) -> dict[str, Any]:
    return {"x": s.floats(s.batch, s.n, DIM), "tokens": s.routing_tokens(1), "mask": s.token_mask(), "scale": 8.0}


def pick(s: Sample) -> dict[str, Any]:
    logits = s.floats(s.batch, s.experts, s.n)
    return {"logits": logits, "keys": None, "mask": s.token_mask(), "k": 3, "block": None, **solver(s)}


def select(s: Sample) -> dict[str, Any]:
    return {"logits": s.floats(s.batch, s.experts, s.n), "mask": s.token_mask(), "k": min(4, s.n)}


def coordinate_descent(s: Sample) -> dict[str, Any]:
    given = {"logits": s.floats(s.batch, s.experts, s.n), "mask": s.token_mask()}
    return {**given, "k": 3.375, "n_iters": 6, **EPSILONS}


def capped_simplex(s: Sample) -> dict[str, Any]:
    return {"logits": s.floats(s.batch, s.experts, s.n), "mask": s.token_mask(), "k": 3.375, "eps": 0.5}


def gather_norm(s: Sample) -> dict[str, Any]:
    return {"x": s.floats(s.batch, s.n, DIM), "gamma": s.floats(s.experts, DIM, seed=1)[..., None], **s.routing()}


def layer_norm(s: Sample) -> dict[str, Any]:
    weight, bias = (s.floats(2, DIM, seed=1 + i)[1] for i in range(2))
    return {"x": s.floats(s.batch, s.n, DIM), "weight": weight, "bias": bias, "mask": s.token_mask(), "eps": 1e-5}


def routed_rows(s: Sample) -> dict[str, Any]:
    given: dict[str, Any] = {"x": s.floats(s.batch, s.n, DIM)}
    for i, side in enumerate(("q", "kv")):
        given[f"{side}_tokens"] = s.routing_tokens(1 + i)
        given[f"{side}_gamma"] = s.floats(s.experts, DIM, seed=3 + i)[..., None]
    return {**given, "mask": s.token_mask(), "k_q": 3, "k_kv": 2, "block": None, "scale": 8.0, **solver(s)}


def taken_rows(s: Sample) -> dict[str, Any]:
    x, found = s.floats(s.batch, s.n, DIM), {}
    for i, side in enumerate(("q", "kv")):
        found[f"{side}_gamma"] = s.floats(s.experts, DIM, seed=3 + i)[..., None]
        found |= {f"{side}_{name}": t for name, t in s.routing().items()}
    return {"x": x, "norms": torch.linalg.vector_norm(x.to(s.wide), dim=-1), **found}


def combine(s: Sample) -> dict[str, Any]:
    routing = s.routing()
    k = routing["indices"].shape[-1]
    return {
        "y": s.floats(s.experts, s.batch, k, DIM),
        "scores": draw((s.batch, s.experts, k), "normal", 100 * s.seed + 1).to(s.wide),
        **routing,
        "local": s.floats(s.batch, s.n, DIM, seed=2) if s.masked else None,
        "null": None if s.masked else null_of(s),
        "mask": s.token_mask(),
        "average": s.masked,
        "dtype": torch.bfloat16 if s.dtype == torch.float32 else s.dtype,  # of the result, as under autocast
    }


def null_of(s: Sample) -> Tensor:
    return draw((DIM,), "normal", 100 * s.seed + 3).to(s.dtype)


def tables(s: Sample, seed: int) -> dict[str, Tensor]:
    angles = draw((7, DIM_HEAD), "normal", seed)
    return {"cos": angles.cos().to(s.wide), "sin": angles.sin().to(s.wide)}


def rotary(s: Sample) -> dict[str, Any]:
    t = s.floats(s.rows, s.n, 3, DIM_HEAD)
    return {"t": t, **tables(s, 3), "positions": s.integers(7, s.rows, s.n, seed=4), "transposed": False}


def attention(s: Sample) -> dict[str, Any]:
    given: dict[str, Any] = {name: s.floats(s.rows, s.n, HEADS, DIM_HEAD, seed=i) for i, name in enumerate("qkv")}
    given |= {f"null_{name}": s.floats(s.experts, HEADS, DIM_HEAD, seed=3 + i) for i, name in enumerate("kv")}
    options = {"dropout": 0.0, "window": -1, "causal": False, "backend": "math"}
    return {**given, "lengths": s.lengths(s.n), "mask": None, **options}


def expert_attention(s: Sample) -> dict[str, Any]:
    """With rotation and lengths if masked."""
    batch, experts, n, inner = s.batch, s.experts, s.n, HEADS * DIM_HEAD
    positions = s.integers(7, s.rows, n, seed=7)
    angles = {**tables(s, 6), "q_positions": positions, "k_positions": positions.flip(-1)}
    return {
        "queries": s.floats(experts, batch, n, DIM),
        "keys_values": s.floats(experts, batch, n, 6, seed=1),
        "scores": draw((batch, experts, n), "normal", 100 * s.seed + 5).to(s.wide),
        "w_q": s.floats(experts * inner, DIM, 1, seed=2),
        "w_kv": s.floats(experts * 2 * inner, 6, 1, seed=3),
        "w_out": s.floats(experts * DIM, inner, 1, seed=4),
        "null_kv": s.floats(2, experts, HEADS, 1, DIM_HEAD, seed=9),
        "lengths": s.lengths(n),
        **(angles if s.masked else dict.fromkeys(angles)),
        "dropout": 0.0,
        "unit_scores": False,
        "backend": "math",
    }


def mixture(s: Sample) -> dict[str, Any]:
    """With rotation, and without a null token, if masked."""
    inner = HEADS * DIM_HEAD
    weights = {
        "w_q": s.floats(s.experts * inner, DIM, 1, seed=5),
        "w_kv": s.floats(s.experts * 2 * inner, DIM, 1, seed=6),
        "w_out": s.floats(s.experts * DIM, inner, 1, seed=7),
        "null_kv": s.floats(2, s.experts, HEADS, 1, DIM_HEAD, seed=8),
        "null": None if s.masked else null_of(s),
    }
    angles = tables(s, 6) if s.masked else {"cos": None, "sin": None}
    how = {"dropout": 0.0, "average": s.masked, "backend": "math"}
    return {**routed_rows(s), **weights, **angles, **how, "triton_combines": s.by_triton}


def window(s: Sample) -> dict[str, Any]:
    """By a library that has windows; by one that takes a mask, if masked."""
    options = {"window": 2, "causal": s.masked, "backend": "banded_math" if s.masked else "math"}
    return {"qkv": s.floats(s.batch, s.n, 3, HEADS, DIM_HEAD), "mask": s.token_mask(), **options}


def window_attention(s: Sample) -> dict[str, Any]:
    weights = {"w_qkv": s.floats(24, DIM, seed=1), "w_out": s.floats(DIM, 8, seed=2)}
    given = window(s)
    del given["qkv"]
    return {"x": s.floats(s.batch, s.n, DIM), **weights, "heads": HEADS, **given}


def triples(s: Sample) -> Tensor | None:
    """Of columns, three for a token, of which the last may be masked."""
    mask = s.token_mask()
    if mask is None:
        return None
    return torch.stack((torch.ones_like(mask), torch.ones_like(mask), mask), -1).flatten(1)


def candidates(s: Sample) -> dict[str, Any]:
    first = draw((s.batch, s.experts), "normal", 100 * s.seed + 6).to(s.wide)
    given = {"logits": s.floats(s.batch, s.experts, 3 * s.n, dtype=s.wide), "valid": triples(s), "first": first}
    return {**given, "kq": 2, "capacity": 2, "block": 3}


def memory(s: Sample) -> dict[str, Any]:
    logits = s.floats(s.batch, s.experts, 3 * s.n + 2, dtype=s.wide)
    valid = None if not s.masked else torch.nn.functional.pad(triples(s), (2, 0), value=True)
    return {"logits": logits, "valid": valid, "k": 3, "block": 3, "prior": 2}


def memory_attention(s: Sample) -> dict[str, Any]:
    """Of blocks of three columns, half as many as tokens."""
    blocks = (s.n + 1) // 2
    remembered = memory(replace(s, n=blocks))
    indices, counts = ops.memory(*(remembered[name] for name in ("logits", "valid", "k", "block", "prior")), False)
    shape = (s.experts, s.batch, blocks, 2, HEADS, DIM_HEAD)
    return {
        "q": s.floats(*shape, seed=1),
        "kv": s.floats(s.experts, s.batch, 3 * blocks + 2, 2, HEADS, DIM_HEAD, seed=2),
        "scores": s.floats(s.batch, s.experts, 3 * blocks + 2, seed=3, dtype=s.wide),
        "null_kv": s.floats(2, s.experts, HEADS, 1, DIM_HEAD, seed=4),
        "indices": indices,
        "counts": counts,
        "q_counts": s.integers(3, *counts.shape, seed=5, dtype=torch.int32),
        "dropout": 0.0,
    }


def memory_experts(s: Sample) -> dict[str, Any]:
    """Of blocks of two columns, as many as fit; from the second on both have a slot."""
    n = 2 * ((s.n + 1) // 2)
    blocks = max(n // 2 - 1, 0)
    logits = s.floats(s.batch, s.experts, n, dtype=s.wide)
    indices, counts = (t[:, :, 1:] for t in ops.memory(logits, None, 3, 2, 0, False))
    places = torch.arange(2, 2 + 2 * blocks).view(blocks, 2).expand(s.batch, s.experts, -1, -1)
    inverse = (torch.arange(n) - 2).clamp_min(-1).int()
    gammas = {"q_gamma": s.floats(s.experts, DIM, 1, seed=1), "kv_gamma": s.floats(s.experts, DIM, 1, seed=2)}
    weights = {"w_q": (8, DIM), "w_kv": (16, DIM), "w_out": (DIM, 8)}
    return {
        "x": s.floats(s.batch, n, DIM),
        **gammas,
        **{name: s.floats(s.experts * a, b, 1, seed=3 + i) for i, (name, (a, b)) in enumerate(weights.items())},
        "null_kv": s.floats(2, s.experts, HEADS, 1, DIM_HEAD, seed=6),
        "scores": s.floats(s.batch, s.experts, n, seed=7, dtype=s.wide),
        "places": places.contiguous(),
        "slots": torch.ones(places.shape, dtype=torch.bool),
        "inverse": inverse.expand(s.batch, s.experts, -1).contiguous(),
        "indices": indices.contiguous(),
        "counts": counts.contiguous(),
        "q_counts": torch.full_like(counts, 2),
        "block": 2,
        "prior": 2,
        "dropout": 0.0,
    }


def blend(s: Sample) -> dict[str, Any]:
    """After a cache, averaged, if masked."""
    given = combine(s)
    return {
        **{name: given[name] for name in ("y", "scores", "indices", "slots", "inverse", "dtype")},
        "local": s.floats(s.batch, s.n, DIM, seed=2),
        "null": s.floats(s.experts, DIM, seed=3),
        "begin": s.integers(4, s.batch, seed=4) + 2 if s.masked else None,
        "width": 2 if s.masked else 0,  # what has a slot stands behind
        "average": s.masked,
    }


def causal_window(s: Sample) -> dict[str, Any]:
    """Rotated before, if masked."""
    given = window(s)
    del given["causal"]
    return {**given, "turned": s.masked}


def gathered(s: Sample) -> dict[str, Any]:
    """Of three blocks, of which none sees a row twice."""
    order = torch.rand(s.batch, s.experts, 3, s.n, generator=generator(20 + s.seed)).argsort(-1)
    counts = s.integers(min(4, s.n) + 1, s.batch, s.experts, 3, seed=8, dtype=torch.int32)
    return {"t": s.floats(s.experts, s.batch, s.n, DIM), "indices": order[..., :4].int(), "counts": counts}


SAMPLES: dict[str, Callable[[Sample], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        blend, causal_window, gathered, router_logits, pick, select, coordinate_descent, capped_simplex, gather_norm,
        routed_rows, combine, rotary, attention, expert_attention, mixture, window, window_attention, layer_norm,
        candidates, memory, memory_attention, memory_experts, taken_rows,
    )
}  # fmt: skip

# Branches that the samples above do not take, by name: other arguments, constants or made of the sample.
NO_NORM = {"q_gamma": None, "kv_gamma": None}
MORE_KEYS = {  # than queries
    **{name: lambda s, i=i: s.floats(s.rows, s.n + 3, HEADS, DIM_HEAD, seed=i) for i, name in ((1, "k"), (2, "v"))},
    "lengths": lambda s: s.lengths(s.n + 3),
}
OTHER = {"straight_through": lambda s: s.masked}  # as of `solver`, or soft
SIGMOID: dict[str, dict[str, Any]] = {
    "sigmoid": {"solver": "sigmoid"},
    "sigmoid_other": {"solver": "sigmoid", **OTHER},
}
BLOCKS = {"block": 4}  # of six tokens: one gives two of four, the other both
WINDOWS: dict[str, dict[str, Any]] = {
    "causal": {"causal": lambda s: not s.masked},
    "beyond": {"window": 9},
    "kernel": {"backend": "triton"},
    "kernel_causal": {"backend": "triton", "causal": lambda s: not s.masked},
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "router_logits": {"product": {"scale": None}},
    "pick": {
        "other": OTHER,
        "other_solver": {"solver": lambda s: "iterative" if s.masked else "exact"},
        "blocks": BLOCKS,
        "blocks_soft": {**BLOCKS, "straight_through": False, "solver": "iterative"},
        "keys": {"keys": lambda s: s.floats(s.batch, s.experts, s.n, seed=7)},
        "exact_straight": {"straight_through": True, "solver": "exact"},
        "takes_all": {"k": 6},
        "more_slots": {"k": 9, "straight_through": False},
        **SIGMOID,
        "sigmoid_blocks": {**BLOCKS, "solver": "sigmoid"},
        "sigmoid_takes_all": {"k": 9, "solver": "sigmoid"},
    },
    "coordinate_descent": {"one_step": {"n_iters": 1}},
    "gather_norm": {"no_norm": {"gamma": None}},
    "layer_norm": {"no_bias": {"bias": None}},
    "routed_rows": {
        "other": OTHER,
        "other_solver": {"solver": lambda s: "iterative" if s.masked else "exact"},
        "blocks": BLOCKS,
        "blocks_soft": {**BLOCKS, "straight_through": False, "solver": "iterative"},
        "exact_straight": {"straight_through": True, "solver": "exact"},
        "product": {"scale": None, **NO_NORM},
        "tokens_of_one_side_per_item": {"kv_tokens": lambda s: s.floats(s.batch, s.experts, DIM, seed=2)},
        "all_queries": {"k_q": 6},
        "takes_all": {"k_q": 9, "k_kv": 6},
        **SIGMOID,
        "sigmoid_blocks": {**BLOCKS, "solver": "sigmoid"},
        "sigmoid_all_queries": {"k_q": 6, "solver": "sigmoid"},
    },
    "blend": {
        "first_block": {
            "width": 3,
            "slots": lambda s: torch.zeros_like(s.routing()["slots"]),
            "inverse": lambda s: torch.full_like(s.routing()["inverse"], -1),
        },
    },
    "causal_window": {"kernel": {"backend": "triton"}, "beyond": {"window": 9}},
    "mixture": {
        "other": OTHER,
        "dropout": {"dropout": 0.3},
        "product": {"scale": None, **NO_NORM},
        "takes_all": {"k_q": 9, "k_kv": 6},
        **SIGMOID,
    },
    "combine": {
        "alone": {"local": None, "null": None},
        "average_null": {"local": None, "null": null_of, "average": True},
    },
    "rotary": {"in_order": {"positions": None}, "transposed": {"transposed": True}},
    "attention": {
        "dropout": {"dropout": 0.3},
        "no_null": {"null_k": None, "null_v": None},
        "no_null_dropout": {"null_k": None, "null_v": None, "dropout": 0.3},
        "more_keys": {**MORE_KEYS, "dropout": 0.3},
        "window": {"window": 2},
        "causal": {"window": 2, "causal": True},
        "mask": {"mask": lambda s: torch.rand(s.rows, s.n, s.n, generator=generator(3)) < 0.7},
    },
    "expert_attention": {
        "dropout": {"dropout": 0.3},
        "more_keys": {
            "dropout": 0.3,
            "keys_values": lambda s: s.floats(s.experts, s.batch, s.n + 3, 6, seed=1),
            "scores": lambda s: draw((s.batch, s.experts, s.n + 3), "normal", 100 * s.seed + 5).to(s.wide),
            "lengths": lambda s: s.lengths(s.n + 3),
            "k_positions": lambda s: s.integers(7, s.rows, s.n + 3, seed=8) if s.masked else None,
        },
        "unit": {"unit_scores": True, "scores": lambda s: torch.ones(s.batch, s.experts, s.n, dtype=s.wide)},
    },
    "memory_attention": {"dropout": {"dropout": 0.3}},
    "memory_experts": {"dropout": {"dropout": 0.3}, "no_norm": NO_NORM},
    "window": WINDOWS,
    "window_attention": WINDOWS,
}


def forward_of(name: str) -> str:
    return name.removesuffix("_backward")


def named_arguments(name: str, sample: Sample, device: torch.device, **changes: Any) -> dict[str, Any]:
    """Of a forward operator, on the device in the strides that they have."""
    changes = {"triton": sample.by_triton} | VARIANTS.get(name, {}).get(sample.variant, {}) | changes
    changes = {key: value(sample) if callable(value) else value for key, value in changes.items()}
    return {key: to(device, value) for key, value in (SAMPLES[name](sample) | changes).items()}


def run(operator: Operator, named: dict[str, Any]) -> dict[str, Tensor]:
    """Results by name; what is drawn is drawn alike."""
    torch.manual_seed(0)
    out = operator.op(*(named[key] for key in operator.names))
    return dict(zip(operator.results, out if isinstance(out, tuple) else (out,)))


def backward_arguments(operator: Operator, named: dict[str, Any], sample: Sample) -> dict[str, Any]:
    """Of its backward: cotangents in the sample's layout, what a run of the forward saved, and all possible needs."""
    found = named | run(operator, {k: v.detach() if isinstance(v, Tensor) else v for k, v in named.items()})
    arguments: dict[str, Any] = {
        f"d_{key}": to(found[key].device, sample.floats(*found[key].shape, seed=40 + i, dtype=found[key].dtype))
        for i, key in enumerate(operator.gradients_of)
    }
    arguments |= {key: found[key] for key in (*operator.saves, *operator.constants)}
    arguments["needs"] = sum(1 << i for i, key in enumerate(operator.wrt) if named[key] is not None)
    return arguments


def arguments_of(name: str, sample: Sample, device: torch.device) -> tuple[Any, ...]:
    """By position; of forward operators and of backward ones."""
    operator = OPERATORS[forward_of(name)]
    named = named_arguments(operator.name, sample, device)
    if name != operator.name:  # whoever ran forward, and PyTorch needs no interpreter to
        saved = backward_arguments(
            operator, named_arguments(operator.name, replace(sample, triton=False), device), sample
        )
        named = saved | {key: value for key, value in named.items() if key.startswith("triton")}
    return tuple(named[key] for key in OPERATORS[name].names)


def to(device: torch.device, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.device == device:
        return value
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return moved.copy_(value)
