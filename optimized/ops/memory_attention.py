"""Attention of each block's queries over the memory of the block and a null key, by index: keys are projected once.

Derived in `kernels.memory_attention`. By PyTorch, some blocks at a time, so that few rows of keys exist at once.
Letters: E experts, B batch, J blocks, C slots for queries of a block, K for its memory, L columns, H heads, d head
dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optimized.ops.attention import products
from optimized.ops.operator import operator

NUMBERS = 2**25  # of gathered keys and values, or of logits, at a time


@operator(
    "(Tensor q, Tensor kv, Tensor scores, Tensor null_kv, Tensor indices, Tensor counts, Tensor q_counts,"
    " float dropout, bool triton) -> (Tensor out, Tensor lse, Tensor seed)",
    wrt="q kv scores null_kv",
    gradients_of="out",
    saves="q kv scores null_kv indices counts q_counts out lse seed",
    draws="dropout",
)
class memory_attention:
    """softmax(q k^T / sqrt(d)) (score v) over the memory of each block and the null key, which every query sees.

    A query that is not finite, or sees a key, value, score or logit that is not, gets NaN in that head, and passes no
    gradient on; others get nothing of it.

    Args:
        q: (E, B, J, C, H, d). kv: keys and values (E, B, L, 2, H, d). scores: (B, E, L), float32 or float64, times the
            values. null_kv: (2, E, H, 1, d).
        indices, counts: of `memory` over L columns, (B, E, J, K) and (B, E, J) int32.
        q_counts: (B, E, J) int32, how many slots of a block hold a query, the first ones, at most C.
        dropout: probability of dropping a weight, the null key's too.
    Returns out (E, B, J, C, H, d), 0 in empty slots; the log-sum-exp (E, B, J, H, C), +inf in empty slots and where out
    is NaN; and the seed of the draws, (1) int64 (empty without dropout), of which both forms make the same.
    """

    def forward(a: Any) -> Any:
        seed = a.q.new_empty(0, dtype=torch.int64)
        if a.dropout:
            seed = torch.randint(2**62, (1,), device=a.q.device)
        a.seed = seed
        if a.triton:
            from optimized.kernels import memory_attention as kernel

            return *kernel.memory_attention(memories(a)), seed
        experts, batch, _, slots, heads, _ = a.q.shape
        outs = [a.q.new_empty(experts, batch, 0, slots, heads, a.q.shape[-1])]
        sums = [_wide(a.q.new_empty(experts, batch, 0, heads, slots))]
        for where in _parts(a):
            v = _View.of(a, where)
            out = (v.p * v.kept).to(v.values.dtype) @ v.weighted
            out = torch.where(v.filled, torch.where(v.odd, torch.nan, out), 0)
            outs.append(out.transpose(3, 4))
            sums.append(v.lse[..., 0])
        return torch.cat(outs, 2), torch.cat(sums, 2), seed

    def fake(a: Any) -> Any:
        experts, batch, blocks, slots, heads, _ = a.q.shape
        lse = a.q.new_empty(experts, batch, blocks, heads, slots, dtype=torch.promote_types(a.q.dtype, torch.float32))
        seed = a.q.new_empty(1 if a.dropout else 0, dtype=torch.int64)
        return a.q.new_empty(a.q.shape), lse, seed

    def backward(a: Any, g: Any, needs: Any) -> Any:
        if a.triton:
            from optimized.kernels import memory_attention as kernel

            found = kernel.memory_attention_backward(g.out, memories(a), a.out, a.lse, needs.kv or needs.scores)
        else:
            found = _backward(a, g.out)
        dq, dkv, dscores, dnull_kv = found
        return {"q": dq, "kv": dkv, "scores": dscores, "null_kv": dnull_kv.to(a.null_kv.dtype)}

    def flops(a: Any, out: Any) -> int:
        return _products(a)

    def backward_flops(a: Any, g: Any, needs: Any) -> int:
        return _products(a) * 5 // 2


def _products(a: Any) -> int:
    experts, batch, blocks, slots, heads, dim = a.q.shape
    return products(experts * batch * blocks, heads, slots * (a.indices.shape[-1] + 1), dim)


def memories(a: Any) -> Any:
    from optimized.kernels.memory_tiles import Memories

    null_kv = a.null_kv.to(a.q.dtype)
    return Memories(a.q, a.kv, a.scores, null_kv, a.indices, a.counts, a.q_counts, a.seed, a.dropout)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _parts(a: Any) -> Iterator[slice]:
    """Of the blocks."""
    experts, batch, blocks, slots, heads, dim = a.q.shape
    each = experts * batch * heads * (a.indices.shape[-1] + 1) * max(2 * dim, slots)
    step = max(NUMBERS // max(each, 1), 1)
    return (slice(start, min(start + step, blocks)) for start in range(0, blocks, step))


class _View(SimpleNamespace):
    """Of some blocks: queries (E, B, J, H, C, d); keys, values and these times their scores (E, B, J, H, 1 + K, d), the
    null ones first; probabilities (E, B, J, H, C, 1 + K). Without what is not finite, and what takes no part.
    """

    @classmethod
    def of(cls, a: Any, where: slice) -> _View:
        _, batch, _, slots, _, dim = a.q.shape
        e, b, columns = _columns(a, where)
        blocks, k = columns.shape[2:]
        there = torch.arange(k, device=columns.device) < a.counts[:, :, where, None].transpose(0, 1)
        shown = F.pad(there, (1, 0), value=True)[..., None, None, :]  # (E, B, J, 1, 1, 1 + K)
        rows = a.kv[e, b, columns].movedim(3, 5)  # (E, B, J, 2, H, K, d)
        null = a.null_kv.to(rows.dtype).transpose(0, 1)[:, None, None].expand(-1, batch, blocks, -1, -1, -1, -1)
        keys, values = torch.cat((null, rows), -2).unbind(3)
        scores = F.pad(a.scores.transpose(0, 1)[e, b, columns], (1, 0), value=1.0)[..., None, :, None]
        weighted = values * scores.to(values.dtype)
        odd_kv = ~(keys.isfinite() & weighted.isfinite()).all(-1, keepdim=True)
        hidden = odd_kv | ~shown.mT
        keys, values, weighted = (torch.where(hidden, 0, t) for t in (keys, values, weighted))
        scores = torch.where(hidden, 0, scores)
        q = a.q[:, :, where].transpose(3, 4)
        odd_q = ~q.isfinite().all(-1, keepdim=True)
        q = torch.where(odd_q, 0, q)
        logits = _wide(q @ keys.mT) * dim**-0.5
        odd = odd_q | (shown & (odd_kv.mT | ~logits.isfinite())).any(-1, keepdim=True)
        full = torch.arange(slots, device=q.device) < a.q_counts[:, :, where, None].transpose(0, 1)
        filled = full[..., None, :, None]
        live = filled & ~odd
        logits = torch.where(shown, torch.where(live, logits, 0), -torch.inf)
        lse = logits.logsumexp(-1, keepdim=True)
        p = torch.where(live, (logits - lse).exp(), 0)
        lse = torch.where(live, lse, torch.inf)
        kept: Any = 1.0
        if a.dropout:
            kept = _kept(a, where, columns).to(p.dtype) / (1 - a.dropout)
        return cls(
            q=q, keys=keys, values=values, weighted=weighted, scores=scores, p=p, lse=lse, kept=kept, odd=odd,
            live=live, filled=filled, there=there,
        )  # fmt: skip


def _columns(a: Any, where: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (E, B, J, K) of experts, items and columns, which together read (E, B, L, ...)."""
    experts, batch = a.q.shape[:2]
    e = torch.arange(experts, device=a.q.device)[:, None, None, None]
    b = torch.arange(batch, device=a.q.device)[:, None, None]
    return e, b, a.indices[:, :, where].transpose(0, 1).long()


