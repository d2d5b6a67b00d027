"""Attention with a null key and value as one operator over all backends of `optimized.attention`.

The backend sees the routed keys alone; the null slot is merged through the log-sum-exp (derived in `kernels.null_slot`)
by a Triton kernel or by the same formulas in PyTorch. Letters: R rows (expert, batch), L queries, S keys, H heads, d.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from optimized.attention import Setting, adapter, alignment
from optimized.ops.registration import differentiable, no_setup, refuse_to

MOST_ROWS = 65535  # of a call of a backend: most launch a grid that is as deep, which CUDA limits


@custom_op(
    "moa::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? null_k, Tensor? null_v, Tensor? lengths, float dropout, int window,"
    " bool causal, str backend, bool triton) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.nondeterministic_seeded,),
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null_k: Tensor | None,
    null_v: Tensor | None,
    lengths: Tensor | None,
    dropout: float,
    window: int,
    causal: bool,
    backend: str,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v over the null slot and the first keys of each row.

    The attention that `expert_attention` and `window_attention` contain, alone: what is run over every backend.

    Args:
        q: (R, L, H, d). k, v: (R, S, H, d). lengths: (R) int32, how many keys of each row take part; None for all.
        null_k, null_v: (G, H, d), each for R / G rows, seen by every query; None for no null slot.
        dropout: probability of dropping a weight, the null slot's by a draw of its own.
        window: |i - j| <= window, or 0 <= i - j <= window if causal; -1 for none.
        backend: a module of `optimized.attention`. triton: merge the null slot by a Triton kernel.
    Returns out (R, L, H, d), the log-sum-exp (R, H, L), the null slot's draws (R, H, L), 0 or 1 / (1 - dropout) (empty
    without dropout), and the backend's state of the random generator.
    """
    return attend_raw(q, k, v, null_k, null_v, lengths, dropout, window, causal, backend, triton)


