"""The strictly causal layer: no token reaches an earlier one, and any way to run it gives what the oracle gives.

The oracle computes each token from the tokens before it alone, so it cannot leak. Autograd does not see a leak through
a selection: the tokens after a cut are changed, and what came before it must stay the same bit for bit.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from harness import BOTH, EVERY_KERNEL, counted
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import generator
from torch import Tensor

import optimized
import reference
from optimized.autoregressive_routing import _exact_dual
from reference import autoregressive
from reference.autoregressive_oracle import mixture_of_autoregressive_attention
from reference.contract import RouterOptions
from reference.routing import dual_of

SMALL: dict[str, Any] = {
    "dim": 6,
    "num_routed_queries": 2,
    "num_routed_key_values": 5,
    "local_attn_window_size": 4,
    "num_experts": 3,
    "dim_head": 4,
    "heads": 2,
}
RAW: dict[str, Any] = {
    **SMALL,
    "num_routed_queries": 1,
    "num_routed_key_values": 1,
    "local_attn_window_size": 1,
    "prenorm": False,
    "solver": "iterative",
    "cosine_sim_routing": False,
}
# As `cases` draws them; three of four tokens are queries.
HARD: dict[str, Any] = {
    "routed_window_size": 4,
    "num_routed_queries": 3,
    "local_attn_heads": None,
    "capacity_factor": 2.0,
    "prenorm": True,
    "average_routed": False,
    "straight_through": False,
    "cosine_sim_routing": True,
}
ALONE: dict[str, Any] = {
    "routed_window_size": 2,
    "num_routed_queries": 1,
    "dim_head": 2,
    "heads": 1,
    "prenorm": False,
    "capacity_factor": 1.0,
    "cosine_sim_routing": False,
    "solver": "exact",
    "fetch_k_ratio": 1.0,
}
SOLVERS = ("sigmoid", "iterative", "exact")


@dataclass(frozen=True)
class Case:
    options: dict[str, Any]  # of the constructor
    batch: int
    n: int
    seed: int
    masked: bool = False
    rotary: bool = False
    ties: bool = False  # equal neighbours

    def layer(self, implementation: ModuleType, device: torch.device) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            layer = implementation.MixtureOfAutoregressiveAttention(**self.options, dtype=torch.float64)
            torch.nn.init.normal_(layer.null_tokens)
        return layer.to(device)

    def normal(self, *shape: int, seed: int, device: torch.device) -> Tensor:
        return torch.randn(shape, generator=generator(31 * self.seed + seed), dtype=torch.float64).to(device)

    def call(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        x, given = self.normal(self.batch, self.n, self.options["dim"], seed=1, device=device), {}
        if self.ties and self.n > 2:
            x[:, 1:-1:2] = x[:, 2::2]
        if self.masked:
            drawn = torch.rand(self.batch, self.n, generator=generator(self.seed)) < 0.7
            if self.seed % 2:  # items lie in different blocks
                drawn[0, : 2 * self.n // 3] = False
            given["mask"] = drawn.to(device)
        if self.rotary:
            angles = self.normal(self.n + 2, self.options["dim_head"], seed=2, device=device)
            given["rotary_emb"] = angles
        return x, given


@st.composite
def cases(draw_: st.DrawFn, solvers: tuple[str, ...] = SOLVERS) -> Case:
    width = draw_(st.integers(1, 5))
    options = {
        "dim": 6,
        "routed_window_size": width,
        "local_attn_window_size": draw_(st.sampled_from((1, 2, 3, 7))),
        "num_routed_queries": draw_(st.sampled_from(sorted({1, 2, max(width - 1, 1), width, width + 1}))),
        "num_routed_key_values": draw_(st.sampled_from(sorted({1, 2, 3, width, 2 * width, 2 * width + 1, 40}))),
        "num_experts": draw_(st.integers(1, 3)),
        "dim_head": draw_(st.sampled_from((2, 4))),
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
    n = draw_(st.sampled_from(sorted({0, 1, width - 1, width, width + 1, 2 * width, 3 * width + 1, 13})))
    flags = {name: draw_(st.booleans()) for name in ("masked", "rotary", "ties")}
    return Case(options, draw_(st.integers(1, 2)), n, draw_(st.integers(0, 2**20)), **flags)


def of_oracle(layer: Any, case: Case, x: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, list]:
    o = case.options
    state = {name: t.detach().cpu().numpy() for name, t in layer.state_dict().items()}
    names = "num_routed_queries num_routed_key_values local_attn_window_size routed_window_size heads local_attn_heads"
    options = {name: o[name] for name in (*names.split(), "capacity_factor", "average_routed")}
    chosen = ("solver", "straight_through", "cosine_sim_routing", "fetch_k_ratio", "eps", "n_iters")
    router = {name: o[name] for name in chosen if name in o}
    out, decisions = mixture_of_autoregressive_attention(
        x.cpu().numpy(), state, **{name: t.cpu().numpy() for name, t in given.items()}, **options, router_options=router
    )
    return torch.from_numpy(out), decisions


def same(actual: Tensor, expected: Tensor, within: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=within, atol=within, equal_nan=True)


# --- the definition


# The mass of the threshold's dual, bound by the block: beyond it, and at it.
@BOTH
@example(case=Case({**SMALL, **HARD, "solver": "iterative", "fetch_k_ratio": 2.0, "n_iters": 3, "eps": 0.5}, 1, 13, 3))
@example(case=Case({**SMALL, **HARD, "solver": "exact", "fetch_k_ratio": 4 / 3}, 1, 13, 3))
# A token alone that amounts to the mass of its block, by rounding, and a later one above it.
@example(case=Case({**RAW, **HARD, **ALONE}, 1, 3, 0))
@given(case=cases())
@counted
def test_the_oracle(implementation: ModuleType, case: Case, device: torch.device) -> None:
    """Values, and which tokens are routed and remembered, a NaN among the tokens or not."""
    layer, (x, given) = case.layer(implementation, device), case.call(device)
    for spoil in (False, True):
        if spoil and case.n:
            x[0, case.seed % case.n] = math.nan
        with mock.patch.object(autoregressive, "ROWS", 3 if spoil else 128):  # queries of local attention at a time
            out, (queries, memory) = layer(x, **given, return_routes=True)
        expected, decisions = of_oracle(layer, case, x, given)
        same(out.detach().cpu(), expected)
        check_decisions(queries, memory, decisions, given.get("mask"), case.options["routed_window_size"])


def check_decisions(queries: Any, memory: Any, decisions: list, mask: Tensor | None, width: int) -> None:
    for b, tokens in enumerate(decisions):
        places = range(queries.logits.shape[-1]) if mask is None else mask[b].nonzero().flatten().tolist()
        for p, (place, experts) in enumerate(zip(places, tokens, strict=True)):
            for e, decision in enumerate(experts):
                held = queries.mask[b, e, p // width] & (queries.indices[b, e, p // width] == place)
                assert bool(held.any()) == decision.routed
                if decision.routed:
                    score = queries.scores[b, e, p // width][held].item()
                    np.testing.assert_allclose(score, decision.query_score, rtol=1e-9, atol=1e-12)
                seen = memory.mask[b, e, p // width]
                if p >= width:
                    assert memory.positions[b, e, p // width][seen].tolist() == decision.memory
                    scores = memory.scores[b, e, p // width][seen].detach().cpu().numpy()
                    np.testing.assert_allclose(scores, decision.memory_scores, rtol=1e-9, atol=1e-12)


# --- the law


def tails(case: Case, layer: Any, x: Tensor, cut: int) -> dict[str, Tensor]:
    """What comes from the cut on, changed. Where nothing comes before the cut, or after it, one way stands for all."""
    if cut in (0, case.n):
        return {"noise": torch.cat((x[:, :cut], case.normal(*x[:, cut:].shape, seed=3, device=x.device)), 1)}
    tokens = {name: t.detach() for name, t in layer.named_parameters() if name.endswith("routing_token")}
    rest = x[:, cut:]
    changed = {
        "noise": case.normal(*rest.shape, seed=3, device=x.device),
        "nan": torch.full_like(rest, math.nan),
        "inf": torch.full_like(rest, math.inf),
        "huge": torch.full_like(rest, 1e300),
        "reversed": rest.flip(1),
        "shown before": x[:, :1].expand_as(rest),
    }
    for name, token in tokens.items():  # logits that overflow, which a sum of any signs would not
        for sign in (1, -1):
            changed[f"{sign} times a {name}"] = (sign * 1e308 * token[0].sign()).expand_as(rest)
    return {name: torch.cat((x[:, :cut], tail), 1) for name, tail in changed.items()}


def output_and_gradient(layer: Any, x: Tensor, given: dict[str, Tensor], cut: int, g: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens before the cut, of a loss on them alone."""
    x = x.clone().requires_grad_()
    out = layer(x, **given)[:, :cut]
    (gradient,) = torch.autograd.grad(out, x, g[:, :cut])
    return out.detach(), gradient[:, :cut]


