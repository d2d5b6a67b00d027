"""Routed attention: each expert attends over the tokens that were routed to it, and to a learned null key/value.

Letters: B batch, N tokens, M context tokens, D and Dc model dimensions, E experts, H heads, d head dimension,
Kq and Kkv slots of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reference import contract
from reference.contract import Routes
from reference.routing import widen


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
    rotary_emb: Float[Tensor, "P d"] | None = None,
    dropout: float = 0.0,
    dropout_mask: Bool[Tensor, "B E H Kq S"] | None = None,
) -> Float[Tensor, "B E Kq D"]:
    """Attention of every expert over its own routed tokens, already times the query scores.

    Tokens are RMS-normalised per expert (skipped where gamma is None), projected (rows of w_kv: k then v, each (head,
    channel)), rotated at their original positions (by the first N rows of rotary_emb), values scaled by the key/value
    scores. Slot 0 of the softmax is the null key, visible always, so that no row is empty; masked slots are invisible.
    `dropout` acts on the probabilities, the null slot's too; `dropout_mask` (True = kept, slot 0 the null slot) takes
    the place of the random draw.
    Masked query slots give 0. Returns (B, E, Kq, D) in x's dtype. Raises TypeError or ValueError.
    """
    weights = {"w_q": w_q, "w_kv": w_kv, "w_out": w_out, "gamma": gamma, "context_gamma": context_gamma}
    rotary_emb = contract.attention_input(x, context, q_routes, kv_routes, null_kv, weights, rotary_emb, dropout)
    if dropout_mask is not None:
        sizes = (*null_kv.shape[1:3], q_routes.indices.shape[2], 1 + kv_routes.indices.shape[2])
        contract.tensor("dropout_mask", dropout_mask, x.shape[0], *sizes, dtypes=(torch.bool,), beside=x)
    maps = Maps(
        norm=partial(rms_norm, gamma=gamma),
        context_norm=partial(rms_norm, gamma=context_gamma),
        to_q=partial(project, w=w_q),
        to_kv=partial(project, w=w_kv),
        to_out=partial(project, w=w_out),
    )
    return attend(x, context, q_routes, kv_routes, maps, null_kv, rotary_emb, dropout, dropout_mask)


class Maps(NamedTuple):
    """What every expert does to its rows: (B, E, K, channels in) to (B, E, K, channels out)."""

    norm: Callable[[Tensor], Tensor]
    context_norm: Callable[[Tensor], Tensor]
    to_q: Callable[[Tensor], Tensor]
    to_kv: Callable[[Tensor], Tensor]
    to_out: Callable[[Tensor], Tensor]


def attend(
    x: Float[Tensor, "B N D"],
    context: Float[Tensor, "B M Dc"],
    q_routes: Routes,
    kv_routes: Routes,
    maps: Maps,
    null_kv: Float[Tensor, "2 E H d"],
    rotary_emb: Float[Tensor, "N d"] | None,
    dropout: float,
    dropout_mask: Bool[Tensor, "B E H Kq S"] | None = None,
) -> Float[Tensor, "B E Kq D"]:
    """`routed_attention` of checked arguments, by the maps of a module or of weights."""
    heads = null_kv.shape[2]
    q = maps.to_q(maps.norm(gather(x, q_routes)))
    kv = maps.to_kv(maps.context_norm(gather(context, kv_routes)))
    dtype = torch.promote_types(q.dtype, kv.dtype)  # modules that were wrapped or replaced may differ
    q = rearrange(q.to(dtype), "b e k (h d) -> b e h k d", h=heads)
    k, v = rearrange(kv.to(dtype), "b e k (two h d) -> two b e h k d", two=2, h=heads)
    if rotary_emb is not None:
        q = rotate(q, rotary_emb[q_routes.indices][:, :, None])
        k = rotate(k, rotary_emb[kv_routes.indices][:, :, None])
    # The score of a masked slot, which may be NaN, is selected away as its token is.
    q_scores, kv_scores = (torch.where(r.mask, widen(r.scores), 0) for r in (q_routes, kv_routes))
    v = (v * kv_scores[:, :, None, :, None]).to(dtype)

    null_k, null_v = repeat(null_kv.to(dtype), "two e h d -> two b e h 1 d", b=x.shape[0])
    k, v = torch.cat((null_k, k), dim=-2), torch.cat((null_v, v), dim=-2)
    visible = F.pad(kv_routes.mask, (1, 0), value=True)[:, :, None, None, :]
    logits = widen(q @ k.mT) * q.shape[-1] ** -0.5
    probs = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    if dropout > 0:
        kept = torch.rand_like(probs) >= dropout if dropout_mask is None else dropout_mask
        probs = torch.where(kept, probs / (1 - dropout), 0)
    heads_out = rearrange(probs.to(dtype) @ v, "b e h k d -> b e k (h d)")
    y = maps.to_out(heads_out.to(x.dtype)) * q_scores[..., None]
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
    wide = widen(x)
    normed = F.normalize(wide, dim=-1, eps=1e-12) * x.shape[-1] ** 0.5
    return (normed * gamma[:, None].to(wide.dtype)).to(x.dtype)


def project(rows: Float[Tensor, "B E K I"], w: Float[Tensor, "E O I"]) -> Float[Tensor, "B E K O"]:
    return torch.einsum("beki,eoi->beko", rows, w)


def rotate(t: Float[Tensor, "... d"], angles: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Rotary embedding t cos + rotate_half(t) sin, rotate_half(t) = cat(-t2, t1) of the two halves."""
    wide = widen(t)
    first, second = wide.chunk(2, dim=-1)
    rotated_half = torch.cat((-second, first), dim=-1)
    angles = angles.to(torch.promote_types(wide.dtype, angles.dtype))
    return (wide * angles.cos().to(wide.dtype) + rotated_half * angles.sin().to(wide.dtype)).to(t.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` of rows (B, E, K, D) by gamma (E, D, 1)."""

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

    def forward(self, rows: Float[Tensor, "B E K D"]) -> Float[Tensor, "B E K D"]:
        gamma = self.gamma
        contract.ordinary("gamma", gamma)
        return rms_norm(rows, gamma.squeeze(-1))


class ExpertProjection(nn.Conv1d):
    """A matrix per expert, stored and called as a convolution of width 1 with one group per expert.

    weight (E * out, in, 1). Constructed as nn.Conv1d is, since what wraps a convolution (peft, say) makes others of its
    class. Computed as a batched matrix product, the same in less time, unless it is wider, strided or padded.
    """

    def forward(self, input: Float[Tensor, "B EI K"]) -> Float[Tensor, "B EO K"]:  # noqa: A002, as nn.Conv1d
        if (self.kernel_size, self.stride, self.padding, input.ndim) != ((1,), (1,), (0,), 3):
            return super().forward(input)
        weight, bias = self.weight, self.bias  # read once: a parametrization computes them
        contract.beside_parameters("input", input, weight, "weight")
        per_expert = rearrange(input, "b (e i) k -> b e k i", e=self.groups)
        out = project(per_expert, rearrange(weight, "(e o) i 1 -> e o i", e=self.groups))
        out = rearrange(out, "b e k o -> b (e o) k")
        return out if bias is None else out + bias[:, None]


class RoutedAttention(nn.Module):
    """`routed_attention` by norms and projections that are modules, each called once.

    State: norm.gamma (E, D, 1), context_norm.gamma (E, Dc, 1), null_kv (2, E, H, 1, d), to_q.weight (E H d, D, 1),
    to_kv.weight (E 2 H d, Dc, 1) with rows (expert, k then v, head, channel), to_out.weight (E D, H d, 1).
    """

    dropout: float = contract.checked_dropout()

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
        where: dict[str, Any] = {"device": device, "dtype": dtype}

        self.norm = RMSNorm(num_experts, dim, **where) if prenorm else None
        self.context_norm = RMSNorm(num_experts, dim_context, **where) if prenorm else None
        self.null_kv = nn.Parameter(torch.empty(2, num_experts, heads, 1, dim_head, **where))

        def grouped(fan_in: int, fan_out: int) -> ExpertProjection:
            channels = num_experts * fan_in, num_experts * fan_out
            return ExpertProjection(*channels, kernel_size=1, groups=num_experts, bias=False, **where)

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
        """Arguments are checked by the layer, but for what depends on parameters."""
        contract.parameters(self, x, CLASSES)
        null_kv = self.null_kv
        contract.ordinary("null_kv", null_kv)
        maps = Maps(
            norm=nn.Identity() if self.norm is None else self.norm,
            context_norm=nn.Identity() if self.context_norm is None else self.context_norm,
            to_q=partial(self._project, self.to_q),
            to_kv=partial(self._project, self.to_kv),
            to_out=partial(self._project, self.to_out),
        )
        dropout = self.dropout if self.training else 0.0
        return attend(x, context, q_routes, kv_routes, maps, null_kv.squeeze(3), rotary_emb, dropout)

    @staticmethod
    def _project(projection: nn.Module, rows: Float[Tensor, "B E K I"]) -> Float[Tensor, "B E K O"]:
        experts = rows.shape[1]
        return rearrange(projection(rearrange(rows, "b e k i -> b (e i) k")), "b (e o) k -> b e k o", e=experts)


_MATRIX = ("weight", "bias")
CLASSES: contract.Classes = {RoutedAttention: (), RMSNorm: (), ExpertProjection: _MATRIX, nn.Conv1d: _MATRIX}
