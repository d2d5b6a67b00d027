"""Items of a batch know nothing of one another."""

from __future__ import annotations

import torch

from tests.conformance.causal.case import CausalCase
from tests.conformance.causal.data import cases, noise, planted
from tests.conformance.causal.subject import CausalSubject, checked_on
from tests.conformance.data import EITHER
from tests.conformance.subject import assert_unchanged, call

ITEMS = cases(batch=(2, 3), experts=(1, 2), remember_all=EITHER, prenorm=EITHER)


@checked_on(ITEMS)
def batch_items_are_isolated(subject: CausalSubject, case: CausalCase) -> None:
    """New content of item 0 leaves every other item's output as it was."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    x = subject.move(inputs)["x"]
    changed = x.clone()
    changed[0] = noise(case, (case.n, case.dim)).to(x)
    before, after = call(layer, x), call(layer, changed)
    for item in range(1, case.batch):
        assert_unchanged(after[item], before[item], f"new content of item 0: item {item}")
    assert not torch.equal(after[0], before[0]), "new content of item 0 has no influence on item 0"


@checked_on(ITEMS)
def batch_size_changes_nothing(subject: CausalSubject, case: CausalCase) -> None:
    """The same item, alone or several times in a batch, has the same output."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    x = subject.move(inputs)["x"][:1]
    alone, together = call(layer, x)[0], call(layer, x.repeat(case.batch, 1, 1))
    for item in range(case.batch):
        assert_unchanged(together[item], alone, f"in a batch of {case.batch} copies, item {item}")
