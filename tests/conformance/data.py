"""Configurations in which one property at a time can fail, and data that leave no doubt about who is routed.

Selection by the K largest logits and by the K largest soft scores agree on all of them: no scores tie where the choice
is made.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import LayerCase, generator

State = dict[str, Tensor]
Inputs = dict[str, Any]
EITHER = st.booleans()


@st.composite
def cases(
    draw: Any,
    *,
    queries: bool | st.SearchStrategy[bool] = True,
    key_values: bool | st.SearchStrategy[bool] = True,
    batch: tuple[int, ...] = (1,),
    experts: tuple[int, ...] = (1,),
    window: str | None = None,
    context: bool = False,
    least: int = 1,
    **fields: Any,
) -> LayerCase:
    """Configurations of these numbers of batch items and experts.

    queries, key_values: whether there is a choice, N >= 2 K; otherwise N <= K. window: None, "single" (N is the
    window), "multiple" (N is a multiple of it) or "ragged" (it is none). least: the smallest K. fields: of LayerCase;
    strategies are drawn. There are no norms unless asked for: a wrong one would show everywhere.
    """
    chosen = {name: draw(v) if isinstance(v, st.SearchStrategy) else v for name, v in fields.items()}
    pick_q = draw(queries) if isinstance(queries, st.SearchStrategy) else queries
    pick_kv = draw(key_values) if isinstance(key_values, st.SearchStrategy) else key_values
    k_q, k_kv = draw(st.integers(least, 8)), draw(st.integers(least, 8))
    longest = max([k for k, pick in ((k_q, pick_q), (k_kv, pick_kv and not context)) if pick], default=0)
    n = 2 * longest + draw(st.integers(0 if longest else 1, 7))
    if window is not None:
        w = n if window == "single" else draw(st.integers(2 if window == "ragged" else 1, 4))
        n = w * math.ceil(n / w) + (draw(st.integers(1, w - 1)) if window == "ragged" else 0)
        chosen["window"] = w
    m = n
    if context:
        m = chosen["context"] = 2 * k_kv * pick_kv + draw(st.integers(0 if pick_kv else 1, 5))
    extra = draw(st.integers(0, 2))
    case = {
        "batch": draw(st.sampled_from(batch)),
        "n": n,
        "dim": draw(st.sampled_from((8, 12))),
        "experts": draw(st.sampled_from(experts)),
        "heads": draw(st.sampled_from((1, 2))),
        "dim_head": draw(st.sampled_from((4, 8))),
        "k_q": k_q if pick_q else n + extra,
        "k_kv": k_kv if pick_kv else m + extra,
        "prenorm": False,
        "seed": draw(st.integers(0, 2**16)),
    }
    return LayerCase(**(case | chosen))


def windows(*kinds: str | None, **fields: Any) -> st.SearchStrategy[LayerCase]:
    return st.one_of(*(cases(window=kind, **fields) for kind in kinds))


def tensors(case: LayerCase) -> tuple[State, Inputs]:
    return case.state(), case.inputs()


def planted(case: LayerCase, *, block: int | None = None) -> tuple[State, Inputs, Tensor]:
    """State and inputs in which expert e picks exactly the K tokens whose logit is 1; all others have about -1.

    Expert e reads its logit in channel e (queries) and E + e (keys and values). Valid tokens are planted first. block:
    as many in each block of so many tokens, all of whose logits are 4 below those of the block before. Also returns
    which tokens are picked as queries, (B, E, N) bool. The null token is 0: `tokens_of_no_expert_become_the_null_token`
    is about it, and nothing else.
    """
    state, inputs = tensors(case)
    if case.window is None:
        state["null_routed_token"].zero_()
    e = case.experts
    sides = (
        ("query_router", "x", "mask", case.k_q, 0),
        ("key_value_router", "x" if case.context is None else "context", "mask", case.k_kv, e),
    )
    picked = torch.zeros(case.batch, e, case.n, dtype=torch.bool)
    for router, tokens, mask, k, first in sides:
        x = inputs[tokens]
        if router == "key_value_router" and case.context is not None:
            mask = "context_mask"
        name = f"{router}.routing_token"
        state[name] = torch.zeros_like(state[name])
        for i in range(e):
            state[name][i, first + i] = 1.0
        valid = inputs.get(mask, torch.ones(x.shape[:2], dtype=torch.bool))
        width = block or max(x.shape[1], 1)
        each = math.ceil(k / math.ceil(x.shape[1] / width))
        order = torch.rand(case.batch, e, x.shape[1], generator=generator(case.seed + 20 + first))
        order = order.masked_fill(~valid[:, None], 2.0)
        best = torch.zeros_like(order, dtype=torch.bool)
        for start in range(0, x.shape[1], width):
            part = order[..., start : start + width].argsort(dim=-1)[..., :each] + start
            best.scatter_(-1, part, True)
        logits = torch.where(best, 1.0, -1.0 + 0.1 * order) - 4.0 * (torch.arange(x.shape[1]) // width)
        x[..., first : first + e] = logits.transpose(1, 2)
        if router == "query_router":
            picked = best
    return state, inputs, picked


def graded(case: LayerCase, *, unit: bool = False) -> tuple[State, Inputs]:
    """State and inputs whose logits are distinct and evenly spread over [-0.5, 0.5].

    With the option eps = 1 and N >= 2 K every soft score stays below 1, away from the kinks of the solver. One expert;
    unit: tokens of norm 1, so that the cosine is the same. The null token is 0.
    """
    assert case.experts == 1
    state, inputs = tensors(case)
    state["null_routed_token"].zero_()
    x = inputs["x"]
    for router, channel in (("query_router", 0), ("key_value_router", 1)):
        name = f"{router}.routing_token"
        state[name] = torch.zeros_like(state[name])
        state[name][0, channel] = 1.0
        order = torch.rand(case.batch, case.n, generator=generator(case.seed + 20 + channel)).argsort(-1).argsort(-1)
        x[..., channel] = (order / max(case.n - 1, 1)).double() - 0.5
    if unit:
        rest = (1 - x[..., :2].square().sum(-1, keepdim=True)).sqrt()
        x[..., 2:] *= rest / x[..., 2:].norm(dim=-1, keepdim=True)
    return state, inputs


def silence_experts(state: State) -> None:
    """The output is that of local attention."""
    state["attn.to_out.weight"].zero_()


def average_the_window(state: State) -> None:
    """Local attention without queries: every visible key weighs the same, wherever it stands."""
    q = state["local_attn.to_qkv.weight"].shape[0] // 3
    state["local_attn.to_qkv.weight"][:q] = 0.0


def share_keys_and_values(case: LayerCase, state: State) -> None:
    """Keys are values, the same for every expert: what belongs to an expert is its queries, null slot and output."""
    one = state["attn.to_kv.weight"][: case.heads * case.dim_head]
    state["attn.to_kv.weight"] = one.repeat(2 * case.experts, 1, 1)


def share_experts(case: LayerCase, state: State) -> None:
    """All experts compute the same, with keys that are values: what counts is how many there are."""
    share_keys_and_values(case, state)
    state["attn.null_kv"][:] = state["attn.null_kv"][:, :1].clone()
    for name in ("attn.to_q.weight", "attn.to_out.weight"):
        one = state[name][: state[name].shape[0] // case.experts]
        state[name] = one.repeat(case.experts, 1, 1)
