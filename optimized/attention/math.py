"""Attention written out in PyTorch: any device and dtype, with dropout, windows and masks.

On the CPU a tile of weights is written out at a time; elsewhere, where launches are what costs, all R H L S at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from optimized.attention import draws
from optimized.attention.interface import Adapter, Attended, Pair, Setting, Triple, Visible
from optimized.attention.request import Request

TILE = 2**18  # weights: few enough for a cache, and enough to be worth a call of each operation


class Math(Adapter):
    alignment = 1
    splits = False
    windows = True
    masks = True

    def obstacle(self, r: Request) -> str | None:
        return None

    def state(self, q: Tensor, k: Tensor, dropout: float) -> Tensor:
        """What weights are kept follows from."""
        rows, length, heads, _ = q.shape
        if not dropout:
            return torch.empty(0, dtype=torch.int32, device=q.device)
        return draws.empty(rows, heads, length, k.shape[1], q.device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Triple:
        length, keys = q.shape[1], k.shape[1]
        state = self.state(q, k, setting.dropout)
        if setting.dropout:
            draws.draw_(state)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        q, k, v = _wide(q, setting.scale), _wide(k), _wide(v)
        lse, room = q.new_empty(q.shape[:-1]), draws.Room(q.device)
        for tile in _tiles(q.shape, keys, q.device):
            s = _logits(q, k, tile, setting.visible, room)
            top = s.amax(-1)
            # Not exp(s - lse): the weights must sum to 1 far better than |lse| eps.
            p = torch.softmax(s, -1, out=s)
            hopeless = top == -math.inf  # without any key
            lse[tile] = (top - p.amax(-1).log()).masked_fill_(hopeless, -math.inf)
            if setting.dropout:
                p *= draws.kept(state, tile, length, keys, setting.dropout, p.dtype, room)
            attended = (p @ v[tile[:2]]).masked_fill_(hopeless[..., None], 0)
            attended /= 1 - setting.dropout
            out.transpose(1, 2)[tile] = attended
        return out, lse, state

    def backward(self, dout: Tensor, done: Attended, setting: Setting, into: Pair) -> Triple:
        q, k, v, out, lse, state = done
        length, keys, dtype = q.shape[1], k.shape[1], q.dtype
        q, k, v, dout, out = _wide(q, setting.scale), _wide(k), _wide(v), _wide(dout), _wide(out)
        delta = (dout * out).sum(-1, keepdim=True)
        dout = dout / (1 - setting.dropout)
        # A row without keys and without a null slot has lse -inf, and -inf - -inf is no number.
        lse = lse.masked_fill(lse == -math.inf, 0)[..., None]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        room = draws.Room(q.device)
        for tile in _tiles(q.shape, keys, q.device):
            heads = tile[:2]
            p = _logits(q, k, tile, setting.visible, room).sub_(lse[tile]).exp_()
            dropped = p
            if setting.dropout:
                dropped = draws.kept(state, tile, length, keys, setting.dropout, p.dtype, room).mul_(p)
            # Transposed, since the product of the larger transpose takes half as long again.
            dv[heads] += (dout[tile].mT @ dropped).mT
            dp = torch.matmul(dout[tile], v[heads].mT, out=room.take("dp", tuple(p.shape), p.dtype))
            ds = p.mul_(-delta[tile]).addcmul_(dropped, dp) if setting.dropout else dp.sub_(delta[tile]).mul_(p)
            dk[heads] += (q[tile].mT @ ds).mT
            dq[tile] = ds @ k[heads]
        dq *= setting.scale
        dq, dk, dv = (t.transpose(1, 2).to(dtype) for t in (dq, dk, dv))
        return dq, dk, dv


def _wide(t: Tensor, scale: float = 1.0) -> Tensor:
    """(R, H, L, d) of (R, L, H, d) in at least float32, times a scale."""
    t = t.to(torch.promote_types(t.dtype, torch.float32)).transpose(1, 2).contiguous()
    return t if scale == 1 else t * scale


def _tiles(shape: torch.Size, keys: int, device: torch.device) -> Iterator[draws.Tile]:
    """Of queries (R, H, L, d): several rows only with all heads, several heads only with all queries."""
    rows, heads, length, _ = shape
    some = max(TILE // keys, 1) if device.type == "cpu" else rows * heads * length
    queries = min(length, some)
    some_heads = min(heads, max(some // length, 1))
    some_rows = max(some // (length * heads), 1)
    for r in range(0, rows, some_rows):
        for h in range(0, heads, some_heads):
            for i in range(0, length, queries):
                yield slice(r, r + some_rows), slice(h, h + some_heads), slice(i, i + queries)


def _logits(q: Tensor, k: Tensor, tile: draws.Tile, visible: Visible, room: draws.Room) -> Tensor:
    """(r, h, l, S) of a tile, -inf for hidden keys."""
    mine = q[tile]
    s = room.take("logits", (*mine.shape[:-1], k.shape[2]), q.dtype)
    torch.matmul(mine, k[tile[:2]].mT, out=s)
    hidden = _hidden(visible, tile, q.shape[2], k.shape[2], s.device)
    return s if hidden is None else s.masked_fill_(hidden, -math.inf)


def _hidden(visible: Visible, tile: draws.Tile, length: int, keys: int, device: torch.device) -> Tensor | None:
    """What of a tile is not seen, to be expanded to (r, h, l, S); None for nothing."""
    rows, _, queries = tile
    hidden = None if visible.mask is None else ~visible.mask[rows, None, queries]
    key = torch.arange(keys, device=device)
    if visible.window >= 0:
        left, right = visible.sides
        ahead = key - torch.arange(length, device=device)[queries, None]
        outside = (ahead < -left) | (ahead > right)
        hidden = outside if hidden is None else hidden | outside
    if visible.lengths is not None:
        beyond = (key >= visible.lengths[rows, None])[:, None, None]
        hidden = beyond if hidden is None else hidden | beyond
    return hidden


ADAPTER = Math()
