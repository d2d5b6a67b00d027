"""Routed attention: each expert attends over its own routed tokens and a learned null key/value.

The routed tokens of all batch items are gathered expert by expert, (E, B K, D), so that every projection is one
batched GEMM without padding. The attention kernel sees the routed keys alone; the null key and value, which are never
hidden, are merged into its result through the log-sum-exp (`ops.attention`).

Letters: B batch, N tokens, M context tokens, D and Dc model dimensions, E experts, H heads, d head dimension, Kq and
Kkv slots of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from optimized import ops, validation
from optimized.attention import module_name
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
    kv_routes = pack(kv_routes)
    inverses = (
        ops.inverse_map(routes.indices, routes.mask, tokens.shape[1])
        for routes, tokens in ((q_routes, x), (kv_routes, context))
    )
    weights = (w.flatten(0, 1)[..., None] for w in (w_q, w_kv, w_out))
    gammas = (None if g is None else g[..., None] for g in (gamma, context_gamma))
    y = _routed_attention(
        x, context, q_routes, kv_routes, *inverses, *weights, null_kv.unsqueeze(3), *gammas, rotary_emb, dropout
    )
    y = y.transpose(0, 1) * q_routes.scores[..., None]
    return torch.where(q_routes.mask[..., None], y, 0).to(x.dtype)


def pack(routes: Routes) -> Routes:
    """Valid slots first, in their order: attention over keys depends on no order, and takes a length for a mask."""
    order = (~routes.mask).to(torch.uint8).argsort(dim=-1, stable=True)
    indices, mask, scores = (t.gather(-1, order) for t in (routes.indices, routes.mask, routes.scores))
    return Routes(indices, mask, scores, routes.logits)


def _routed_attention(
    x: Tensor,
    context: Tensor,
    q_routes: Routes,
    kv_routes: Routes,
    q_inverse: Tensor,
    kv_inverse: Tensor,
    w_q: Tensor,
    w_kv: Tensor,
    w_out: Tensor,
    null_kv: Tensor,
    gamma: Tensor | None,
    context_gamma: Tensor | None,
    rotary_emb: Tensor | None,
    dropout: float,
    masked: bool = True,
    unit_scores: bool = False,
    allow_flash: bool = True,
    allow_triton: bool = True,
) -> Tensor:
    """(E, B, Kq, D), not yet times the query scores; rows of masked slots hold anything.

    Parameters in the shapes of `RoutedAttention`. kv_routes: valid slots first. q_inverse, kv_inverse (B, E, N): see
    `ops.inverse_map`. masked=False promises that every key/value slot is valid, which admits backends that take no
    lengths; unit_scores=True that key/value scores of valid slots are 1 or NaN.
    """
    triton = choose("dispatch", Request(x.device, x.dtype, allow_triton=allow_triton)).triton
    queries = gather(x, q_routes, q_inverse, gamma, triton)
    keys_values = gather(context, kv_routes, kv_inverse, context_gamma, triton)
    return attend_rows(
        queries, keys_values, q_routes, kv_routes, w_q, w_kv, w_out, null_kv, rotary_emb, dropout, masked, unit_scores,
        allow_flash, triton,
    )  # fmt: skip


def attend_rows(
    queries: Tensor,
    keys_values: Tensor,
    q_routes: Routes,
    kv_routes: Routes,
    w_q: Tensor,
    w_kv: Tensor,
    w_out: Tensor,
    null_kv: Tensor,
    rotary_emb: Tensor | None,
    dropout: float,
    masked: bool,
    unit_scores: bool,
    allow_flash: bool,
    triton: bool,
) -> Tensor:
    """(E, B, Kq, D) from the gathered rows (E, B, K, D); see `_routed_attention` and `ops.expert_attention`."""
    tensors = [queries, keys_values, w_q, w_kv, w_out]
    device = queries.device
    if torch.is_autocast_enabled(device.type) and queries.dtype != torch.float64:
        tensors = [t.to(torch.get_autocast_dtype(device.type)) for t in tensors]
    dtype, dim_head = tensors[0].dtype, null_kv.shape[-1]
    tables: tuple[Tensor | None, ...] = (None,) * 4
    if rotary_emb is not None:
        wide = torch.promote_types(dtype, torch.float32)
        angles = rotary_emb.to(torch.promote_types(rotary_emb.dtype, queries.dtype))
        positions = (routes.indices.transpose(0, 1).flatten(0, 1) for routes in (q_routes, kv_routes))
        tables = angles.cos().to(wide), angles.sin().to(wide), *positions
    lengths = kv_routes.mask.sum(-1, dtype=torch.int32).t().flatten() if masked else None
    request = Request(device, dtype, dim_head, masked, dropout, allow_flash=allow_flash, allow_triton=triton)
    backend = module_name(choose("routed_attention", request).name, device)
    return ops.attend_by_experts(
        *tensors[:2], kv_routes.scores, *tensors[2:], null_kv.to(dtype), lengths, *tables, dropout, unit_scores,
        backend, triton,
    )[0]  # fmt: skip


def gather(
    x: Float[Tensor, "B N D"], routes: Routes, inverse: Tensor, gamma: Float[Tensor, "E D 1"] | None, triton: bool
) -> Float[Tensor, "E B K D"]:
    """Routed tokens, RMS-normalised if gamma is given; masked slots are 0."""
    if triton:
        return ops.gather(x, gamma, routes.indices, routes.mask, inverse)[0]
    return rms_norm(ops.gather_tokens(x, routes.indices, routes.mask, inverse), gamma)


def rms_norm(x: Float[Tensor, "E B K D"], gamma: Float[Tensor, "E D 1"] | None) -> Float[Tensor, "E B K D"]:
    """x / max(||x||, 1e-12) sqrt(D) gamma[e] in at least float32, returned in x's dtype."""
    if gamma is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
    scale = gamma.squeeze(-1).to(wide.dtype) * x.shape[-1] ** 0.5
    return (wide / norm * scale[:, None, None]).to(x.dtype)