@BOTH
@given(case=cases(), cut=st.floats(0, 1))
@example(case=Case({**SMALL, "solver": "sigmoid"}, 2, 13, 5), cut=0.5)
# A NaN score of an earlier token's value, and a NaN logit in an empty slot beside the dual of earlier tokens.
@example(case=Case({**RAW, "routed_window_size": 1}, 1, 4, 0), cut=0.5)
@example(case=Case({**RAW, "routed_window_size": 2}, 1, 3, 0), cut=0.5)
# An expert's output that overflows, times a score that depends on earlier tokens.
@example(case=Case({**RAW, "routed_window_size": 3, "cosine_sim_routing": True, "n_iters": 3}, 2, 6, 0), cut=0.125)
# An infinite logit in a row that a solver shares with earlier tokens.
@example(case=Case({**RAW, "routed_window_size": 4, "solver": "exact"}, 1, 11, 0), cut=0.55)
@example(case=Case({**RAW, "routed_window_size": 4, "solver": "exact", "num_routed_queries": 3}, 1, 11, 1), cut=0.55)
@counted
def test_later_tokens_change_nothing(
    implementation: ModuleType, deterministic: None, case: Case, cut: float, device: torch.device
) -> None:
    """Output and gradients before the cut, bit for bit."""
    layer, (x, given) = case.layer(implementation, device), case.call(device)
    at, g = round(cut * case.n), case.normal(*x.shape, seed=4, device=device)
    expected = output_and_gradient(layer, x, given, at, g)
    assert all(t.isfinite().all() for t in expected)
    for name, changed in tails(case, layer, x, at).items():
        for actual, e in zip(output_and_gradient(layer, changed, given, at, g), expected):
            assert torch.equal(actual, e), name


