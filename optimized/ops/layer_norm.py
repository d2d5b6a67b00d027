"""LayerNorm over the last dimension as one operator, which reads no masked row: by a Triton kernel, or by PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimized.ops.operator import operator

MOST_CHANNELS = 4096  # of a row that the kernel holds


@operator(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? mask, float eps, bool triton)"
    " -> (Tensor y, Tensor mean, Tensor rate)",
    wrt="x weight bias",
    gradients_of="y",
    saves="x weight bias mask mean rate",
)
class layer_norm:
    """(x - mean) rate weight + bias of rows (B, N, D), in x's dtype, computed in at least float32.

    weight, bias: (D) in any floating dtype. mask (B, N) bool: rows that count as zeros, whatever they hold, are False.
    Returns y, and mean and rate = 1 / sqrt(variance + eps) of every row, (B, N).
    """

    def forward(a: Any) -> Any:
        if a.triton:
            from optimized.kernels import layer_norm as kernel

            return kernel.layer_norm(a.x, a.weight, a.bias, a.mask, a.eps)
        x, weight, bias = _wide(a)
        y, mean, rate = torch.native_layer_norm(x, (x.shape[-1],), weight, bias, a.eps)
        return y.to(a.x.dtype).contiguous(), mean.squeeze(-1).contiguous(), rate.squeeze(-1).contiguous()

    def fake(a: Any) -> Any:
        kind = torch.promote_types(a.x.dtype, torch.float32)
        row = a.x.new_empty(a.x.shape[:-1], dtype=kind)
        return torch.empty_like(a.x, memory_format=torch.contiguous_format), row, torch.empty_like(row)

    def backward(a: Any, g: Any, needs: Any) -> Any:
        if a.triton:
            from optimized.kernels import layer_norm as kernel

            dtypes = a.weight.dtype if needs.weight else None, a.bias.dtype if needs.bias else None
            given = g.y, a.x, a.weight, a.mask, a.mean, a.rate, dtypes
            return dict(zip(("x", "weight", "bias"), kernel.layer_norm_backward(*given)))
        x, weight, bias = _wide(a)
        rows = a.mean[..., None].contiguous(), a.rate[..., None].contiguous()  # PyTorch takes no other strides
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            g.y.to(x.dtype), x, (x.shape[-1],), *rows, weight, bias, (needs.x, needs.weight, needs.bias)
        )
        if dx is not None and a.mask is not None:
            dx = dx.masked_fill(~a.mask[..., None], 0)
        found: dict[str, Any] = {}
        if needs.x:
            found["x"] = dx.to(a.x.dtype).contiguous()
        if needs.weight:
            found["weight"] = dw.to(a.weight.dtype).contiguous()
        if needs.bias:
            found["bias"] = db.to(a.bias.dtype).contiguous()
        return found


def _wide(a: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = torch.promote_types(a.x.dtype, torch.float32)
    x = a.x if a.mask is None else a.x.masked_fill(~a.mask[..., None], 0)
    return x.to(kind), a.weight.to(kind), None if a.bias is None else a.bias.to(kind)
