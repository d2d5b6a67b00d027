"""The causal layer of the reference in training programs: compiled, checkpointed, autocast, hooked, data-parallel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from programs.layers import assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import reference

pytestmark = pytest.mark.cpu

STATE = {
    "null_tokens": (3, 8),
    "query_router.routing_token": (3, 8),
    "key_value_router.routing_token": (3, 8),
    "attn.norm.gamma": (3, 8, 1),
    "attn.context_norm.gamma": (3, 8, 1),
    "attn.null_kv": (2, 3, 2, 1, 4),
    "attn.to_q.weight": (24, 8, 1),
    "attn.to_kv.weight": (48, 8, 1),
    "attn.to_out.weight": (24, 8, 1),
    "local_attn.norm.weight": (8,),
    "local_attn.norm.bias": (8,),
    "local_attn.to_qkv.weight": (24, 8),
    "local_attn.to_out.weight": (8, 8),
}


def layer_of(**options: Any) -> reference.MixtureOfAutoregressiveAttention:
    sizes = {"num_routed_queries": 2, "num_routed_key_values": 5, "local_attn_window_size": 4, "num_experts": 3}
    given = {"dim_head": 4, "heads": 2, "dtype": torch.float64, **options}
    layer = reference.MixtureOfAutoregressiveAttention(8, **sizes, **given)
    nn.init.normal_(layer.null_tokens)
    return layer


def tokens(n: int = 19) -> Tensor:
    return torch.randn(2, n, 8, dtype=torch.float64)


def gradients(run: Any, layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    out = run(x)
    return (out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))


def test_state_dict() -> None:
    """Names and shapes of the public class's checkpoints."""
    assert {name: tuple(t.shape) for name, t in layer_of().state_dict().items()} == STATE
    assert not reference.MixtureOfAutoregressiveAttention(
        8, num_routed_queries=2, num_routed_key_values=5, local_attn_window_size=4
    ).null_tokens.any()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    """In one graph, with gradients."""
    layer, x = layer_of(), tokens()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for actual, expected in zip(gradients(compiled, layer, x), gradients(layer, layer, x)):
        assert torch.equal(actual, expected)


def test_compiled_step() -> None:
    """A token at a time, across the ends of blocks, in one graph for all of them but the first with a cache."""
    layer, x = layer_of(), tokens(11)

    def step(token: Tensor, cache: reference.Cache) -> Any:
        return layer(token, cache=cache, use_cache=True)

    with torch.no_grad():
        compiled = torch.compile(step, backend="eager", fullgraph=True)
        expected, first = layer(x), layer(x[:, :3], use_cache=True)
        cache, outs = first[1], [first[0]]
        for t in range(3, 11):
            out, cache = compiled(x[:, t : t + 1], cache)
            outs.append(out)
        assert_same(torch.cat(outs, 1), expected, "decoded")


def test_checkpointed() -> None:
    layer, x = layer_of(dropout=0.3), tokens()
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        run(leaf).square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in layer.parameters())])
    for actual, expected in zip(*found):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """Decoding continues what was computed at once; autocast and a layer of that dtype give it in theirs."""
    layer = layer_of(dtype=torch.float32)
    x = tokens().float()
    with torch.no_grad():
        with torch.autocast("cpu", dtype=dtype):
            out, cache = layer(x, use_cache=True)
            assert layer(x[:, :1], cache=cache).dtype == torch.float32
        assert (out - layer(x)).abs().max() < 0.1
        narrow, x = layer.to(dtype), x.to(dtype)
        whole = narrow(x)
        assert whole.dtype == dtype
        first, cache = narrow(x[:, :7], use_cache=True)
        assert torch.equal(torch.cat((first, narrow(x[:, 7:], cache=cache)), 1), whole)


def test_every_module_is_called_once() -> None:
    layer, called = layer_of(), []
    for name, module in layer.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    layer(tokens())
    assert sorted(called) == sorted(name for name, _ in layer.named_modules())


def test_on_no_device() -> None:
    layer = layer_of(device="meta")
    assert layer(tokens().to("meta")).is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(tokens()).isfinite().all()


def test_dropout_is_live_and_in_training_alone() -> None:
    layer, x = layer_of(), tokens()
    expected = layer(x)
    layer.dropout = 0.5
    assert not torch.equal(layer(x), expected)
    assert torch.equal(layer.eval()(x), expected)


def test_data_parallel_with_short_inputs(gloo: None) -> None:
    """Inputs of a block or less route nobody, and yet every parameter takes part."""
    layer = layer_of()
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(layer))
    for n in (3, 19, 4):
        x = tokens(n)
        for run in (layer, wrapped):
            run.zero_grad()
            run(x).square().sum().backward()
        for actual, expected in zip(wrapped.parameters(), layer.parameters()):
            assert torch.equal(actual.grad, expected.grad)


@pytest.fixture
def gloo(tmp_path: Any) -> Any:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