@BOTH
@given(case=cases(), cut=st.floats(0, 1))
@counted
def test_later_tokens_change_no_gradient_of_parameters(
    implementation: ModuleType, deterministic: None, case: Case, cut: float, device: torch.device
) -> None:
    """Of a loss on what came before; later tokens are finite."""
    layer, (x, given) = case.layer(implementation, device), case.call(device)
    at, g = round(cut * case.n), case.normal(*x.shape, seed=4, device=device)
    found = []
    changed = tails(case, layer, x, at)
    for tokens in (x, *(changed[name] for name in ("noise", "reversed") if name in changed)):
        out = layer(tokens, **given)[:, :at]
        found.append(torch.autograd.grad(out, list(layer.parameters()), g[:, :at]))
    for changed in found[1:]:
        for actual, expected in zip(changed, found[0]):
            same(actual, expected)


@BOTH
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_cut(implementation: ModuleType, solver: str, device: torch.device) -> None:
    case = Case({**SMALL, "solver": solver}, 1, 14, 11)
    layer, (x, _) = case.layer(implementation, device), case.call(device)
    out = layer(x)
    for at in range(case.n):
        for name, changed in tails(case, layer, x, at).items():
            assert torch.equal(layer(changed)[:, :at], out[:, :at]), (at, name)


# --- what must not matter


@BOTH
@given(case=cases(), more=st.integers(0, 4))
@counted
def test_padding_anywhere(implementation: ModuleType, case: Case, more: int, device: torch.device) -> None:
    """Masked tokens, NaN among them, before, between and after the others."""
    layer, (x, given) = case.layer(implementation, device), replace(case, masked=False).call(device)
    g = case.normal(*x.shape, seed=4, device=device)
    parameters = list(layer.parameters())
    expected = layer(x, **given)
    place = torch.randperm(case.n + more, generator=generator(case.seed))[: case.n].sort().values.to(device)
    spread = torch.full((case.batch, case.n + more, x.shape[-1]), math.nan, dtype=x.dtype, device=device)
    spread[:, place] = x
    mask = torch.zeros(case.batch, case.n + more, dtype=torch.bool, device=device)
    mask[:, place] = True
    if "rotary_emb" in given:
        given["rotary_emb"] = torch.cat((given["rotary_emb"], torch.zeros(4, case.options["dim_head"]).to(x)))
    out, routes = layer(spread, mask=mask, **given, return_routes=True)
    same(out[:, place], expected)
    assert not out[~mask].any()
    for side in routes:
        assert not side.logits.masked_fill(mask[:, None], 0).any()
    found = torch.autograd.grad(out[:, place], parameters, g), torch.autograd.grad(expected, parameters, g)
    for actual, e in zip(*found):
        same(actual, e, 1e-9)


@BOTH
@given(case=cases())
@counted
def test_items_of_a_batch_are_apart(implementation: ModuleType, case: Case, device: torch.device) -> None:
    layer, (x, given) = case.layer(implementation, device), replace(case, batch=2).call(device)
    out = layer(x, **given)
    x[1] = math.nan
    assert torch.equal(layer(x, **given)[0], out[0])


# --- the cache


def in_pieces(layer: Any, x: Tensor, given: dict[str, Tensor], lengths: list[int], cache: Any = None) -> Any:
    """Output and cache of x, passed piece by piece."""
    mask, rotary = given.get("mask"), given.get("rotary_emb")
    outs, told, at = [], [], 0
    for length in lengths:
        piece = slice(at, at + length)
        shown = None if mask is None else mask[:, piece]
        out, cache, routes = layer(x[:, piece], shown, rotary, cache, use_cache=True, return_routes=True)
        outs.append(out)
        told.append(torch.stack([r.logits for r in routes]))
        at += length
    if not outs:
        return x, cache
    assume(equally_good(x[:, :at], None if mask is None else mask[:, :at], torch.cat(told, -1)))
    return torch.cat(outs, 1), cache


