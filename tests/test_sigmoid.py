"""solver="sigmoid": the score of a token is the sigmoid of its own logit. No token has a say in another's."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from harness import BOTH, EVERY_KERNEL, check, counted
from hypothesis import assume, example, given
from strategies import LayerCase, RouterCase, layer_cases, router_cases
from torch import Tensor

import optimized
import reference
from reference import oracle

OF_NO_USE = ("n_iters", "fetch_k_ratio", "eps", "eps_init", "eps_decay")


def by_sigmoid(case: Any) -> Any:
    """The case with this solver, which takes no options of others."""
    options = {name: v for name, v in case.options.items() if name not in OF_NO_USE}
    return replace(case, options=options | {"solver": "sigmoid"})


def numbers(t: Tensor | None) -> np.ndarray | None:
    return None if t is None else t.detach().cpu().numpy()


# --- the router


@BOTH
@given(case=router_cases(values=("normal", "integer")))
@example(case=RouterCase(n=9, k=6, options={"route_block_size": 4, "straight_through": False}))  # a short last block
@counted
def test_routes(implementation: ModuleType, case: RouterCase, device: torch.device) -> None:
    """What is chosen, and scores, by the definition."""
    case = by_sigmoid(case)
    assume(case.dim > 1 or not case.options.get("cosine_sim_routing"))  # then all logits are one of two, up to rounding
    x, tokens, mask = (None if t is None else t.to(device) for t in case.tensors())
    made = implementation.route(x, tokens, case.k, mask, **case.options)
    expected = oracle.route(numbers(x), numbers(tokens), case.k, numbers(mask), **case.options)
    for actual, e in ((made.indices, expected.indices), (made.mask, expected.mask)):
        assert np.array_equal(numbers(actual), e)
    np.testing.assert_allclose(numbers(made.scores), expected.scores, rtol=1e-12, atol=1e-14)


@BOTH
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("k", [3, 9, 20])
def test_every_chosen_logit_has_a_gradient(
    implementation: ModuleType, k: int, straight_through: bool, device: torch.device
) -> None:
    """That of the sigmoid: with scores of 1 too, and where all tokens are chosen, a masked one not."""
    x, tokens, mask = (t.to(device) for t in RouterCase(n=9, k=k, mask="random").tensors())  # type: ignore[union-attr]
    x.requires_grad_()
    options: dict[str, Any] = {"solver": "sigmoid", "straight_through": straight_through}
    routes = implementation.route(x, tokens, k, mask, **options)
    soft = routes.logits.gather(-1, routes.indices).sigmoid()
    expected = torch.where(routes.mask, torch.ones_like(soft) if straight_through else soft, 0)
    torch.testing.assert_close(routes.scores, expected, rtol=1e-14, atol=0)
    g = torch.arange(1.0, 1 + routes.scores.numel(), device=device, dtype=x.dtype).view_as(routes.scores)
    (actual,) = torch.autograd.grad(routes.scores, x, g, retain_graph=True)
    slopes = torch.where(routes.mask, g * soft * (1 - soft), 0).detach()
    (e,) = torch.autograd.grad(routes.logits.gather(-1, routes.indices), x, slopes)
    torch.testing.assert_close(actual, e, rtol=1e-12, atol=1e-14)
    assert actual.any()


@BOTH
def test_straight_through_scores_are_1(implementation: ModuleType, device: torch.device) -> None:
    """Exactly, in float32."""
    x, tokens, _ = (None if t is None else t.float().to(device) for t in RouterCase(n=300, k=200).tensors())
    scores = implementation.route(x, tokens, 200, solver="sigmoid", straight_through=True).scores
    assert torch.equal(scores, torch.ones_like(scores))


@BOTH
@pytest.mark.parametrize("k", [3, 6, 20])
@pytest.mark.parametrize("straight_through", [False, True])
def test_a_nan_is_its_own(implementation: ModuleType, k: int, straight_through: bool, device: torch.device) -> None:
    x, tokens, _ = (None if t is None else t.to(device) for t in RouterCase(n=7, k=k).tensors())
    assert x is not None
    clean = implementation.route(x, tokens, k, solver="sigmoid", straight_through=straight_through)
    x[0, 2] = math.nan
    routes = implementation.route(x, tokens, k, solver="sigmoid", straight_through=straight_through)
    spoiled = routes.mask & (routes.indices == 2)
    spoiled[1] = False
    assert torch.equal(routes.scores.isnan(), spoiled)
    assert spoiled.any() == (k >= 7)  # it ranks last
    assert torch.equal(routes.scores[1], clean.scores[1])


# --- the layer


@given(case=layer_cases(values=("normal",)))
@counted
def test_the_layer_by_definition(case: LayerCase, device: torch.device) -> None:
    case = by_sigmoid(case)
    layer = reference.MixtureOfAttention(**case.arguments(), dtype=torch.float64, device=device)
    layer.load_state_dict(case.state())
    given_ = {name: t.to(device) for name, t in case.inputs().items()}
    arguments = {name: numbers(t) for name, t in given_.items()}
    expected = oracle.mixture_of_attention(
        arguments.pop("x"), {name: numbers(t) for name, t in layer.state_dict().items()},
        num_routed_queries=case.k_q, num_routed_key_values=case.k_kv, heads=case.heads,
        local_attn_window_size=case.window, average_routed=case.average, router_options=case.options, **arguments,
    )  # fmt: skip
    torch.testing.assert_close(layer(**given_).detach().cpu(), torch.from_numpy(expected), rtol=1e-9, atol=1e-10)


@pytest.mark.interpreted
@EVERY_KERNEL
@given(case=layer_cases(values=("normal",)))
@counted
def test_optimized_matches(kernels: str, case: LayerCase, device: torch.device) -> None:
    """Values, and gradients of the input and all parameters."""
    case = by_sigmoid(case)
    found = []
    for package in (reference, optimized):
        layer = package.MixtureOfAttention(**case.arguments(), dtype=torch.float64, device=device)
        layer.load_state_dict(case.state())
        given_ = {name: t.to(device) for name, t in case.inputs().items()}
        given_["x"].requires_grad_()
        out = layer(**given_)
        g = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view_as(out)
        found.append((out, *torch.autograd.grad(out, [given_["x"], *layer.parameters()], g)))
    for i, (expected, actual) in enumerate(zip(*found)):
        near = {"rtol": 1e-8, "atol": 1e-9 * (1 + expected.abs().amax().item() if expected.numel() else 1)}
        torch.testing.assert_close(actual, expected, **near, msg=lambda m, i=i: f"{i}: {m}")


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(kernels: str, dtype: torch.dtype, device: torch.device) -> None:
    """Within the budget of routed attention, with the reference's decisions."""
    case = by_sigmoid(LayerCase(n=40, k_q=9, k_kv=11, options={"cosine_sim_routing": True, "straight_through": False}))
    results = []
    for package, kind in ((reference, torch.float64), (reference, dtype), (optimized, dtype)):
        layer = package.MixtureOfAttention(**case.arguments(), dtype=kind, device=device)
        layer.load_state_dict({name: t.to(dtype) for name, t in case.state().items()})
        x = case.inputs()["x"].to(dtype).to(device=device, dtype=kind)
        decided = results[0][1] if results else None
        routes = decided and tuple(r._replace(scores=r.scores.to(torch.float32)) for r in decided)
        results.append(layer(x, routes=routes, return_routes=True))
    (exact, _), (baseline, _), (actual, _) = results
    check(actual, exact, baseline, stage="mixture")


