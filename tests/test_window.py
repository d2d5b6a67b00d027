"""Our kernel of a sliding window against attention over all pairs of tokens, each in sight or not."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import pytest
import torch
from harness import check_identical
from strategies import draw, draw_mask
from torch import Tensor

from optimized import ops
from optimized.ops.rotary import rotary_tables

TRITON = pytest.mark.parametrize("kernels", ["triton"], indirect=True)
HEADS = 2
# Lengths and windows: none, below, at and above the blocks of float64, one of them and several; from 15 on a block sees
# itself as a whole, from 31 on its neighbours, of which 30 leaves out a single pair. d: padded, and not.
LENGTHS, WINDOWS, CHANNELS = (1, 15, 16, 17, 33, 50), (1, 15, 16, 17, 30, 31, 2**31), (2, 24, 32)


def problem(n: int, dim: int, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """q, k and v side by side, and a cotangent."""
    shapes = (2, n, 3, HEADS, dim), (2, n, HEADS, dim)
    qkv, g = (draw(shape, "normal", i).to(device, dtype) for i, shape in enumerate(shapes))
    return qkv, g


def turned(t: Tensor) -> Tensor:
    """By the angles of positions 0, 1, ..."""
    cos, sin = (table[:, None] for table in rotary_tables(t.shape[1], t.shape[-1], t.device, torch.float64))
    first, second = t.chunk(2, -1)
    return t * cos + torch.cat((-second, first), -1) * sin


def over_all_pairs(qkv: Tensor, window: int, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (B, N, H, d) and lse (B, H, N). A masked token sees itself alone, and no other sees it."""
    q, k, v = qkv.unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (turned(q), turned(k), v))
    at = torch.arange(qkv.shape[1], device=qkv.device)
    apart = at - at[:, None]
    seen = (apart >= -window) & (apart <= (0 if causal else window))
    if mask is not None:
        seen = seen & mask[:, None, None] & mask[:, None, :, None]
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~(seen | (apart == 0)), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def both(
    qkv: Tensor, g: Tensor, window: int, causal: bool = False, mask: Tensor | None = None, apart: bool = False
) -> tuple[Tensor, ...]:
    """out, lse and the gradient of qkv, by the kernels, which take rotated q and k of the strides of qkv.

    apart: v, heads first, of strides of its own.
    """
    from optimized.kernels.window import Band, window_attention, window_attention_backward

    n, dim = qkv.shape[1], qkv.shape[-1]
    band = Band.of(n, window, causal, mask)
    ready = qkv.clone()
    for part in range(2):
        ready[:, :, part] = turned(qkv[:, :, part])
    q, k, v = ready.unbind(2)
    v = v.transpose(1, 2).contiguous().transpose(1, 2) if apart else v
    out, lse = window_attention(q, k, v, band)
    angles = rotary_tables(n, dim, qkv.device, torch.promote_types(qkv.dtype, torch.float32))
    return out, lse, window_attention_backward(g, (q, k, v), out, lse, band, angles)


def check_against_all_pairs(n: int, window: int, dim: int, causal: bool, masked: bool, device: torch.device) -> None:
    qkv, g = problem(n, dim, device)
    mask = draw_mask(2, n, "random", n).to(device) if masked else None
    leaf = qkv.clone().requires_grad_()
    expected = over_all_pairs(leaf, window, causal, mask)
    (gradient,) = torch.autograd.grad(expected[0], leaf, g)
    for a, e in zip(both(qkv, g, window, causal, mask), (*expected, gradient)):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


def test_no_row_is_longer_than_what_tells_far_from_near() -> None:
    """By sums of positions in 32 bits."""
    from optimized.kernels.window import Band

    assert Band.of(2**29, 2**29, True, None) == (2**29 - 1, 0, None)
    with pytest.raises(ValueError, match=f"^n: expected at most {2**29} tokens in a row, got {2**29 + 1}$"):
        Band.of(2**29 + 1, 2**29, True, None)


