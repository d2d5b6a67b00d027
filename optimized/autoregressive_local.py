"""Local attention of the causal layer: every token sees itself and the w before it, those of a cache included.

Letters: B batch, N tokens, D model dimension, H heads, d head dimension, w window size, W block size.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from optimized import ops
from optimized.attention import flex_window
from optimized.autoregressive_cache import NearBuffers
from optimized.local_attention import CLASSES as LOCAL
from optimized.local_attention import LayerNorm, LocalAttention, normed
from optimized.ops.finite import odd_rows
from optimized.plain import plain
from optimized.plan import Kind, Plan, bind
from reference import contract
from reference.autoregressive_cache import Cache, take


class CausalLocalAttention(LocalAttention):
    """State as of `LocalAttention`."""

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "B N D"],
        cache: Cache | NearBuffers | None = None,
        kept: bool = False,
        plan: Plan | None = None,
    ) -> tuple[Float[Tensor, "B N D"], Tensor | None, Tensor | None]:
        """x: the valid tokens first, which continue those of the cache. plan: that of the layer's call.

        Returns (B, N, D), and if they are to be kept rotated keys and values, (B, N, H, d), before them those of the
        cache. A cache in place is given those of x, one token of every item.
        """
        if plan is None or not contract.takes_as_given(self, CausalLocalAttention):
            contract.parameters(self, x, CLASSES)
        if plan is None:
            step = isinstance(cache, NearBuffers)  # whose one query sees the first keys of a row
            plan = bind(
                Kind(
                    x.device, x.dtype, ("dispatch", "routed_attention" if step else "local_attention"), self.dim_head,
                    masked=step, token_mask=cache is not None, allow_flash=self.flash_attn,
                    allow_triton=self.use_triton,
                )
            )  # fmt: skip
        norm = self.norm
        if norm is None:
            hidden = x
        elif plain(norm, LayerNorm, bias=True) is None:
            hidden = normed(x, None, norm.weight, norm.bias, norm.eps, plan)
        else:
            hidden = norm(x).to(x.dtype)
        qkv = self.to_qkv(hidden).to(plan.dtype).unflatten(2, (3, self.heads, self.dim_head))
        if cache is None:
            out, k, v = self._first(qkv, kept, plan)
        elif isinstance(cache, NearBuffers):
            out, k, v = self._step(qkv, cache, plan), None, None
        else:
            out, k, v = self._continued(qkv, cache, plan)
        return self.to_out(out.flatten(2).to(x.dtype)), k, v

    def _first(self, qkv: Tensor, kept: bool, plan: Plan) -> tuple[Tensor, Tensor | None, Tensor | None]:
        out = self._attend(qkv, None, False, plan)
        if not kept:
            return out, None, None
        tables = ops.rotary_tables(qkv.shape[1], self.dim_head, qkv.device, _wide(qkv))
        return out, ops.rotary(qkv[:, :, 1], *tables, None, False, plan.dispatch), qkv[:, :, 2]

    def _continued(self, qkv: Tensor, cache: Cache, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        """Stored keys and values, then those of the call, side by side as one sequence from start - w on."""
        n, stored = qkv.shape[1], cache.local_keys.shape[1]
        new = torch.arange(n, device=qkv.device)
        tables = angles_at(cache.length[:, None] + new, self.dim_head, _wide(qkv))
        at = torch.arange(qkv.shape[0] * n, device=qkv.device).view(qkv.shape[0], n)
        q, k = (ops.rotary(qkv[:, :, i], *tables, at, False, plan.dispatch) for i in (0, 1))
        keys = torch.cat((cache.local_keys.to(k.dtype), k), 1)
        values = torch.cat((cache.local_values.to(k.dtype), qkv[:, :, 2]), 1)
        queries = torch.cat((torch.zeros_like(keys[:, :stored]), q), 1)
        # A stored row that is no token any more lies between the last that is and the first new one.
        old = self.window_size + cache.length - cache.start
        row = torch.arange(stored + n, device=qkv.device)
        place = torch.where(row < old[:, None], row, stored + row - old[:, None]).clamp_max(stored + n - 1)
        there = (row >= self.window_size - cache.start[:, None]) & (row < old[:, None] + n)
        rows = torch.stack([take(t, 1, place) for t in (queries, keys, values)], 2)
        out = self._attend(rows, there, True, plan)
        return take(out, 1, old[:, None] + new), keys, values

    def _step(self, qkv: Float[Tensor, "B 1 3 H d"], cache: NearBuffers, plan: Plan) -> Float[Tensor, "B 1 H d"]:
        tables = angles_at(cache.length, self.dim_head, _wide(qkv))
        at = torch.arange(qkv.shape[0], device=qkv.device)[:, None]
        q, k = (ops.rotary(qkv[:, :, i], *tables, at, False, plan.dispatch) for i in (0, 1))
        keys, values, count = cache.append_near(k, qkv[:, :, 2])
        rows = torch.stack((keys, values), 2).to(q.dtype)  # (B, w + 1, 2, H, d)
        odd = odd_rows(rows).any(2)
        k, v = rows.masked_fill(odd[:, :, None, :, None], 0).unbind(2)
        shown = torch.arange(k.shape[1], device=k.device) < count[:, None]
        hidden = (odd_rows(q) | (odd & shown[..., None]).any(1, keepdim=True))[..., None]
        lengths, q = count.int(), q.masked_fill(hidden, 0)
        out = ops.attention(q, k, v, None, None, lengths, None, 0.0, -1, False, plan.routed_attention, plan.dispatch)[0]
        return out.masked_fill(hidden, torch.nan)

    def _attend(self, qkv: Tensor, mask: Tensor | None, turned: bool, plan: Plan) -> Tensor:
        if plan.local_attention != "flex_attention":
            given = self.window_size, turned, plan.local_attention, plan.dispatch
            return ops.causal_window(qkv, mask, *given)[0]
        q, k, v = qkv.unbind(2)
        if not turned:
            tables = ops.rotary_tables(q.shape[1], self.dim_head, q.device, _wide(q))
            q, k = (ops.rotary(t, *tables, None, False, plan.dispatch) for t in (q, k))
        odd_kv = odd_rows(k.detach()) | odd_rows(v.detach())
        odd_q = odd_rows(q.detach())
        odd = odd_q | ops.seen_in_window(odd_kv, mask, self.window_size)
        q, k, v = (t.masked_fill(o[..., None], 0) for t, o in ((q, odd), (k, odd_kv), (v, odd_kv)))
        out = flex_window.attend(q, k, v, self.window_size, mask, True)
        return out.masked_fill(odd[..., None], torch.nan)

    def obstacle_to_fusion(self) -> str | None:
        """Why the norm is called as a module; None where an operator does the same. The projections always are."""
        return plain(self.norm, LayerNorm, bias=True)


def angles_at(position: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`ops.rotary_tables` of positions (...), flat."""
    exponent = torch.arange(0, dim, 2, device=position.device, dtype=torch.float64).mul(-1 / dim)
    angles = torch.outer(position.flatten().to(torch.float64), 10000.0**exponent)
    return angles.cos().to(dtype).repeat(1, 2), angles.sin().to(dtype).repeat(1, 2)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


CLASSES: contract.Classes = {**LOCAL, CausalLocalAttention: (), nn.Linear: ("weight", "bias")}
