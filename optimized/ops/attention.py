"""Attention with a null key and value as one operator over all libraries of `optimized.attention`.

The library sees the routed keys alone; the null slot is merged through the log-sum-exp.
Letters: R rows (expert, batch), L queries, S keys, H heads, d head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimized.attention import Adapter, Attended, Setting, Visible, adapter, calls
from optimized.ops import null_slot
from optimized.ops.operator import operator


@dataclass(frozen=True)
class Call:
    """What both directions of an attention share. triton: merge the null slot by a Triton kernel."""

    library: Adapter
    setting: Setting
    triton: bool


def attend(
    call: Call, q: Tensor, k: Tensor, v: Tensor, null: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The body of `attention`, for operators that contain it."""
    setting = call.setting
    if call.library.nulls:
        return call.library.attend(q, k, v, null, setting)
    out, lse, state = calls.forward(call.library, q, k, v, setting)
    keep = lse.new_empty(0)
    if null is not None:
        if setting.dropout:
            draws = torch.rand(lse.shape, dtype=lse.dtype, device=q.device)
            keep = (draws >= setting.dropout).to(lse.dtype) / (1 - setting.dropout)
        kept = keep if setting.dropout else None
        out, lse = null_slot.merge(q, null, out, lse, kept, setting.visible.lengths, call.triton)
    return out, lse, keep, state


def attend_backward(
    call: Call,
    dout: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    null: tuple[Tensor, Tensor] | None,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    into: tuple[Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """dq, contiguous; dk and dv, in `into` where the library can write there; and the gradient (2, G, H, d) of the null
    key and value.

    results: those of `attend`.
    """
    out, lse, keep, state = results
    dout = dout.contiguous()
    if call.library.nulls:
        dq, dnull = call.library.attend_backward(dout, Attended(*qkv, out, lse, state), null, call.setting, into)
        return dq, into, dnull
    dq, dk, dv = calls.backward_apart(call.library, dout, Attended(*qkv, out, lse, state), call.setting, into)
    if null is None:
        return dq, (dk, dv), None
    kept = keep if call.setting.dropout else None
    dq, dnull = null_slot.merge_backward(qkv[0], null, out, lse, kept, dout, dq, call.triton)
    return dq, (dk, dv), dnull


@operator(
    "(Tensor q, Tensor k, Tensor v, Tensor? null_k, Tensor? null_v, Tensor? lengths, Tensor? mask, float dropout,"
    " SymInt window, bool causal, str backend, bool triton) -> (Tensor out, Tensor lse, Tensor keep, Tensor state)",
    wrt="q k v null_k null_v",
    gradients_of="out",
    saves="q k v null_k null_v lengths mask out lse keep state",
    draws="dropout",
)
class attention:
    """softmax(q k^T / sqrt(d)) v over the null slot and the visible keys of each row.

    Args:
        q: (R, L, H, d). k, v: (R, S, H, d). lengths: (R) int32, how many keys of each row take part; None for all.
        null_k, null_v: (G, H, d), each for R / G rows, seen by every query; None for no null slot.
        mask: (R, L, S) bool, for libraries that take it. dropout: probability of dropping a weight, the null slot's by
            a draw of its own.
        window: |i - j| <= window, or 0 <= i - j <= window if causal; -1 for none.
        backend: a library of `optimized.attention`. triton: merge the null slot by a Triton kernel.
    Returns out (R, L, H, d), the log-sum-exp (R, H, L), the null slot's draws (R, H, L), 0 or 1 / (1 - dropout) (empty
    without dropout), and the library's state of the random generator.
    """

    def forward(a: Any) -> Any:
        return attend(_call(a), a.q, a.k, a.v, _null(a))

    def fake(a: Any) -> Any:
        rows, length, heads, _ = a.q.shape
        out = torch.empty_like(a.q, memory_format=torch.contiguous_format)
        lse = a.q.new_empty(rows, heads, length, dtype=torch.promote_types(a.q.dtype, torch.float32))
        keep = torch.empty_like(lse) if a.dropout and a.null_k is not None else lse.new_empty(0)
        return out, lse, keep, calls.state_of(adapter(a.backend, a.q.device), a.q, a.k, a.dropout)

    def backward(a: Any, g: Any, needs: Any) -> Any:
        dk, dv = a.k.new_empty(a.k.shape), a.v.new_empty(a.v.shape)
        q, out, lse = a.q, a.out, a.lse
        if not a.triton:
            # Weights are made anew from the log-sum-exp, and of large scores they may be infinite, as may be out: times
            # the gradient of a query that nobody asked, 0, that is NaN for all keys. Such a query may as well be 0.
            idle = (g.out == 0).all(-1)
            q, out = (t.masked_fill(idle[..., None], 0) for t in (q, out))
            lse = lse.masked_fill(idle.mT, 0)
        results = out, lse, a.keep, a.state
        dq, made, dnull = attend_backward(_call(a), g.out, (q, a.k, a.v), _null(a), results, (dk, dv))
        calls.copy((dk, dv), made)
        found = {"q": dq, "k": dk, "v": dv}
        if dnull is not None:
            found |= {"null_k": dnull[0].contiguous(), "null_v": dnull[1].clone()}
        return found

    def flops(a: Any, out: Any) -> int:
        return _products(a)

    def backward_flops(a: Any, g: Any, needs: Any) -> int:
        return _products(a) * 5 // 2


def products(rows: int, heads: int, pairs: int, dim: int) -> int:
    """FLOPs of q k^T and p v for so many pairs of a query and a key in a row; a backward has 2.5 times as many."""
    return 4 * rows * heads * pairs * dim


def _products(a: Any) -> int:
    rows, length, heads, dim = a.q.shape
    pairs = length * a.k.shape[1] if a.window < 0 else pairs_in_window(length, a.window, a.causal)
    return products(rows, heads, pairs, dim)


def pairs_in_window(n: int, window: int, causal: bool) -> int:
    """Pairs of a query and a key among n tokens."""
    w = min(window, max(n - 1, 0))
    outside = w * (w + 1) // 2  # beyond either end
    return n * (w + 1) - outside if causal else n * (2 * w + 1) - 2 * outside


def _call(a: Any) -> Call:
    lengths = None if a.lengths is None else a.lengths.contiguous()  # which a library may ask for
    visible = Visible(lengths, a.window, a.causal, a.mask)
    return Call(adapter(a.backend, a.q.device), Setting(a.q.shape[-1] ** -0.5, a.dropout, visible), a.triton)


def _null(a: Any) -> tuple[Tensor, Tensor] | None:
    return None if a.null_k is None or a.null_v is None else (a.null_k, a.null_v)
