"""Masked tokens take no part."""

from __future__ import annotations

import torch

from tests.conformance.data import EITHER, cases, planted, windows
from tests.conformance.registry import checked_on
from tests.conformance.subject import Subject, assert_equals_reference, assert_unchanged, call, gradients
from tests.strategies import LayerCase, draw

CHOICE = {"queries": EITHER, "key_values": EITHER, "prenorm": EITHER}


@checked_on(windows(None, "multiple", batch=(1, 2), mask="random", **CHOICE))
def masked_tokens_take_no_part(subject: Subject, case: LayerCase) -> None:
    """Outputs 0, gradients 0, and their content (finite) changes neither outputs nor gradients."""
    state, inputs, _ = planted(case)
    inputs["mask"][:, 0] = True
    hidden = ~inputs["mask"]
    layer = subject.build(case, state)
    runs = []
    for filler in (0.0, 1.0):
        x = inputs["x"] + filler * hidden[..., None] * draw(tuple(inputs["x"].shape), "normal", case.seed + 1)
        runs.append(gradients(layer, subject.move({**inputs, "x": x}), case.seed))
    hidden = hidden.to(runs[0][0].device)
    for out, grads in runs:
        assert not out[hidden].any(), "outputs of masked tokens are not 0"
        assert grads["x"] is None or not grads["x"][hidden].any(), "gradients of masked tokens are not 0"
    assert_unchanged(runs[1][0], runs[0][0], "other content of masked tokens: the output")
    for name, before in runs[0][1].items():
        after = runs[1][1][name]
        if before is not None and after is not None:
            assert_unchanged(after, before, f"other content of masked tokens: the gradient of {name}")


@checked_on(windows(None, "multiple", batch=(1, 2), mask="random", **CHOICE), needs=("mask",))
def content_of_masked_tokens_does_not_matter(subject: Subject, case: LayerCase) -> None:
    """Other content (finite) of masked tokens leaves the outputs of the valid ones as they were."""
    state, inputs, _ = planted(case)
    layer = subject.build_any(case, state)
    valid, x = inputs["mask"], inputs["x"]
    changed = x + ~valid[..., None] * draw(tuple(x.shape), "normal", case.seed + 1)
    before, after = (call(layer, **subject.move({**inputs, "x": t})) for t in (x, changed))
    valid = valid.to(before.device)
    assert_unchanged(after[valid], before[valid], "other content of masked tokens: the output of the valid ones")


@checked_on(windows(None, "multiple", **CHOICE), needs=("mask",))
def masked_padding_changes_nothing(subject: Subject, case: LayerCase) -> None:
    """Masked tokens appended to x leave the output of the others as it was, while [N <= K] stays the same."""
    state, inputs, _ = planted(case)
    extra = 1 + case.seed % 3
    slots = {"num_routed_queries": case.k_q, "num_routed_key_values": case.k_kv}
    slots = {name: k + extra if k >= case.n else k for name, k in slots.items()}
    layer = subject.build_any(case, state, **slots)
    x = inputs["x"]
    longer = torch.cat((x, draw((1, extra, case.dim), "normal", case.seed + 1)), dim=1)
    mask = torch.arange(case.n + extra)[None] < case.n
    alone = call(layer, **subject.move({"x": x, "mask": mask[:, : case.n]}))
    padded = call(layer, **subject.move({"x": longer, "mask": mask}))
    assert_unchanged(padded[:, : case.n], alone, f"{extra} masked tokens more: the output")


@checked_on(windows(None, "multiple", batch=(2,), **CHOICE), needs=("state_dict", "mask"))
def an_item_without_valid_tokens_is_zero(subject: Subject, case: LayerCase) -> None:
    """Its output is 0, no gradient is NaN, and the other item is as it would be without it."""
    state, inputs, _ = planted(case)
    mask = torch.ones(case.batch, case.n, dtype=torch.bool)
    before = call(subject.build(case, state), **subject.move({**inputs, "mask": mask}))
    mask[1] = False
    layer = subject.build(case, state)
    out, grads = gradients(layer, subject.move({**inputs, "mask": mask}), case.seed)
    assert not out[1].any(), "the output of the masked item is not 0"
    assert_unchanged(out[0], before[0], "item 1 masked: item 0")
    for name, g in grads.items():
        assert g is None or g.isfinite().all(), f"the gradient of {name} is not finite"


@checked_on(cases(context=True, batch=(1, 2), **CHOICE), needs=("state_dict", "context_mask"))
def masked_context_takes_no_part(subject: Subject, case: LayerCase) -> None:
    """Its content (finite) changes neither output nor gradients, and its own gradient is 0."""
    state, inputs, _ = planted(case)
    mask = torch.ones(case.batch, case.context, dtype=torch.bool)
    mask[:, case.context // 2 :] = False
    layer = subject.build(case, state)
    hidden = ~mask[..., None]
    runs = []
    for filler in (0.0, 1.0):
        context = inputs["context"]
        context = context + filler * hidden * draw(tuple(context.shape), "normal", case.seed + 1)
        given = subject.move({**inputs, "context": context, "context_mask": mask})
        runs.append(gradients(layer, given, case.seed))
    for _, grads in runs:
        assert not grads["context"][hidden[..., 0].to(grads["context"].device)].any(), "masked context has a gradient"
    assert_unchanged(runs[1][0], runs[0][0], "other content of masked context: the output")
    after, before = (run[1]["attn.to_kv.weight"] for run in runs[::-1])
    assert_unchanged(after, before, "other content of masked context: the gradient of attn.to_kv.weight")


@checked_on(cases(context=True, queries=EITHER, key_values=EITHER), needs=("state_dict", "context_mask"))
def without_a_visible_key_the_null_slot_is_left(subject: Subject, case: LayerCase) -> None:
    """With all of the context masked, every query attends to its expert's learned null key and value."""
    state, inputs, _ = planted(case)
    inputs["context_mask"] = torch.zeros(case.batch, case.context, dtype=torch.bool)
    assert_equals_reference(subject, case, state, inputs)
