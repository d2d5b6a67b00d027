"""Who takes part, by name:

- `optimized`: this layer, with the backends that it chooses; `optimized STAGE=BACKEND ...`: with these;
  `optimized graph`: replayed as a CUDA graph; `optimized graphed`: by torch.cuda.make_graphed_callables, called like
  the layer itself; `optimized compiled`: torch.compile(fullgraph=True);
  `optimized reduce-overhead`: the same with mode="reduce-overhead", which records CUDA graphs itself;
  `optimized deterministic`: torch.use_deterministic_algorithms(True)
- `reference`, `reference compiled`: the readable layer, and that under torch.compile
- `upstream`: mixture-of-attention 0.0.25
- `dense`: LayerNorm, qkv projection, F.scaled_dot_product_attention as it chooses, output projection;
  `dense flash-attn 2`, `dense flash-attn 4`, `dense deterministic`, `dense graph`; all causal beside a causal layer
- what one may take in place of the layer, by FlexAttention between the same projections: `dense flex window` (every
  token sees a window as wide as that of local attention, or of K keys) and `dense flex blocks` (every 128 queries
  see K keys in blocks of 128, which nobody had to choose: a block-sparse attention without its selection)

A name that can't take part raises: the reason becomes its row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import optimized
import reference

from .attentions import Attention, Flex, UnavailableError, attention, some_blocks
from .shapes import Case

FORWARD, BOTH = DIRECTIONS = ("forward", "forward+backward")
COMPILED = {"compiled": "default", "reduce-overhead": "reduce-overhead"}  # modes of torch.compile


class Steps:
    """The two calls that are measured: forward without gradients; forward, and backward to x and all parameters."""

    memory = True  # torch's allocator sees what a call takes

    def __init__(self, call: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> None:
        self.call, self.x = call, x.requires_grad_()
        self.leaves = [self.x, *parameters]
        self.dout = torch.randn_like(x)
        self.backends: dict[str, str] = {}

    def forward(self) -> None:
        with torch.no_grad():
            self.call(self.x)

    def both(self) -> None:
        self.call(self.x).backward(self.dout)

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None

    def direction(self, name: str) -> Callable[[], None]:
        return self.forward if name == FORWARD else self.both


class Replayed(Steps):
    """The same as CUDA graphs, captured at the first call of each direction."""

    memory = False  # a graph keeps its own pool

    def __init__(self, eager: Steps) -> None:
        super().__init__(eager.call, eager.x, eager.leaves[1:])
        self.backends = eager.backends
        self.graphs: dict[str, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def forward(self) -> None:
        self._graph(FORWARD, self._run_forward).replay()

    def both(self) -> None:
        self._graph(BOTH, self._run_both).replay()

    def _run_forward(self) -> Tensor:
        with torch.no_grad():
            return self.call(self.x)

    def _run_both(self) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(self.call(self.x), self.leaves, self.dout, allow_unused=True)

    def _graph(self, direction: str, run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        if direction not in self.graphs:
            self.graphs.clear()  # the memory of the other direction
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # compiles and probes everything
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = run()
            self.graphs[direction] = graph, results
        return self.graphs[direction][0]


class Dense(nn.Module):
    def __init__(self, case: Case, attend: Attention, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads, self.attend = case.dense_heads, attend
        inner = self.heads * case.dim_head
        self.norm = nn.LayerNorm(case.dim, **where)
        self.to_qkv = nn.Linear(case.dim, 3 * inner, bias=False, **where)
        self.to_out = nn.Linear(inner, case.dim, bias=False, **where)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.to_out(self.attend(q, k, v).flatten(2))


@contextlib.contextmanager
def enter(name: str, case: Case, device: torch.device) -> Iterator[Steps]:
    """The competitor named so, ready to run; modes of the process are set back at the end. Raises why it can't."""
    torch.manual_seed(0)
    family, _, mode = name.partition(" ")
    with contextlib.ExitStack() as stack:
        if mode == "deterministic":
            stack.enter_context(_deterministic())
        if mode in COMPILED:
            stack.callback(torch._dynamo.reset)
            torch._dynamo.reset()
        if family == "optimized":
            stack.enter_context(optimized.use_backends(**_choices(mode)))
            yield _optimized(case, device, mode)
        elif family == "reference":
            yield _steps(_layer(reference, case), case, device, compiled=COMPILED.get(mode))
        elif family == "dense":
            yield _dense(case, device, mode)
        elif name == "upstream":
            yield _upstream(case, device)
        else:
            raise UnavailableError(f"no competitor named {name!r}")


