"""Attention of every expert over its own rows as one operator: projections, rotation, value scores, null slot, output.

One operator, so that keys and values, and their gradients, lie side by side as the projection wants them, and what
stays alive until the backward is known: rows, q, k and v, out, log-sum-exp.
Letters: E experts, B batch, Kq and Kkv slots, R = E B, H heads, d head dimension, D and Dc model dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from optimized.attention import adapter
from optimized.ops.attention import attend_raw, attend_raw_backward, state_of
from optimized.ops.registration import differentiable, no_setup, refuse_to
from optimized.ops.rotary import rotate_into

_INPUTS = (
    "Tensor queries, Tensor keys_values, Tensor scores, Tensor w_q, Tensor w_kv, Tensor w_out, Tensor null_kv,"
    " Tensor? lengths, Tensor? cos, Tensor? sin, Tensor? q_positions, Tensor? k_positions"
)
_OPTIONS = "float dropout, bool unit_scores, str backend, bool triton"


@custom_op(
    "moa::expert_attention",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.nondeterministic_seeded,),
)
def expert_attention(
    queries: Tensor,
    keys_values: Tensor,
    scores: Tensor,
    w_q: Tensor,
    w_kv: Tensor,
    w_out: Tensor,
    null_kv: Tensor,
    lengths: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    dropout: float,
    unit_scores: bool,
    backend: str,
    triton: bool,
) -> tuple[Tensor, ...]:
    """W_out softmax(q k^T / sqrt(d)) v of every expert, over its keys and the null slot.

    Args:
        queries: (E, B, Kq, D). keys_values: (E, B, Kkv, Dc). scores: (B, E, Kkv), times the values.
        w_q (E H d, D, 1), w_kv (E 2 H d, Dc, 1), w_out (E D, H d, 1): as of grouped convolutions; rows (expert, head,
            channel), of w_kv (expert, k then v, head, channel).
        null_kv: key and value that every query sees, (2, E, H, 1, d).
        lengths: (R) int32, how many keys of each row take part; None for all.
        cos, sin: (P, d), of the rotary angles at positions (R, Kq) and (R, Kkv); None for no rotation.
        unit_scores: promises scores of 1, or NaN, at all slots that take part.
        dropout, backend, triton: as `ops.attention`; triton for rotation and value scores too.
    Returns y (E, B, Kq, D), q (R, Kq, H, d), k and v (R, Kkv, 2, H, d), v not yet times the scores but if they are
    unit, and out, lse, keep and state of `ops.attention`.
    """
    experts, batch, k_q, _ = queries.shape
    _, _, heads, _, dim = null_kv.shape
    rows, k_kv = experts * batch, keys_values.shape[2]
    q = torch.bmm(queries.flatten(1, 2), _per_expert(w_q, experts).mT).view(rows, k_q, heads, dim)
    kv = torch.bmm(keys_values.flatten(1, 2), _per_expert(w_kv, experts).mT).view(rows, k_kv, 2, heads, dim)
    k, v = kv.unbind(2)
    if cos is not None and sin is not None:
        rotate_into(q, q, cos, sin, q_positions, False, triton)
        rotate_into(k, k, cos, sin, k_positions, False, triton)
    v = _scale(v, scores, unit_scores, triton)
    null_k, null_v = _null(null_kv)
    out, *saved = attend_raw(q, k, v, null_k, null_v, lengths, dropout, -1, False, backend, triton)
    y = torch.bmm(out.view(experts, batch * k_q, heads * dim), _per_expert(w_out, experts).mT)
    return y.view(experts, batch, k_q, y.shape[-1]), q, kv, out, *saved


@expert_attention.register_fake
def _(queries, keys_values, scores, w_q, w_kv, w_out, null_kv, lengths, cos, sin, q_positions, k_positions, *options):  # type: ignore[no-untyped-def]
    dropout, _, backend, _ = options
    experts, batch, k_q, _ = queries.shape
    _, _, heads, _, dim_head = null_kv.shape
    rows, k_kv = experts * batch, keys_values.shape[2]
    q = queries.new_empty(rows, k_q, heads, dim_head)
    kv = queries.new_empty(rows, k_kv, 2, heads, dim_head)
    lse = q.new_empty(rows, heads, k_q, dtype=torch.promote_types(q.dtype, torch.float32))
    keep = torch.empty_like(lse) if dropout else lse.new_empty(0)
    y = queries.new_empty(experts, batch, k_q, w_out.shape[0] // experts)
    return y, q, kv, torch.empty_like(q), lse, keep, state_of(adapter(backend), q, kv[:, :, 0], dropout)


@custom_op(
    "moa::expert_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_INPUTS}, Tensor q, Tensor kv, Tensor out, Tensor lse, Tensor keep, Tensor state, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def expert_attention_backward(
    dy: Tensor,
    queries: Tensor,
    keys_values: Tensor,
    scores: Tensor,
    w_q: Tensor,
    w_kv: Tensor,
    w_out: Tensor,
    null_kv: Tensor,
    lengths: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    keep: Tensor,
    state: Tensor,
    dropout: float,
    unit_scores: bool,
    backend: str,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first seven arguments."""
    experts, batch, k_q, _ = queries.shape
    dy, out_rows = dy.flatten(1, 2), out.reshape(experts, batch * k_q, out.shape[-2] * out.shape[-1])
    dout = torch.bmm(dy, _per_expert(w_out, experts)).view(out.shape)
    dw_out = torch.bmm(dy.mT, out_rows)

    kv = kv.contiguous()
    k, v = kv.unbind(2)
    dkv = torch.empty_like(kv)
    dk, dv = dkv.unbind(2)
    scaled = v if unit_scores else _scale(v, scores, False, triton)
    null_k, null_v = _null(null_kv)
    dq, dnull_kv = attend_raw_backward(
        dout, q, k, scaled, null_k, null_v, lengths, out, lse, keep, state, dropout, -1, False, backend, triton, dk, dv
    )
    assert dnull_kv is not None
    dscores = _scale_backward(dv, v, scores, triton)
    if cos is not None and sin is not None:
        rotate_into(dq, dq, cos, sin, q_positions, True, triton)
        rotate_into(dk, dk, cos, sin, k_positions, True, triton)
    dqueries, dw_q = _project_backward(dq, queries, w_q)
    dkeys_values, dw_kv = _project_backward(dkv, keys_values, w_kv)
    return dqueries, dkeys_values, dscores, dw_q, dw_kv, dw_out.view(w_out.shape), dnull_kv.view(null_kv.shape)


