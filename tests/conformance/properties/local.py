"""Local attention alone: the experts are silenced, and there are more tokens than they could take."""

from __future__ import annotations

from tests.conformance.data import average_the_window, cases, silence_experts, tensors
from tests.conformance.registry import checked_on
from tests.conformance.subject import Subject, assert_equals_reference
from tests.strategies import LayerCase

LOCAL = ("x", "local_attn.to_qkv.weight", "local_attn.to_out.weight")
NORM = ("local_attn.norm.weight", "local_attn.norm.bias")


@checked_on(cases(window="multiple"))
def local_attention_sees_exactly_its_window(subject: Subject, case: LayerCase) -> None:
    """|i - j| <= w. Queries are 0, so the output is the mean of the visible values; N is a multiple of w."""
    state, inputs = tensors(case)
    silence_experts(state)
    average_the_window(state)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(cases(window="ragged"))
def local_attention_sees_no_padding(subject: Subject, case: LayerCase) -> None:
    """The same where N is no multiple of w and no mask is given: whatever it pads with takes no softmax mass."""
    state, inputs = tensors(case)
    silence_experts(state)
    average_the_window(state)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(cases(window="multiple"))
def local_attention_scores_depend_on_i_minus_j(subject: Subject, case: LayerCase) -> None:
    """Rotary positions: query i and key j are rotated against each other by i - j; values and gradients."""
    state, inputs = tensors(case)
    silence_experts(state)
    assert_equals_reference(subject, case, state, inputs, gradients_of=LOCAL + NORM)


@checked_on(cases(window="multiple"))
def gradients_of_local_attention(subject: Subject, case: LayerCase) -> None:
    """Gradients of x, norm, values and output projection; queries are 0, so that positions play no part."""
    state, inputs = tensors(case)
    silence_experts(state)
    average_the_window(state)
    inner = case.heads * case.dim_head
    rows = {"local_attn.to_qkv.weight": slice(2 * inner, None)}
    assert_equals_reference(subject, case, state, inputs, gradients_of=LOCAL + NORM, rows=rows)
