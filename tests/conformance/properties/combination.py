"""One rule: the sum of what experts and local attention have for a token, or their mean if asked for."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.conformance.data import (
    EITHER,
    average_the_window,
    cases,
    planted,
    share_experts,
    tensors,
)
from tests.conformance.registry import checked_on
from tests.conformance.subject import Subject, assert_equals_reference, call
from tests.strategies import LayerCase


@checked_on(cases(queries=False, key_values=EITHER, window="single"))
def local_attention_is_kept_where_all_tokens_are_routed(subject: Subject, case: LayerCase) -> None:
    """N <= num_routed_queries, one expert: the output is the expert's plus that of local attention."""
    state, inputs, _ = planted(case)
    average_the_window(state)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(cases(queries=False, key_values=False, experts=(2, 3)))
def experts_are_summed_where_all_tokens_are_routed(subject: Subject, case: LayerCase) -> None:
    """N <= num_routed_queries, average_routed=False: experts are summed, as they are where N is larger."""
    state, inputs, _ = planted(case)
    share_experts(case, state)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(
    st.one_of(
        cases(queries=EITHER, key_values=False, experts=(2, 3), average=True),
        cases(queries=True, key_values=False, experts=(1, 2), average=True, window="single"),
    )
)
def average_routed_divides_by_the_number_of_terms(subject: Subject, case: LayerCase) -> None:
    """average_routed=True: experts that picked the token, plus one with local attention; at least 1."""
    state, inputs, _ = planted(case)
    share_experts(case, state)
    if case.window is not None:
        average_the_window(state)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(cases(experts=(1, 2)))
def tokens_of_no_expert_become_the_null_token(subject: Subject, case: LayerCase) -> None:
    """Without local attention, what no expert picked as a query is `null_routed_token`."""
    state, inputs, picked = planted(case)
    state["null_routed_token"] = tensors(case)[0]["null_routed_token"]
    out = call(subject.build(case, state), **subject.move(inputs))
    null = state["null_routed_token"][0, 0].to(out)
    unrouted = ~picked.any(dim=1).to(out.device)
    right = (out == null).all(dim=-1)
    assert right[unrouted].all(), f"{int((~right[unrouted]).sum())} tokens that nobody picked are something else"
    assert not right[~unrouted].any(), f"{int(right[~unrouted].sum())} tokens that were picked are the null token"
