"""Which code computes each stage: the registry, its capability probes, and the user's choice.

A backend states why it can't serve a request (`obstacle`), or None if it can. Without a choice the first capable one is
taken, in the order listed; a chosen one that can't serve raises and never gives way to another.
"""

from __future__ import annotations

import functools
import importlib
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
    """obstacle(request): None, or in words why this backend can't serve it. kernel: PyTorch's, of banded blocks."""

    name: str
    obstacle: Callable[[Request], str | None]
    kernel: SDPBackend | None = None

    @property
    def triton(self) -> bool:
        return self.name.startswith("triton")


def _constant(probe: Callable[..., str | None]) -> Callable[..., str | None]:
    """Probed once in a process, and not traced by torch.compile."""
    cached = functools.cache(probe)

    @torch.compiler.assume_constant_result
    @functools.wraps(probe)
    def constant(*arguments: object) -> str | None:
        return cached(*arguments)

    return constant


def _always(request: Request) -> str | None:
    return None


# --- Triton ----------------------------------------------------------------------------------------------------------


@_constant
def _triton_state() -> str | None:
    """missing, compiled or interpreted: decided when the kernels are first imported."""
    try:
        from triton.runtime.interpreter import InterpretedFunction

        from optimized.kernels.rows import load_row
    except ImportError:
        return "missing"
    return "interpreted" if isinstance(load_row, InterpretedFunction) else "compiled"


def _triton(r: Request) -> str | None:
    if not r.allow_triton:
        return "use_triton=False"
    if r.device.type != "cuda":
        return f"runs on CUDA, not on {r.device.type}"
    if _triton_state() != "compiled":
        return "Triton is not installed" if _triton_state() == "missing" else "TRITON_INTERPRET=1 is set"
    return _too_old(r.device)


def _triton_interpreted(r: Request) -> str | None:
    """Slow, for tests, hence listed last."""
    if not r.allow_triton:
        return "use_triton=False"
    if _triton_state() != "interpreted":
        return "Triton is not installed" if _triton_state() == "missing" else "needs TRITON_INTERPRET=1"
    return _interpreter_obstacle() if r.device.type == "cpu" else f"runs on the CPU, not on {r.device.type}"


@_constant
def _interpreter_obstacle() -> str | None:
    """By a run: Triton 3.6 fails in every loop since NumPy 2.4 refuses to convert arrays of one element to numbers."""
    from optimized.kernels.value_score import value_score

    try:
        value_score(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1))
    except Exception as error:
        return f"Triton's interpreter fails here: {error}"
    return None


# --- attention -------------------------------------------------------------------------------------------------------


def _flash(r: Request) -> str | None:
    if not r.allow_flash:
        return "flash_attn=False"
    if r.device.type == "cpu":
        return "no dropout on the CPU" if r.dropout else None
    return _cuda_half(r, max_dim_head=256)


