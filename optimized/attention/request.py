"""What a stage is asked for, and the probes that several backends share."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Request:
    """All that a probe may look at, and no tensor data."""

    device: torch.device
    dtype: torch.dtype  # of the computation, autocast applied
    dim_head: int = 0
    masked: bool = False  # keys that must be hidden
    dropout: float = 0.0
    allow_flash: bool = True
    allow_triton: bool = True


def constant(probe: Callable[..., str | None]) -> Callable[..., str | None]:
    """Probed once in a process, and not traced by torch.compile."""
    cached = functools.cache(probe)

    @functools.wraps(probe)
    def probed(*arguments: object) -> str | None:
        return cached(*arguments)

    # All that torch.compiler.assume_constant_result does, but that imports the compiler, which takes two seconds.
    probed._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return probed


@constant
def import_obstacle(module: str, package: str) -> str | None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return f"{package} is not installed"
    except ImportError as error:
        return f"{package} can't be imported: {error}"
    return None


@constant
def too_old(device: torch.device) -> str | None:
    return None if torch.cuda.get_device_capability(device) >= (8, 0) else "needs compute capability 8.0"


def off_cuda(r: Request) -> str | None:
    return None if r.device.type == "cuda" else f"runs on CUDA, not on {r.device.type}"


def flash(r: Request, max_dim_head: int) -> str | None:
    """Why no flash kernel for GPUs can serve the request, whichever library's."""
    if not r.allow_flash:
        return "flash_attn=False"
    if r.device.type != "cuda":
        return off_cuda(r)
    if r.dtype not in HALF:
        return f"float16 and bfloat16 only, not {r.dtype}"
    return too_old(r.device) or (f"dim_head {r.dim_head} > {max_dim_head}" if r.dim_head > max_dim_head else None)