def rotate(
    t: Float[Tensor, "R L H d"],
    cos: Float[Tensor, "P d"],
    sin: Float[Tensor, "P d"],
    positions: Int64[Tensor, "R L"] | None,
    triton: bool,
) -> Float[Tensor, "R L H d"]:
    """Rotary embedding by the angles whose cos and sin are tabulated, in at least float32. positions None: 0 .. L-1."""
    wide = torch.promote_types(t.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    if triton:
        return ops.turn(t, cos, sin, positions, False)
    half = t.shape[-1] // 2
    sign = torch.ones(t.shape[-1], dtype=wide, device=t.device)
    sign[:half] = -1
    cos, sin = ((table if positions is None else table[positions]).unsqueeze(-2) for table in (cos, sin * sign))
    exact = t.to(wide)
    return torch.addcmul(exact * cos, torch.cat((exact[..., half:], exact[..., :half]), -1), sin).to(t.dtype)


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
        use_triton: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.heads, self.dim_head = num_experts, heads, dim_head
        self.dropout, self.flash_attn, self.use_triton = dropout, flash_attn, use_triton
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
        kv_inverse: Tensor,
        rotary_emb: Float[Tensor, "N d"] | None = None,
        masked: bool = True,
        unit_scores: bool = False,
    ) -> Float[Tensor, "E B Kq D"]:
        """See `_routed_attention`."""
        return _routed_attention(
            x, context, q_routes, kv_routes, q_inverse, kv_inverse, *self._weights(), *self.gammas(), rotary_emb,
            self._probability(), masked, unit_scores, self.flash_attn, self.use_triton,
        )  # fmt: skip

    def attend(
        self,
        queries: Float[Tensor, "E B Kq D"],
        keys_values: Float[Tensor, "E B Kkv D"],
        q_routes: Routes,
        kv_routes: Routes,
        rotary_emb: Float[Tensor, "N d"] | None,
        masked: bool,
        unit_scores: bool,
    ) -> Float[Tensor, "E B Kq D"]:
        """The same from rows that Triton gathered and normalised already."""
        return attend_rows(
            queries, keys_values, q_routes, kv_routes, *self._weights(), rotary_emb, self._probability(), masked,
            unit_scores, self.flash_attn, True,
        )  # fmt: skip

    def gammas(self) -> tuple[Tensor | None, Tensor | None]:
        """Of queries and of keys/values, (E, D, 1); None without norm."""
        return (None, None) if self.norm is None else (self.norm.gamma, self.context_norm.gamma)

    def _weights(self) -> tuple[Tensor, ...]:
        return self.to_q.weight, self.to_kv.weight, self.to_out.weight, self.null_kv

    def _probability(self) -> float:
        return self.dropout if self.training else 0.0

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, heads={self.heads}, dim_head={self.dim_head}, dropout={self.dropout}"
