"""Which weights dropout keeps, made again from a few numbers for every query and key wherever that is asked.

Letters: R rows, H heads, L queries, S keys, W = S / 2 rounded up. A random generator draws all bits of m, a, c
(R, H, L) and b, n (R, H, W) in int32. For a query and two keys, all modulo 2^32 and with odd m and n,

    x = m b + a                    whose upper half is pairwise independent of that of other queries and keys
    x = x n + (x >> 16)            which gives the lower half something of the upper one
    x = x FACTOR + (x >> 15)
    x = x xor c                    uniform whatever it was

and each half decides of one of the two keys by a threshold of 16 bits. So no mask is kept, none depends on threads or
on how it is cut into tiles, and it costs less than half of what drawing 16 bits for every weight does.

The share that is kept is no multiple of 2^-16, but exact to 2^-32: a threshold is rounded up or down by bits of a, of
which x knows nothing. That two weights of a query share this rounding makes their covariance 2^-34 at most.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FACTOR = 0x7FEB352D  # of a hash that is known to mix well
Tile = tuple[slice, slice, slice]  # of rows, heads, queries


class Room:
    """Memory that every tile of a call uses again: to be handed new memory takes longer than a pass over it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Contiguous, with whatever is in it, until the same name is taken again; of one dtype for a name."""
        count, held = math.prod(shape), self._held.get(name)
        if held is None or held.numel() < count:
            held = self._held[name] = torch.empty(count, dtype=dtype, device=self._device)
        return held[:count].view(shape)


def empty(rows: int, heads: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """m, a, c, b and n side by side, (R, H, 3 L + 2 W), before they are drawn."""
    return torch.empty((rows, heads, 3 * queries + 2 * ((keys + 1) // 2)), dtype=torch.int32, device=device)


def draw_(numbers: Tensor) -> Tensor:
    """By the device's generator: all that a call draws for its weights."""
    return numbers.random_(-(2**31), None)


def kept(
    numbers: Tensor, tile: Tile, queries: int, keys: int, dropout: float, dtype: torch.dtype, room: Room
) -> Tensor:
    """1 or, with probability `dropout`, 0 for every weight of a tile: (r, h, l, S) in that dtype, contiguous."""
    words = (keys + 1) // 2
    m, a, c, b, n = numbers[tile[:2]].split((*[queries] * 3, *[words] * 2), -1)
    m, a, c = (t[..., tile[2], None] for t in (m, a, c))
    b, n = (t[..., None, :] for t in (b, n))
    shape = (*m.shape[:-1], words)
    x, shifted = (room.take(name, shape, torch.int32) for name in ("words", "shifted"))
    torch.mul(m | 1, b, out=x).add_(a)  # one addcmul, of two that are expanded, would not be vectorized
    torch.bitwise_right_shift(x, 16, out=shifted)
    torch.addcmul(shifted, x, n | 1, out=x)
    torch.bitwise_right_shift(x, 15, out=shifted)
    torch.add(shifted, x, alpha=FACTOR, out=x)
    x ^= c
    whole, rest = divmod(round((1 - dropout) * 2**32), 2**16)
    # So many of 2^16 are kept. All are not for a dropout below 2^-16, which is taken for it.
    threshold = (((a & 0xFFFF) + rest) >> 16) + (whole - 2**15)
    found = x.view(torch.int16).lt_(threshold.clamp(max=2**15 - 1).to(torch.int16))[..., :keys]
    return room.take("kept", tuple(found.shape), dtype).copy_(found)
