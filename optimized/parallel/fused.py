"""Self-attention's way from tokens to routed rows on their ranks as one step of autograd.

Composed of the same collectives as `optimized.parallel.routing` and `rows`; but logits and rows of both sides are read
from x by one pass each, and the gradient of x is assembled in one pass where three would have to be added up.

Letters: B batch, N tokens of the sequence, n of this rank, L of a full shard, R ranks, E experts, S pieces and u units
as in `optimized.parallel.rows`, c rows of a side that a rank solves, K slots, P slots of a piece.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimized import ops
from optimized.ops.solver import Solver
from optimized.parallel.collectives import _gathered, _packed, _scattered, _swapped, _unpacked
from optimized.parallel.routing import Decisions, Taken, Tokens, by_rank, local_slots, masks_of, rows_of
from optimized.parallel.rows import Units
from optimized.parallel.shards import Shard


class How(NamedTuple):
    """What is no tensor."""

    shard: Shard
    ks: tuple[int, int]
    block: int | None
    scale: float | None
    solver: Solver
    units: Units
    name: str  # of the process group
    ranks: int
    rank: int
    dtype: torch.dtype  # of the rows
    triton: bool


class Routed(NamedTuple):
    """rows: of the rank's units. decided, logits: of both sides; logits of this rank."""

    q_rows: Tensor  # (u, B, P, D)
    kv_rows: Tensor  # (u, B, K, D)
    decided: tuple[Decisions, Decisions]
    taken: tuple[Taken, Taken]
    logits: tuple[Tensor, Tensor]


