"""Routed attention against the reference: every token is a query, and everything before its block is remembered."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tests.conformance.causal.case import CausalCase
from tests.conformance.causal.data import cases, planted, silence_local
from tests.conformance.causal.subject import CausalSubject, checked_on
from tests.conformance.data import EITHER, average_the_window, share_keys_and_values
from tests.conformance.subject import assert_equals_reference, assert_unchanged, call

ALL = {"everybody": True, "remember_all": True}
ROUTERS = ("query_router.routing_token", "key_value_router.routing_token")
ATTENTION = ("x", "attn.null_kv", "attn.to_q.weight", "attn.to_kv.weight", "attn.to_out.weight")


@checked_on(cases(**ALL), "state_dict")
def an_expert_attends_over_the_blocks_before(subject: CausalSubject, case: CausalCase) -> None:
    """Output of one expert without norms, whose queries see all earlier blocks and a null key, times both scores."""
    state, inputs = planted(case)
    silence_local(state)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(cases(prenorm=True, **ALL), "state_dict")
def norms_have_unit_rms(subject: CausalSubject, case: CausalCase) -> None:
    """With `prenorm`, queries and keys are each divided by their root mean square, then scaled by gamma."""
    state, inputs = planted(case)
    silence_local(state)
    names = ("attn.norm.gamma", "attn.context_norm.gamma")
    assert_equals_reference(subject, case, state, inputs, gradients_of=names)


@checked_on(cases(**ALL), "state_dict")
def gradients_of_attention(subject: CausalSubject, case: CausalCase) -> None:
    """Gradients of x and of every parameter of routed attention."""
    state, inputs = planted(case)
    silence_local(state)
    assert_equals_reference(subject, case, state, inputs, gradients_of=ATTENTION)


@checked_on(cases(**ALL), "state_dict")
def gradients_reach_the_routers(subject: CausalSubject, case: CausalCase) -> None:
    """Every token that is routed has a gradient through its score, where there is nothing to choose too."""
    state, inputs = planted(case)
    silence_local(state)
    assert_equals_reference(subject, case, state, inputs, gradients_of=ROUTERS)


@checked_on(cases(experts=(2,), **ALL), "state_dict")
def experts_have_their_own_weights(subject: CausalSubject, case: CausalCase) -> None:
    """Queries, null slot and output of every expert are its own. (Keys and values: shared weights.)"""
    state, inputs = planted(case)
    silence_local(state)
    share_keys_and_values(case, state)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(cases(rotary=True, **ALL), "state_dict", "rotary_emb")
def rotary_positions_are_those_of_the_tokens(subject: CausalSubject, case: CausalCase) -> None:
    """`rotary_emb` rotates queries and keys by the angles of their positions."""
    state, inputs = planted(case)
    silence_local(state)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(cases(experts=(1, 2), **ALL), "state_dict")
def the_first_block_is_local_attention_alone(subject: CausalSubject, case: CausalCase) -> None:
    """Experts and null tokens have no say before there is a block to remember."""
    state, inputs = planted(case)
    given = subject.move(inputs)
    before = call(subject.build(case, state), **given)
    for name in ("null_tokens", "attn.to_out.weight"):
        state[name] = -2 * state[name] + 1
    after = call(subject.build(case, state), **given)
    width = case.block
    assert_unchanged(after[:, :width], before[:, :width], "other experts and null tokens: the first block")
    assert not torch.equal(after[:, width:], before[:, width:]), "other experts and null tokens change nothing"


@checked_on(cases(average=True, experts=(1, 2), **ALL), "state_dict")
def average_routed_divides_by_the_number_of_terms(subject: CausalSubject, case: CausalCase) -> None:
    """average_routed=True: of the experts and local attention; in the first block there is one term."""
    state, inputs = planted(case)
    average_the_window(state)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(
    cases(
        everybody=EITHER, remember_all=EITHER,
        options=st.fixed_dictionaries({"solver": st.just("exact"), "eps": st.sampled_from((0.3, 1.0))}),
    ),
    "state_dict",
)  # fmt: skip
def the_exact_solver_scores_what_is_picked(subject: CausalSubject, case: CausalCase) -> None:
    """solver="exact": memory against all tokens of earlier blocks, queries by the dual of the block before."""
    state, inputs = planted(case)
    silence_local(state)
    assert_equals_reference(subject, case, state, inputs)


WHOLE = {"batch": (1, 2), "experts": (1, 2), "everybody": EITHER, "remember_all": EITHER, "prenorm": EITHER}
EVERYTHING = ("x", "null_tokens", "local_attn.to_qkv.weight", "local_attn.to_out.weight", *ROUTERS, *ATTENTION[1:])


@checked_on(cases(**WHOLE), "state_dict")
def output_and_gradients_equal_the_reference(subject: CausalSubject, case: CausalCase) -> None:
    """In float64, of the whole layer: all of what the other properties take apart."""
    state, inputs = planted(case)
    assert_equals_reference(subject, case, state, inputs, dtype=torch.float64, gradients_of=EVERYTHING)
