"""Local attention by a windowed kernel as one operator: projection, rotation, attention, output.

One operator, so that q, k and v, and their gradients, stay where the projection has them. What stays alive until the
backward: the input, rotated q, k and v, out, log-sum-exp.
Letters: B batch, N tokens, D model dimension, H heads, d head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from optimized.ops.attention import attend_raw, attend_raw_backward
from optimized.ops.registration import differentiable, no_setup, refuse_to
from optimized.ops.rotary import rotary_tables, rotate_into

_INPUTS = "Tensor x, Tensor w_qkv, Tensor w_out"
_OPTIONS = "int heads, int window, bool causal, str backend, bool triton"


@custom_op(
    "moa::window_attention", mutates_args=(), schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
def window_attention(
    x: Tensor,
    w_qkv: Tensor,
    w_out: Tensor,
    heads: int,
    window: int,
    causal: bool,
    backend: str,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of token i to tokens |i - j| <= window, or 0 <= i - j <= window if causal.

    Args: x (B, N, D); w_qkv (3 H d, D), rows (q, k, v; head, channel); w_out (D, H d); backend: a
    module of `optimized.attention` that has windows; triton: rotate, at theta = 10000, by a Triton kernel.
    Returns y (B, N, D), rotated q and k with v (B, N, 3, H, d), out (B, N, H, d), and lse (B, H, N).
    """
    batch, n, _ = x.shape
    qkv = F.linear(x, w_qkv).view(batch, n, 3, heads, w_out.shape[1] // heads)
    cos, sin = _tables(qkv, triton)
    turned = qkv[:, :, :2].view(batch, n, 2 * heads, qkv.shape[-1])  # one launch for both
    rotate_into(turned, turned, cos, sin, None, False, triton)
    out, lse, *_ = attend_raw(*qkv.unbind(2), None, None, None, 0.0, window, causal, backend, False)
    return F.linear(out.flatten(2), w_out), qkv, out, lse


@window_attention.register_fake
def _(x, w_qkv, w_out, heads, window, causal, backend, triton):  # type: ignore[no-untyped-def]
    batch, n, _ = x.shape
    dim_head = w_out.shape[1] // heads
    y, qkv = x.new_empty(batch, n, w_out.shape[0]), x.new_empty(batch, n, 3, heads, dim_head)
    lse = x.new_empty(batch, heads, n, dtype=torch.promote_types(x.dtype, torch.float32))
    return y, qkv, x.new_empty(batch, n, heads, dim_head), lse


@custom_op(
    "moa::window_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_INPUTS}, Tensor qkv, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def window_attention_backward(
    dy: Tensor,
    x: Tensor,
    w_qkv: Tensor,
    w_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    window: int,
    causal: bool,
    backend: str,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w_qkv and w_out."""
    dy, out = dy.contiguous(), out.contiguous()
    dout = (dy @ w_out).view(out.shape)
    dw_out = dy.flatten(0, 1).mT @ out.flatten(2).flatten(0, 1)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dq, dk, dv = dqkv.unbind(2)
    nothing = out.new_empty(0)
    rotated, _ = attend_raw_backward(
        dout, *qkv.unbind(2), None, None, None, out, lse.contiguous(), nothing, nothing, 0.0, window, causal, backend,
        False, dk, dv,
    )  # fmt: skip
    cos, sin = _tables(qkv, triton)
    rotate_into(dq, rotated, cos, sin, None, True, triton)
    rotate_into(dk, dk, cos, sin, None, True, triton)
    dqkv = dqkv.flatten(2)
    return dqkv @ w_qkv, dqkv.flatten(0, 1).mT @ x.flatten(0, 1), dw_out


@window_attention_backward.register_fake
def _(dy, x, w_qkv, w_out, *rest):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w_qkv, w_out))


def _tables(qkv: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
    """Made anew in the backward: cheaper than to keep."""
    _, n, _, _, dim_head = qkv.shape
    return rotary_tables(n, dim_head, qkv.device, torch.promote_types(qkv.dtype, torch.float32), triton)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.options = inputs[3:]
    ctx.set_materialize_grads(False)  # zeros as large as all that is saved


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple:
    if dy is None:
        return (None,) * 8
    return *window_gradients(dy, *ctx.saved_tensors, *ctx.options), *(None,) * 5


window_gradients = differentiable(
    window_attention_backward, no_setup, refuse_to("moa::window_attention", "double backward")
)
attend_in_window = differentiable(window_attention, _setup, _backward)
