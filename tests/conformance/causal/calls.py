"""From call to call: dropout, determinism, copies, memory layouts, dtypes."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from hypothesis import strategies as st

from tests.conformance.causal.case import CausalCase
from tests.conformance.causal.data import cases, planted, silence_local
from tests.conformance.causal.subject import CausalSubject, checked_on
from tests.conformance.data import EITHER
from tests.conformance.properties.precision import DTYPES, SIZED
from tests.conformance.subject import NotOffered, assert_equals_reference, assert_unchanged, call
from tests.strategies import lay_out

ANY = {"remember_all": EITHER, "experts": (1, 2), "batch": (1, 2), "prenorm": EITHER}


@checked_on(cases(**ANY))
def eval_ignores_dropout(subject: CausalSubject, case: CausalCase) -> None:
    """In eval mode a layer with dropout=0.5 computes what it does without."""
    state, inputs = planted(case)
    given = subject.move(inputs)
    without, dropping = (call(subject.build_any(case, state, dropout=p), **given) for p in (0.0, 0.5))
    assert_unchanged(dropping, without, "dropout=0.5 in eval mode: the output")


@checked_on(cases(**ANY))
def forward_is_deterministic(subject: CausalSubject, case: CausalCase) -> None:
    """A second call in eval mode gives the same output, bit for bit."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    first, second = (call(layer, **subject.move(inputs)) for _ in range(2))
    assert torch.equal(first, second), f"the second call differs by {(first - second).abs().max().item():.3g}"


@checked_on(cases(**ANY))
def a_deep_copy_computes_the_same(subject: CausalSubject, case: CausalCase) -> None:
    """copy.deepcopy gives a layer of its own, with the same output."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    other = copy.deepcopy(layer)
    expected = call(layer, **subject.move(inputs)).detach().clone()
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    assert_unchanged(call(other, **subject.move(inputs)), expected, "the original zeroed: the copy's output")


@checked_on(cases(**ANY))
def a_state_dict_holds_all_that_is_learned(subject: CausalSubject, case: CausalCase) -> None:
    """Another layer computes the same once it has loaded it."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    expected = call(layer, **subject.move(inputs))
    other = subject.build_any(replace(case, seed=case.seed + 1), replace(case, seed=case.seed + 1).state())
    other.load_state_dict(layer.state_dict())
    assert_unchanged(call(other, **subject.move(inputs)), expected, "state dict loaded by another: the output")


@checked_on(st.sampled_from(("transposed", "sliced", "unaligned")).flatmap(lambda layout: cases(layout=layout, **ANY)))
def strides_do_not_matter(subject: CausalSubject, case: CausalCase) -> None:
    """x transposed, cut from a larger tensor, or unaligned in memory has the output of a contiguous one."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    given = subject.move(inputs)
    plain = call(layer, **given)
    strided = call(layer, **{**given, "x": lay_out(given["x"], case.layout)})
    assert_unchanged(strided, plain, f"x {case.layout}: the output")


@checked_on(cases(remember_all=EITHER, prenorm=EITHER))
def the_output_has_the_dtype_of_x(subject: CausalSubject, case: CausalCase) -> None:
    """float64, float32, bfloat16 and float16: the output is finite, in x's dtype and shape."""
    state, inputs = planted(case)
    wrong: list[str] = []
    for dtype in DTYPES:
        layer = subject.build_any(case, state).to(dtype)
        try:
            out = call(layer, **subject.move(inputs, dtype))
        except NotOffered:
            raise
        except Exception as error:
            wrong.append(f"{dtype}: {error}")
            continue
        if (out.dtype, out.shape) != (dtype, inputs["x"].shape) or not out.isfinite().all():
            finite = "finite" if out.isfinite().all() else "not finite"
            wrong.append(f"{dtype}: the output is {finite}, {out.dtype} of shape {tuple(out.shape)}")
    assert not wrong, "\n".join(wrong)


SIZES = {name: v for name, v in SIZED.items() if name != "least"}


@checked_on(cases(everybody=True, remember_all=True, blocks=(2, 3), **SIZES), "state_dict")
def every_dtype_is_as_exact_as_it_can_be(subject: CausalSubject, case: CausalCase) -> None:
    """float64, float32, bfloat16 and float16: an error of a small multiple of the reference's in the same."""
    wrong: list[str] = []
    for dtype in DTYPES:
        state, inputs = planted(case)
        silence_local(state)
        try:
            assert_equals_reference(subject, case, state, inputs, dtype=dtype)
        except NotOffered:
            raise
        except Exception as error:
            wrong.append(f"{dtype}: {error}")
    assert not wrong, "\n".join(wrong)