def whole_of(layer: Any, x: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Output of x at once."""
    out, routes = layer(x, **given, return_routes=True)
    assume(equally_good(x, given.get("mask"), torch.stack([r.logits for r in routes])))
    return out


def equally_good(x: Tensor, mask: Tensor | None, logits: Tensor) -> bool:
    """Whether equal neighbours have equal logits (2, B, E, N): on some CPUs products round by the row, and by shape."""
    equal = (x[:, 1:] == x[:, :-1]).all(-1)
    if mask is not None:
        equal &= mask[:, 1:] & mask[:, :-1]
    return bool((logits.diff(dim=-1) == 0)[:, equal[:, None].expand(logits[0, ..., 1:].shape)].all())


@st.composite
def pieces(draw_: st.DrawFn) -> tuple[Case, list[int]]:
    case, left, lengths = draw_(cases(("sigmoid",))), 0, []
    left = case.n
    while left:
        lengths.append(draw_(st.integers(0, left)) if len(lengths) < 8 else left)
        left -= lengths[-1]
    return case, lengths


@BOTH
@given(drawn=pieces())
# Items in different blocks where a call ends: item 0 has half as many tokens.
@example(drawn=(Case({**SMALL, "capacity_factor": 2.0}, 2, 24, 5, masked=True), [15, 9]))
@example(drawn=(Case({**SMALL, "capacity_factor": 2.0}, 2, 24, 7, masked=True), [19, 1, 4]))
@counted
def test_any_pieces_are_the_whole(
    implementation: ModuleType, drawn: tuple[Case, list[int]], device: torch.device
) -> None:
    """Values, and gradients through the steps."""
    case, lengths = drawn
    layer, (x, given) = case.layer(implementation, device), case.call(device)
    x.requires_grad_()
    leaves, g = (x, *layer.parameters()), case.normal(*x.shape, seed=4, device=device)
    whole, (out, cache) = whole_of(layer, x, given), in_pieces(layer, x, given, lengths)
    same(out, whole)
    if lengths:
        for actual, expected in zip(*(torch.autograd.grad(t, leaves, g) for t in (out, whole))):
            same(actual, expected, 1e-9)
        assert cache.length.tolist() == (given["mask"].sum(1).tolist() if case.masked else [case.n] * case.batch)


@pytest.mark.cpu
@pytest.mark.parametrize("implementation", ["reference", "torch"], indirect=True)
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_tokens_are_ranked_alike_in_any_pieces(
    implementation: ModuleType, cosine: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Of four symbols, as below a layer that knows positions: the bits of their logits decide, however many stand
    beside one. A product of matrices has others for one row. On a GPU, where PyTorch's sums choose their order by the
    shape, our kernel has one for all.
    """
    for seed in range(5):
        case = Case({**SMALL, "cosine_sim_routing": cosine}, 1, 40, seed)
        layer = case.layer(implementation, device).to(dtype)
        symbols = case.normal(4, case.call(device)[0].shape[-1], seed=6, device=device).to(dtype)
        x = symbols[torch.randint(4, (1, 40), generator=generator(seed)).to(device)]
        with torch.no_grad():
            whole, (picked, _) = layer(x, return_routes=True)
            _, (again, _) = layer(x.mT.contiguous().mT, return_routes=True)
            out, _ = in_pieces(layer, x, {}, [13] + 27 * [1])
        same(picked.indices.double(), again.indices.double())
        wrong = (out - whole).abs().amax(-1) > 100 * torch.finfo(dtype).eps * whole.abs().max()
        assert not wrong.any(), wrong.nonzero()


@BOTH
@pytest.mark.parametrize("lengths", [[7], [0, 7], [3, 4], [2, 1, 4]], ids=str)
def test_a_slot_without_a_query_spoils_no_weight(
    implementation: ModuleType, lengths: list[int], device: torch.device
) -> None:
    """It sees what is remembered, a NaN here, and 0 times that would be its part of a gradient."""
    case = Case({**SMALL, "cosine_sim_routing": False}, 1, 7, 5)
    layer, (x, given) = case.layer(implementation, device), case.call(device)
    with torch.no_grad():
        layer.query_router.routing_token.copy_(torch.eye(x.shape[-1])[0])
        x[..., 0] = -torch.arange(7)  # nobody reaches what the block before set
        x[0, 0, 1] = torch.nan
    routes = layer(x, **given, return_routes=True)[1]
    assert not routes[0].mask.any()
    assert routes[1].positions.eq(0).any()
    out, _ = in_pieces(layer, x, given, lengths)
    (gradient,) = torch.autograd.grad(out, layer.attn.to_out.weight, case.normal(*out.shape, seed=4, device=device))
    assert not gradient.any()


@pytest.mark.parametrize("lengths", [None, [7], [3, 4]], ids=str)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf], ids=str)
@pytest.mark.parametrize("prenorm", [True, False])
def test_a_key_that_is_not_finite_spoils_no_weight(
    prenorm: bool, value: float, lengths: list[int] | None, device: torch.device
) -> None:
    """Who sees it passes it no gradient, and 0 times it would be its part of that of the keys' weight."""
    case = Case({**SMALL, "prenorm": prenorm}, 1, 7, 5)
    layer, (x, given) = case.layer(optimized, device), case.call(device)
    x[0, 1, 1] = value
    out = layer(x, **given) if lengths is None else in_pieces(layer, x, given, lengths)[0]
    assert out[0, 1].isnan().any()
    weights = [layer.attn.to_kv.weight, *([layer.attn.context_norm.gamma] if prenorm else [])]
    gradients = torch.autograd.grad(out, weights, case.normal(*out.shape, seed=4, device=device))
    assert all(gradient.isfinite().all() for gradient in gradients)


