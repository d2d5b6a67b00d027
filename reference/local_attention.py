"""Local attention: every token attends to its neighbours within a window, with rotary positions.

Letters: B batch, N tokens, D model dimension, H heads, d head dimension, w window size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reference.routed_attention import rotate
from reference.validation import (
    check_bool,
    check_int,
    check_mask,
    check_same_dtype,
    check_tensor,
    fail,
)

ROWS = 512  # queries at a time: bounds memory, and has no influence on the result


def local_attention(
    x: Float[Tensor, "B N D"],
    window_size: int,
    mask: Bool[Tensor, "B N"] | None = None,
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
    check_local_input(x, window_size, mask, causal, w_qkv, w_out, heads, norm_weight, norm_bias)
    n, window_size, heads = x.shape[1], int(window_size), int(heads)
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    x = x.masked_fill(~valid[..., None], 0)
    normed = x if norm_weight is None else layer_norm(x, norm_weight, norm_bias)
    q, k, v = rearrange(F.linear(normed, w_qkv), "b n (three h d) -> three b h n d", three=3, h=heads)
    angles = rotary_angles(n, q.shape[-1], x.device)
    q, k = rotate(q, angles), rotate(k, angles)

    out = []
    position = torch.arange(n, device=x.device)
    for start in range(0, n, ROWS):
        rows = slice(start, min(start + ROWS, n))
        near = slice(max(0, start - window_size), min(n, rows.stop + window_size))
        distance = position[rows, None] - position[None, near]
        visible = (distance.abs() <= window_size) & ((distance >= 0) | (not causal))
        visible = visible & valid[:, None, None, near]
        # A masked query sees itself so that its softmax stays finite; its output is zeroed below.
        visible = visible | (distance == 0)
        logits = (q[:, :, rows] @ k[:, :, near].mT).to(torch.promote_types(q.dtype, torch.float32))
        probs = (logits * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf).softmax(dim=-1)
        out.append(probs.to(v.dtype) @ v[:, :, near])
    heads_out = torch.cat(out, dim=2) if out else q
    out = F.linear(rearrange(heads_out, "b h n d -> b n (h d)"), w_out)
    return out.masked_fill(~valid[..., None], 0).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """LayerNorm (eps 1e-5) in at least float32, returned in x's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(dtype)
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias).to(x.dtype)


def rotary_angles(n: int, dim_head: int, device: torch.device) -> Float[Tensor, "N d"]:
    """Angles i * 10000**(-2j/d), twice side by side. float64: in float32 position 100000 is off by 0.004 radians."""
    frequency = 10000.0 ** (-torch.arange(0, dim_head, 2, device=device, dtype=torch.float64) / dim_head)
    angles = torch.arange(n, device=device, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angles, angles), dim=-1)


def check_local_input(
    x: Tensor,
    window_size: int,
    mask: Tensor | None,
    causal: bool,
    w_qkv: Tensor,
    w_out: Tensor,
    heads: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> None:
    check_tensor("x", x, ("B", "N", "D"))
    check_int("window_size", window_size)
    check_mask("mask", mask, x)
    check_bool("causal", causal)
    check_int("heads", heads)
    dim = x.shape[2]
    check_tensor("w_out", w_out, (dim, "H*d"), like=x)
    if w_out.shape[1] == 0 or w_out.shape[1] % (2 * heads):
        fail("w_out", f"H*d columns with heads = {heads} and an even d (rotary embedding)", tuple(w_out.shape))
    check_tensor("w_qkv", w_qkv, (3 * w_out.shape[1], dim), like=x)
    check_same_dtype("w_qkv", w_qkv, "x", x)
    check_same_dtype("w_out", w_out, "x", x)
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None:
            check_tensor(name, tensor, (dim,), like=x)
    if norm_bias is not None and norm_weight is None:
        fail("norm_bias", "None, since norm_weight is None", norm_bias)


class LocalAttention(nn.Module):
    """Parameters of `local_attention`: norm.{weight,bias} (D) with prenorm, to_qkv (3Hd, D), to_out (D, Hd)."""

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
        where = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **where) if prenorm else None
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, **where)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, **where)
        self.register_load_state_dict_pre_hook(_drop_inv_freq)

    def reset_parameters(self) -> None:
        for layer in (self.norm, self.to_qkv, self.to_out):
            if layer is not None:
                layer.reset_parameters()

    def forward(self, x: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"] | None = None) -> Float[Tensor, "B N D"]:
        return local_attention(
            x,
            self.window_size,
            mask,
            w_qkv=self.to_qkv.weight,
            w_out=self.to_out.weight,
            heads=self.heads,
            norm_weight=None if self.norm is None else self.norm.weight,
            norm_bias=None if self.norm is None else self.norm.bias,
        )

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, heads={self.heads}"


def _drop_inv_freq(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Public checkpoints carry the rotary frequencies, a constant; it is accepted and dropped."""
    state_dict.pop(prefix + "attn_fn.rel_pos.inv_freq", None)
