"""Local attention: every token attends to its neighbours within a window.

By a flash kernel with a window, by FlexAttention, or in banded blocks: queries are cut into blocks of R tokens; block i
sees the keys of [i R - w, i R + R + w), one slice of the padded keys. Work and memory of these are N (R + 2 w), never
N x N, on every device.

Letters: B batch, N tokens, D model dimension, H heads, d head dimension, w window size, R block length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from optimized import ops, validation
from optimized.backends import Request, choose
from optimized.routed_attention import rotate

MIN_BLOCK, MAX_BLOCK = 32, 256  # short blocks waste launches and padding, long ones waste N R of the band


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

    Args:
        x: (B, N, D). mask: (B, N) bool, False for padding, which is attended by none and gets 0.
        w_qkv: (3 H d, D), rows (q, k, v; head, channel). w_out: (D, H d). heads: H; d must be even.
        norm_weight, norm_bias: of the LayerNorm (eps 1e-5) before; None: no norm.
    Rotary embedding (theta 10000) at absolute positions, so that scores depend on i - j; angles are made in float64,
    since in float32 position 100000 is off by 0.004 radians. Returns (B, N, D) in x's dtype.
    Raises TypeError or ValueError naming the argument.
    """
    _check(x, window_size, mask, causal, w_qkv, w_out, heads, norm_weight, norm_bias)
    return _local_attention(x, int(window_size), mask, causal, w_qkv, w_out, int(heads), norm_weight, norm_bias)


def _local_attention(
    x: Tensor,
    window_size: int,
    mask: Tensor | None,
    causal: bool,
    w_qkv: Tensor,
    w_out: Tensor,
    heads: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    allow_flash: bool = True,
    allow_triton: bool = True,
) -> Tensor:
    batch, n, dim = x.shape
    hidden = x if mask is None else x.masked_fill(~mask[..., None], 0)
    if norm_weight is not None:
        # PyTorch computes it in at least float32 whatever the dtype, if there is but one. But on the CPU it adds up the
        # gradients of weight and bias in that dtype, and a sum in bfloat16 stops growing at 256.
        inner = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
        bias = None if norm_bias is None else norm_bias.to(inner)
        hidden = F.layer_norm(hidden.to(inner), (dim,), norm_weight.to(inner), bias).to(x.dtype)
    dtype, dim_head = x.dtype, w_out.shape[1] // heads
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    triton = choose("dispatch", Request(x.device, x.dtype, allow_triton=allow_triton)).triton
    request = Request(
        x.device, dtype, dim_head, mask is not None, empty=batch * n == 0,
        allow_flash=allow_flash, allow_triton=allow_triton,
    )  # fmt: skip
    backend = choose("local_attention", request)
    window = min(window_size, max(n - 1, 0))
    if backend.kernel is None and backend.name != "flex_attention":
        given = (t.to(dtype) for t in (hidden, w_qkv, w_out))
        out = ops.attend_in_window(*given, heads, window, causal, backend.name, triton)[0]
    else:
        tables = ops.rotary_tables(n, dim_head, x.device, torch.promote_types(dtype, torch.float32))
        q, k, v = F.linear(hidden, w_qkv).view(batch, n, 3, heads, dim_head).unbind(2)
        q, k = (rotate(t, *tables, None, triton) for t in (q, k))
        if n and backend.kernel is not None:
            q = _banded(q, k, v, window, mask, causal, backend.kernel)
        elif n:
            from optimized.attention import flex_window

            q = flex_window.attend(q, k, v, window, mask, causal)
        out = F.linear(q.flatten(2), w_out)
    out = out.to(x.dtype)
    return out if mask is None else out.masked_fill(~mask[..., None], 0)