@BOTH
@given(drawn=pieces())
@counted
def test_routes_of_pieces(implementation: ModuleType, drawn: tuple[Case, list[int]], device: torch.device) -> None:
    """Each call tells of its own tokens; together of all."""
    case, lengths = drawn
    layer, (x, given) = case.layer(implementation, device), case.call(device)
    whole = layer(x, **given, return_routes=True)[1]
    mask, at, cache, told = given.get("mask"), 0, None, []
    for length in lengths:
        piece = slice(at, at + length)
        shown = None if mask is None else mask[:, piece]
        _, cache, routes = layer(x[:, piece], shown, given.get("rotary_emb"), cache, use_cache=True, return_routes=True)
        held = routes[0].indices[routes[0].mask]
        assert held.numel() == 0 or 0 <= held.min() <= held.max() < length
        told.append(routes)
        at += length
    if lengths:
        for i in range(2):
            same(torch.cat([routes[i].logits for routes in told], -1), whole[i].logits)
        for name in ("load", "candidates"):
            assert torch.equal(sum(getattr(r[0], name).sum(-1) for r in told), getattr(whole[0], name).sum(-1))
        scores = sum((r[0].scores * r[0].mask).sum((-1, -2)) for r in told)
        same(scores, (whole[0].scores * whole[0].mask).sum((-1, -2)))


@BOTH
@pytest.mark.cpu  # on a GPU products of other shapes round otherwise
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_half_precision_are_remembered_as_they_were(
    implementation: ModuleType, dtype: torch.dtype, device: torch.device
) -> None:
    case = Case(SMALL, 2, 23, 5)
    layer, (x, _) = case.layer(implementation, device).to(dtype), case.call(device)
    whole = layer(x.to(dtype), return_routes=True)[1][1]
    _, cache = layer(x[:, :18].to(dtype), use_cache=True)
    last = layer(x[:, 18:].to(dtype), cache=cache, return_routes=True)[1][1]
    assert cache.logits.dtype == cache.tail_kv_logits.dtype == torch.float32
    assert torch.equal(last.scores[:, :, 1], whole.scores[:, :, 5])  # of the block of tokens 20 to 23


@BOTH
@given(drawn=pieces(), back=st.floats(0, 1), seed=st.integers(0, 2**20))
@counted
def test_select_and_crop(
    implementation: ModuleType, drawn: tuple[Case, list[int]], back: float, seed: int, device: torch.device
) -> None:
    """A cache of other items, and without its newest tokens, goes on as if it had never seen the others."""
    case, lengths = drawn
    layer, (x, given) = case.layer(implementation, device), replace(case, masked=False).call(device)
    rotary = {name: torch.cat((t, t)) for name, t in given.items()}
    with torch.no_grad():
        _, cache = in_pieces(layer, x, rotary, lengths or [0])
        newest = cache.length - cache.start
        dropped = (newest * back).long()
        index = torch.randint(case.batch, (3,), generator=generator(seed)).to(device)
        more = case.normal(3, 3, x.shape[-1], seed=5, device=device)
        taken = cache.crop(dropped).select(index)
        out = layer(more, **rotary, cache=taken)
        for i, b in enumerate(index.tolist()):
            kept = x[b : b + 1, : case.n - int(dropped[b])]
            same(out[i], whole_of(layer, torch.cat((kept, more[i : i + 1]), 1), rotary)[0, kept.shape[1] :])
    for item in range(case.batch):
        for wrong in (newest[item] + 1, -1):
            too_many = dropped.clone()
            too_many[item] = wrong
            with pytest.raises(ValueError, match=r"^n: expected from 0 to \["):
                cache.crop(too_many)


