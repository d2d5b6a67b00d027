"""Routed attention of the causal layer: queries of a block over what the expert remembered when the block began.

Keys and values are projected once per token, rotated once, and looked up by each block that sees them.

Letters: B batch, E experts, D model dimension, H heads, d head dimension, J blocks, C slots for queries in a block,
K slots of memory, M rows of tokens, S = M and, with a cache, the K stored ones before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optimized import ops
from optimized.choice import choices
from optimized.ops.finite import Projected, odd_rows
from optimized.plain import obstacle_to_fusion, plain
from optimized.plan import Kind, Plan, bind
from optimized.routed_attention import CLASSES as ROUTED
from optimized.routed_attention import ExpertProjection, RMSNorm, RoutedAttention, project
from reference import contract


class Asked(NamedTuple):
    """Which rows of x are queries, and which columns each block sees."""

    places: Int[Tensor, "B E J C"]  # rows of x
    mask: Bool[Tensor, "B E J C"]
    inverse: Int[Tensor, "B E M"]  # slot j C + c of a row, -1 for none
    columns: Int[Tensor, "B E J K"] | None  # None: all blocks see the stored ones, and no row of x
    counts: Int[Tensor, "B E J"]
    q_counts: Int[Tensor, "B E J"]  # slots that hold a query, of this call or not, the first ones
    positions: Int[Tensor, "B M"] | None  # of rows of x; None for 0, 1, ...
    new: tuple[int, int] | None  # (W, P): list j holds columns below P + j W, whose keys nobody keeps

    def positions_of(self, index: Int[Tensor, "B ..."]) -> Tensor:
        """Of rows of x."""
        return index if self.positions is None else self.positions.gather(1, index.flatten(1)).view(index.shape)


class MemoryAttention(RoutedAttention):
    """State as of `RoutedAttention`."""

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "B M D"],
        asked: Asked,
        scores: Float[Tensor, "B E S"] | Float[Tensor, "B E J K"],
        stored: tuple[Tensor, Tensor] | None = None,
        rotary_emb: Float[Tensor, "P d"] | None = None,
        plan: Plan | None = None,
    ) -> tuple[Float[Tensor, "E B Q D"], Float[Tensor, "E B S 2 H d"] | None]:
        """Outputs of the Q = J C slots before the query scores, and rotated keys and values of all columns, if any.

        scores: of the columns, or of the slots of every block. stored: keys and values of a cache, (B, E, K, H, d).
        plan: that of the layer's call.
        """
        if plan is None or not contract.takes_as_given(self, MemoryAttention):
            contract.parameters(self, x, CLASSES)
        if plan is None:
            stages = ("dispatch", "routed_attention")
            kind = Kind(
                x.device, x.dtype, stages, self.dim_head, masked=True, dropout=self.probability(),
                allow_flash=self.flash_attn, allow_triton=self.use_triton,
            )  # fmt: skip
            plan = bind(kind)
        null_kv: Tensor = self.null_kv  # read once: a parametrization computes it
        contract.ordinary("null_kv", null_kv)
        if asked.new is not None and rotary_emb is None and scores.ndim == 3 and self._fuses(x, plan):
            return self._fused(x, asked, scores, null_kv, plan), None
        angles = None if rotary_emb is None else _angles(rotary_emb, plan)
        q = self._queries(x, asked, plan)
        if angles is not None:
            q = _rotated(q, angles, asked.positions_of(asked.places).flatten(2).transpose(0, 1), plan)
        dropout, kv = self.probability(), None
        null_kv = null_kv.to(plan.dtype)
        old = None if stored is None else torch.stack([t.to(plan.dtype).transpose(0, 1) for t in stored], 3)
        if asked.columns is None:
            assert old is not None
            out = _attend_stored(q, old, scores, asked, null_kv, dropout, plan)
        else:
            kv = self._keys_values(x, plan)
            if angles is not None:
                at = asked.positions_of(torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1))
                k, v = kv.unbind(3)
                kv = torch.stack((_rotated(k, angles, at.expand(k.shape[0], -1, -1), plan), v), 3)
            kv = kv if old is None else torch.cat((old, kv), 2)
            if by_index(plan) and scores.ndim == 3:
                out = attend_by_index(q, kv, scores, asked, null_kv, dropout)
            else:
                out = attend_gathered(q, kv, scores, asked, null_kv, dropout, plan)
        rows = out.flatten(3)
        if stored is not None or not by_index(plan):  # a slot without a query of this call may have seen a NaN
            rows = rows.masked_fill(~asked.mask.flatten(2).transpose(0, 1)[..., None], 0)
        if plain(self.to_out, ExpertProjection) is None:
            return _projected(rows, self.to_out.weight, plan), kv
        return project(self.to_out, rows), kv

    def _fuses(self, x: Tensor, plan: Plan) -> bool:
        return by_index(plan) and x.dtype == plan.dtype and self.obstacle_to_fusion() is None

    def _fused(self, x: Tensor, asked: Asked, scores: Tensor, null_kv: Tensor, plan: Plan) -> Tensor:
        gammas = [None if norm is None else norm.gamma for norm in (self.norm, self.context_norm)]
        given = asked.places, asked.mask, asked.inverse, asked.columns, asked.counts, asked.q_counts
        assert asked.new is not None
        return ops.memory_experts.first(
            x, *gammas, *self.fused_parameters(plan, null_kv), scores, *given, *asked.new, self.probability(), True
        )

    def _queries(self, x: Tensor, asked: Asked, plan: Plan) -> Float[Tensor, "E B Q H d"]:
        norm, own = self.norm, plain(self.norm, RMSNorm) is None
        gamma: Any = norm.gamma if own and norm is not None else None
        rows, _ = ops.gather_norm(
            x, gamma, asked.places.flatten(2), asked.mask.flatten(2), asked.inverse, plan.dispatch
        )
        if not own:
            assert norm is not None
            rows = norm(rows)
        if plain(self.to_q, ExpertProjection) is None:
            q = _projected(rows, self.to_q.weight, plan)
        else:
            q = project(self.to_q, rows).to(plan.dtype)
        return q.unflatten(3, (self.heads, self.dim_head))

    def _keys_values(self, x: Tensor, plan: Plan) -> Float[Tensor, "E B M 2 H d"]:
        norm, heads, experts = self.context_norm, (2, self.heads, self.dim_head), self.null_kv.shape[1]
        if plain(norm, RMSNorm) is None and plain(self.to_kv, ExpertProjection) is None:
            # The scale of the norm goes into the weights, so that all experts share the rows, and one product them all.
            weight = self.to_kv.weight.squeeze(-1)
            if norm is not None:
                x = _unit_rows(x, plan)
                wide = torch.promote_types(weight.dtype, torch.float32)
                gamma = norm.gamma.squeeze(-1).to(wide)[:, None]
                weight = (weight.to(wide).unflatten(0, (experts, -1)) * gamma).flatten(0, 1)
            kv = Projected.apply(x.to(plan.dtype), weight.to(plan.dtype))
            return kv.unflatten(2, (experts, *heads)).permute(2, 0, 1, 3, 4, 5).contiguous()
        rows = x.expand(experts, *x.shape)
        return project(self.to_kv, rows if norm is None else norm(rows)).to(plan.dtype).unflatten(3, heads)

    def obstacle_to_fusion(self) -> str | None:
        norms = {"norm": (self.norm, RMSNorm), "context_norm": (self.context_norm, RMSNorm)}
        return super().obstacle_to_fusion() or obstacle_to_fusion(**norms)


def _projected(rows: Float[Tensor, "E B Q I"], weight: Float[Tensor, "EO I 1"], plan: Plan) -> Tensor:
    """By one batched product."""
    experts, batch, count, _ = rows.shape
    per_expert = weight.squeeze(-1).unflatten(0, (experts, -1)).to(plan.dtype)
    out = torch.bmm(rows.to(plan.dtype).flatten(1, 2), per_expert.mT)
    return out.view(experts, batch, count, out.shape[-1])


def _unit_rows(x: Float[Tensor, "B M D"], plan: Plan) -> Tensor:
    """x / max(||x||, 1e-12) sqrt(D)."""
    batch, m, dim = x.shape
    every = torch.arange(m, device=x.device).expand(batch, 1, -1)
    ones = torch.ones(1, dim, 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    there = torch.ones(batch, 1, m, dtype=torch.bool, device=x.device)
    return ops.gather_norm(x, ones, every, there, every.int(), plan.dispatch)[0][0]


def _angles(rotary_emb: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Tables (P, d) of cos and sin."""
    wide = torch.promote_types(plan.dtype, torch.float32)
    angles = rotary_emb.to(torch.promote_types(rotary_emb.dtype, wide))
    return angles.cos().to(wide), angles.sin().to(wide)


