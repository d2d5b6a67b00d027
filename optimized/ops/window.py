"""Attention in a sliding window, with rotary positions: alone, and with its projections as one operator.

By a Triton kernel, by a library that has windows, or in banded blocks by one that takes a
mask (`attention.banded`). How N compares with the window and with a block matters inside the operators only. What stays
alive until the backward: the input, rotated q and k with v, out, log-sum-exp.
Letters: B batch, N tokens, D model dimension, H heads, d head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optimized.attention import Attended, Setting, Visible, adapter, banded, calls
from optimized.ops.attention import pairs_in_window, products
from optimized.ops.operator import operator
from optimized.ops.rotary import rotary_tables, rotate_into


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
            for banded backends and Triton.
        backend: of the stage local_attention. triton: rotate, at theta = 10000, by a Triton kernel.
    Returns out (B, N, H, d), rotated q and k (B, N, 2, H, d), and the log-sum-exp (B, H, N).
    """

    def forward(a: Any) -> Any:
        turned = a.qkv[:, :, :2].clone(memory_format=torch.contiguous_format)
        turn(turned, a.triton)
        out, lse = attend(a, turned, a.qkv[:, :, 2])
        return out, turned, lse

    def fake(a: Any) -> Any:
        batch, n, _, heads, dim = a.qkv.shape
        lse = a.qkv.new_empty(batch, heads, n, dtype=torch.promote_types(a.qkv.dtype, torch.float32))
        return a.qkv.new_empty(batch, n, heads, dim), a.qkv.new_empty(batch, n, 2, heads, dim), lse

    def backward(a: Any, g: Any, needs: Any) -> Any:
        return {"qkv": attend_backward(a, g.out, a.turned, a.qkv[:, :, 2], tables(a.turned, a.triton))}

    def flops(a: Any, out: Any) -> int:
        batch, n, _, heads, dim = a.qkv.shape
        return products(batch, heads, pairs_in_window(n, a.window, a.causal), dim)

    def backward_flops(a: Any, g: Any, needs: Any) -> int:
        batch, n, _, heads, dim = a.qkv.shape
        return products(batch, heads, pairs_in_window(n, a.window, a.causal), dim) * 5 // 2


