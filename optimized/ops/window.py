"""Attention in a sliding window, with rotary positions: alone, and with its projections as one operator.

By a library that has windows, or in banded blocks by one that takes a mask (`attention.banded`). How N compares with the
window and with a block matters inside the operators only. What stays alive until the backward: the input, rotated q and
k with v, out, log-sum-exp.
Letters: B batch, N tokens, D model dimension, H heads, d head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optimized.attention import Setting, Visible, adapter, banded, calls
from optimized.ops.attention import pairs_in_window, products
from optimized.ops.operator import operator
from optimized.ops.rotary import Angles, rotary_tables, rotate_into


@operator(
    "(Tensor qkv, Tensor? mask, SymInt window, bool causal, str backend, bool triton)"
    " -> (Tensor out, Tensor turned, Tensor lse)",
    wrt="qkv",
    gradients_of="out",
    saves="qkv mask turned out lse",
)
class window:
    """softmax(q k^T / sqrt(d)) v of rotated q and k: token i sees |i - j| <= window, or 0 <= i - j <= window if causal.

    Args:
        qkv: (B, N, 3, H, d). mask: (B, N) bool, False for tokens that see themselves alone and are seen by no other;
            for banded backends.
        backend: of the stage local_attention. triton: rotate, at theta = 10000, by a Triton kernel.
    Returns out (B, N, H, d), rotated q and k with v (B, N, 3, H, d), and the log-sum-exp (B, H, N).
    """

    def forward(a: Any) -> Any:
        turned = a.qkv.clone(memory_format=torch.contiguous_format)
        return _attend(a, turned)

    def fake(a: Any) -> Any:
        batch, n, _, heads, dim = a.qkv.shape
        lse = a.qkv.new_empty(batch, heads, n, dtype=torch.promote_types(a.qkv.dtype, torch.float32))
        return a.qkv.new_empty(batch, n, heads, dim), a.qkv.new_empty(a.qkv.shape), lse

    def backward(a: Any, g: Any, needs: Any) -> Any:
        return {"qkv": _attend_backward(a, g.out, a.turned)}

    def flops(a: Any, out: Any) -> int:
        return _products(a, *a.qkv.shape)

    def backward_flops(a: Any, g: Any, needs: Any) -> int:
        return _products(a, *a.qkv.shape) * 5 // 2


@operator(
    "(Tensor x, Tensor w_qkv, Tensor w_out, Tensor? mask, int heads, SymInt window, bool causal, str backend, bool triton)"
    " -> (Tensor y, Tensor turned, Tensor out, Tensor lse)",
    wrt="x w_qkv w_out",
    gradients_of="y",
    saves="x w_qkv w_out mask turned out lse",
)
class window_attention:
    """`window` between its projections.

    Args: x (B, N, D); w_qkv (3 H d, D), rows (q, k, v; head, channel); w_out (D, H d).
    Returns y (B, N, D), and what `window` returns: rotated q and k with v, out, and the log-sum-exp.
    """

    def forward(a: Any) -> Any:
        batch, n, _ = a.x.shape
        qkv = F.linear(a.x, a.w_qkv).view(batch, n, 3, a.heads, a.w_out.shape[1] // a.heads)
        out, turned, lse = _attend(a, qkv)
        return F.linear(out.flatten(2), a.w_out), turned, out, lse

    def fake(a: Any) -> Any:
        batch, n, _ = a.x.shape
        dim = a.w_out.shape[1] // a.heads
        y, turned = a.x.new_empty(batch, n, a.w_out.shape[0]), a.x.new_empty(batch, n, 3, a.heads, dim)
        lse = a.x.new_empty(batch, a.heads, n, dtype=torch.promote_types(a.x.dtype, torch.float32))
        return y, turned, a.x.new_empty(batch, n, a.heads, dim), lse

    def backward(a: Any, g: Any, needs: Any) -> Any:
        found = {}
        dy = g.y.contiguous()
        if needs.w_out:
            found["w_out"] = dy.flatten(0, 1).mT @ a.out.flatten(2).flatten(0, 1)
        if needs.x or needs.w_qkv:
            dqkv = _attend_backward(a, (dy @ a.w_out).view(a.out.shape), a.turned).flatten(2)
            if needs.x:
                found["x"] = dqkv @ a.w_qkv
            if needs.w_qkv:
                found["w_qkv"] = dqkv.flatten(0, 1).mT @ a.x.flatten(0, 1)
        return found

    def flops(a: Any, out: Any) -> int:
        return _products(a, *a.turned_shape) if False else _projections(a, 1, 1) + _attention(a)

    def backward_flops(a: Any, g: Any, needs: Any) -> int:
        return 0


def _attend(a: Any, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out, qkv rotated in place, and lse."""
    batch, n, _, heads, dim = qkv.shape
    turned = qkv[:, :, :2].reshape(batch, n, 2 * heads, dim) if False else qkv[:, :, :2].flatten(2, 3)
    rotate_into(turned, turned, _angles(qkv, a.triton), False, a.triton)
    return None
