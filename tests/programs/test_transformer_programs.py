"""Whole transformers in training programs: compiled, data-parallel, and sharded block by block."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from programs.layers import assert_all_same, assert_same, loss_of
from programs.ranks import Ranks, mean_over_ranks, two_ranks
from programs.test_fully_sharded import gradients as sharded_gradients
from programs.test_fully_sharded import mesh
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from optimized import Decoder, Encoder, TransformerConfig, generate

pytestmark = pytest.mark.cpu

MIXTURE = {"num_routed_queries": 2, "num_routed_key_values": 5, "num_experts": 2}
MODELS = pytest.mark.parametrize("cls", [Decoder, Encoder])
MASK = torch.arange(13) % torch.tensor([[3], [5]]) != 1


def model_of(cls: type, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    sizes = {"vocab_size": 23, "dim": 16, "layers": ("dense", "local", "mixture"), "dim_head": 8, "window": 4}
    torch.manual_seed(4)
    return cls(TransformerConfig(**{**sizes, "mixture": MIXTURE, **changes}), dtype=dtype)


def tokens_of(n: int, seed: int = 0) -> Tensor:
    return torch.randint(23, (2, n), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, run: Any, *call: Any) -> dict[str, Tensor]:
    model.zero_grad()
    out = run(*call)
    loss_of(out).backward()
    return {"out": out.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


@MODELS
def test_compiled(cls: type) -> None:
    """In one graph, with blocks that are computed again and loads of experts; the gradients of an eager call."""
    model, loads = model_of(cls), []
    model.checkpointing = True

    def gradients_by(run: Any) -> dict[str, Tensor]:
        def out_of(tokens: Tensor, mask: Tensor) -> Tensor:
            out, found = run(tokens, mask, return_loads=True)
            loads.append(found.queries)
            return out

        return gradients(model, out_of, tokens_of(13), MASK)

    expected = gradients_by(model)
    assert_all_same(gradients_by(torch.compile(model, backend="eager", fullgraph=True)), expected)
    assert torch.equal(*loads)


def test_compiled_decoding() -> None:
    """A token at a time; that of a mixture is compiled in `test_causal`."""
    model, tokens, outs = model_of(Decoder, layers=("dense", "local")).eval(), tokens_of(11), []

    def step(token: Tensor, cache: Any) -> Any:
        return model(token, cache=cache, use_cache=True)

    with torch.no_grad():
        compiled = torch.compile(step, backend="eager", fullgraph=True, dynamic=True)
        out, cache = model(tokens[:, :4], use_cache=True)
        outs.append(out)
        for t in range(4, 11):
            out, cache = compiled(tokens[:, t : t + 1], cache)
            outs.append(out)
        assert_same(torch.cat(outs, 1), model(tokens))


def test_compiled_steps() -> None:
    """In place, in one graph: buffers in a cache are written as in eager calls."""
    model, tokens = model_of(Decoder, layers=("dense", "mixture")).eval(), tokens_of(8)
    _, cache = model(tokens[:, :5], use_cache=True)
    step, static = torch.compile(model.step, backend="eager", fullgraph=True), cache.static(3)
    for t in range(5, 8):
        expected, cache = model(tokens[:, t : t + 1], cache=cache, use_cache=True)
        assert_same(step(tokens[:, t], static), expected[:, 0])
    assert static.left == 0


# --- two processes


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with two_ranks() as pair:
        yield pair


def sharded(model: Any, **settings: Any) -> Any:
    """Each block a unit, and the rest one."""
    model, over = copy.deepcopy(model), mesh()
    for block in model.blocks:
        fully_shard(block, mesh=over, **settings)
    fully_shard(model, mesh=over, **settings)
    return model


def train(rank: int) -> None:
    """Gradients are the mean of the ranks', where on one of them no expert takes a token, too."""
    for cls, data_parallel in ((Decoder, True), (Decoder, False), (Encoder, False)):
        plain = model_of(cls)
        plain.checkpointing = True
        calls = [tokens_of(n) for n in (13, 3)]
        expected = [gradients(plain, plain, call) for call in calls]
        outs = [by_rank.pop("out") for by_rank in expected]
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain)) if data_parallel else sharded(plain)
        wrapped.zero_grad()
        out = wrapped(calls[rank])
        assert_same(out.detach(), outs[rank])
        loss_of(out).backward()
        if data_parallel:
            found = {name: p.grad for name, p in wrapped.module.named_parameters()}
        else:
            found = sharded_gradients(wrapped)[0]
        assert_all_same(found, mean_over_ranks(expected))


