"""Known defects of public packages, each as a property that this layer has and the defect breaks.

Those of `RE_ENACTED` are put in, and the property must reject them: a check that can't fail proves nothing. Numbers are
those of the table in docs/differences.md. Each configuration is one in which the other defects can't fire.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from harness import BOTH, check, check_identical, interpreted
from strategies import generator
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError

import reference
from tests.faults.computations import COMPUTATIONS
from tests.faults.layers import LAYERS


def randn(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(device)


def routes(implementation: ModuleType, indices: Tensor, n: int) -> Any:
    mask = torch.ones_like(indices, dtype=torch.bool)
    logits = torch.zeros(*indices.shape[:2], n, dtype=torch.float64, device=indices.device)
    return implementation.Routes(
        indices, mask, torch.ones(indices.shape, dtype=torch.float64, device=indices.device), logits
    )


def attention_weights(experts: int, dim: int, heads: int, dim_head: int, device: torch.device) -> dict[str, Tensor]:
    inner = heads * dim_head
    return {
        "w_q": randn(experts, inner, dim, seed=1, device=device) / dim**0.5,
        "w_kv": randn(experts, 2 * inner, dim, seed=2, device=device) / dim**0.5,
        "w_out": randn(experts, dim, inner, seed=3, device=device) / inner**0.5,
        "null_kv": randn(2, experts, heads, dim_head, seed=4, device=device),
    }


@BOTH
def test_defect_01_documented_constructor_arguments(implementation: ModuleType, device: torch.device) -> None:
    """zetascale 2.8.8: all documented examples raise TypeError. Documented arguments and defaults are accepted."""
    documented = {
        "dim_context": None,
        "local_attn": False,
        "local_attn_window_size": None,
        "dim_head": 64,
        "heads": 8,
        "dropout": 0.1,
        "use_triton": True,
        "flash_attn": True,
        "prenorm": True,
        "average_routed": False,
    }
    layer = implementation.MixtureOfAttention(
        16, num_routed_queries=5, num_routed_key_values=5, num_experts=4, **documented, device=device
    )
    assert layer(torch.randn(2, 20, 16, device=device)).shape == (2, 20, 16)
    parameters = inspect.signature(implementation.MixtureOfAttention).parameters
    assert {name: parameters[name].default for name in documented} == documented


@BOTH
def test_defect_02_unit_rms(implementation: ModuleType, device: torch.device) -> None:
    """zetascale 2.8.8: RMSNorm scales by D**-0.5 instead of D**0.5.

    norm(x) is read off the attention over a single token, with W_v and W_out the identity. W_q is 0, so that the token
    and the null key, whose value is 0, have one half of the weight each.
    """
    dim = 8
    eye = torch.eye(dim, dtype=torch.float64, device=device)[None]
    pick = routes(implementation, torch.zeros(1, 1, 1, dtype=torch.long, device=device), 1)
    gamma = torch.ones(1, dim, dtype=torch.float64, device=device)
    null = torch.zeros(2, 1, 1, dim, dtype=torch.float64, device=device)
    weights = {"w_q": torch.zeros_like(eye), "w_kv": torch.cat((eye, eye), 1), "w_out": eye, "null_kv": null}
    x = 7.3 * randn(1, 1, dim, seed=5, device=device)
    out = implementation.routed_attention(x, x, pick, pick, **weights, gamma=gamma, context_gamma=gamma)
    normed = 2 * out[0, 0, 0]
    assert abs(normed.square().mean().sqrt().item() - 1) < 1e-9
    assert torch.allclose(normed, x[0, 0] / x.square().mean().sqrt())


@BOTH
def test_defect_03_expert_isolation(implementation: ModuleType, device: torch.device) -> None:
    """mixture-of-attention 0.0.25: chunk(2, dim=1) over grouped channels takes all keys from the first expert.

    Expert 0 reads tokens 0-3, expert 1 tokens 4-7: changing 4-7 leaves expert 0 as it was, bit for bit.
    """
    weights = attention_weights(2, 12, 2, 4, device)
    pick = routes(implementation, torch.arange(8, device=device).view(1, 2, 4), 8)
    x = randn(1, 8, 12, seed=6, device=device)
    changed = x.clone()
    changed[:, 4:] = randn(1, 4, 12, seed=7, device=device)
    before, after = (implementation.routed_attention(t, t, pick, pick, **weights) for t in (x, changed))
    check_identical(after[:, 0].clone(), before[:, 0].clone())
    assert not torch.equal(after[:, 1], before[:, 1])


@BOTH
def test_defect_04_one_combination_rule(implementation: ModuleType, device: torch.device) -> None:
    """mixture-of-attention 0.0.25: with N <= Kq local attention is thrown away and experts are averaged unasked.

    Every expert and the local attention are terms of one sum, or of one mean.
    """
    arguments = {"num_routed_queries": 20, "num_routed_key_values": 20, "num_experts": 3, "dim_head": 4, "heads": 2}
    x = randn(1, 12, 16, device=device)
    full = implementation.MixtureOfAttention(
        16, **arguments, local_attn=True, local_attn_window_size=3, dropout=0.0, device=device, dtype=torch.float64
    )
    state = full.state_dict()

    def run(with_local: bool, average: bool) -> Tensor:
        local = {"local_attn": True, "local_attn_window_size": 3} if with_local else {}
        layer = implementation.MixtureOfAttention(
            16, **arguments, **local, dropout=0.0, average_routed=average, device=device, dtype=torch.float64
        )
        layer.load_state_dict({k: v for k, v in state.items() if k in layer.state_dict()}, strict=False)
        return layer(x)

    total = run(True, False)
    torch.testing.assert_close(total - run(False, False), full.local_attn(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run(True, True) * 4, total, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run(False, True) * 3, run(False, False), rtol=1e-9, atol=1e-9)
    full(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in full.local_attn.parameters())


def local_weights(dim: int, heads: int, dim_head: int, device: torch.device) -> dict[str, Any]:
    inner = heads * dim_head
    w_qkv, w_out = randn(3 * inner, dim, seed=8, device=device) / 2, randn(dim, inner, seed=9, device=device) / 2
    return {"w_qkv": w_qkv, "w_out": w_out, "heads": heads}


@BOTH
def test_defect_05_padding_invariance(implementation: ModuleType, device: torch.device) -> None:
    """local-attention 1.11.2: when N is no multiple of the window, zero padding keys take softmax mass.

    N = 13 is no multiple of the window 5; neither are 14, 15 (a multiple) and 33.
    """
    weights = local_weights(8, 2, 4, device)
    x = randn(1, 13, 8, seed=10, device=device)
    expected = implementation.local_attention(x, 5, **weights)
    for n in (14, 15, 33):
        padded = torch.cat((x, torch.zeros(1, n - 13, 8, dtype=x.dtype, device=device)), 1)
        out = implementation.local_attention(padded, 5, torch.arange(n, device=device)[None] < 13, **weights)
        torch.testing.assert_close(out[:, :13], expected, rtol=1e-9, atol=1e-9)


@BOTH
def test_defect_06_relative_position(implementation: ModuleType, device: torch.device) -> None:
    """local-attention 1.11.2: queries are rotated one window too far, so that scores depend on i - j + w.

    The same tokens further right in a masked sequence have the same outputs: scores depend on i - j alone. And they
    depend on it as rotary positions do: at a distance of 0 nothing is rotated.
    """
    weights = local_weights(8, 2, 4, device)
    x = randn(1, 15, 8, seed=11, device=device)
    expected = None
    for shift in (0, 1, 5, 7, 40):
        long = torch.zeros(1, 60, 8, dtype=x.dtype, device=device)
        mask = torch.zeros(1, 60, dtype=torch.bool, device=device)
        long[:, shift : shift + 15], mask[:, shift : shift + 15] = x, True
        out = implementation.local_attention(long, 5, mask, **weights)[:, shift : shift + 15]
        expected = out if expected is None else expected
        torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-9)
    alone = torch.zeros(1, 60, dtype=torch.bool, device=device)
    alone[:, 20] = alone[:, 22] = True
    two = implementation.local_attention(torch.ones(1, 60, 8, dtype=x.dtype, device=device), 5, alone, **weights)
    # Two equal tokens at distance 2: the same value whatever the weights, in both directions.
    torch.testing.assert_close(two[:, 20], two[:, 22], rtol=1e-9, atol=1e-9)
    # By hand: one head of two channels, frequency 1. Token 0 sees itself and token 1 with logits s and s cos(1) ...
    eye = torch.eye(2, dtype=torch.float64, device=device)
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [3.0, 4.0]]], dtype=torch.float64, device=device)
    w_qkv = torch.cat((eye, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64, device=device), eye))
    out = implementation.local_attention(x, 1, w_qkv=w_qkv, w_out=eye, heads=1)

    # Token 1: q = (1, 0); keys (1, 0), (1, 0), (3, 0) at distances 1, 0, -1.
    logits = [math.cos(distance) * size / math.sqrt(2) for distance, size in ((1, 1.0), (0, 1.0), (-1, 3.0))]
    p = torch.tensor(logits, dtype=torch.float64, device=device).softmax(-1)
    torch.testing.assert_close(out[0, 1], p @ x[0], rtol=1e-9, atol=1e-9)


@BOTH
@pytest.mark.parametrize("solver", ["iterative", "exact"])
@pytest.mark.parametrize("masked", [False, True])
def test_defect_07_gradients_of_the_solvers(
    implementation: ModuleType, solver: str, masked: bool, device: torch.device
) -> None:
    """colt5-attention 0.11.2: the Triton gradient of coordinate descent is wrong (relative error 1.0).

    Finite differences in float64 of whatever computes here, our kernels too, at random logits: they are off the kinks.
    """
    logits = randn(2, 2, 6, seed=5, device=device).requires_grad_()
    mask = torch.arange(6, device=device)[None] != torch.tensor([[2], [4]], device=device) if masked else None
    if solver == "exact":
        assert gradcheck(
            lambda s: implementation.capped_simplex(s, 2.4, mask, eps=0.5), logits, fast_mode=interpreted()
        )
        return
    for n_iters, eps in ((1, 1.0), (2, 0.5), (8, 0.3)):
        options = {"n_iters": n_iters, "eps": eps, "eps_init": 2.0, "eps_decay": 0.7}
        solve = functools.partial(implementation.coordinate_descent, k=2.4, mask=mask, **options)
        assert gradcheck(solve, logits, fast_mode=interpreted())


@BOTH
@pytest.mark.parametrize("n", [40, 43])
def test_defect_09_blocks(implementation: ModuleType, n: int, device: torch.device) -> None:
    """colt5-attention 0.11.2: route_block_size raises IndexError with several blocks. N = 43 has a tail of 3."""
    x, tokens = randn(1, n, 8, device=device), randn(2, 8, seed=1, device=device)
    found = implementation.route(x, tokens, 10, route_block_size=10)
    per_block = math.ceil(10 / math.ceil(n / 10))
    for row, logits in zip(found.indices[0], found.logits[0]):
        for start in range(0, n, 10):
            length = min(10, n - start)
            inside = row[(row >= start) & (row < start + 10)]
            best = logits[start : start + length].topk(min(per_block, length)).indices.sort().values + start
            check_identical(inside, best)


@BOTH
@pytest.mark.parametrize("masked", [False, True])
def test_defect_10_negative_control(implementation: ModuleType, masked: bool, device: torch.device) -> None:
    """colt5-attention 0.11.2: random_route without a mask raises TypeError."""
    x, tokens = randn(1, 20, 8, device=device), randn(1, 8, seed=1, device=device)
    mask = torch.arange(20, device=device)[None] % 5 != 0 if masked else None
    count = torch.zeros(20, device=device)
    g = torch.Generator(device=device).manual_seed(0)
    for _ in range(400):
        row = implementation.route(x, tokens, 5, mask, random_route=True, generator=g).indices[0, 0]
        assert len(set(row.tolist())) == 5
        count[row] += 1
    valid = torch.ones(20, dtype=torch.bool, device=device) if mask is None else mask[0]
    assert not count[~valid].any()
    # 400 draws of 5 among 20 (16): 100 (125) each, standard deviation about 9; five of them.
    expected = 400 * 5 / valid.sum()
    assert (count[valid] - expected).abs().max() < 45


@BOTH
@pytest.mark.parametrize("per_item", [False, True])
def test_defect_11_routing_tokens_at_forward(implementation: ModuleType, per_item: bool, device: torch.device) -> None:
    """colt5-attention 0.11.2: learned_routing_tokens can't be used from the layer."""
    layer = implementation.MixtureOfAttention(
        16, num_routed_queries=5, num_routed_key_values=5, num_experts=1, learned_routing_tokens=True,
        cosine_sim_routing=True, dropout=0.0, device=device, dtype=torch.float64,
    )  # fmt: skip
    assert not any("routing_token" in name for name in layer.state_dict())
    x = randn(2, 30, 16, device=device)
    shape = (2, 1, 16) if per_item else (1, 16)
    q_tokens, kv_tokens = (randn(*shape, seed=s, device=device).requires_grad_() for s in (1, 2))
    out, (q_routes, kv_routes) = layer(
        x, query_routing_tokens=q_tokens, key_value_routing_tokens=kv_tokens, return_routes=True
    )
    for side, tokens in ((q_routes, q_tokens), (kv_routes, kv_tokens)):
        cosine = torch.nn.functional.cosine_similarity(x, tokens.expand(2, 1, 16), dim=-1)
        check_identical(side.indices[:, 0], cosine.topk(5).indices.sort().values)
    out.square().sum().backward()
    assert q_tokens.grad.any()
    assert kv_tokens.grad.any()


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_defect_13_every_dtype_with_local_attention(
    implementation: ModuleType, dtype: torch.dtype, device: torch.device
) -> None:
    """mixture-of-attention 0.0.25: bfloat16 with local attention raises a dtype error."""
    arguments = {"num_routed_queries": 8, "num_routed_key_values": 8, "num_experts": 1, "dim_head": 8, "heads": 2}
    local = {"local_attn": True, "local_attn_window_size": 4, "dropout": 0.0}
    layer = implementation.MixtureOfAttention(32, **arguments, **local, device=device, dtype=dtype)
    low = torch.float32 if dtype == torch.float64 else dtype
    exact, baseline = (
        reference.MixtureOfAttention(32, **arguments, **local, device=device, dtype=t) for t in (torch.float64, low)
    )
    exact.load_state_dict(layer.state_dict())
    baseline.load_state_dict(layer.state_dict())
    x = torch.randn(1, 32, 32, dtype=dtype, device=device).requires_grad_()
    out, found = layer(x, return_routes=True)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert x.grad.dtype == dtype
    assert all(p.grad is None or p.grad.dtype == dtype for p in layer.parameters())
    if implementation is reference and dtype != torch.float64:
        return  # it would be compared with itself
    oracle = exact(x.detach().double(), routes=[r._replace(scores=r.scores.detach().double()) for r in found])
    wide = torch.promote_types(low, torch.float32)
    plain = baseline(x.detach().to(low), routes=[r._replace(scores=r.scores.detach().to(wide)) for r in found])
    check(out, oracle.detach().clone(), plain, stage="mixture", backend=implementation.__name__)


