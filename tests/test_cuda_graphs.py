"""CUDA graphs: forward, and forward with backward, captured once and replayed on new values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graphs import recorded
from harness import attention_backends, check_identical
from strategies import LayerCase, generator

import optimized
from optimized.transformer import decoding

pytestmark = pytest.mark.gpu

CASE = LayerCase(batch=2, n=96, dim=64, experts=2, heads=2, dim_head=16, k_q=24, k_kv=40)
CASES = {
    "routed": CASE,
    "mask": replace(CASE, mask="suffix"),
    "local": replace(CASE, window=9),
    "all taken": replace(CASE, k_q=200, k_kv=200, mask="random"),
    "exact": replace(CASE, options={"solver": "exact", "straight_through": False, "cosine_sim_routing": True}),
    "blocks": replace(CASE, options={"route_block_size": 20}),
    "rotary": replace(CASE, rotary=True),
}


class Captured:
    """A layer whose call, and gradient of x and all parameters, is a graph over fixed tensors."""

    def __init__(self, case: LayerCase, dtype: torch.dtype, backward: bool, device: torch.device, **arguments: object):
        self.layer = optimized.MixtureOfAttention(**(case.arguments() | arguments), device=device, dtype=dtype)
        self.layer.load_state_dict({name: t.to(dtype) for name, t in case.state().items()})
        inputs = case.inputs()
        self.rest = {n: t.to(device) for n, t in inputs.items() if n not in ("x", "context")}
        self.x = inputs["x"].to(dtype).to(device).requires_grad_(backward)
        self.backward = backward
        self.cotangent = torch.randn(self.x.shape, generator=generator(4)).to(dtype).to(device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles and probes everything
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = self.run()

    def run(self) -> list[torch.Tensor]:
        out = self.layer(self.x, **self.rest)
        if not self.backward:
            return [out.detach()]
        leaves = [self.x, *self.layer.parameters()]
        grads = torch.autograd.grad(out, leaves, self.cotangent, allow_unused=True)
        return [out.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves))]

    def replay(self) -> list[torch.Tensor]:
        self.graph.replay()
        return [t.clone() for t in self.results]

    def new_values(self, seed: int) -> None:
        with torch.no_grad():
            self.x.copy_(torch.randn(self.x.shape, generator=generator(seed)))


def assert_equal_eager(replayed: list[torch.Tensor], eager: list[torch.Tensor]) -> None:
    """The output bit for bit; gradients up to the order of the atomic additions in a flash backward."""
    check_identical(replayed[0], eager[0].clone())
    for a, b in zip(replayed[1:], eager[1:]):
        assert (a - b).norm() <= 0.02 * b.norm() + 1e-6


def assert_replays_equal_eager(captured: Captured) -> None:
    previous = None
    for seed in (11, 12, 13):
        captured.new_values(seed)
        replayed, eager = captured.replay(), captured.run()
        assert_equal_eager(replayed, eager)
        assert previous is None or not torch.equal(previous, replayed[0]), "the replay ignored the new values"
        previous = replayed[0]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_replay_with_new_values(name: str, dtype: torch.dtype, backward: bool, device: torch.device) -> None:
    captured = Captured(CASES[name], dtype, backward, device, dropout=0.0)
    assert_replays_equal_eager(captured)


@pytest.mark.parametrize("name", ["routed", "local"])
def test_graphed_callables(name: str, device: torch.device) -> None:
    """torch.cuda.make_graphed_callables: training as before, without the time of the host."""
    case = CASES[name]
    graphed, eager = (
        optimized.MixtureOfAttention(**case.arguments() | {"dropout": 0.0}, device=device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    eager.load_state_dict(graphed.state_dict())
    shape = case.inputs()["x"].shape
    sample = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(graphed, (sample,), allow_unused_input=True)
    for seed in (11, 12, 13):
        x, cotangent = torch.randn(2, *shape, generator=generator(seed)).to(device, torch.bfloat16)
        found = []
        for layer in (graphed, eager):
            leaf = x.clone().requires_grad_()
            out = layer(leaf)
            out.backward(cotangent)
            grads = (torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in layer.parameters())
            found.append([out.detach().clone(), leaf.grad.clone(), *grads])
            layer.zero_grad()
        assert_equal_eager(*found)


@pytest.mark.parametrize(("backend", "dtype"), attention_backends("routed_attention"))
def test_every_attention_backend(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    with optimized.use_backends(routed_attention=backend):
        assert_replays_equal_eager(Captured(CASE, dtype, True, device, dropout=0.0))


@pytest.mark.parametrize(("backend", "dtype"), attention_backends("routed_attention", dropout=0.3))
def test_dropout_draws_anew_at_every_replay(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    with optimized.use_backends(routed_attention=backend):
        captured = Captured(CASE, dtype, True, device, dropout=0.3)
        first, second = captured.replay(), captured.replay()
    assert not torch.equal(first[0], second[0])
    assert all(t.isfinite().all() for t in second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_of_the_causal_layer(batch: int, dtype: torch.dtype, device: torch.device) -> None:
    """Replayed through a block: bit for bit eager steps, by four kernels."""
    layer = optimized.MixtureOfAutoregressiveAttention(
        96, num_routed_queries=4, num_routed_key_values=40, local_attn_window_size=16, num_experts=3, dim_head=32,
        heads=2, device=device, dtype=dtype,
    )  # fmt: skip
    x = torch.randn(batch, 64, 96, generator=generator(6)).to(device, dtype)
    with torch.no_grad():
        _, cache = layer(x[:, :50], use_cache=True)
        static, eager, token = cache.static(), cache.static(), x[:, :1].clone()
        results: list[torch.Tensor] = []
        replay = recorded(lambda: results.append(layer.step(token, static)))
        static.put(cache)
        for t in range(50, 64):
            token.copy_(x[:, t : t + 1])
            replay()
            check_identical(results[-1], layer.step(x[:, t : t + 1], eager))
        for name, t in vars(eager).items():
            if isinstance(t, torch.Tensor):
                check_identical(getattr(static, name), t, name)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            replay()
            torch.cuda.synchronize()
    kernels = {event.key: event.count for event in profile.key_averages() if "_step_" in event.key}
    assert len(kernels) == sum(kernels.values()) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_steps_of_a_decoder(dtype: torch.dtype | None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed they are those that are called, bit for bit, and wait for nothing; None: under autocast.

    Items begin blocks at steps of their own, and buffers are made anew on the way.
    """
    monkeypatch.setattr(decoding, "ROOM", 16)
    mixture = {"num_routed_queries": 4, "num_routed_key_values": 16, "num_experts": 2}
    config = optimized.TransformerConfig(
        50, 64, ("dense", "local", "mixture"), dim_head=16, window=8, mixture=mixture, mixture_rotary=True
    )
    torch.manual_seed(3)
    model = optimized.Decoder(config, device=device, dtype=dtype).eval()
    tokens = torch.randint(50, (3, 70), generator=generator(5)).to(device)
    mask = (torch.arange(30) >= torch.tensor([[0], [7], [29]])).to(device)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=dtype is None):
        _, cache = model(tokens[:, :30], mask, use_cache=True)
        ways, found = [decoding.decoding(model, cache, 40, graph) for graph in (True, False)], []
        for t in range(40):
            waits = t == 30  # for lengths, when buffers are made
            torch.cuda.set_sync_debug_mode("default" if waits else "error")
            try:
                logits = [after(tokens[:, 30 + t]) for after in ways]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            check_identical(logits[0].clone(), logits[1])
            found.append(logits[1])
        assert not torch.equal(found[0], found[-1])
        drawn = []
        for graph in (True, False):
            draws = torch.Generator(device).manual_seed(1)
            drawn.append(optimized.generate(model, tokens[:, :30], 40, mask, generator=draws, graph=graph))
        assert torch.equal(*drawn)


