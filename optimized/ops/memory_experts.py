"""Experts of the causal layer as one operator: their queries gathered and projected, keys and values of all columns
that a memory ever lists, attention over the memory, and their outputs.

Keys and values of other columns nobody sees: of N columns about K (1 + ln(N / K)) are ever listed if logits come in
random order. The scale of the norm goes into the weights of keys and values.
Letters: B batch, N tokens, D dimension, E experts, J blocks, W length of a block, C slots for queries in a block, K for
its memory, H heads, d head dimension, F = 2 H d.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optimized.ops.finite import finite_part
from optimized.ops.gather_norm import Taken, gamma_gradient, gather, input_gradient, token_norms
from optimized.ops.memory_attention import memory_attention
from optimized.ops.operator import Arguments, operator

_attention: Any = memory_attention  # an Operator


@operator(
    "(Tensor x, Tensor? q_gamma, Tensor? kv_gamma, Tensor w_q, Tensor w_kv, Tensor w_out, Tensor null_kv,"
    " Tensor scores, Tensor places, Tensor slots, Tensor inverse, Tensor indices, Tensor counts, Tensor q_counts,"
    " SymInt block, SymInt prior, float dropout, bool triton)"
    " -> (Tensor y, Tensor norms, Tensor rows, Tensor q, Tensor kv, Tensor out, Tensor lse, Tensor seed)",
    wrt="x q_gamma kv_gamma w_q w_kv w_out null_kv scores",
    gradients_of="y",
    saves="x q_gamma kv_gamma w_q w_kv w_out null_kv scores places slots inverse indices counts q_counts norms rows q"
    " kv out lse seed",
    draws="dropout",
)
class memory_experts:
    """Outputs of the experts' queries, (E, B, J C, D), not yet times their scores.

    Args:
        x: (B, N, D). q_gamma, kv_gamma: (E, D, 1), both or neither, for no norm. In one dtype: x, null_kv
            (2, E, H, 1, d), and matrices w_q (E H d, D, 1), w_kv (E F, D, 1), w_out (E D, H d, 1) as of
            `expert_attention`.
        scores, indices, counts, q_counts, dropout: as of `memory_attention`, of the N columns.
        places (B, E, J, C), slots, inverse (B, E, N): the rows of x that are queries, as of `gather_norm`.
        block, prior: W and P; list j holds columns below P + j W, and no column returns that a list has left out.
    Then for the backward: norms (B, N), empty without gamma, rows (E, B, J C, D) of queries, q (E, B, J, C, H, d), keys
    and values (E, B, N, 2, H, d), 0 of columns that are never listed (by `first`, where nobody sees them, anything),
    and the results of `memory_attention`.
    """

    def forward(a: Any) -> Any:
        return _forward(a, True)

    def unseen(a: Any) -> Any:
        return _forward(a, False)  # the backward reads the rows that are listed alone

    def infer(a: Any) -> Tensor:
        return _output(a, _attended(a, *_queries(a), False)[2])

    def fake(a: Any) -> Any:
        batch, n, dim = a.x.shape
        _, experts, heads, _, head = a.null_kv.shape
        _, _, blocks, slots = a.places.shape
        wide = torch.promote_types(a.x.dtype, torch.float32)
        rows = a.x.new_empty(experts, batch, blocks * slots, dim)
        norms = a.x.new_empty(0 if a.q_gamma is None else (batch, n), dtype=wide)
        q = a.x.new_empty(experts, batch, blocks, slots, heads, head)
        kv = a.x.new_empty(experts, batch, n, 2, heads, head)
        return torch.empty_like(rows), norms, rows, q, kv, *_attention.body.fake(_asked(a, q, kv))

    def backward(a: Any, g: Any, needs: Any) -> Any:
        found, dy = {}, g.y.flatten(1, 2)
        if needs.w_out:
            found["w_out"] = torch.bmm(dy.mT, a.out.flatten(4).flatten(1, 3)).view(a.w_out.shape)
        keys = needs.x or needs.kv_gamma or needs.w_kv
        if not (keys or needs.q_gamma or needs.w_q or needs.null_kv or needs.scores):
            return found
        dout = torch.bmm(dy, _per_expert(a.w_out, a)).view(a.out.shape)
        dq, dkv, found["scores"], dnull_kv = _attention_gradients(a, dout, keys or needs.scores)
        found["null_kv"] = dnull_kv.to(a.null_kv.dtype)
        dq = dq.flatten(4).flatten(1, 3)
        # What has been read is let go: rows of all columns come next, the largest of all.
        del dout, a.q, a.out, a.lse
        if needs.w_q:
            found["w_q"] = torch.bmm(dq.mT, a.rows.flatten(1, 2)).view(a.w_q.shape)
        rows = a.rows.shape
        del a.rows
        weight = needs.w_kv or needs.kv_gamma
        if not (needs.x or needs.q_gamma or weight):
            return found
        drows = None
        if needs.x or needs.q_gamma:
            drows = torch.bmm(dq, _per_expert(a.w_q, a)).view(rows)
        del dq
        gradients = _gradients_by_triton if a.triton else _gradients
        return found | gradients(a, drows, dkv, needs.x, weight)

    def flops(a: Any, out: Any) -> int:
        q, kv, y = _products(a)
        return q + kv + y + _attention.body.flops(Arguments(q=out[3], indices=a.indices), None)

    def backward_flops(a: Any, g: Any, needs: Any) -> int:
        q, kv, y = _products(a)
        count = needs.w_out * y + (needs.x or needs.q_gamma) * q + needs.w_q * q
        keys = needs.x + (needs.kv_gamma or needs.w_kv)
        if not (keys or needs.q_gamma or needs.w_q or needs.null_kv or needs.scores):
            return count
        return count + y + keys * kv + _attention.body.backward_flops(a, g, needs)


def _forward(a: Any, whole: bool) -> tuple[Tensor, ...]:
    norms, rows = _queries(a)
    made = _attended(a, norms, rows, whole)
    return _output(a, made[2]), norms, rows, *made


def _queries(a: Any) -> tuple[Tensor, Tensor]:
    """Norms of all tokens, and rows of queries."""
    if (a.q_gamma is None) != (a.kv_gamma is None):
        raise ValueError("kv_gamma: expected a scale exactly when q_gamma is one")
    norms = a.x.new_empty(0, dtype=torch.promote_types(a.x.dtype, torch.float32))
    if a.q_gamma is not None:
        norms = token_norms(a.x, a.triton)
    return norms, gather(a.x, norms, (_taken(a),), a.triton)[0]


def _attended(a: Any, norms: Tensor, rows: Tensor, whole: bool) -> tuple[Tensor, ...]:
    """q, kv, and what became of them. whole: kv are 0 where nothing is listed, else anything."""
    _, experts, heads, _, head = a.null_kv.shape
    _, batch, _, _ = rows.shape
    q = torch.bmm(rows.flatten(1, 2), _per_expert(a.w_q, a).mT)
    q = q.view(experts, batch, *a.places.shape[2:], heads, head)
    weight = _per_expert(a.w_kv, a)
    if a.kv_gamma is not None:
        weight = (weight * a.kv_gamma.mT).to(weight.dtype)
    n = a.x.shape[1]
    shape = experts, batch, n, 2 * heads * head
    if a.triton:
        from optimized.kernels import admitted_rows as kernel
        from optimized.kernels.admitted import admitted

        kv = (torch.zeros if whole else torch.empty)(shape, dtype=a.x.dtype, device=a.x.device)
        kernel.project(a.x, weight, _or_none(norms), admitted(a.indices, a.counts, n, a.block, a.prior), kv)
    else:
        x = a.x if a.kv_gamma is None else _unit(a.x, norms)
        kv = F.linear(x, weight.flatten(0, 1)).unflatten(2, (experts, shape[3])).permute(2, 0, 1, 3)
        kv = kv.masked_fill(~_listed(a, n).transpose(0, 1)[..., None], 0).contiguous()
    kv = kv.view(experts, batch, n, 2, heads, head)
    return q, kv, *_attention.body.forward(_asked(a, q, kv))


def _output(a: Any, out: Tensor) -> Tensor:
    experts, batch, blocks, slots = out.shape[:4]
    y = torch.bmm(out.flatten(4).flatten(1, 3), _per_expert(a.w_out, a).mT)
    return y.view(experts, batch, blocks * slots, y.shape[-1])


def _asked(a: Any, q: Tensor, kv: Tensor) -> Arguments:
    """Arguments of `memory_attention`."""
    return Arguments(
        q=q, kv=kv, scores=a.scores, null_kv=a.null_kv, indices=a.indices, counts=a.counts, q_counts=a.q_counts,
        dropout=a.dropout, triton=a.triton,
    )  # fmt: skip


def _attention_gradients(a: Any, dout: Tensor, keys: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of q, kv, scores and null_kv; of rows of kv that are not listed anything by Triton."""
    asked = _asked(a, a.q, a.kv)
    vars(asked).update(out=a.out, lse=a.lse, seed=a.seed)
    if a.triton:
        from optimized.kernels.memory_attention import memory_attention_backward
        from optimized.ops.memory_attention import memories

        dkv = a.kv.new_empty(a.kv.shape)
        return memory_attention_backward(dout, memories(asked), a.out, a.lse, keys, dkv)
    found = _attention.body.backward(asked, Arguments(out=dout), Arguments(kv=keys, scores=keys))
    return found["q"], found["kv"], found["scores"], found["null_kv"]


