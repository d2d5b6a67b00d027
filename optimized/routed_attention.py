"""Routed attention: each expert attends over its own routed tokens and a learned null key/value.

The routed tokens of all batch items are gathered expert by expert, (E, B K, D), so that every projection is one
batched GEMM without padding. The null key is prepended to the routed keys and never hidden.

Letters: B batch, N tokens, M context tokens, D and Dc model dimensions, E experts, H heads, d head dimension, Kq and
Kkv slots of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from optimized import ops, validation
from optimized.backends import Request, choose
from optimized.routing import Routes


def routed_attention(
    x: Float[Tensor, "B N D"],
    context: Float[Tensor, "B M Dc"],
    q_routes: Routes,
    kv_routes: Routes,
    *,
    w_q: Float[Tensor, "E Hd D"],
    w_kv: Float[Tensor, "E 2*Hd Dc"],
    w_out: Float[Tensor, "E D Hd"],
    null_kv: Float[Tensor, "2 E H d"],
    gamma: Float[Tensor, "E D"] | None = None,
    context_gamma: Float[Tensor, "E Dc"] | None = None,
    rotary_emb: Float[Tensor, "N d"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B E Kq D"]:
    """Attention of every expert over its own routed tokens, already times the query scores; masked query slots are 0.

    Args:
        x, context: (B, N, D), (B, M, Dc). q_routes, kv_routes: which of their tokens each expert reads.
        w_q, w_kv, w_out: projections per expert; rows (head, channel), for w_kv (k then v, head, channel).
        null_kv: key and value that every query sees, (2, E, H, d).
        gamma, context_gamma: per-expert scale of the RMSNorm x / max(||x||, 1e-12) sqrt(D); None: no norm. Its
            gradient at an all-zero token is about sqrt(D) * 1e12.
        rotary_emb: (N, d) angles in float32 or float64, taken at each token's original position (self-attention only).
        dropout: probability of dropping an attention weight, the null slot's included.
    Returns (B, E, Kq, D) in x's dtype. Norms, rotations, softmax and scores are computed in at least float32.
    Raises TypeError or ValueError naming the argument.
    """
    _check(x, context, q_routes, kv_routes, w_q, w_kv, w_out, null_kv, gamma, context_gamma, rotary_emb, dropout)
    q_inverse = ops.inverse_map(q_routes.indices, q_routes.mask, x.shape[1])
    y = _routed_attention(
        x, context, q_routes, kv_routes, q_inverse, w_q, w_kv, w_out, null_kv, gamma, context_gamma, rotary_emb, dropout
    )
    return y.transpose(0, 1).to(x.dtype)


def _routed_attention(
    x: Tensor,
    context: Tensor,
    q_routes: Routes,
    kv_routes: Routes,
    q_inverse: Tensor,
    w_q: Tensor,
    w_kv: Tensor,
    w_out: Tensor,
    null_kv: Tensor,
    gamma: Tensor | None,
    context_gamma: Tensor | None,
    rotary_emb: Tensor | None,
    dropout: float,
    masked: bool = True,
    allow_flash: bool = True,
) -> Tensor:
    """(E, B, Kq, D) in at least float32. q_inverse (B, E, N): see `ops.inverse_map`. masked=False promises that
    every key/value slot is valid, which admits backends that take no mask.
    """
    _, experts, heads, dim_head = null_kv.shape
    batch, _, k_q = q_routes.indices.shape
    k_kv = kv_routes.indices.shape[-1]
    kv_inverse = ops.inverse_map(kv_routes.indices, kv_routes.mask, context.shape[1])
    queries = rms_norm(ops.gather_tokens(x, q_routes.indices, q_routes.mask, q_inverse), gamma)
    keys_values = rms_norm(ops.gather_tokens(context, kv_routes.indices, kv_routes.mask, kv_inverse), context_gamma)

    q = torch.bmm(queries.flatten(1, 2), w_q.mT).view(experts, batch, k_q, heads, dim_head)
    kv = torch.bmm(keys_values.flatten(1, 2), w_kv.mT).view(experts, batch, k_kv, 2, heads, dim_head)
    k, v = kv.unbind(3)
    if rotary_emb is not None:
        angles = rotary_emb.to(torch.promote_types(rotary_emb.dtype, x.dtype))
        cos, sin = angles.cos(), angles.sin()
        q = rotate(q, *(table[q_routes.indices.transpose(0, 1)].unsqueeze(3) for table in (cos, sin)))
        k = rotate(k, *(table[kv_routes.indices.transpose(0, 1)].unsqueeze(3) for table in (cos, sin)))
    v = (v * kv_routes.scores.transpose(0, 1)[..., None, None]).to(k.dtype)
    null_k, null_v = null_kv.to(k.dtype)[:, :, None, None].expand(-1, -1, batch, -1, -1, -1)
    k, v = torch.cat((null_k, k), dim=2), torch.cat((null_v, v), dim=2)

    visible = None
    if masked:
        visible = F.pad(kv_routes.mask.transpose(0, 1), (1, 0), value=True).flatten(0, 1)[:, None, None]
    out = attend(
        "routed_attention",
        *(t.flatten(0, 1).transpose(1, 2) for t in (q, k, v)),
        visible,
        dropout=dropout,
        allow_flash=allow_flash,
    )
    out = out.transpose(1, 2).reshape(experts, batch * k_q, heads * dim_head)
    y = torch.bmm(out, w_out.mT).view(experts, batch, k_q, w_out.shape[1])
    y = y * q_routes.scores.transpose(0, 1)[..., None]
    return torch.where(q_routes.mask.transpose(0, 1)[..., None], y, 0)


def attend(
    stage: str,
    q: Float[Tensor, "R H L d"],
    k: Float[Tensor, "R H S d"],
    v: Float[Tensor, "R H S d"],
    visible: Bool[Tensor, "#R 1 #L S"] | None,
    *,
    dropout: float = 0.0,
    allow_flash: bool = True,
) -> Float[Tensor, "R H L d"]:
    """softmax(q k^T / sqrt(d)) v over the visible keys by PyTorch's scaled_dot_product_attention, backend as chosen."""
    empty = q.numel() == 0 or k.numel() == 0
    request = Request(q.device, q.dtype, q.shape[-1], visible is not None, dropout, empty, allow_flash)
    with sdpa_kernel(choose(stage, request).kernel):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)


