"""Local attention: every token attends to its neighbours within a window, with rotary positions.

Letters: B batch, N tokens, D model dimension, H heads, d head dimension, w window size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reference import contract
from reference.contract import TokenMask
from reference.routed_attention import rotate
from reference.routing import widen

ROWS = 512  # queries at a time: bounds memory, and has no influence on the result


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

    LayerNorm (skipped when norm_weight is None), one bias-free qkv projection (rows: q, k, v, each (head, channel)),
    rotary embedding at absolute positions (theta 10000), softmax(q k^T / sqrt(d)) v, output projection. Masked
    tokens are attended by none and get 0. Returns (B, N, D) in x's dtype. Raises TypeError or ValueError.
    """
    weights = {"w_qkv": w_qkv, "w_out": w_out, "norm_weight": norm_weight, "norm_bias": norm_bias}
    mask = contract.local_input(x, window_size, mask, causal, heads, weights)
    norm = nn.Identity() if norm_weight is None else partial(layer_norm, weight=norm_weight, bias=norm_bias)
    to_qkv, to_out = partial(F.linear, weight=w_qkv), partial(F.linear, weight=w_out)
    return attend_locally(x, window_size, mask, causal, int(heads), norm, to_qkv, to_out)


def attend_locally(
    x: Float[Tensor, "B N D"],
    window_size: int,
    mask: Bool[Tensor, "B N"] | None,
    causal: bool,
    heads: int,
    norm: Callable[[Tensor], Tensor],
    to_qkv: Callable[[Tensor], Tensor],
    to_out: Callable[[Tensor], Tensor],
) -> Float[Tensor, "B N D"]:
    """`local_attention` of checked arguments, by the maps of a module or of weights."""
    n, window_size = x.shape[1], contract.positive_int("window_size", window_size)
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    x = x.masked_fill(~valid[..., None], 0)
    q, k, v = rearrange(to_qkv(norm(x)), "b n (three h d) -> three b h n d", three=3, h=heads)
    angles = rotary_angles(n, q.shape[-1], x.device)
    q, k = rotate(q, angles), rotate(k, angles)

    parts: list[Tensor] = []
    position = torch.arange(n, device=x.device)
    for start in range(0, n, ROWS):
        rows = slice(start, min(start + ROWS, n))
        near = slice(max(0, start - window_size), min(n, rows.stop + window_size))
        distance = position[rows, None] - position[None, near]
        visible = (distance.abs() <= window_size) & ((distance >= 0) | (not causal))
        visible = visible & valid[:, None, None, near]
        # A masked query sees itself so that its softmax stays finite; its output is zeroed below.
        visible = visible | (distance == 0)
        logits = widen(q[:, :, rows] @ k[:, :, near].mT)
        probs = (logits * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf).softmax(dim=-1)
        parts.append(probs.to(v.dtype) @ v[:, :, near])
    heads_out = torch.cat(parts, dim=2) if parts else q
    out = to_out(rearrange(heads_out, "b h n d -> b n (h d)").to(x.dtype))
    return out.masked_fill(~valid[..., None], 0).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """LayerNorm in at least float32, returned in x's dtype."""
    wide = widen(x)
    bias = None if bias is None else bias.to(wide.dtype)
    return F.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), bias, eps).to(x.dtype)


def rotary_angles(n: int, dim_head: int, device: torch.device) -> Float[Tensor, "N d"]:
    """Of positions 0 .. N-1."""
    return rotary_angles_at(torch.arange(n, device=device), dim_head)


def rotary_angles_at(position: Tensor, dim_head: int) -> Float[Tensor, "*any d"]:
    """Angles p * 10000**(-2j/d), twice side by side. float64: in float32 position 100000 is off by 0.004 radians."""
    frequency = 10000.0 ** (-torch.arange(0, dim_head, 2, device=position.device, dtype=torch.float64) / dim_head)
    angles = position.to(torch.float64)[..., None] * frequency
    return torch.cat((angles, angles), dim=-1)


class LayerNorm(nn.LayerNorm):
    """Of x (B, N, D), by `layer_norm`."""

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        weight, bias = self.weight, self.bias
        contract.ordinary("weight", weight)
        return layer_norm(x, weight, bias, self.eps)


class LocalAttention(nn.Module):
    """`local_attention` by modules that are called once: norm (with prenorm), to_qkv, to_out.

    State: norm.weight, norm.bias (D), to_qkv.weight (3 H d, D), to_out.weight (D, H d).
    """

    def __init__(
        self,
        dim: int,
        window_size: int,
        *,
        dim_head: int,
        heads: int,
        prenorm: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.window_size, self.heads = window_size, heads
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(dim, **where) if prenorm else None
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, **where)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, **where)
        self.register_load_state_dict_pre_hook(_drop_inv_freq)

    def reset_parameters(self) -> None:
        for layer in (self.norm, self.to_qkv, self.to_out):
            if layer is not None:
                layer.reset_parameters()

    def forward(self, x: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"] | None = None) -> Float[Tensor, "B N D"]:
        """Arguments are checked by the layer, but for what depends on parameters."""
        contract.parameters(self, x, CLASSES)
        norm = nn.Identity() if self.norm is None else self.norm
        return attend_locally(x, self.window_size, mask, False, self.heads, norm, self.to_qkv, self.to_out)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, heads={self.heads}"


CLASSES: contract.Classes = {LocalAttention: (), LayerNorm: (), nn.Linear: ("weight", "bias")}


def _drop_inv_freq(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Public checkpoints carry the rotary frequencies, a constant; it is accepted and dropped."""
    state_dict.pop(prefix + "attn_fn.rel_pos.inv_freq", None)
