"""Which tokens of a block an expert takes as queries; everything before it is remembered."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tests.conformance.causal.case import CausalCase
from tests.conformance.causal.data import cases, planted, silence_local
from tests.conformance.causal.subject import CausalSubject, checked_on
from tests.conformance.subject import assert_equals_reference, assert_unchanged, call


@checked_on(cases(remember_all=True, blocks=(2, 3)), "state_dict")
def queries_reach_the_threshold_of_the_block_before(subject: CausalSubject, case: CausalCase) -> None:
    """Those whose logit is at least the Kq-th largest of the block before, a few more or fewer than Kq."""
    state, inputs = planted(case)
    silence_local(state)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(
    cases(
        remember_all=True, k_q=st.just(1), blocks=(2, 3),
        options=st.sampled_from(({}, {}, {"capacity_factor": 1.0}, {"capacity_factor": 2.5})),
    ),
    "state_dict",
)  # fmt: skip
def the_first_of_too_many_candidates_are_queries(subject: CausalSubject, case: CausalCase) -> None:
    """Logits rise from block to block, so all of it are candidates: the first ceil(capacity_factor Kq) have a slot."""
    state, inputs = planted(case, rise=case.block)
    silence_local(state)
    assert_equals_reference(subject, case, state, inputs)


@checked_on(cases(remember_all=True, experts=(2,), blocks=(1, 3)), "state_dict")
def tokens_that_an_expert_leaves_get_its_null_token(subject: CausalSubject, case: CausalCase) -> None:
    """Beyond the first block. Whom an expert takes is told by the layer: those whose output changes with the expert."""
    state, inputs = planted(case)
    silence_local(state)
    width = case.block
    plain = call(subject.build(case, state), **subject.move(inputs))
    for expert in range(case.experts):
        of_expert = slice(expert * case.dim, (expert + 1) * case.dim)
        louder = {name: t.clone() for name, t in state.items()}
        louder["attn.to_out.weight"][of_expert] *= 2
        left = (call(subject.build(case, louder), **subject.move(inputs)) == plain).all(-1)
        left[:, :width] = False
        filled = {name: t.clone() for name, t in state.items()}
        filled["null_tokens"][expert] = torch.arange(1, case.dim + 1)
        found = call(subject.build(case, filled), **subject.move(inputs))[:, width:]
        expected = plain + left[..., None] * filled["null_tokens"][expert].to(plain)
        assert_unchanged(found, expected[:, width:], f"a null token given to expert {expert}: the output")
