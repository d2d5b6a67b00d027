"""What a transformer is made of, checked; it can be written as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reference.contract import describe, flag, positive, positive_int, probability, reject

KINDS = ("dense", "local", "mixture")
PACKAGES = ("optimized", "reference")
# Options of a mixture that the model sets itself.
SET = (
    "dim", "dim_context", "local_attn", "local_attn_window_size", "local_attn_heads", "prenorm", "device", "dtype",
    "learned_routing_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a `Decoder` or an `Encoder`; arguments left None are set here.

    Args:
        vocab_size: V. dim: model dimension D.
        layers: kind of attention of each block, "dense", "local" or "mixture".
        heads, dim_head: H and d of dense and local attention, that of a mixture's local branch included (heads default
            D / d, at least 1).
        hidden: width of the feed-forward (default 8/3 D, rounded up to a multiple of 64).
        window: w of local attention and of a mixture's local branch.
        mixture: options of the mixture layers, by the layer's own names, which checks them; at least
            num_routed_queries and num_routed_key_values. Default of its dim_head is that of above; of heads, in a
            decoder, heads / num_experts, so that all experts together have as many heads as a dense layer.
        mixture_rotary: whether experts rotate queries and keys by position. False: position is known through the local
            branch alone, which always rotates. What an expert remembers may be any distance away, beyond all that was
            trained on; and without angles keys are projected only of tokens that an expert ever remembers.
        rotary_base: of the angles of dense layers and of experts; local attention has 10000.
        tied: the head is the embedding. dropout: of embeddings, and of each branch before it is added, in training.
        package: whose layers, "optimized" or "reference"; the state dict is the same.
    Raises TypeError or ValueError naming the argument.
    """

    vocab_size: int
    dim: int
    layers: tuple[str, ...]
    heads: int | None = None
    dim_head: int = 64
    hidden: int | None = None
    window: int | None = None
    mixture: Mapping[str, Any] = field(default_factory=dict, hash=False)
    mixture_rotary: bool = False
    rotary_base: float = 10000.0
    tied: bool = True
    dropout: float = 0.0
    package: str = "optimized"

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {name: positive_int(name, getattr(self, name)) for name in _SIZES}
        if checked["dim_head"] % 2:
            reject("dim_head", "an even number (rotary embedding)", checked["dim_head"])
        checked["layers"] = _kinds(self.layers)
        dim, dim_head = checked["dim"], checked["dim_head"]
        for name, default in (("heads", max(dim // dim_head, 1)), ("hidden", -(-8 * dim // 192) * 64)):
            value = getattr(self, name)
            checked[name] = default if value is None else positive_int(name, value)
        windowed = {"local", "mixture"} & set(checked["layers"])
        if windowed or self.window is not None:
            checked["window"] = positive_int("window", self.window)
        checked["mixture"] = _options(self.mixture, needed="mixture" in checked["layers"])
        checked["rotary_base"] = positive("rotary_base", self.rotary_base)
        checked["dropout"] = probability("dropout", self.dropout)
        flag("tied", self.tied)
        flag("mixture_rotary", self.mixture_rotary)
        if self.package not in PACKAGES:
            reject("package", "'optimized' or 'reference'", describe(self.package))
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON has."""
        return {**dataclasses.asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransformerConfig:
        """The opposite of `to_dict`. Raises TypeError or ValueError naming the argument."""
        if not isinstance(values, Mapping):
            reject("values", "a mapping, as `to_dict` makes it", describe(values), TypeError)
        known = {f.name: f.default is dataclasses.MISSING and f.name != "mixture" for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                reject("values", f"names among {', '.join(known)}", describe(name), TypeError)
        for name, needed in known.items():
            if needed and name not in values:
                reject(name, "a value", "none", TypeError)
        return cls(**values)


_SIZES = ("vocab_size", "dim", "dim_head")


def _kinds(layers: Any) -> tuple[str, ...]:
    if not isinstance(layers, (tuple, list)):
        reject("layers", f"a tuple of {', '.join(KINDS)}", describe(layers), TypeError)
    if not layers:
        reject("layers", "at least one", "none")
    for i, kind in enumerate(layers):
        if kind not in KINDS:
            reject(f"layers[{i}]", f"one of {', '.join(KINDS)}", describe(kind))
    return tuple(layers)


def _options(mixture: Any, needed: bool) -> dict[str, Any]:
    if not isinstance(mixture, Mapping):
        reject("mixture", "a mapping of options by name", describe(mixture), TypeError)
    for name, value in mixture.items():
        if name in SET:
            reject("mixture", f"options other than {', '.join(SET)}, which the model sets", describe(name))
        if not (value is None or type(value) in (bool, int, float, str)):
            reject(f"mixture[{name!r}]", "a bool, int, float or str", describe(value), TypeError)
    for name in ("num_routed_queries", "num_routed_key_values"):
        if needed and name not in mixture:
            reject(f"mixture[{name!r}]", "an integer >= 1, since there are mixture layers", "none", TypeError)
    return dict(mixture)
