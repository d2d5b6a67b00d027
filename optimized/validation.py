"""Checks of arguments, made before any work. Every message reads `argument: expected ..., got ...`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

if TYPE_CHECKING:
    from optimized.routing import Routes

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WIDE = FLOATING[:2]


def reject(argument: str, expected: str, value: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `argument: expected ..., got ...`; a string stands as it is, other values are described."""
    raise error(f"{argument}: expected {expected}, got {value if isinstance(value, str) else describe(value)}")


def describe(value: object) -> str:
    """Tensors by dtype, shape and device; other values by their repr, shortened."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return text if len(text) <= 100 else f"{type(value).__name__} {text[:80]}..."


def integer(argument: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        reject(argument, f"an integer >= {least}", describe(value), TypeError)
    if value < least:
        reject(argument, f"an integer >= {least}", value)
    return int(value)


def positive_int(argument: str, value: Any) -> int:
    return integer(argument, value, least=1)


def number(argument: str, value: Any, expected: str, holds: Callable[[float], bool]) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        reject(argument, expected, describe(value), TypeError)
    if not math.isfinite(value) or not holds(float(value)):
        reject(argument, expected, value)
    return float(value)


def probability(argument: str, value: Any) -> float:
    return number(argument, value, "a number in [0, 1)", lambda v: 0 <= v < 1)


def flag(argument: str, value: Any) -> bool:
    if not isinstance(value, bool):
        reject(argument, "True or False", describe(value), TypeError)
    return value


def tensor(
    argument: str,
    value: Any,
    *shape: int | str,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    beside: Tensor | None = None,
    dtype_of: tuple[str, Tensor] | None = None,
) -> None:
    """Type, dtype, rank and sizes (a letter stands for a free size), device of `beside`, dtype of `dtype_of`.

    Under autocast `dtype_of` is not asked for: the operations convert.
    """
    if not isinstance(value, Tensor):
        reject(argument, f"a tensor of shape ({', '.join(map(str, shape))})", describe(value), TypeError)
    if value.dtype not in dtypes:
        reject(argument, f"dtype {' or '.join(map(str, dtypes))}", value, TypeError)
    if value.ndim != len(shape) or any(
        not isinstance(size, str) and size != actual for size, actual in zip(shape, value.shape)
    ):
        reject(argument, f"shape ({', '.join(map(str, shape))})", value)
    if beside is not None and value.device != beside.device:
        reject(argument, f"device {beside.device}", value)
    if dtype_of is not None:
        name, other = dtype_of
        # Autocast leaves float64 alone, so it reconciles the other three only.
        converts = torch.is_autocast_enabled(value.device.type) and torch.float64 not in (value.dtype, other.dtype)
        if value.dtype != other.dtype and not converts:
            reject(argument, f"dtype {other.dtype}, that of {name}", value, TypeError)


def token_mask(argument: str, mask: Any, x: Tensor, dim: int = 1) -> None:
    """None, or (B, N) bool, where N is x's size in `dim`."""
    if mask is not None:
        tensor(argument, mask, x.shape[0], x.shape[dim], dtypes=(torch.bool,), beside=x)


def routing_tokens(argument: str, tokens: Any, x: Tensor, experts: int | str, dim: int) -> None:
    """(E, D), or (B, E, D) with one set for each batch item."""
    batched = isinstance(tokens, Tensor) and tokens.ndim == 3
    shape = (x.shape[0], experts, dim) if batched else (experts, dim)
    tensor(argument, tokens, *shape, beside=x, dtype_of=("x", x))
    if tokens.shape[-2] == 0:
        reject(argument, "at least one expert", tokens)


