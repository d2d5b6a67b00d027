"""Routed attention: each expert attends over the tokens that were routed to it, and to a learned null key/value.

Letters: B batch, N tokens, M context tokens, D and Dc model dimensions, E experts, H heads, d head dimension,
Kq and Kkv slots of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reference.routing import Routes
from reference.validation import (
    check_real,
    check_rotary,
    check_routes,
    check_same_dtype,
    check_tensor,
    fail,
)


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
    dropout_mask: Bool[Tensor, "B E H Kq S"] | None = None,
) -> Float[Tensor, "B E Kq D"]:
    """Attention of every expert over its own routed tokens, already times the query scores.

    Tokens are RMS-normalised per expert (skipped where gamma is None), projected (rows of w_kv: k then v, each (head,
    channel)), rotated at their original positions, values scaled by the key/value scores. Slot 0 of the softmax is the
    null key, visible always, so that no row is empty; masked slots are invisible. `dropout` acts on the probabilities,
    the null slot's too; `dropout_mask` (True = kept, slot 0 the null slot) takes the place of the random draw.
    Masked query slots give 0. Returns (B, E, Kq, D) in x's dtype. Raises TypeError or ValueError.
    """
    check_attention_input(
        x, context, q_routes, kv_routes, w_q, w_kv, w_out, null_kv, gamma, context_gamma, rotary_emb, dropout
    )
    if dropout_mask is not None:
        sizes = (*null_kv.shape[1:3], q_routes.indices.shape[2], 1 + kv_routes.indices.shape[2])
        check_tensor("dropout_mask", dropout_mask, (x.shape[0], *sizes), dtypes=(torch.bool,), like=x)
    heads = null_kv.shape[2]
    queries = rms_norm(gather(x, q_routes), gamma)
    keys_values = rms_norm(gather(context, kv_routes), context_gamma)
    q = torch.einsum("beki,eoi->beko", queries, w_q)
    kv = torch.einsum("beki,eoi->beko", keys_values, w_kv)
    q = rearrange(q, "b e k (h d) -> b e h k d", h=heads)
    k, v = rearrange(kv, "b e k (two h d) -> two b e h k d", two=2, h=heads)
    if rotary_emb is not None:
        q = rotate(q, rotary_emb[q_routes.indices][:, :, None])
        k = rotate(k, rotary_emb[kv_routes.indices][:, :, None])
    v = (v * kv_routes.scores[:, :, None, :, None]).to(k.dtype)

    null_k, null_v = repeat(null_kv.to(k.dtype), "two e h d -> two b e h 1 d", b=x.shape[0])
    k, v = torch.cat((null_k, k), dim=-2), torch.cat((null_v, v), dim=-2)
    visible = F.pad(kv_routes.mask, (1, 0), value=True)[:, :, None, None, :]
    logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    probs = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    if dropout > 0:
        kept = torch.rand_like(probs) >= dropout if dropout_mask is None else dropout_mask
        probs = torch.where(kept, probs / (1 - dropout), 0)
    heads_out = rearrange(probs.to(v.dtype) @ v, "b e h k d -> b e k (h d)")
    y = torch.einsum("beki,eoi->beko", heads_out, w_out) * q_routes.scores[..., None]
    return torch.where(q_routes.mask[..., None], y, 0).to(x.dtype)


def gather(x: Float[Tensor, "B N D"], routes: Routes) -> Float[Tensor, "B E K D"]:
    """Routed tokens; a masked slot is selected away to 0, so that its content, NaN too, touches nothing."""
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return torch.where(routes.mask[..., None], x[batch, routes.indices], 0)


def rms_norm(x: Float[Tensor, "B E K D"], gamma: Float[Tensor, "E D"] | None) -> Float[Tensor, "B E K D"]:
    """x / max(||x||, 1e-12) * sqrt(D) * gamma[e] in at least float32, returned in x's dtype.

    The gradient at an all-zero token is about sqrt(D) * 1e12: the floor bounds it and no more.
    """
    if gamma is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = F.normalize(wide, dim=-1, eps=1e-12) * x.shape[-1] ** 0.5
    return (normed * gamma[:, None].to(wide.dtype)).to(x.dtype)


def rotate(t: Float[Tensor, "... d"], angles: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Rotary embedding t cos + rotate_half(t) sin, rotate_half(t) = cat(-t2, t1) of the two halves."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    first, second = t.to(dtype).chunk(2, dim=-1)
    rotated_half = torch.cat((-second, first), dim=-1)
    angles = angles.to(torch.promote_types(dtype, angles.dtype))
    return (t.to(dtype) * angles.cos().to(dtype) + rotated_half * angles.sin().to(dtype)).to(t.dtype)


def check_attention_input(
    x: Tensor,
    context: Tensor,
    q_routes: Routes,
    kv_routes: Routes,
    w_q: Tensor,
    w_kv: Tensor,
    w_out: Tensor,
    null_kv: Tensor,
    gamma: Tensor | None,
    context_gamma: Tensor | None,
    rotary_emb: Tensor | None,
    dropout: float,
) -> None:
    check_tensor("x", x, ("B", "N", "D"))
    check_tensor("context", context, (x.shape[0], "M", "Dc"), like=x)
    check_same_dtype("context", context, "x", x)
    check_tensor("null_kv", null_kv, (2, "E", "H", "d"), like=x)
    if 0 in null_kv.shape:
        fail("null_kv", "at least one expert, head and channel", null_kv)
    _, experts, heads, dim_head = null_kv.shape
    inner, dim, dim_context = heads * dim_head, x.shape[2], context.shape[2]
    check_routes("q_routes", q_routes, x, experts)
    check_routes("kv_routes", kv_routes, context, experts)
    for name, tensor, shape in (
        ("w_q", w_q, (experts, inner, dim)),
        ("w_kv", w_kv, (experts, 2 * inner, dim_context)),
        ("w_out", w_out, (experts, dim, inner)),
        ("gamma", gamma, (experts, dim)),
        ("context_gamma", context_gamma, (experts, dim_context)),
    ):
        if tensor is not None or name.startswith("w_"):
            check_tensor(name, tensor, shape, like=x)
            check_same_dtype(name, tensor, "x", x)
    check_rotary(rotary_emb, x, dim_head)
    if rotary_emb is not None and context.shape[1] != x.shape[1]:
        fail("rotary_emb", "self-attention (a context as long as x)", rotary_emb)
    check_real("dropout", dropout, "a number in [0, 1)", lambda v: 0 <= v < 1)


class RMSNorm(nn.Module):
    """Holds gamma (E, D, 1)."""

    def __init__(
        self,
        num_experts: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(num_experts, dim, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gamma)


class RoutedAttention(nn.Module):
    """Parameters of `routed_attention` for all experts, stored as grouped convolutions of width 1.

    State: norm.gamma (E, D, 1), context_norm.gamma (E, Dc, 1), null_kv (2, E, H, 1, d), to_q.weight (E H d, D, 1),
    to_kv.weight (E 2 H d, Dc, 1) with rows (expert, k then v, head, channel), to_out.weight (E D, H d, 1).
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        inner = heads * dim_head
        where = {"device": device, "dtype": dtype}

        def grouped(fan_in: int, fan_out: int) -> nn.Conv1d:
            return nn.Conv1d(num_experts * fan_in, num_experts * fan_out, 1, groups=num_experts, bias=False, **where)

        self.norm = RMSNorm(num_experts, dim, **where) if prenorm else None
        self.context_norm = RMSNorm(num_experts, dim_context, **where) if prenorm else None
        self.null_kv = nn.Parameter(torch.empty(2, num_experts, heads, 1, dim_head, **where))
        self.to_q = grouped(dim, inner)
        self.to_kv = grouped(dim_context, 2 * inner)
        self.to_out = grouped(inner, dim)
        nn.init.normal_(self.null_kv)

    def reset_parameters(self) -> None:
        for layer in (self.norm, self.context_norm, self.to_q, self.to_kv, self.to_out):
            if layer is not None:
                layer.reset_parameters()
        nn.init.normal_(self.null_kv)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        context: Float[Tensor, "B M Dc"],
        q_routes: Routes,
        kv_routes: Routes,
        rotary_emb: Float[Tensor, "N d"] | None = None,
    ) -> Float[Tensor, "B E Kq D"]:
        experts = self.null_kv.shape[1]
        per_expert = {
            name: rearrange(layer.weight, "(e o) i 1 -> e o i", e=experts)
            for name, layer in (("w_q", self.to_q), ("w_kv", self.to_kv), ("w_out", self.to_out))
        }
        return routed_attention(
            x,
            context,
            q_routes,
            kv_routes,
            **per_expert,
            null_kv=self.null_kv.squeeze(3),
            gamma=None if self.norm is None else self.norm.gamma.squeeze(-1),
            context_gamma=None if self.context_norm is None else self.context_norm.gamma.squeeze(-1),
            rotary_emb=rotary_emb,
            dropout=self.dropout if self.training else 0.0,
        )