def _choices(mode: str) -> dict[str, str]:
    """ "routing=torch mixture=torch" to keywords of `use_backends`."""
    return dict(choice.split("=") for choice in mode.split() if "=" in choice)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _layer(package: Any, case: Case) -> Callable[..., nn.Module]:
    """Of ours, or of whoever has the same names."""
    return package.MixtureOfAutoregressiveAttention if case.causal else package.MixtureOfAttention


def _steps(
    make: Callable[..., nn.Module],
    case: Case,
    device: torch.device,
    *,
    compiled: str | None = None,
    fullgraph: bool = False,
) -> Steps:
    """A layer with the arguments and the forward of ours. compiled: a mode of torch.compile."""
    x, mask = case.make_x(device), case.make_mask(device)
    layer = make(**case.layer_arguments(), device=device, dtype=x.dtype)
    run = torch.compile(layer, dynamic=False, fullgraph=fullgraph, mode=compiled) if compiled else layer
    steps = Steps(lambda given: run(given, mask=mask), x, list(layer.parameters()))
    if isinstance(layer, (optimized.MixtureOfAttention, optimized.MixtureOfAutoregressiveAttention)):
        report = optimized.explain(layer, x, mask=mask)
        steps.backends = {stage: found.backend for stage, found in report.stages.items()}
    return steps


def _optimized(case: Case, device: torch.device, mode: str) -> Steps:
    if mode in ("graph", "graphed", "reduce-overhead") and device.type != "cuda":
        raise UnavailableError("CUDA graphs need CUDA")
    if mode == "graphed":
        return _graphed(case, device)
    steps = _steps(_layer(optimized, case), case, device, compiled=COMPILED.get(mode), fullgraph=True)
    steps.memory = mode != "reduce-overhead"  # whose graphs keep their own pool
    return Replayed(steps) if mode == "graph" else steps


def _graphed(case: Case, device: torch.device) -> Steps:
    """Either direction a graph, with autograd around them."""
    if case.mask != "none":
        raise UnavailableError("torch.cuda.make_graphed_callables takes no keywords")
    x = case.make_x(device)
    layer = _layer(optimized, case)(**case.layer_arguments(), device=device, dtype=x.dtype)
    sample = torch.randn_like(x).requires_grad_()
    graphed: Any = torch.cuda.make_graphed_callables(layer, (sample,), allow_unused_input=True)
    steps = Steps(graphed, x, list(layer.parameters()))
    steps.memory = False  # graphs keep their own pool
    return steps


def _dense(case: Case, device: torch.device, mode: str) -> Steps:
    x, mask = case.make_x(device), case.make_mask(device)
    if mode == "flex window":
        attend = attention("flex", window=case.reach, mask=mask, causal=case.causal)
    elif mode == "flex blocks":
        attend = Flex(some_blocks(case.slots))
    else:
        name = mode if mode.startswith("flash") else "sdpa"
        attend = attention(name, dropout=case.dropout, mask=mask, causal=case.causal)
    layer = Dense(case, attend, device, x.dtype)
    steps = Steps(layer, x, list(layer.parameters()))
    return Replayed(steps) if mode == "graph" else steps


def _upstream(case: Case, device: torch.device) -> Steps:
    """With its PyTorch router: the Triton one of its dependency needs Triton 2."""
    try:
        import mixture_of_attention
    except ImportError as error:
        raise UnavailableError(f"mixture-of-attention is not installed: {error}") from error
    x, mask = case.make_x(device), case.make_mask(device)
    arguments = case.layer_arguments()
    if case.window is None:
        del arguments["local_attn_window_size"]
    arguments.pop("local_attn_heads", None)  # it has as many as `heads`
    layer = _layer(mixture_of_attention, case)(**arguments, use_triton=False).to(device, x.dtype)
    return Steps(lambda given: layer(given, mask=mask), x, list(layer.parameters()))