def _kept(a: Any, where: slice, columns: Tensor) -> Tensor:
    """Whether dropout keeps a pair of a query and a key: 24 bits of a hash (splitmix64) of seed, query and column."""
    experts, batch, blocks, slots, heads, _ = a.q.shape
    shape = (experts, batch, heads, blocks, slots)
    queries = torch.arange(experts * batch * heads * blocks * slots, device=columns.device).view(shape)
    queries = queries[:, :, :, where].transpose(2, 3)[..., None]
    z = F.pad(columns + 1, (1, 0))[..., None, None, :]
    z = a.seed + (queries * (a.kv.shape[2] + 1) + z) * -7046029254386353131
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    return ((z >> 40) & 0xFFFFFF) >= round(a.dropout * 2**24)


def _backward(a: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts, batch, _, slots, heads, dim = a.q.shape
    n, dtype = a.kv.shape[2], torch.promote_types(a.q.dtype, torch.float32)
    dqs = [a.q.new_empty(experts, batch, 0, slots, heads, dim)]
    # Places without a column go to one past the end.
    dkv = a.kv.new_zeros(experts, batch, n + 1, 2, heads, dim, dtype=dtype)
    dscores = a.scores.new_zeros(experts, batch, n + 1)
    dnull = a.kv.new_zeros(experts, 2, heads, dim, dtype=dtype)
    for where in _parts(a):
        v = _View.of(a, where)
        g, out = (torch.where(v.live, t[:, :, where].transpose(3, 4), 0) for t in (dout, a.out))
        delta = (_wide(g) * _wide(out)).sum(-1, keepdim=True)
        dp = _wide(g @ v.weighted.mT) * v.kept
        ds = (torch.where(v.live, v.p * (dp - delta), 0) * dim**-0.5).to(v.keys.dtype)
        dqs.append((ds @ v.keys).transpose(3, 4))
        dk, u = _wide(ds.mT @ v.q), _wide((v.p * v.kept).to(g.dtype).mT @ g)
        both = torch.stack((dk, u * v.scores.to(u.dtype)), 3)  # (E, B, J, 2, H, 1 + K, d)
        dnull += both[..., 0, :].sum((1, 2))
        share = (u * _wide(v.values)).sum((3, -1))[..., 1:].to(dscores.dtype)
        e, b, columns = _columns(a, where)
        columns = torch.where(v.there, columns, n)
        for j in range(columns.shape[2]):  # in this order: columns are distinct within a block alone
            at = e[..., 0], b[..., 0], columns[:, :, j]
            dkv[at] += both[:, :, j, ..., 1:, :].movedim(-2, 2)
            dscores[at] += share[:, :, j]
    dq, dkv = torch.cat(dqs, 2), dkv[:, :, :n].to(a.kv.dtype).contiguous()
    return dq, dkv, dscores[..., :n].transpose(0, 1).contiguous(), dnull.transpose(0, 1).unsqueeze(3).contiguous()
