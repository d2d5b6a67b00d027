"""A decoder's steps in place, and generation by them: what calls with a cache that is a value come to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs.layers import assert_same
from test_transformer import EVERY_KIND, HOLES, LEFT, MIXTURE, RIGHT, V, config_of, model_of, tokens_of
from torch import Tensor, nn

from optimized import Decoder, DecoderCache, StaticDecoderCache, generate, stream
from optimized.transformer import decoding
from optimized.transformer.stepping import obstacle_to_recording

SHORT = torch.tensor([[False, True], [True, True]])  # prompts within a block, one of them a single token
PROMPTS = {"whole": (15, None), "left": (15, LEFT), "right": (15, RIGHT), "holes": (15, HOLES), "short": (2, SHORT)}
MODELS: dict[str, dict[str, Any]] = {
    "every kind": {},
    # A block other than the window, by which local layers go too; dense layers first and last.
    "blocks": {"layers": ("dense", "mixture", "local", "dense"), "mixture": {**MIXTURE, "routed_window_size": 6}},
    "local": {"layers": ("local",)},
    "dense": {"layers": ("dense",), "tied": False},
}
STEPS = 11


def prompt_of(name: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    n, mask = PROMPTS[name]
    return tokens_of(n).to(device), None if mask is None else mask.to(device)


def buffers(cache: Any) -> dict[int, Tensor]:
    """Every tensor of a static cache, by place."""
    found = {}
    for owner in (cache, *cache.layers):
        found |= {t.data_ptr(): t for t in vars(owner).values() if isinstance(t, Tensor)}
    return found


@pytest.mark.parametrize(
    ("model", "prompt"),
    [*(("every kind", name) for name in PROMPTS), ("blocks", "holes"), ("local", "left"), ("dense", "right")],
)
def test_steps_are_calls(model: str, prompt: str, device: torch.device) -> None:
    """And recomputation: over borders that items meet at steps of their own, until the room is used up, and on."""
    decoder = model_of(**MODELS[model]).to(device)
    tokens, mask = prompt_of(prompt, device)
    more, index = tokens_of(STEPS + 2, 5).to(device), torch.tensor([1, 0], device=device)
    with torch.no_grad():
        cache, half = None, tokens.shape[1] // 2
        for piece in (slice(half), slice(half, None)):  # so that padding may lie between tokens that are remembered
            _, cache = decoder(tokens[:, piece], None if mask is None else mask[:, piece], cache, use_cache=True)
        value = cache.select(index)
        static = value.static(STEPS)
        places, borders = set(buffers(static)), 0
        for t in range(STEPS):
            due = static.due()
            borders += int(due.any())
            expected, value = decoder(more[:, t : t + 1], cache=value, use_cache=True)
            found = decoder.step(more[:, t], static, border=bool(due.any()))
            assert_same(found, expected[:, 0])
        assert borders >= STEPS // 6 or model == "dense"
        assert set(buffers(static)) == places
        with pytest.raises(ValueError, match=r"^cache: expected one with room for another token, got one whose"):
            decoder.step(more[:, 0], static)
        again = static.value()
        assert_same(decoder(more[:, STEPS:], cache=again), decoder(more[:, STEPS:], cache=value))
        found = decoder.step(more[:, STEPS], again.static(1), border=True)
        whole = torch.cat((tokens[index], more[:, : STEPS + 1]), 1)
        seen = None if mask is None else torch.cat((mask[index], torch.ones_like(more[:, : STEPS + 1]) > 0), 1)
        assert_same(found, decoder(whole, seen, last=True)[:, 0])


def test_a_cache_is_put_back(device: torch.device) -> None:
    """Whatever stands in the buffers, NaN too; a step changes nothing of a value."""
    decoder, tokens, more = model_of().to(device), tokens_of().to(device), tokens_of(3, 5).to(device)
    with torch.no_grad():
        _, cache = decoder(tokens, HOLES.to(device), use_cache=True)
        static = cache.static(4)
        before = static.value()
        found = []
        for _ in range(2):
            found.append(torch.stack([decoder.step(more[:, t], static, border=True) for t in range(3)]))
            assert static.left == 1
            for t in buffers(static).values():
                t.fill_(math.nan if t.is_floating_point() else 0)
            static.put(before)
            assert static.left == 4
        assert found[0].isfinite().all()
        assert torch.equal(*found)
        _, early = decoder(tokens[:, :2], use_cache=True)
        static.put(early)
        assert static.left == 17
        assert_same(decoder(more, cache=static.value()), decoder(more, cache=early))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["autocast", "bfloat16"])
def test_half_precision(dtype: torch.dtype | None, device: torch.device) -> None:
    model, tokens = model_of(dtype=torch.float32).to(device), tokens_of().to(device)
    with torch.no_grad():
        exact = model(tokens)[:, 6:]
        narrow = model if dtype is None else model.to(dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is None):
            _, cache = narrow(tokens[:, :6], use_cache=True)
            static, found = cache.static(9), []
            for t in range(6, 15):
                found.append(narrow.step(tokens[:, t], static, border=bool(static.due().any())))
    out = torch.stack(found, 1)
    assert out.dtype == torch.bfloat16
    assert (out - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()


def by_value(model: Decoder) -> Decoder:
    """It has what steps in place pass by."""
    model.register_forward_hook(lambda *_: None)
    assert model.obstacle_to_steps() == "model, which has a forward hook"
    return model


@pytest.mark.parametrize("model", MODELS)
def test_generation_in_place(model: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that a cache gives which is a value: the likeliest, and drawn; with buffers that are made anew."""
    monkeypatch.setattr(decoding, "ROOM", 3)
    decoder, (tokens, mask) = model_of(**MODELS[model]).to(device), prompt_of("short", device)

    def found(**options: Any) -> list[Tensor]:
        draws = [torch.Generator(device).manual_seed(7) for _ in range(2)]
        greedy = generate(decoder, tokens, 14, mask, 0, generator=draws[0], **options)
        return [greedy, generate(decoder, tokens, 14, mask, 1.3, 0.9, generator=draws[1], **options)]

    with monkeypatch.context() as patched:
        patched.setattr(decoding, "ByValue", None)  # so that nothing decodes from a value
        in_place = found(graph=False)
    by_value(decoder)
    for ours, theirs in zip(in_place, found()):
        assert torch.equal(ours, theirs)
    assert len(in_place[1].unique()) > 2
    eos = int(in_place[0][1, 4])
    ended = generate(model_of(**MODELS[model]).to(device), tokens, 14, mask, 0, eos=eos)
    assert torch.equal(ended, generate(decoder, tokens, 14, mask, 0, eos=eos))


