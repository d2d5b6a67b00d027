"""The kinds of attention of a block: how each is made, and how it is called.

All get the normalised x, valid tokens first, and `Shared`; a call returns its output, its cache if it is to be kept,
and the load of its experts if that is asked for. Positions are those of valid tokens, so that none needs a mask but to
tell padding from what is to be remembered, and, looking both ways, to be seen.

Letters: B batch, N tokens of a call, L columns of tokens passed before, D model dimension, H heads, d head dimension,
E experts, w window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from optimized.autoregressive_cache import StaticCache
from optimized.autoregressive_local import CausalLocalAttention
from optimized.transformer.config import TransformerConfig
from optimized.transformer.layer_caches import DenseBuffers, DenseCache, LocalBuffers, LocalCache
from optimized.transformer.rotary import turned
from reference.contract import Config


class Load(NamedTuple):
    """Of a mixture's experts."""

    queries: Int64[Tensor, "B E"]  # tokens that the expert updated
    candidates: Int64[Tensor, "B E"]  # tokens that it would have, had it slots for all of them


@dataclass(frozen=True, eq=False)
class Shared:
    """What all blocks of a call share."""

    mask: Bool[Tensor, "B N"] | None  # valid tokens first
    count: Int64[Tensor, " B"] | None  # of valid tokens; only with keep
    turn: tuple[Tensor, Tensor] | None  # cos and sin by token, for dense layers
    table: Float[Tensor, "P d"] | None  # angles by position, for experts
    visible: Bool[Tensor, "B 1 N L+N"] | None  # for dense layers; None: all, or with `triangle` all before
    triangle: bool
    keep: bool
    watch: bool
    border: bool = False  # of a step: whether an item may begin a block


class Call:
    """What a block is told besides x. No container: in those, dataclasses included, FSDP casts all tensors, and neither
    angles nor the logits that a cache ranks its tokens by may be rounded.
    """

    def __init__(self, shared: Shared, cache: Any) -> None:
        self.shared, self.cache = shared, cache


Called = tuple[Tensor, Any, Load | None]


