"""The comparator: is a result as exact as its precision allows?

Every comparison has three parties: `actual`, the result under test; `oracle`, the reference in float64 on the same
(rounded) inputs; `baseline`, the reference in the dtype under test, which shows what that precision costs. `actual`
may err by a small multiple of what the baseline errs, plus a few units in the last place: over all elements, and in
every row apart, so that one lost row or one missing term can't hide in a large tensor.

    from reference.testing import assert_matches
    assert_matches(mine, oracle=exact, baseline=reference_in_bf16, stage="routed_attention")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reference.contract import FLOATING, describe, number, reject


class Budget(NamedTuple):
    """An error may reach c * (the baseline's error) + floor * eps(dtype) * scale.

    small_row: rows whose norm is far below that of the largest have cancelled, and their relative error means little.
    This fraction of the largest norm is added to that of every row.
    """

    c: float
    floor: float
    small_row: float
    why: str


STAGES: dict[str, Budget] = {
    "logits": Budget(4, 8, 0.01, "one dot product of D terms"),
    "scores": Budget(4, 8, 0.01, "exp((s + a) / eps): pass scale = max|s| / eps, its condition number, + N"),
    "solver_gradient": Budget(4, 8, 0.1, "the scores' error, and sums over a row that cancel"),
    "router_gradient": Budget(4, 8, 0.1, "the solver's gradient, then one product with x or the routing tokens"),
    "routed_attention": Budget(4, 8, 0.01, "norm, projection, softmax, projection: a rounding after each"),
    "routed_attention_gradient": Budget(4, 8, 0.1, "the same chain backward; sums over slots"),
    "local_attention": Budget(4, 8, 0.01, "as routed attention"),
    "local_attention_gradient": Budget(4, 8, 0.1, "as routed attention"),
    "combine": Budget(4, 2, 0.01, "a sum of at most E + 1 terms and one rounding"),
    "mixture": Budget(4, 8, 0.01, "routed and local attention, and their sum"),
    "mixture_gradient": Budget(4, 8, 0.1, "all of the above backward"),
}
EXPECTATIONS = ("nan", "empty", "zeros", "constant")


@dataclass(frozen=True)
class Match:
    """How much of the budget was used: `fraction` is the larger of the two, by element and by row."""

    fraction: float
    by_element: float
    by_row: float
    max_error: float


def assert_matches(
    actual: Tensor,
    oracle: Tensor,
    baseline: Tensor,
    *,
    stage: str,
    name: str = "",
    expect: str | None = None,
    scale: float = 0.0,
    precision: torch.dtype | None = None,
) -> Match:
    """Assert that `actual` is within the budget of `stage`; returns the fraction of the budget that was used.

    Args:
        actual: any shape, float64, float32, float16 or bfloat16. oracle: the same shape in float64. baseline: the same
            shape, in actual's dtype; for a float64 actual it may be float32, and its error then counts scaled by
            eps(float64) / eps(float32).
        stage: a key of `STAGES`. name: for the message.
        expect: an oracle that is empty, constant, zero or holds NaN proves little and is refused, unless it is
            announced as "empty", "constant", "zeros" (actual must be exactly zero) or "nan". The announcement must be
            true.
        scale: magnitude of the terms that a result sums up, where they cancel, finite and >= 0; the largest element of
            the oracle counts anyway. Of terms some of which are infinite: that of the finite ones.
        precision: dtype of the computation, where it is lower than that of the result (a float32 gradient of a
            bfloat16 chain).
    NaN and infinities must stand where the oracle has them. Tensors that share memory are refused.
    Raises AssertionError for a mismatch (under `python -O` too), TypeError or ValueError for arguments of the wrong
    kind.
    """
    if stage not in STAGES:
        reject("stage", f"one of {', '.join(STAGES)}", repr(stage))
    if expect is not None and expect not in EXPECTATIONS:
        reject("expect", f"one of {', '.join(EXPECTATIONS)} or None", repr(expect))
    for label, t in (("actual", actual), ("oracle", oracle), ("baseline", baseline)):
        # Not float8: a few of its units in the last place are the number itself, and any result would do.
        if not isinstance(t, Tensor) or t.dtype not in FLOATING:
            reject(label, f"a tensor of one of {', '.join(map(str, FLOATING))}", describe(t), TypeError)
    if oracle.dtype != torch.float64:
        reject("oracle", "float64", str(oracle.dtype), TypeError)
    scale = number("scale", scale, "a finite number >= 0", lambda v: v >= 0)
    if precision is not None and precision not in FLOATING:
        reject("precision", f"one of {', '.join(map(str, FLOATING))} or None", precision, TypeError)
    title = f"{stage} {name}".strip() + f": {actual.dtype} {tuple(actual.shape)}"
    actual, oracle, baseline = actual.detach(), oracle.detach(), baseline.detach()
    _assert_comparable(title, actual, oracle, baseline)
    _assert_expectation(title, oracle, expect)
    if oracle.numel() == 0:
        return Match(0.0, 0.0, 0.0, 0.0)
    if expect == "zeros":
        if actual.any():  # NaN counts as non-zero
            raise AssertionError(f"{title}: expected exact zeros, got {actual}")
        return Match(0.0, 0.0, 0.0, 0.0)

    a, o, b = actual.double(), oracle, baseline.double()
    if not torch.equal(a.isnan(), o.isnan()):
        raise AssertionError(f"{title}: {int((a.isnan() != o.isnan()).sum())} NaN out of place")
    infinite = o.isinf()
    if not torch.equal(a.isinf(), infinite):
        raise AssertionError(f"{title}: {int((a.isinf() != infinite).sum())} infinities out of place")
    if not torch.equal(a[infinite], o[infinite]):
        raise AssertionError(f"{title}: an infinity of the wrong sign")
    o = o.masked_fill(~o.isfinite(), 0)
    eps = torch.finfo(precision or actual.dtype).eps
    error = (a - o).abs().masked_fill(~oracle.isfinite(), 0)
    # Where the baseline itself is not finite it sets no standard.
    base = (b - o).abs().nan_to_num(0.0, 0.0, 0.0) * (torch.finfo(actual.dtype).eps / torch.finfo(baseline.dtype).eps)

    c, floor, small_row, _ = STAGES[stage]
    tiny = torch.finfo(torch.float64).tiny  # no square and no budget underflows to zero
    element_budget = (c * base.max() + floor * eps * o.abs().max().clamp_min(scale)).clamp_min(tiny)
    width = next((size for size in reversed(o.shape) if size > 1), 1)  # (E, D, 1) has rows of D
    rows = [t.reshape(-1, width) if t.ndim > 1 else t.reshape(1, -1) for t in (error, base, o)]
    largest = o.abs().max().clamp_min(tiny)
    error_norm, base_norm, norm = (torch.linalg.vector_norm(t / largest, dim=-1) for t in rows)
    norm = norm + small_row * norm.max()
    row_error = error_norm / norm
    row_budget = c * (base_norm / norm).max() + floor * eps * (1 + scale / largest * width**0.5 / norm)
    match = Match(
        by_element=(error.max() / element_budget).item(),
        by_row=(row_error / row_budget).max().item(),
        fraction=max((error.max() / element_budget).item(), (row_error / row_budget).max().item()),
        max_error=error.max().item(),
    )
    # `<=`, never `not >`: a NaN must fail.
    if not match.fraction <= 1 or match.by_element != match.by_element or match.by_row != match.by_row:
        at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        off = int((error > element_budget).sum())
        raise AssertionError(
            f"{title}: error is {match.by_element:.3g} of its budget by element, {match.by_row:.3g} by row\n"
            f"  {off} of {error.numel()} elements beyond {element_budget.item():.3g}; "
            f"row {int(row_error.argmax())} worst\n"
            f"  at {at}: actual {actual[at].item():.9g}, oracle {oracle[at].item():.9g}, "
            f"baseline {baseline[at].item():.9g}"
        )
    return match


def _assert_comparable(title: str, actual: Tensor, oracle: Tensor, baseline: Tensor) -> None:
    if actual.shape != oracle.shape:
        raise AssertionError(f"{title}: oracle has shape {tuple(oracle.shape)}")
    if actual.shape != baseline.shape:
        raise AssertionError(f"{title}: baseline has shape {tuple(baseline.shape)}")
    if not (actual.device == oracle.device == baseline.device):
        raise AssertionError(f"{title}: devices {actual.device}, {oracle.device}, {baseline.device}")
    scaled = (actual.dtype, baseline.dtype) == (torch.float64, torch.float32)
    if not (actual.dtype == baseline.dtype or scaled):
        raise AssertionError(f"{title}: baseline has dtype {baseline.dtype}")
    for label, other in (("oracle", oracle), ("baseline", baseline)):
        shared = actual.numel() and actual.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        if shared:
            raise AssertionError(f"{title}: actual shares memory with the {label}")


def _assert_expectation(title: str, oracle: Tensor, expect: str | None) -> None:
    """The oracle is what the caller announced: an ordinary result, unless said otherwise."""
    kind = kind_of(oracle)
    if kind != expect:
        raise AssertionError(f"{title}: the oracle is {kind or 'ordinary'}, announced as {expect or 'ordinary'}")


def kind_of(oracle: Tensor) -> str | None:
    """Which of `EXPECTATIONS` fits, so that a caller who has looked at it can announce it; None: an ordinary result."""
    if oracle.numel() == 0:
        return "empty"
    if oracle.isnan().any():
        return "nan"
    if not oracle.any():
        return "zeros"
    return "constant" if oracle.numel() > 1 and bool((oracle == oracle.flatten()[0]).all()) else None


def assert_identical(actual: Tensor, expected: Tensor, name: str = "") -> None:
    """Assert equality bit for bit (NaN equals NaN, -0.0 equals 0.0), with dtype, shape and device; no shared memory."""
    for label, t in (("actual", actual), ("expected", expected)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{label}: expected a tensor, got {t!r}")
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, expected {expected.dtype}")
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if actual.device != expected.device:
        raise AssertionError(f"{name}: on {actual.device}, expected on {expected.device}")
    shared = actual.numel() and actual.data_ptr() == expected.data_ptr()
    if shared:
        raise AssertionError(f"{name}: actual and expected are the same memory")
    same = (actual == expected) | ((actual != actual) & (expected != expected))
    if not same.all():
        at = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(
            f"{name}: {int((~same).sum())} of {same.numel()} differ; "
            f"first at {at}: {actual[at].item()} where {expected[at].item()} is expected"
        )