def attend_raw(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null_k: Tensor | None,
    null_v: Tensor | None,
    lengths: Tensor | None,
    dropout: float,
    window: int,
    causal: bool,
    backend: str,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The body of `attention`, for operators that contain it."""
    rows, length, heads, dim = q.shape
    module = adapter(backend)
    wide = torch.promote_types(q.dtype, torch.float32)
    if q.numel() == 0 or k.shape[1] == 0:
        out, lse = torch.zeros_like(q), q.new_full((rows, heads, length), -math.inf, dtype=wide)
        state = state_of(module, q, k, dropout).zero_()
    else:
        padded = _pad((q, k, v), backend)
        out, lse, state = _forward(module, padded, Setting(dim**-0.5, lengths, dropout, window, causal))
        out, lse = out[..., :dim].contiguous(), lse.contiguous()
    keep = q.new_empty(0, dtype=wide)
    if null_k is not None and null_v is not None:
        if dropout:
            keep = (torch.rand(lse.shape, device=q.device) >= dropout).to(wide) / (1 - dropout)
        out, lse = _merge(q, null_k, null_v, out, lse, keep if dropout else None, lengths, triton)
    return out, lse, keep, state


@attention.register_fake
def _(q, k, v, null_k, null_v, lengths, dropout, window, causal, backend, triton):  # type: ignore[no-untyped-def]
    rows, length, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(rows, heads, length, dtype=wide)
    keep = torch.empty_like(lse) if dropout and null_k is not None else q.new_empty(0, dtype=wide)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, lse, keep, state_of(adapter(backend), q, k, dropout)


def state_of(module: ModuleType, q: Tensor, k: Tensor, dropout: float) -> Tensor:
    """An empty tensor as the state of a forward: one row for each `MOST_ROWS` rows where there are more."""
    state = module.state(q, k, dropout)
    if _takes(module, q.shape[0]):
        return state
    return state.new_empty(-(-q.shape[0] // MOST_ROWS), *state.shape)


def _forward(module: ModuleType, qkv: tuple[Tensor, ...], setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """The backend's forward, `MOST_ROWS` rows at a time."""
    rows = qkv[0].shape[0]
    if _takes(module, rows):
        return module.forward(*qkv, setting)
    parts = zip(*(t.split(MOST_ROWS) for t in qkv), _settings(setting, rows))
    outs, lses, states = zip(*(module.forward(*part) for part in parts))
    return torch.cat(outs), torch.cat(lses), torch.stack(states)


def _backward_of(
    module: ModuleType,
    tensors: tuple[Tensor, ...],
    lse: Tensor,
    state: Tensor,
    setting: Setting,
    buffers: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Its backward likewise: dq, dk and dv, which are the buffers where there are several parts."""
    rows = lse.shape[0]
    if _takes(module, rows):
        return module.backward(*tensors, lse, state, setting, *buffers)
    dqs = []
    parts = zip(*(t.split(MOST_ROWS) for t in (*tensors, lse, *buffers)), state, _settings(setting, rows))
    for *given, dk, dv, draw, part in parts:
        dq, *found = module.backward(*given, draw, part, dk, dv)
        dqs.append(dq)
        for buffer, made in zip((dk, dv), found):
            if made is not buffer:
                buffer.copy_(made)
    return torch.cat(dqs), *buffers


def _takes(module: ModuleType, rows: int) -> bool:
    """At once. PyTorch's plain operations take any number, and their state is as long as it."""
    return rows <= MOST_ROWS or module is adapter("math")


def _settings(setting: Setting, rows: int) -> list[Setting]:
    if setting.lengths is None:
        return [setting] * -(-rows // MOST_ROWS)
    return [replace(setting, lengths=lengths) for lengths in setting.lengths.split(MOST_ROWS)]


@custom_op(
    "moa::attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? null_k, Tensor? null_v, Tensor? lengths, Tensor out,"
    " Tensor lse, Tensor keep, Tensor state, float dropout, int window, bool causal, str backend, bool triton)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null_k: Tensor | None,
    null_v: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    keep: Tensor,
    state: Tensor,
    dropout: float,
    window: int,
    causal: bool,
    backend: str,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, null_k, null_v (the last two empty without a null slot)."""
    dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    dq, dnull = attend_raw_backward(
        grad, q, k, v, null_k, null_v, lengths, out, lse, keep, state, dropout, window, causal, backend, triton, dk, dv
    )
    if dnull is None:
        return dq, dk, dv, q.new_empty(0), q.new_empty(0)
    return dq, dk, dv, dnull[0].contiguous(), dnull[1].clone()


def attend_raw_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null_k: Tensor | None,
    null_v: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    keep: Tensor,
    state: Tensor,
    dropout: float,
    window: int,
    causal: bool,
    backend: str,
    triton: bool,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Writes dk and dv; returns dq, and the gradient (2, G, H, d) of the null key and value, None without."""
    dim = q.shape[-1]
    grad = grad.contiguous()
    if q.numel() == 0 or k.shape[1] == 0:
        dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        dk.zero_()
        dv.zero_()
    else:
        padded = _pad((grad, q, k, v, out), backend)
        setting = Setting(dim**-0.5, lengths, dropout, window, causal)
        buffers = dk, dv
        if padded[1].shape[-1] != dim:
            buffers = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in padded[2:4])
        dq, *found = _backward_of(adapter(backend), padded, lse, state, setting, buffers)
        dq = dq[..., :dim].contiguous()
        for given, made in zip((dk, dv), found):
            if made is not given:
                given.copy_(made[..., :dim])
    if null_k is None or null_v is None:
        return dq, None
    return _merge_backward(q, null_k, null_v, out, lse, keep if dropout else None, grad, dq, triton)


@attention_backward.register_fake
def _(grad, q, k, v, null_k, null_v, *rest):  # type: ignore[no-untyped-def]
    return tuple(
        q.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (q, k, v, null_k, null_v)
    )


def _pad(tensors: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
    """What the backend can address: zeros behind the head dimension, which change no product, and aligned rows."""
    surplus = -tensors[0].shape[-1] % alignment(backend)
    if surplus:
        return tuple(F.pad(t, (0, surplus)) for t in tensors)
    return tuple(t if _aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in tensors)


def _aligned(t: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes, as the flash kernels load them."""
    starts = (t.data_ptr(), *(s * t.element_size() for s in t.stride()[:-1]))
    return t.stride(-1) == 1 and all(start % 16 == 0 for start in starts)


def _merge(
    q: Tensor,
    null_k: Tensor,
    null_v: Tensor,
    out: Tensor,
    lse: Tensor,
    keep: Tensor | None,
    lengths: Tensor | None,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    if triton:
        from optimized.kernels import null_slot

        return null_slot.merge(q, null_k, null_v, out, lse, keep, lengths)
    if lengths is not None:
        lse = torch.where(lengths[:, None, None] > 0, lse, -math.inf)
    out = torch.where((lse > -math.inf).transpose(1, 2)[..., None], out, 0).to(lse.dtype)
    null_logits = _null_logits(q, null_k)
    merged_lse = torch.logaddexp(lse, null_logits)
    # Not exp(lse - merged_lse): the two must sum to 1 far better than |lse| eps.
    p0 = (null_logits - lse).sigmoid()
    rest = (lse - null_logits).sigmoid().transpose(1, 2)[..., None]
    p0 = p0 if keep is None else p0 * keep
    null_v = _per_row(null_v, q)[:, None].to(lse.dtype)
    merged = rest * out + p0.transpose(1, 2)[..., None] * null_v
    return merged.to(q.dtype).contiguous(), merged_lse.contiguous()


def _merge_backward(
    q: Tensor,
    null_k: Tensor,
    null_v: Tensor,
    out: Tensor,
    lse: Tensor,
    keep: Tensor | None,
    grad: Tensor,
    dq: Tensor,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """The null slot's part of dq added, and the gradients of its key and value, (2, G, H, d)."""
    if triton:
        from optimized.kernels import null_slot

        return dq, null_slot.merge_backward(q, null_k, null_v, out, lse, keep, grad, dq)
    wide = lse.dtype
    p0 = (_null_logits(q, null_k) - lse).exp().transpose(1, 2)
    kept = p0 if keep is None else p0 * keep.transpose(1, 2)
    grad = grad.to(wide)
    k0, v0 = (_per_row(t, q)[:, None].to(wide) for t in (null_k, null_v))
    ds = (kept * (grad * v0).sum(-1) - p0 * (grad * out.to(wide)).sum(-1)) * q.shape[-1] ** -0.5
    dq = (dq.to(wide) + ds[..., None] * k0).to(dq.dtype).contiguous()
    groups = null_k.shape[0]
    shape = (groups, q.shape[0] // groups * q.shape[1], *q.shape[2:])
    dnull_k = (ds[..., None] * q.to(wide)).view(shape).sum(1)
    dnull_v = (kept[..., None] * grad).view(shape).sum(1)
    return dq, torch.stack((dnull_k, dnull_v)).to(null_k.dtype)


def _per_row(null: Tensor, q: Tensor) -> Tensor:
    """(R, H, d) of (G, H, d)."""
    return null.repeat_interleave(q.shape[0] // null.shape[0], 0)


def _null_logits(q: Tensor, null_k: Tensor) -> Tensor:
    """(R, H, L)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    products = q.to(wide) * _per_row(null_k, q)[:, None].to(wide)
    return (products.sum(-1) * q.shape[-1] ** -0.5).transpose(1, 2)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.constants = inputs[6:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple:
    if grad is None:
        return (None,) * 11
    saved = ctx.saved_tensors
    dq, dk, dv, *dnull = attend_backward(grad, *saved, *ctx.constants)
    return dq, dk, dv, *((None, None) if saved[3] is None else dnull), *(None,) * 6


attend_backward = differentiable(attention_backward, no_setup, refuse_to("moa::attention", "double backward"))
attend = differentiable(attention, _setup, _backward)
