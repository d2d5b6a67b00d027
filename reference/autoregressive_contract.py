"""What a strictly causal layer is told, checked: its constructor's arguments, and those of a call."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reference import contract
from reference.contract import RouterOptions, flag, number, positive_int, probability, reject

if TYPE_CHECKING:
    from reference.autoregressive_cache import Cache

MOST_LENGTH = 2**40  # tokens of a cache, so that no product of a position overflows


@dataclass(frozen=True)
class AutoregressiveConfig:
    """The constructor's arguments, checked; numbers are Python's. To be made by `AutoregressiveConfig.of`."""

    dim: int
    num_routed_queries: int
    num_routed_key_values: int
    local_attn_window_size: int
    routed_window_size: int
    num_experts: int
    dim_head: int
    heads: int
    local_attn_heads: int
    dropout: float
    capacity_factor: float
    use_triton: bool
    flash_attn: bool
    prenorm: bool
    average_routed: bool
    options: RouterOptions = field(default_factory=RouterOptions)

    @classmethod
    def of(cls, **arguments: Any) -> AutoregressiveConfig:
        """From the constructor's arguments by name, less device and dtype; names unknown here are router options.

        Raises TypeError or ValueError naming the argument.
        """
        checked = {name: check(name, arguments.pop(name)) for name, check in _CHECKS.items()}
        routed, heads = arguments.pop("routed_window_size"), arguments.pop("local_attn_heads")
        window = checked["local_attn_window_size"]
        checked["routed_window_size"] = window if routed is None else positive_int("routed_window_size", routed)
        checked["local_attn_heads"] = checked["heads"] if heads is None else positive_int("local_attn_heads", heads)
        if checked["dim_head"] % 2:
            reject("dim_head", "an even number (rotary embedding)", checked["dim_head"])
        for name in ("route_block_size", "learned_routing_tokens"):
            if arguments.pop(name, None):
                reject(name, "no such option: blocks are those of routed_window_size" if name[0] == "r" else
                       "False: the layer holds its routing tokens", "it")  # fmt: skip
        options = RouterOptions.of_module(arguments)
        return cls(**checked, options=options)

    @property
    def everybody(self) -> bool:
        """Whether every token of a block is routed."""
        return self.num_routed_queries >= self.routed_window_size

    @property
    def capacity(self) -> int:
        """Slots for queries of an expert in a block."""
        width = self.routed_window_size
        return width if self.everybody else min(width, math.ceil(self.capacity_factor * self.num_routed_queries))

    def blocks(self, n: int, continued: bool) -> int:
        """That an unfinished block of at most W tokens, if there is one, and n more can touch."""
        return -(-n // self.routed_window_size) + continued


_CHECKS: dict[str, Any] = {
    "dim": positive_int,
    "num_routed_queries": positive_int,
    "num_routed_key_values": positive_int,
    "local_attn_window_size": positive_int,
    "num_experts": positive_int,
    "dim_head": positive_int,
    "heads": positive_int,
    "dropout": probability,
    "capacity_factor": lambda name, value: number(name, value, "a finite number >= 1", lambda v: v >= 1),
    "use_triton": flag,
    "flash_attn": flag,
    "prenorm": flag,
    "average_routed": flag,
}


def check_call(
    config: AutoregressiveConfig, x: Any, mask: Any, rotary_emb: Any, cache: Any, use_cache: Any, return_routes: Any
) -> Tensor | None:
    """The mask (B, N); raises TypeError or ValueError naming the argument."""
    from reference.autoregressive_cache import Cache

    contract.tensor("x", x, "B", "N", config.dim)
    mask = contract.token_mask("mask", mask, x)
    flag("use_cache", use_cache)
    flag("return_routes", return_routes)
    contract.solvable(config.options, x.dtype)
    if cache is not None:
        if not isinstance(cache, Cache):
            reject("cache", "a Cache, as this layer returns it", contract.describe(cache), TypeError)
        _continues(config, cache, x)
        if (rotary_emb is not None) != cache.rotary:
            had = "a table, as in the calls before" if cache.rotary else "None, as in the calls before"
            reject("rotary_emb", had, rotary_emb)
        hard = config.options.straight_through and not torch.is_grad_enabled()
        if config.options.solver != "sigmoid" and not hard:
            reject(
                "cache",
                "None, or solver='sigmoid', or straight_through=True without gradients: "
                f"soft scores of solver={config.options.solver!r} take the logits of all tokens before",
                "a Cache",
            )
    if rotary_emb is not None:
        passed = x.shape[1] + (0 if cache is None else cache.passed)
        contract.tensor("rotary_emb", rotary_emb, "P", config.dim_head, beside=x)
        if rotary_emb.requires_grad:
            reject("rotary_emb", "a tensor without gradient", rotary_emb)
        if rotary_emb.shape[0] < passed:
            reject("rotary_emb", f"at least {passed} rows, as many as tokens were passed", rotary_emb)
    return mask


def _continues(config: AutoregressiveConfig, cache: Cache, x: Tensor) -> None:
    """Whether the cache is of a layer of this shape, and of x's batch, dtype and device."""
    for name, expected, given in (
        ("the layer", cache.made_for(config), cache.sizes()),
        ("batch", x.shape[0], cache.length.shape[0]),
        ("dtype", x.dtype, cache.tail.dtype),
        ("device", x.device, cache.tail.device),
    ):
        if expected != given:
            reject("cache", f"one for {name} {expected}", f"one for {given}")
