"""The causal layer in training programs: compiled, checkpointed, autocast, hooked, adapted, data-parallel, sharded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from programs.layers import OPTIMIZED_FIRST, PACKAGES, assert_all_same, assert_same, gradients_of, loss_of, package_of
from programs.ranks import Ranks, mean_over_ranks, two_ranks
from programs.test_fully_sharded import gradients as sharded_gradients
from programs.test_fully_sharded import sharded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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


def layer_of(package: str, **options: Any) -> Any:
    sizes = {"num_routed_queries": 2, "num_routed_key_values": 5, "local_attn_window_size": 4, "num_experts": 3}
    given = {"dim_head": 4, "heads": 2, "dtype": torch.float64, **options}
    layer = package_of(package).MixtureOfAutoregressiveAttention(8, **sizes, **given)
    nn.init.normal_(layer.null_tokens)
    return layer


def tokens(n: int = 19) -> Tensor:
    return torch.randn(2, n, 8, dtype=torch.float64)


def gradients(run: Any, layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    out = run(x)
    return (out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))


@PACKAGES
def test_state_dict(package: str) -> None:
    """Names and shapes of the public class's checkpoints."""
    assert {name: tuple(t.shape) for name, t in layer_of(package).state_dict().items()} == STATE
    assert (
        not package_of(package)
        .MixtureOfAutoregressiveAttention(8, num_routed_queries=2, num_routed_key_values=5, local_attn_window_size=4)
        .null_tokens.any()
    )


@OPTIMIZED_FIRST
def test_compiled(package: str) -> None:
    """In one graph, with gradients."""
    layer, x = layer_of(package), tokens()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(gradients(compiled, layer, x), gradients(layer, layer, x)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("package", [pytest.param("reference", marks=pytest.mark.thorough), "optimized"])
def test_compiled_step(package: str) -> None:
    """A token at a time, across the ends of blocks, in one graph for all of them but the first with a cache."""
    layer, x = layer_of(package), tokens(11)

    def step(token: Tensor, cache: Any) -> Any:
        return layer(token, cache=cache, use_cache=True)

    with torch.no_grad():
        compiled = torch.compile(step, backend="eager", fullgraph=True)
        expected, first = layer(x), layer(x[:, :3], use_cache=True)
        cache, outs = first[1], [first[0]]
        for t in range(3, 11):
            out, cache = compiled(x[:, t : t + 1], cache)
            outs.append(out)
        assert_same(torch.cat(outs, 1), expected, "decoded")


def test_compiled_step_in_place() -> None:
    """In one graph, by the modules."""
    layer, x = layer_of("optimized"), tokens(12)
    with torch.no_grad():
        whole, (_, cache) = layer(x), layer(x[:, :9], use_cache=True)
        static = cache.static()
        compiled = torch.compile(layer.step, backend="eager", fullgraph=True)
        outs = [compiled(x[:, t : t + 1], static) for t in range(9, 12)]
    assert_same(torch.cat(outs, 1), whole[:, 9:], "decoded")
    assert static.length.tolist() == [12, 12]


@PACKAGES
def test_checkpointed(package: str) -> None:
    layer, x = layer_of(package, dropout=0.3), tokens()
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        run(leaf).square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in layer.parameters())])
    for actual, expected in zip(*found):
        assert torch.equal(actual, expected)


@PACKAGES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(package: str, dtype: torch.dtype) -> None:
    """Decoding continues what was computed at once; autocast and a layer of that dtype give it in theirs."""
    layer = layer_of(package, dtype=torch.float32)
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
        pieces = torch.cat((first, narrow(x[:, 7:], cache=cache)), 1)
        assert (pieces.float() - whole.float()).abs().max() < (1e-30 if package == "reference" else 0.03)


@PACKAGES
def test_every_module_is_called_once(package: str) -> None:
    layer, called = layer_of(package), []
    for name, module in layer.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    layer(tokens())
    assert sorted(called) == sorted(name for name, _ in layer.named_modules())


@PACKAGES
def test_on_no_device(package: str) -> None:
    layer = layer_of(package, device="meta")
    assert layer(tokens().to("meta")).is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(tokens()).isfinite().all()


@PACKAGES
def test_dropout_is_live_and_in_training_alone(package: str) -> None:
    layer, x = layer_of(package), tokens()
    expected = layer(x)
    layer.dropout = 0.5
    assert not torch.equal(layer(x), expected)
    assert torch.equal(layer.eval()(x), expected)


@PACKAGES
@pytest.mark.parametrize(
    "name", ["query_router", "attn.context_norm", "attn.to_kv", "attn.to_out", "local_attn.to_qkv"]
)
def test_a_hook_changes_what_comes_of_it(package: str, name: str) -> None:
    """Whatever operators do its work where nothing is attached; a hook that changes nothing changes nothing."""
    layer, x = layer_of(package), tokens()
    expected = gradients(layer, layer, x)
    kept = layer.get_submodule(name).register_forward_hook(lambda *_: None)
    for actual, e in zip(gradients(layer, layer, x), expected):
        assert_same(actual, e)
    kept.remove()
    layer.get_submodule(name).register_forward_hook(lambda module, inputs, out: 2 * out)
    assert not torch.allclose(layer(x), expected[0])


@PACKAGES
@pytest.mark.needs("peft")
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")
def test_adapted(package: str) -> None:
    """An adapter starts as nothing, and all of it is trained."""
    from peft import LoraConfig, get_peft_model

    layer, x = layer_of(package), tokens()
    expected = layer(x)
    config = LoraConfig(r=3, target_modules=["to_q", "to_kv", "to_out", "to_qkv"], lora_dropout=0.0)
    model = get_peft_model(layer, config, autocast_adapter_dtype=False)
    assert_same(model(x), expected)
    model(x).square().sum().backward()
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(adapters) == 5
    assert all(p.grad.any() for p in adapters)


# --- two processes


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with two_ranks() as pair:
        yield pair


# Lengths of either rank, step by step; inputs of a block or less route nobody, and yet every parameter takes part.
SCHEDULE = ((19, 13), (3, 19), (4, 2))


def train(rank: int, package: str, units: tuple[str, ...] | None) -> None:
    """Gradients are the mean of the ranks'. units: of FSDP2; None for DistributedDataParallel."""
    torch.manual_seed(3)
    plain = layer_of(package)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain)) if units is None else sharded(plain, [*units])
    for lengths in SCHEDULE:
        calls = [{"x": tokens(n)} for n in lengths]
        mean = mean_over_ranks([gradients_of(plain, call) for call in calls])
        wrapped.zero_grad()
        out = wrapped(**calls[rank])
        assert_same(out.detach(), plain(**calls[rank]).detach())
        loss_of(out).backward()
        if units is None:
            found = {name.removeprefix("module."): p.grad for name, p in wrapped.named_parameters()}
        else:
            found = sharded_gradients(wrapped)[0]
        assert_all_same(found, {name: mean[name] for name in found})
    assert len(found) == len(mean)


@OPTIMIZED_FIRST
@pytest.mark.parametrize(
    "units",
    [None, ("",), ("attn.to_kv", "attn.context_norm", "attn", "query_router", "local_attn.to_out", "local_attn", "")],
    ids=["data parallel", "sharded", "parts sharded"],
)
def test_two_processes(ranks: Ranks, package: str, units: tuple[str, ...] | None) -> None:
    ranks.run(train, package, units)
