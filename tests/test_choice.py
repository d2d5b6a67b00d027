"""Whose choice of backends counts: that of the blocks around a call, in its own thread and task, then the process'."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import optimized
from optimized import plan
from optimized.attention import Request
from optimized.choice import Choices, choices

pytestmark = pytest.mark.cpu

STAGES = {"routed_attention": "math", "local_attention": "banded_math", "routing": "torch", "mixture": "torch"}
RIVALS = ("math", "torch_flash")  # of routed attention, on every CPU


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    before = choices()
    yield
    assert choices() == before
    assert before.process == ()


@pytest.fixture
def default() -> Iterator[Callable[..., None]]:
    yield optimized.set_default_backends
    optimized.choice._process.stages = ()


def layer_and_x() -> tuple[nn.Module, Tensor]:
    layer = optimized.MixtureOfAttention(
        16, num_routed_queries=5, num_routed_key_values=6, num_experts=2, dim_head=8, heads=2
    )
    return layer.eval(), torch.randn(2, 21, 16)


def chosen(stage: str = "routed_attention") -> str | None:
    return choices().of(stage)


def in_thread(work: Callable[[], object]) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=12))
def test_blocks_in_any_order(steps: list[tuple[bool, int]]) -> None:
    """Beside a list of what is open: each object is entered again and again, and left whenever it is open."""
    objects = (
        optimized.use_backends(routed_attention="math", routing="torch"),
        optimized.use_backends(routed_attention="torch_flash"),
        optimized.use_backends(routed_attention=None, mixture="torch"),
    )
    opened: list[int] = []

    def leave(which: int) -> None:
        objects[which].__exit__(None, None, None)
        del opened[len(opened) - 1 - opened[::-1].index(which)]

    for enters, which in steps:
        if enters:
            objects[which].__enter__()
            opened.append(which)
        elif which in opened:
            leave(which)
        expected: dict[str, str | None] = {}
        for i in opened:
            expected |= objects[i].stages
        assert {stage: chosen(stage) for stage in STAGES} == {stage: expected.get(stage) for stage in STAGES}
    while opened:
        leave(opened[0])
    for unused in objects:
        with unused:
            pass


def test_a_block_is_of_its_thread() -> None:
    """Both hold at once; a call by one, which raises in the other's place, and who opened none is left alone."""
    barrier, found = threading.Barrier(3), {}
    layer, x = layer_and_x()
    rules_out = layer_and_x()[0].train()  # has dropout, which flash attention hasn't on a CPU

    def work(name: str) -> None:
        with optimized.use_backends(routed_attention=name):
            barrier.wait(60)
            found[name] = optimized.explain(layer, x).stages["routed_attention"].backend
            try:
                rules_out(x)
            except ValueError as error:
                found[name] = f"{found[name]}, {error}"
            barrier.wait(60)

    threads = [threading.Thread(target=work, args=(name,)) for name in RIVALS]
    for thread in threads:
        thread.start()
    barrier.wait(60)
    assert chosen() is None
    rules_out(x)
    barrier.wait(60)
    for thread in threads:
        thread.join()
    assert found["math"] == "math"
    assert found["torch_flash"].startswith("torch_flash, routed_attention: expected a backend that can run here")


def test_a_block_is_of_its_task() -> None:
    """And of the tasks that are started inside."""

    async def inner() -> str | None:
        await asyncio.sleep(0)
        return chosen()

    async def work(name: str) -> list[str | None]:
        found = []
        with optimized.use_backends(routed_attention=name):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(chosen())
            found.append(await asyncio.create_task(inner()))
        return [*found, chosen()]

    async def both() -> list[list[str | None]]:
        return await asyncio.gather(*(work(name) for name in RIVALS))

    assert asyncio.run(both()) == [[name] * 4 + [None] for name in RIVALS]


def test_the_default_reaches_every_thread(default: Callable[..., None]) -> None:
    """One that runs already, too, and blocks that do not name the stage; those that do count before."""
    ready, changed = threading.Event(), threading.Event()

    def work() -> tuple[str | None, ...]:
        with optimized.use_backends(routing="torch", mixture=None):
            ready.set()
            assert changed.wait(60)
            return chosen(), chosen("routing"), chosen("mixture")

    found: list[tuple[str | None, ...]] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    assert ready.wait(60)
    default(routed_attention="math", mixture="torch")
    changed.set()
    thread.join()
    assert found == [("math", "torch", None)]
    layer, x = layer_and_x()
    assert in_thread(lambda: optimized.explain(layer, x).stages["routed_attention"].backend) == "math"
    default(routed_attention=None)
    assert (chosen(), chosen("mixture")) == (None, "torch")