def _flash_attn_2(r: Request) -> str | None:
    if not r.allow_flash:
        return "flash_attn=False"
    return _cuda_half(r, max_dim_head=256) or _flash_2_obstacle(r.device, r.dtype, -(-r.dim_head // 8) * 8)


@_constant
def _flash_2_obstacle(device: torch.device, dtype: torch.dtype, dim_head: int) -> str | None:
    """By a run, since a build may leave head dimensions out, which no version number tells."""
    missing = _import_obstacle("flash_attn.flash_attn_interface", "flash-attn 2")
    if missing:
        return missing
    from optimized.attention import Setting, flash_attn_2

    q = torch.zeros(1, 8, 1, dim_head, device=device, dtype=dtype)
    setting = Setting(scale=1.0)
    try:
        out, lse, state = flash_attn_2.forward(q, q, q, setting)
        flash_attn_2.backward(q, q, q, q, out, lse, state, setting, torch.empty_like(q), torch.empty_like(q))
    except RuntimeError as error:
        return f"flash-attn 2 failed for dim_head {dim_head}: {str(error).splitlines()[0]}"
    return None


def _flash_attn_4(r: Request) -> str | None:
    if not r.allow_flash:
        return "flash_attn=False"
    if r.dropout:
        return "no dropout"
    obstacle = _cuda_half(r, max_dim_head=256)
    if obstacle:
        return obstacle
    return _flash_4_obstacle(r.device, r.dim_head) or _import_obstacle("flash_attn.cute.interface", "flash-attn 4")


@_constant
def _import_obstacle(module: str, package: str) -> str | None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return f"{package} is not installed"
    except ImportError as error:
        return f"{package} can't be imported: {error}"
    return None


def _efficient(r: Request) -> str | None:
    if r.device.type != "cuda":
        return f"runs on CUDA, not on {r.device.type}"
    return "no float64" if r.dtype == torch.float64 else None


def _cudnn(r: Request) -> str | None:
    if torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic"
    return _cudnn_forward(r)


def _cudnn_forward(r: Request) -> str | None:
    if not r.allow_flash:
        return "flash_attn=False"
    if r.device.type == "cuda" and not _cudnn_available():
        return "cuDNN is not available"
    if r.dropout or r.masked:
        return "used here without dropout and mask only"
    return _cuda_half(r, max_dim_head=128)


def _cudnn_flash_4(r: Request) -> str | None:
    return _cudnn_forward(r) or _flash_attn_4(r)


@_constant
def _flash_4_obstacle(device: torch.device, dim_head: int) -> str | None:
    major, _ = torch.cuda.get_device_capability(device)
    if major not in (9, 10, 11):
        return "needs compute capability 9.0, 10.x or 11.x"
    return f"dim_head {dim_head} > 128" if dim_head > 128 and major > 9 else None


@_constant
def _too_old(device: torch.device) -> str | None:
    return None if torch.cuda.get_device_capability(device) >= (8, 0) else "needs compute capability 8.0"


@torch.compiler.assume_constant_result
def _cudnn_available() -> bool:
    return torch.backends.cudnn.is_available()


def _cuda_half(r: Request, max_dim_head: int) -> str | None:
    if r.device.type != "cuda":
        return f"runs on CUDA, not on {r.device.type}"
    if r.dtype not in HALF:
        return f"float16 and bfloat16 only, not {r.dtype}"
    return _too_old(r.device) or (f"dim_head {r.dim_head} > {max_dim_head}" if r.dim_head > max_dim_head else None)


# --- sliding window --------------------------------------------------------------------------------------------------


def _windowed(obstacle: Callable[[Request], str | None]) -> Callable[[Request], str | None]:
    """Flash kernels with a window take no mask, and positions can't be packed."""

    def windowed(r: Request) -> str | None:
        if r.device.type != "cuda":
            return f"its window runs on CUDA, not on {r.device.type}"
        return obstacle(r) or ("takes no mask" if r.masked else None)

    return windowed


def _flex(r: Request) -> str | None:
    if not r.allow_triton:
        return "use_triton=False"
    if r.device.type != "cuda":
        return f"runs on CUDA, not on {r.device.type}"
    if r.dtype == torch.float64:
        return "no float64"
    return "an empty query or key dimension" if r.empty else None


def _banded_flash(r: Request) -> str | None:
    if not r.allow_flash:
        return "flash_attn=False"
    if r.device.type != "cpu":
        return f"takes the mask of a band on the CPU only, not on {r.device.type}"
    return "an empty query or key dimension" if r.empty else None


def _banded_efficient(r: Request) -> str | None:
    obstacle = _efficient(r)
    if obstacle:
        return obstacle
    aligned = 4 if r.dtype == torch.float32 else 8  # 16 bytes
    if r.dim_head % aligned:
        return f"dim_head {r.dim_head} is no multiple of {aligned}"
    return "an empty query or key dimension" if r.empty else None


TRITON = (Backend("triton", _triton), Backend("torch", _always), Backend("triton_interpreted", _triton_interpreted))
REGISTRY: dict[str, tuple[Backend, ...]] = {
    "routing": TRITON,
    "dispatch": TRITON,
    "routed_attention": (
        Backend("cudnn_flash_attn_4", _cudnn_flash_4),
        Backend("flash_attn_4", _flash_attn_4),
        Backend("torch_cudnn", _cudnn),
        Backend("flash_attn_2", _flash_attn_2),
        Backend("torch_flash", _flash),
        Backend("torch_efficient", _efficient),
        Backend("math", _always),
    ),
    "local_attention": (
        Backend("flash_attn_4", _windowed(_flash_attn_4)),
        Backend("flash_attn_2", _windowed(_flash_attn_2)),
        Backend("torch_flash", _windowed(_flash)),
        Backend("banded_torch_flash", _banded_flash, SDPBackend.FLASH_ATTENTION),
        Backend("banded_torch_efficient", _banded_efficient, SDPBackend.EFFICIENT_ATTENTION),
        Backend("banded_math", _always, SDPBackend.MATH),
        Backend("flex_attention", _flex),
    ),
    "mixture": TRITON,
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
    reason = backend.obstacle(request)
    if reason is not None:
        raise ValueError(f"{stage}: expected a backend that can run here, got {name!r}: {reason}")
    return backend


def obstacle(stage: str, name: str, request: Request) -> str | None:
    """Why a backend can't serve a request, or None if it can."""
    return _by_name(stage, name).obstacle(request)


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
