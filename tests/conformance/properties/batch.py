"""Items of a batch know nothing of one another."""

from __future__ import annotations

import torch

from tests.conformance.data import EITHER, planted, windows
from tests.conformance.registry import checked_on
from tests.conformance.subject import Subject, assert_unchanged, call
from tests.strategies import LayerCase, draw

EXPERTS = {"experts": (1, 2, 3), "key_values": EITHER, "prenorm": EITHER}


@checked_on(windows(None, "multiple", batch=(2, 3), **EXPERTS), needs=())
def batch_items_are_isolated(subject: Subject, case: LayerCase) -> None:
    """New content of item 0 leaves every other item's output as it was."""
    state, inputs, _ = planted(case)
    layer = subject.build_any(case, state)
    changed = inputs["x"].clone()
    changed[0] = draw((case.n, case.dim), "normal", case.seed + 1)
    before, after = (call(layer, **subject.move({**inputs, "x": x})) for x in (inputs["x"], changed))
    for item in range(1, case.batch):
        assert_unchanged(after[item], before[item], f"new content of item 0: item {item}")
    assert not torch.equal(after[0], before[0]), "new content of item 0 has no influence on item 0"


@checked_on(windows(None, "multiple", batch=(2, 3), queries=EITHER, **EXPERTS), needs=())
def batch_size_changes_nothing(subject: Subject, case: LayerCase) -> None:
    """The same item, alone or several times in a batch, has the same output."""
    state, inputs, _ = planted(case)
    layer = subject.build_any(case, state)
    x = inputs["x"][:1]
    alone = call(layer, **subject.move({**inputs, "x": x}))[0]
    together = call(layer, **subject.move({**inputs, "x": x.repeat(case.batch, 1, 1)}))
    for item in range(case.batch):
        assert_unchanged(together[item], alone, f"in a batch of {case.batch} copies, item {item}")
