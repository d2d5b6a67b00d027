"""Causal attention in a sliding window in which what is not finite stays with those that see it, as one operator.

q, k, v of rows that are not finite are taken out before the kernel of `window` sees them, and rows that see them are
set to NaN after. In the backward such rows have no gradient, so their queries may as well be 0.
Letters: B batch, N tokens, H heads, d head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optimized.ops.attention import pairs_in_window, products
from optimized.ops.finite import largest, odd_rows
from optimized.ops.operator import Arguments, operator
from optimized.ops.window import attend, attend_backward, by_triton, tables, turn


@operator(
    "(Tensor qkv, Tensor? mask, SymInt window, bool turned, str backend, bool triton)"
    " -> (Tensor out, Tensor safe, Tensor lse, Tensor odd)",
    wrt="qkv",
    gradients_of="out",
    saves="mask out safe lse odd",
    alike={"qkv": "safe"},
)
class causal_window:
    """softmax(q k^T / sqrt(d)) v: token i sees 0 <= i - j <= window. NaN where q, or a k or v that it sees, is not
    finite (`finite.largest`); such rows pass no gradient on.

    Args:
        qkv: (B, N, 3, H, d). mask: (B, N) bool, False for tokens that are seen by no other; for backends that take one.
        turned: q and k come rotated; else they are rotated at 0 .. N-1, theta = 10000.
        backend, triton: as of `window`.
    Returns out (B, N, H, d), rotated q and k with v and without what is not finite (B, N, 3, H, d), the log-sum-exp
    (B, H, N), of Triton's kernel +inf where out is NaN, and which rows are (B, N, H).
    """

    def forward(a: Any) -> Any:
        safe, odd_q, odd_kv = _finite(a)
        out, lse = attend(_causal(a), safe[:, :, :2], safe[:, :, 2])
        of_ours = lse if by_triton(a) else None
        if a.triton:
            from optimized.kernels.finite import spoil

            return out, safe, lse, spoil(out, of_ours, odd_q, odd_kv, a.mask, a.window)
        odd = odd_q | seen_in_window(odd_kv, a.mask, a.window)
        out.masked_fill_(odd[..., None], torch.nan)
        if of_ours is not None:
            of_ours.masked_fill_(odd.mT, torch.inf)
        return out, safe, lse, odd

    def fake(a: Any) -> Any:
        batch, n, _, heads, dim = a.qkv.shape
        lse = a.qkv.new_empty(batch, heads, n, dtype=torch.promote_types(a.qkv.dtype, torch.float32))
        safe = torch.empty_like(a.qkv, memory_format=torch.contiguous_format)
        return a.qkv.new_empty(batch, n, heads, dim), safe, lse, a.qkv.new_empty(batch, n, heads, dtype=torch.bool)

    def backward(a: Any, g: Any, needs: Any) -> Any:
        causal, dout = _causal(a), g.out
        qk, v = a.safe[:, :, :2], a.safe[:, :, 2]
        if not by_triton(a):
            hidden, zero = a.odd[..., None], a.out.new_zeros(())
            dout = torch.where(hidden, zero, dout)
            # A library makes weights anew from the log-sum-exp, and of large scores they may be infinite, as may be
            # out: times the gradient of a query that nobody asked, 0, that is NaN for the keys before it. Such a query
            # may as well be 0.
            idle = (dout == 0).all(-1)
            qk = torch.stack((qk[:, :, 0].masked_fill(idle[..., None], 0), qk[:, :, 1]), 2)
            causal.lse, causal.out = a.lse.masked_fill(idle.mT, 0), torch.where(idle[..., None], zero, a.out)
        angles = tables(v, a.triton)
        if a.turned:
            angles = torch.ones_like(angles[0]), torch.zeros_like(angles[1])
        return {"qkv": attend_backward(causal, dout, qk, v, angles, True)}

    def flops(a: Any, out: Any) -> int:
        batch, n, _, heads, dim = a.qkv.shape
        return products(batch, heads, pairs_in_window(n, a.window, True), dim)

    def backward_flops(a: Any, g: Any, needs: Any) -> int:
        batch, n, _, heads, dim = a.safe.shape
        return products(batch, heads, pairs_in_window(n, a.window, True), dim) * 5 // 2


def _finite(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q and k with v, zeros for rows that are not finite; which queries are not, and which keys or values."""
    if a.triton:
        from optimized.kernels.finite import finite_heads

        angles = None if a.turned else tables(a.qkv[:, :, 0], True)
        return finite_heads(a.qkv, angles, largest(a.qkv.dtype))
    safe = a.qkv.clone(memory_format=torch.contiguous_format)
    if not a.turned:
        turn(safe[:, :, :2], False)
    odd_q, *odd_kv = odd_rows(safe).unbind(2)
    odd = odd_kv[0] | odd_kv[1]
    return safe.masked_fill_(torch.stack((odd_q, odd, odd), 2)[..., None], 0), odd_q, odd


def _causal(a: Any) -> Arguments:
    """The arguments as `window` has them."""
    return Arguments(**vars(a), causal=True)


def seen_in_window(odd: Tensor, mask: Tensor | None, window: int) -> Tensor:
    """Which tokens see an odd one, (B, N, H)."""
    if mask is not None:
        odd = odd & mask[..., None]
    # Along memory: on a GPU a sum across it goes token by token.
    count = odd.mT.contiguous().cumsum(-1, dtype=torch.int32)
    reach = min(window + 1, odd.shape[1])
    return (count > F.pad(count, (reach, 0))[..., : odd.shape[1]]).mT.contiguous()
