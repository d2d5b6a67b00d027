"""That the past is unmoved by the future: what comes after a cut is replaced, and logits before it are the same bits.

Of the model as it was trained, in the dtype that it was trained in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from rich.console import RenderableType
from rich.text import Text as Styled
from torch import Tensor

from optimized.prove.tables import Column, Form, fitted
from optimized.train.data import seed_of

Logits = Callable[[Int64[Tensor, "B N"]], Float[Tensor, "B N V"]]


class Cut(NamedTuple):
    """logits: how many were before it; changed: how many of them are other bits."""

    at: int
    future: str
    logits: int
    changed: int

    @property
    def failure(self) -> str | None:
        if not self.changed:
            return None
        return f"future of token {self.at} replaced by {self.future}: {self.changed} of {self.logits} logits changed"


def cuts(logits_of: Logits, tokens: Int64[Tensor, "B N"], vocab_size: int, window: int) -> list[Cut]:
    """Behind a token in the middle, and where a block begins. Two tokens at least."""
    n = tokens.shape[1]
    generator = torch.Generator().manual_seed(seed_of("law"))
    noise = torch.randint(vocab_size, tokens.shape, generator=generator).to(tokens.device)
    expected = logits_of(tokens)
    found = []
    for at in dict.fromkeys((n // 2, max(n // 3 // window * window, 1))):
        past, future = tokens[:, :at], tokens[:, at:]
        futures = {
            "noise": noise[:, at:],
            "the same tokens, reversed": future.flip(1),
            "one token, repeated": future[:, :1].expand_as(future),
        }
        for name, other in futures.items():
            replaced = logits_of(torch.cat((past, other), 1))[:, :at]
            before = expected[:, :at]
            same = (replaced == before) | (replaced.isnan() & before.isnan())
            found.append(Cut(at, name, before.numel(), int((~same).sum())))
    return found


def table(found: list[Cut], width: int) -> RenderableType:
    rows = []
    for cut in found:
        verdict = Styled("FAIL", style="bold red") if cut.failure else Styled("identical", style="green")
        rows.append([*map(Styled, (str(cut.at), cut.future, f"{cut.logits:,}", f"{cut.changed:,}")), verdict])
    columns = [Column("cut at", right=True), Column("future replaced by", room=12)]
    columns += [Column("logits\nbefore", right=True), Column("changed", right=True), Column("the past")]
    return fitted(width, "No token sees a later one", None, Form(columns, rows))
