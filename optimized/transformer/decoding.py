"""The logits after each further token: by steps in place, recorded or called, or from a cache that is a value."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from optimized.transformer.cache import DecoderCache, StaticDecoderCache
from optimized.transformer.models import Decoder
from optimized.transformer.stepping import obstacle_to_recording

Step = Callable[[], Tensor]
ROOM = 1024  # tokens that buffers have room for at first; then for as many as there are
PAYS = 16  # steps from which on a recording is made where none was asked for: it takes about six
WARM_UPS = 2  # before a recording


def decoding(
    model: Decoder, cache: DecoderCache, most: int, graph: bool | None
) -> Callable[[Int64[Tensor, " B"]], Float[Tensor, "B V"]]:
    """Called with a token of each item, at most `most` times, it returns the logits after it.

    graph: as of `stream`, which has refused what cannot be.
    """
    if model.obstacle_to_steps() is not None:
        return ByValue(model, cache)
    recorded = graph is not False and obstacle_to_recording(model, cache.length.device) is None
    return InPlace(model, cache, most, recorded and (graph is True or most >= PAYS))


class ByValue:
    """From a cache that every call makes anew."""

    def __init__(self, model: Decoder, cache: DecoderCache) -> None:
        self.model, self.cache = model, cache

    def __call__(self, token: Int64[Tensor, " B"]) -> Float[Tensor, "B V"]:
        logits, self.cache = self.model(token[:, None], None, self.cache, use_cache=True, last=True)
        return logits[:, 0]


class InPlace:
    """By steps in buffers, and when these are full in larger ones.

    Whether a border is due is counted on the host. It waits for the device when buffers are made, and then no more.
    """

    room: int
    static: StaticDecoderCache
    token: Int64[Tensor, " B"]
    filled: list[int]
    steps: dict[bool, Step]

    def __init__(self, model: Decoder, cache: DecoderCache, most: int, record: bool) -> None:
        self.model, self.left, self.record = model, most, record
        self._begin(cache)

    def __call__(self, token: Int64[Tensor, " B"]) -> Float[Tensor, "B V"]:
        if not self.room:
            cache = self.static.value()
            self.steps.clear()  # and their memory, before there are others
            self._begin(cache)
        self.room, self.left = self.room - 1, self.left - 1
        border = self._count()
        self.token.copy_(token)
        return self.steps[border]()

    def _begin(self, cache: DecoderCache) -> None:
        config = self.model.config
        grows = "dense" in config.layers or config.mixture_rotary
        self.room = min(self.left, max(ROOM, cache.passed)) if grows else self.left
        self.static = cache.static(self.room)
        self.token = torch.zeros_like(cache.length)
        self.filled = [] if self.static.block is None else self.static.filled().tolist()
        self.steps = {border: partial(self.model.step, self.token, self.static, border) for border in self._kinds()}
        if self.record:
            self.steps = replays(self.steps, partial(self.static.put, cache), cache.length.device)

    def _count(self) -> bool:
        """Whether an item begins a block with its next token, which is counted."""
        block = self.static.block or 0
        due = [filled >= block for filled in self.filled]
        self.filled = [1 if begins else filled + 1 for begins, filled in zip(due, self.filled)]
        return any(due)

    def _kinds(self) -> set[bool]:
        """Which kinds of steps there will be, with border=False or True."""
        filled = self.filled
        kinds = {self._count() for _ in range(min(self.room, 1 + (self.static.block or 0)))}  # one is due by then
        self.filled = filled
        return kinds


def replays(steps: dict[bool, Step], restore: Callable[[], None], device: torch.device) -> dict[bool, Step]:
    """Replays of the steps as CUDA graphs, with their results in place. restore: undoes a step that was called.

    What a with block of the caller sets, autocast and backends, is recorded as it is.
    """
    held = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # what it holds it lets go of when its block ends, and replays would not
    try:
        with torch.cuda.device(device):
            return {border: _replay(step, restore) for border, step in steps.items()}
    finally:
        torch.set_autocast_cache_enabled(held)


def _replay(step: Step, restore: Callable[[], None]) -> Step:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
            restore()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may do as they like meanwhile
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
