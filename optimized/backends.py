"""Which code computes each stage: the registry, its capability probes, and the user's choice.

A backend states why it can't serve a request (`obstacle`), or None if it can. Without a choice the first capable one is
taken, in the order listed; a chosen one that can't serve raises and never gives way to another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch
from torch.nn.attention import SDPBackend

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Request:
    """What a stage is asked for: all that a probe may look at, and no tensor data."""

    device: torch.device
    dtype: torch.dtype  # of the computation, autocast applied
    dim_head: int = 0
    masked: bool = False  # keys that must be hidden
    dropout: float = 0.0
    empty: bool = False  # nothing to attend from or to
    allow_flash: bool = True
    allow_triton: bool = True


@dataclass(frozen=True)
class Backend:
    """obstacle(request): None, or in words why this backend can't serve it. kernel: for attention, PyTorch's."""

    name: str
    obstacle: Callable[[Request], str | None]
    kernel: SDPBackend | None = None


def _always(request: Request) -> str | None:
    return None


def _flash(r: Request) -> str | None:
    if not r.allow_flash:
        return "flash_attn=False"
    if r.dropout and r.device.type == "cpu":
        return "no dropout on the CPU"
    if r.empty:
        return "an empty query or key dimension"
    if r.device.type == "cpu":
        return None
    return _cuda_half(r, max_dim_head=256) or ("takes no mask" if r.masked else None)


def _efficient(r: Request) -> str | None:
    if r.device.type != "cuda":
        return f"runs on CUDA, not on {r.device.type}"
    if r.dtype == torch.float64:
        return "no float64"
    aligned = 4 if r.dtype == torch.float32 else 8  # 16 bytes
    if r.dim_head % aligned:
        return f"dim_head {r.dim_head} is no multiple of {aligned}"
    return "an empty query or key dimension" if r.empty else None


def _cudnn(r: Request) -> str | None:
    if not r.allow_flash:
        return "flash_attn=False"
    if r.device.type == "cuda" and not _cudnn_available():
        return "cuDNN is not available"
    if r.dim_head % 8:
        return f"dim_head {r.dim_head} is no multiple of 8"
    if r.dropout or r.masked:
        return "used here without dropout and mask only"
    return _cuda_half(r, max_dim_head=128)


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def _cudnn_available() -> bool:
    return torch.backends.cudnn.is_available()


def _cuda_half(r: Request, max_dim_head: int) -> str | None:
    if r.device.type != "cuda":
        return f"runs on CUDA, not on {r.device.type}"
    if r.dtype not in HALF:
        return f"float16 and bfloat16 only, not {r.dtype}"
    if _capability(r.device) < (8, 0):
        return "needs compute capability 8.0"
    if r.dim_head > max_dim_head:
        return f"dim_head {r.dim_head} > {max_dim_head}"
    return "an empty query or key dimension" if r.empty else None


ATTENTION = (
    Backend("torch_flash", _flash, SDPBackend.FLASH_ATTENTION),
    Backend("torch_cudnn", _cudnn, SDPBackend.CUDNN_ATTENTION),
    Backend("torch_efficient", _efficient, SDPBackend.EFFICIENT_ATTENTION),
    Backend("math", _always, SDPBackend.MATH),
)
REGISTRY: dict[str, tuple[Backend, ...]] = {
    "routing": (Backend("torch", _always),),
    "routed_attention": ATTENTION,
    "local_attention": tuple(Backend(f"banded_{b.name}", b.obstacle, b.kernel) for b in ATTENTION),
    "mixture": (Backend("torch", _always),),
}
_chosen: dict[str, str | None] = dict.fromkeys(REGISTRY)


def backends() -> dict[str, tuple[str, ...]]:
    """Names of the backends of each stage, in order of preference."""
    return {stage: tuple(b.name for b in options) for stage, options in REGISTRY.items()}


def choose(stage: str, request: Request) -> Backend:
    """The backend that serves the request. Raises ValueError if the user's choice can't."""
    name = _chosen[stage]
    if name is None:
        return next(b for b in REGISTRY[stage] if b.obstacle(request) is None)
    backend = _by_name(stage, name)
    obstacle = backend.obstacle(request)
    if obstacle is not None:
        raise ValueError(f"{stage}: expected a backend that can run here, got {name!r}: {obstacle}")
    return backend


def _by_name(stage: str, name: str) -> Backend:
    for backend in REGISTRY[stage]:
        if backend.name == name:
            return backend
    raise ValueError(f"{stage}: expected one of {', '.join(backends()[stage])} or None, got {name!r}")


class use_backends:
    """Fix the backend of stages: `use_backends(routed_attention="math")`, for good or in a `with` block.

    Keywords are stages (`optimized.backends()` lists them and their backends); None returns to the automatic choice.
    The choice holds for the whole process. Raises TypeError for an unknown stage, ValueError for an unknown backend or
    one that no device of this machine can run; a call that the chosen backend can't serve raises ValueError too.
    """

    def __init__(self, **stages: str | None) -> None:
        devices = [torch.device("cpu")] + [torch.device("cuda", 0)] * torch.cuda.is_available()
        for stage, name in stages.items():
            if stage not in REGISTRY:
                raise TypeError(f"stage: expected one of {', '.join(REGISTRY)}, got {stage!r}")
            if name is None:
                continue
            backend = _by_name(stage, name)
            requests = [Request(device, dtype, 64) for device in devices for dtype in (torch.float32, *HALF)]
            obstacles = [backend.obstacle(request) for request in requests]
            if None not in obstacles:
                raise ValueError(
                    f"{stage}: expected a backend that can run on this machine, got {name!r}: {obstacles[0]}"
                )
        self._previous = {stage: _chosen[stage] for stage in stages}
        _chosen.update(stages)

    def __enter__(self) -> use_backends:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _chosen.update(self._previous)
