"""Attention libraries behind one interface, `interface.Adapter`: a statement of what each can serve, and raw calls.

One file per library; what it serves is a row of `ADAPTERS`. `calls` runs any of them with padding and in parts,
`banded` makes a sliding window of those that take a mask, `draws` the dropout of what `math` writes out. `flex_window`
has no raw form: PyTorch compiles it, gradient included.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from optimized.attention import (
    banded,
    cudnn_flash_attn_4,
    flash_attn_2,
    flash_attn_4,
    flex_window,
    math,
    torch_cudnn,
    torch_efficient,
    torch_flash,
    torch_flash_cpu,
    triton_kernel,
)
from optimized.attention.interface import Adapter, Attended, Setting, Visible
from optimized.attention.request import Request

__all__ = ["ADAPTERS", "Adapter", "Attended", "Request", "Row", "Setting", "Visible", "adapter", "module_name", "note"]


class Row(NamedTuple):
    """A backend of a stage. obstacle(request): None, or in words why it can't serve it."""

    name: str
    obstacle: Callable[[Request], str | None]


def _windowed(library: ModuleType) -> Callable[[Request], str | None]:
    """Flash kernels with a window take no mask, and positions can't be packed."""

    def obstacle(r: Request) -> str | None:
        if r.device.type != "cuda":
            return f"its window runs on CUDA, not on {r.device.type}"
        return library.ADAPTER.obstacle(r) or ("takes no mask" if r.masked else None)

    return obstacle


# Backends by stage, in order of preference.
ADAPTERS: dict[str, tuple[Row, ...]] = {
    "routed_attention": (
        Row("cudnn_flash_attn_4", cudnn_flash_attn_4.ADAPTER.obstacle),
        Row("flash_attn_4", flash_attn_4.ADAPTER.obstacle),
        Row("torch_cudnn", torch_cudnn.ADAPTER.obstacle),
        Row("flash_attn_2", flash_attn_2.ADAPTER.obstacle),
        Row("torch_flash", torch_flash.ADAPTER.obstacle),
        Row("torch_efficient", torch_efficient.ADAPTER.obstacle),
        Row("math", math.ADAPTER.obstacle),
    ),
    "local_attention": (
        Row("flash_attn_4", _windowed(flash_attn_4)),
        Row("flash_attn_2", _windowed(flash_attn_2)),
        Row("torch_flash", _windowed(torch_flash)),
        Row("banded_torch_flash", banded.flash_obstacle),
        Row("banded_torch_efficient", banded.efficient_obstacle),
        Row("banded_math", math.ADAPTER.obstacle),
        Row("flex_attention", flex_window.obstacle),
    ),
}
_LIBRARIES: dict[str, Adapter] = {
    library.__name__.rpartition(".")[2]: library.ADAPTER
    for library in (
        cudnn_flash_attn_4,
        flash_attn_2,
        flash_attn_4,
        math,
        torch_cudnn,
        torch_efficient,
        torch_flash,
        torch_flash_cpu,
        triton_kernel,
    )
}


def adapter(name: str, device: torch.device | None = None) -> Adapter:
    """Of a backend, banded or not, on a device; see `module_name`."""
    name = name.removeprefix(banded.PREFIX)
    return _LIBRARIES[name if device is None else module_name(name, device)]


def module_name(backend: str, device: torch.device) -> str:
    """PyTorch's flash attention is another operator on the CPU; our kernels are the same, interpreted or not."""
    if backend in ("triton", "triton_interpreted"):
        return "triton_kernel"
    return "torch_flash_cpu" if backend == "torch_flash" and device.type == "cpu" else backend


def note(backend: str) -> str:
    """What else a user may want to know of a backend; mostly nothing."""
    known = backend.removeprefix(banded.PREFIX)
    return _LIBRARIES[known].note if known in _LIBRARIES else ""