@BOTH
@given(case=cases(("iterative", "exact")))
# A NaN in a block that has numbers enough for a threshold, and candidates after the first of the next.
@example(case=Case({**SMALL, **HARD, "solver": "iterative", "num_routed_queries": 2}, 1, 9, 9 * 7))
@example(case=Case({**SMALL, **HARD, "solver": "iterative", "num_routed_queries": 2}, 1, 9, 9 * 7 + 1))
@example(case=Case({**SMALL, **HARD, "solver": "exact", "num_routed_queries": 2}, 1, 15, 15 * 8 + 2))
@counted
def test_hard_scores_of_a_solver_with_a_cache(implementation: ModuleType, case: Case, device: torch.device) -> None:
    """Also which are NaN, of queries that see nothing else odd."""
    case = replace(case, options={**case.options, "straight_through": True})
    layer, (x, given) = case.layer(implementation, device), case.call(device)
    mask, rotary = given.get("mask"), given.get("rotary_emb")
    with torch.no_grad():
        for spoil in (False, True):
            if spoil and case.n:
                x[0, case.seed % case.n] = math.nan
            whole, (queries, _) = layer(x, **given, return_routes=True)
            outs, odd, cache = [whole[:, :0]], 0, None
            for t in range(case.n):
                shown = None if mask is None else mask[:, t : t + 1]
                out, cache, routes = layer(x[:, t : t + 1], shown, rotary, cache, use_cache=True, return_routes=True)
                outs.append(out)
                odd += routes[0].scores.isnan().sum()
            same(torch.cat(outs, 1), whole)
            assert odd == queries.scores.isnan().sum()


@BOTH
def test_a_cache_is_constant_in_size_and_never_changed(implementation: ModuleType, device: torch.device) -> None:
    case = Case(SMALL, 2, 40, 3)
    layer, (x, _) = case.layer(implementation, device), case.call(device)
    with torch.no_grad():
        _, cache = in_pieces(layer, x, {}, [7])
        tensors = {name: t for name, t in vars(cache).items() if isinstance(t, Tensor)}
        before = {name: t.clone() for name, t in tensors.items()}
        _, later = layer(x, cache=cache, use_cache=True)
    for name, t in tensors.items():
        torch.testing.assert_close(t, before[name], rtol=0, atol=0, equal_nan=True)
        assert getattr(later, name).shape == t.shape, name


@BOTH
def test_memory_only_forgets(implementation: ModuleType, device: torch.device) -> None:
    """M_{j + 1} is within M_j and block j."""
    case = Case({**SMALL, "routed_window_size": 3}, 1, 30, 9)
    layer, (x, _) = case.layer(implementation, device), case.call(device)
    _, (_, memory) = layer(x, return_routes=True)
    for e in range(3):
        sets = [set(p[m].tolist()) for p, m in zip(memory.positions[0, e], memory.mask[0, e])]
        for j, (now, after) in enumerate(itertools.pairwise(sets)):
            assert after <= now | set(range(3 * j, 3 * j + 3))
            assert len(after) == min(5, 3 * (j + 1))


@EVERY_KERNEL
@given(case=cases(), tokens=st.integers(1, 7))
# Items in different blocks, so that only one of them begins a block.
@example(case=Case({**SMALL, "capacity_factor": 2.0, "solver": "sigmoid"}, 2, 9, 5, masked=True), tokens=6)
@example(case=Case({**SMALL, "capacity_factor": 2.0, "solver": "sigmoid", "num_routed_queries": 4}, 1, 7, 5), tokens=3)
@counted
def test_steps_in_place(kernels: str, case: Case, tokens: int, device: torch.device) -> None:
    """Of a static cache: its buffers stay where they are, and hold what a cache holds that is a value."""
    case = replace(case, options={**case.options, "straight_through": case.options["solver"] != "sigmoid"})
    layer, (x, given) = case.layer(optimized, device), case.call(device)
    rotary = torch.cat([given["rotary_emb"]] * 4) if case.rotary else None
    if case.rotary and rotary.shape[0] < case.n + tokens:
        rotary = torch.cat([rotary] * 4)
    more = case.normal(case.batch, tokens, x.shape[-1], seed=7, device=device)
    if case.seed % 3 == 0:
        more[0, case.seed % tokens] = math.nan
    with torch.no_grad():
        _, value = layer(x, given.get("mask"), rotary, use_cache=True)
        static = value.static()
        places = {name: t.data_ptr() for name, t in vars(static).items() if isinstance(t, Tensor)}
        for t in range(tokens):
            token = more[:, t : t + 1]
            expected, value = layer(token, None, rotary, value, use_cache=True)
            same(layer.step(token, static, rotary, border=bool(static.due().any())), expected)
            for name, e in vars(value).items():
                if isinstance(e, Tensor):
                    held = getattr(static, name)
                    assert held.data_ptr() == places[name]
                    if not name.startswith(("tail", "local")):  # beyond the unfinished block these hold anything
                        same(held.to(torch.float64), e.to(torch.float64))
        held = static.value()
        assert held.passed >= int(held.length.max())
        out, again = layer(x[:, :1], None, rotary, held), layer(x[:, :1], None, rotary, value)
        same(out, again)


def test_a_missed_border_is_told(device: torch.device) -> None:
    """When it is looked at: a step waits for nothing."""
    layer = Case(SMALL, 1, 4, 1).layer(optimized, device)
    x = Case(SMALL, 1, 4, 1).call(device)[0]
    with torch.no_grad():
        static = layer(x, use_cache=True)[1].static()
        while not static.due().any():
            layer.step(x[:, :1], static)
        static.value()
        layer.step(x[:, :1], static)
        with pytest.raises(RuntimeError, match=r"^cache: expected at most \d+ tokens in an unfinished block, got"):
            static.value()