class DenseAttention(nn.Module):
    """Attention of all tokens to all before, or to all, with rotary positions.

    State: to_qkv.weight (3 H d, D) with rows (q, k, v; head, channel), to_out.weight (D, H d).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, device=device, dtype=dtype)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        self.to_qkv.reset_parameters()
        self.to_out.reset_parameters()

    def forward(
        self, x: Float[Tensor, "B N D"], shared: Shared, cache: DenseCache | DenseBuffers | None = None
    ) -> tuple[Float[Tensor, "B N D"], DenseCache | None]:
        assert shared.turn is not None
        q, k, v = self.to_qkv(x).unflatten(2, (3, self.heads, self.dim_head)).permute(2, 0, 3, 1, 4)
        q, k = turned(q, *shared.turn), turned(k, *shared.turn)
        if isinstance(cache, DenseBuffers):
            k, v = cache.append(k, v)
        elif cache is not None:
            k, v = torch.cat((cache.keys.to(k.dtype), k), 2), torch.cat((cache.values.to(v.dtype), v), 2)
        out = F.scaled_dot_product_attention(q, k, v, shared.visible, is_causal=shared.triangle)
        return self.to_out(out.transpose(1, 2).flatten(2)), DenseCache(k, v) if shared.keep else None


def _dense(layer: nn.Module, x: Tensor, shared: Shared, cache: Any) -> Called:
    return *layer(x, shared, cache), None


def _causal_local(layer: Any, x: Tensor, shared: Shared, cache: LocalCache | LocalBuffers | None) -> Called:
    """In a first call of the optimized layer there is nothing before the tokens, and nothing is put there."""
    if isinstance(cache, LocalBuffers):
        return layer(x, cache)[0], None, None
    if cache is None and isinstance(layer, CausalLocalAttention):
        out, keys, values = layer(x, None, shared.keep)
        if not shared.keep:
            return out, None, None
        assert keys is not None
        before = (0, 0, 0, 0, layer.window_size, 0)
        keys, values = F.pad(keys, before), F.pad(values, before)
        past = LocalCache.empty(keys, layer.window_size, *keys.shape[2:])
    else:
        sizes = layer.window_size, layer.heads, layer.to_out.in_features // layer.heads
        past = LocalCache.empty(x, *sizes) if cache is None else cache
        out, keys, values = layer(x, past)
        if not shared.keep:
            return out, None, None
    assert shared.count is not None
    return out, past.after(keys, values, shared.count), None


def _causal_mixture(layer: Any, x: Tensor, shared: Shared, cache: Any) -> Called:
    if isinstance(cache, StaticCache):
        return layer.step(x, cache, shared.table, shared.border), None, None
    found = layer(x, shared.mask, shared.table, cache, shared.keep, shared.watch)
    out, *rest = found if isinstance(found, tuple) else (found,)
    load = None
    if shared.watch:
        queries, _ = rest[-1]
        load = Load(queries.load.sum(-1), queries.candidates.sum(-1))
    return out, rest[0] if shared.keep else None, load


def _local(layer: nn.Module, x: Tensor, shared: Shared, cache: None) -> Called:
    return layer(x, shared.mask), None, None


def _mixture(layer: nn.Module, x: Tensor, shared: Shared, cache: None) -> Called:
    found = layer(x, mask=shared.mask, rotary_emb=shared.table, return_routes=shared.watch)
    if not shared.watch:
        return found, None, None
    out, (queries, _) = found
    return out, None, Load(queries.load, queries.load)


CALLS: dict[tuple[str, bool], Callable[..., Called]] = {
    ("dense", True): _dense,
    ("dense", False): _dense,
    ("local", True): _causal_local,
    ("local", False): _local,
    ("mixture", True): _causal_mixture,
    ("mixture", False): _mixture,
}


def attention_of(kind: str, causal: bool, c: TransformerConfig, where: dict[str, Any]) -> nn.Module:
    """The layer, without a norm of its own: a block has one, before its router too, for every kind."""
    assert c.heads is not None
    if kind == "dense":
        return DenseAttention(c.dim, c.heads, c.dim_head, **where)
    if kind == "local":
        return _local_layer(causal, c, c.heads, where)
    package = import_module(c.package)
    options = {"dim_head": c.dim_head, **c.mixture, "prenorm": False, "local_attn_window_size": c.window, **where}
    if causal:
        experts = options.setdefault("num_experts", 2)
        heads = max(c.heads // experts, 1) if isinstance(experts, int) and experts > 0 else c.heads  # refused below
        return package.MixtureOfAutoregressiveAttention(
            c.dim, **{"heads": heads, **options, "local_attn_heads": c.heads}
        )
    # As the causal layer has them, and for its reasons; so padding changes nothing, either.
    scores = {"solver": "sigmoid", "cosine_sim_routing": True, "straight_through": False}
    defaults = {"num_experts": 2, "heads": c.heads, "dropout": 0.0, **scores}
    return package.MixtureOfAttention(c.dim, **{**defaults, **options, "local_attn": True})


def _local_layer(causal: bool, c: TransformerConfig, heads: int, where: dict[str, Any]) -> nn.Module:
    assert c.window is not None
    if causal:
        made_by = import_module(f"{c.package}.autoregressive").CausalLocalAttention
    else:
        made_by = import_module(f"{c.package}.mixture").LocalAttention
    if c.package == "reference":
        return made_by(c.dim, c.window, dim_head=c.dim_head, heads=heads, prenorm=False, **where)
    config = Config(
        c.dim, 1, 1, 1, c.dim, local_attn_window_size=c.window, dim_head=c.dim_head, heads=heads, prenorm=False
    )
    return made_by(config, **where)