@expert_attention_backward.register_fake
def _(dy, *inputs):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs[:7])


def _per_expert(w: Tensor, experts: int) -> Tensor:
    """(E, fan out, fan in) of a parameter (E fan out, fan in, 1)."""
    return w.view(experts, w.shape[0] // experts, w.shape[1])


def _null(null_kv: Tensor) -> tuple[Tensor, Tensor]:
    """(E, H, d) each."""
    null_k, null_v = null_kv.squeeze(3).unbind(0)
    return null_k, null_v


def _project_backward(grad: Tensor, rows: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows (E, B, K, D) and of w, from that of their product."""
    experts, batch, k, dim = rows.shape
    per_expert = _per_expert(w, experts)
    grad = grad.view(experts, batch * k, per_expert.shape[1])
    drows = torch.bmm(grad, per_expert).view(experts, batch, k, dim)
    return drows, torch.bmm(grad.mT, rows.flatten(1, 2)).view(w.shape)


def _scale(v: Tensor, scores: Tensor, unit: bool, triton: bool) -> Tensor:
    """Values times scores; in place if these are unit, when only a NaN or a hidden slot changes anything."""
    if triton:
        from optimized.kernels import value_score as kernel

        if not unit:
            return kernel.value_score(v, scores)
        kernel.value_score_(v, scores)
        return v
    by_row = _by_row(scores)
    return v.mul_(by_row.to(v.dtype)) if unit else (v * by_row).to(v.dtype)


def _scale_backward(dv: Tensor, v: Tensor, scores: Tensor, triton: bool) -> Tensor:
    """Gradient of the scores; dv, of the scaled values, becomes that of v."""
    if triton:
        from optimized.kernels import value_score as kernel

        return kernel.value_score_backward_(dv, v, scores)
    batch, experts, k = scores.shape
    dscores = (dv.to(scores.dtype) * v.to(scores.dtype)).sum((-1, -2)).view(experts, batch, k).transpose(0, 1)
    dv.copy_(dv * _by_row(scores))
    return dscores.contiguous()


def _by_row(scores: Tensor) -> Tensor:
    """(R, K, 1, 1)."""
    return scores.transpose(0, 1).flatten(0, 1)[..., None, None]


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:12], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.options = inputs[12:]
    ctx.set_materialize_grads(False)  # zeros as large as all that is saved


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple:
    if dy is None:
        return (None,) * 16
    return *expert_gradients(dy, *ctx.saved_tensors, *ctx.options), *(None,) * 9


expert_gradients = differentiable(
    expert_attention_backward, no_setup, refuse_to("moa::expert_attention", "double backward")
)
attend_by_experts = differentiable(expert_attention, _setup, _backward)
