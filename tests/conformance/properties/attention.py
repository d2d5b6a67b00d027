"""Routed attention of one expert and of several, against the reference."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.conformance.data import EITHER, cases, graded, planted, share_keys_and_values, tensors
from tests.conformance.registry import checked_on
from tests.conformance.subject import Subject, assert_equals_reference, assert_unchanged, call
from tests.strategies import LayerCase, draw, generator

ATTENTION = ("x", "attn.null_kv", "attn.to_q.weight", "attn.to_kv.weight", "attn.to_out.weight")
NORMS = ("attn.norm.gamma", "attn.context_norm.gamma")


@checked_on(cases(queries=EITHER, key_values=EITHER))
def one_expert_equals_the_reference(subject: Subject, case: LayerCase) -> None:
    """Output of one expert without norms, over all tokens or the K picked ones."""
    state, inputs, _ = planted(case)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(cases(queries=EITHER, key_values=EITHER, prenorm=True))
def norms_have_unit_rms(subject: Subject, case: LayerCase) -> None:
    """With `prenorm`, queries and context are each divided by their root mean square, then scaled by gamma."""
    state, inputs, _ = planted(case)
    assert_equals_reference(subject, case, state, inputs, gradients_of=NORMS)


@checked_on(cases(queries=False, key_values=False))
def gradients_of_attention(subject: Subject, case: LayerCase) -> None:
    """Gradients of x and of every parameter of routed attention, with nothing to choose."""
    state, inputs = tensors(case)
    assert_equals_reference(subject, case, state, inputs, gradients_of=ATTENTION)


@checked_on(cases(queries=False, key_values=False))
def routers_have_no_gradient_without_a_choice(subject: Subject, case: LayerCase) -> None:
    """Where N <= K the routing tokens get none, or zeros."""
    state, inputs = tensors(case)
    names = ("query_router.routing_token", "key_value_router.routing_token")
    assert_equals_reference(subject, case, state, inputs, gradients_of=names)


@checked_on(cases(key_values=False, experts=(2, 3)))
def experts_have_their_own_weights(subject: Subject, case: LayerCase) -> None:
    """Queries, null slot and output of every expert are its own. (Keys and values: of all tokens, shared weights.)"""
    state, inputs, _ = planted(case)
    share_keys_and_values(case, state)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(st.integers(1, 5).flatmap(lambda k: cases(experts=(2, 3), k_q=k, k_kv=k, n=3 * k, least=1)))
def experts_read_their_own_tokens(subject: Subject, case: LayerCase) -> None:
    """Tokens that other experts picked as keys and queries have no influence on an expert's output."""
    state, inputs, _ = planted(case)
    k, experts, x = case.k_q, case.experts, inputs["x"]
    order = torch.randperm(case.n, generator=generator(case.seed))
    owned = [order[e * k : (e + 1) * k] for e in range(experts)]
    for side in (0, experts):
        x[..., side : side + experts] = -1.0
        for e, tokens in enumerate(owned):
            x[:, tokens, side + e] = 1.0
    layer = subject.build(case, state)

    def run(t: Tensor) -> Tensor:
        return call(layer, **subject.move({**inputs, "x": t}))

    before = run(x)
    for e, tokens in enumerate(owned):
        changed = x.clone()
        changed[:, tokens, 2 * experts :] = draw((1, k, case.dim - 2 * experts), "normal", case.seed + 1 + e)
        after = run(changed)
        others = torch.cat([t for other, t in enumerate(owned) if other != e])
        what = f"new content of the tokens of expert {e}: the output of other experts"
        assert_unchanged(after[:, others], before[:, others], what)
        assert not torch.equal(after[:, tokens], before[:, tokens]), f"expert {e} does not read its own tokens"


@checked_on(cases(queries=EITHER, key_values=EITHER, rotary=True))
def rotary_positions_are_those_of_the_tokens(subject: Subject, case: LayerCase) -> None:
    """`rotary_emb` rotates queries and keys by the angles of their positions in x, whoever is picked."""
    state, inputs, _ = planted(case)
    assert_equals_reference(subject, case, state, inputs)


CROSS = cases(queries=EITHER, key_values=EITHER, context=True, dim_context=st.sampled_from((None, 6, 10)))


@checked_on(CROSS)
def context_is_attended_to(subject: Subject, case: LayerCase) -> None:
    """Cross-attention: M may differ from N, dim_context from dim; with gradients of x and context."""
    state, inputs, _ = planted(case)
    assert_equals_reference(subject, case, state, inputs, gradients_of=("x", "context", "attn.to_kv.weight"))


@checked_on(cases(options=st.just({"eps": 1.0})))
def gradients_reach_the_routers(subject: Subject, case: LayerCase) -> None:
    """Gradients of both routing tokens and of x, through soft scores below 1."""
    state, inputs = graded(case)
    names = ("x", "query_router.routing_token", "key_value_router.routing_token")
    assert_equals_reference(subject, case, state, inputs, gradients_of=names)