def replays_by_calls(steps: dict[bool, Callable], restore: Callable, device: torch.device) -> dict[bool, Callable]:
    """As a recording goes: steps that are undone, and then calls whose result is one tensor, written anew."""
    replays = {}
    for border, step in steps.items():
        logits = step().clone()
        restore()
        replays[border] = lambda step=step, logits=logits: logits.copy_(step())
    return replays


@pytest.mark.cpu
@pytest.mark.parametrize(("prompt", "most"), [("holes", 12), ("short", 3), ("whole", 2)])
def test_a_recording_leaves_no_trace(prompt: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kinds of steps are recorded is known before, and what a recording did is undone."""
    kinds: list[set[bool]] = []

    def replays(steps: dict[bool, Callable], *rest: Any) -> dict[bool, Callable]:
        kinds.append(set(steps))
        return replays_by_calls(steps, *rest)

    model, (tokens, mask) = model_of(), prompt_of(prompt, torch.device("cpu"))
    expected = generate(model, tokens, most, mask, temperature=0, graph=False)
    for module in ("decoding", "generation"):
        monkeypatch.setattr(f"optimized.transformer.{module}.obstacle_to_recording", lambda *_: None)
    monkeypatch.setattr(decoding, "replays", replays)
    assert torch.equal(generate(model, tokens, most, mask, temperature=0, graph=True), expected)
    assert kinds == [{True, False} if most == 12 else {False}]
    generate(model, tokens, decoding.PAYS, mask, temperature=0)  # a step fewer, so it is not worth it
    assert len(kinds) == 1
    generate(model, tokens, decoding.PAYS + 1, mask, temperature=0)
    assert len(kinds) == 2


def doubled(module: nn.Module, given: Any, out: Tensor) -> Tensor:
    return 2 * out


def test_hooks_inside_of_attentions(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count in steps as they do in calls."""
    monkeypatch.setattr(decoding, "ByValue", None)
    tokens, expected = tokens_of().to(device), []
    for hooked in (False, True):
        model = model_of().to(device)
        if hooked:
            mixture = model.blocks[2].attention
            for module in (model.blocks[0].attention.to_out, mixture.query_router, mixture.attn.to_q, model.norm):
                module.register_forward_hook(doubled)
        found = generate(model, tokens, 9, temperature=0)
        row = tokens
        for t in range(9):
            assert torch.equal(found[:, t], model(row, last=True)[:, 0].argmax(-1))
            row = torch.cat((row, found[:, t : t + 1]), 1)
        expected.append(found)
    assert not torch.equal(*expected)


class Local(nn.Module):
    """Knows what a call gives it, and nothing of steps."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, cache: Any = None, kept: bool = False) -> Any:
        assert cache is None or hasattr(cache, "select")
        return self.layer(x, cache, kept)


class Special(Decoder):
    pass


def replace(module: Any, name: str, value: Any) -> None:
    setattr(module, name, value)


OBSTACLES: dict[str, Callable[[Any], Any]] = {
    "model, which has a forward hook": by_value,
    "model, which is of class Special": lambda m: replace(m, "__class__", Special),
    "blocks.1, which has a forward pre-hook": lambda m: m.blocks[1].register_forward_pre_hook(lambda *_: None),
    "blocks.1, which is compiled": lambda m: replace(m.blocks[1], "_compiled_call_impl", m.blocks[1]._call_impl),
    "blocks.0.attention, which is in training mode": lambda m: m.blocks[0].attention.train(),
    "blocks.0.attention, which has a replaced forward": lambda m: replace(
        m.blocks[0].attention, "forward", m.blocks[0].attention.forward
    ),
    "blocks.2.attention, which has a forward hook": lambda m: m.blocks[2].attention.register_forward_hook(
        lambda *_: None
    ),
    "blocks.2.attention.local_attn, which is of class Local": lambda m: replace(
        m.blocks[2].attention, "local_attn", Local(m.blocks[2].attention.local_attn)
    ),
}


@pytest.mark.cpu
@pytest.mark.parametrize("said", OBSTACLES)
def test_what_steps_do_not_take_decodes_from_a_value(said: str) -> None:
    """The same tokens; a step, and a recording that was asked for, are refused."""
    model, tokens = model_of(), tokens_of()
    expected = generate(model, tokens, 4, temperature=0)
    _, cache = model(tokens, use_cache=True)
    OBSTACLES[said](model)
    assert torch.equal(generate(model, tokens, 4, temperature=0), expected)
    with pytest.raises(ValueError, match=f"^model: expected one that takes steps in place, got {said}"):
        model.step(tokens[:, 0], cache.static(1))
    with pytest.raises(ValueError, match=f"^graph: expected None or False, where .* got True for {said}"):
        stream(model, tokens, 4, graph=True)


class Linear(nn.Linear):
    pass


@pytest.mark.cpu
def test_what_is_not_recorded() -> None:
    """A replay runs no hook, and of somebody else's module nobody knows whether it asks the device."""
    model, cuda = model_of(), torch.device("cuda")
    assert obstacle_to_recording(model, torch.device("cpu")) == "tokens on cpu"
    assert obstacle_to_recording(model, cuda) is None
    assert obstacle_to_recording(Decoder(config_of(tied=False)).eval(), cuda) is None
    handle = model.blocks[2].attention.attn.to_q.register_forward_hook(doubled)
    assert obstacle_to_recording(model, cuda) == "blocks.2.attention.attn.to_q, which has a forward hook"
    handle.remove()
    model.norm.compile(backend="eager")
    assert obstacle_to_recording(model, cuda) == "norm, which is compiled"
    model.blocks[1].feed_forward.to_out.__class__ = Linear
    assert obstacle_to_recording(model, cuda) == "blocks.1.feed_forward.to_out, which is of class Linear"
    assert model.obstacle_to_steps() is None


@pytest.mark.cpu
def test_layers_of_the_reference_decode_from_a_value() -> None:
    for kind in ("mixture", "local"):
        models = [model_of(package=package, layers=("dense", kind)) for package in ("reference", "optimized")]
        found = [generate(model, tokens_of(), 6, temperature=0) for model in models]
        assert torch.equal(*found)
        said = f"{kind.replace('mixture', 'MixtureOfAutoregressive').replace('local', 'CausalLocal')}Attention"
        assert models[0].obstacle_to_steps().startswith(f"blocks.1.attention, which is of class {said}")


MODEL = model_of()
_, CACHE = MODEL(tokens_of(), use_cache=True)
STEP = {"tokens": tokens_of()[:, 0]}
REFUSED: dict[str, Callable[[], Any]] = {
    "room: expected an integer >= 1, got 0": lambda: CACHE.static(0),
    r"layers\[2\]: expected a Cache of the package optimized, got one of reference": lambda: model_of(
        package="reference"
    )(tokens_of(), use_cache=True)[1].static(1),
    "cache: expected a StaticDecoderCache, as": lambda: MODEL.step(**STEP, cache=CACHE),
    "cache: expected a DecoderCache": lambda: MODEL(tokens_of(), cache=CACHE.static(1)),
    r"tokens: expected shape \(B\)": lambda: MODEL.step(tokens_of(), CACHE.static(1)),
    rf"tokens: expected numbers in \[0, {V}\)": lambda: MODEL.step(STEP["tokens"] + V, CACHE.static(1)),
    "border: expected True or False": lambda: MODEL.step(**STEP, cache=CACHE.static(1), border=1),
    "cache: expected one for batch 1, got one for 2": lambda: MODEL.step(STEP["tokens"][:1], CACHE.static(1)),
    r"cache: expected one for layers \('local',\)": lambda: model_of(layers=("local",)).step(
        **STEP, cache=CACHE.static(1)
    ),
    "other: expected a DecoderCache": lambda: CACHE.static(1).put(CACHE.static(1)),
    "other: expected one for batch 2, got one for 1": lambda: CACHE.static(1).put(CACHE.select(torch.tensor([0]))),
    "other: expected one of at most 16 columns, got one of 17": lambda: CACHE.static(1).put(
        MODEL(tokens_of(2), cache=CACHE, use_cache=True)[1]
    ),
    "graph: expected None or False, where steps cannot be recorded, got True for tokens on cpu": lambda: stream(
        MODEL, tokens_of(), 2, graph=True
    ),
    "graph: expected True or False": lambda: stream(MODEL, tokens_of(), 2, graph=1),
}


@pytest.mark.cpu
@pytest.mark.parametrize("said", REFUSED)
def test_bad_arguments_are_refused(said: str) -> None:
    """And what was given is as it was."""
    with pytest.raises((TypeError, ValueError), match=f"^{said}"):
        REFUSED[said]()
    assert (CACHE.passed, CACHE.length.tolist()) == (15, [15, 15])


@pytest.mark.cpu
def test_steps_ask_nothing() -> None:
    """Where there are no numbers, none can be looked at; and both kinds of caches say what they are of."""
    model = model_of().to("meta")
    _, cache = model(tokens_of().to("meta"), use_cache=True)
    assert isinstance(cache, DecoderCache)
    static = cache.static(2)
    assert isinstance(static, StaticDecoderCache)
    assert not any(t.requires_grad for t in buffers(static).values())
    assert static.kinds() == cache.kinds() == EVERY_KIND
    for border in (False, True):
        assert model.step(tokens_of()[:, 0].to("meta"), static, border).is_meta
    assert static.due().is_meta