def routed_rows(
    side: Tokens, tokens: tuple[Tensor, Tensor], gammas: tuple[Tensor | None, Tensor | None], how: How
) -> Routed:
    """Of x, routing tokens of both sides, and scales of their norms."""
    q_rows, kv_rows, q_scores, kv_scores, logits, *made = _Rows.apply(
        side.x, *tokens, *gammas, side.mask, side.whole, how
    )
    q_all, q_mask, q_here, q_slots, q_inverse, kv_all, kv_mask, kv_here, kv_slots, kv_inverse = made
    first, second = logits.chunk(2, 1)
    return Routed(
        q_rows,
        kv_rows,
        (Decisions(q_all, q_mask, q_scores), Decisions(kv_all, kv_mask, kv_scores)),
        (Taken(q_here, q_slots, q_inverse, q_scores, q_all), Taken(kv_here, kv_slots, kv_inverse, kv_scores, kv_all)),
        (first, second),
    )


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        q_tokens: Tensor,
        kv_tokens: Tensor,
        q_gamma: Tensor | None,
        kv_gamma: Tensor | None,
        mask: Tensor | None,
        whole: Tensor | None,
        how: How,
    ) -> Any:
        batch, experts = x.shape[0], q_tokens.shape[-2]
        if q_tokens.ndim != kv_tokens.ndim:
            tokens = torch.cat([t.expand(batch, -1, -1) for t in (q_tokens, kv_tokens)], 1)
        else:
            tokens = torch.cat((q_tokens, kv_tokens), -2)
        logits, norms, factors = ops.router_logits(x, tokens, mask, how.scale, how.triton)
        count = -(-batch * experts // how.ranks)
        parts = torch.stack([by_rank(t, how.shard.each, count, how.ranks) for t in logits.chunk(2, 1)], 1)
        came = _swapped(parts, how.name, how.ranks)
        row_mask = masks_of(whole, count, (batch, experts), how.rank)
        solved = [(rows_of(came[:, i], how.shard.n), row_mask) for i in (0, 1)]
        picked = [ops.pick(*given, k, how.block, *how.solver, how.triton) for given, k in _groups(solved, how)]
        if len(picked) == 1:  # of both sides
            sides = list(zip(*(t.chunk(2) for t in (picked[0][0], picked[0][1], picked[0][3]))))
        else:
            sides = [(p[0], p[1], p[3]) for p in picked]
        signed = torch.cat([torch.where(slots, i, -1 - i).int()[:, 0] for i, slots, _ in sides], 1)
        scores = torch.cat([s[:, 0] for _, _, s in sides], 1)
        one = scores[None], signed[None]
        scores, ints = _unpacked(_gathered(_packed(*one)[0], how.name, how.ranks), *one, how.ranks)
        widths = [i.shape[-1] for i, _, _ in sides]
        outs, made = [], []
        for s, i in zip(scores.split(widths, 2), ints.split(widths, 2)):
            s, i = (t.flatten(0, 1)[: batch * experts].unflatten(0, (batch, experts)) for t in (s, i))
            everywhere = torch.where(i < 0, -1 - i, i).long()
            valid = i >= 0
            outs.append(s.contiguous())
            made.append((everywhere, valid, *local_slots(everywhere, valid, how.shard, x.shape[1])))
        (*_, q_here, q_slots, q_inverse), (*_, kv_here, kv_slots, kv_inverse) = made
        q, kv = ops.taken_rows(
            x, norms, q_gamma, kv_gamma, q_here, q_slots, q_inverse, kv_here, kv_slots, kv_inverse, how.triton
        )
        q, kv = how.units.queries_by_unit(q.to(how.dtype)), how.units.keys_by_unit(kv.to(how.dtype))
        both = [t.unflatten(0, (how.ranks, -1)) for t in (q, kv)]
        flat = _scattered(torch.cat([t.flatten(1) for t in both], 1), how.name, how.ranks)
        q_rows, kv_rows = flat.split([t[0].numel() for t in both])
        state = [t for p in picked for t in (p[2], *p[4:])]
        rows = [t for given, _ in _groups(solved, how) for t in (given[0], given[2])]
        of_sides = (q_here, q_slots, q_inverse, kv_here, kv_slots, kv_inverse)
        ctx.save_for_backward(
            x, q_tokens, kv_tokens, q_gamma, kv_gamma, mask, logits, *of_sides, norms, factors, *state, *rows
        )
        ctx.how, ctx.picked = how, len(picked)
        decided = [t for side in made for t in side]
        ctx.mark_non_differentiable(*decided)
        return q_rows.view(both[0].shape[1:]), kv_rows.view(both[1].shape[1:]), *outs, logits, *decided

    @staticmethod
    def backward(
        ctx: Any, dq: Tensor, dkv: Tensor, dq_scores: Tensor, dkv_scores: Tensor, dlogits: Tensor, *_: Any
    ) -> Any:
        how: How = ctx.how
        tensors = ctx.saved_tensors
        *saved, norms, factors = tensors[:15]
        x, q_tokens, kv_tokens, q_gamma, kv_gamma, mask, logits, *of_sides = saved
        rest = tensors[15:]
        batch, experts, k_q = of_sides[0].shape
        # Rows and scores come back as they went.
        flat = _gathered(torch.cat((dq.reshape(-1), dkv.reshape(-1))), how.name, how.ranks)
        q_part, kv_part = flat.split((dq.numel(), dkv.numel()), 1)
        dq_rows = how.units.by_expert(q_part.reshape(-1, *dq.shape[1:]), k_q).to(x.dtype).contiguous()
        dkv_rows = how.units.summed(kv_part.reshape(-1, *dkv.shape[1:])).to(x.dtype).contiguous()
        count = -(-batch * experts // how.ranks)
        scores = torch.cat((dq_scores, dkv_scores), 2).flatten(0, 1)
        more = how.ranks * count - scores.shape[0]
        dscores = _scattered(
            torch.nn.functional.pad(scores, (0, 0, 0, more)).unflatten(0, (how.ranks, count)), how.name, how.ranks
        )
        split = dscores.split((dq_scores.shape[2], dkv_scores.shape[2]), 1)
        grads = [torch.cat(split)[:, None]] if ctx.picked == 1 else [t[:, None].contiguous() for t in split]
        drows, pick_backward, rows_backward = [], ops.pick.backward, ops.routed_rows.backward
        assert pick_backward is not None
        assert rows_backward is not None
        for i, grad in enumerate(grads):
            inverse, soft, a, counts = rest[4 * i : 4 * i + 4]
            rows, rows_mask = rest[4 * ctx.picked + 2 * i :][:2]
            k = how.ks[i]
            given = (grad, rows, None, rows_mask, inverse, soft, a, counts, k, how.block, *how.solver, how.triton, 1)
            drows.append(pick_backward(*given))
        # (2 c, 1, N) to (R, 2, c, L), and back to the ranks whose tokens they are
        both = torch.cat(drows).view(2, count, how.shard.n)
        both = torch.nn.functional.pad(both, (0, how.ranks * how.shard.each - how.shard.n))
        both = both.unflatten(2, (how.ranks, -1)).permute(2, 0, 1, 3)
        came = _swapped(both, how.name, how.ranks).transpose(0, 1).flatten(1, 2)[:, : batch * experts]
        came = came.unflatten(1, (batch, experts)).transpose(0, 1).flatten(1, 2)
        came = torch.nn.functional.pad(came, (0, logits.shape[2] - came.shape[2]))[..., : logits.shape[2]]
        chooses = [how.shard.n > k for k in how.ks]
        if not all(chooses):  # logits that decide nothing pass no gradient on
            dlogits = torch.cat([part * chose for part, chose in zip(dlogits.chunk(2, 1), chooses)], 1)
        dlogits = (came + dlogits).contiguous()
        nothing = logits.new_empty(0)
        needs = sum(want << i for i, want in enumerate(ctx.needs_input_grad[:5]))
        found = rows_backward(
            dq_rows, dkv_rows, None, None, dlogits, x, q_tokens, kv_tokens, q_gamma, kv_gamma, mask, logits, *of_sides,
            norms, factors, nothing, nothing, nothing, 0, 0, None, how.scale, *how.solver, how.triton, needs,
        )  # fmt: skip
        return *(g if needs >> i & 1 else None for i, g in enumerate(found)), None, None, None


def _groups(
    solved: list[tuple[Tensor, Tensor | None]], how: How
) -> list[tuple[tuple[Tensor, None, Tensor | None], int]]:
    """Rows of both sides at once where they take as many."""
    if how.ks[0] == how.ks[1]:
        masks = [mask for _, mask in solved if mask is not None]
        return [((torch.cat([rows for rows, _ in solved]), None, torch.cat(masks) if masks else None), how.ks[0])]
    return [((rows, None, mask), k) for (rows, mask), k in zip(solved, how.ks)]
