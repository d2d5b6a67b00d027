"""Which code computes each stage: the registry of backends, how the user chooses, and the plan of a call.

A backend states why it can't serve a request (`obstacle`), or None if it can. Without a choice it is the first capable
one, in the order listed, that none after it outruns (`reservation`); a chosen one that can't serve raises and never
gives way to another. A `Plan` is what came out of it for one kind of call: it is looked up once a call, and all stages
work by it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NamedTuple

import torch

from optimized.attention import ADAPTERS, Request, triton_kernel
from optimized.attention.request import HALF, constant, too_old
from optimized.choice import Choices, choices, choose_for_process, close_block, open_block


def _always(request: Request) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """obstacle(request): None, or in words why this backend can't serve it.

    reservation(request): likewise, why it can, but one that is listed after it does so faster.
    """

    name: str
    obstacle: Callable[[Request], str | None]
    reservation: Callable[[Request], str | None] = _always

    @property
    def triton(self) -> bool:
        return self.name.startswith("triton")


# --- Triton ----------------------------------------------------------------------------------------------------------


@constant
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
    return too_old(r.device)


def _triton_interpreted(r: Request) -> str | None:
    """Slow, for tests, hence listed last."""
    if not r.allow_triton:
        return "use_triton=False"
    if _triton_state() != "interpreted":
        return "Triton is not installed" if _triton_state() == "missing" else "needs TRITON_INTERPRET=1"
    return _interpreter_obstacle() if r.device.type == "cpu" else f"runs on the CPU, not on {r.device.type}"


@constant
def _interpreter_obstacle() -> str | None:
    """By a run: Triton 3.6 fails in every loop since NumPy 2.4 refuses to convert arrays of one element to numbers."""
    from optimized.kernels.value_score import value_score

    try:
        value_score(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1))
    except Exception as error:
        return f"Triton's interpreter fails here: {error}"
    return None


MOST_WINDOW_CHANNELS = 128  # of a head: rows of more don't fit in shared memory


def _window(probe: Callable[[Request], str | None]) -> Callable[[Request], str | None]:
    """Of our kernel of a sliding window."""

    def obstacle(r: Request) -> str | None:
        too_wide = f"dim_head {r.dim_head} > {MOST_WINDOW_CHANNELS}" if r.dim_head > MOST_WINDOW_CHANNELS else None
        return probe(r) or too_wide

    return obstacle


def _window_reservation(r: Request) -> str | None:
    """Where libraries were faster on an H200: products in exact float32, and tiles that are padded or too large.

    Of libraries none but banded ones take a mask, and of these none is faster in half precision.
    """
    if r.dtype not in HALF:
        return "libraries are faster but in float16 and bfloat16"
    return None if r.masked or r.dim_head in (16, 32, 64) else "libraries are faster but at dim_head 16, 32, 64"


def _attention(probe: Callable[[Request], str | None]) -> Callable[[Request], str | None]:
    """Of our kernel of routed attention."""

    def obstacle(r: Request) -> str | None:
        return probe(r) or triton_kernel.ADAPTER.obstacle(r)

    return obstacle


# --- registry --------------------------------------------------------------------------------------------------------

TRITON = (Backend("triton", _triton), Backend("torch", _always), Backend("triton_interpreted", _triton_interpreted))
BY_TRITON = ("routing", "dispatch", "mixture")  # or by PyTorch: these stages have no other choice
REGISTRY: dict[str, tuple[Backend, ...]] = {
    "routing": TRITON,
    "dispatch": TRITON,
    **{stage: tuple(Backend(a.name, a.obstacle) for a in adapters) for stage, adapters in ADAPTERS.items()},
    "mixture": TRITON,
}
_compiled, *_, _interpreted = TRITON
REGISTRY["local_attention"] = (
    Backend(_compiled.name, _window(_compiled.obstacle), _window_reservation),
    *REGISTRY["local_attention"],
    Backend(_interpreted.name, _window(_interpreted.obstacle)),
)
_libraries = REGISTRY["routed_attention"]
_slower = [backend.name for backend in _libraries].index("flash_attn_2")  # and all after it: docs/lab-log.md
REGISTRY["routed_attention"] = (
    *_libraries[:_slower],
    Backend(_compiled.name, _attention(_compiled.obstacle)),
    *_libraries[_slower:],
    Backend(_interpreted.name, _attention(_interpreted.obstacle)),
)


def backends() -> dict[str, tuple[str, ...]]:
    """Names of the backends of each stage, in order of preference."""
    return {stage: tuple(b.name for b in options) for stage, options in REGISTRY.items()}


def choose(stage: str, request: Request, chosen: Choices | None = None) -> Backend:
    """The backend that serves the request. Raises ValueError if the user's choice can't.

    chosen: what `choices` told; by default it is asked now.
    """
    name = (choices() if chosen is None else chosen).of(stage)
    if name is None:
        first = None
        for backend in REGISTRY[stage]:  # no further than need be: to probe some imports them
            if backend.obstacle(request) is None:
                if backend.reservation(request) is None:
                    return backend
                first = first or backend
        assert first is not None  # the last resort of each stage has no reservation
        return first
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
    """Fix the backend of stages in a `with` block: `with use_backends(routed_attention="math"):`.

    Keywords are stages (`optimized.backends()` lists them and their backends); None is the automatic choice. Inner
    blocks count before outer ones, these before `set_default_backends`. A block holds for the thread or asyncio task
    that opened it (for its context, as `contextvars` has it), and for tasks started there; other threads don't see it,
    nor do those in which autograd recomputes a checkpoint on a GPU: pass it to `checkpoint` as `context_fn`, or set
    the default. An object may be entered again, inside itself too, and blocks may end in any order.

    Raises TypeError for an unknown stage, ValueError for an unknown backend or one that no device of this machine can
    run, RuntimeError where a block is left in another context than it was entered in; a call that the chosen backend
    can't serve raises ValueError too. Warns where an object was never entered: it chose nothing.
    """

    _idle = False

    def __init__(self, **stages: str | None) -> None:
        _check(stages)
        self.stages = stages
        self._idle = True

    def __enter__(self) -> use_backends:
        self._idle = False
        open_block(self, self.stages)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not close_block(self):
            raise RuntimeError("use_backends: expected to be left in the thread or task that entered it, got another")

    def __del__(self) -> None:
        if self._idle:
            warnings.warn(
                f"use_backends: expected in a `with` block, got {self.stages} outside of one, where it chooses nothing;"
                " optimized.set_default_backends chooses for the process",
                RuntimeWarning,
                stacklevel=2,
            )


def set_default_backends(**stages: str | None) -> None:
    """Fix the backend of stages for the whole process, all its threads; None returns to the automatic choice.

    Keywords are stages, as in `use_backends`, whose blocks count before; stages that are not named stay as they were.
    Raises TypeError for an unknown stage, ValueError for an unknown backend or one that no device of this machine can
    run.
    """
    _check(stages)
    choose_for_process(stages)


def _check(stages: dict[str, str | None]) -> None:
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
            raise ValueError(f"{stage}: expected a backend that can run on this machine, got {name!r}: {obstacles[0]}")


# --- plan of a call --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The backends of a kind of call. Of stages that were not asked for: False or ""."""

    dtype: torch.dtype  # of projections and attention, autocast applied
    masked: bool  # keys of the routed attention may have to be hidden
    routing: bool = False  # by Triton, and so the next two
    dispatch: bool = False
    mixture: bool = False
    routed_attention: str = ""
    local_attention: str = ""


