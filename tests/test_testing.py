"""The comparator, the ledger and the strategies are tested too: right answers pass, wrong ones fail."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import harness
import hypothesis
import pytest
import torch
from harness import DTYPES
from hypothesis import given
from strategies import LAYOUTS, MASKS, VALUES, draw, draw_mask, generator, lay_out, layer_cases
from torch import Tensor

from reference.testing import STAGES, assert_identical, assert_matches
from tests.faults.results import RESULTS, ResultFault

ROOT = Path(__file__).parents[1]
# The router computes in float32 or float64 only, and its budgets hold for these.
ROUTER = ("logits", "scores", "solver_gradient", "router_gradient")
STAGE_AND_DTYPE = pytest.mark.parametrize(
    ("stage", "dtype"),
    [(stage, dtype) for stage in STAGES for dtype in (DTYPES[:2] if stage in ROUTER else DTYPES)],
    ids=lambda v: str(v).removeprefix("torch."),
)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def problem(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v, and actual (another order of summation), oracle, baseline of a small attention."""
    g = generator(0)
    q, k, v = (torch.randn(2, 40, 16, generator=g, dtype=torch.float64).to(dtype).to(device) for _ in range(3))
    oracle = attention(q.double(), k.double(), v.double())
    low = torch.float32 if dtype == torch.float64 else dtype
    baseline = attention(q.to(low), k.to(low), v.to(low))
    order = torch.randperm(40, generator=g).to(device)
    return v, attention(q, k[:, order], v[:, order]), oracle, baseline


@STAGE_AND_DTYPE
def test_another_order_of_summation_passes(dtype: torch.dtype, stage: str, device: torch.device) -> None:
    _, actual, oracle, baseline = problem(dtype, device)
    match = assert_matches(actual, oracle, baseline, stage=stage)
    assert 0 < match.fraction <= 1
    assert match.fraction == max(match.by_element, match.by_row)


@STAGE_AND_DTYPE
@pytest.mark.parametrize("fault", [fault for fault in RESULTS.values() if fault.gross], ids=lambda fault: fault.name)
def test_gross_faults_fail(dtype: torch.dtype, fault: ResultFault, stage: str, device: torch.device) -> None:
    v, actual, oracle, baseline = problem(dtype, device)
    with pytest.raises(AssertionError):
        assert_matches(fault.change(actual, v), oracle, baseline, stage=stage)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lost_diagonal_key_fails(dtype: torch.dtype, device: torch.device) -> None:
    """Invisible to rules over whole tensors when the sequence is long: one key of 400 is missing in every row."""
    g = generator(1)
    q, k, v = (torch.randn(1, 400, 16, generator=g, dtype=torch.float64).to(dtype).to(device) for _ in range(3))
    low = torch.float32 if dtype == torch.float64 else dtype
    oracle = attention(q.double(), k.double(), v.double())
    baseline = attention(q.to(low), k.to(low), v.to(low))
    logits = (q @ k.mT * 0.25).masked_fill(torch.eye(400, dtype=torch.bool, device=device), -math.inf)
    with pytest.raises(AssertionError):
        assert_matches(logits.softmax(-1) @ v, oracle, baseline, stage="routed_attention")


def test_a_small_lost_row_fails_among_large_ones(device: torch.device) -> None:
    """By element it would pass: the row is 2% of the largest, and the baseline errs by 1% of that."""
    oracle = torch.randn(50, 16, generator=generator(2), dtype=torch.float64).to(device)
    oracle[7] *= 0.02
    baseline = (oracle + 0.01 * oracle.norm(dim=-1, keepdim=True) * torch.randn_like(oracle) / 4).float()
    actual = oracle.float()
    assert_matches(actual, oracle, baseline, stage="routed_attention")
    actual[7] = 0
    with pytest.raises(AssertionError, match="row 7 worst"):
        assert_matches(actual, oracle, baseline, stage="routed_attention")


def test_form_of_the_arguments(device: torch.device) -> None:
    _, actual, oracle, baseline = problem(torch.float32, device)
    with pytest.raises(AssertionError, match="dtype"):
        assert_matches(actual, oracle, baseline.half(), stage="logits")
    with pytest.raises(AssertionError, match="shape"):
        assert_matches(actual[:1], oracle, baseline, stage="logits")
    with pytest.raises(AssertionError, match="shape"):
        assert_matches(actual, oracle, baseline[:, :1], stage="logits")
    with pytest.raises(AssertionError, match="shares memory with the baseline"):
        assert_matches(baseline.view_as(baseline), oracle, baseline, stage="logits")
    with pytest.raises(AssertionError, match="shares memory with the oracle"):
        assert_matches(oracle, oracle, baseline, stage="logits")
    with pytest.raises(TypeError, match="oracle"):
        assert_matches(actual, oracle.float(), baseline, stage="logits")
    with pytest.raises(TypeError, match="actual"):
        assert_matches(actual.tolist(), oracle, baseline, stage="logits")
    with pytest.raises(ValueError, match="stage"):
        assert_matches(actual, oracle, baseline, stage="everything")
    with pytest.raises(ValueError, match="expect"):
        assert_matches(actual, oracle, baseline, stage="logits", expect="anything")