def rms_norm(x: Float[Tensor, "E B K D"], gamma: Float[Tensor, "E D"] | None) -> Float[Tensor, "E B K D"]:
    """x / max(||x||, 1e-12) sqrt(D) gamma[e] in at least float32, returned in x's dtype."""
    if gamma is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
    scale = gamma.to(wide.dtype) * x.shape[-1] ** 0.5
    return (wide / norm * scale[:, None, None]).to(x.dtype)


def rotate(t: Float[Tensor, "*S d"], cos: Float[Tensor, "*#S d"], sin: Float[Tensor, "*#S d"]) -> Float[Tensor, "*S d"]:
    """Rotary embedding of the last dimension by the angles whose cos and sin are given, in at least float32."""
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    half = wide.shape[-1] // 2
    turned = wide.roll(half, -1)
    sign = torch.ones(wide.shape[-1], dtype=wide.dtype, device=t.device)
    sign[:half] = -1
    return (wide * cos.to(wide.dtype) + turned * (sin.to(wide.dtype) * sign)).to(t.dtype)


def _check(
    x: Any,
    context: Any,
    q_routes: Any,
    kv_routes: Any,
    w_q: Any,
    w_kv: Any,
    w_out: Any,
    null_kv: Any,
    gamma: Any,
    context_gamma: Any,
    rotary_emb: Any,
    dropout: Any,
) -> None:
    validation.tensor("x", x, "B", "N", "D")
    validation.tensor("context", context, x.shape[0], "M", "Dc", beside=x, dtype_of=("x", x))
    validation.tensor("null_kv", null_kv, 2, "E", "H", "d", beside=x)
    if 0 in null_kv.shape:
        validation.reject("null_kv", "at least one expert, head and channel", null_kv)
    _, experts, heads, dim_head = null_kv.shape
    dim, dim_context, inner = x.shape[2], context.shape[2], heads * dim_head
    weights = {"w_q": (w_q, inner, dim), "w_kv": (w_kv, 2 * inner, dim_context), "w_out": (w_out, dim, inner)}
    for name, (weight, rows, columns) in weights.items():
        validation.tensor(name, weight, experts, rows, columns, beside=x, dtype_of=("x", x))
    for name, scale, size in (("gamma", gamma, dim), ("context_gamma", context_gamma, dim_context)):
        if scale is not None:
            validation.tensor(name, scale, experts, size, beside=x)
    validation.routes("q_routes", q_routes, x.shape[0], experts, x.shape[1], x)
    validation.routes("kv_routes", kv_routes, x.shape[0], experts, context.shape[1], x)
    validation.rotary(rotary_emb, x, dim_head)
    if rotary_emb is not None and context.shape[1] != x.shape[1]:
        validation.reject("rotary_emb", "self-attention (a context as long as x)", rotary_emb)
    validation.probability("dropout", dropout)