def _rotated(t: Float[Tensor, "E B L H d"], angles: tuple[Tensor, Tensor], positions: Tensor, plan: Plan) -> Tensor:
    """positions: (E, B, L); those beyond the table are of places that hold no token."""
    cos, sin = angles
    if not cos.shape[0]:
        return t
    at = positions.clamp_max(cos.shape[0] - 1).flatten(0, 1)
    return ops.rotary(t.flatten(0, 1), cos, sin, at, False, plan.dispatch).unflatten(0, t.shape[:2])


def by_index(plan: Plan) -> bool:
    """Whether a kernel of ours looks keys up: where it moves tokens, unless a library was chosen to attend."""
    return plan.dispatch and choices().of("routed_attention") is None


def attend_by_index(
    q: Float[Tensor, "E B Q H d"],
    kv: Float[Tensor, "E B S 2 H d"],
    scores: Float[Tensor, "B E S"],
    asked: Asked,
    null_kv: Float[Tensor, "2 E H 1 d"],
    dropout: float,
) -> Float[Tensor, "E B Q H d"]:
    """By a kernel that looks keys up."""
    experts, batch, _, *head = q.shape
    by_block = q.reshape(experts, batch, *asked.places.shape[2:], *head)
    given = asked.columns, asked.counts, asked.q_counts
    return ops.memory_attention(by_block, kv, scores, null_kv, *given, dropout, True)[0].flatten(2, 3)