@pytest.mark.parametrize("scale", [math.inf, math.nan, -1.0, -math.inf, True, "1", None], ids=repr)
def test_scale_is_finite(scale: object, device: torch.device) -> None:
    """An infinite one would accept anything: zeros, negated answers."""
    _, actual, oracle, baseline = problem(torch.float32, device)
    for result in (actual, torch.zeros_like(actual), -actual):
        with pytest.raises((TypeError, ValueError), match=r"^scale: expected a finite number >= 0, got "):
            assert_matches(result, oracle, baseline, stage="scores", scale=scale)
    with pytest.raises(AssertionError):
        assert_matches(-actual, oracle, baseline, stage="scores", scale=1.0)


def test_dtypes_too_coarse_to_reject_anything(device: torch.device) -> None:
    """Eight units in the last place of a float8 are as large as the number."""
    _, actual, oracle, baseline = problem(torch.float32, device)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, "float16"):
        with pytest.raises(TypeError, match=r"^precision: expected one of torch\.float64, .* or None, got "):
            assert_matches(torch.zeros_like(actual), oracle, baseline, stage="logits", precision=dtype)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        coarse = torch.zeros_like(actual).to(dtype)
        with pytest.raises(
            TypeError, match=r"^actual: expected a tensor of one of torch\.float64, .* got torch\.float8"
        ):
            assert_matches(coarse, oracle, baseline.to(dtype), stage="logits")
        with pytest.raises(TypeError, match=r"^baseline: expected a tensor of one of "):
            assert_matches(actual, oracle, baseline.to(dtype), stage="logits")


# Every check that can fail, each by its message, without pytest: `-O` leaves no `assert` to rely on.
WITHOUT_ASSERTS = """
import torch
from reference.testing import assert_identical, assert_matches

def fails(message, function, *tensors, **options):
    try:
        function(*tensors, **options)
    except AssertionError as error:
        if message not in str(error):
            raise SystemExit(f"expected {message!r}, got {error}")
    else:
        raise SystemExit(f"{message!r} went through")

def matches(message, actual, oracle, baseline, **options):
    fails(message, assert_matches, actual, oracle, baseline, stage="logits", **options)

if __debug__:
    raise SystemExit("asserts are run")
o = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
b, zeros = o.float(), torch.zeros(3)
inf, nan = torch.tensor([1.0, -2.0, torch.inf]), torch.tensor([1.0, -2.0, torch.nan])
assert_matches(b.clone(), o, b, stage="logits")
assert_identical(b, b.clone())
matches("of its budget by element", -b, o, b)
matches("of its budget by element", zeros, o, b)
matches("NaN out of place", nan, o, b)
matches("NaN out of place", b.clone(), nan.double(), b, expect="nan")
matches("infinities out of place", inf, o, b)
matches("an infinity of the wrong sign", -inf, inf.double(), b)
matches("expected exact zeros", b.clone(), zeros.double(), zeros, expect="zeros")
matches("expected exact zeros", nan, zeros.double(), zeros, expect="zeros")
matches("oracle has shape", b[:2].clone(), o, b)
matches("baseline has shape", b.clone(), o, b[:2])
matches("baseline has dtype", b.clone(), o, b.half())
matches("devices", b.clone(), o, b.to("meta"))
matches("shares memory with the baseline", b, o, b)
matches("shares memory with the oracle", o, o, b)
matches("the oracle is zeros, announced as ordinary", zeros, zeros.double(), zeros.clone())
matches("the oracle is ordinary, announced as zeros", b.clone(), o, b, expect="zeros")
for message, other in (("differ", -b), ("differ", nan), ("dtype", b.half()), ("shape", b[:2].clone()), ("same", b)):
    fails(message, assert_identical, other, b)
fails("on meta", assert_identical, b.to("meta"), b)
print("all fail")
"""


def test_without_asserts() -> None:
    """python -O strips them; what is compared is compared all the same."""
    done = subprocess.run(
        [sys.executable, "-O", "-c", WITHOUT_ASSERTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all fail\n"


@pytest.mark.parametrize(
    ("oracle", "kind"),
    [
        (torch.empty(0, 3, dtype=torch.float64), "empty"),
        (torch.zeros(2, 3, dtype=torch.float64), "zeros"),
        (torch.full((2, 3), 2.0, dtype=torch.float64), "constant"),
        (torch.tensor([1.0, math.nan, 3.0], dtype=torch.float64), "nan"),
    ],
)
def test_poor_oracles_must_be_announced(oracle: Tensor, kind: str) -> None:
    actual, baseline = oracle.float(), oracle.float()
    with pytest.raises(AssertionError, match=kind):
        assert_matches(actual, oracle, baseline, stage="logits")
    assert_matches(actual, oracle, baseline, stage="logits", expect=kind)
    good = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="ordinary"):
        assert_matches(good.float(), good, good.float(), stage="logits", expect=kind)


def test_zeros_must_be_exact_and_nan_in_place() -> None:
    zeros = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="exact zeros"):
        assert_matches(torch.full((4,), 1e-30), zeros, zeros.float(), stage="logits", expect="zeros")
    oracle = torch.tensor([1.0, math.nan, math.inf, -2.0], dtype=torch.float64)
    for wrong in ([1.0, 5.0, math.inf, -2.0], [1.0, math.nan, -math.inf, -2.0], [math.nan, math.nan, math.inf, -2.0]):
        with pytest.raises(AssertionError, match=r"out of place|wrong sign"):
            assert_matches(torch.tensor(wrong), oracle, oracle.float(), stage="logits", expect="nan")