class Kind(NamedTuple):
    """What tells one kind of call from another: all that decides between backends, and no tensor.

    stages: those that the call has. masked: keys of the routed attention may be hidden; token_mask: x has a mask.
    """

    device: torch.device
    dtype: torch.dtype  # of x
    stages: tuple[str, ...]
    dim_head: int = 0
    masked: bool = False
    token_mask: bool = False
    dropout: float = 0.0
    allow_flash: bool = True
    allow_triton: bool = True

    @property
    def computed_in(self) -> torch.dtype:
        device = self.device.type
        # Autocast leaves float64 alone, and does not know of the meta device.
        if self.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
            return self.dtype
        return torch.get_autocast_dtype(device)

    def request(self, stage: str) -> Request:
        """What the call asks of a stage."""
        allowed = {"allow_flash": self.allow_flash, "allow_triton": self.allow_triton}
        if stage == "routing":
            return Request(self.device, torch.promote_types(self.dtype, torch.float32), **allowed)
        if stage == "dispatch":
            return Request(self.device, self.dtype, **allowed)
        if stage == "mixture":
            return Request(self.device, self.computed_in, **allowed)
        if stage == "local_attention":
            return Request(self.device, self.computed_in, self.dim_head, self.token_mask, **allowed)
        return Request(self.device, self.computed_in, self.dim_head, self.masked, self.dropout, **allowed)


_plans: dict[tuple[Kind, torch.dtype, bool, Choices], Plan] = {}
MOST_PLANS = 1024  # that `_plans` holds: a probability of dropout that changes with every step makes a new kind


def bind(kind: Kind) -> Plan:
    """The plan of a kind of call. Raises ValueError where a chosen backend can't serve it."""
    chosen = choices()  # once: another thread may set the default meanwhile
    if torch.compiler.is_compiling():
        return _bind(kind, chosen)
    key = kind, kind.computed_in, torch.are_deterministic_algorithms_enabled(), chosen
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = _bind(kind, chosen)
    return plan


def _bind(kind: Kind, chosen: Choices) -> Plan:
    plan = Plan(kind.computed_in, kind.masked)
    for stage in kind.stages:
        backend = choose(stage, kind.request(stage), chosen)
        taken: dict[str, Any] = {stage: backend.triton if stage in BY_TRITON else backend.name}
        plan = replace(plan, **taken)
    return plan