@TRITON
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("n", LENGTHS)
def test_lengths_and_windows(kernels: str, n: int, window: int, device: torch.device) -> None:
    for dim, causal, masked in itertools.product(CHANNELS, (False, True), (False, True)):
        check_against_all_pairs(n, window, dim, causal, masked, device)


@TRITON
@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("n", "window", "dim", "causal", "masked"),
    [
        (1, 1, 2, False, False),
        (17, 16, 24, True, True),
        (33, 15, 2, False, True),
        (50, 30, 2, False, False),
        pytest.param(48, 15, 2, True, False, marks=pytest.mark.thorough),
        (50, 17, 32, True, False),
        (50, 2**31, 24, False, True),
        pytest.param(50, 1, 24, False, False, marks=pytest.mark.thorough),
    ],
)
def test_some_of_them(
    kernels: str, n: int, window: int, dim: int, causal: bool, masked: bool, device: torch.device
) -> None:
    check_against_all_pairs(n, window, dim, causal, masked, device)


@TRITON
@pytest.mark.interpreted
def test_any_strides(kernels: str, device: torch.device) -> None:
    """Of tokens, heads and of q, k and v among each other."""
    qkv, g = problem(18, 6, device)
    expected = both(qkv, g, 4)
    for order in ((1, 0, 2, 3, 4), (3, 2, 1, 0, 4), (2, 0, 3, 1, 4)):
        laid = qkv.permute(order).contiguous().permute([order.index(i) for i in range(5)])
        cotangent = g.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        for a, e in zip(both(laid, cotangent, 4), expected):
            check_identical(a, e)
    for a, e in zip(both(qkv, g, 4, apart=True), expected):
        check_identical(a, e)


@TRITON
@pytest.mark.interpreted
@pytest.mark.parametrize("level", [-3000.0, 3000.0])
def test_logits_far_from_zero(kernels: str, level: float, device: torch.device) -> None:
    """Of all keys of some queries: exponentials of what is left after the largest are taken."""
    qkv, g = problem(20, 4, device)
    qkv[:, :, 1] = qkv[:, :, 0] * level  # without a rotation between them logits were -level |q|^2 / 2
    leaf = qkv.clone().requires_grad_()
    expected = over_all_pairs(leaf, 3, False, None)
    (gradient,) = torch.autograd.grad(expected[0], leaf, g)
    out, lse, found = both(qkv, g, 3)
    torch.testing.assert_close(lse, expected[1], rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(out, expected[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found, gradient, rtol=1e-7, atol=1e-6 * gradient.abs().max().item())


@TRITON
@pytest.mark.gpu
def test_runs_are_bitwise_equal(kernels: str, device: torch.device) -> None:
    qkv, g = problem(5000, 64, device, torch.bfloat16)
    mask = draw_mask(2, 5000, "random", 1).to(device)
    runs = [both(qkv, g, 100, False, mask) for _ in range(5)]
    for run in runs[1:]:
        for a, b in zip(run, runs[0]):
            check_identical(a, b)


def test_a_query_that_nobody_asked_is_nothing_to_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of huge scores a weight made anew, or the result, may be infinite: times a gradient of 0 NaN for other tokens."""
    module, handed = sys.modules["optimized.ops.causal_window"], []

    def noted(a: Any, dout: Tensor, qk: Tensor, *rest: Any) -> Tensor:
        handed.append((qk, a.lse, a.out, dout))
        return attend_backward(a, dout, qk, *rest)

    attend_backward = module.attend_backward
    monkeypatch.setattr(module, "attend_backward", noted)
    qkv = draw((1, 9, 3, 2, 8), "normal", 1).requires_grad_()
    out = ops.causal_window(qkv, None, 3, False, "banded_math", False)[0]
    out[:, :5].square().sum().backward()
    ((qk, lse, found, dout),) = handed
    assert (dout[:, :5] != 0).all()
    assert qk[:, :5, 0].any(-1).all()
    for t in (dout[:, 5:], qk[:, 5:, 0], lse[:, :, 5:], found[:, 5:]):
        assert (t == 0).all()
    assert qk[:, :, 1].any(-1).all()
