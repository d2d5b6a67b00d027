"""What a strictly causal layer is told when it is made, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from reference.contract import RouterOptions, flag, number, positive_int, probability, reject


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
            if given := arguments.pop(name, None):
                reject(name, "no such option: blocks are those of routed_window_size" if name[0] == "r" else
                       "False: the layer holds its routing tokens", given)  # fmt: skip
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
