"""Configurations in which one property at a time can fail, and tokens that leave no doubt about who is routed.

No two logits are close, so that another order of summation picks the same tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.conformance.causal.case import CausalCase
from tests.conformance.data import Inputs, State
from tests.strategies import draw as drawn
from tests.strategies import generator


@st.composite
def cases(
    draw: Any,
    *,
    everybody: bool | st.SearchStrategy[bool] = False,
    remember_all: bool | st.SearchStrategy[bool] = False,
    blocks: tuple[int, int] = (1, 3),
    batch: tuple[int, ...] = (1,),
    experts: tuple[int, ...] = (1,),
    cut: bool = False,
    pieces: bool = False,
    **fields: Any,
) -> CausalCase:
    """More than a block of tokens unless `blocks` says so.

    everybody: every token is a query (Kq >= W), else 2 <= Kq <= W - 2, and fewer candidates than there is room for.
    remember_all: K >= N, else K < W. blocks: how many are full; the last token is in one more. cut, pieces: whether to
    draw them. fields: of `CausalCase`; strategies are drawn. There are no norms unless asked for.
    """
    chosen = {name: draw(v) if isinstance(v, st.SearchStrategy) else v for name, v in fields.items()}
    everyone = draw(everybody) if isinstance(everybody, st.SearchStrategy) else everybody
    unlimited = draw(remember_all) if isinstance(remember_all, st.SearchStrategy) else remember_all
    width = draw(st.integers(2, 4) if everyone else st.integers(4, 5))
    n = width * draw(st.integers(*blocks)) + draw(st.integers(1, width))
    extra = draw(st.integers(0, 1))
    case: dict[str, Any] = {
        "batch": draw(st.sampled_from(batch)),
        "n": n,
        "dim": draw(st.sampled_from((8, 12))),
        "experts": draw(st.sampled_from(experts)),
        "heads": draw(st.sampled_from((1, 2))),
        "dim_head": draw(st.sampled_from((4, 8))),
        "k_q": width + extra if everyone else draw(st.integers(2, width - 2)),
        "k_kv": n + extra if unlimited else draw(st.integers(1, width - 1)),
        "window": draw(st.integers(1, width + 1)),
        "block": width,
        "prenorm": False,
        "seed": draw(st.integers(0, 2**16)),
    }
    if cut:
        case["cut"] = draw(st.integers(1, n - 1))
    if pieces:
        ends = draw(st.lists(st.integers(0, n), min_size=1, max_size=5).map(sorted))
        case["pieces"] = tuple(b - a for a, b in zip([0, *ends], [*ends, n]))
    return CausalCase(**(case | chosen))


def planted(case: CausalCase, *, rise: int | None = None) -> tuple[State, Inputs]:
    """State and inputs; tokens have norm sqrt(D), and expert e its logits in channels e (queries) and E + e (memory).

    Key/value logits are evenly spread, in random order. Query logits of every block are W levels in random order, a
    level higher or lower than those of the block before, or `rise` levels higher: so many tokens more or fewer than Kq
    reach the threshold.
    """
    state, inputs = case.state(), case.inputs()
    x, experts, width = inputs["x"], case.experts, case.block
    g = generator(case.seed + 20)
    blocks = math.ceil(case.n / width)
    for router, first in (("query_router", 0), ("key_value_router", experts)):
        name = f"{router}.routing_token"
        state[name] = torch.zeros_like(state[name])
        for e in range(experts):
            state[name][e, first + e] = 1.0
    shape = case.batch, experts, blocks
    rank = torch.rand(*shape, width, generator=g).argsort(-1).double()
    steps = torch.randint(0, 2, shape, generator=g) * 2 - 1 if rise is None else torch.full(shape, rise)
    level = rank + (steps.cumsum(-1) + torch.rand(shape, generator=g, dtype=torch.float64) / 2)[..., None]
    middle, most = (width / 2, width / 2 + blocks) if rise is None else ((width + rise * blocks) / 2,) * 2
    queries = ((level - middle) / most).flatten(2)[..., : case.n]
    order = torch.rand(case.batch, experts, case.n, generator=g).argsort(-1).double()
    channels = torch.cat((queries, 2 * order / max(case.n - 1, 1) - 1), 1).transpose(1, 2)
    # Routers read these; what they do not read makes up the norm.
    x[..., : 2 * experts] = 0.9 * channels
    rest = (case.dim - x[..., : 2 * experts].square().sum(-1, keepdim=True)).sqrt()
    x[..., 2 * experts :] *= rest / x[..., 2 * experts :].norm(dim=-1, keepdim=True)
    return state, inputs


def flipped(case: CausalCase, x: Tensor, token: int) -> Tensor:
    """Another content of a token: the same for the routers, norm included."""
    x = x.clone()
    x[:, token, 2 * case.experts :] *= -1
    return x


def silence_experts(state: State) -> None:
    """The output is that of local attention."""
    state["attn.to_out.weight"].zero_()
    state["null_tokens"].zero_()


def silence_local(state: State) -> None:
    """The output is that of the experts, and 0 for tokens that they leave."""
    state["local_attn.to_out.weight"].zero_()
    state["null_tokens"].zero_()


def alone(case: CausalCase, state: State, expert: int) -> None:
    """The output is that of one expert."""
    silence_local(state)
    rows = state["attn.to_out.weight"].unflatten(0, (case.experts, case.dim))
    rows[[e for e in range(case.experts) if e != expert]] = 0.0


def noise(case: CausalCase, shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return drawn(shape, "normal", case.seed + 40 + seed)
