"""Masked tokens are no tokens: they take no place in a block, a window, or a memory."""

from __future__ import annotations

import torch

from tests.conformance.causal.case import CausalCase
from tests.conformance.causal.data import cases, noise, planted
from tests.conformance.causal.subject import CausalSubject, checked_on
from tests.conformance.data import EITHER, Inputs
from tests.conformance.subject import assert_unchanged, call, gradients
from tests.strategies import generator

CHOICE = {"everybody": EITHER, "remember_all": EITHER, "experts": (1, 2), "prenorm": EITHER}


def spread(case: CausalCase, inputs: Inputs, more: int) -> tuple[Inputs, torch.Tensor]:
    """Inputs with so many masked tokens among the others, and where these are now."""
    length = case.n + more
    place = torch.randperm(length, generator=generator(case.seed + 30))[: case.n].sort().values
    x = noise(case, (case.batch, length, case.dim))
    x[:, place] = inputs["x"]
    mask = torch.zeros(case.batch, length, dtype=torch.bool)
    mask[:, place] = True
    longer = {"x": x, "mask": mask}
    if "rotary_emb" in inputs:
        longer["rotary_emb"] = torch.cat((inputs["rotary_emb"], inputs["rotary_emb"][:more].flip(0)))
    return longer, place


@checked_on(cases(rotary=EITHER, **CHOICE), "mask")
def masked_tokens_anywhere_change_nothing(subject: CausalSubject, case: CausalCase) -> None:
    """Before, between and behind the others: their outputs are as without them. Rotary angles count the valid ones."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    more = min(1 + case.seed % 5, case.n)
    longer, place = spread(case, inputs, more)
    alone = call(layer, **subject.move(inputs))
    found = call(layer, **subject.move(longer))[:, place.to(alone.device)]
    assert_unchanged(found, alone, f"{more} masked tokens more: the output of the others")


@checked_on(cases(batch=(1, 2), mask="random", **CHOICE), "mask")
def content_of_masked_tokens_does_not_matter(subject: CausalSubject, case: CausalCase) -> None:
    """Other content (finite) of masked tokens leaves the outputs of the valid ones as they were."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    valid, x = inputs["mask"], inputs["x"]
    changed = x + ~valid[..., None] * noise(case, tuple(x.shape))
    before, after = (call(layer, **subject.move({**inputs, "x": t})) for t in (x, changed))
    valid = valid.to(before.device)
    assert_unchanged(after[valid], before[valid], "other content of masked tokens: the output of the valid ones")


@checked_on(cases(batch=(1, 2), mask="random", **CHOICE), "state_dict", "mask")
def masked_tokens_have_no_output_and_no_gradient(subject: CausalSubject, case: CausalCase) -> None:
    """Both are 0."""
    state, inputs = planted(case)
    hidden = ~inputs["mask"].to(subject.device)
    out, found = gradients(subject.build(case, state), subject.move(inputs), case.seed)
    assert not out[hidden].any(), "outputs of masked tokens are not 0"
    assert found["x"] is None or not found["x"][hidden].any(), "gradients of masked tokens are not 0"


@checked_on(cases(batch=(2,), **CHOICE), "state_dict", "mask")
def an_item_without_valid_tokens_is_zero(subject: CausalSubject, case: CausalCase) -> None:
    """Its output is 0, no gradient is NaN, and the other item is as it would be without it."""
    state, inputs = planted(case)
    mask = torch.ones(case.batch, case.n, dtype=torch.bool)
    before = call(subject.build(case, state), **subject.move({**inputs, "mask": mask}))
    mask[1] = False
    out, found = gradients(subject.build(case, state), subject.move({**inputs, "mask": mask}), case.seed)
    assert not out[1].any(), "the output of the masked item is not 0"
    assert_unchanged(out[0], before[0], "item 1 masked: item 0")
    for name, g in found.items():
        assert g is None or g.isfinite().all(), f"the gradient of {name} is not finite"
