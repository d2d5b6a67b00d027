"""Checks of arguments, made before any work. Every message reads `argument: expected ..., got ...`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def describe(value: object) -> str:
    """A value for a message: tensors by dtype, shape and device, anything long by its type and beginning."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return text if len(text) <= 100 else f"{type(value).__name__} {text[:80]}..."


def fail(argument: str, expected: str, got: object, kind: type[Exception] = ValueError) -> NoReturn:
    """`got` is described, or, if it is a string, quoted as it stands."""
    raise kind(f"{argument}: expected {expected}, got {got if isinstance(got, str) else describe(got)}")


def check_int(argument: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        fail(argument, f"an integer >= {least}", describe(value), TypeError)
    if value < least:
        fail(argument, f"an integer >= {least}", describe(value))
    return int(value)


def check_real(argument: str, value: Any, expected: str, holds: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        fail(argument, expected, describe(value), TypeError)
    if not (math.isfinite(value) and holds(value)):
        fail(argument, expected, describe(value))
    return float(value)


def check_bool(argument: str, value: Any) -> bool:
    if not isinstance(value, bool):
        fail(argument, "True or False", describe(value), TypeError)
    return value


def check_tensor(
    argument: str,
    value: Any,
    shape: tuple[int | str, ...],
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    like: Tensor | None = None,
) -> None:
    """Rank, sizes (a str names a free size), dtype, and the device of `like`."""
    sizes = "(" + ", ".join(str(s) for s in shape) + ")"
    if not isinstance(value, Tensor):
        fail(argument, f"a tensor of shape {sizes}", describe(value), TypeError)
    if value.dtype not in dtypes:
        fail(argument, "dtype " + " or ".join(str(t) for t in dtypes), describe(value), TypeError)
    fits = value.ndim == len(shape) and all(isinstance(w, str) or n == w for n, w in zip(value.shape, shape))
    if not fits:
        fail(argument, f"shape {sizes}", describe(value))
    if like is not None and value.device != like.device:
        fail(argument, f"device {like.device}", describe(value))


def check_same_dtype(argument: str, value: Tensor, like_name: str, like: Tensor) -> None:
    # Autocast leaves float64 alone, so it reconciles the other three only.
    converts = torch.is_autocast_enabled(like.device.type) and torch.float64 not in (value.dtype, like.dtype)
    if value.dtype != like.dtype and not converts:
        fail(argument, f"dtype {like.dtype} of {like_name}", value, TypeError)


def check_mask(argument: str, mask: Tensor | None, x: Tensor) -> None:
    if mask is not None:
        check_tensor(argument, mask, tuple(x.shape[:2]), dtypes=(torch.bool,), like=x)


def check_routes(argument: str, routes: Any, x: Tensor, experts: int) -> None:
    """Shapes and dtypes of injected routes, and that indices are in range and distinct within a row."""
    if not (isinstance(routes, tuple) and len(routes) == 4 and hasattr(type(routes), "load")):
        fail(argument, "Routes(indices, mask, scores, logits)", describe(routes), TypeError)
    indices, mask, scores, _ = routes
    check_tensor(f"{argument}.indices", indices, (x.shape[0], experts, "K"), dtypes=(torch.int64,), like=x)
    check_tensor(f"{argument}.mask", mask, tuple(indices.shape), dtypes=(torch.bool,), like=x)
    check_tensor(f"{argument}.scores", scores, tuple(indices.shape), dtypes=FLOATS[:2], like=x)
    if indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= x.shape[1]:
            fail(f"{argument}.indices", f"token positions in [0, {x.shape[1]})", f"values from {low} to {high}")
        ordered = indices.sort(dim=-1).values
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            fail(f"{argument}.indices", "distinct positions within each (batch, expert)", "a repeated position")


def check_rotary(rotary_emb: Tensor | None, x: Tensor, dim_head: int) -> None:
    if rotary_emb is None:
        return
    check_tensor("rotary_emb", rotary_emb, (x.shape[1], dim_head), dtypes=FLOATS[:2], like=x)
    if rotary_emb.requires_grad:
        fail("rotary_emb", "angles that need no gradient", "requires_grad=True")
    if dim_head % 2:
        fail("dim_head", "an even number with rotary embeddings", dim_head)


@dataclass(frozen=True)
class RouterOptions:
    """Options of a router; `parse` rejects unknown names and impossible values.

    straight_through: hand on scores of exactly 1 whose gradient flows to the soft scores.
    n_iters, fetch_k_ratio, eps, eps_init, eps_decay: see `routing.coordinate_descent`.
    solver: "iterative" (n_iters steps) or "exact" (their limit). cosine_sim_*: L2-normalise both sides, scale.
    learned_routing_tokens: the caller passes the routing tokens at forward. route_block_size: route per block.
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
        for name in ("straight_through", "cosine_sim_routing", "learned_routing_tokens"):
            check_bool(name, getattr(self, name))
        check_int("n_iters", self.n_iters)
        check_real("fetch_k_ratio", self.fetch_k_ratio, "a finite number >= 1", lambda v: v >= 1)
        for name in ("eps", "eps_init", "cosine_sim_scale"):
            check_real(name, getattr(self, name), "a finite number > 0", lambda v: v > 0)
        check_real("eps_decay", self.eps_decay, "a number in (0, 1]", lambda v: 0 < v <= 1)
        if self.solver not in ("iterative", "exact"):
            fail("solver", "'iterative' or 'exact'", describe(self.solver))
        if self.route_block_size is not None:
            check_int("route_block_size", self.route_block_size)

    @classmethod
    def parse(cls, options: dict[str, Any], *, stage: bool = False) -> RouterOptions:
        """From keyword arguments. As a stage (`route`) there is no module to hold routing tokens."""
        known = [f.name for f in fields(cls) if not (stage and f.name == "learned_routing_tokens")]
        for name in options:
            if name not in known:
                fail("router_options", f"names among {', '.join(known)}", describe(name), TypeError)
        return cls(**options)
