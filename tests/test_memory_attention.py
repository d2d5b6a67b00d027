"""Attention of blocks over their memory against attention over all columns, each in sight or not, and the reference's
own `attend`, which says what becomes of what is not finite.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from harness import EVERY_KERNEL, check_identical
from strategies import draw, generator
from torch import Tensor
from torch.nn.functional import pad
from zones import new_memory_in_zones

from optimized import ops
from reference.autoregressive import attend, scored

NAMES = ("out", "q", "kv", "scores", "null_kv")
TRITON = pytest.mark.parametrize("kernels", ["triton"], indirect=True)


class Problem(NamedTuple):
    """Floating ones first; see `ops.memory_attention`."""

    q: Tensor
    kv: Tensor
    scores: Tensor
    null_kv: Tensor
    indices: Tensor
    counts: Tensor
    q_counts: Tensor

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Problem:
        floats = [t.to(device, dtype) for t in self[:4]]
        return Problem(*floats, *(t.to(device) for t in self[4:]))


def problem(
    blocks: int = 4,
    block: int = 3,
    k: int = 4,
    slots: int = 3,
    dim: int = 4,
    prior: int = 2,
    batch: int = 1,
    seed: int = 0,
) -> Problem:
    """Of two experts and two heads; a random share of the columns is valid."""
    n = prior + blocks * block
    logits = draw((batch, 2, n), "normal", seed)
    valid = torch.rand(batch, n, generator=generator(seed)) < 0.8
    indices, counts = ops.memory(logits, valid, k, block, prior, False)
    return Problem(
        draw((2, batch, blocks, slots, 2, dim), "normal", seed + 1),
        draw((2, batch, n, 2, 2, dim), "normal", seed + 2),
        logits.sigmoid(),
        draw((2, 2, 2, 1, dim), "normal", seed + 3),
        indices,
        counts,
        torch.randint(slots + 1, counts.shape, generator=generator(seed + 4), dtype=torch.int32),
    )


def of_the_reference(p: Problem) -> Tensor:
    """Every block's keys among all columns, in sight where the block lists them."""
    q, kv, scores, null_kv, indices, counts, q_counts = p
    n, k = kv.shape[2], indices.shape[-1]
    listed = torch.where(torch.arange(k, device=q.device) < counts[..., None], indices.long(), n)
    sight = torch.zeros(*counts.shape, n + 1, dtype=torch.bool, device=q.device).scatter(-1, listed, True)[..., :n]
    visible = pad(sight.transpose(0, 1), (1, 0), value=True)[:, :, :, None, None]  # (E, B, J, 1, 1, 1 + L)
    keys, values = kv.transpose(2, 4).unbind(3)  # (E, B, H, L, d)
    scores = torch.where(scores.isinf(), math.nan, scores)  # no router makes one, so `scored` leaves it in the gradient
    values = scored(values, scores.transpose(0, 1)[:, :, None, :, None])
    null = null_kv[:, :, None].expand(-1, -1, q.shape[1], -1, -1, -1)
    keys, values = (torch.cat((a, b), -2)[:, :, None] for a, b in zip(null, (keys, values)))
    shape = (*q.shape[:3], *keys.shape[3:])
    keys, values = (torch.where(visible.mT, t.expand(shape), 0) for t in (keys, values))
    out = attend(q.transpose(3, 4), keys, values, visible.expand(*shape[:4], q.shape[3], -1)).transpose(3, 4)
    filled = torch.arange(q.shape[3], device=q.device) < q_counts.transpose(0, 1)[..., None]
    return torch.where(filled[..., None, None], out, 0)


def run(p: Problem, kernels: str, g: Tensor | None = None) -> tuple[Tensor, ...]:
    """out and the gradients, with a cotangent that is NaN where out is; kernels: whose, or "reference"."""
    leaves = [t.clone().requires_grad_() for t in p[:4]]
    given = Problem(*leaves, *p[4:])
    if kernels == "reference":
        out = of_the_reference(given)
    else:
        out = ops.memory_attention(*given, 0.0, kernels == "triton")[0]
    g = draw(tuple(out.shape), "normal", 9).to(out) if g is None else g
    return out.detach(), *torch.autograd.grad(out, leaves, torch.where(out.isnan(), math.nan, g))


def check_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, a, e in zip(NAMES, actual, expected):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


SHAPES = {
    "small": {},
    "nothing stored": {"prior": 0, "k": 1},
    "tiles": {"blocks": 4, "block": 8, "k": 18, "slots": 17, "dim": 6, "prior": 3, "seed": 1},
    "all remembered": {"k": 30, "batch": 2, "seed": 2},
    "no block": {"blocks": 0},
    # Three programs share the blocks; what they hold in common has another place in the list of each.
    "a column a block": {"blocks": 9, "block": 1, "k": 4, "prior": 1, "slots": 1, "dim": 1, "seed": 4},
}


