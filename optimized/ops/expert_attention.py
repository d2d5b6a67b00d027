"""Attention of every expert over its own rows as one operator: projections, rotation, value scores, null slot, output.

One operator, so that keys and values, and their gradients, lie side by side as the projection wants them, and what
stays alive until the backward is known: rows, q, k and v, out, log-sum-exp.
Letters: E experts, B batch, Kq and Kkv slots, R = E B, H heads, d head dimension, D and Dc model dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized.attention import Setting, Visible, adapter, calls
from optimized.attention.interface import Pair
from optimized.ops.attention import Call, attend, attend_backward, products
from optimized.ops.operator import operator
from optimized.ops.rotary import rotate_into


@operator(
    "(Tensor queries, Tensor keys_values, Tensor scores, Tensor w_q, Tensor w_kv, Tensor w_out, Tensor null_kv,"
    " Tensor? lengths, Tensor? cos, Tensor? sin, Tensor? q_positions, Tensor? k_positions, float dropout,"
    " bool unit_scores, str backend, bool triton)"
    " -> (Tensor y, Tensor q, Tensor kv, Tensor out, Tensor lse, Tensor keep, Tensor state)",
    wrt="queries keys_values scores w_q w_kv w_out null_kv",
    gradients_of="y",
    saves="queries keys_values scores w_q w_kv w_out null_kv lengths cos sin q_positions k_positions q kv out lse keep"
    " state",
    draws="dropout",
)
class expert_attention:
    """W_out softmax(q k^T / sqrt(d)) v of every expert, over its keys and the null slot.

    Args:
        queries: (E, B, Kq, D). keys_values: (E, B, Kkv, Dc). scores: (B, E, Kkv), times the values.
        w_q (E H d, D, 1), w_kv (E 2 H d, Dc, 1), w_out (E D, H d, 1): as of grouped convolutions; rows (expert, head,
            channel), of w_kv (expert, k then v, head, channel).
        null_kv: key and value that every query sees, (2, E, H, 1, d).
        lengths: (R) int32, how many keys of each row take part; None for all.
        cos, sin: (P, d), of the rotary angles at positions (R, Kq) and (R, Kkv); None for no rotation.
        unit_scores: promises scores of 1, or NaN, at all slots that take part.
        dropout, backend, triton: as of `attention`; triton for rotation and value scores too.
    Returns y (E, B, Kq, D), q (R, Kq, H, d), k and v (R, Kkv, 2, H, d), v not yet times the scores but if they are
    unit, and out, lse, keep and state of `attention`.
    """

    def forward(a: Any) -> Any:
        experts, batch, k_q, _ = a.queries.shape
        _, _, heads, _, dim = a.null_kv.shape
        rows, k_kv = experts * batch, a.keys_values.shape[2]
        q = torch.bmm(a.queries.flatten(1, 2), _per_expert(a.w_q, experts).mT).view(rows, k_q, heads, dim)
        kv = torch.bmm(a.keys_values.flatten(1, 2), _per_expert(a.w_kv, experts).mT).view(rows, k_kv, 2, heads, dim)
        k, v = kv.unbind(2)
        _turn(a, q, k, False)
        v = scale(v, a.scores, a.unit_scores, a.triton)
        out, *saved = attend(_call(a, q), q, k, v, _null(a.null_kv))
        y = torch.bmm(out.view(experts, batch * k_q, heads * dim), _per_expert(a.w_out, experts).mT)
        return y.view(experts, batch, k_q, y.shape[-1]), q, kv, out, *saved

    def fake(a: Any) -> Any:
        experts, batch, k_q, _ = a.queries.shape
        _, _, heads, _, dim = a.null_kv.shape
        rows, k_kv = experts * batch, a.keys_values.shape[2]
        q = a.queries.new_empty(rows, k_q, heads, dim)
        kv = a.queries.new_empty(rows, k_kv, 2, heads, dim)
        lse = q.new_empty(rows, heads, k_q, dtype=torch.promote_types(q.dtype, torch.float32))
        keep = torch.empty_like(lse) if a.dropout else lse.new_empty(0)
        y = a.queries.new_empty(experts, batch, k_q, a.w_out.shape[0] // experts)
        state = calls.state_of(adapter(a.backend, q.device), q, kv[:, :, 0], a.dropout)
        return y, q, kv, torch.empty_like(q), lse, keep, state

    def backward(a: Any, g: Any, needs: Any) -> Any:
        experts, batch, k_q, _ = a.queries.shape
        dy, found = g.y.flatten(1, 2), {}
        if needs.w_out:
            out_rows = a.out.reshape(experts, batch * k_q, a.out.shape[-2] * a.out.shape[-1])
            found["w_out"] = torch.bmm(dy.mT, out_rows).view(a.w_out.shape)
        if not _before_output(needs):
            return found
        dout = torch.bmm(dy, _per_expert(a.w_out, experts)).view(a.out.shape)
        kv = a.kv.contiguous()
        k, v = kv.unbind(2)
        dkv = torch.empty_like(kv)
        dk, dv = dkv.unbind(2)
        scaled = v if a.unit_scores else scale(v, a.scores, False, a.triton)
        results = a.out, a.lse, a.keep, a.state
        given = dout, (a.q, k, scaled), _null(a.null_kv), results
        dq, made, dnull_kv = attend_backward(_call(a, a.q), *given, (dk, dv))
        del given, dout
        assert dnull_kv is not None
        found["null_kv"] = dnull_kv.view(a.null_kv.shape)
        if needs.scores or needs.keys_values or needs.w_kv:
            found["scores"] = _scale_backward(made, (dk, dv), v, a.scores, a.triton)
        else:
            calls.copy((dk, dv), made)
        del made
        _turn(a, dq, dk, True)
        if needs.queries:
            found["queries"] = _rows_gradient(dq, a.queries, a.w_q)
        if needs.w_q:
            found["w_q"] = _weight_gradient(dq, a.queries, a.w_q)
        if needs.keys_values:
            found["keys_values"] = _rows_gradient(dkv, a.keys_values, a.w_kv)
        if needs.w_kv:
            found["w_kv"] = _weight_gradient(dkv, a.keys_values, a.w_kv)
        return found

    def flops(a: Any, out: Any) -> int:
        q, kv, y = _projections(a)
        return q + kv + y + _attention(a)

    def backward_flops(a: Any, g: Any, needs: Any) -> int:
        q, kv, y = _projections(a)
        count = needs.w_out * y + (needs.queries + needs.w_q) * q + (needs.keys_values + needs.w_kv) * kv
        return count + (y + _attention(a) * 5 // 2 if _before_output(needs) else 0)


def _before_output(needs: Any) -> bool:
    """Whether anybody asks for a gradient of what comes before the output projection."""
    return any(wanted for name, wanted in vars(needs).items() if name != "w_out")


def _call(a: Any, q: Tensor) -> Call:
    setting = Setting(q.shape[-1] ** -0.5, a.dropout, Visible(a.lengths))
    return Call(adapter(a.backend, q.device), setting, a.triton)


def _turn(a: Any, q: Tensor, k: Tensor, transposed: bool) -> None:
    """Rotate both in place, if there are angles."""
    if a.cos is not None and a.sin is not None:
        rotate_into(q, q, (a.cos, a.sin, a.q_positions), transposed, a.triton)
        rotate_into(k, k, (a.cos, a.sin, a.k_positions), transposed, a.triton)


def _per_expert(w: Tensor, experts: int) -> Tensor:
    """(E, fan out, fan in) of a parameter (E fan out, fan in, 1)."""
    return w.view(experts, w.shape[0] // experts, w.shape[1])


def _null(null_kv: Tensor) -> tuple[Tensor, Tensor]:
    """(E, H, d) each."""
    null_k, null_v = null_kv.squeeze(3).unbind(0)
    return null_k, null_v


def _rows_gradient(grad: Tensor, rows: Tensor, w: Tensor) -> Tensor:
    """Of rows (E, B, K, D), from the gradient of their product with w."""
    experts, batch, k, _ = rows.shape
    per_expert = _per_expert(w, experts)
    return torch.bmm(grad.view(experts, batch * k, per_expert.shape[1]), per_expert).view(rows.shape)


def _weight_gradient(grad: Tensor, rows: Tensor, w: Tensor) -> Tensor:
    """Of w likewise."""
    experts, batch, k, _ = rows.shape
    return torch.bmm(grad.view(experts, batch * k, w.shape[0] // experts).mT, rows.flatten(1, 2)).view(w.shape)


def scale(v: Tensor, scores: Tensor, unit: bool, triton: bool) -> Tensor:
    """Values times scores; in place if these are unit, when only a NaN or a hidden slot changes anything."""
    if triton:
        from optimized.kernels import value_score as kernel

        if not unit:
            return kernel.value_score(v, scores)
        kernel.value_score_(v, scores)
        return v
    by_row = _by_row(scores)
    return v.mul_(by_row.to(v.dtype)) if unit else (v * by_row).to(v.dtype)


def _scale_backward(made: Pair, into: Pair, v: Tensor, scores: Tensor, triton: bool) -> Tensor:
    """Gradient of the scores. made: those of the keys and of the scaled values; into: where those of keys and values
    are to be, which may be the same tensors.
    """
    dk, dv = into
    if triton:
        from optimized.kernels import value_score as kernel

        if made[1] is dv:
            calls.copy(into, made)
            return kernel.value_score_backward_(dv, v, scores)
        return kernel.value_score_backward(*made, v, scores, dk, dv)
    calls.copy(into, made)
    batch, experts, k = scores.shape
    dscores = (dv.to(scores.dtype) * v.to(scores.dtype)).sum((-1, -2)).view(experts, batch, k).transpose(0, 1)
    dv.copy_(dv * _by_row(scores))
    return dscores.contiguous()


def _by_row(scores: Tensor) -> Tensor:
    """(R, K, 1, 1)."""
    return scores.transpose(0, 1).flatten(0, 1)[..., None, None]


def _projections(a: Any) -> tuple[int, int, int]:
    """FLOPs of the three, each."""
    batch, k_q, k_kv = a.queries.shape[1], a.queries.shape[2], a.keys_values.shape[2]
    return 2 * batch * k_q * a.w_q.numel(), 2 * batch * k_kv * a.w_kv.numel(), 2 * batch * k_q * a.w_out.numel()


def _attention(a: Any) -> int:
    experts, batch, k_q, _ = a.queries.shape
    _, _, heads, _, dim = a.null_kv.shape
    return products(experts * batch, heads, k_q * a.keys_values.shape[2], dim)
