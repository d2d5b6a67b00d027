"""A decoding step of the causal layer by four kernels of ours, where that comes to what its modules compute.

Attention reads the cache where it lies, and what the step adds to it is written there, so that nothing is copied. An
operator of `optimized.ops` changes no argument: these are none, and torch.compile, vmap and whatever else looks on get
the modules' step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from optimized.autoregressive_attention import MemoryAttention, by_index
from optimized.autoregressive_cache import StaticCache
from optimized.autoregressive_local import CausalLocalAttention
from optimized.autoregressive_routing import fusable
from optimized.choice import choices
from optimized.local_attention import LayerNorm
from optimized.ops.finite import largest
from optimized.ops.operator import is_plain
from optimized.plain import child, obstacle_to_fusion, parameter, plain
from optimized.plan import Plan
from optimized.routed_attention import RMSNorm
from optimized.routing import cosine_scale

if TYPE_CHECKING:
    from optimized.autoregressive import MixtureOfAutoregressiveAttention


def obstacle_to_fused_step(
    layer: MixtureOfAutoregressiveAttention, x: Tensor, cache: StaticCache, rotary_emb: Tensor | None, plan: Plan
) -> str | None:
    """Why a step without a border goes through the modules; None where `fused_step` computes the same."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return "it is traced or transformed"
    if layer.config.options.solver != "sigmoid":
        return "a solver scores"
    if plan.dtype != x.dtype:
        return "autocast computes in another dtype"
    if not (plan.routing and plan.mixture and by_index(plan)):
        return "a stage is not computed by Triton"
    near = choices().of("local_attention")
    if near is not None and not near.startswith("triton"):
        return "a library was chosen for local_attention"
    return _obstacle_of_modules(layer) or _obstacle_of_tensors(layer, x, cache, rotary_emb)


def _obstacle_of_modules(layer: MixtureOfAutoregressiveAttention) -> str | None:
    found = fusable((layer.query_router, layer.key_value_router))
    found = found or obstacle_to_fusion(
        attn=(layer.attn, MemoryAttention), local_attn=(layer.local_attn, CausalLocalAttention)
    )
    if found is not None:
        return found
    attn, local = layer.attn, layer.local_attn
    if attn.probability():
        return "there is dropout"
    norm, near = child(attn, "norm"), child(local, "norm")
    if (norm is None) != (near is None):
        return "one norm of two is there"
    found = attn.obstacle_to_fusion() or obstacle_to_fusion(
        **{f"local_attn.{name}": (child(local, name), nn.Linear) for name in ("to_qkv", "to_out")}
    )
    if found is not None or near is None:
        return found
    if plain(norm, RMSNorm) is not None or plain(near, LayerNorm, bias=True) is not None:
        return "a norm is called"
    return None if near.weight is not None else "a norm has no weight"


def _obstacle_of_tensors(
    layer: MixtureOfAutoregressiveAttention, x: Tensor, cache: StaticCache, rotary_emb: Tensor | None
) -> str | None:
    held = [t for t in vars(cache).values() if isinstance(t, Tensor)]
    # Parameters of plain modules are ordinary.
    if not is_plain([x, rotary_emb, *held, layer._parameters.get("null_tokens")]):
        return "a tensor is not an ordinary one"
    if any(t.dtype != x.dtype for t in _matrices(layer)):
        return "a weight is of another dtype"
    if not x.numel():
        return "there is nothing to compute"
    return None if all(t.is_contiguous() for t in held) else "a buffer of the cache is not contiguous"


def _matrices(layer: MixtureOfAutoregressiveAttention) -> tuple[Tensor, ...]:
    """Routing tokens of queries and of the memory; to_qkv and to_out of local attention, to_q and to_out of experts."""
    routers = (parameter(router, "routing_token") for router in (layer.query_router, layer.key_value_router))
    near = (parameter(child(layer.local_attn, name), "weight") for name in ("to_qkv", "to_out"))
    return *routers, *near, *(parameter(child(layer.attn, name), "weight") for name in ("to_q", "to_out"))


def fused_step(
    layer: MixtureOfAutoregressiveAttention, x: Tensor, cache: StaticCache, rotary_emb: Tensor | None
) -> Tensor:
    """(B, 1, D), where there is no `obstacle_to_fused_step`; the cache is changed in place."""
    from optimized.kernels import step_attention, step_output, step_products, step_tokens

    c, attn, local, token = layer.config, layer.attn, layer.local_attn, x[:, 0].contiguous()
    ours, theirs, w_qkv, w_local, w_q, w_expert = _matrices(layer)
    near, norm, eps = child(local, "norm"), None, 0.0
    if near is not None:
        norm, eps = (near.weight, near.bias, child(attn, "norm").gamma), near.eps
    block = step_tokens.Block(cache.tail, cache.tail_q_logits, cache.tail_kv_logits, cache.length, cache.start)
    rates, tables = step_tokens.step_tokens(
        token, ours, theirs, cosine_scale(c.options), eps, rotary_emb, c.dim_head, block
    )
    projected = step_products.step_products(token, rates, norm, w_qkv, w_q, c.num_experts)
    held = step_attention.Held(**{name: getattr(cache, name) for name in step_attention.Held._fields})
    attended = step_attention.step_attention(
        projected, tables, held, attn.null_kv, None if c.everybody else c.capacity, rotary_emb is not None,
        c.options.straight_through, largest(x.dtype),
    )  # fmt: skip
    out = step_output.step_output(attended, w_local, w_expert, layer.null_tokens, cache.length, c.average_routed)
    return out[:, None]
