"""Routed attention: each expert attends over its own routed tokens and a learned null key/value.

The routed tokens of all batch items are gathered expert by expert, (E, B, K, D), so that every projection is one
batched GEMM without padding. The attention kernel sees the routed keys alone; the null key and value, which are never
hidden, are merged into its result through the log-sum-exp (`ops.null_slot`).

Letters: B batch, N tokens, M context tokens, D and Dc model dimensions, E experts, H heads, d head dimension, Kq and
Kkv slots of an expert, R = E B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from optimized import ops
from optimized.plain import child, obstacle_to_fusion, parameter, plain
from optimized.plan import Kind, Plan, bind
from reference import contract
from reference.contract import Config, Routes


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
) -> Float[Tensor, "B E Kq D"]:
    """Attention of every expert over its own routed tokens, already times the query scores; masked query slots are 0.

    Args:
        x, context: (B, N, D), (B, M, Dc). q_routes, kv_routes: which of their tokens each expert reads.
        w_q, w_kv, w_out: projections per expert; rows (head, channel), for w_kv (k then v, head, channel).
        null_kv: key and value that every query sees, (2, E, H, d).
        gamma, context_gamma: per-expert scale of the RMSNorm x / max(||x||, 1e-12) sqrt(D); None: no norm. Its
            gradient at an all-zero token is about sqrt(D) * 1e12.
        rotary_emb: (N, d) angles in any floating dtype, taken at each token's original position (self-attention only).
            Of a longer table the first N rows.
        dropout: probability of dropping an attention weight, the null slot's included.
    Returns (B, E, Kq, D) in x's dtype. Norms, rotations, softmax and scores are computed in at least float32.
    Raises TypeError or ValueError naming the argument.
    """
    given = {"w_q": w_q, "w_kv": w_kv, "w_out": w_out, "gamma": gamma, "context_gamma": context_gamma}
    rotary_emb = contract.attention_input(x, context, q_routes, kv_routes, null_kv, given, rotary_emb, dropout)
    stages = ("dispatch", "routed_attention")
    plan = bind(Kind(x.device, x.dtype, stages, null_kv.shape[-1], masked=True, dropout=float(dropout)))
    kv_routes = pack(kv_routes)
    gammas = (None if g is None else g[..., None] for g in (gamma, context_gamma))
    queries, keys_values = (
        gather(t, routes, g, plan.dispatch) for t, routes, g in zip((x, context), (q_routes, kv_routes), gammas)
    )
    weights = (w.flatten(0, 1)[..., None] for w in (w_q, w_kv, w_out))
    y = _fused(
        queries, keys_values, (*weights, null_kv.unsqueeze(3)), Keys.of(q_routes, kv_routes, rotary_emb, plan),
        float(dropout), False, plan,
    )  # fmt: skip
    y = y.transpose(0, 1) * torch.where(q_routes.mask, q_routes.scores, 0)[..., None]
    return torch.where(q_routes.mask[..., None], y, 0).to(x.dtype)


def pack(routes: Routes) -> Routes:
    """Valid slots first, in their order: attention over keys depends on no order, and takes a length for a mask.

    The score of a masked slot, which may be NaN, becomes 0: a weight of 0 times NaN is NaN.
    """
    order = (~routes.mask).to(torch.uint8).argsort(dim=-1, stable=True)
    scores = torch.where(routes.mask, routes.scores, 0)
    indices, mask, scores = (t.gather(-1, order) for t in (routes.indices, routes.mask, scores))
    return Routes(indices, mask, scores, routes.logits)


def gather(
    x: Float[Tensor, "B N D"], routes: Routes, gamma: Float[Tensor, "E D 1"] | None, triton: bool
) -> Float[Tensor, "E B K D"]:
    """Routed tokens, RMS-normalised if gamma is given; masked slots are 0."""
    inverse = ops.inverse_map(routes.indices, routes.mask, x.shape[1])
    return ops.gather_norm.first(x, gamma, routes.indices, routes.mask, inverse, triton)


class Keys(NamedTuple):
    """What the attention is told of the keys and of positions."""

    scores: Tensor  # (B, E, Kkv), times the values
    lengths: Tensor | None  # (R) int32, how many keys of each row take part; None for all
    cos: Tensor | None  # (N, d) of the rotary angles; None for no rotation
    sin: Tensor | None
    q_positions: Tensor | None  # (R, Kq)
    k_positions: Tensor | None  # (R, Kkv)

    @classmethod
    def of(cls, q_routes: Routes, kv_routes: Routes, rotary_emb: Tensor | None, plan: Plan) -> Keys:
        """kv_routes: valid slots first where plan.masked."""
        scores = kv_routes.scores.to(torch.promote_types(kv_routes.scores.dtype, torch.float32))
        lengths = kv_routes.mask.sum(-1, dtype=torch.int32).t().flatten() if plan.masked else None
        if rotary_emb is None:
            return cls(scores, lengths, None, None, None, None)
        q_positions, k_positions = (r.indices.transpose(0, 1).flatten(0, 1) for r in (q_routes, kv_routes))
        return cls(scores, lengths, *rotation(rotary_emb, plan), q_positions, k_positions)


def rotation(rotary_emb: Tensor | None, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin of the angles; None for no rotation."""
    if rotary_emb is None:
        return None, None
    wide = torch.promote_types(plan.dtype, torch.float32)
    angles = rotary_emb.to(torch.promote_types(rotary_emb.dtype, wide))
    return angles.cos().to(wide), angles.sin().to(wide)


