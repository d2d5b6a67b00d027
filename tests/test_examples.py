"""The three documented examples run as they stand, but for the import; with N = 400 the routers work too."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from harness import check, check_identical

import optimized
import reference

BOTH = pytest.mark.parametrize("implementation", [optimized, reference], ids=["optimized", "reference"])
EXAMPLES = {
    "basic": {},
    "local attention": {"local_attn": True, "local_attn_window_size": 5},
    "pre-normalization and dropout": {"prenorm": True, "dropout": 0.1},
}


@BOTH
@pytest.mark.parametrize("extra", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_documented_example(implementation: ModuleType, extra: dict, device: torch.device) -> None:
    dim = 512
    model = implementation.MixtureOfAttention(
        dim, num_routed_queries=100, num_routed_key_values=100, num_experts=4, **extra
    ).to(device)
    x = torch.rand(16, 50, dim, device=device)
    output = model(x)
    assert output.shape == (16, 50, dim)
    assert output.isfinite().all()
    output.square().mean().backward()
    assert model.attn.to_q.weight.grad.any()
    # N <= K: nothing to choose, so the routers have nothing to learn from.
    assert not model.query_router.routing_token.grad.any()


@BOTH
@pytest.mark.parametrize("extra", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_twin_that_routes(implementation: ModuleType, extra: dict, device: torch.device) -> None:
    """N = 400 > K = 100. Cosine routing: raw dot products at D = 512 saturate, as docs/layer.md says."""
    dim = 512
    model = implementation.MixtureOfAttention(
        dim, num_routed_queries=100, num_routed_key_values=100, num_experts=4, cosine_sim_routing=True, **extra
    ).to(device)
    x = torch.rand(2, 400, dim, device=device)
    output, routes = model(x, return_routes=True)
    assert output.shape == (2, 400, dim)
    for side in routes:
        assert side.indices.shape == (2, 4, 100)
        assert (side.indices.diff(dim=-1) > 0).all()
        assert (side.load == 100).all()
    output.square().mean().backward()
    assert model.query_router.routing_token.grad.any()
    assert model.key_value_router.routing_token.grad.any()


@pytest.mark.parametrize("extra", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_twin_agrees_with_the_reference(extra: dict, device: torch.device) -> None:
    """At the size of the examples, float32, the oracle's routes injected."""
    arguments = {"num_routed_queries": 100, "num_routed_key_values": 100, "num_experts": 4, **extra}
    fast = optimized.MixtureOfAttention(512, **arguments).to(device).eval()
    plain = reference.MixtureOfAttention(512, **arguments).to(device).eval()
    exact = reference.MixtureOfAttention(512, **arguments).to(device).double().eval()
    plain.load_state_dict(fast.state_dict())
    exact.load_state_dict(fast.state_dict())
    x = torch.randn(2, 400, 512, device=device)
    oracle, routes = exact(x.double(), return_routes=True)
    injected = tuple(r._replace(scores=r.scores.detach().float()) for r in routes)
    check(fast(x, routes=injected), oracle, plain(x, routes=injected), stage="mixture")
    found = fast(x, return_routes=True)[1]
    for a, b in zip(found, routes):
        # Random logits of spread 22: none lies within rounding of the 100th.
        check_identical(a.indices, b.indices)