def test_defaults_of_many_threads_are_all_kept(default: Callable[..., None]) -> None:
    barrier = threading.Barrier(len(STAGES))

    def work(stage: str, name: str) -> None:
        barrier.wait(60)
        for _ in range(20):
            default(**{stage: None})
            default(**{stage: name})

    threads = [threading.Thread(target=work, args=pair) for pair in STAGES.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {stage: chosen(stage) for stage in STAGES} == STAGES


def test_a_block_left_elsewhere_is_an_error() -> None:
    block = optimized.use_backends(routed_attention="math")

    def leave() -> str:
        try:
            block.__exit__(None, None, None)
        except RuntimeError as error:
            return str(error)
        return "left"

    with block:
        assert str(in_thread(leave)).startswith("use_backends: expected to be left in the thread")
        assert chosen() == "math"


def test_a_choice_outside_of_a_block_warns() -> None:
    """It chose nothing: that is not passed over in silence."""
    with pytest.warns(RuntimeWarning, match=r"got \{'routed_attention': 'math'\} outside .*set_default_backends"):
        optimized.use_backends(routed_attention="math")
    assert chosen() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with optimized.use_backends(routed_attention="math"):
            pass
        with pytest.raises(TypeError):
            optimized.use_backends(attention="math")


def test_a_compiled_call_is_that_of_its_choice(default: Callable[..., None]) -> None:
    """Traced in one graph whatever is chosen; a graph serves the choice that it was made for, in each thread."""
    torch.compiler.reset()
    layer, x = layer_and_x()
    made = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=made)

    def backend_of_newest() -> str:
        (node,) = (n for n in made.graphs[-1].graph.nodes if "moa.mixture" in str(n.target))
        _, backend = (a for a in node.args if isinstance(a, str))  # after the solver
        return backend

    for name in RIVALS:
        with optimized.use_backends(routed_attention=name):
            out = compiled(x)
            assert backend_of_newest() == name
            assert torch.equal(out, layer(x))
    assert made.frame_count == 2
    for name in RIVALS:
        with optimized.use_backends(routed_attention=name):
            assert torch.equal(compiled(x), layer(x))
    assert made.frame_count == 2
    in_thread(lambda: compiled(x))
    assert made.frame_count == 3
    default(routed_attention="math")
    in_thread(lambda: compiled(x))
    assert (made.frame_count, backend_of_newest()) == (4, "math")


def test_a_backward_asks_for_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it runs in threads of autograd's. Only a checkpoint, which calls the layer again, does."""
    layer, x = layer_and_x()
    with optimized.use_backends(routed_attention="math"):
        out = layer(x.requires_grad_())
        expected = torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0]
    monkeypatch.setattr(plan, "choices", lambda: pytest.fail("asked for a choice"))
    assert torch.equal(in_thread(lambda: torch.autograd.grad(out.square().sum(), x)[0]), expected)


def test_a_checkpoint_takes_a_block_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed in another thread, as on a GPU, and after the block."""
    layer, x = layer_and_x()
    asked: list[str | None] = []
    real = plan.choices

    def noting() -> plan.Choices:
        asked.append(real().of("routed_attention"))
        return real()

    monkeypatch.setattr(plan, "choices", noting)
    block = optimized.use_backends(routed_attention="math")
    out = checkpoint(layer, x.requires_grad_(), use_reentrant=False, context_fn=lambda: (block, block))
    in_thread(lambda: out.square().sum().backward())
    assert asked == ["math", "math"]
    assert chosen() is None


def test_plans_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every call is of another kind, as with a probability of dropout that changes."""
    monkeypatch.setattr(plan, "MOST_PLANS", 4)
    monkeypatch.setattr(plan, "_plans", {})
    for step in range(1, 20):
        kind = plan.Kind(torch.device("cpu"), torch.float32, ("routed_attention",), 8, dropout=1 / (step + 1))
        assert plan.bind(kind).routed_attention == "math"
        assert 0 < len(plan._plans) <= 4


def test_a_slower_backend_is_taken_where_nothing_faster_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is listed first and has a reservation gives way to what comes after it, not to an obstacle, nor to a
    choice.
    """

    def narrow(r: Request) -> str | None:
        return "too wide" if r.dim_head > 64 else None

    slow = plan.Backend("slow", lambda r: None, lambda r: None if r.masked else "no")
    fast, last = plan.Backend("fast", narrow), plan.Backend("last", lambda r: "never")
    monkeypatch.setitem(plan.REGISTRY, "routing", (slow, fast, last))
    request = Request(torch.device("cpu"), torch.float32, 64)
    for asked, name in (
        (request, "fast"),
        (replace(request, masked=True), "slow"),
        (replace(request, dim_head=128), "slow"),
    ):
        assert plan.choose("routing", asked).name == name
    assert plan.choose("routing", request, Choices((), (("routing", "slow"),))).name == "slow"


@pytest.mark.parametrize(
    ("dtype", "dim_head", "masked", "fastest"),
    [
        (torch.bfloat16, 64, False, True),
        (torch.float16, 16, False, True),
        (torch.bfloat16, 48, False, False),
        (torch.bfloat16, 128, False, False),
        (torch.bfloat16, 128, True, True),
        (torch.float32, 64, False, False),
        (torch.float32, 64, True, False),
    ],
)
def test_where_our_window_is_the_fastest(dtype: torch.dtype, dim_head: int, masked: bool, fastest: bool) -> None:
    request = Request(torch.device("cuda"), dtype, dim_head, masked)
    assert (plan.REGISTRY["local_attention"][0].reservation(request) is None) == fastest
