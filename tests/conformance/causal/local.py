"""Local attention alone: the experts are silenced."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.conformance.causal.case import CausalCase
from tests.conformance.causal.data import cases, planted, silence_experts
from tests.conformance.causal.subject import CausalSubject, checked_on
from tests.conformance.data import EITHER, average_the_window
from tests.conformance.subject import assert_equals_reference

QKV = "local_attn.to_qkv.weight"
WITHIN = cases(window=st.just(20), everybody=True, blocks=(1, 2))  # every earlier token is in the window


@checked_on(cases(everybody=True, prenorm=EITHER), "state_dict")
def local_attention_sees_w_tokens_and_itself(subject: CausalSubject, case: CausalCase) -> None:
    """0 <= i - j <= w. Queries are 0, so the output is the mean of the visible values."""
    state, inputs = planted(case)
    silence_experts(state)
    average_the_window(state)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(WITHIN, "state_dict")
def local_attention_scores_depend_on_i_minus_j(subject: CausalSubject, case: CausalCase) -> None:
    """Rotary positions: query i and key j are rotated against each other by i - j; with their gradients."""
    state, inputs = planted(case)
    silence_experts(state)
    queries_and_keys = {QKV: slice(2 * case.heads * case.dim_head)}
    assert_equals_reference(subject, case, state, inputs, gradients_of=(QKV,), rows=queries_and_keys)


@checked_on(cases(window=st.just(20), everybody=True, blocks=(1, 2), prenorm=EITHER), "state_dict")
def gradients_of_local_attention(subject: CausalSubject, case: CausalCase) -> None:
    """Gradients of x, norm, values and output projection; queries are 0, so that positions play no part."""
    state, inputs = planted(case)
    silence_experts(state)
    average_the_window(state)
    names = ("x", QKV, "local_attn.to_out.weight")
    if case.prenorm:
        names += ("local_attn.norm.weight", "local_attn.norm.bias")
    values = {QKV: slice(2 * case.heads * case.dim_head, None)}
    assert_equals_reference(subject, case, state, inputs, gradients_of=names, rows=values)


@checked_on(
    cases(
        window=st.just(20), everybody=True, blocks=(1, 1), heads=st.just(1),
        options=st.fixed_dictionaries({"local_attn_heads": st.sampled_from((2, 3))}),
    ),
    "state_dict",
)  # fmt: skip
def local_attention_has_heads_of_its_own(subject: CausalSubject, case: CausalCase) -> None:
    """local_attn_heads: of the local branch, whatever the experts have."""
    state, inputs = planted(case)
    silence_experts(state)
    assert_equals_reference(subject, case, state, inputs)
