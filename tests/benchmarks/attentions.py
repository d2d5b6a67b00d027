"""Attention functions of the libraries, in one form: q, k, v (R, L, H, d) to (R, L, H, d)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
BLOCK = 128  # of FlexAttention's block masks
SDPA = {
    "sdpa": None,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FULL = (*SDPA, "flash-attn 2", "flash-attn 4")
WINDOWED = ("flash-attn 2", "flash-attn 4", "torch varlen")


class UnavailableError(Exception):
    """Why a competitor can't take part: a row of the report, not a failure."""


def attention(
    name: str,
    *,
    dropout: float = 0.0,
    mask: Tensor | None = None,
    window: int | None = None,
    causal: bool = False,
) -> Attention:
    """The function named so. mask (R, L): keys that take part. Raises UnavailableError."""
    if name in SDPA:
        if window is not None:
            raise UnavailableError("no window")
        return functools.partial(_sdpa, SDPA[name], dropout, mask, causal)
    if mask is not None:
        raise UnavailableError("takes no mask")
    if name == "flash-attn 2":
        try:
            from flash_attn import flash_attn_func
        except ImportError as error:
            raise UnavailableError(f"flash-attn 2 is not installed: {error}") from error
        return functools.partial(
            flash_attn_func, dropout_p=dropout, window_size=_sides(window, -1, causal), causal=causal
        )
    if dropout:
        raise UnavailableError("no dropout")
    if name == "flash-attn 4":
        try:
            from flash_attn.cute import flash_attn_func
        except ImportError as error:
            raise UnavailableError(f"flash-attn 4 is not installed: {error}") from error
        sides = _sides(window, None, causal)
        return functools.partial(_first, functools.partial(flash_attn_func, window_size=sides, causal=causal))
    if name == "torch varlen":
        return functools.partial(_varlen, _sides(window, -1, causal))
    if name == "flex" and window is not None:
        return Flex(near(window, causal))
    raise UnavailableError(f"no attention named {name!r} for window {window}")


def _sides(window: int | None, none: int | None, causal: bool) -> tuple[int | None, int | None]:
    return (none, 0 if causal else none) if window is None else (window, 0 if causal else window)


def _first(function: Callable[..., Tensor | tuple[Tensor, ...]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Some versions return the log-sum-exp too."""
    out = function(q, k, v)
    return out if isinstance(out, Tensor) else out[0]


def _sdpa(
    backend: SDPBackend | None, dropout: float, mask: Tensor | None, causal: bool, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:  # fmt: skip
    turned = [t.transpose(1, 2) for t in (q, k, v)]
    shown = {"attn_mask": None if mask is None else mask[:, None, None], "is_causal": causal}
    if backend is None:
        out = F.scaled_dot_product_attention(*turned, **shown, dropout_p=dropout)
    else:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*turned, **shown, dropout_p=dropout)
    return out.transpose(1, 2)


def _varlen(sides: tuple[int, int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, length = q.shape[:2]
    starts = torch.arange(0, (rows + 1) * length, length, device=q.device, dtype=torch.int32)
    flat = (t.flatten(0, 1) for t in (q, k, v))
    return varlen_attn(*flat, starts, starts, length, length, window_size=sides).view(q.shape)


class Flex:
    """FlexAttention, compiled; its block mask is made once per length, and is not part of the time."""

    def __init__(self, mask_of: Callable[[int, torch.device], Mask]) -> None:
        """mask_of(N, device): what `create_block_mask` takes: whether query i of (b, h) sees key j."""
        from torch.nn.attention.flex_attention import flex_attention

        self.mask_of, self.masks = mask_of, {}
        self.compiled = torch.compile(flex_attention, dynamic=False)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[1]
        if n not in self.masks:
            from torch.nn.attention.flex_attention import create_block_mask

            self.masks[n] = create_block_mask(self.mask_of(n, q.device), None, None, n, n, device=str(q.device))
        turned = (t.transpose(1, 2) for t in (q, k, v))
        return self.compiled(*turned, block_mask=self.masks[n]).transpose(1, 2)


def near(window: int, causal: bool = False) -> Callable[[int, torch.device], Mask]:
    """|i - j| <= window, or 0 <= i - j <= window."""
    if causal:
        return lambda n, device: lambda b, h, i, j: (i >= j) & (i - j <= window)
    return lambda n, device: lambda b, h, i, j: (i - j).abs() <= window


def some_blocks(keys: int) -> Callable[[int, torch.device], Mask]:
    """Every block of queries sees keys / BLOCK blocks of keys, drawn once: as a block-sparse attention would choose."""

    def mask_of(n: int, device: torch.device) -> Mask:
        blocks = -(-n // BLOCK)
        drawn = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)).argsort(-1).argsort(-1)
        seen = (drawn < max(keys // BLOCK, 1)).to(device)
        return lambda b, h, i, j: seen[i // BLOCK, j // BLOCK]

    return mask_of
