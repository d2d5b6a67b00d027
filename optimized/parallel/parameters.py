"""Parameters of a layer as its ranks hold them, and what a call computes with.

Where experts are sharded all parameters are DTensors, or clipping and foreach optimizers would meet two kinds: shards
of what has E first (of `null_kv` second), and replicas of the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from optimized.parallel.collectives import Ranks
from optimized.plain import attached, child, parameter
from reference import contract

_REPLICATED = ("null_routed_token", "local_attn.")


class Held(NamedTuple):
    """Tokens and scales of all E experts, matrices and null keys of the experts that the rank computes for."""

    q_tokens: Tensor | None  # (E, D); None where the caller passes them
    kv_tokens: Tensor | None
    q_gamma: Tensor | None  # (E, D, 1)
    kv_gamma: Tensor | None
    matrices: tuple[Tensor, Tensor, Tensor]  # w_q, w_kv, w_out
    null_kv: Tensor
    null: Tensor | None  # `null_routed_token`, or null tokens (E, D)
    local: dict[str, Tensor] | None  # of `local_attn`, where it can't be called with its own


def shard(layer: nn.Module, ranks: Ranks, source: int | None) -> None:
    """Make DTensors of all parameters. source: whose numbers count; None: each rank's own."""
    for name, p in list(layer.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        placement = placement_of(name)
        made = distribute_tensor(p.data, ranks.mesh, [placement], src_data_rank=source)
        layer.get_submodule(owner)._parameters[leaf] = nn.Parameter(made, requires_grad=p.requires_grad)


def placement_of(name: str) -> Shard | Replicate:
    """Of a parameter, by its name in the layer."""
    if name.startswith(_REPLICATED):
        return Replicate()
    return Shard(1) if name.endswith("null_kv") else Shard(0)


def unattached(layer: nn.Module, style: str, classes: dict[str, type[nn.Module]]) -> None:
    """Modules whose parameters are read in place of a call have nothing attached, and routers the same options.

    Raises TypeError or ValueError.
    """
    for name, cls in classes.items():
        owner, _, leaf = name.rpartition(".")
        module = child(layer if not owner else child(layer, owner), leaf)
        reason = attached(module, cls)
        if reason is not None:
            expected = f"a plain {cls.__name__}, whose parameters {style} reads"
            contract.reject(name, expected, f"one that {reason}", TypeError)
    ours, theirs = (child(layer, name).options for name in ("query_router", "key_value_router"))
    if ours is not theirs and (torch.compiler.is_compiling() or ours != theirs):
        contract.reject("key_value_router.options", "those of the query router", theirs)


def held(layer: nn.Module, ranks: Ranks, sharded: bool, alone: bool) -> Held:
    """alone: the experts of other ranks are not asked for, nor is what all ranks share used in each one's own way."""
    ours, theirs, attn = (child(layer, name) for name in ("query_router", "key_value_router", "attn"))
    norm, context_norm, local = child(attn, "norm"), child(attn, "context_norm"), child(layer, "local_attn")
    null_name = "null_tokens" if "null_tokens" in layer._parameters else "null_routed_token"
    small = {
        "q_tokens": layer_parameter(ours, "routing_token"),
        "kv_tokens": layer_parameter(theirs, "routing_token"),
        "q_gamma": layer_parameter(norm, "gamma"),
        "kv_gamma": layer_parameter(context_norm, "gamma"),
    }
    matrices: Any = tuple(parameter(child(attn, name), "weight") for name in ("to_q", "to_kv", "to_out"))
    null_kv: Any = parameter(attn, "null_kv")
    null: Any = layer._parameters.get(null_name)
    if not sharded:
        return Held(**small, matrices=matrices, null_kv=null_kv, null=null, local=None)
    matrices, null_kv = tuple(_local(w) for w in matrices), _local(null_kv)
    by_expert = {name: _local(t) for name, t in small.items() if t is not None}
    if null_name == "null_tokens":
        by_expert["null"] = _local(null)
    common = {} if local is None else {name: _local(p) for name, p in local.named_parameters()}
    if null is not None and "null" not in by_expert:
        common["null"] = _local(null)
    if not alone:
        by_expert = _of_all(by_expert, ranks)
        common = dict(zip(common, ranks.alike(*common.values()))) if common else common
    null = by_expert.pop("null", None)
    null = common.pop("null", None) if null is None else null
    made = {name: by_expert.get(name) for name in small}
    return Held(**made, matrices=matrices, null_kv=null_kv, null=null, local=None if local is None else common)


def layer_parameter(module: nn.Module | None, name: str) -> Any:
    return None if module is None else module._parameters.get(name)


def _local(t: Any) -> Tensor:
    """What a rank holds of a DTensor; its gradient is what it is given."""
    return t.to_local() if isinstance(t, DTensor) else t


def _of_all(parts: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """(E, ...) of (E / R, ...): one collective for all of a dtype."""
    found: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in parts.values()):
        names = [name for name, t in parts.items() if t.dtype == dtype]
        flat = ranks.gather(torch.cat([parts[name].reshape(-1) for name in names]))
        for name, part in zip(names, flat.split([parts[name].numel() for name in names], 1)):
            found[name] = part.reshape(ranks.size * parts[name].shape[0], *parts[name].shape[1:])
    return found