EVERYTHING = {
    "mask": replace(CASE, mask="random", options={"straight_through": False, "cosine_sim_routing": True}),
    "local": replace(CASE, mask="random", window=9),
    "cross": replace(CASE, mask="random", context=80),
    "rotary": replace(CASE, mask="random", rotary=True),
    "routes": replace(CASE, mask="random"),
}
REPLAYS = 100


class Everything(Captured):
    """Of which every input takes new values: x, context, masks, angles, and injected routes with their scores."""

    def __init__(self, name: str, device: torch.device, backward: bool):
        self.routed, self.pair = name == "routes", None
        case = EVERYTHING[name]
        if self.routed:
            layer = optimized.MixtureOfAttention(**case.arguments(), device=device)
            x = case.inputs()["x"].to(device, torch.float32)
            self.pair = tuple(
                r._replace(scores=torch.ones_like(r.scores), logits=r.logits.detach())
                for r in layer(x, return_routes=True)[1]
            )
        self.context = None
        if case.context is not None:
            self.context = case.inputs()["context"].to(device, torch.float32).requires_grad_(backward)
        super().__init__(case, torch.float32, backward, device)

    def run(self) -> list[torch.Tensor]:
        beside = {} if self.context is None else {"context": self.context}
        given = self.rest | beside | ({"routes": self.pair} if self.routed else {})
        out = self.layer(self.x, **given)
        if not self.backward:
            return [out.detach()]
        leaves = [self.x, *beside.values(), *self.layer.parameters()]
        grads = torch.autograd.grad(out, leaves, self.cotangent, allow_unused=True)
        return [out.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves))]

    def new_values(self, seed: int) -> None:
        g = generator(seed)
        with torch.no_grad():
            for t in (self.x, self.context, self.rest.get("rotary_emb")):
                if t is not None:
                    t.copy_(torch.randn(t.shape, generator=g))
            for name, t in self.rest.items():
                if name.endswith("mask"):
                    t.copy_(torch.rand(t.shape, generator=g) < 0.5 + 0.4 * (seed % 2))
            for r in self.pair or ():
                size = r.logits.shape[-1]
                taken = torch.rand(r.logits.shape, generator=g).argsort(-1)[..., : r.indices.shape[-1]]
                assert size > r.indices.shape[-1]
                r.indices.copy_(taken)
                r.mask.copy_(torch.rand(r.mask.shape, generator=g) < 0.8)
                r.scores.copy_(torch.rand(r.scores.shape, generator=g))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", EVERYTHING)
def test_every_input_takes_new_values(
    name: str, backward: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two graphs alive, replayed in turn with eager calls between: bit for bit, with attention that repeats itself."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with optimized.use_backends(routed_attention="math", local_attention="banded_math"):
        both = [Everything(name, device, backward) for _ in range(2)]
        previous = None
        for i in range(REPLAYS):
            captured = both[i % 2]
            captured.new_values(i)
            replayed = captured.replay()
            if i % 10 > 2:
                assert replayed[0].isfinite().all()
            else:  # and now and then against an eager call, after the other graph has run too
                both[1 - i % 2].replay()
                for a, b in zip(replayed, captured.run()):
                    check_identical(a, b.clone())
            assert previous is None or not torch.equal(previous, replayed[0]), "the replay ignored the new values"
            previous = replayed[0]