@EVERY_KERNEL
@pytest.mark.interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(kernels: str, shape: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever new memory holds."""
    p = problem(**SHAPES[shape]).to(device)
    with new_memory_in_zones(monkeypatch) as memory:
        found = run(p, kernels)
    check_close(found, run(p, "reference"))
    assert all(untouched() for untouched in memory)
    assert shape == "no block" or all(t.any() for t in found)


ODD = {
    "a query": lambda p: p.q[0, 0, 2, 0, 1, 0].fill_(math.nan),
    "an infinite query": lambda p: p.q[1, 0, 3, 0, 0, 1].fill_(-math.inf),
    "a key": lambda p: p.kv[0, 0, 1, 0, 1, 2].fill_(math.nan),
    "a key of logits -inf": lambda p: (p.q[..., 0].abs_(), p.kv[:, :, 3, 0, :, 0].fill_(-math.inf)),
    "a value": lambda p: p.kv[0, 0, 2, 1, 0, 3].fill_(math.inf),
    "a score": lambda p: (p.scores[0, 1, 3].fill_(math.nan), p.scores[0, 1, 4].fill_(math.inf)),
    "a null key": lambda p: p.null_kv[0, 1, 0, 0, 1].fill_(math.inf),
    "a null value": lambda p: p.null_kv[1, 0, 1, 0, 0].fill_(math.nan),
    "a logit": lambda p: overflow(p, 1e200),
    "a logit to the other side": lambda p: overflow(p, -1e200),
}


def overflow(p: Problem, size: float) -> None:
    """Of the logits of one block; others, which see the same keys, have logits of 0: of large ones the rounding, which
    may differ from column to column, would be large.
    """
    p.kv[0, 0, :4, 0] = size
    p.q[0] = 0
    p.q[0, 0, 1] = 1e200


@EVERY_KERNEL
@pytest.mark.interpreted
@pytest.mark.parametrize("what", ODD)
def test_what_is_not_finite_is_seen_where_it_is_seen(kernels: str, what: str, device: torch.device) -> None:
    """NaN for the queries that see it, in all channels of the head; nothing of it for others, in no gradient."""
    p = problem(k=5)._replace(q_counts=torch.full((1, 2, 4), 2, dtype=torch.int32)).to(device)
    ODD[what](p)
    expected = run(p, "reference")
    assert 0 < expected[0].isnan().float().mean() < 1
    check_close(run(p, kernels), expected)


@EVERY_KERNEL
@pytest.mark.interpreted
def test_what_nobody_lists_may_hold_anything(kernels: str, device: torch.device) -> None:
    """Columns in no list, empty slots and their cotangent, and indices behind the count."""
    p = problem(blocks=5, k=3).to(device)
    g = draw(tuple(p.q.shape), "normal", 9).to(device)
    expected = run(p, kernels, g)
    n, filled = p.kv.shape[2], torch.arange(3, device=device) < p.q_counts.transpose(0, 1)[..., None]
    there = torch.arange(3, device=device) < p.counts[..., None]
    listed = torch.where(there, p.indices.long(), n).flatten(2)
    ever = torch.zeros(1, 2, n + 1, dtype=torch.bool, device=device).scatter(-1, listed, True)[..., :n]
    assert not ever.all()
    assert not filled.all()
    empty = ~filled[..., None, None]
    for value in (math.nan, 1e300) if kernels == "torch" else (math.nan,):
        dirty = p._replace(
            q=p.q.masked_fill(empty, value),
            kv=p.kv.masked_fill(~ever.transpose(0, 1)[..., None, None, None], value),
            scores=p.scores.masked_fill(~ever, value),
            indices=torch.where(there, p.indices, 2),
        )
        for name, a, e in zip(NAMES, run(dirty, kernels, g.masked_fill(empty, value)), expected):
            check_identical(a, e, name)


@EVERY_KERNEL
@pytest.mark.interpreted
def test_earlier_blocks_know_nothing_of_later_ones(kernels: str, device: torch.device) -> None:
    """Bit for bit: what later blocks list, hold and ask changes no result and no gradient of earlier ones."""
    p = problem(blocks=5, k=3, seed=4).to(device)
    g = draw(tuple(p.q.shape), "normal", 9).to(device)
    prior, block = 2, 3
    for j in (1, 3) if kernels == "torch" else (2,):
        asked = g.clone()
        asked[:, :, j:] = 0
        cut = prior + j * block
        out, dq, dkv, dscores, dnull = run(p, kernels, asked)
        logits = draw((1, 2, p.kv.shape[2]), "normal", 4)
        logits[..., cut:] = 5 + draw((1, 2, p.kv.shape[2] - cut), "normal", 8)
        valid = torch.rand(1, p.kv.shape[2], generator=generator(4)) < 0.8
        indices, counts = (t.to(device) for t in ops.memory(logits, valid, 3, block, prior, False))
        check_identical(indices[:, :, : j + 1], p.indices[:, :, : j + 1])
        assert not torch.equal(indices, p.indices)
        for value in (math.nan, 1e300, -2.0) if kernels == "torch" else (math.nan, -2.0):
            changed = Problem(*(t.clone() for t in p[:4]), indices, counts, p.q_counts)
            changed.q[:, :, j + 1 :] = value
            changed.kv[:, :, cut:] = value
            changed.scores[..., cut:] = value
            other = run(changed, kernels, asked)
            check_identical(other[0][:, :, : j + 1], out[:, :, : j + 1])
            check_identical(other[1][:, :, : j + 1], dq[:, :, : j + 1])
            check_identical(other[2][:, :, :cut], dkv[:, :, :cut])
            check_identical(other[3][..., :cut], dscores[..., :cut])
            check_identical(other[4], dnull)


@TRITON
@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(kernels: str, dtype: torch.dtype, device: torch.device) -> None:
    """Against the reference in float64 of the same numbers; the tails of tiles in use."""
    p = problem(blocks=3, block=9, k=20, slots=18, seed=5)
    floats = [t.to(dtype) for t in p[:4]]
    p = p._replace(q=floats[0], kv=floats[1], null_kv=floats[3], scores=p.scores.float()).to(device)
    found = run(p, kernels)
    exact = run(Problem(*(t.double() for t in p[:4]), *p[4:]), "reference")
    for name, a, e in zip(NAMES, found, exact):
        size = max(e.abs().max().item(), 1.0)
        assert ((a.double() - e).abs() <= 8 * torch.finfo(dtype).eps * size).all(), name


@EVERY_KERNEL
@pytest.mark.interpreted
def test_dropout_drops_as_many_as_it_says(kernels: str, device: torch.device) -> None:
    """By the mean of values that are 1: of a weight kept, 1 / (1 - p) of it; anew at every call."""
    p = problem(blocks=5, block=8, k=24, slots=8, dim=4, seed=6)
    ones = Problem(torch.zeros_like(p.q), torch.ones_like(p.kv), torch.ones_like(p.scores), *p[3:])
    ones.null_kv.fill_(1.0)
    ones = ones._replace(q_counts=torch.full_like(p.q_counts, 8)).to(device)
    torch.manual_seed(3)
    first, second = (ops.memory_attention(*ones, 0.25, kernels == "triton")[0] for _ in range(2))
    assert not torch.equal(first, second)
    for out in (first, second):
        weights = 1 + ones.counts.sum().item() / ones.counts.numel()
        several = out[:, :, 2:]  # blocks with more than a few keys
        spread = math.sqrt(0.25 / 0.75 / weights / several[..., 0].numel())
        assert abs(several.mean().item() - 1) <= 6 * spread
        kept = out[:, :, 0] * 0.75  # of the null key and at most two more
        assert ((kept * 6).round() - kept * 6).abs().max() <= 1e-6


@pytest.mark.parametrize("numbers", [1, 300])
def test_some_blocks_at_a_time(numbers: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch, dropout too: how many are gathered at once changes nothing."""
    from optimized.ops import memory_attention

    p = problem(seed=7).to(device)

    def both() -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        leaves = [t.clone().requires_grad_() for t in p[:4]]
        out = memory_attention(*leaves, *p[4:], 0.3, False)[0]
        return out.detach(), *torch.autograd.grad(out, leaves, draw(tuple(out.shape), "normal", 9).to(out))

    expected = both()
    monkeypatch.setattr(__import__("sys").modules["optimized.ops.memory_attention"], "NUMBERS", numbers)
    for name, a, e in zip(NAMES, both(), expected):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@TRITON
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_blocks_on_a_gpu(kernels: str, dtype: torch.dtype, device: torch.device) -> None:
    """Against PyTorch's form in float64 of the same numbers; twice the same bits."""
    p = problem(blocks=40, block=256, k=512, slots=128, dim=64, prior=100, seed=8)
    floats = [t.to(dtype) for t in p[:4]]
    p = p._replace(q=floats[0], kv=floats[1], null_kv=floats[3], scores=p.scores.float()).to(device)
    found, again = run(p, kernels), run(p, kernels)
    exact = run(Problem(*(t.double() for t in p[:4]), *p[4:]), "torch")
    for name, a, b, e in zip(NAMES, found, again, exact):
        check_identical(a, b, name)
        size = e.abs().max().item()
        assert ((a.double() - e).abs() <= 16 * torch.finfo(dtype).eps * size).all(), name