def attend_gathered(
    q: Float[Tensor, "E B Q H d"],
    kv: Float[Tensor, "E B S 2 H d"],
    scores: Float[Tensor, "B E S"] | Float[Tensor, "B E J K"],
    asked: Asked,
    null_kv: Float[Tensor, "2 E H 1 d"],
    dropout: float,
    plan: Plan,
) -> Float[Tensor, "E B Q H d"]:
    """By a library, of rows that are gathered block by block: a block is a row of its own to it."""
    columns, counts = asked.columns, asked.counts
    assert columns is not None
    experts, batch, _, _, heads, dim = kv.shape
    blocks, slots = columns.shape[2:]
    odd = odd_rows(kv.detach()).any(3)  # (E, B, S, H)
    safe = kv.masked_fill(odd[:, :, :, None, :, None], 0)
    rows = ops.gathered(safe.flatten(3), columns, counts).unflatten(-1, (2, heads, dim))  # (E, B, J, K, 2, H, d)
    by_slot = columns.transpose(0, 1).flatten(2).long()
    odd = odd.gather(2, by_slot[..., None].expand(-1, -1, -1, heads)).view(experts, batch, blocks, slots, heads)
    if scores.ndim == 3:
        scores = ops.gathered(scores.transpose(0, 1)[..., None], columns, counts)[..., 0]
    else:
        scores = scores.transpose(0, 1)
    by_block = q.reshape(experts, batch, blocks, asked.places.shape[3], heads, dim)
    held = Held(rows, scores, odd, counts.transpose(0, 1))
    return attend_rows(by_block, held, null_kv, dropout, plan).flatten(2, 3)


def _attend_stored(
    q: Float[Tensor, "E B 1 H d"],
    old: Float[Tensor, "E B K 2 H d"],
    scores: Float[Tensor, "B E K"],
    asked: Asked,
    null_kv: Float[Tensor, "2 E H 1 d"],
    dropout: float,
    plan: Plan,
) -> Float[Tensor, "E B 1 H d"]:
    """One query over all that is stored."""
    if by_index(plan):
        every = torch.arange(old.shape[2], dtype=torch.int32, device=q.device).expand(*asked.counts.shape, -1)
        return attend_by_index(q, old, scores, asked._replace(columns=every), null_kv, dropout)
    odd = odd_rows(old).any(3)
    rows = old.masked_fill(odd[:, :, :, None, :, None], 0)
    held = Held(rows[:, :, None], scores.transpose(0, 1)[:, :, None], odd[:, :, None], asked.counts.transpose(0, 1))
    return attend_rows(q[:, :, None], held, null_kv, dropout, plan)[:, :, 0]


class Held(NamedTuple):
    """What the queries of each block see."""

    rows: Float[Tensor, "E B J K 2 H d"]  # keys and values, 0 where odd
    scores: Float[Tensor, "E B J K"]
    odd: Bool[Tensor, "E B J K H"]  # which were not finite
    counts: Int[Tensor, "E B J"]  # filled slots, the first ones


def attend_rows(
    q: Float[Tensor, "E B J C H d"], held: Held, null_kv: Float[Tensor, "2 E H 1 d"], dropout: float, plan: Plan
) -> Float[Tensor, "E B J C H d"]:
    """Attention of a block as a row of its own.

    A query that is not finite, or sees what is not, gets NaN, others nothing of it (`ops.finite`). The null slot is
    merged by PyTorch: beside that a backward leaves out the queries that nobody asked.
    """
    k, v = held.rows.flatten(0, 2).unbind(2)
    odd_scores = held.scores.isnan()
    shown = torch.arange(k.shape[1], device=q.device) < held.counts[..., None]
    odd = ((held.odd | odd_scores[..., None]) & shown[..., None]).any(3)[:, :, :, None] | odd_rows(q.detach())
    v = (v * held.scores.masked_fill(odd_scores, 0).flatten(0, 2)[..., None, None]).to(v.dtype)
    null_k, null_v = null_kv.squeeze(3).unbind(0)
    out = ops.attention(
        q.masked_fill(odd[..., None], 0).flatten(0, 2), k, v, null_k, null_v, held.counts.flatten().int(), None,
        dropout, -1, False, plan.routed_attention, False,
    )[0]  # fmt: skip
    return out.view(q.shape).masked_fill(odd[..., None], torch.nan)


CLASSES: contract.Classes = {**ROUTED, MemoryAttention: ()}