def test_a_cropped_static_cache_has_buffers_of_its_own(device: torch.device) -> None:
    """A step of either changes nothing of the other."""
    case = Case(SMALL, 2, 6, 1)
    layer, (x, _) = case.layer(optimized, device), case.call(device)
    with torch.no_grad():
        static = layer(x, use_cache=True)[1].static()
        before = static.value()
        layer.step(x[:, :1], static.crop(1))
        for name, t in vars(before).items():
            if isinstance(t, Tensor):
                same(getattr(static, name), t)


class OfValues(torch.nn.Module):
    """Somebody's module around ours: it returns what is to be kept, and writes nowhere."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any) -> Any:
        return self.inner(
            *(t.value() if isinstance(t, optimized.autoregressive_cache.StaticCache) else t for t in given)
        )


@pytest.mark.parametrize("name", ["attn", "local_attn"])
def test_steps_of_replaced_modules(name: str, device: torch.device) -> None:
    """What they keep reaches the static cache."""
    case = Case(SMALL, 2, 6, 1)
    layer, (x, _) = case.layer(optimized, device), case.call(device)
    more = case.normal(case.batch, 6, x.shape[-1], seed=7, device=device)
    setattr(layer, name, OfValues(getattr(layer, name)))
    with torch.no_grad():
        out, value = layer(x, use_cache=True)
        same(out, case.layer(optimized, device)(x))
        static = value.static()
        for t in range(6):
            token = more[:, t : t + 1]
            expected, value = layer(token, cache=value, use_cache=True)
            same(layer.step(token, static, border=bool(static.due().any())), expected)


def test_a_step_is_told_what_it_needs(device: torch.device) -> None:
    case = Case(SMALL, 2, 6, 1)
    layer, (x, _) = case.layer(optimized, device), case.call(device)
    _, cache = layer(x, use_cache=True)
    with pytest.raises(TypeError, match=r"^cache: expected a StaticCache"):
        layer.step(x[:, :1], cache)
    with pytest.raises(ValueError, match=r"^x: expected one token of every item"):
        layer.step(x[:, :2], cache.static())


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@given(case=cases(("sigmoid",)))
@counted
def test_a_library_attends_where_it_was_chosen(kernels: str, case: Case, device: torch.device) -> None:
    """Over gathered rows, though our kernels move the tokens: values and gradients."""
    layers, (x, given) = [case.layer(package, device) for package in (reference, optimized)], case.call(device)
    g, found = case.normal(*x.shape, seed=4, device=device), []
    with optimized.use_backends(routed_attention="math"):
        for layer in layers:
            leaf = x.clone().requires_grad_()
            out = layer(leaf, **given)
            found.append((out, *torch.autograd.grad(out, [leaf, *layer.parameters()], g)))
    for actual, expected in zip(*found):
        same(actual, expected, 1e-9)


# --- gradients


@BOTH
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("straight_through", [False, True])
def test_gradcheck(
    implementation: ModuleType, deterministic: None, solver: str, straight_through: bool, device: torch.device
) -> None:
    """With the scores' own values; where they are 1, against the gradient of the soft ones. Steps are far apart."""
    options = {**SMALL, "solver": solver, "cosine_sim_routing": True, "heads": 1, "num_experts": 2}
    case = Case(options | ({"eps": 2.0} if solver != "sigmoid" else {}), 1, 11, 1)
    layer, (x, _) = case.layer(implementation, device), case.call(device)
    parameters = [x.requires_grad_(), *layer.parameters()]

    def run(*leaves: Tensor) -> Tensor:
        named = dict(zip((name for name, _ in layer.named_parameters()), leaves[1:]))
        return torch.func.functional_call(layer, named, (leaves[0],))

    if not straight_through:
        assert torch.autograd.gradcheck(run, parameters, fast_mode=True)
        return
    hard = Case(case.options | {"straight_through": True}, 1, 11, 1).layer(implementation, device)
    for i in range(2):
        found = []
        for made in (layer, hard):
            routes = made(x, return_routes=True)[1][i]
            g = case.normal(*routes.scores.shape, seed=6, device=device)
            tokens = made.key_value_router.routing_token if i else made.query_router.routing_token
            found.append(torch.autograd.grad(routes.scores, (x, tokens), g))
            if made is hard:
                assert torch.equal(routes.scores, routes.mask.to(routes.scores.dtype))
        for actual, expected in zip(*found):
            assert torch.equal(actual, expected)
            assert expected.any() or solver != "sigmoid"  # a threshold saturates many scores of a solver


@BOTH
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n", [0, 1, 4, 5, 9])
def test_every_parameter_has_a_gradient(implementation: ModuleType, solver: str, n: int, device: torch.device) -> None:
    case = Case({**SMALL, "solver": solver}, 2, n, 2)
    layer, (x, _) = case.layer(implementation, device), case.call(device)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@BOTH