def _banded(q: Tensor, k: Tensor, v: Tensor, w: int, mask: Tensor | None, causal: bool, kernel: SDPBackend) -> Tensor:
    batch, n, heads, dim_head = q.shape
    block = min(max(w, MIN_BLOCK), MAX_BLOCK, n)
    count = -(-n // block)
    after = 0 if causal else w
    tail = count * block - n
    span = w + block + after
    q = F.pad(q, (0, 0, 0, 0, 0, tail)).unflatten(1, (count, block)).flatten(0, 1)
    k, v = (
        F.pad(t, (0, 0, 0, 0, w, tail + after)).unfold(1, span, block).permute(0, 1, 4, 2, 3).flatten(0, 1)
        for t in (k, v)
    )
    # Key column c of block i is token i * block + c - w; query row r is token i * block + r.
    offset = torch.arange(span, device=q.device) - w - torch.arange(block, device=q.device)[:, None]
    band = (offset >= -w) & (offset <= after)
    key = torch.arange(count, device=q.device)[:, None] * block + torch.arange(span, device=q.device) - w
    inside = ((key >= 0) & (key < n))[None]
    valid = inside if mask is None else F.pad(mask, (w, tail + after)).unfold(1, span, block)
    # A row of padding sees itself, so that its softmax stays finite; nothing reads it.
    visible = (valid[:, :, None] & band) | (offset == 0)
    visible = visible.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=visible)
    return out.transpose(1, 2).reshape(batch, count * block, heads, dim_head)[:, :n]


def _check(
    x: Any,
    window_size: Any,
    mask: Any,
    causal: Any,
    w_qkv: Any,
    w_out: Any,
    heads: Any,
    norm_weight: Any,
    norm_bias: Any,
) -> None:
    validation.tensor("x", x, "B", "N", "D")
    validation.positive_int("window_size", window_size)
    validation.token_mask("mask", mask, x)
    validation.flag("causal", causal)
    validation.positive_int("heads", heads)
    dim = x.shape[2]
    validation.tensor("w_out", w_out, dim, "H*d", beside=x, dtype_of=("x", x))
    inner = w_out.shape[1]
    if inner == 0 or inner % (2 * heads):
        validation.reject("w_out", f"H*d columns with H = {heads} and an even d (rotary embedding)", w_out)
    validation.tensor("w_qkv", w_qkv, 3 * inner, dim, beside=x, dtype_of=("x", x))
    if norm_weight is not None:
        validation.tensor("norm_weight", norm_weight, dim, beside=x)
    if norm_bias is not None:
        validation.tensor("norm_bias", norm_bias, dim, beside=x)
        if norm_weight is None:
            validation.reject("norm_bias", "None, since norm_weight is None", norm_bias)


class LocalAttention(nn.Module):
    """Parameters of `local_attention`: to_qkv.weight (3 H d, D), to_out.weight (D, H d), norm.* (D) with prenorm."""

    def __init__(
        self,
        dim: int,
        window_size: int,
        *,
        dim_head: int,
        heads: int,
        prenorm: bool,
        flash_attn: bool,
        use_triton: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.window_size, self.heads = window_size, heads
        self.flash_attn, self.use_triton = flash_attn, use_triton
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **where) if prenorm else None
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, **where)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, **where)
        self.register_load_state_dict_pre_hook(_drop_rotary_buffer)

    def reset_parameters(self) -> None:
        for child in self.children():
            child.reset_parameters()

    def forward(self, x: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"] | None = None) -> Float[Tensor, "B N D"]:
        """`local_attention` on arguments already checked."""
        norm = (None, None) if self.norm is None else (self.norm.weight, self.norm.bias)
        w_qkv, w_out = self.to_qkv.weight, self.to_out.weight
        allowed = (self.flash_attn, self.use_triton)
        return _local_attention(x, self.window_size, mask, False, w_qkv, w_out, self.heads, *norm, *allowed)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, heads={self.heads}"


def _drop_rotary_buffer(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Public checkpoints hold the rotary frequencies, which are constants here."""
    state_dict.pop(prefix + "attn_fn.rel_pos.inv_freq", None)
