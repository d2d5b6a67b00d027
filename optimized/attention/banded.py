"""A sliding window in blocks, by an adapter that takes a mask: work and memory N (R + 2 w), on every device.

Queries are cut into blocks of R tokens; block i sees the keys of [i R - w, i R + R + w), without the
last w if causal: one slice of the padded keys. Gradients of keys are added up where slices overlap.

Letters: B batch, N tokens, H heads, d head dimension, w window size, R block length, C = N / R rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from optimized.attention import calls, torch_efficient
from optimized.attention.interface import Adapter, Attended, Setting, Visible
from optimized.attention.request import Request

PREFIX = "banded_"  # of the names of these backends
MIN_BLOCK, MAX_BLOCK = 32, 256  # short blocks waste launches and padding, long ones waste N R of the band


def flash_obstacle(r: Request) -> str | None:
    if not r.allow_flash:
        return "flash_attn=False"
    return None if r.device.type == "cpu" else f"takes the mask of a band on the CPU only, not on {r.device.type}"


def efficient_obstacle(r: Request) -> str | None:
    obstacle = torch_efficient.ADAPTER.obstacle(r)
    aligned = 4 if r.dtype == torch.float32 else 8  # 16 bytes
    return obstacle or (f"dim_head {r.dim_head} is no multiple of {aligned}" if r.dim_head % aligned else None)


@dataclass(frozen=True)
class Cut:
    """How N >= 1 tokens are cut."""

    n: int
    before: int  # keys that a query sees before and after itself
    after: int
    block: int

    @classmethod
    def of(cls, n: int, window: int, causal: bool) -> Cut:
        before = min(window, n - 1)
        return cls(n, before, 0 if causal else before, min(max(before, MIN_BLOCK), MAX_BLOCK, n))

    @property
    def count(self) -> int:
        return -(-self.n // self.block)

    @property
    def span(self) -> int:
        """Keys of a block."""
        return self.before + self.block + self.after

    @property
    def tail(self) -> int:
        """Tokens that the last block has too few."""
        return self.count * self.block - self.n

    def queries(self, t: Tensor) -> Tensor:
        """(B C, R, ...) of (B, N, ...), zeros at the end."""
        padded = F.pad(t, (*(0,) * (2 * t.ndim - 4), 0, self.tail)) if self.tail else t
        return padded.unflatten(1, (self.count, self.block)).flatten(0, 1)

    def keys(self, t: Tensor) -> Tensor:
        """(B C, span, H, d) of (B, N, H, d), zeros at both ends; a view where B = 1."""
        padded = F.pad(t, (0, 0, 0, 0, self.before, self.tail + self.after))
        return padded.unfold(1, self.span, self.block).permute(0, 1, 4, 2, 3).flatten(0, 1)

    def whole(self, t: Tensor) -> Tensor:
        """(B, N, ...) of (B C, R, ...)."""
        return t.unflatten(0, (-1, self.count)).flatten(1, 2)[:, : self.n]

    def add_keys(self, into: Tensor, t: Tensor) -> None:
        """(B, N, H, d), the sum of what (B C, span, H, d) has for each token: R columns of all blocks at a time."""
        batch, _, *rest = into.shape
        parts = -(-self.span // self.block)
        wide = torch.promote_types(t.dtype, torch.float32)
        total = t.new_zeros(batch, self.count - 1 + parts, self.block, *rest, dtype=wide)
        blocks = t.unflatten(0, (batch, self.count))
        for i in range(parts):
            columns = blocks[:, :, i * self.block : (i + 1) * self.block]
            total[:, i : i + self.count, : columns.shape[2]] += columns
        into.copy_(total.flatten(1, 2)[:, self.before : self.before + self.n])

    def visible(self, mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """(B C, R, span): in the window, and both tokens valid; every token sees itself, so that no row is empty."""
        columns, rows = torch.arange(self.span, device=device), torch.arange(self.block, device=device)
        offset = columns - self.before - rows[:, None]  # of a key's position from a query's
        band = (offset >= -self.before) & (offset <= self.after)
        if mask is None:
            key = torch.arange(self.count, device=device)[:, None] * self.block + columns - self.before
            keys = ((key >= 0) & (key < self.n)).expand(batch, -1, -1).flatten(0, 1)
            seen = keys[:, None] & band
        else:
            padded = F.pad(mask, (self.before, self.tail + self.after))
            keys = padded.unfold(1, self.span, self.block).flatten(0, 1)
            seen = (keys[:, None] & band).logical_and_(self.queries(mask)[..., None])
        return seen.logical_or_(offset == 0)


@dataclass(frozen=True)
class Band:
    """|i - j| <= window, or 0 <= i - j <= window if causal. mask (B, N): False for tokens that see themselves alone."""

    window: int
    causal: bool
    mask: Tensor | None


def forward(adapter: Adapter, q: Tensor, k: Tensor, v: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """out (B, N, H, d) and lse (B, H, N), contiguous."""
    batch, n, heads, dim = q.shape
    if not q.numel():
        return q.new_zeros(q.shape), q.new_zeros(batch, heads, n, dtype=torch.promote_types(q.dtype, torch.float32))
    cut = Cut.of(n, band.window, band.causal)
    setting = Setting(dim**-0.5, visible=Visible(mask=cut.visible(band.mask, batch, q.device)))
    out, lse, _ = calls.forward(adapter, cut.queries(q), cut.keys(k), cut.keys(v), setting)
    return cut.whole(out).contiguous(), cut.whole(lse.mT).mT.contiguous()


def backward(
    adapter: Adapter,
    dout: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    band: Band,
    into: tuple[Tensor, Tensor],
) -> Tensor:
    """dq; dk and dv are written to `into`. results: out and lse."""
    q, k, v = qkv
    if not q.numel():
        return q.new_zeros(q.shape)
    out, lse = results
    cut = Cut.of(q.shape[1], band.window, band.causal)
    setting = Setting(q.shape[-1] ** -0.5, visible=Visible(mask=cut.visible(band.mask, q.shape[0], q.device)))
    q, k, v, out, dout = cut.queries(q), cut.keys(k), cut.keys(v), cut.queries(out), cut.queries(dout)
    lse = cut.queries(lse.mT).mT.contiguous()
    state = calls.state_of(adapter, q, k, 0.0)
    buffers = k.new_empty(k.shape), v.new_empty(v.shape)
    dq = calls.backward(adapter, dout, Attended(q, k, v, out, lse, state), setting, buffers)
    for total, gradient in zip(into, buffers):
        cut.add_keys(total, gradient)
    return cut.whole(dq)