def test_two_processes(ranks: Ranks) -> None:
    ranks.run(train)


def in_bfloat16(rank: int) -> None:
    """FSDP casts parameters and what blocks are given, but for angles: it is the model in bfloat16, bit for bit."""
    plain = model_of(Decoder, torch.float32, mixture_rotary=True)
    split = sharded(plain, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    narrow, tokens = copy.deepcopy(plain).to(torch.bfloat16), tokens_of(40)
    assert torch.equal(split(tokens), narrow(tokens))
    _, cache = split(tokens, use_cache=True)
    assert cache.layers[2].logits.dtype == torch.float32
    _, other = narrow(tokens, use_cache=True)
    assert torch.equal(split(tokens[:, :3], cache=cache), narrow(tokens[:, :3], cache=other))
    assert split.obstacle_to_steps() == "model, which is of class FSDPDecoder"
    narrow.register_forward_hook(lambda *_: None)  # so that its tokens come of calls, too
    found = [generate(model.eval(), tokens, 3, temperature=0) for model in (split, narrow)]
    assert torch.equal(*found)


def test_bfloat16(ranks: Ranks) -> None:
    ranks.run(in_bfloat16)


def from_nothing(rank: int) -> None:
    """Made on no device, sharded, and then drawn: every rank its part."""
    with torch.device("meta"):
        model = model_of(Decoder, torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh())
    fully_shard(model, mesh=mesh())
    model.to_empty(device="cpu")
    model.reset_parameters()
    std = float(model.embedding.weight.full_tensor().detach().std()) / 0.02
    assert 0.8 < std < 1.2
    assert (model.blocks[2].attention_norm.weight.full_tensor() == 1).all()
    assert model(tokens_of(13)).isfinite().all()


def test_meta_device(ranks: Ranks) -> None:
    ranks.run(from_nothing)


def loaded(rank: int, folder: Path) -> None:
    """By transformers, each block a unit and a head that is tied: the plain model, and the mean of the gradients."""
    from transformers.distributed import DistributedConfig

    from optimized.huggingface import MixtureOfAttentionForCausalLM

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    plain = MixtureOfAttentionForCausalLM.from_decoder(model_of(Decoder))
    split = MixtureOfAttentionForCausalLM.from_pretrained(
        folder, dtype=torch.float64, distributed_config=DistributedConfig(fsdp_size=2)
    )
    assert all(isinstance(block, FSDPModule) for block in split.model.trunk.blocks)
    assert split.lm_head.weight is split.model.trunk.embedding.weight
    losses = [plain(tokens, labels=tokens).loss for tokens in (tokens_of(13), tokens_of(9))]
    own = split(tokens_of((13, 9)[rank]), labels=tokens_of((13, 9)[rank])).loss
    assert_same(own.detach(), losses[rank].detach())
    own.backward()
    (sum(losses) / 2).backward()
    found = {name: p.grad for name, p in plain.named_parameters()}
    assert_all_same(sharded_gradients(split)[0], found)


@pytest.mark.needs("transformers", "safetensors")
def test_sharded_by_transformers(ranks: Ranks, tmp_path: Path) -> None:
    from optimized.huggingface import MixtureOfAttentionForCausalLM

    MixtureOfAttentionForCausalLM.from_decoder(model_of(Decoder)).save_pretrained(tmp_path)
    ranks.run(loaded, tmp_path)
