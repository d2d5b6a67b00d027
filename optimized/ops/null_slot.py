"""The null key and value of an expert, merged into any attention's result: by a Triton kernel, or by PyTorch.

Derived in `kernels.null_slot`. null key and value (G, H, d), each for R / G rows; q, out (R, L, H, d); lse, keep
(R, H, L).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge(
    q: Tensor,
    null: tuple[Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    keep: Tensor | None,
    lengths: Tensor | None,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """out and lse over one key more, contiguous. keep: the null slot's draws; lengths (R): 0 where a row has no key."""
    if triton:
        from optimized.kernels import null_slot

        return null_slot.merge(q, *null, out, lse, keep, lengths)
    null_k, null_v = null
    if lengths is not None:
        lse = torch.where(lengths[:, None, None] > 0, lse, -math.inf)
    out = torch.where((lse > -math.inf).transpose(1, 2)[..., None], out, 0).to(lse.dtype)
    null_logits = _logits(q, null_k)
    merged_lse = torch.logaddexp(lse, null_logits)
    # Not exp(lse - merged_lse): the two must sum to 1 far better than |lse| eps.
    p0 = (null_logits - lse).sigmoid()
    rest = (lse - null_logits).sigmoid().transpose(1, 2)[..., None]
    p0 = p0 if keep is None else p0 * keep
    null_v = _per_row(null_v, q)[:, None].to(lse.dtype)
    merged = rest * out + p0.transpose(1, 2)[..., None] * null_v
    return merged.to(q.dtype).contiguous(), merged_lse.contiguous()


def merge_backward(
    q: Tensor,
    null: tuple[Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    keep: Tensor | None,
    dout: Tensor,
    dq: Tensor,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """dq with the null slot's part, and the gradients of its key and value, (2, G, H, d)."""
    if triton:
        from optimized.kernels import null_slot

        return dq, null_slot.merge_backward(q, *null, out, lse, keep, dout, dq)
    null_k, null_v = null
    wide = lse.dtype
    p0 = (_logits(q, null_k) - lse).exp().transpose(1, 2)
    kept = p0 if keep is None else p0 * keep.transpose(1, 2)
    dout = dout.to(wide)
    k0, v0 = (_per_row(t, q)[:, None].to(wide) for t in (null_k, null_v))
    ds = (kept * (dout * v0).sum(-1) - p0 * (dout * out.to(wide)).sum(-1)) * q.shape[-1] ** -0.5
    dq = (dq.to(wide) + ds[..., None] * k0).to(dq.dtype).contiguous()
    groups = null_k.shape[0]
    shape = (groups, q.shape[0] // groups * q.shape[1], *q.shape[2:])
    dnull_k = (ds[..., None] * q.to(wide)).reshape(shape).sum(1)  # of any strides, as q is
    dnull_v = (kept[..., None] * dout).reshape(shape).sum(1)
    return dq, torch.stack((dnull_k, dnull_v)).to(null_k.dtype)


def _per_row(null: Tensor, q: Tensor) -> Tensor:
    """(R, H, d) of (G, H, d)."""
    return null.repeat_interleave(q.shape[0] // null.shape[0], 0)


def _logits(q: Tensor, null_k: Tensor) -> Tensor:
    """(R, H, L)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    products = q.to(wide) * _per_row(null_k, q)[:, None].to(wide)
    return (products.sum(-1) * q.shape[-1] ** -0.5).transpose(1, 2)