def test_a_constant_router_is_a_sliding_window(implementation: ModuleType, device: torch.device) -> None:
    """Of equal logits the later wins."""
    case = Case({**SMALL, "num_experts": 1}, 1, 22, 2)
    layer, (x, _) = case.layer(implementation, device), case.call(device)
    torch.nn.init.zeros_(layer.key_value_router.routing_token)
    _, (_, memory) = layer(x, return_routes=True)
    assert memory.positions[0, 0, -1].tolist() == [15, 16, 17, 18, 19]


# --- what it is told


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routed_window_size": 0}, "routed_window_size: expected an integer >= 1, got 0"),
        ({"local_attn_window_size": None}, "local_attn_window_size: expected an integer >= 1, got None"),
        ({"capacity_factor": 0.5}, "capacity_factor: expected a finite number >= 1, got 0.5"),
        ({"capacity_factor": math.inf}, "capacity_factor: expected a finite number >= 1, got inf"),
        ({"dim_head": 3}, "dim_head: expected an even number"),
        ({"local_attn_heads": -1}, "local_attn_heads: expected an integer >= 1, got -1"),
        ({"route_block_size": 4}, "route_block_size: expected no such option"),
        ({"learned_routing_tokens": True}, "learned_routing_tokens: expected False"),
        ({"n_iters": 3}, "n_iters: expected no option of a solver with solver='sigmoid'"),
        ({"solver": "softmax"}, "solver: expected 'iterative', 'exact' or 'sigmoid', got 'softmax'"),
        ({"nonsense": 1}, "router_options: expected names among"),
    ],
)
def test_bad_options(implementation: ModuleType, change: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        implementation.MixtureOfAutoregressiveAttention(**{**SMALL, **change})


@BOTH
def test_bad_calls(implementation: ModuleType, device: torch.device) -> None:
    case = Case(SMALL, 2, 6, 1)
    layer, (x, _) = case.layer(implementation, device), case.call(device)
    angles = torch.zeros(9, 4, device=device)
    _, cache = layer(x, rotary_emb=angles, use_cache=True)
    soft = Case({**SMALL, "solver": "exact"}, 2, 6, 1).layer(implementation, device)
    _, of_soft = soft(x, use_cache=True)
    one = cache.select(torch.zeros(1, dtype=torch.int64, device=device))
    rounded = replace(cache, logits=cache.logits.bfloat16())  # as by a wrapper that casts all that it finds
    refused = [
        ({"mask": x[..., 0]}, "mask: expected dtype"),
        ({"use_cache": 1}, "use_cache: expected True or False, got 1"),
        ({"cache": 3}, "cache: expected a Cache, as this layer returns it, got 3"),
        ({"cache": cache}, "rotary_emb: expected a table, as in the calls before, got None"),
        ({"cache": cache, "rotary_emb": angles}, "rotary_emb: expected at least 12 rows"),
        ({"cache": one, "rotary_emb": angles}, "cache: expected one for batch"),
        ({"cache": rounded, "rotary_emb": angles}, "cache: expected one for logits in torch.float64, got one for"),
        ({"rotary_emb": angles[:5]}, "rotary_emb: expected at least 6 rows"),
    ]
    shown = torch.zeros(2, 6, dtype=torch.bool, device=device)
    _, short = layer(x, mask=shown, rotary_emb=angles, use_cache=True)  # masked tokens are passed, too
    refused.append(({"cache": short, "rotary_emb": angles}, "rotary_emb: expected at least 12 rows"))
    for arguments, message in refused:
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            layer(x, **arguments)
    for nothing in (None, [1.0], x[0, 0]):
        with pytest.raises((TypeError, ValueError), match=r"^x: expected"):
            layer(nothing)
    for beyond in (2, -1):
        with pytest.raises(ValueError, match=r"^index: expected from 0 to 1, items of the batch"):
            cache.select(torch.tensor([0, beyond], device=device))
    if hasattr(cache, "static"):
        with pytest.raises(TypeError, match=r"^cache: expected a Cache, as `value"):
            layer(x, rotary_emb=angles, cache=cache.static())
    with pytest.raises(ValueError, match=r"^cache: expected None, or solver='sigmoid'"):
        soft(x, cache=of_soft)
    other = Case({**SMALL, "num_routed_key_values": 6}, 2, 6, 1).layer(implementation, device)
    with pytest.raises(ValueError, match=r"^cache: expected one for sizes"):
        other(x, rotary_emb=torch.zeros(20, 4, device=device), cache=cache)


# --- duals


def test_duals_are_in_the_dtype_of_the_logits(device: torch.device) -> None:
    """The mass that saturated tokens leave was a logarithm in float32: a whole number less an integer tensor."""
    options = RouterOptions(solver="exact", eps=0.3)
    logits = Case(SMALL, 1, 1, 0).normal(5, 9, seed=3, device=device)
    for mass in (2.25, 4.7):
        same(_exact_dual(logits, mass, options.eps), dual_of(logits, mass, options))