def _gradients_by_triton(a: Any, drows: Tensor | None, dkv: Tensor, tokens: bool, weight: bool) -> dict[str, Any]:
    """drows: of the rows of queries, where x or q_gamma asks for its gradient. tokens: x does; weight: w_kv does."""
    from optimized.kernels import admitted_rows, gather_norm, scaled_weight
    from optimized.kernels.admitted import admitted
    from optimized.kernels.token_gradient import TakenRows, token_gradient

    found: dict[str, Any] = {}
    norms, n, dkv, dots = _or_none(a.norms), a.x.shape[1], dkv.flatten(3), None
    size = dkv.shape[0] * dkv.shape[1] * n
    if drows is not None and norms is not None:
        group = gather_norm.Taken(a.places.flatten(2), a.slots.flatten(2), a.q_gamma)
        (found["q_gamma"],), dots = gather_norm.slot_gradients(a.x, norms, (group,), (drows,), size)
    if not (tokens or weight):
        return found
    listed = admitted(a.indices, a.counts, n, a.block, a.prior)
    if weight:
        parts = admitted_rows.weight_gradient(dkv, a.x, norms, listed)
        found |= zip(("w_kv", "kv_gamma"), scaled_weight.scaled_weight_gradients(parts, a.w_kv, a.kv_gamma))
    if drows is not None and tokens:
        more = None if dots is None else dots[0, dots.shape[1] - size :]
        h = admitted_rows.rows_gradient(dkv, _per_expert(a.w_kv, a), norms, listed, a.kv.flatten(3), more)
        rows = TakenRows(drows, a.inverse, a.q_gamma), TakenRows(h, listed.inverse, a.kv_gamma)
        found["x"] = token_gradient(a.x, None, a.norms, rows, dots, None)
    return found