@BOTH
@pytest.mark.parametrize("name", OF_NO_USE)
def test_options_of_other_solvers_are_refused(implementation: ModuleType, name: str) -> None:
    arguments = LayerCase(options={"solver": "sigmoid", name: 1}).arguments()
    with pytest.raises(ValueError, match=f"^{name}: expected no option of a solver with solver='sigmoid'"):
        implementation.MixtureOfAttention(**arguments)


def test_a_compiled_layer_is_the_eager_one(device: torch.device) -> None:
    """For several lengths, on either side of K."""
    case = by_sigmoid(LayerCase(k_q=5, k_kv=7, options={"cosine_sim_routing": True}))
    layer = optimized.MixtureOfAttention(**case.arguments(), dtype=torch.float64, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (3, 6, 12):
        x = replace(case, n=n).inputs()["x"].to(device)
        runs = []
        for run in (layer, compiled):
            leaf = x.clone().requires_grad_()
            out = run(leaf)
            runs.append((out, *torch.autograd.grad(out.square().sum(), [leaf, *layer.parameters()])))
        for actual, expected in zip(*runs):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_fused_path_is_taken(device: torch.device) -> None:
    case = by_sigmoid(LayerCase())
    layer = optimized.MixtureOfAttention(**case.arguments(), dtype=torch.float64, device=device)
    assert optimized.explain(layer, case.inputs()["x"].to(device)).path == "fused"