def _fused(
    queries: Tensor,
    keys_values: Tensor,
    parameters: Sequence[Tensor],
    keys: Keys,
    dropout: float,
    unit_scores: bool,
    plan: Plan,
) -> Tensor:
    """(E, B, Kq, D) from the gathered rows. parameters: w_q, w_kv, w_out and null_kv in the shapes of the module."""
    queries, keys_values, *converted = _in(plan.dtype, queries, keys_values, *parameters)
    scores, *rest = keys
    return ops.expert_attention.first(
        queries, keys_values, scores, *converted, *rest, dropout, unit_scores, plan.routed_attention, plan.dispatch
    )


def _in(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    # Asked before: a conversion of nothing costs the host as much as an operation.
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


class RMSNorm(nn.Module):
    """x / max(||x||, 1e-12) sqrt(D) gamma[e] of rows (E, B, K, D), in at least float32, returned in x's dtype.

    State: gamma (E, D, 1), initially 1.
    """

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

    def forward(self, rows: Float[Tensor, "E B K D"]) -> Float[Tensor, "E B K D"]:
        gamma = self.gamma  # read once: a parametrization computes it
        contract.ordinary("gamma", gamma)
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
        scale = gamma.squeeze(-1).to(wide.dtype) * rows.shape[-1] ** 0.5
        return (wide / norm * scale[:, None, None]).to(rows.dtype)

    def extra_repr(self) -> str:
        return "num_experts={}, dim={}".format(*self.gamma.shape)


class ExpertProjection(nn.Conv1d):
    """A convolution of width 1 with one group per expert, as one batched matrix product.

    Constructed as nn.Conv1d is, since what wraps a convolution (peft, say) makes others of its class: of those that are
    wider, strided or padded the result is nn.Conv1d's own.
    """

    def forward(self, input: Float[Tensor, "B EI K"]) -> Float[Tensor, "B EO K"]:  # noqa: A002, nn.Conv1d names it so
        if (self.kernel_size, self.stride, self.padding, input.ndim) != ((1,), (1,), (0,), 3):
            return super().forward(input)
        (batch, _, k), weight, bias = input.shape, self.weight, self.bias  # read once: a parametrization computes them
        contract.beside_parameters("input", input, weight, "weight")
        rows = input.unflatten(1, (self.groups, -1)).permute(1, 2, 0, 3).flatten(2)  # (E, in, B K)
        out = torch.bmm(weight.squeeze(-1).unflatten(0, (self.groups, -1)), rows)
        out = out.unflatten(2, (batch, k)).permute(2, 0, 1, 3).flatten(1, 2)
        return out if bias is None else out + bias[:, None].to(out.dtype)


def _projection(experts: int, fan_in: int, fan_out: int, **where: Any) -> ExpertProjection:
    return ExpertProjection(experts * fan_in, experts * fan_out, 1, groups=experts, bias=False, **where)


class RoutedAttention(nn.Module):
    """Parameters of `routed_attention`, in the shapes of convolutions of width 1 with one group per expert.

    State: norm.gamma (E, D, 1), context_norm.gamma (E, Dc, 1), null_kv (2, E, H, 1, d), to_q.weight (E H d, D, 1),
    to_kv.weight (E 2 H d, Dc, 1) with rows (expert, k then v, head, channel), to_out.weight (E D, H d, 1).
    Initialised as nn.Conv1d is; null_kv standard normal.
    """

    dropout: float = contract.checked_dropout()

    def __init__(
        self, config: Config, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        e, inner = config.num_experts, config.heads * config.dim_head
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_experts, self.heads, self.dim_head = e, config.heads, config.dim_head
        self.dropout, self.flash_attn, self.use_triton = config.dropout, config.flash_attn, config.use_triton
        self.norm = RMSNorm(e, config.dim, **where) if config.prenorm else None
        self.context_norm = RMSNorm(e, config.dim_context, **where) if config.prenorm else None
        self.null_kv = nn.Parameter(torch.empty(2, e, config.heads, 1, config.dim_head, **where))
        self.to_q = _projection(e, config.dim, inner, **where)
        self.to_kv = _projection(e, config.dim_context, 2 * inner, **where)
        self.to_out = _projection(e, inner, config.dim, **where)
        nn.init.normal_(self.null_kv)

    def reset_parameters(self) -> None:
        child: Any
        for child in self.children():
            child.reset_parameters()
        nn.init.normal_(self.null_kv)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        context: Float[Tensor, "B M Dc"],
        q_routes: Routes,
        kv_routes: Routes,
        rotary_emb: Float[Tensor, "N d"] | None = None,
        plan: Plan | None = None,
        unit_scores: bool = False,
    ) -> Float[Tensor, "E B Kq D"]:
        """`routed_attention` of arguments already checked, before the query scores; rows of masked slots hold anything.

        plan: that of the layer's call. unit_scores promises that key/value scores of valid slots are 1 or NaN.
        """
        if plan is None or not contract.takes_as_given(self, RoutedAttention):
            contract.parameters(self, x, CLASSES)
        if plan is None:
            stages = ("dispatch", "routed_attention")
            kind = Kind(
                x.device, x.dtype, stages, self.dim_head, masked=True, dropout=self.probability(),
                allow_flash=self.flash_attn, allow_triton=self.use_triton,
            )  # fmt: skip
            plan = bind(kind)
        if plan.masked:
            kv_routes = pack(kv_routes)
        queries = self._normed(x, q_routes, self.norm, plan)
        keys_values = self._normed(context, kv_routes, self.context_norm, plan)
        return self.attend(queries, keys_values, q_routes, kv_routes, rotary_emb, plan, unit_scores)

    def attend(
        self,
        queries: Float[Tensor, "E B Kq D"],
        keys_values: Float[Tensor, "E B Kkv Dc"],
        q_routes: Routes,
        kv_routes: Routes,
        rotary_emb: Float[Tensor, "N d"] | None,
        plan: Plan,
        unit_scores: bool,
    ) -> Float[Tensor, "E B Kq D"]:
        """The same from gathered and normalised rows. kv_routes: valid slots first where plan.masked."""
        null_kv = self._null_kv()
        keys, dropout = Keys.of(q_routes, kv_routes, rotary_emb, plan), self.probability()
        to_q, to_kv, to_out = self.to_q, self.to_kv, self.to_out
        if _obstacle(to_q, to_kv, to_out) is None:
            return _fused(queries, keys_values, self.fused_parameters(plan, null_kv), keys, dropout, unit_scores, plan)
        heads = (self.heads, self.dim_head)
        q = project(to_q, queries).to(plan.dtype).flatten(0, 1).unflatten(-1, heads)
        k, v = project(to_kv, keys_values).to(plan.dtype).flatten(0, 1).unflatten(-1, (2, *heads)).unbind(2)
        if keys.cos is not None:
            q = ops.rotary(q, keys.cos, keys.sin, keys.q_positions, False, plan.dispatch)
            k = ops.rotary(k, keys.cos, keys.sin, keys.k_positions, False, plan.dispatch)
        v = (v * keys.scores.transpose(0, 1).flatten(0, 1)[..., None, None]).to(v.dtype)
        null_k, null_v = null_kv.to(plan.dtype).squeeze(3).unbind(0)
        out = ops.attention.first(
            q, k, v, null_k, null_v, keys.lengths, None, dropout, -1, False, plan.routed_attention, plan.dispatch
        )
        return project(to_out, out.flatten(2).unflatten(0, queries.shape[:2]))

    def obstacle_to_fusion(self) -> str | None:
        """Why the projections are called as modules; None where one operator does the same."""
        return _obstacle(child(self, "to_q"), child(self, "to_kv"), child(self, "to_out"))

    def fused_parameters(self, plan: Plan, null_kv: Tensor | None = None) -> list[Tensor]:
        """Of the projections and of the null slot, where nothing is an `obstacle_to_fusion`, in the plan's dtype."""
        null_kv = self._null_kv() if null_kv is None else null_kv
        weights = [parameter(child(self, name), "weight") for name in ("to_q", "to_kv", "to_out")]
        return _in(plan.dtype, *weights, null_kv)

    def _null_kv(self) -> Tensor:
        null_kv = self.null_kv  # read once: a parametrization computes it
        contract.ordinary("null_kv", null_kv)
        return null_kv

    def _normed(self, x: Tensor, routes: Routes, norm: nn.Module | None, plan: Plan) -> Tensor:
        """(E, B, K, D): routed tokens, by one operator where the norm is plain."""
        if norm is None or plain(norm, RMSNorm) is None:
            gamma: Any = None if norm is None else norm.gamma
            return gather(x, routes, gamma, plan.dispatch)
        return norm(gather(x, routes, None, plan.dispatch))

    def probability(self) -> float:
        """Of dropping a weight, now."""
        return self.dropout if self.training else 0.0

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, heads={self.heads}, dim_head={self.dim_head}, dropout={self.dropout}"


_MATRIX = ("weight", "bias")
CLASSES: contract.Classes = {RoutedAttention: (), RMSNorm: (), ExpertProjection: _MATRIX, nn.Conv1d: _MATRIX}


def _obstacle(to_q: nn.Module, to_kv: nn.Module, to_out: nn.Module) -> str | None:
    return obstacle_to_fusion(
        to_q=(to_q, ExpertProjection), to_kv=(to_kv, ExpertProjection), to_out=(to_out, ExpertProjection)
    )


def project(projection: nn.Module, rows: Float[Tensor, "E B K I"]) -> Float[Tensor, "E B K O"]:
    """By a module that takes (B, E I, K), as a convolution does."""
    out = projection(rows.permute(1, 0, 3, 2).flatten(1, 2))
    return out.unflatten(1, (rows.shape[0], -1)).permute(1, 0, 3, 2)
