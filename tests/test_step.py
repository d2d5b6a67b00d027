"""The decoding step by our kernels: as exact as the reference, and taken only where it is what the modules compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import check, check_identical, expectation, stages_by
from launches import launching_by, name_of
from runs import BASELINE_OF
from test_autoregressive import SMALL, Case, same
from test_causal_dtypes import CausalCase, rounded, run, told_apart
from torch import Tensor, nn

import optimized
import reference
from optimized.autoregressive_step import obstacle_to_fused_step

pytestmark = pytest.mark.interpreted  # on a CPU too: without kernels of ours there is nothing to test
TRITON = pytest.mark.parametrize("kernels", ["triton"], indirect=True)
SIZES = {**SMALL, "dim": 20, "dim_head": 6, "heads": 3, "local_attn_heads": 2, "num_experts": 2}
CASE = CausalCase(SIZES, batch=2, n=12, seed=7)
# All that is not usual: every token is routed, scores of 1, angles.
OTHER = CausalCase(
    {**SIZES, "num_routed_queries": 4, "straight_through": True, "average_routed": True}, 2, 12, 7, rotary=True
)


def begun(case: Case, device: torch.device) -> tuple[Any, Tensor, Any]:
    """A layer, the next token of every item, and a static cache in the middle of a block, made by PyTorch."""
    layer, (x, given) = case.layer(optimized, device), case.call(device)
    with torch.no_grad(), optimized.use_backends(**stages_by("torch")):
        _, cache = layer(x[:, :-1], **given, use_cache=True)
    return layer, x[:, -1:], cache.static()


def obstacle(layer: Any, x: Tensor, cache: Any) -> str | None:
    return obstacle_to_fused_step(layer, x, cache, None, optimized.plan.bind(layer._kind(x, False)))


@TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_match_the_reference(kernels: str, dtype: torch.dtype, device: torch.device) -> None:
    """Within the budget of the dtype. The last block, of which experts take some tokens."""
    exact = run(reference, CASE, dtype, torch.float64, device)
    assert told_apart(CASE, exact.routes, device)
    assert 0 < exact.routes[0].mask[:, :, 2].sum() < exact.routes[0].mask[:, :, 2].numel()
    baseline = run(reference, CASE, dtype, BASELINE_OF.get(dtype, dtype), device)
    layer, x, _ = rounded(CASE, optimized, dtype, dtype, device)
    with torch.no_grad(), optimized.use_backends(**stages_by("torch")):
        _, cache = layer(x[:, :9], use_cache=True)
    static = cache.static()
    assert obstacle(layer, x[:, :1], static) is None
    out = torch.cat([layer.step(x[:, t : t + 1], static) for t in range(9, 12)], 1)
    expected = exact.out[:, 9:]
    scale = 0.0 if dtype != torch.float32 else (2 + exact.logit_size) * expected.abs().max().item()
    given = {"expect": expectation(expected), "scale": scale}
    check(out, expected, baseline.out[:, 9:], stage="mixture", name="steps", **given)
    check_identical(static.tail, x[:, 8:])
    for name in ("start", "positions", "keys", "values", "logits", "threshold"):
        check_identical(getattr(static, name), getattr(cache, name), name)


def hooked(layer: Any, x: Tensor, cache: Any) -> None:
    layer.attn.to_q.register_forward_hook(lambda *_: None)


def replaced_norm(layer: Any, x: Tensor, cache: Any) -> None:
    layer.local_attn.norm = nn.LayerNorm(layer.config.dim, dtype=x.dtype)


def unscaled(layer: Any, x: Tensor, cache: Any) -> None:
    layer.local_attn.norm = type(layer.local_attn.norm)(layer.config.dim, elementwise_affine=False)


def without_a_norm(layer: Any, x: Tensor, cache: Any) -> None:
    layer.attn.norm = None


def parametrized(layer: Any, x: Tensor, cache: Any) -> None:
    nn.utils.parametrizations.weight_norm(layer.local_attn.to_out)


def adapted(layer: Any, x: Tensor, cache: Any) -> None:
    layer.attn.to_out = nn.Sequential(layer.attn.to_out)


def dropping(layer: Any, x: Tensor, cache: Any) -> None:
    layer.dropout = 0.5


def biased(layer: Any, x: Tensor, cache: Any) -> None:
    layer.local_attn.to_qkv.bias = nn.Parameter(x.new_zeros(layer.local_attn.to_qkv.out_features))


def routed_otherwise(layer: Any, x: Tensor, cache: Any) -> None:
    layer.query_router.forward = layer.query_router.forward


def apart(layer: Any, x: Tensor, cache: Any) -> None:
    object.__setattr__(cache, "tail", cache.tail.mT.contiguous().mT)


CHANGES: dict[Callable[..., None], str] = {
    hooked: "to_q has a forward hook",
    replaced_norm: "a norm is called",
    unscaled: "a norm has no weight",
    without_a_norm: "one norm of two is there",
    parametrized: "local_attn.to_out is of class ParametrizedLinear",
    adapted: "to_out is of class Sequential",
    dropping: "there is dropout",
    biased: "local_attn.to_qkv has a bias",
    routed_otherwise: "query_router has a replaced forward",
    apart: "a buffer of the cache is not contiguous",
}


@TRITON
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_goes_through_the_modules(kernels: str, change: Any, device: torch.device) -> None:
    layer, x, cache = begun(CASE, device)
    assert obstacle(layer, x, cache) is None
    change(layer, x, cache)
    assert CHANGES[change] in (obstacle(layer, x, cache) or "")


@TRITON
def test_where_other_kernels_compute(kernels: str, device: torch.device) -> None:
    """Of a solver, under autocast, by choice, traced."""
    layer, x, cache = begun(CASE, device)
    library = "math"
    for chosen in ({"routing": "torch"}, {"mixture": "torch"}, {"dispatch": "torch"}, {"routed_attention": library}):
        with optimized.use_backends(**chosen):
            assert obstacle(layer, x, cache) == "a stage is not computed by Triton"
    with optimized.use_backends(local_attention="banded_math"):
        assert obstacle(layer, x, cache) == "a library was chosen for local_attention"
    low = layer.to(torch.float32), x.float()
    with torch.autocast(device.type, torch.bfloat16):
        assert obstacle(*low, cache) == "autocast computes in another dtype"
        assert obstacle(layer, x.bfloat16(), cache) == "a weight is of another dtype"
    seen: list[str | None] = []
    torch.func.vmap(lambda t: (seen.append(obstacle(*low, cache)), t)[1])(x)
    assert seen == ["it is traced or transformed"]
    solved = Case({**SIZES, "solver": "exact", "straight_through": True}, 2, 12, 7)
    assert obstacle(*begun(solved, device)) == "a solver scores"


@TRITON
@pytest.mark.parametrize("case", [CASE, OTHER], ids=["usual", "other"])
def test_a_hook_is_called_and_changes_nothing_else(kernels: str, case: Case, device: torch.device) -> None:
    """The two ways to step, in float64: results, and all that the cache holds."""
    layer, x, cache = begun(case, device)
    rotary = case.call(device)[1].get("rotary_emb")
    layer.local_attn.norm.eps = 0.1
    other, calls = cache.static(), []
    with torch.no_grad():
        expected = layer.step(x, cache, rotary)
        layer.local_attn.to_out.register_forward_hook(lambda *_: calls.append(1))
        same(layer.step(x, other, rotary), expected)
    assert calls == [1]
    for name, t in vars(cache).items():
        if isinstance(t, Tensor):
            same(getattr(other, name).to(torch.float64), t.to(torch.float64))


@TRITON
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_is_four_launches(kernels: str, batch: int, device: torch.device) -> None:
    layer, x, cache = begun(Case(SIZES, batch, 6, 3), device)
    seen: list[str] = []
    with launching_by(lambda kernel, *_, **__: seen.append(name_of(kernel))):
        layer.step(x, cache)
    assert seen == [f"_step_{stage}_kernel" for stage in ("tokens", "products", "attention", "output")]
