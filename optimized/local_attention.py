"""Local attention: every token attends to its neighbours within a window.

By a flash kernel with a window, in banded blocks (`attention.banded`), or by FlexAttention. Work and memory of all are
N (R + 2 w) for blocks of R tokens, never N x N, on every device.

Letters: B batch, N tokens, D model dimension, H heads, d head dimension, w window size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from optimized import ops
from optimized.attention import flex_window
from optimized.plain import obstacle_to_fusion, plain
from optimized.plan import Kind, Plan, bind
from reference import contract
from reference.contract import Config, TokenMask


def local_attention(
    x: Float[Tensor, "B N D"],
    window_size: int,
    mask: TokenMask | None = None,
    causal: bool = False,
    *,
    w_qkv: Float[Tensor, "qkv D"],
    w_out: Float[Tensor, "D Hd"],
    heads: int,
    norm_weight: Float[Tensor, " D"] | None = None,
    norm_bias: Float[Tensor, " D"] | None = None,
) -> Float[Tensor, "B N D"]:
    """Token i attends to valid tokens j with |i - j| <= window_size (causal: 0 <= i - j <= window_size).

    Args:
        x: (B, N, D). mask: (B, N) bool, False for padding, which is attended by none and gets 0.
        w_qkv: (3 H d, D), rows (q, k, v; head, channel). w_out: (D, H d). heads: H; d must be even.
        norm_weight, norm_bias: of the LayerNorm (eps 1e-5) before; None: no norm.
    Rotary embedding (theta 10000) at absolute positions, so that scores depend on i - j; angles are made in float64,
    since in float32 position 100000 is off by 0.004 radians. Returns (B, N, D) in x's dtype.
    Raises TypeError or ValueError naming the argument.
    """
    weights = {"w_qkv": w_qkv, "w_out": w_out, "norm_weight": norm_weight, "norm_bias": norm_bias}
    mask = contract.local_input(x, window_size, mask, causal, heads, weights)
    window_size, heads = contract.positive_int("window_size", window_size), contract.positive_int("heads", heads)
    plan = _plan(x, mask, w_out.shape[1] // heads)
    hidden = _hide(x, mask) if norm_weight is None else normed(x, mask, norm_weight, norm_bias, EPS, plan)
    if plan.local_attention == "flex_attention":
        qkv = F.linear(hidden, w_qkv).unflatten(2, (3, heads, -1))
        y = F.linear(_by_flex(qkv, mask, window_size, causal, plan).flatten(2), w_out)
    else:
        y = _fused(hidden, (w_qkv, w_out), mask, heads, window_size, causal, plan)
    return _hide(y.to(x.dtype), mask)


EPS = 1e-5


def normed(x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, plan: Plan) -> Tensor:
    """LayerNorm of x, whose masked tokens are not read and count as zeros."""
    if plan.dispatch and x.shape[-1] <= ops.MOST_NORM_CHANNELS:
        return ops.layer_norm.first(x, weight, bias, mask, eps, True)
    return layer_norm(_hide(x, mask), weight, bias, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = EPS) -> Tensor:
    """LayerNorm over the last dimension, in x's dtype.

    PyTorch computes it in at least float32 whatever the dtype, if there is but one. But on the CPU it adds up the
    gradients of weight and bias in that dtype, and a sum in bfloat16 stops growing at 256.
    """
    mixed = weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype)  # rounding to x's loses digits
    inner = torch.promote_types(x.dtype, torch.float32) if mixed or x.device.type == "cpu" else x.dtype
    bias = None if bias is None else bias.to(inner)
    return F.layer_norm(x.to(inner), (x.shape[-1],), weight.to(inner), bias, eps).to(x.dtype)


def _plan(x: Tensor, mask: Tensor | None, dim_head: int, allow_flash: bool = True, allow_triton: bool = True) -> Plan:
    stages = ("dispatch", "local_attention")
    return bind(
        Kind(
            x.device, x.dtype, stages, dim_head,
            token_mask=mask is not None, allow_flash=allow_flash, allow_triton=allow_triton,
        )
    )  # fmt: skip


def _hide(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask[..., None], 0)


def _fused(
    hidden: Tensor,
    weights: tuple[Tensor, Tensor],
    mask: Tensor | None,
    heads: int,
    window_size: int,
    causal: bool,
    plan: Plan,
) -> Tensor:
    given = (t.to(plan.dtype) for t in (hidden, *weights))
    return ops.window_attention.first(*given, mask, heads, window_size, causal, plan.local_attention, plan.dispatch)


def _by_flex(qkv: Tensor, mask: Tensor | None, window_size: int, causal: bool, plan: Plan) -> Tensor:
    """(B, N, H, d)."""
    q, k, v = qkv.unbind(2)
    n, dim_head = q.shape[1], q.shape[-1]
    tables = ops.rotary_tables(n, dim_head, q.device, torch.promote_types(q.dtype, torch.float32))
    q, k = (ops.rotary(t, *tables, None, False, plan.dispatch) for t in (q, k))
    # A window beyond either end needs no clipping: blocks are clipped.
    return flex_window.attend(q, k, v, window_size, mask, causal)


class LayerNorm(nn.LayerNorm):
    """As `layer_norm` computes it."""

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return layer_norm(x, self.weight, self.bias, self.eps)


class LocalAttention(nn.Module):
    """Parameters of `local_attention`: to_qkv.weight (3 H d, D), to_out.weight (D, H d), norm.* (D) with prenorm."""

    def __init__(
        self, config: Config, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        assert config.local_attn_window_size is not None
        self.window_size, self.heads, self.dim_head = config.local_attn_window_size, config.heads, config.dim_head
        self.flash_attn, self.use_triton = config.flash_attn, config.use_triton
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = config.heads * config.dim_head
        self.norm = LayerNorm(config.dim, **where) if config.prenorm else None
        self.to_qkv = nn.Linear(config.dim, 3 * inner, bias=False, **where)
        self.to_out = nn.Linear(inner, config.dim, bias=False, **where)
        self.register_load_state_dict_pre_hook(_drop_rotary_buffer)

    def reset_parameters(self) -> None:
        child: Any
        for child in self.children():
            child.reset_parameters()

    def forward(
        self, x: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"] | None = None, plan: Plan | None = None
    ) -> Float[Tensor, "B N D"]:
        """`local_attention` of arguments already checked. plan: that of the layer's call."""
        if plan is None or not contract.takes_as_given(self, LocalAttention):
            contract.parameters(self, x, CLASSES)
        if plan is None:
            plan = _plan(x, mask, self.dim_head, self.flash_attn, self.use_triton)
        norm = self.norm
        if norm is None:
            hidden = _hide(x, mask)
        elif plain(norm, LayerNorm, bias=True) is None:
            hidden = normed(x, mask, norm.weight, norm.bias, norm.eps, plan)
        else:
            hidden = norm(_hide(x, mask)).to(x.dtype)
        if plan.local_attention != "flex_attention" and self.obstacle_to_fusion() is None:
            weights = self.to_qkv.weight, self.to_out.weight
            y = _fused(hidden, weights, mask, self.heads, self.window_size, False, plan)
        else:
            qkv = self.to_qkv(hidden).to(plan.dtype).unflatten(2, (3, self.heads, -1))
            if plan.local_attention == "flex_attention":
                out = _by_flex(qkv, mask, self.window_size, False, plan)
            else:
                out = ops.window.first(qkv, mask, self.window_size, False, plan.local_attention, plan.dispatch)
            y = self.to_out(out.flatten(2))
        return _hide(y.to(x.dtype), mask)

    def obstacle_to_fusion(self) -> str | None:
        """Why the projections are called as modules; None where one operator does the same."""
        return obstacle_to_fusion(to_qkv=(self.to_qkv, nn.Linear), to_out=(self.to_out, nn.Linear))

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, heads={self.heads}"


CLASSES: contract.Classes = {LocalAttention: (), LayerNorm: (), nn.Linear: ("weight", "bias")}


def _drop_rotary_buffer(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Public checkpoints hold the rotary frequencies, which are constants here."""
    state_dict.pop(prefix + "attn_fn.rel_pos.inv_freq", None)
