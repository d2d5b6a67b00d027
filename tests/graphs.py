"""Steps of a training recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def recorded(call: Callable[[], Any]) -> Callable[[], None]:
    """A replay of the call, which ran before as a graph wants it; on the current device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
