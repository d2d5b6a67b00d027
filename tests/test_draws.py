"""Dropout of attention written out, and of our kernels: which weights are kept is exact in share, and independent.

Written out, it is the same in any tiles. That values and gradients follow from what is kept: `test_attention.py`, by
the operator.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import unpacked
from harness import EVERY_KERNEL, check_identical
from test_attention import Case, cotangent, definition
from torch import Tensor

from optimized.attention import Attended, Setting, Visible, draws
from optimized.attention import math as written_out

EVERYTHING = (slice(None),) * 3
CASE = Case(groups=2, per_group=1, queries=37, keys=23, heads=3, dim_head=8, null=False, lengths="some_empty")
CASES = (CASE, replace(CASE, lengths="none", window=25, causal=True))
# Of weights: tiles of some queries, of a head, of some heads, of some rows.
TILES = (10 * 23, 37 * 23, 2 * 37 * 23, 3 * 37 * 23)


def drawn(kernels: str, heads: int, queries: int, keys: int, dropout: float, device: torch.device) -> Tensor:
    torch.manual_seed(3)
    if kernels == "triton":
        from optimized.kernels import keep

        bits, _ = keep.kept(
            draws.draw_(keep.numbers(1, heads, queries, keys, device)), queries, keys, dropout, torch.float32
        )
        return unpacked(bits, keys)[0].float()
    numbers = draws.draw_(draws.empty(1, heads, queries, keys, device))
    return draws.kept(numbers, EVERYTHING, queries, keys, dropout, torch.float32, draws.Room(device))[0]


@pytest.mark.interpreted
@EVERY_KERNEL
@pytest.mark.parametrize("dropout", [1.25 * 2**-16, 0.1, 1 - 1.25 * 2**-16])
def test_the_share_that_is_dropped(kernels: str, dropout: float, device: torch.device) -> None:
    """No multiple of 2^-16: of four million weights 80 are dropped or kept, where rounding would make it 64 or 128."""
    kept = drawn(kernels, 8, 512, 1023, dropout, device).double()
    assert abs(1 - kept.mean() - dropout) < 4 * math.sqrt(dropout * (1 - dropout) / kept.numel())


@pytest.mark.interpreted
@EVERY_KERNEL
@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_no_two_queries_and_no_two_keys_are_related(kernels: str, dropout: float, device: torch.device) -> None:
    """Products of two rows have the variance of independent ones; so have those of the corners of rectangles.

    Numbers of queries and keys added before two rounds of a good hash made the first 2.8, the second 40 deviations.
    """
    heads, queries, keys = 24, 128, 256
    kept = (drawn(kernels, heads, queries, keys, dropout, device) - (1 - dropout)) / math.sqrt(dropout * (1 - dropout))
    for t in (kept, kept.mT, kept[..., ::2], kept[..., 1::2]):
        products = t @ t.mT / math.sqrt(t.shape[-1])
        off = products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))
        variance = off.square().sum() / (heads * t.shape[1] * (t.shape[1] - 1))
        assert abs(variance - 1) < 0.05  # of independent ones it has a standard deviation of 0.01
    for i in (1, 2, 5, 64):
        for j in (1, 2, 3, 100):
            corners = kept * kept.roll(i, 1) * kept.roll(j, 2) * kept.roll((i, j), (1, 2))
            assert abs(corners.mean()) * math.sqrt(corners.numel()) < 6


def test_numbers_are_of_the_devices_generator(device: torch.device) -> None:
    """Other ones at each call, the same after a seed, and of all 32 bits."""
    torch.manual_seed(3)
    first, second = (draws.draw_(draws.empty(2, 3, 40, 40, device)) for _ in range(2))
    assert (first == second).double().mean() < 0.01
    torch.manual_seed(3)
    check_identical(draws.draw_(draws.empty(2, 3, 40, 40, device)), first)
    for bit in range(32):
        assert 0.4 < ((first >> bit) & 1).double().mean() < 0.6


@pytest.fixture(params=TILES)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of so many weights, on any device."""
    monkeypatch.setattr(written_out, "TILE", request.param)
    return request.param


def by_tiles(case: Case, dropout: float, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Out, lse, dq, dk, dv; and what was kept."""
    t = {name: x.to(dtype) for name, x in case.leaves().items()}
    visible = Visible(case.key_lengths(), case.window, case.causal)
    qkv, setting = (t["q"], t["k"], t["v"]), Setting(case.dim_head**-0.5, dropout, visible)
    torch.manual_seed(1)
    out, lse, state = written_out.ADAPTER.forward(*qkv, setting)
    into = torch.empty_like(t["k"]), torch.empty_like(t["v"])
    done = Attended(*qkv, out, lse, state)
    gradients = written_out.ADAPTER.backward(cotangent(case).to(dtype), done, setting, into)
    return [out, lse, *gradients], draws.kept(
        state, EVERYTHING, case.queries, case.keys, dropout, torch.float64, draws.Room(out.device)
    )


@pytest.mark.parametrize("case", CASES, ids=["lengths", "window"])
def test_tiles_are_what_all_is_at_once(case: Case, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition with what was kept; and the same is kept whatever the tiles."""
    dropout, device = 0.3, torch.device("cpu")
    assert len(list(written_out._tiles(torch.Size((2, 3, 37, 8)), 23, device))) == dict(zip(TILES, (24, 6, 4, 2)))[tile]
    (out, _, *gradients), kept = by_tiles(case, dropout, torch.float64)
    keep = torch.cat((torch.ones(2, 3, 37, 1), kept / (1 - dropout)), -1)
    exact = definition(case, torch.float64, torch.float64, device, keep)
    torch.testing.assert_close(out, exact.out, rtol=1e-12, atol=1e-13)
    for name, gradient in zip("qkv", gradients):
        torch.testing.assert_close(
            gradient, exact.grads[name], rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
    monkeypatch.setattr(written_out, "TILE", 2**18)
    check_identical(by_tiles(case, dropout, torch.float64)[1], kept)
