"""Every dtype, with the parameters in the same."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tests.conformance.data import (
    EITHER,
    average_the_window,
    cases,
    planted,
    share_experts,
    silence_experts,
)
from tests.conformance.registry import checked_on
from tests.conformance.subject import NotOffered, Subject, assert_equals_reference, call
from tests.strategies import LayerCase

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Enough numbers for the baseline's error to be typical rather than lucky.
SIZED = {"least": 6, "dim": st.sampled_from((16, 32)), "heads": st.just(2), "dim_head": st.just(8)}


def in_every_dtype(subject: Subject, case: LayerCase, *, local: bool = False) -> None:
    wrong: list[str] = []
    for dtype in DTYPES:
        state, inputs, _ = planted(case)
        share_experts(case, state)
        if local:
            silence_experts(state)
            average_the_window(state)
        try:
            assert_equals_reference(subject, case, state, inputs, dtype=dtype)
        except NotOffered:
            raise
        except Exception as error:
            wrong.append(f"{dtype}: {error}")
    assert not wrong, "\n".join(wrong)


@checked_on(cases(key_values=EITHER, **SIZED))
def every_dtype(subject: Subject, case: LayerCase) -> None:
    """float64, float32, bfloat16 and float16: the output is in x's dtype and as exact as that allows."""
    in_every_dtype(subject, case)


@checked_on(cases(window="single", **SIZED))
def every_dtype_with_local_attention(subject: Subject, case: LayerCase) -> None:
    """Local attention in float64, float32, bfloat16 and float16, as exact as these allow."""
    in_every_dtype(subject, case, local=True)


@checked_on(cases(key_values=False, experts=(2,), average=True, **SIZED))
def every_dtype_with_average_routed(subject: Subject, case: LayerCase) -> None:
    """average_routed=True in float64, float32, bfloat16 and float16: the output stays in x's dtype."""
    in_every_dtype(subject, case)


@checked_on(cases(queries=EITHER, key_values=EITHER, prenorm=EITHER), needs=())
def the_output_has_the_dtype_of_x(subject: Subject, case: LayerCase) -> None:
    """float64, float32, bfloat16 and float16: the output is finite, in x's dtype and shape."""
    state, inputs, _ = planted(case)
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