@operator(
    "(Tensor x, Tensor w_qkv, Tensor w_out, Tensor? mask, int heads, SymInt window, bool causal, str backend,"
    " bool triton) -> (Tensor y, Tensor qkv, Tensor out, Tensor lse)",
    wrt="x w_qkv w_out",
    gradients_of="y",
    saves="x w_qkv w_out mask qkv out lse",
)
class window_attention:
    """`window` between its projections.

    Args: x (B, N, D); w_qkv (3 H d, D), rows (q, k, v; head, channel); w_out (D, H d); the others as of `window`.
    Returns y (B, N, D), rotated q and k with v (B, N, 3, H, d), out (B, N, H, d), and the log-sum-exp (B, H, N).
    """

    def forward(a: Any) -> Any:
        batch, n, _ = a.x.shape
        qkv = F.linear(a.x, a.w_qkv).view(batch, n, 3, a.heads, a.w_out.shape[1] // a.heads)
        turn(qkv[:, :, :2], a.triton)
        out, lse = attend(a, qkv[:, :, :2], qkv[:, :, 2])
        return F.linear(out.flatten(2), a.w_out), qkv, out, lse

    def fake(a: Any) -> Any:
        batch, n, _ = a.x.shape
        dim = a.w_out.shape[1] // a.heads
        y, qkv = a.x.new_empty(batch, n, a.w_out.shape[0]), a.x.new_empty(batch, n, 3, a.heads, dim)
        lse = a.x.new_empty(batch, a.heads, n, dtype=torch.promote_types(a.x.dtype, torch.float32))
        return y, qkv, a.x.new_empty(batch, n, a.heads, dim), lse

    def backward(a: Any, g: Any, needs: Any) -> Any:
        dy, found = g.y.contiguous(), {}
        if needs.w_out:
            found["w_out"] = dy.flatten(0, 1).mT @ a.out.flatten(2).flatten(0, 1)
        if needs.x or needs.w_qkv:
            dout = (dy @ a.w_out).view(a.out.shape)
            qk, v = a.qkv[:, :, :2], a.qkv[:, :, 2]
            dqkv = attend_backward(a, dout, qk, v, tables(v, a.triton)).flatten(2)
            if needs.x:
                found["x"] = dqkv @ a.w_qkv
            if needs.w_qkv:
                found["w_qkv"] = dqkv.flatten(0, 1).mT @ a.x.flatten(0, 1)
        return found

    def flops(a: Any, out: Any) -> int:
        (batch, n, _), inner = a.x.shape, a.w_out.shape[1]
        pairs = pairs_in_window(n, a.window, a.causal)
        return 2 * batch * n * (a.w_qkv.numel() + a.w_out.numel()) + products(batch, 1, pairs, inner)

    def backward_flops(a: Any, g: Any, needs: Any) -> int:
        (batch, n, _), inner = a.x.shape, a.w_out.shape[1]
        before = needs.x or needs.w_qkv  # what comes before the output projection
        projections = (needs.w_out + before) * a.w_out.numel() + (needs.x + needs.w_qkv) * a.w_qkv.numel()
        attention = products(batch, 1, pairs_in_window(n, a.window, a.causal), inner) * 5 // 2
        return 2 * batch * n * projections + before * attention


def by_triton(a: Any) -> bool:
    """Compiled or interpreted."""
    return a.backend.startswith("triton")


def turn(qk: Tensor, triton: bool) -> None:
    """Queries and keys (B, N, 2, H, d) rotated in place, in one launch."""
    batch, n, _, heads, dim = qk.shape
    both = qk.as_strided((batch, n, 2 * heads, dim), (qk.stride(0), qk.stride(1), dim, 1), qk.storage_offset())
    rotate_into(both, both, (*tables(both, triton), None), False, triton)


def attend(a: Any, qk: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k = qk.unbind(2)
    if by_triton(a):
        from optimized.kernels import window as kernel

        return kernel.window_attention(q, k, _rows(v), kernel.Band.of(v.shape[1], a.window, a.causal, a.mask))
    library = adapter(a.backend, v.device)
    if a.backend.startswith(banded.PREFIX):
        return banded.forward(library, q, k, v, banded.Band(a.window, a.causal, a.mask))
    out, lse, _ = calls.forward(library, q, k, v, _setting(a, v))
    return out, lse


def attend_backward(
    a: Any, dout: Tensor, qk: Tensor, v: Tensor, angles: tuple[Tensor, Tensor], spoiled: bool = False
) -> Tensor:
    """The gradient (B, N, 3, H, d) of q and k before their rotation by the angles, and of v.

    spoiled: rows may have an lse of +inf, and no gradient (by Triton).
    """
    batch, n, heads, dim = v.shape
    q, k = qk.unbind(2)
    if by_triton(a):
        from optimized.kernels import window as kernel

        band = kernel.Band.of(n, a.window, a.causal, a.mask)
        return kernel.window_attention_backward(dout, (q, k, _rows(v)), a.out, a.lse, band, angles, spoiled)
    library, dout = adapter(a.backend, v.device), dout.contiguous()
    dqkv = v.new_empty(batch, n, 3, heads, dim)
    dq, dk, dv = dqkv.unbind(2)
    if a.backend.startswith(banded.PREFIX):
        rows = banded.Band(a.window, a.causal, a.mask)
        turned = banded.backward(library, dout, (q, k, v), (a.out, a.lse), rows, (dk, dv))
    else:
        done = Attended(q, k, v, a.out, a.lse, calls.state_of(library, q, k, 0.0))
        turned = calls.backward(library, dout, done, _setting(a, v), (dk, dv))
    turned_by = *angles, None
    rotate_into(dq, turned, turned_by, True, a.triton)
    rotate_into(dk, dk, turned_by, True, a.triton)
    return dqkv


def _rows(v: Tensor) -> Tensor:
    """Channels side by side, as the kernel reads them."""
    return v if v.stride(-1) == 1 else v.contiguous()


def tables(v: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
    """Made anew in either direction: cheaper than to keep."""
    return rotary_tables(v.shape[1], v.shape[-1], v.device, torch.promote_types(v.dtype, torch.float32), triton)


def _setting(a: Any, v: Tensor) -> Setting:
    """Of a library that has windows."""
    if a.mask is not None:
        raise ValueError(f"mask: expected None (this backend takes no mask), got shape {tuple(a.mask.shape)}")
    reach = min(a.window, max(v.shape[1] - 1, 0))  # libraries take no larger numbers
    return Setting(v.shape[-1] ** -0.5, visible=Visible(window=reach, causal=a.causal))
