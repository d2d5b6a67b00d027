"""What selection and solver cases have in common: shapes, values, masks and memory layouts, drawn by NumPy.

Philox is a function of (key, counter): the key is (seed and kind, index), so that any case is drawn alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = ("float64", "float32")
LENGTHS = ("1", "2 - 8", "9 - 64", "65 - 256", "257 - 1024", "1025 - 4096", "beyond 4096")
_LAST = (1, 8, 64, 256, 1024, 4096)  # of each of LENGTHS
_SHARES = np.cumsum((0.01, 0.13, 0.47, 0.34, 0.042, 0.0075))  # and its share of the cases; 5 in 10000 lie beyond
# Beyond what a kernel keeps in registers (32768 float32, 16384 float64), and a whole number of its chunks.
LONG = (4097, 8192, 16384, 16385, 24576, 32768, 32769, 33000)
ROWS = ("1", "2 - 3", "4 and more")
MASKS = {
    "none": 5,
    "all": 2,
    "random": 5,
    "suffix": 4,
    "all but one": 2,
    "only one": 1,
    "an item without any": 1,
}  # shares
LAYOUTS = ("contiguous", "unaligned", "transposed", "sliced", "expanded")
TINIEST = 12  # elements: only below does chance draw the same data twice


def generator(seed: int, kind: str, index: int) -> np.random.Generator:
    """Of one case."""
    key = np.array([(seed << 32) | zlib.crc32(kind.encode()), index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def pick(u: float, of: Sequence[Any]) -> Any:
    """By a uniform number."""
    return of[int(u * len(of))]


def weigh(u: float, shares: Mapping[str, float]) -> str:
    """By a uniform number, each as often as its share says."""
    u *= sum(shares.values())
    for name, share in shares.items():
        u -= share
        if u < 0:
            return name
    return name


def draw_length(rng: np.random.Generator) -> int:
    """Half of them at a power of two or beside it, where blocks end."""
    u, v, near = rng.random(3).tolist()
    place = int(np.searchsorted(_SHARES, u, side="right"))
    if place == 0:
        return 1
    if place == len(_LAST):
        return int(pick(v, LONG))
    first, last = _LAST[place - 1] + 1, _LAST[place]
    n = first + int(v * (last - first + 1))
    if near < 0.5:
        n = (1 << (n.bit_length() - (near < 0.25))) + int(near * 12) % 3 - 1
    return min(max(n, first), last)


def draw_layout(u: float, n: int) -> str:
    """Triton compiles again for pointers that are not aligned: they are left to the ordinary lengths."""
    layout = pick(u, LAYOUTS)
    return layout if layout != "unaligned" or 8 < n <= 256 else "contiguous"


def level_of_length(n: int) -> str:
    return LENGTHS[int(np.searchsorted(_LAST, n))]


def level_of_rows(rows: int) -> str:
    return ROWS[(rows > 1) + (rows > 3)]


def draw_mask(rng: np.random.Generator, batch: int, n: int, kind: str) -> Array | None:
    """(B, N) bool, True where valid; "none" is no mask at all."""
    if kind == "none":
        return None
    mask = np.ones((batch, n), dtype=bool)
    if kind in ("random", "an item without any"):
        mask = rng.random((batch, n)) < rng.random() * 0.8 + 0.15
        if kind != "random":
            mask[int(rng.integers(batch))] = False
    elif kind == "suffix":
        mask = np.arange(n) < rng.integers(0, n + 1, (batch, 1))
    elif kind in ("all but one", "only one"):
        mask[np.arange(batch), rng.integers(0, n, batch)] = False
        mask = mask if kind == "all but one" else ~mask
    return mask


@dataclass(frozen=True)
class Layout:
    """Where an array (B, E, N) lies in a flat buffer."""

    offset: int
    strides: tuple[int, int, int]


class Storage:
    """Arrays of a batch of cases in one buffer, so that they reach a device in one copy. Gaps hold NaN."""

    def __init__(self, dtype: str) -> None:
        self._pieces: list[Array] = []
        self._size = 0
        self._dtype = np.dtype(dtype)

    def _append(self, piece: Array) -> int:
        """At a multiple of 16 elements; returns where."""
        offset = self._size
        gap = -piece.size % 16
        self._pieces += [piece, np.full(gap, np.nan if self._dtype.kind == "f" else 0, self._dtype)]
        self._size += piece.size + gap
        return offset

    def add(self, t: Array, layout: str = "contiguous") -> Layout:
        """t (B, E, N), which for "expanded" is the same for every batch item."""
        batch, experts, n = t.shape
        if layout == "transposed":
            return Layout(self._append(t.transpose(0, 2, 1).ravel()), (experts * n, 1, experts))
        if layout == "sliced":
            wide = np.full((batch, experts, 2 * n + 3), np.nan, self._dtype)
            wide[..., 1 : 1 + 2 * n : 2] = t
            return Layout(self._append(wide.ravel()) + 1, (experts * (2 * n + 3), 2 * n + 3, 2))
        if layout == "expanded":
            return Layout(self._append(t[0].ravel()), (0, n, 1))
        if layout == "unaligned":
            return Layout(self._append(np.concatenate((t.ravel()[:1], t.ravel()))) + 1, (experts * n, n, 1))
        return Layout(self._append(t.ravel()), (experts * n, n, 1))

    def to(self, device: torch.device) -> Tensor:
        pieces = self._pieces or [np.zeros(0, self._dtype)]
        return torch.from_numpy(np.concatenate(pieces)).to(device)


def padded(rows: Sequence[Array], width: int, fill: float | bool, dtype: Any) -> Array:
    """(sum of rows, width): arrays (rows, n) below one another."""
    out = np.full((sum(len(r) for r in rows), width), fill, dtype)
    at = 0
    for r in rows:
        out[at : at + len(r), : r.shape[1]] = r
        at += len(r)
    return out


def flat(tensors: Sequence[Tensor]) -> Array:
    """One after the other in one array, by one copy from the device."""
    return torch.cat([t.detach().reshape(-1) for t in tensors]).cpu().numpy()
