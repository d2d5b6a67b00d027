"""Who sees what is not finite: the kernel against the definition, around the borders of its tiles and the window."""

from __future__ import annotations

import pytest
import torch
from harness import check_identical
from strategies import generator
from torch import Tensor

# Tokens and window; a tile has 64 tokens.
SIZES = ((1, 0), (7, 3), (64, 2), (65, 3), (130, 1), (66, 64), (70, 500), (193, 66))


def seen(odd_q: Tensor, odd_kv: Tensor, mask: Tensor | None, window: int) -> Tensor:
    """(B, N, H), token by token."""
    there = odd_kv if mask is None else odd_kv & mask[..., None]
    rows = [there[:, max(i - window, 0) : i + 1].any(1) for i in range(odd_kv.shape[1])]
    return odd_q | torch.stack(rows, 1)


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize(("heads", "masked"), [(3, False), (1, True), (17, True)])
@pytest.mark.interpreted
def test_rows_that_see_one_are_spoilt_and_no_others(
    kernels: str, heads: int, masked: bool, device: torch.device
) -> None:
    """One odd key in a while, so that most rows see none, or one at the very end of their window."""
    from optimized.kernels.finite import spoil

    for seed, (n, window) in enumerate(SIZES):
        g = generator(seed)
        often = (2, 5)[seed % 2] / n
        odd_q, odd_kv = (torch.rand(1, n, heads, generator=g).lt(p).to(device) for p in (0.02, often))
        mask = (torch.rand(1, n, generator=g) < 0.8).to(device) if masked else None
        out, lse = torch.randn(1, n, heads, 3, device=device), torch.randn(1, heads, n, device=device)
        hidden = seen(odd_q, odd_kv, mask, window)
        expected = out.masked_fill(hidden[..., None], torch.nan), lse.masked_fill(hidden.mT, torch.inf)
        found = spoil(out, lse, odd_q, odd_kv, mask, window)
        for name, actual, right in zip(("rows", "out", "lse"), (found, out, lse), (hidden, *expected)):
            check_identical(actual, right, f"{name} of {n} tokens in a window of {window}")