@BOTH
def test_defect_15_batch_isolation_and_invariance(implementation: ModuleType, device: torch.device) -> None:
    """colt5-attention 0.11.2: with E >= 2 batch item b is given the tokens of item b // E."""
    layer = implementation.MixtureOfAttention(
        16,
        num_routed_queries=5,
        num_routed_key_values=6,
        num_experts=2,
        dropout=0.0,
        device=device,
        dtype=torch.float64,
    )

    x = randn(3, 20, 16, seed=13, device=device)
    changed = x.clone()
    changed[0] = randn(20, 16, seed=14, device=device)
    before, after = layer(x), layer(changed)
    check_identical(after[1:].clone(), before[1:].clone())
    assert not torch.equal(after[0], before[0])
    x = randn(3, 20, 16, seed=15, device=device)
    out, found = layer(x, return_routes=True)
    for b in range(3):
        one = tuple(implementation.Routes(*(t[b : b + 1] for t in side)) for side in found)
        torch.testing.assert_close(layer(x[b : b + 1], routes=one), out[b : b + 1], rtol=1e-10, atol=1e-12)


NORMALISER = "the normaliser of the scores has no gradient"
RE_ENACTED = (
    (test_defect_01_documented_constructor_arguments, "four experts are a type error", {}, TypeError),
    (test_defect_02_unit_rms, "norms scale by the wrong power", {}, AssertionError),
    (test_defect_03_expert_isolation, "experts are mixed", {}, AssertionError),
    (test_defect_04_one_combination_rule, "local attention is thrown away", {}, AssertionError),
    (test_defect_04_one_combination_rule, "experts are averaged unasked", {}, AssertionError),
    (test_defect_05_padding_invariance, "padding keys are seen", {}, AssertionError),
    (test_defect_06_relative_position, "positions are a window off", {}, AssertionError),
    (test_defect_07_gradients_of_the_solvers, NORMALISER, {"solver": "iterative", "masked": False}, GradcheckError),
    (test_defect_09_blocks, "blocks are ignored", {"n": 43}, AssertionError),
    (test_defect_11_routing_tokens_at_forward, "forward has no routing tokens", {"per_item": False}, TypeError),
    (
        test_defect_13_every_dtype_with_local_attention,
        "half precision raises with local attention",
        {"dtype": torch.bfloat16},
        RuntimeError,
    ),
    (test_defect_15_batch_isolation_and_invariance, "batch items are mixed", {}, AssertionError),
)


@pytest.mark.parametrize(
    ("property_", "fault", "parameters", "error"),
    RE_ENACTED,
    ids=[fault.replace(" ", "-") for _, fault, *_ in RE_ENACTED],
)
def test_a_defect_is_rejected(
    property_: Callable[..., None], fault: str, parameters: dict[str, Any], error: type[Exception], device: torch.device
) -> None:
    with pytest.raises(error):
        property_((LAYERS | COMPUTATIONS)[fault].package(), **parameters, device=device)
