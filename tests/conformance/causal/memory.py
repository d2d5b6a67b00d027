"""Which tokens an expert remembers; every token is a query, so that what is seen shows."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.conformance.causal.case import CausalCase
from tests.conformance.causal.data import alone, cases, flipped, planted, silence_local
from tests.conformance.causal.subject import CausalSubject, checked_on
from tests.conformance.subject import assert_unchanged, call


def assert_remembers_the_best(subject: CausalSubject, case: CausalCase, expert: int) -> None:
    state, inputs = planted(case)
    alone(case, state, expert)
    x, width = inputs["x"], case.block
    logits = x[0, :, case.experts + expert]
    layer = subject.build(case, state)
    before = call(layer, **subject.move(inputs))[0]
    for token in range(case.n):
        after = call(layer, **subject.move({"x": flipped(case, x, token)}))[0]
        for start in range(width, case.n, width):
            rows = slice(start, start + width)
            if token >= start and token // width * width <= start:
                continue  # itself a query of this block
            best = logits[:start].topk(min(case.k_kv, start)).indices.tolist()
            what = (
                f"another content of token {token}, which is {'' if token in best else 'not '}among the K best before"
            )
            if token in best:
                assert not torch.equal(after[rows], before[rows]), f"{what} {start}: the block does not see it"
            else:
                assert_unchanged(after[rows], before[rows], f"{what} {start}: the block")


@checked_on(cases(everybody=True, blocks=(1, 3)), "state_dict")
def an_expert_remembers_the_k_best_tokens(subject: CausalSubject, case: CausalCase) -> None:
    """A token is seen by the blocks after its own for as long as its key/value logit is among the K best before them,
    and by no others."""
    assert_remembers_the_best(subject, case, 0)


@checked_on(cases(everybody=True, blocks=(1, 2), experts=(2,)), "state_dict")
def experts_remember_tokens_of_their_own(subject: CausalSubject, case: CausalCase) -> None:
    """The same of one of two experts, whose logits differ."""
    assert_remembers_the_best(subject, case, case.seed % 2)


@checked_on(cases(everybody=True, blocks=(1, 3)), "state_dict")
def the_later_of_two_equal_logits_is_remembered(subject: CausalSubject, case: CausalCase) -> None:
    """Two tokens with equal key/value logits are the last to be remembered and the first to be forgotten."""
    state, inputs = planted(case)
    silence_local(state)
    x, channel = inputs["x"], 1
    start = (case.n - 1) // case.block * case.block  # of the last block
    ranked = x[0, :start, channel].argsort(descending=True)
    k = min(case.k_kv, start - 1)
    earlier, later = sorted(ranked[k - 1 : k + 1].tolist())
    x[0, later] = x[0, earlier]
    x = flipped(case, x, later)
    layer = subject.build(case, state)

    def run(t: Tensor) -> Tensor:
        return call(layer, **subject.move({"x": t}))[0, start:]

    what = f"another content of token {earlier}, whose logit token {later} has too, and one is among the {k} best:"
    assert_unchanged(run(flipped(case, x, earlier)), run(x), f"{what} the last block")
