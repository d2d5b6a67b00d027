"""From call to call: dropout, determinism, copies, memory layouts."""

from __future__ import annotations

import copy

import torch
from hypothesis import strategies as st

from tests.conformance.data import EITHER, cases, planted, windows
from tests.conformance.registry import checked_on
from tests.conformance.subject import Subject, assert_equals_reference, assert_unchanged, call
from tests.strategies import LayerCase, lay_out

ANY = {"queries": EITHER, "key_values": EITHER, "experts": (1, 2), "batch": (1, 2), "prenorm": EITHER}


@checked_on(cases(queries=EITHER, key_values=EITHER), needs=("state_dict", "dropout"))
def eval_ignores_dropout(subject: Subject, case: LayerCase) -> None:
    """In eval mode a layer with dropout=0.5 equals the reference."""
    state, inputs, _ = planted(case)
    assert_equals_reference(subject, case, state, inputs, dropout=0.5)


@checked_on(cases(least=6, heads=2, prenorm=EITHER), needs=("dropout",))
def dropout_differs_between_calls(subject: Subject, case: LayerCase) -> None:
    """In training mode two calls with dropout=0.5 differ."""
    state, inputs, _ = planted(case)
    layer = subject.build_any(case, state, dropout=0.5).train()
    torch.manual_seed(case.seed)
    first, second = (call(layer, **subject.move(inputs)) for _ in range(2))
    assert not torch.equal(first, second), "two calls in training mode gave the same output"


@checked_on(windows(None, "multiple", **ANY), needs=())
def forward_is_deterministic(subject: Subject, case: LayerCase) -> None:
    """A second call in eval mode gives the same output, bit for bit."""
    state, inputs, _ = planted(case)
    layer = subject.build_any(case, state)
    first, second = (call(layer, **subject.move(inputs)) for _ in range(2))
    assert torch.equal(first, second), f"the second call differs by {(first - second).abs().max().item():.3g}"


@checked_on(windows(None, "multiple", **ANY), needs=())
def a_deep_copy_computes_the_same(subject: Subject, case: LayerCase) -> None:
    """copy.deepcopy gives a layer of its own, with the same output."""
    state, inputs, _ = planted(case)
    layer = subject.build_any(case, state)
    other = copy.deepcopy(layer)
    expected = call(layer, **subject.move(inputs)).detach().clone()
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    assert_unchanged(call(other, **subject.move(inputs)), expected, "the original zeroed: the copy's output")


@checked_on(
    st.sampled_from(("transposed", "sliced", "unaligned")).flatmap(
        lambda layout: windows(None, "multiple", layout=layout, **ANY)
    ),
    needs=(),
)
def strides_do_not_matter(subject: Subject, case: LayerCase) -> None:
    """x transposed, cut from a larger tensor, or unaligned in memory has the output of a contiguous one."""
    state, inputs, _ = planted(case)
    layer = subject.build_any(case, state)
    given = subject.move(inputs)
    plain = call(layer, **given)
    strided = call(layer, **{**given, "x": lay_out(given["x"], case.layout)})
    assert_unchanged(strided, plain, f"x {case.layout}: the output")