def _of_the_weight(a: Any, dw: Tensor) -> dict[str, Tensor]:
    """dw (E, F, D): of w_kv times gamma."""
    if a.kv_gamma is None:
        return {"w_kv": dw.to(a.w_kv.dtype).view(a.w_kv.shape)}
    gamma = (dw * _per_expert(a.w_kv, a)).sum(1)
    dw = (dw * _wide(a.kv_gamma).mT).to(a.w_kv.dtype)
    return {"w_kv": dw.view(a.w_kv.shape), "kv_gamma": gamma.to(a.kv_gamma.dtype).view(a.kv_gamma.shape)}


def _gradients(a: Any, drows: Tensor | None, dkv: Tensor, tokens: bool, weight: bool) -> dict[str, Tensor]:
    """The same by PyTorch."""
    found: dict[str, Tensor] = {}
    queries, n, dkv = _taken(a), a.x.shape[1], dkv.flatten(3)
    experts, batch, *_ = dkv.shape
    if drows is not None and a.q_gamma is not None:
        found["q_gamma"] = gamma_gradient(a.x, a.norms, queries, drows)
    if weight:
        x = finite_part(a.x if a.kv_gamma is None else _unit(a.x, a.norms))
        dw = torch.bmm(dkv.flatten(1, 2).mT, x.expand(experts, *x.shape).flatten(1, 2))
        found |= _of_the_weight(a, _wide(dw))
    if drows is not None and tokens:
        h = torch.bmm(dkv.flatten(1, 2), _per_expert(a.w_kv, a)).view(experts, batch, *a.x.shape[1:])
        listed, every = _listed(a, n), torch.arange(n, device=a.x.device).expand(batch, experts, -1)
        groups = queries, Taken(every, listed, torch.where(listed, every, -1).int(), a.kv_gamma)
        found["x"] = input_gradient(a.x, a.norms, groups, (drows, h)).to(a.x.dtype).contiguous()
    return found


def _taken(a: Any) -> Taken:
    return Taken(a.places.flatten(2), a.slots.flatten(2), a.inverse, a.q_gamma)


def _listed(a: Any, n: int) -> Tensor:
    """Which columns are ever listed, (B, E, N)."""
    there = torch.arange(a.indices.shape[-1], device=a.indices.device) < a.counts[..., None]
    at = torch.where(there, a.indices.long(), n).flatten(2)
    return torch.zeros(*at.shape[:2], n + 1, dtype=torch.bool, device=at.device).scatter_(-1, at, True)[..., :n]


def _unit(x: Tensor, norms: Tensor) -> Tensor:
    """x / max(||x||, 1e-12) sqrt(D)."""
    return (_wide(x) / norms.clamp_min(1e-12)[..., None] * x.shape[-1] ** 0.5).to(x.dtype)


def _per_expert(w: Tensor, a: Any) -> Tensor:
    """(E, fan out, fan in) of a parameter (E fan out, fan in, 1)."""
    experts = a.null_kv.shape[1]
    return w.view(experts, w.shape[0] // experts, w.shape[1])


def _products(a: Any) -> tuple[int, int, int]:
    """FLOPs of the three, each; of keys and values those of all columns, since how many are listed the device knows."""
    batch, n, _ = a.x.shape
    rows = batch * a.places.shape[2] * a.places.shape[3]
    return 2 * rows * a.w_q.numel(), 2 * batch * n * a.w_kv.numel(), 2 * rows * a.w_out.numel()


def _or_none(norms: Tensor) -> Tensor | None:
    return norms if norms.ndim == 2 else None


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
