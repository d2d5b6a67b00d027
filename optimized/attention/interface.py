"""What an attention library is to this package: a statement of what it can serve, a raw forward, a raw backward.

q (R, L, H, d), k and v (R, S, H, d), rows of d numbers side by side, d a multiple of `alignment`; L, S >= 1. lse
(R, H, L) in at least float32; that of a row without keys is whatever the kernel leaves.

The backward forms P = exp(s - lse) and delta = <dout, out> from what it is handed, so that handing it the out and lse
of attention over more keys than k gives the exact gradients of q's, k's and v's part (see `kernels.null_slot`).
dk and dv of hidden keys are 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from optimized.attention.request import Request


@dataclass(frozen=True)
class Visible:
    """Which keys a query sees: those that every field admits."""

    lengths: Tensor | None = None  # (R) int32: the first keys of a row; None for all
    window: int = -1  # |i - j| <= window, or 0 <= i - j <= window if causal; -1 for none
    causal: bool = False
    mask: Tensor | None = None  # (R, L, S) bool

    @property
    def sides(self) -> tuple[int, int]:
        """How far the window reaches to the left and to the right; -1 for no limit."""
        return self.window, 0 if self.causal and self.window >= 0 else self.window


@dataclass(frozen=True)
class Setting:
    """What both directions of a call share."""

    scale: float  # of the logits: 1 / sqrt(d) of the d before padding
    dropout: float = 0.0
    visible: Visible = field(default_factory=Visible)


Pair = tuple[Tensor, Tensor]
Null = Pair | None  # key and value (G, H, d) that every query of R / G rows sees
Triple = tuple[Tensor, Tensor, Tensor]


class Attended(NamedTuple):
    """What a backward is handed of its forward: arguments and results."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    state: Tensor


class Adapter:
    """One library. `obstacle` and these say what it takes; the calls may rely on it.

    alignment: the head dimension is padded with zeros to a multiple of this. splits: its grid is as deep as there are
    rows, which CUDA limits. windows, masks: whether it takes `Visible.window`, `Visible.mask`. nulls: whether `attend`
    and its backward take a null slot; they do without the padding of `calls`. note: what else a user may want to know
    of it.
    """

    alignment = 8
    splits = True
    windows = False
    masks = False
    nulls = False
    note = ""

    def obstacle(self, r: Request) -> str | None:
        """Why it can't serve the request, or None if it can."""
        raise NotImplementedError

    def state(self, q: Tensor, k: Tensor, dropout: float) -> Tensor:
        """Empty, of the shape and dtype of the third result of `forward`: what a backward must know of the draw."""
        return torch.empty(0, dtype=torch.int64, device=q.device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Triple:
        """out (R, L, H, d), lse, and the state of the draw."""
        raise NotImplementedError

    def backward(self, dout: Tensor, done: Attended, setting: Setting, into: Pair) -> Triple:
        """dq, dk, dv, from the gradient of out.

        into: buffers shaped as k and v; a backward that can write there does, and returns them.
        """
        raise NotImplementedError

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, null: Null, setting: Setting
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`forward` with a null slot: out, lse, its draws (R, H, L), empty without dropout, and the state."""
        raise NotImplementedError

    def attend_backward(
        self, dout: Tensor, done: Attended, null: Null, setting: Setting, into: Pair
    ) -> tuple[Tensor, Tensor | None]:
        """dq and the gradient (2, G, H, d) of the null slot; dk and dv are in `into`."""
        raise NotImplementedError