def routes(argument: str, value: Routes, batch: int, experts: int, n: int, beside: Tensor) -> None:
    """Shapes and dtypes, and that indices lie in [0, n) and are distinct within a row.

    The last two read the indices, which a traced, batched or captured call can't; there they are the caller's promise.
    """
    if not (isinstance(value, tuple) and len(value) == 4 and hasattr(type(value), "load")):
        reject(argument, "Routes(indices, mask, scores, logits)", describe(value), TypeError)
    indices, mask, scores, _ = value
    tensor(f"{argument}.indices", indices, batch, experts, "K", dtypes=(torch.int64,), beside=beside)
    tensor(f"{argument}.mask", mask, *indices.shape, dtypes=(torch.bool,), beside=beside)
    tensor(f"{argument}.scores", scores, *indices.shape, dtypes=WIDE, beside=beside)
    if indices.numel() and _readable(indices):
        low, high = (int(v) for v in indices.aminmax())
        if low < 0 or high >= n:
            reject(f"{argument}.indices", f"token positions in [0, {n})", f"values from {low} to {high}")
        if (indices.sort(dim=-1).values.diff(dim=-1) == 0).any():
            reject(f"{argument}.indices", "distinct positions within each (batch, expert)", "a repeated position")


def _readable(t: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(t):
        return False
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def rotary(rotary_emb: Any, x: Tensor, dim_head: int) -> None:
    if rotary_emb is None:
        return
    tensor("rotary_emb", rotary_emb, x.shape[1], dim_head, dtypes=WIDE, beside=x)
    if rotary_emb.requires_grad:
        reject("rotary_emb", "angles that need no gradient", "requires_grad=True")
    if dim_head % 2:
        reject("dim_head", "an even number with rotary embeddings", dim_head)


@dataclass(frozen=True)
class RouterOptions:
    """What a router can be told.

    straight_through: scores are exactly 1 and pass their gradient to the soft scores; else the soft scores themselves.
    solver: "iterative", n_iters steps of coordinate descent at temperatures max(eps_init * eps_decay**t, eps), or
        "exact", its limit at eps. Their mass is min(K * fetch_k_ratio, N).
    cosine_sim_routing, cosine_sim_scale: logits are scaled cosines in place of dot products.
    learned_routing_tokens: the module holds no routing tokens, the caller passes them at forward.
    route_block_size: pick evenly from blocks of so many tokens.

    Raises TypeError or ValueError naming the option.
    """

    straight_through: bool = True
    n_iters: int = 20
    fetch_k_ratio: float = 9 / 8
    eps: float = 0.03
    eps_init: float = 4.0
    eps_decay: float = 0.7
    solver: str = "iterative"
    cosine_sim_routing: bool = False
    cosine_sim_scale: float = 8.0
    learned_routing_tokens: bool = False
    route_block_size: int | None = None

    def __post_init__(self) -> None:
        flag("straight_through", self.straight_through)
        flag("cosine_sim_routing", self.cosine_sim_routing)
        flag("learned_routing_tokens", self.learned_routing_tokens)
        # Numbers of NumPy and the like become Python's: Triton takes no others.
        numbers = {
            "n_iters": positive_int("n_iters", self.n_iters),
            "fetch_k_ratio": number("fetch_k_ratio", self.fetch_k_ratio, "a finite number >= 1", lambda v: v >= 1),
            "eps": number("eps", self.eps, "a finite number > 0", lambda v: v > 0),
            "eps_init": number("eps_init", self.eps_init, "a finite number > 0", lambda v: v > 0),
            "eps_decay": number("eps_decay", self.eps_decay, "a number in (0, 1]", lambda v: 0 < v <= 1),
            "cosine_sim_scale": number(
                "cosine_sim_scale", self.cosine_sim_scale, "a finite number > 0", lambda v: v > 0
            ),
        }
        if self.solver not in ("iterative", "exact"):
            reject("solver", "'iterative' or 'exact'", describe(self.solver))
        if self.route_block_size is not None:
            numbers["route_block_size"] = positive_int("route_block_size", self.route_block_size)
        for name, value in numbers.items():
            object.__setattr__(self, name, value)

    @staticmethod
    def of_module(options: dict[str, Any]) -> RouterOptions:
        return _parse(options, tuple(asdict(RouterOptions())))

    @staticmethod
    def of_stage(options: dict[str, Any]) -> RouterOptions:
        """For `route`, to which routing tokens are always passed."""
        return _parse(options, tuple(n for n in asdict(RouterOptions()) if n != "learned_routing_tokens"))


def _parse(options: dict[str, Any], names: tuple[str, ...]) -> RouterOptions:
    for unknown in options.keys() - set(names):
        reject("router_options", f"names among {', '.join(names)}", describe(unknown), TypeError)
    return RouterOptions(**options)