class RMSNorm(nn.Module):
    """Scale gamma (E, D, 1) of `rms_norm`, initially 1."""

    def __init__(
        self,
        num_experts: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(num_experts, dim, 1, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gamma)

    def extra_repr(self) -> str:
        return "num_experts={}, dim={}".format(*self.gamma.shape)


class RoutedAttention(nn.Module):
    """Parameters of `routed_attention`, in the shapes of convolutions of width 1 with one group per expert.

    State: norm.gamma (E, D, 1), context_norm.gamma (E, Dc, 1), null_kv (2, E, H, 1, d), to_q.weight (E H d, D, 1),
    to_kv.weight (E 2 H d, Dc, 1) with rows (expert, k then v, head, channel), to_out.weight (E D, H d, 1).
    Initialised as nn.Conv1d is; null_kv standard normal.
    """

    def __init__(
        self,
        dim: int,
        dim_context: int,
        num_experts: int,
        *,
        dim_head: int,
        heads: int,
        dropout: float,
        prenorm: bool,
        flash_attn: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.heads, self.dim_head = num_experts, heads, dim_head
        self.dropout, self.flash_attn = dropout, flash_attn
        e, inner = num_experts, heads * dim_head
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        grouped: dict[str, Any] = {"kernel_size": 1, "groups": e, "bias": False, **where}
        self.norm = RMSNorm(e, dim, **where) if prenorm else None
        self.context_norm = RMSNorm(e, dim_context, **where) if prenorm else None
        self.null_kv = nn.Parameter(torch.empty(2, e, heads, 1, dim_head, **where))
        self.to_q = nn.Conv1d(e * dim, e * inner, **grouped)
        self.to_kv = nn.Conv1d(e * dim_context, e * 2 * inner, **grouped)
        self.to_out = nn.Conv1d(e * inner, e * dim, **grouped)
        nn.init.normal_(self.null_kv)

    def reset_parameters(self) -> None:
        for child in self.children():
            child.reset_parameters()
        nn.init.normal_(self.null_kv)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        context: Float[Tensor, "B M Dc"],
        q_routes: Routes,
        kv_routes: Routes,
        q_inverse: Tensor,
        rotary_emb: Float[Tensor, "N d"] | None = None,
        masked: bool = True,
    ) -> Float[Tensor, "E B Kq D"]:
        """Like `routed_attention` on arguments already checked; experts first, in at least float32."""
        w_q, w_kv, w_out = (
            layer.weight.squeeze(-1).unflatten(0, (self.num_experts, -1))
            for layer in (self.to_q, self.to_kv, self.to_out)
        )
        gamma = None if self.norm is None else self.norm.gamma.squeeze(-1)
        context_gamma = None if self.context_norm is None else self.context_norm.gamma.squeeze(-1)
        return _routed_attention(
            x,
            context,
            q_routes,
            kv_routes,
            q_inverse,
            w_q,
            w_kv,
            w_out,
            self.null_kv.squeeze(3),
            gamma,
            context_gamma,
            rotary_emb,
            self.dropout if self.training else 0.0,
            masked,
            self.flash_attn,
        )

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, heads={self.heads}, dim_head={self.dim_head}, dropout={self.dropout}"
