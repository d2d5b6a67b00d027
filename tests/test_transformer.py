"""Whole transformers: the law of causality, padding, decoding from a cache, and both packages' layers in one place."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from programs.layers import PACKAGES, assert_all_same, assert_same
from torch import Tensor, nn

import optimized
from optimized import Decoder, Encoder, TransformerConfig, generate, stream

pytestmark = pytest.mark.cpu

V, D, W, N = 23, 16, 4, 15
MIXTURE = {"num_routed_queries": 2, "num_routed_key_values": 5, "num_experts": 2}
EVERY_KIND = ("dense", "local", "mixture")
MODELS = pytest.mark.parametrize("cls", [Decoder, Encoder])
# Where the valid tokens of two items stand.
LEFT = torch.arange(N) >= torch.tensor([[3], [0]])
RIGHT = LEFT.flip(1)
HOLES = torch.arange(N) % torch.tensor([[3], [5]]) != 1
MASKS = pytest.mark.parametrize("mask", [LEFT, RIGHT, HOLES], ids=["left", "right", "holes"])


def config_of(**changes: Any) -> TransformerConfig:
    sizes = {"vocab_size": V, "dim": D, "layers": EVERY_KIND, "dim_head": 8, "window": W, "mixture": MIXTURE}
    return TransformerConfig(**{**sizes, "mixture_rotary": True, **changes})


def model_of(cls: type = Decoder, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """The same for every package: all parameters random, and so large that what is seen makes a difference."""
    model = cls(config_of(**changes), dtype=dtype).eval()
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            fan_in = p.shape[1] if p.ndim > 1 and name.endswith("weight") and name != "embedding.weight" else 1
            p.copy_(torch.randn(p.shape, generator=draws, dtype=torch.float64) * fan_in**-0.5)
    return model


def tokens_of(n: int = N, seed: int = 0) -> Tensor:
    return torch.randint(V, (2, n), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, *call: Any, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(*call, **options)
    (out * torch.arange(out[0].numel()).cos().view(out.shape[1:]).to(out.dtype)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys()
    return {"out": out.detach(), **found}


@PACKAGES
@pytest.mark.parametrize("rotary", [False, True], ids=["", "rotary"])
def test_the_future_is_not_seen(package: str, rotary: bool) -> None:
    """Logits up to a cut are those of any other future, bit for bit; those at the cut are not."""
    model, tokens = model_of(package=package, mixture_rotary=rotary), tokens_of()
    with torch.no_grad():
        expected = model(tokens)
        for cut in (1, 7, 12):
            changed = torch.cat((tokens[:, :cut], (tokens[:, cut:] + 1) % V), 1)
            found = model(changed)
            assert torch.equal(found[:, :cut], expected[:, :cut])
            assert not torch.equal(found[:, cut], expected[:, cut])


def test_no_gradient_from_the_future() -> None:
    model, rows = model_of(), []
    model.embedding.register_forward_hook(lambda module, given, out: rows.append(out.retain_grad() or out))
    model(tokens_of())[:, :7].square().sum().backward()
    assert not rows[0].grad[:, 7:].any()
    assert rows[0].grad[:, :7].any(-1).all()


def test_an_encoder_sees_the_future() -> None:
    model, tokens = model_of(Encoder), tokens_of()
    changed = torch.cat((tokens[:, :-1], (tokens[:, -1:] + 1) % V), 1)
    assert not torch.equal(model(tokens)[:, 0], model(changed)[:, 0])


@MODELS
@MASKS
def test_padding_changes_nothing(cls: type, mask: Tensor) -> None:
    """Wherever it stands, and whatever it holds; it gets 0, and passes no gradient on."""
    model, tokens = model_of(cls), tokens_of().masked_fill(~mask, -100)
    out, padded = model(tokens, mask), gradients(model, tokens, mask)
    alone: dict[str, Tensor] = {}
    weights = torch.arange(out[0].numel()).cos().view(out.shape[1:]).double()
    model.zero_grad()
    for i, valid in enumerate(mask):
        found = model(tokens[i : i + 1, valid])[0]
        assert_same(out[i, valid], found)
        assert not out[i, ~valid].any()
        (found * weights[valid]).sum().backward()
    alone = {name: p.grad for name, p in model.named_parameters()}
    assert_all_same({name: padded[name] for name in alone}, alone)


@MODELS
def test_padding_has_no_embedding(cls: type) -> None:
    """Nothing of the token 0 that stands for it is seen."""
    model, tokens = model_of(cls, tied=cls is not Decoder), tokens_of().clamp_min(1)
    expected = gradients(model, tokens, LEFT)
    with torch.no_grad():
        model.embedding.weight[0] = torch.nan
    assert_all_same(gradients(model, tokens, LEFT), expected)


@MODELS
def test_an_item_of_padding_alone(cls: type) -> None:
    """It leaves nothing in a gradient, no NaN of a softmax over nothing either."""
    model, tokens, mask = model_of(cls), tokens_of(), torch.tensor([[True], [False]]).expand(2, N)
    padded, alone = gradients(model, tokens, mask), gradients(model, tokens[:1])
    assert not padded["out"][1].any()
    assert_all_same({**padded, "out": padded["out"][:1]}, alone)


@PACKAGES
@pytest.mark.parametrize("mask", [None, LEFT, HOLES], ids=["whole", "left", "holes"])
def test_pieces_are_the_whole(package: str, mask: Tensor | None) -> None:
    """In calls of any length, some of tokens that are all masked in an item."""
    model, tokens, cache, found = model_of(package=package), tokens_of(), None, []
    with torch.no_grad():
        whole = model(tokens, mask)
        for piece in torch.arange(N).split([2, 1, 1, 6, 1, 1, 3]):
            given = None if mask is None else mask[:, piece]
            out, cache = model(tokens[:, piece], given, cache, use_cache=True)
            found.append(out)
    assert_same(torch.cat(found, 1), whole)
    assert cache.length.tolist() == ([N, N] if mask is None else mask.sum(1).tolist())


def test_items_of_a_cache_are_selected() -> None:
    model, tokens, index = model_of(), tokens_of(), torch.tensor([1, 1, 0])
    with torch.no_grad():
        whole = model(tokens, HOLES)
        _, cache = model(tokens[:, :9], HOLES[:, :9], use_cache=True)
        out = model(tokens[index, 9:], HOLES[index, 9:], cache.select(index))
    assert_same(out, whole[index, 9:])


def test_the_last_logits_alone() -> None:
    model, tokens = model_of(), tokens_of()
    mask = LEFT & RIGHT & torch.tensor([[True], [False]])
    out = model(tokens, mask)
    assert_same(model(tokens, mask, last=True)[0, 0], out[0, N - 4])
    assert not model(tokens, mask, last=True)[1].any()
    assert_same(model(tokens, last=True)[:, 0], model(tokens)[:, -1])


@MODELS
@pytest.mark.parametrize("mask", [None, HOLES], ids=["whole", "holes"])
def test_either_package(cls: type, mask: Tensor | None) -> None:
    """Values, gradients and loads, from one state dict."""
    models = [model_of(cls, package=package, tied=False) for package in ("reference", "optimized")]
    models[1].load_state_dict(models[0].state_dict())
    option = {"logits": True} if cls is Encoder else {}
    assert_all_same(*(gradients(model, tokens_of(), mask, **option) for model in reversed(models)))
    loads = [model(tokens_of(), mask, return_loads=True)[1] for model in models]
    for theirs, ours in zip(*loads):
        assert torch.equal(ours, theirs)


@MODELS
def test_loads_are_those_of_the_layer(cls: type) -> None:
    """Without a second call of it; padding is no load."""
    model, routes = model_of(cls, layers=("mixture", "dense", "mixture")), []
    for block in (model.blocks[0], model.blocks[2]):
        block.attention.register_forward_hook(lambda module, given, out: routes.append(out[-1][0]))
    _, loads = model(tokens_of(), HOLES, return_loads=True)
    assert len(routes) == 2
    for i, found in enumerate(routes):
        taken = found.mask.flatten(2).sum(-1)
        assert torch.equal(loads.queries[i], taken)
        candidates = found.candidates.sum(-1) if cls is Decoder else taken
        assert torch.equal(loads.candidates[i], candidates)
    assert loads.queries.any()
    dense = cls(config_of(layers=("dense",)))
    assert dense(tokens_of(), return_loads=True)[1].queries.shape == (0, 2, 0)


@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "left"])
def test_greedy_generation_is_recomputation(mask: Tensor | None) -> None:
    model, tokens = model_of(), tokens_of()
    found = generate(model, tokens, 9, mask, temperature=0)
    assert found.shape == (2, 9)
    for i in range(2):
        row = tokens[i] if mask is None else tokens[i, mask[i]]
        with torch.no_grad():
            for token in found[i]:
                assert token == model(row[None])[0, -1].argmax()
                row = torch.cat((row, token[None]))


def test_generation_ends() -> None:
    """An item repeats its last token; the end of all is the end."""
    model, tokens = model_of(), tokens_of()
    free = generate(model, tokens, 9, temperature=0)
    eos = int(free[0, 2])
    found = generate(model, tokens, 9, temperature=0, eos=eos)
    for row, expected in zip(found, free):
        ends = (expected == eos).nonzero()
        end = int(ends[0]) if len(ends) else found.shape[1] - 1
        assert torch.equal(row[: end + 1], expected[: end + 1])
        assert (row[end + 1 :] == eos).all()
    alone = generate(model, tokens[:1], 9, temperature=0, eos=eos)
    assert torch.equal(alone[0], found[0, : alone.shape[1]])
    assert alone[0].tolist().index(eos) == alone.shape[1] - 1


def test_a_stream_comes_token_by_token() -> None:
    """Nothing is computed before it is asked for, and what asks has its gradients on."""
    model, tokens, calls = model_of(), tokens_of(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = stream(model, tokens, 5, temperature=0)
    assert not calls
    first = next(found)
    assert len(calls) == 1
    assert torch.is_grad_enabled()
    rest = torch.stack(list(found), 1)
    assert torch.equal(torch.cat((first[:, None], rest), 1), generate(model, tokens, 5, temperature=0))


def test_sampling() -> None:
    """The nucleus and no other token; the same of the same seed; the likeliest alone as it gets cold, or small."""
    sample = optimized.transformer.generation.sample
    logits = torch.tensor([0.4, 0.05, 0.3, 0.25]).log().expand(400, -1)
    draws = [sample(logits, 1.0, 0.69, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].unique().tolist() == [0, 2]
    warm = sample(logits, 2.0, 0.69, torch.Generator().manual_seed(3))  # 0.33, 0.12, 0.29, 0.26: the nucleus of these
    assert warm.unique().tolist() == [0, 2, 3]
    assert sample(logits, 1.0, 1.0, torch.Generator().manual_seed(3)).unique().tolist() == [0, 1, 2, 3]
    assert not sample(logits, 1.0, 1e-9, None).any()
    assert not sample(torch.zeros(200, 2), 1.0, 0.5, None).any()  # the first alone has as much
    assert not sample(logits, 1e-30, 1.0, None).any()
    assert not sample(logits, 0, 1.0, None).any()
    assert sample(logits, 100.0, 1.0, torch.Generator().manual_seed(3)).bincount().min() > 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sampling_of_half_precision(dtype: torch.dtype) -> None:
    """By probabilities in float32: in the logits' dtype some of many draws would be others."""
    sample = optimized.transformer.generation.sample
    logits = torch.randn(20000, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    drawn = [sample(given, 1.3, 0.7, torch.Generator().manual_seed(3)) for given in (logits, logits.float())]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("way", ["constructed", "reset"])
def test_initialisation(way: str) -> None:
    """Deviations as `Decoder` says, of a model that is made at once, and of one made on no device and filled later."""
    sizes = {"vocab_size": 300, "dim": 128, "dim_head": 32, "tied": False}
    torch.manual_seed(0)
    if way == "constructed":
        model = Decoder(config_of(**sizes))
    else:
        model = Decoder(config_of(**sizes), device="meta").to_empty(device="cpu")
        model.reset_parameters()
    writes, depth = 0, len(EVERY_KIND)
    for name, p in model.named_parameters():
        last = name.split(".")[-2] if name.endswith("weight") else name.split(".")[-1]
        if last == "null_tokens":
            assert not p.any()
            continue
        if last.endswith("norm"):
            assert (p == 1).all()
            continue
        std = {"embedding": 0.02, "head": 128**-0.5, "routing_token": 1.0, "null_kv": 1.0}.get(last)
        if last == "to_out":
            std, writes = (p.shape[1] * 2 * depth) ** -0.5, writes + 1
        std = p.shape[1] ** -0.5 if std is None else std
        within = 0.2 if p.numel() < 1000 else 0.05
        assert 1 - within < float(p.std()) / std < 1 + within, name
    assert writes == 2 * depth + 1  # a mixture has two


def test_state() -> None:
    """The names are a contract: checkpoints, adapters and sharding plans go by them."""
    block = ["attention_norm.weight", "feed_forward_norm.weight"]
    block += ["feed_forward.to_hidden.weight", "feed_forward.to_out.weight"]
    projections = ["attention.to_qkv.weight", "attention.to_out.weight"]
    names = {f"blocks.{i}.{name}" for i in (0, 1) for name in (*block, *projections)}
    names |= {f"blocks.2.{name}" for name in block} | {"embedding.weight", "norm.weight"}
    mixture = ["null_tokens", "query_router.routing_token", "key_value_router.routing_token", "attn.null_kv"]
    mixture += [f"attn.{name}.weight" for name in ("to_q", "to_kv", "to_out")]
    mixture += ["local_attn.to_qkv.weight", "local_attn.to_out.weight"]
    names |= {f"blocks.2.attention.{name}" for name in mixture}
    assert set(model_of().state_dict()) == names
    assert set(model_of(tied=False).state_dict()) == names | {"head.weight"}
    assert set(model_of(package="reference").state_dict()) == names


def test_configuration_as_json() -> None:
    config = config_of(tied=False, dropout=0.1, mixture={**MIXTURE, "solver": "exact", "straight_through": True})
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (config.heads, config.hidden) == (2, 64)
    assert TransformerConfig(V, 768, ("dense",)).hidden == 2048
    assert TransformerConfig(V, 768, ("dense",)).heads == 12


def test_experts_of_another_head_dimension() -> None:
    """They are turned by angles of their own size."""
    model, tokens = model_of(mixture={**MIXTURE, "dim_head": 4}), tokens_of()
    with torch.no_grad():
        assert_same(model(tokens, last=True), model(tokens)[:, -1:])


def test_experts_have_as_many_heads_as_a_dense_layer() -> None:
    assert Decoder(config_of(heads=4)).blocks[2].attention.config.heads == 2
    assert Decoder(config_of(heads=4)).blocks[2].attention.config.local_attn_heads == 4
    assert Decoder(config_of(mixture={**MIXTURE, "heads": 5})).blocks[2].attention.config.heads == 5


def test_dropout_is_in_training_alone() -> None:
    model, tokens = model_of(dropout=0.5), tokens_of()
    expected = model_of()(tokens)
    assert torch.equal(model(tokens), expected)
    assert not torch.equal(model.train()(tokens), expected)


@MODELS
def test_checkpointed(cls: type) -> None:
    """The same gradients, bit for bit, dropout included; the feed-forward is computed twice."""
    model, found, calls = model_of(cls, dropout=0.3).train(), [], []
    model.blocks[1].feed_forward.register_forward_hook(lambda *_: calls.append(1))
    for model.checkpointing in (False, True):
        torch.manual_seed(3)
        found.append(gradients(model, tokens_of(), HOLES))
    assert len(calls) == 3
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name


def test_half_precision() -> None:
    """Autocast, and a model of that dtype; both decode what they compute at once."""
    model, tokens = model_of(dtype=torch.float32), tokens_of()
    with torch.no_grad():
        exact = model(tokens, HOLES)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(tokens, HOLES)
            pieces, cache = model(tokens[:, :9], HOLES[:, :9], use_cache=True)
            pieces = torch.cat((pieces, model(tokens[:, 9:], HOLES[:, 9:], cache)), 1)
        narrow = model.to(torch.bfloat16)(tokens, HOLES)
    assert mixed.dtype == narrow.dtype == torch.bfloat16
    size = exact.square().mean().sqrt()
    for out in (mixed, pieces, narrow):
        assert (out - exact).square().mean().sqrt() < 0.05 * size


@MODELS
def test_nothing_asks_the_device(cls: type) -> None:
    """Where there are no numbers, none can be looked at: so a call goes into a CUDA graph."""
    model = model_of(cls).to("meta")
    tokens, mask = tokens_of().to("meta"), HOLES.to("meta")
    assert model(tokens, mask, return_loads=True)[0].is_meta
    if cls is Decoder:
        _, cache = model(tokens, mask, use_cache=True)
        assert model(tokens[:, :1], mask[:, :1], cache, last=True).is_meta


CONFIGURATIONS = {
    "vocab_size: expected an integer >= 1, got 0": {"vocab_size": 0},
    "dim_head: expected an even number": {"dim_head": 7},
    "layers: expected a tuple of dense, local, mixture": {"layers": "dense"},
    "layers: expected at least one": {"layers": ()},
    r"layers\[1\]: expected one of dense, local, mixture, got 'sparse'": {"layers": ("dense", "sparse")},
    "window: expected an integer >= 1": {"window": None},
    "hidden: expected an integer >= 1": {"hidden": 1.5},
    r"mixture\['num_routed_queries'\]: expected an integer >= 1, since": {"mixture": {"num_routed_key_values": 2}},
    "mixture: expected options other than dim, .* got 'prenorm'": {"mixture": {**MIXTURE, "prenorm": True}},
    r"mixture\['solver'\]: expected a bool, int, float or str": {"mixture": {**MIXTURE, "solver": ["exact"]}},
    "mixture: expected a mapping": {"mixture": 3},
    "rotary_base: expected a finite number > 0": {"rotary_base": 0},
    r"dropout: expected a number in \[0, 1\)": {"dropout": 1.0},
    "tied: expected True or False": {"tied": 1},
    "package: expected 'optimized' or 'reference', got 'other'": {"package": "other"},
}


@pytest.mark.parametrize("said", CONFIGURATIONS)
def test_a_bad_configuration_is_refused(said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        config_of(**CONFIGURATIONS[said])


def test_options_of_a_mixture_are_checked_by_the_layer() -> None:
    for cls in (Decoder, Encoder):
        with pytest.raises(TypeError, match="router_options: expected names among"):
            cls(config_of(mixture={**MIXTURE, "colour": 3}))
    for values, said in (({"dim": 3, "size": 3}, "values: expected names among"), ({"dim": 3}, "vocab_size: expected")):
        with pytest.raises(TypeError, match=said):
            TransformerConfig.from_dict(values)


CALLS: dict[str, dict[str, Any]] = {
    "tokens: expected dtype torch.int64": {"tokens": torch.zeros(2, N)},
    "tokens: expected shape": {"tokens": torch.zeros(N, dtype=torch.int64)},
    "tokens: expected at least one token": {"tokens": tokens_of(0)},
    rf"tokens: expected numbers in \[0, {V}\), got values from 0 to {V}": {"tokens": torch.arange(V + 1)[None]},
    "mask: expected shape": {"mask": LEFT[:, 1:]},
    "use_cache: expected True or False": {"use_cache": 1},
    "return_loads: expected True or False": {"return_loads": None},
    "last: expected True or False": {"last": -1},
    "cache: expected a DecoderCache": {"cache": ()},
}


@pytest.mark.parametrize("said", CALLS)
def test_a_bad_call_is_refused(said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        DECODER(**{"tokens": tokens_of(), **CALLS[said]})


DECODER = Decoder(config_of()).eval()
GENERATIONS: dict[str, dict[str, Any]] = {
    "model: expected a Decoder, got Encoder": {"model": Encoder(config_of())},
    "model: expected a model in evaluation mode": {"model": Decoder(config_of())},
    "max_new_tokens: expected an integer >= 1": {"max_new_tokens": 0},
    "mask: expected a valid token in every item": {"mask": LEFT & False},
    "temperature: expected a finite number >= 0": {"temperature": -1},
    r"top_p: expected a number in \(0, 1\]": {"top_p": 0},
    "eos: expected an integer >= 0": {"eos": "."},
    "generator: expected a torch.Generator": {"generator": 3},
}


@pytest.mark.parametrize("said", GENERATIONS)
def test_a_bad_generation_is_refused(said: str) -> None:
    """Before a token is asked for."""
    with pytest.raises((TypeError, ValueError), match=said):
        stream(**{"model": DECODER, "tokens": tokens_of(), "max_new_tokens": 2, **GENERATIONS[said]})


def test_a_cache_of_another_model_or_batch_is_refused() -> None:
    _, cache = DECODER(tokens_of(), use_cache=True)
    with pytest.raises(ValueError, match="cache: expected one for batch 1, got one for 2"):
        DECODER(tokens_of()[:1], cache=cache)
    with pytest.raises(ValueError, match=r"cache: expected one for layers \('local', .*, got one for \('dense', "):
        Decoder(config_of(layers=("local", "dense", "mixture")))(tokens_of(), cache=cache)