def test_numbers_whose_budget_underflows() -> None:
    """Scores far below the cut reach 1e-308; eps times that is 0, and 0 / 0 once failed a right result."""
    oracle = torch.tensor([0.0, 3e-308, 1e-310], dtype=torch.float64)
    assert assert_matches(oracle.clone(), oracle, oracle.float(), stage="scores").fraction == 0
    with pytest.raises(AssertionError):
        assert_matches(oracle + 1e-300, oracle, oracle.clone(), stage="scores")


def test_precision_of_the_chain(device: torch.device) -> None:
    """A float32 result of a bfloat16 computation is held to bfloat16, and only when this is said."""
    oracle = torch.randn(30, 16, generator=generator(3), dtype=torch.float64).to(device)
    exact = oracle.float()
    rounded = (oracle * (1 + 2e-3)).float()
    with pytest.raises(AssertionError):
        assert_matches(rounded, oracle, exact, stage="routed_attention")
    assert_matches(rounded, oracle, exact, stage="routed_attention", precision=torch.bfloat16)
    with pytest.raises(AssertionError):
        assert_matches((oracle * 1.2).float(), oracle, exact, stage="routed_attention", precision=torch.bfloat16)


def test_identical() -> None:
    a = torch.tensor([1.0, math.nan, 0.0])
    assert_identical(a, torch.tensor([1.0, math.nan, -0.0]))
    for wrong in (torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, math.nan, 1e-40]), a.double(), a[:2].clone(), a):
        with pytest.raises(AssertionError):
            assert_identical(a, wrong)
    with pytest.raises(TypeError):
        assert_identical(a, 1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values_and_are_what_they_say(layout: str) -> None:
    t = draw((3, 7, 4), "normal", 0).float()
    view = lay_out(t, layout)
    expected = t[:1].expand_as(t) if layout == "expanded" else t
    assert torch.equal(view, expected)
    assert view.is_contiguous() == (layout in ("contiguous", "unaligned"))
    if layout == "unaligned":
        assert view.data_ptr() % 16 == t.element_size()
    if layout == "expanded":
        assert view.stride(0) == 0
    if layout == "sliced":
        assert view.storage_offset() == 1
        assert view.stride(-1) == 2


@pytest.mark.parametrize("values", VALUES)
def test_value_regimes(values: str) -> None:
    t = draw((2, 30, 5), values, 1)
    assert t.shape == (2, 30, 5)
    assert t.isfinite().all()
    distinct = len({tuple(row) for row in t[0].tolist()})
    assert {"constant": distinct == 1, "ties": distinct <= 10}.get(values, distinct > 20)


@pytest.mark.parametrize("kind", [*MASKS, "long_suffix"])
def test_masks(kind: str) -> None:
    mask = draw_mask(4, 11, kind, 2)
    if kind == "none":
        assert mask is None
        return
    assert mask.shape == (4, 11)
    assert mask.dtype == torch.bool
    counts = mask.sum(1).tolist()
    held = {
        "all": all(c == 11 for c in counts),
        "all_but_one": all(c == 10 for c in counts),
        "none_valid": 0 in counts,
        "suffix": bool((mask.long().diff(dim=1) <= 0).all()),
        "long_suffix": bool((mask.long().diff(dim=1) <= 0).all()) and min(counts) >= 5,
        "random": len(set(counts)) > 1,
    }
    assert held[kind]


@given(case=layer_cases())
def test_cases_can_be_pasted_back(case: object) -> None:
    from strategies import LayerCase

    assert eval(repr(case), {"LayerCase": LayerCase}) == case


def test_of_interpreted_kernels_a_share_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `assume` rejects is no failure, after which all would be run: that took a suite of ten minutes to hours."""
    monkeypatch.setattr(harness, "interpreted", lambda: True)
    monkeypatch.setattr(harness, "current", harness.Ledger("triton"))
    runs = []

    @hypothesis.settings(max_examples=100, database=None)
    @hypothesis.given(hypothesis.strategies.integers())
    @harness.counted
    def check(_: int) -> None:
        runs.append(1)
        hypothesis.assume(len(runs) % 3)

    check()
    enough = 100 // harness.INTERPRETED_SHARE
    assert harness.current.examples == enough
    assert len(runs) <= 2 * enough
