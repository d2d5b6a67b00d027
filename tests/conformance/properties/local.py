"""Local attention alone: the experts are silenced, and there are more tokens than they could take."""

from __future__ import annotations

from tests.conformance.data import EITHER, average_the_window, cases, silence_experts, tensors
from tests.conformance.registry import checked_on
from tests.conformance.subject import Subject, assert_equals_reference
from tests.strategies import LayerCase

QKV = "local_attn.to_qkv.weight"


@checked_on(cases(window="multiple", prenorm=EITHER))
def local_attention_sees_exactly_its_window(subject: Subject, case: LayerCase) -> None:
    """|i - j| <= w. Queries are 0, so the output is the mean of the visible values; N is a multiple of w."""
    state, inputs = tensors(case)
    silence_experts(state)
    average_the_window(state)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(cases(window="ragged", prenorm=EITHER))
def local_attention_sees_no_padding(subject: Subject, case: LayerCase) -> None:
    """The same where N is no multiple of w and no mask is given: whatever it pads with takes no softmax mass."""
    state, inputs = tensors(case)
    silence_experts(state)
    average_the_window(state)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(cases(window="multiple", prenorm=EITHER))
def local_attention_scores_depend_on_i_minus_j(subject: Subject, case: LayerCase) -> None:
    """Rotary positions: query i and key j are rotated against each other by i - j; with their gradients."""
    state, inputs = tensors(case)
    silence_experts(state)
    queries_and_keys = {QKV: slice(2 * case.heads * case.dim_head)}
    assert_equals_reference(subject, case, state, inputs, gradients_of=(QKV,), rows=queries_and_keys)


@checked_on(cases(window="single", prenorm=EITHER))
def gradients_of_local_attention(subject: Subject, case: LayerCase) -> None:
    """Gradients of x, norm, values and output projection; queries are 0, so that positions play no part."""
    state, inputs = tensors(case)
    silence_experts(state)
    average_the_window(state)
    names = ("x", QKV, "local_attn.to_out.weight")
    if case.prenorm:
        names += ("local_attn.norm.weight", "local_attn.norm.bias")
    values = {QKV: slice(2 * case.heads * case.dim_head, None)}
    assert_equals_reference(subject, case, state, inputs, gradients_of=names, rows=values)
