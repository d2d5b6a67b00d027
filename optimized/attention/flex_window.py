"""FlexAttention with a sliding window and any mask of keys, compiled by PyTorch; its own autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from optimized.attention.request import Request, off_cuda

BLOCK = 128  # tokens of a block of queries or keys, FlexAttention's own default


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention  # imports what few calls need

    # Uncompiled, FlexAttention would hold N x N scores.
    return torch.compile(flex_attention, dynamic=False)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int, mask: Tensor | None, causal: bool) -> Tensor:
    """(B, N, H, d) from q, k, v of that shape. mask (B, N): keys that take part; a masked query sees itself alone.

    The list of visible blocks has (N / 128)^2 entries: 4 MB at N = 131072.
    """
    from torch.nn.attention.flex_attention import BlockMask

    n, dim = q.shape[1], q.shape[-1]
    if not q.numel():
        return q
    after = 0 if causal else window
    valid = mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = (j - i <= after) & (i - j <= window)
        return inside if valid is None else inside & (valid[b, j] | (i == j))

    count = -(-n // BLOCK)
    block = torch.arange(count, device=q.device)
    first = ((block * BLOCK - window).clamp_min(0)) // BLOCK
    last = ((block + 1) * BLOCK - 1 + after).clamp_max(n - 1) // BLOCK
    indices = (first[:, None] + block).clamp_max(count - 1).int()
    block_mask = BlockMask.from_kv_blocks(
        (last - first + 1).int()[None, None],
        indices[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(n, n),
    )
    # Head dimensions below 16 don't fill a matrix product; zeros change none.
    surplus = max(16, 1 << (dim - 1).bit_length()) - dim
    q, k, v = (F.pad(t, (0, surplus)).transpose(1, 2) for t in (q, k, v))
    out = _compiled()(q, k, v, block_mask=block_mask, scale=dim**-0.5)
    return out.transpose(1, 2)[..., :dim]


def obstacle(r: Request) -> str | None:
    if not r.allow_triton:
        return "use_triton=False"
    return off_cuda(r) or ("no float64" if r.dtype == torch.float64 else None)
