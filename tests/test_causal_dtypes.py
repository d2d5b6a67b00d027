"""The strictly causal layer in every dtype: as exact as the reference, however it is called, and as causal.

Selections are its own: no two logits of a row are so close that rounding decides between them. The definition itself,
in float64, is the business of `test_autoregressive`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from harness import DTYPES, EVERY_KERNEL, HALF, check, check_identical, counted, expectation
from hypothesis import assume, example, given
from hypothesis import strategies as st
from runs import BASELINE_OF, LayerRun, cast, compare, watch_attention
from strategies import generator
from test_autoregressive import RAW, SMALL, SOLVERS, Case, in_pieces, output_and_gradient
from torch import Tensor

import optimized
import reference

MASKS = ("random", "left", "right", "a hole", "an item without any")
ODD = ("none", "nan", "inf")  # what a token is
WIDTHS = (1, 2, 3, 4, 5, 8, 16, 17, 33)
MARGIN = 1e-5  # between two logits, of the largest: a hundred times what float32 rounds


@dataclass(frozen=True)
class CausalCase(Case):
    """mask: of `masked`. odd: what one token of item 0 is. lengths: of the pieces that it is passed in. back: share of
    the unfinished block that is cropped. cut: share of the tokens that come before what is changed. tokens: steps.
    """

    mask: str = "random"
    odd: str = "none"
    lengths: tuple[int, ...] = ()
    back: float = 0.0
    cut: float = 0.5
    tokens: int = 1

    def layer(self, implementation: ModuleType, device: torch.device) -> Any:
        """No scale is 1 and no bias is 0."""
        layer, g = super().layer(implementation, torch.device("cpu")), generator(self.seed)
        with torch.no_grad():
            for name, p in layer.named_parameters():
                if "norm" in name:
                    p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype))
        return layer.to(device)

    def call(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        x, given = super().call(device)
        if self.masked and self.mask != "random":
            given["mask"] = self.drawn_mask().to(device)
        if self.odd != "none" and self.batch and self.n:
            x[0, self.seed % self.n] = float(self.odd)
        return x, given

    def drawn_mask(self) -> Tensor:
        g, at = generator(self.seed + 3), torch.arange(self.n)
        ends = torch.randint(self.n + 1, (self.batch, 2), generator=g).sort(-1).values[..., None]
        if self.mask == "left":
            return at >= ends[:, 0]
        if self.mask == "right":
            return at < ends[:, 1]
        if self.mask == "a hole":
            return (at < ends[:, 0]) | (at >= ends[:, 1])
        mask = torch.rand(self.batch, self.n, generator=g) < 0.7
        mask[self.seed % self.batch] = False
        return mask

    @property
    def sigmoid(self) -> bool:
        return self.options["solver"] == "sigmoid"

    def for_half(self) -> CausalCase:
        """So large that the baseline's error is typical rather than lucky; blocks end where they did."""
        width = self.options["routed_window_size"]
        more = -(-16 // width) * width
        sizes = {name: max(self.options[name], least) for name, least in (("dim", 16), ("dim_head", 8), ("heads", 2))}
        options = {**self.options, **sizes, "num_routed_key_values": self.options["num_routed_key_values"] + 4}
        return replace(self, options=options, n=self.n + more, lengths=(more, *self.lengths), ties=False, odd="none")


@st.composite
def causal_cases(draw_: st.DrawFn, *, solvers: tuple[str, ...] = SOLVERS, odd: bool = True) -> CausalCase:
    """K, Kq, w and N around one another's edges."""

    def one_of(*values: Any) -> Any:
        return draw_(st.sampled_from(sorted({v for v in values if v >= 1})))

    width = draw_(st.sampled_from(WIDTHS))
    options = {
        "dim": draw_(st.sampled_from((6, 16))),
        "routed_window_size": width,
        "local_attn_window_size": one_of(1, 2, width - 1, width, width + 1, 2 * width, 40),
        "num_routed_queries": one_of(1, 2, width // 2, width - 1, width, width + 1),
        "num_routed_key_values": one_of(1, 2, width - 1, width, width + 1, 2 * width, 2 * width + 1, 70),
        "num_experts": draw_(st.integers(1, 3)),
        "dim_head": draw_(st.sampled_from((2, 4, 8))),
        "heads": draw_(st.integers(1, 2)),
        "local_attn_heads": draw_(st.sampled_from((None, 1, 3))),
        "capacity_factor": draw_(st.sampled_from((1.0, 1.3, 2.0))),
        "prenorm": draw_(st.booleans()),
        "average_routed": draw_(st.booleans()),
        "solver": draw_(st.sampled_from(solvers)),
        "straight_through": draw_(st.booleans()),
        "cosine_sim_routing": draw_(st.booleans()),
    }
    if options["solver"] != "sigmoid":
        options["fetch_k_ratio"] = draw_(st.sampled_from((1.0, 9 / 8, 4 / 3, 2.0)))
        options["eps"] = draw_(st.sampled_from((0.03, 0.5)))
        options["n_iters"] = draw_(st.sampled_from((1, 3, 20)))
    n = max(draw_(st.integers(0, 4)) * width + draw_(st.sampled_from((-1, 0, 1, width // 2))), 0)
    lengths, left = [], n
    while left and len(lengths) < 12:
        lengths.append(min(draw_(st.sampled_from((0, 1, 1, 2, width - 1, width, width + 1, left))), left))
        left -= lengths[-1]
    return CausalCase(
        options=options,
        batch=draw_(st.integers(1, 2)),
        n=n,
        seed=draw_(st.integers(0, 2**20)),
        masked=draw_(st.booleans()),
        rotary=draw_(st.booleans()),
        ties=draw_(st.booleans()),
        mask=draw_(st.sampled_from(MASKS)),
        odd=draw_(st.sampled_from(ODD)) if odd else "none",
        lengths=(*lengths, left) if left else tuple(lengths),
        back=draw_(st.sampled_from((0.0, 0.5, 1.0))),
        cut=draw_(st.sampled_from((0.0, 0.25, 0.5, 0.75, 1.0))),
        tokens=draw_(st.integers(1, 7)),
    )


# --- as exact as the reference


def rounded(
    case: CausalCase, implementation: ModuleType, under_test: torch.dtype, dtype: torch.dtype, device: Any
) -> Any:
    """Layer, x and the other arguments, rounded to the dtype under test and held in `dtype`."""
    layer, (x, given) = case.layer(implementation, device).to(under_test).to(dtype), case.call(device)
    if "rotary_emb" in given:
        given["rotary_emb"] = given["rotary_emb"].float()
    return layer, cast(x, under_test, dtype, device), given


def run(
    implementation: ModuleType, case: CausalCase, under_test: torch.dtype, dtype: torch.dtype, device: torch.device
) -> LayerRun:
    """Forward and backward; gradients are of x and all parameters."""
    layer, x, given = rounded(case, implementation, under_test, dtype, device)
    leaves = {"x": x.requires_grad_(), **dict(layer.named_parameters())}
    with watch_attention() as sizes:
        out, routes = layer(x, **given, return_routes=True)
    g = cast(case.normal(*x.shape, seed=4, device=device), under_test, dtype, device)
    grads = torch.autograd.grad(out, list(leaves.values()), g)
    return LayerRun(out.detach(), dict(zip(leaves, grads)), routes, max(sizes))


def valid_rows(case: CausalCase, routes: Any, device: torch.device) -> Iterator[Tensor]:
    """Logits of the valid tokens of each expert, item and side."""
    mask = case.call(device)[1].get("mask")
    for side in routes:
        for b, rows in enumerate(side.logits.detach()):
            for row in rows:
                yield row if mask is None else row[mask[b]]


def told_apart(case: CausalCase, routes: Any, device: torch.device) -> bool:
    """Whether rounding decides nothing."""
    for row in valid_rows(case, routes, device):
        if len(row) > 1 and not row.sort().values.diff().min() > MARGIN * (1 + row.abs().max()):
            return False
    return True


def off_kinks(case: CausalCase) -> bool:
    """No row of a solver has about as many logits as its mass, where its iterates sit on their kinks."""
    o, width = case.options, case.options["routed_window_size"]
    ratio = o.get("fetch_k_ratio", 9 / 8)
    lengths = [width * j for j in range(1, case.n // width + 1)]
    rows = [(n, o["num_routed_key_values"]) for n in lengths] + [(width, o["num_routed_queries"])]
    return case.sigmoid or not any(k < n <= k * ratio for n, k in rows)


def chosen(routes: Any) -> list[Tensor]:
    """Who is picked, who is remembered, and how many."""
    queries, memory = routes
    at = torch.where(queries.mask, queries.indices, -1), torch.where(memory.mask, memory.positions, -1)
    return [*(t.long() for t in at), queries.mask, memory.mask, queries.load.long(), queries.candidates.long()]


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=causal_cases(odd=False))
@counted
def test_optimized_matches_where_nothing_is_close(
    kernels: str, case: CausalCase, dtype: torch.dtype, device: torch.device
) -> None:
    """Selections exactly; outputs, of the whole and of pieces, and all gradients within the budget of the dtype.

    Scores of a solver are compared in float64 and float32, and their gradients in float64, off the kinks.
    """
    case = replace(case, ties=False)
    if dtype in HALF:
        assume(case.sigmoid)
        case = case.for_half()
    exact = run(reference, case, dtype, torch.float64, device)
    assume(told_apart(case, exact.routes, device))
    # As in test_mixture: beyond, a saturated softmax leaves what its rounded output makes of delta.
    assume(dtype not in HALF or exact.logit_size <= 16)
    baseline = run(reference, case, dtype, BASELINE_OF.get(dtype, dtype), device)
    actual = run(optimized, case, dtype, dtype, device)
    assert actual.out.dtype == dtype
    for name, other in (("baseline", baseline), ("optimized", actual)):
        for got, expected in zip(chosen(other.routes), chosen(exact.routes)):
            check_identical(got, expected, name)
    if not case.sigmoid and (dtype != torch.float64 or not off_kinks(case)):
        kept = {name: g for name, g in actual.grads.items() if not name.startswith(("x", "query_", "key_"))}
        actual = replace(actual, grads=kept)
    size = max((row.abs().max().item() for row in valid_rows(case, exact.routes, device) if len(row)), default=0.0)
    growth, soft = 1 + size, size
    if not case.sigmoid:  # exp((s + a) / eps), in every step: see test_optimized_matches_with_its_own_routers
        hot = size / case.options["eps"]
        growth, soft = 1 + case.options["n_iters"] * hot, case.n + hot
    soft = 0.0 if case.options["straight_through"] else soft
    compare(actual, exact, baseline, stage="mixture", dtype=dtype, amplification=growth, soft=soft)
    if case.sigmoid or case.options["straight_through"]:
        check_pieces(case, dtype, exact, baseline, soft)


def check_pieces(case: CausalCase, dtype: torch.dtype, exact: LayerRun, baseline: LayerRun, soft: float) -> None:
    """Outputs of a call for each piece, as of the whole."""
    layer, x, given = rounded(case, optimized, dtype, dtype, exact.out.device)
    with torch.no_grad():
        out, _ = in_pieces(layer, x, given, list(case.lengths))
    size = exact.out.abs().max().item() if exact.out.numel() else 0.0
    scale = 0.0 if dtype in HALF else (1 + soft + exact.logit_size) * size
    expect = expectation(exact.out)
    check(out, exact.out, baseline.out, stage="mixture", name="pieces", expect=expect, scale=scale)


# --- as causal


# Whole tiles of the library's attention, and a tail.
EIGHTS = CausalCase({**SMALL, "dim": 16, "dim_head": 8, "local_attn_window_size": 7, "routed_window_size": 8}, 2, 37, 5)


def tails(case: CausalCase, x: Tensor, cut: int) -> Iterator[tuple[str, Tensor]]:
    """What comes from the cut on, changed. Where nothing comes before the cut, or after it, one way stands for all."""
    rest = x[:, cut:]
    largest = torch.finfo(x.dtype).max
    changed = {
        "noise": case.normal(*rest.shape, seed=3, device=x.device).to(x.dtype),
        "nan": torch.full_like(rest, math.nan),
        "inf": torch.full_like(rest, math.inf),
        "huge": torch.full_like(rest, largest) * rest.sign(),
        "reversed": rest.flip(1),
        "shown before": x[:, :1].expand_as(rest),
    }
    for name, tail in changed.items():
        if name == "noise" or 0 < cut < case.n:
            yield name, torch.cat((x[:, :cut], tail), 1)


# Finite scores that are so large that weights made anew from them, in a backward, would be infinite.
MANY = {
    "routed_window_size": 8, "num_routed_queries": 4, "num_routed_key_values": 16, "num_experts": 3, "heads": 1,
    "solver": "iterative", "cosine_sim_routing": True, "fetch_k_ratio": 1.0, "eps": 0.03, "n_iters": 3,
}  # fmt: skip
LARGE = {**RAW, "dim_head": 2, "solver": "sigmoid", "straight_through": False, "capacity_factor": 1.0}


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=causal_cases())
@example(case=EIGHTS)
@example(case=CausalCase({**LARGE, "routed_window_size": 4, "heads": 2, "num_experts": 1}, 1, 7, 262, cut=0.25))
@example(case=CausalCase({**LARGE, "routed_window_size": 16, "heads": 1, "num_experts": 1}, 1, 15, 1, cut=0.25))
@example(case=CausalCase({**LARGE, "routed_window_size": 2, "heads": 1}, 2, 3, 1, cut=0.25))
@example(case=CausalCase({**LARGE, **MANY}, 1, 31, 3, cut=0.25))
@counted
def test_later_tokens_change_nothing_in_any_dtype(
    kernels: str, deterministic: None, case: CausalCase, dtype: torch.dtype, device: torch.device
) -> None:
    """Output and gradients before the cut, bit for bit, some of them NaN where a token before is odd."""
    check_law(case, dtype, device)


def check_law(case: CausalCase, dtype: torch.dtype, device: torch.device) -> None:
    layer, x, given = rounded(case, optimized, dtype, dtype, device)
    at = round(case.cut * case.n)
    g = case.normal(*x.shape, seed=4, device=device).to(dtype)
    expected = output_and_gradient(layer, x, given, at, g)
    assert case.odd != "none" or all(t.isfinite().all() for t in expected)
    for name, changed in tails(case, x, at):
        for actual, e in zip(output_and_gradient(layer, changed, given, at, g), expected):
            check_identical(actual, e, name)
