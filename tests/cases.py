"""Every wrapper of `optimized.kernels`, once: its calls on inputs that are the same wherever they are computed, what is
right for them, and by how much a right result may differ from that. A new kernel brings one case.

A case is a generator. It yields the results of the wrappers by name, and then, to those who ask, what they must be: by
PyTorch in float64 from the very inputs, by another way where there is one. Its keyword arguments are its switches, what
may be present or absent. Who compiles, checks memory or other numbers of warps takes the results alone.

Integers, and what is only copied, must be equal. Of other results: a sum of T terms in whatever order, of which each
went through a few roundings, is off by at most (T + few) / 2 eps of the sum of their absolute values. Stored, it may be
one unit in the last place of its dtype off, since the interpreter cuts off what a GPU rounds.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from strategies import draw, generator
from torch import Tensor

EPSILONS = (0.3, 4.0, 0.7)  # of the solvers: eps, eps_init, eps_decay
SCALE = 8.0  # of cosine routing
EPS = 1e-3  # of a LayerNorm, not the usual
WINDOW = 3  # in which what is not finite is seen
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDE = DTYPES[:2]  # of routing, which computes in no less


class Sizes(NamedTuple):
    """Of the tensors of a call; a case reads those that it knows."""

    batch: int = 2
    n: int = 50  # tokens, or numbers of a row
    group: int = 2  # experts of each of two groups of rows
    steps: int = 20  # of the iterative solver
    dim: int = 64
    experts: int = 3
    ks: tuple[int, int] = (7, 11)  # slots of an expert, of queries and of keys
    heads: int = 3
    dim_head: int = 16
    length: int = 40  # queries of an expert
    positions: int = 50


class Truth(NamedTuple):
    """slack: by how much a result may differ, by element or for all; None: not at all."""

    value: Tensor
    slack: Tensor | float | None = None


Yielded = Iterator[dict[str, Any]]  # results, then their truths


def _shown(at: Tensor, n: int) -> Tensor:
    return (n - at) % 7 != 3


def as_it_is(t: Tensor) -> Tensor:
    return t


class Inputs:
    """Drawn on the CPU in float64, rounded to a dtype, on a device, laid out in memory by `lay`.

    weights: the dtype of parameters and of the combined result. blank: zeros, where no number matters. compared:
    results are held to their truths.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        weights: torch.dtype | None = None,
        lay: Callable[[Tensor], Tensor] = as_it_is,
        blank: bool = False,
        compared: bool = True,
    ):
        self.device, self.dtype, self.weights, self.lay, self.blank = device, dtype, weights or dtype, lay, blank
        self.compared = compared and not blank
        self.wide = torch.promote_types(dtype, torch.float32)
        self.eps = torch.finfo(self.wide).eps  # of the arithmetic

    def here(self, t: Tensor, wide: bool = False) -> Tensor:
        """In the dtype under test, or in that of its arithmetic."""
        return self.lay(t.to(self.device, self.wide if wide else self.dtype))

    def drawn(self, shape: tuple[int, ...], seed: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64) if self.blank else draw(shape, "normal", seed)

    def normal(self, *shape: int, seed: int, wide: bool = False) -> Tensor:
        return self.here(self.drawn(shape, seed), wide)

    def weight(self, *shape: int, seed: int) -> Tensor:
        return self.lay(self.drawn(shape, seed).to(self.device, self.weights))

    def packed(self, *shape: int, seed: int) -> Tensor:
        """Whose last stride is 1, as some wrappers ask."""
        t = self.drawn(shape, seed).to(self.device, self.dtype)
        return next(laid for laid in (self.lay(t.mT).mT, self.lay(t), t) if laid.stride(-1) == 1)

    def mask(self, s: Sizes) -> Tensor:
        """(B, N): of seven tokens one is masked, but not the last."""
        return self.lay(_shown(torch.arange(s.n), s.n).expand(s.batch, -1).contiguous().to(self.device))

    def routing(self, s: Sizes) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Indices, slots and inverse map of both groups. Some slots are masked, those of masked tokens among them; the
        last expert takes the last token.
        """
        found = []
        for k in s.ks:
            g = generator(10 + k)
            indices = torch.rand(s.batch, s.experts, s.n, generator=g).argsort(-1)[..., :k].sort(-1).values
            slots = torch.rand(s.batch, s.experts, indices.shape[-1], generator=g) < 0.8
            indices[:, -1, -1], slots[:, -1, -1] = s.n - 1, True
            slots &= _shown(indices, s.n)
            made = indices, slots, inverse_map(indices, slots, s.n)
            found.append(tuple(self.lay(t.to(self.device)) for t in made))
        return found

    def truth(self, value: Tensor, terms: Tensor | float, count: int, stored: torch.dtype | None = None) -> Truth:
        """Sums of so many terms, whose absolute values sum to `terms`, through a dozen roundings more."""
        last = torch.finfo(stored or self.dtype)
        rounded = last.eps * (value.double().abs() + last.smallest_normal)
        roundings = (count + 12) / 2 * self.eps * terms
        # In float64 the truth rounds, too.
        return Truth(value, roundings * (2 if self.dtype == torch.float64 else 1) + rounded)


class Case(NamedTuple):
    """family: rows, channels or heads; which of the sizes matter most."""

    family: str
    switches: tuple[str, ...]
    run: Callable[..., Yielded]

    def results(self, x: Inputs, s: Sizes, **switches: bool) -> dict[str, Tensor]:
        return next(self.run(x, s, **switches))

    def differences(self, x: Inputs, s: Sizes, **switches: bool) -> list[str]:
        """Results that are wrong, in words."""
        return differences(*self.run(x, s, **switches))


CASES: dict[str, Case] = {}  # by file of optimized/kernels


def case(family: str) -> Callable[[Callable[..., Yielded]], Callable[..., Yielded]]:
    def enter(run: Callable[..., Yielded]) -> Callable[..., Yielded]:
        parameters = inspect.signature(run).parameters.values()
        CASES[run.__name__] = Case(family, tuple(p.name for p in parameters if p.kind == p.KEYWORD_ONLY), run)
        return run

    return enter


# Settings of so many switches.


def all_on(count: int) -> Iterable[tuple[bool, ...]]:
    return [(True,) * count]


def on_and_off(count: int) -> Iterable[tuple[bool, ...]]:
    return [(False,) * count, (True,) * count]


def one_by_one(count: int) -> Iterable[tuple[bool, ...]]:
    """None, each alone, all."""
    alone = [tuple(i == j for j in range(count)) for i in range(count)]
    return dict.fromkeys([(False,) * count, *alone, (True,) * count])


def combinations(count: int) -> Iterable[tuple[bool, ...]]:
    return itertools.product((False, True), repeat=count)


Settings = Callable[[int], Iterable[tuple[bool, ...]]]


def each(families: Iterable[str], settings: Settings) -> Iterator[tuple[str, Case, dict[str, bool]]]:
    """Name, case and switches."""
    for name, found in CASES.items():
        if found.family in families:
            for values in settings(len(found.switches)):
                yield name, found, dict(zip(found.switches, values))


# What a GPU runs in every dtype: family, sizes, dtypes.
ORDINARY: dict[str, tuple[str, Sizes, tuple[torch.dtype, ...]]] = {
    "rows of 1": ("rows", Sizes(n=1, steps=3), WIDE),
    "rows of 300": ("rows", Sizes(n=300), WIDE),
    "rows of 2500": ("rows", Sizes(n=2500, batch=1, steps=5), WIDE),
    "1 channel": ("channels", Sizes(dim=1), DTYPES[1:3]),
    "100 channels": ("channels", Sizes(dim=100), DTYPES),
    "20 experts": ("channels", Sizes(dim=70, experts=20), DTYPES[1:3]),
    "heads": ("heads", Sizes(dim_head=10), DTYPES),
    "wide heads": ("heads", Sizes(heads=2, dim_head=128), DTYPES[1:3]),
}
# Small enough to be interpreted.
SMALL = Sizes(batch=1, n=17, group=1, steps=5, dim=20, experts=2, ks=(4, 3), heads=2, dim_head=10, length=5)


def differences(actual: dict[str, Tensor], expected: dict[str, Truth]) -> list[str]:
    """What is beyond its slack, or has NaN where the other has none, in words."""
    assert actual.keys() == expected.keys()
    found = []
    for name, value in actual.items():
        other, slack = expected[name]
        assert (value.shape, value.is_floating_point()) == (other.shape, other.is_floating_point()), name
        a, b = value.detach().double(), other.detach().to(value.device).double()
        nan = a.isnan()
        if not torch.equal(nan, b.isnan()):
            found.append(f"{name}: NaN in other places")
            continue
        apart = torch.where((a == b) | nan, 0.0, (a - b).abs())  # infinities are equal
        bound = torch.zeros_like(apart) + (0.0 if slack is None else slack)
        bad = ~(apart <= bound)
        if bad.any():
            at = tuple(bad.nonzero()[0].tolist())
            what = f"{int(bad.sum())} of {a.numel()} elements"
            found.append(f"{name}: {what}, at {at} {a[at].item()} and {b[at].item()}, allowed {bound[at].item():.2g}")
    return found


def size_of(t: Tensor) -> float:
    return t.double().abs().max().item()


def sums(form: Callable[..., Tensor], inputs: list[Tensor], g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Result and gradients of a form that is linear in each input, each with the sum of its terms' absolute values.

    All else that the form multiplies by is positive.
    """
    found = []
    for size in (False, True):
        given = [(t.double().abs() if size else t.double()).detach().requires_grad_() for t in inputs]
        out = form(*given)
        found.append((out.detach(), *torch.autograd.grad(out, given, g.double().abs() if size else g.double())))
    return list(zip(*found))


# --- rows ------------------------------------------------------------------------------------------------------------


def inverse_map(indices: Tensor, slots: Tensor, n: int) -> Tensor:
    """(B, E, N) int32: the slot that holds a token, or -1."""
    places = torch.where(slots, torch.arange(indices.shape[-1], device=indices.device, dtype=torch.int32), -1)
    return places.new_full((*indices.shape[:2], n), -1).scatter_(-1, indices, places)


def best(logits: Tensor, shown: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, slots and inverse map of the k best: valid before masked, the larger (NaN last), the first.

    In slots by index, masked ones last.
    """
    shown = shown[:, None].expand_as(logits)
    order = torch.where(shown & ~logits.isnan(), logits, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, (~shown.gather(-1, order)).byte().argsort(dim=-1, stable=True))
    indices = order[..., :k].sort(-1).values
    indices = indices.gather(-1, (~shown.gather(-1, indices)).byte().argsort(dim=-1, stable=True))
    slots = shown.gather(-1, indices)
    return indices, slots, inverse_map(indices, slots, logits.shape[-1])


def _mask(x: Inputs, s: Sizes, masked: bool) -> tuple[Tensor | None, Tensor]:
    """What a wrapper is given, and which tokens are shown."""
    mask = x.mask(s) if masked else None
    return mask, torch.ones(s.batch, s.n, dtype=torch.bool, device=x.device) if mask is None else mask


def _ks(n: int) -> tuple[int, int]:
    return max(n // 3, 1), max(n // 5, 1)


@case("rows")
def selection(x: Inputs, s: Sizes, *, masked: bool) -> Yielded:
    from optimized.kernels import selection as kernel

    yield from _selected(x, s, masked, kernel.select_groups, kernel.select)


@case("rows")
def long_selection(x: Inputs, s: Sizes, *, masked: bool) -> Yielded:
    from optimized.kernels import long_selection as kernel

    def select(logits: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, ...]:
        return kernel.select_long(logits, mask, (k,), None)[0][:3]

    yield from _selected(x, s, masked, kernel.select_long, select)


def _selected(
    x: Inputs, s: Sizes, masked: bool, select_groups: Callable[..., Any], select: Callable[..., Any]
) -> Yielded:
    mask, shown = _mask(x, s, masked)
    logits = x.normal(s.batch, 2 * s.group, s.n, seed=s.n)
    tied = x.lay(logits.round())
    tied[0, 1, -1] = torch.nan
    found, parts = {}, ("indices", "slots", "inverse", "picked")
    given: dict[str, tuple[Tensor, Tensor | None, bool]] = {  # scores, and whether they are sigmoids
        "": (logits, logits, False),
        "of ties ": (tied, logits, False),
        "of ones ": (tied, None, False),
        "of sigmoids ": (tied, None, True),
    }
    for name, (row, scores, own) in given.items():
        unit = scores is None and not own
        for side, made in zip(("q", "kv"), select_groups(row, mask, _ks(s.n), scores, unit, own)):
            found |= {f"{part} {name}{side}": t for part, t in zip(parts, made)}
    few = sorted({1, s.n // 2 or 1, s.n})
    for k in few:
        found |= {f"{part} of {k}": t for part, t in zip(parts, select(tied, mask, k))}
    yield found
    truths = {}
    for name, (row, scores, own) in given.items():
        poisoned = (row.isnan() & shown[:, None]).any(-1, keepdim=True) & (not own)
        weight = row.double().sigmoid() if own else torch.ones_like(row) if scores is None else scores
        for side, k, *halves in zip(("q", "kv"), _ks(s.n), *(t.chunk(2, 1) for t in (row, weight, poisoned))):
            made = best(halves[0], shown, k)
            picked = torch.where(made[1], halves[1].gather(-1, made[0]), 0).masked_fill(halves[2], torch.nan)
            truths |= {f"{part} {name}{side}": Truth(t) for part, t in zip(parts, (*made, picked))}
            if own:
                slack = 8 * x.eps * (4 + size_of(logits))
                truths[f"picked {name}{side}"] = Truth(picked, slack)
    for k in few:
        truths |= {f"{part} of {k}": Truth(t) for part, t in zip(parts, best(tied, shown, k))}
    yield truths


def _blocks(n: int) -> Iterator[tuple[int, int, int]]:
    """Of n columns: K, length of a block, columns before any. Few blocks and many, K small and large."""
    for k, parts in ((max(n // 3, 1), 3), (min(n, 7), 9)):
        width = max(n // parts, 1)
        yield k, width, n % width


def remembered(
    logits: Tensor, shown: Tensor, k: int, width: int, prior: int, until: int | None = None
) -> tuple[Tensor, Tensor]:
    """Indices and counts of the k best before each block that begins before `until` (default: the last column's end):
    number before NaN, the larger, the later."""
    ranked = (
        torch.where(logits.isnan(), -torch.inf, logits + 0.0).flip(-1).argsort(dim=-1, descending=True, stable=True)
    )
    order = logits.shape[-1] - 1 - ranked
    order = order.gather(-1, logits.isnan().gather(-1, order).byte().argsort(dim=-1, stable=True))
    indices, counts = [], []
    for end in range(prior, until or logits.shape[-1], width):
        there = (order < end) & shown[:, None].expand_as(logits).gather(-1, order)
        chosen = there & (there.cumsum(-1) <= k)
        columns = torch.where(chosen, order, logits.shape[-1]).sort(-1).values[..., :k]
        indices.append(torch.where(columns < logits.shape[-1], columns, 0).int())
        counts.append(chosen.sum(-1).int())
    return torch.stack(indices, 2), torch.stack(counts, 2)


@case("rows")
def memory(x: Inputs, s: Sizes, *, masked: bool) -> Yielded:
    from optimized.kernels import memory as kernel

    mask, shown = _mask(x, s, masked)
    logits = x.normal(s.batch, 2 * s.group, s.n, seed=s.n)
    tied = x.lay(logits.round())
    tied[0, 1, -1] = torch.nan
    given = [(row, *sizes) for row in (logits, tied) for sizes in _blocks(s.n)]
    found = [kernel.memory(row, mask, *sizes) for row, *sizes in given]
    yield {f"{name} {i}": t for i, made in enumerate(found) for name, t in zip(("indices", "counts"), made)}
    truths = [remembered(row, shown, *sizes) for row, *sizes in given]
    yield {f"{name} {i}": Truth(t) for i, made in enumerate(truths) for name, t in zip(("indices", "counts"), made)}


@case("rows")
def candidates(x: Inputs, s: Sizes, *, masked: bool) -> Yielded:
    from optimized.kernels import candidates as kernel

    mask, shown = _mask(x, s, masked)
    rows = x.normal(s.batch, 2 * s.group, s.n, seed=s.n).mul(4).round().div(4)
    rows[0, 1, -1] = torch.nan
    first = x.normal(s.batch, 2 * s.group, seed=3, wide=True).to(rows.dtype)
    names = ("indices", "slots", "inverse", "thresholds", "counts")
    given = [(min(k, width), max(width // 2, 1), width, s.n // width * width) for k, width, _ in _blocks(s.n)]
    cut = [(x.lay(rows[..., :n].contiguous()), None if mask is None else mask[:, :n]) for *_, n in given]
    firsts = first, None
    found = [kernel.candidates(row, m, f, *sizes) for (row, m), f, (*sizes, _) in zip(cut, firsts, given)]
    yield {f"{name} {i}": t for i, made in enumerate(found) for name, t in zip(names, made)}
    truths: dict[str, Truth] = {}
    for i, (f, (kq, capacity, width, n)) in enumerate(zip(firsts, given)):
        skipped = 1 if f is None else 0
        blocks = rows[..., :n].unflatten(-1, (n // width, width))
        there = shown[:, None, :n].expand(*rows.shape[:2], n).reshape(blocks.shape)
        number = there & ~blocks.isnan()
        best = torch.where(number, blocks + 0.0, -torch.inf).sort(-1, descending=True).values[..., kq - 1]
        begin = torch.full_like(first, torch.nan) if f is None else f
        limits = torch.cat((begin[..., None], torch.where(number.sum(-1) >= kq, best, torch.nan)[..., :-1]), -1)
        reach = there & (blocks >= limits[..., None])
        slot = torch.where(reach & (reach.cumsum(-1) <= capacity), reach.cumsum(-1) - 1, capacity)
        indices = torch.zeros(*slot.shape[:3], capacity + 1, dtype=torch.int64, device=slot.device)
        indices.scatter_(-1, slot, torch.arange(n, device=slot.device).view(-1, width).expand_as(slot))
        counts = reach.sum(-1).clamp_max(capacity).int()
        slots = torch.arange(capacity, device=slot.device) < counts[..., None]
        starts = capacity * (torch.arange(n // width, device=slot.device) - skipped)[:, None]
        inverse = torch.where(slot < capacity, starts + slot, -1).int().flatten(2)
        indices = torch.where(slots, indices[..., :capacity], 0)
        made = indices[:, :, skipped:], slots[:, :, skipped:], inverse, limits, counts[:, :, skipped:]
        truths |= {f"{name} {i}": Truth(t) for name, t in zip(names, made)}
    yield truths


@case("rows")
def memory_places(x: Inputs, s: Sizes) -> Yielded:
    from optimized.kernels import memory_places as kernel

    logits = draw((s.batch, 2 * s.group, s.n), "normal", s.n)
    shown = torch.ones(s.batch, s.n, dtype=torch.bool)
    lists = [
        remembered(logits, shown, k, width, prior) for k, width, prior in (*_blocks(s.n), (s.n, (s.n + 1) // 2, 0))
    ]
    given = [tuple(x.lay(t.to(x.device)) for t in pair) for pair in lists]
    spans = 2, *[s.n + 1] * (len(lists) - 1)  # longer than all lists: places are never given anew
    yield {f"places {i}": kernel.memory_places(*pair, s.n, span) for i, (pair, span) in enumerate(zip(given, spans))}
    truths = {}
    for i, ((indices, counts), span) in enumerate(zip(lists, spans)):
        places = torch.full_like(indices, -1)
        for row in itertools.product(*map(range, indices.shape[:2])):
            held: dict[int, int] = {}
            for j, count in enumerate(counts[row].tolist()):
                listed = indices[row][j, :count].tolist()
                held = {} if j % span == 0 else held
                gone = held.keys() - set(listed)
                free = iter([held[t] for t in sorted(gone)] + list(range(len(held), count)))
                held = {t: held[t] if t in held else next(free) for t in listed}
                columns = dict(zip(held.values(), held))
                places[row][j, :count] = torch.tensor([columns[place] for place in range(count)], dtype=torch.int32)
        truths[f"places {i}"] = Truth(places)
    yield truths


@case("rows")
def admitted(x: Inputs, s: Sizes) -> Yielded:
    from optimized.kernels import admitted as kernel

    logits = draw((s.batch, 2 * s.group, s.n), "normal", s.n)
    shown = torch.rand(s.batch, s.n, generator=generator(s.n)) < 0.9
    shown[:, 0] = False
    # Also the list of a block that begins behind the last column, as of a sequence that goes on; lists of a power of 2.
    blocks = [(k, width, first) for k, width, prior in _blocks(s.n) for first in sorted({width, prior, 2 * width + 1})]
    blocks = [block for block in blocks if block[2] <= s.n]  # else there is no list
    blocks.append((4, max(s.n // 4, 1), 1))
    given, found = [], []
    for i, (k, width, prior) in enumerate(blocks):
        indices, counts = remembered(logits, shown, k, width, prior, s.n + 1)
        last = (prior - 1 + width * torch.arange(indices.shape[2], dtype=torch.int32))[:, None]
        indices = torch.where(torch.arange(indices.shape[-1]) < counts[..., None], indices, last)  # not listed there
        given.append((indices, counts))
        with mock.patch.object(kernel, "LANES", kernel.LANES if i else 2):  # of few lists and columns, too
            found.append(kernel.admitted(*(x.lay(t.to(x.device)) for t in given[-1]), s.n, width, prior))
    places, results, truths = torch.arange(s.n), {}, {}
    for i, (listed, (indices, counts)) in enumerate(zip(found, given)):
        there = torch.arange(indices.shape[-1]) < counts[..., None]
        at = torch.where(there, indices.long(), s.n).flatten(2)
        ever = torch.zeros(*at.shape[:2], s.n + 1, dtype=torch.bool).scatter_(-1, at, True)[..., : s.n]
        order = (~ever).byte().argsort(dim=-1, stable=True)
        inside = places < ever.sum(-1, keepdim=True)
        columns = listed.columns.masked_fill(~inside.to(x.device), -1)  # beyond them anything
        results |= {f"columns {i}": columns, f"totals {i}": listed.totals, f"inverse {i}": listed.inverse}
        truths[f"columns {i}"] = Truth(torch.where(inside, order, -1).int())
        truths[f"totals {i}"] = Truth(ever.sum(-1, dtype=torch.int32))
        truths[f"inverse {i}"] = Truth(torch.where(ever, places, -1).int())
    yield results
    yield truths


def descend(s: Tensor, shown: Tensor, k: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, iterates (T, B, R) and counts of the iterative solver; k (R)."""
    temperatures = [max(EPSILONS[1] * EPSILONS[2] ** t, EPSILONS[0]) for t in range(steps + 1)]
    hidden = ~shown[:, None].expand_as(s)
    s, u = (t.masked_fill(hidden, -torch.inf) for t in (s, torch.zeros_like(s)))
    iterates, counts = [], [torch.zeros_like(s[..., 0])]
    for t, eps in enumerate(temperatures[:-1]):
        if t > 0:
            bound = -iterates[-1][..., None]
            counts.append((s >= bound).sum(-1))
            u = torch.minimum(s, bound)
        total = (u / eps).logsumexp(-1)
        iterates.append(torch.where(total == -torch.inf, 0.0, eps * (k.log() - total)))
    scores = ((s + iterates[-1][..., None]) / temperatures[-1]).clamp_max(0).exp()
    return scores, torch.stack(iterates), torch.stack([c.to(s.dtype) for c in counts])


def cap(s: Tensor, shown: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, threshold and offset of the exact solver: saturates until none is left to be. More tokens than k."""
    eps, s = EPSILONS[0], s.masked_fill(~shown[:, None], -torch.inf)
    free = s > -torch.inf
    while True:
        left = k - ((s > -torch.inf) & ~free).sum(-1)
        total = (s / eps).masked_fill(~free, -torch.inf).logsumexp(-1)
        a = torch.where(total == -torch.inf, 0.0, eps * (left.log() - total))[..., None]
        more = free & (s + a >= 0)
        if not more.any():
            return (
                torch.where(free, ((s + a) / eps).exp(), s > -torch.inf),
                s.masked_fill(~free, -torch.inf).amax(-1),
                a,
            )
        free = free & ~more


TRIES = 1000  # of logits far from every kink: in float32 some thousand of them never are


class Rows(NamedTuple):
    """Logits of two groups with a mass each, and gradients: of all scores, and of the picked ones by inverse maps."""

    exact: Tensor  # the logits, in float64
    logits: Tensor
    mask: Tensor | None
    shown: Tensor
    masses: tuple[float, float]
    k: Tensor  # (R)
    g: Tensor
    grads: tuple[Tensor, ...]
    inverses: tuple[Tensor, ...]

    def poisoned(self) -> Tensor:
        """Logits with a NaN in a row, at the last token."""
        out = self.logits.clone()
        out[0, 0, -1] = torch.nan
        return out

    def scattered(self) -> Tensor:
        """The gradient of the picked scores as one of all."""
        pairs = zip(self.grads, self.inverses)
        return torch.cat([torch.where(i >= 0, g.double().gather(-1, i.clamp_min(0).long()), 0) for g, i in pairs], 1)


def _rows(x: Inputs, s: Sizes, masked: bool) -> Rows:
    """The first draw of logits of which none lies close to a kink of either solver: there rounding decides."""
    mask, shown = _mask(x, s, masked)
    masses = 0.4 * s.n, max(0.2 * s.n, 0.6)
    k = torch.tensor(masses, dtype=torch.float64, device=x.device).repeat_interleave(s.group)
    for seed in range(TRIES):
        logits = x.normal(s.batch, 2 * s.group, s.n, seed=1000 * seed + s.n)
        exact = logits.double()
        if not x.compared:
            break
        offsets = descend(exact, shown, k, s.steps)[1].unsqueeze(-1), cap(exact, shown, k)[2]
        near = (exact + torch.cat((offsets[0], offsets[1][None]))).abs().amin(-1)
        if near.min() > 100 * x.eps:
            break
    else:
        raise AssertionError(f"none of {TRIES} draws of {s.n} logits keeps clear of the kinks in {x.dtype}")
    g = x.normal(s.batch, 2 * s.group, s.n, seed=1)
    grads = tuple(x.normal(s.batch, s.group, width, seed=2 + i) for i, width in enumerate(_ks(s.n)))
    inverses = tuple(x.lay(best(t, shown, width)[2]) for t, width in zip(exact.chunk(2, 1), _ks(s.n)))
    return Rows(exact, logits, mask, shown, masses, k, g, grads, inverses)


def _slack(x: Inputs, p: Rows) -> float:
    """Each step adds a few roundings of numbers as large as logits and temperature, which the next ones forget."""
    return 32 * x.eps * (4 + size_of(p.exact)) / EPSILONS[0]


def _scored(x: Inputs, p: Rows, scores: Tensor) -> dict[str, Truth]:
    nan = p.poisoned().isnan().any(-1)[..., None] & p.shown[:, None]
    slack = _slack(x, p)
    return {"scores": Truth(scores, slack), "scores of NaN": Truth(scores.masked_fill(nan, torch.nan), slack)}


def _solved(x: Inputs, p: Rows, scores: Tensor, leaf: Tensor, masked: bool) -> dict[str, Truth]:
    """Scores and gradients."""
    dense, picked = (torch.autograd.grad(scores, leaf, g, retain_graph=True)[0] for g in (p.g.double(), p.scattered()))
    slack = _slack(x, p)
    return {
        **_scored(x, p, scores),
        "gradient": Truth(dense, slack * size_of(p.g)),
        "picked gradient": Truth(picked + p.g.double() if masked else picked, slack * size_of(p.g)),
    }


@case("rows")
def coordinate_descent(x: Inputs, s: Sizes, *, masked: bool) -> Yielded:
    from optimized.kernels import coordinate_descent as kernel

    p = _rows(x, s, masked)
    leaf = p.exact.clone().requires_grad_()
    scores, a, counts = descend(leaf, p.shown, p.k, s.steps)
    # What the backward is handed is made here, so that only its own roundings count.
    saved = [x.here(t.detach()) for t in (scores, a, counts)]
    found = kernel.coordinate_descent(p.logits, p.mask, p.masses, s.steps, *EPSILONS)
    poisoned = kernel.coordinate_descent(p.poisoned(), p.mask, p.masses, s.steps, *EPSILONS)[0]
    rest = p.logits, p.mask, *saved, p.masses, *EPSILONS
    yield {
        **dict(zip(("scores", "a", "counts", "scores of NaN"), (*found, poisoned))),
        "gradient": kernel.coordinate_descent_backward(p.g, *rest),
        "picked gradient": kernel.coordinate_descent_picked_backward(
            p.grads, p.inverses, p.g if masked else None, p.logits, p.mask, tuple(saved), p.masses, EPSILONS
        ),
    }
    slack = 32 * x.eps * (4 + size_of(p.exact))
    yield {**_solved(x, p, scores, leaf, masked), "a": Truth(a, slack), "counts": Truth(counts)}


@case("rows")
def long_descent(x: Inputs, s: Sizes, *, masked: bool) -> Yielded:
    from optimized.kernels import long_descent as kernel

    p = _rows(x, s, masked)
    cold, hot, cooling = EPSILONS
    temperatures = [max(hot * cooling**t, cold) for t in range(s.steps + 1)]
    scores, a, counts = descend(p.exact, p.shown, p.k, s.steps)
    found = kernel.descend_long(p.logits, p.mask, p.masses, s.steps, temperatures)
    poisoned = kernel.descend_long(p.poisoned(), p.mask, p.masses, s.steps, temperatures)[0]
    yield dict(zip(("scores", "a", "counts", "scores of NaN"), (*found, poisoned)))
    slack = 32 * x.eps * (4 + size_of(p.exact))
    yield {**_scored(x, p, scores), "a": Truth(a, slack), "counts": Truth(counts)}


@case("rows")
def capped_simplex(x: Inputs, s: Sizes, *, masked: bool) -> Yielded:
    from optimized.kernels import capped_simplex as kernel

    p = _rows(x, s, masked)
    leaf = p.exact.clone().requires_grad_()
    scores, threshold, _ = cap(leaf, p.shown, p.k)
    found = kernel.capped_simplex(p.logits, p.mask, p.masses, EPSILONS[0])
    poisoned = kernel.capped_simplex(p.poisoned(), p.mask, p.masses, EPSILONS[0])[0]
    rest = p.logits, p.mask, *(x.here(t.detach()) for t in (scores, threshold)), EPSILONS[0]
    yield {
        **dict(zip(("scores", "threshold", "scores of NaN"), (*found, poisoned))),
        "gradient": kernel.capped_simplex_backward(p.g, *rest),
        "picked gradient": kernel.capped_simplex_picked_backward(p.grads, p.inverses, p.g if masked else None, *rest),
    }
    yield {**_solved(x, p, scores, leaf, masked), "threshold": Truth(threshold)}


@case("rows")
def sigmoid(x: Inputs, s: Sizes, *, masked: bool) -> Yielded:
    from optimized.kernels import sigmoid as kernel

    p = _rows(x, s, masked)
    dlogits = p.g if masked else None
    yield {
        "picked gradient": kernel.sigmoid_picked_backward(p.grads, p.inverses, dlogits, p.logits),
        "picked gradient of NaN": kernel.sigmoid_picked_backward(p.grads, p.inverses, None, p.poisoned()),
    }
    leaf = p.exact.clone().requires_grad_()
    (picked,) = torch.autograd.grad(leaf.sigmoid(), leaf, p.scattered())
    nan = p.poisoned().isnan() & (torch.cat(p.inverses, 1) >= 0)
    # An exponential is of a rounded multiple of the logit.
    slack = 8 * x.eps * (4 + size_of(p.exact)) * size_of(p.g)
    yield {
        "picked gradient": Truth(picked + p.g.double() if masked else picked, slack),
        "picked gradient of NaN": Truth(picked.masked_fill(p.poisoned().isnan(), 0).masked_fill(nan, torch.nan), slack),
    }


# --- channels --------------------------------------------------------------------------------------------------------


def gathered(t: Tensor, indices: Tensor, slots: Tensor) -> Tensor:
    """Rows (E, B, K, D) of t (B, N, D); 0 in masked slots."""
    batch = torch.arange(len(t), device=t.device)[None, :, None]
    return t[batch, indices.transpose(0, 1)] * slots.transpose(0, 1)[..., None]


def collected(rows: Tensor, inverse: Tensor) -> Tensor:
    """(B, N, D): the sum over experts of what they have for a token."""
    at = inverse.transpose(0, 1)[..., None]
    return torch.where(at >= 0, rows.gather(2, at.clamp_min(0).long().expand(*at.shape[:3], rows.shape[-1])), 0).sum(0)


class Tokens(NamedTuple):
    """Tokens and who took them, and the router that scored them."""

    x: Tensor  # (B, N, D)
    norms: Tensor
    routing: list[tuple[Tensor, Tensor, Tensor]]
    gammas: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]  # of the rows
    dots: Tensor  # <gamma g, x> of every row, by two blocks of channels
    r: Tensor  # (E, D)
    g: Tensor  # of the logits

    def rates(self, cosine: bool) -> Tensor:
        """(B, E, N), what the products of tokens and routing tokens are multiplied by."""
        if not cosine:
            return torch.ones_like(self.g, dtype=torch.float64)
        return SCALE / (self.r.double().norm(dim=-1)[:, None] * self.x.double().norm(dim=-1)[:, None])

    def products(self, index: int, gamma: Tensor, x: Tensor) -> Tensor:
        """Of the gradient of every row, gamma and the token: (E, B, K, D)."""
        return self.gradients[index].double() * gamma[:, None, None] * gathered(x, *self.routing[index][:2])


def _tokens(x: Inputs, s: Sizes) -> Tokens:
    tokens = x.normal(s.batch, s.n, s.dim, seed=s.dim)
    routing = x.routing(s)
    gammas = tuple(x.weight(s.experts, s.dim, seed=4 + i) for i in range(2))
    gradients = tuple(x.normal(s.experts, s.batch, r[0].shape[-1], s.dim, seed=6 + i) for i, r in enumerate(routing))
    r, g = x.weight(s.experts, s.dim, seed=8), x.normal(s.batch, s.experts, s.n, seed=9, wide=True)
    norms = x.here(tokens.double().norm(dim=-1), wide=True)
    made = Tokens(tokens, norms, routing, gammas, gradients, norms, r, g)
    products = [made.products(i, gamma.double(), tokens.double()).flatten(0, 2) for i, gamma in enumerate(gammas)]
    halves = torch.cat(products).tensor_split(2, -1)
    return made._replace(dots=x.here(torch.stack([half.sum(-1) for half in halves]), wide=True))


def _normed(x: Tensor, gamma: Tensor, indices: Tensor, slots: Tensor) -> Tensor:
    norms = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return gathered(x / norms * x.shape[-1] ** 0.5, indices, slots) * gamma[:, None, None]


def _logits(x: Tensor, r: Tensor, shown: Tensor, cosine: bool) -> Tensor:
    if cosine:
        x, r = x / x.norm(dim=-1, keepdim=True), SCALE * r / r.norm(dim=-1, keepdim=True)
    return torch.einsum("bnd,ed->ben", x, r) * shown[:, None]


@case("channels")
def gather_norm(x: Inputs, s: Sizes, *, norm: bool) -> Yielded:
    from optimized.kernels import gather_norm as kernel

    p, sides = _tokens(x, s), ("q", "kv")
    taken = tuple(kernel.Taken(*r[:2], gamma if norm else None) for r, gamma in zip(p.routing, p.gammas))
    found = {"norms": kernel.token_norms(p.x)}
    found |= zip(("rows q", "rows kv"), kernel.gather_norm(p.x, p.norms if norm else None, taken))
    if norm:
        dgammas, dots = kernel.slot_gradients(p.x, p.norms, taken, p.gradients)
        found |= {"dots": dots.sum(0), **{f"dgamma {side}": d for side, d in zip(sides, dgammas)}}
    yield found
    wide = p.x.double()
    truths = {"norms": x.truth(wide.norm(dim=-1), wide.norm(dim=-1), s.dim, x.wide)}
    dots = []
    for i, (side, (indices, slots, _), gamma) in enumerate(zip(sides, p.routing, p.gammas)):
        if not norm:
            truths[f"rows {side}"] = Truth(gathered(p.x, indices, slots))
            continue
        leaf = gamma.double().requires_grad_()
        made = _normed(wide, leaf, indices, slots)
        (dgamma,) = torch.autograd.grad(made, leaf, p.gradients[i].double())
        terms = (p.gradients[i].double() * _normed(wide, torch.ones_like(leaf), indices, slots)).abs().sum((1, 2))
        truths[f"rows {side}"] = x.truth(made, made.abs(), 0)
        truths[f"dgamma {side}"] = x.truth(dgamma, terms, s.batch * s.ks[i], x.weights)
        dots.append(p.products(i, gamma.double(), wide).flatten(0, 2))
    if norm:
        products = torch.cat(dots)
        truths["dots"] = x.truth(products.sum(-1), products.abs().sum(-1), s.dim, x.wide)
    yield truths


@case("channels")
def router_logits(x: Inputs, s: Sizes, *, masked: bool, cosine: bool) -> Yielded:
    from optimized.kernels import router_logits as kernel

    p, (mask, shown) = _tokens(x, s), _mask(x, s, masked)
    logits, norms, factors = kernel.router_logits(p.x, p.r, mask, SCALE if cosine else None)
    found = {"logits": logits, **({"norms": norms * shown, "factors": factors} if cosine else {})}
    exact, leaf = p.x.double(), p.r.double().requires_grad_()
    made, lengths = _logits(exact, leaf, shown, cosine), leaf.detach().norm(dim=-1)
    handed = (SCALE / lengths).expand(s.batch, -1) if cosine else exact.new_empty(s.batch, 0)
    saved = p.norms, x.here(handed, wide=True)
    found["dr"] = kernel.routing_token_gradient(p.g, p.x, p.r, mask, *saved)
    halves = p.r.chunk(2) if s.experts % 2 == 0 else (p.r,)
    found["dr of halves"] = torch.cat(kernel.routing_token_gradients(p.g, p.x, halves, mask, *saved))
    short = 1e-14 * p.r / p.r.norm(dim=-1, keepdim=True)  # of any number of channels
    short[0] = 0
    found["dr of no direction"] = kernel.routing_token_gradient(p.g, p.x, short, mask, *saved)
    yield found
    rates = p.rates(cosine) * shown[:, None]
    (_, terms), (_, around) = sums(lambda r: torch.einsum("bnd,ed->ben", exact.abs(), r) * rates, [p.r], p.g)
    truths = {"logits": x.truth(made, terms, s.dim, x.wide)}
    # For bfloat16 a GPU cuts one factor to TF32, the interpreter does not.
    coarse = 2**-11 if x.dtype == x.weights == torch.bfloat16 else 0.0
    whole = x.truth(torch.einsum("ben,bnd->ed", p.g.double() * rates, exact), around, s.batch * s.n, x.weights)
    truths["dr of no direction"] = Truth(whole.value, whole.slack + coarse * around)
    if cosine:
        truths["norms"] = x.truth(exact.norm(dim=-1) * shown, exact.norm(dim=-1), s.dim, x.wide)
        truths["factors"] = x.truth(handed, handed, s.dim, x.wide)
        moments = (p.g.double() * made.detach()).abs().sum((0, 2))
        around = around + moments[:, None] * leaf.detach().abs() / lengths.square()[:, None]
    (dr,) = torch.autograd.grad(made, leaf, p.g.double())
    truth = x.truth(dr, around, s.batch * s.n, x.weights)
    truth = Truth(dr, truth.slack + coarse * around)
    yield {**truths, "dr": truth, "dr of halves": truth}


def _routed(x: Inputs, p: Any, shown: Tensor, cosine: bool, exact: Tensor) -> tuple[Tensor, Any]:
    """Logits of tokens that may have a gradient, and what a kernel is given of them."""
    from optimized.kernels.router_gradient import RouterGradient

    r = p.r.double()
    logits = _logits(exact, r, shown, cosine)
    factors = (SCALE / r.norm(dim=-1)).expand(p.x.shape[0], -1) if cosine else r.new_empty(p.x.shape[0], 0)
    return logits, RouterGradient(p.g, x.here(logits.detach(), wide=True), p.r, x.here(factors, wide=True))


def _of_logits(p: Any, shown: Tensor, cosine: bool, exact: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of tokens by their logits, and the absolute values of its terms."""
    weights = p.g.double() * shown[:, None]
    terms = torch.einsum("ben,ed->bnd", weights.abs() * p.rates(cosine), p.r.double().abs())
    if cosine:
        size, lengths = exact.detach().abs(), exact.detach().norm(dim=-1, keepdim=True)
        terms = terms + size * (weights * logits.detach()).abs().sum(1)[..., None] / lengths.square()
    (dx,) = torch.autograd.grad(logits, exact, p.g.double())
    return dx, terms


@case("channels")
def router_gradient(x: Inputs, s: Sizes, *, masked: bool, cosine: bool) -> Yielded:
    from optimized.kernels import router_gradient as kernel

    p, (mask, shown) = _tokens(x, s), _mask(x, s, masked)
    exact = p.x.double().requires_grad_()
    logits, router = _routed(x, p, shown, cosine, exact)
    yield {"dx": kernel.router_gradient(p.x, mask, p.norms, router)}
    count = 3 * s.experts + (s.dim if x.dtype == torch.float64 else 0)  # there the truth's own sums count too
    yield {"dx": x.truth(*_of_logits(p, shown, cosine, exact, logits), count)}


@case("channels")
def token_gradient(x: Inputs, s: Sizes, *, masked: bool, cosine: bool, norm: bool) -> Yielded:
    """By rows alone, and by rows and router."""
    from optimized.kernels.token_gradient import TakenRows
    from optimized.kernels.token_gradient import token_gradient as assemble

    p, (mask, shown) = _tokens(x, s), _mask(x, s, masked)
    exact = p.x.double().requires_grad_()
    logits, router = _routed(x, p, shown, cosine, exact)
    rows = [TakenRows(g, routing[2], gamma) for g, routing, gamma in zip(p.gradients, p.routing, p.gammas)]
    one = rows[0] if norm else rows[0]._replace(gamma=None)
    yield {
        "dx of rows": assemble(p.x, None, p.norms, (one,), p.dots if norm else None, None),
        "dx of both": assemble(p.x, mask, p.norms, tuple(rows), p.dots, router),
    }

    def by_rows(i: int, normed: bool) -> tuple[Tensor, Tensor]:
        """Gradient, and the absolute values of its terms, of which one takes away what a token's norm does not feel."""
        indices, slots, inverse = p.routing[i]
        gamma, g = p.gammas[i].double(), p.gradients[i].double()
        made = _normed(exact, gamma, indices, slots) if normed else gathered(exact, indices, slots)
        (dx,) = torch.autograd.grad(made, exact, g)
        if not normed:
            return dx, collected(g.abs(), inverse)
        rate = s.dim**0.5 / lengths
        halves = p.products(i, gamma, exact.detach()).tensor_split(2, -1)  # which may cancel
        along = collected(sum(half.sum(-1, keepdim=True).abs() for half in halves), inverse)
        return dx, rate * (collected((g * gamma[:, None, None]).abs(), inverse) + size * along / lengths.square())

    size, lengths = exact.detach().abs(), exact.detach().norm(dim=-1, keepdim=True)
    dx, terms = _of_logits(p, shown, cosine, exact, logits)
    (first, first_terms), (second, second_terms) = by_rows(0, True), by_rows(1, True)
    alone, alone_terms = (first, first_terms) if norm else by_rows(0, False)
    count = 3 * s.experts + (s.dim if x.dtype == torch.float64 else 0)  # there the truth's own sums count too
    yield {
        "dx of rows": x.truth(alone, alone_terms, count),
        "dx of both": x.truth(dx + first + second, terms + first_terms + second_terms, count),
    }


@case("channels")
def combine(x: Inputs, s: Sizes, *, local: bool, null: bool, masked: bool, average: bool) -> Yielded:
    from optimized.kernels import combine as kernel

    p, (mask, shown) = _tokens(x, s), _mask(x, s, masked)
    (indices, slots, inverse), y = p.routing[0], p.gradients[0]
    scores = x.normal(s.batch, s.experts, indices.shape[-1], seed=11, wide=True)
    beside = x.normal(s.batch, s.n, s.dim, seed=12) if local else None
    nobody = x.weight(s.dim, seed=13) if null else None
    out = kernel.combine(y, scores, inverse, beside, nobody, mask, average, x.weights)
    g = x.lay(x.weight(s.batch, s.n, s.dim, seed=14))
    grads = kernel.combine_backward(g, y, scores, (indices, slots, inverse), beside, nobody, mask, average)
    names = ("dy", "dscores", "dlocal", "dnull")
    yield {"out": out, **{name: t for name, t in zip(names, grads) if t is not None}}
    count = (inverse >= 0).sum(1)[..., None] + local

    def form(y: Tensor, scores: Tensor, *rest: Tensor) -> Tensor:
        total = collected(y * scores.transpose(0, 1)[..., None], inverse) + (rest[0] if local else 0)
        total = total / count.clamp_min(1) if average else total
        return torch.where(count == 0, rest[-1] if null else 0.0, total) * shown[..., None]

    optional = [t for t in (beside, nobody) if t is not None]
    found = dict(
        zip(("out", *(n for n, t in zip(names, grads) if t is not None)), sums(form, [y, scores, *optional], g))
    )
    counts = {"dscores": s.dim, "dnull": s.batch * s.n}
    stored = {"out": x.weights, "dscores": x.wide, "dnull": x.weights}
    yield {name: x.truth(*t, counts.get(name, s.experts), stored.get(name)) for name, t in found.items()}


@case("channels")
def blend(x: Inputs, s: Sizes, *, begins: bool, average: bool) -> Yielded:
    """Without `begins` the first tokens stand in the first block, where nobody has a slot."""
    from optimized.kernels import blend as kernel

    p, width = _tokens(x, s), 2
    (indices, slots, inverse), y = p.routing[0], p.gradients[0]
    later = (torch.arange(s.n, device=x.device) >= (0 if begins else width)).expand(s.batch, -1)
    if not begins:
        slots, inverse = slots & (indices >= width), torch.where(later[:, None], inverse, -1)
    begin = torch.full((s.batch,), width, device=x.device) if begins else None
    scores = x.normal(s.batch, s.experts, indices.shape[-1], seed=11, wide=True)
    beside, nobody = x.normal(s.batch, s.n, s.dim, seed=12), x.weight(s.experts, s.dim, seed=13)
    out = kernel.blend(y, scores, inverse, beside, nobody, begin, width, average, x.weights)
    g = x.lay(x.weight(s.batch, s.n, s.dim, seed=14))
    grads = (
        *kernel.blend_slots_backward(g, y, scores, indices, slots, average),
        *kernel.blend_tokens_backward(g, inverse, beside, nobody, begin, width, average),
    )
    names = ("out", "dy", "dscores", "dlocal", "dnull")
    yield dict(zip(names, (out, *grads)))

    def form(y: Tensor, scores: Tensor, beside: Tensor, nobody: Tensor) -> Tensor:
        terms = collected(y * scores.transpose(0, 1)[..., None], inverse)
        terms = terms + torch.where((inverse < 0)[..., None], nobody[None, :, None], 0).sum(1)
        total = beside + torch.where(later[..., None], terms, 0)
        return torch.where(later[..., None], total / (s.experts + 1), total) if average else total

    counts = {"dscores": s.dim, "dnull": s.batch * s.n}
    stored = {"out": x.weights, "dscores": x.wide, "dnull": x.weights}
    found = zip(names, sums(form, [y, scores, beside, nobody], g))
    yield {name: x.truth(*t, counts.get(name, s.experts + 1), stored.get(name)) for name, t in found}


@case("channels")
def partial_sums(x: Inputs, s: Sizes) -> Yielded:
    """Of two numbers of rows, that lie apart; each of the two alone; more of either than a program reads at a time; of
    so many rows, behind a few, that several programs share them; and of so many programs that several share these."""
    from optimized.kernels import partial_sums as kernel

    groups, width, stride, counts = 2, s.dim, s.dim + 2, (s.n, s.n // 3 + 70)
    partial = x.normal(groups * sum(counts), stride, seed=40, wide=True).contiguous()
    parts = partial.split([groups * count for count in counts])
    outs = [torch.empty(groups, width, dtype=x.dtype, device=x.device) for _ in range(4)]
    before = 3
    few, rows = min(width, 40), kernel.MOST + s.n % 2 + 1  # the last part has few
    many = x.normal(before + groups * rows, stride, seed=41, wide=True).contiguous()
    ahead, shared, again = (torch.empty(n, few, dtype=x.dtype, device=x.device) for n in (1, groups, groups))
    first, second = (kernel.Sum(out, groups, count) for out, count in zip(outs, counts))
    second = second._replace(first=groups * s.n * stride)
    kernel.add_up(partial, width, stride, first, second)
    kernel.add_up(partial, width, stride, second._replace(out=outs[2]))
    kernel.add_up(partial, width, stride, first._replace(out=outs[3]))
    kernel.add_up(many, few, stride, kernel.Sum(ahead, 1, before), kernel.Sum(shared, groups, rows, before * stride))
    with mock.patch.multiple(kernel, MOST=8, SHARE=8):
        kernel.add_up(many, few, stride, kernel.Sum(again, groups, 67, before * stride))
    names = "first", "second", "alone", "first alone", "ahead", "shared", "again"
    yield dict(zip(names, (*outs, ahead, shared, again)))
    terms = [part.double().unflatten(0, (groups, -1))[..., :width] for part in (*parts, *parts[::-1])]
    behind = many.double()[before:, :few]
    terms += many.double()[None, :before, :few], *(behind[: groups * n].unflatten(0, (groups, -1)) for n in (rows, 67))
    yield dict(zip(names, [x.truth(t.sum(1), t.abs().sum(1), t.shape[1]) for t in terms]))


@case("channels")
def layer_norm(x: Inputs, s: Sizes, *, masked: bool, bias: bool) -> Yielded:
    from optimized.kernels import layer_norm as kernel
    from optimized.kernels.launch import MAX_BLOCK_D

    if s.dim > MAX_BLOCK_D:  # a row lies in registers
        yield {}
        yield {}
        return
    mask, shown = _mask(x, s, masked)
    tokens, g = (x.normal(s.batch, s.n, s.dim, seed=s.dim + i) for i in range(2))
    tokens[~shown] = torch.nan  # not read: 0 times it would be NaN
    w, b = x.weight(s.dim, seed=2), x.weight(s.dim, seed=3) if bias else None
    y, mean, rate = kernel.layer_norm(tokens, w, b, mask, 1e-5)
    dtypes = w.dtype, x.wide if bias else None  # other dtypes, other launches
    dx, dw, db = kernel.layer_norm_backward(g, tokens, w, mask, mean, rate, dtypes)
    yield {"y": y, "mean": mean, "rate": rate, "dx": dx, "dw": dw, **({} if db is None else {"db": db})}
    t = torch.where(shown[..., None], tokens.double(), 0)
    middle = t.mean(-1, keepdim=True)
    each = 1 / ((t - middle).square().mean(-1, keepdim=True) + 1e-5).sqrt()
    z, wide_g = (t - middle) * each, g.double()
    h = wide_g * w.double()
    # A mean's rounding errors reach every channel, and are divided by the spread.
    most = each * (t.abs() + t.abs().mean(-1, keepdim=True))
    around = h.abs() + h.abs().mean(-1, keepdim=True) + most * (h.abs() * most).mean(-1, keepdim=True)
    made = each * (h - h.mean(-1, keepdim=True) - z * (h * z).mean(-1, keepdim=True)) * shown[..., None]
    beyond = 0.0 if b is None else b.double()
    dims, rows = (0, 1), s.batch * s.n
    gain = 1 + most.square().mean(-1, keepdim=True)  # of an error of the rate
    yield {
        "y": x.truth(z * w.double() + beyond, gain * most * w.double().abs() + abs(beyond), s.dim),
        "mean": x.truth(middle.squeeze(-1), t.abs().mean(-1), s.dim, x.wide),
        "rate": x.truth(each.squeeze(-1), (gain * each).squeeze(-1), s.dim, x.wide),
        "dx": x.truth(made, gain * each * around * shown[..., None], 3 * s.dim),
        "dw": x.truth((wide_g * z).sum(dims), (gain * most * wide_g.abs()).sum(dims), rows + s.dim, x.weights),
        **({"db": x.truth(wide_g.sum(dims), wide_g.abs().sum(dims), rows, x.wide)} if bias else {}),
    }


@case("channels")
def admitted_rows(x: Inputs, s: Sizes, *, norm: bool) -> Yielded:
    from optimized.kernels import admitted_rows as kernel
    from optimized.kernels.admitted import Admitted

    width = min(max(s.dim // 2, 1), 300)  # as many again would be gigabytes
    tokens, weight = x.normal(s.batch, s.n, s.dim, seed=50), x.normal(s.experts, width, s.dim, seed=51)
    g, projected = (x.normal(s.experts, s.batch, s.n, width, seed=seed) for seed in (52, 53))
    norms = x.lay(x.drawn((s.batch, s.n), 54).abs().add(0.5).to(x.device, x.wide)) if norm else None
    listed = torch.rand(s.batch, s.experts, s.n, generator=generator(55)) < 0.6
    listed[0, -1] = False
    listed[-1, 0, -1] |= s.batch * s.experts > 1
    columns, totals = (~listed).byte().argsort(dim=-1, stable=True).int(), listed.sum(-1, dtype=torch.int32)
    every = torch.arange(s.n, dtype=torch.int32)
    rows = Admitted(*(t.to(x.device) for t in (columns, totals, torch.where(listed, every, -1))))
    out = torch.zeros(s.experts, s.batch, s.n, width, dtype=x.dtype, device=x.device)
    kernel.project(tokens, weight, norms, rows, out)
    dots = torch.empty(out[..., 0].numel(), dtype=x.wide, device=x.device) if norm else None
    h = kernel.rows_gradient(g, weight, norms, rows, projected, dots)
    dw = kernel.weight_gradient(g, tokens, norms, rows).sum(0)
    there = listed.to(x.device).transpose(0, 1)
    found = {"out": out, "h": torch.where(there[..., None], h, 0), "dw": dw}
    if dots is not None:
        found["dots"] = torch.where(there, dots.view(there.shape), 0)
    yield found
    r = s.dim**0.5 / norms.double()[None, ..., None] if norms is not None else 1.0
    t, w, g, p = (v.double() for v in (tokens[None], weight[:, None], g, projected))
    short = 0.0 if x.dtype == x.wide else torch.finfo(x.dtype).eps  # of g r, rounded
    g, shown = torch.where(there[..., None], g, 0), there[..., None]
    value, terms = (torch.where(shown, r * (a @ b.mT), 0) for a, b in ((t, w), (t.abs(), w.abs())))
    truths = {"out": x.truth(value, terms, s.dim), "h": x.truth(g @ w, g.abs() @ w.abs(), width)}
    value, terms = ((a.mT @ b).sum(1) for a, b in ((g, r * t), (g.abs(), r * t.abs())))
    truths["dw"] = x.truth(value, terms, s.batch * s.n, stored=x.wide)
    truths["dw"] = Truth(value, truths["dw"].slack + short * terms)
    if norm:
        value, terms = (((a * b) / r).sum(-1) for a, b in ((g, p), (g.abs(), p.abs())))
        truths["dots"] = x.truth(value, terms, width, stored=x.wide)
    yield truths


@case("channels")
def scaled_weight(x: Inputs, s: Sizes, *, scaled: bool) -> Yielded:
    from optimized.kernels import scaled_weight as kernel

    parts = x.normal(3, s.experts, s.n, s.dim, seed=56, wide=True)
    w = x.normal(s.experts * s.n, s.dim, 1, seed=57)
    gamma = x.weight(s.experts, s.dim, 1, seed=58) if scaled else None
    dw, dgamma = kernel.scaled_weight_gradients(parts, w, gamma)
    yield {"dw": dw.view(s.experts, s.n, s.dim), **({} if dgamma is None else {"dgamma": dgamma[..., 0]})}
    total, terms = parts.double().sum(0), parts.double().abs().sum(0)
    by = 1.0 if gamma is None else gamma.double().mT
    truths = {"dw": x.truth(total * by, terms * abs(by), 3)}
    if scaled:
        wide = w.double().view(s.experts, s.n, s.dim)
        truths["dgamma"] = x.truth((total * wide).sum(1), (terms * wide.abs()).sum(1), s.n + 3, x.weights)
    yield truths


@case("channels")
def step_tokens(x: Inputs, s: Sizes, *, cosine: bool, rotary: bool) -> Yielded:
    """Logits have the bits of `router_logits`. The first item is 0; the last one has no place left in its block, no
    angle of its own. In float64 the experts of both routers are more than a tile has.
    """
    from optimized.kernels import router_logits
    from optimized.kernels import step_tokens as kernel

    batch, experts, width, head = s.batch + 1, s.experts + 1, 7, 6
    tokens, rows = x.normal(batch, s.dim, seed=60), [x.normal(experts, s.dim, seed=61 + i) for i in range(2)]
    tokens[0] = 0
    angles = x.normal(batch + 5, head, seed=63) if rotary else None
    length = torch.arange(5, 5 + batch, device=x.device)
    start = torch.where(length == length[-1], length - width - 1, length - 1)

    def empty(*shape: int, dtype: torch.dtype = x.wide) -> Tensor:
        return torch.zeros(batch, *shape, dtype=dtype, device=x.device)

    logits, scale = [empty(experts, width) for _ in range(2)], SCALE if cosine else None
    block = kernel.Block(empty(width, s.dim, dtype=x.dtype), *logits, length, start)
    rates, tables = kernel.step_tokens(tokens, *rows, scale, EPS, angles, head, block)
    given = 4 if rotary else 2
    found = {"tail": block.tail, "logits": torch.stack(logits), "rates": rates, "tables": tables[:, :given]}
    same = router_logits.router_logits(tokens[None], torch.cat(rows), None, scale)[0].permute(2, 1, 0)
    yield found
    place = (length - start).clamp_max(width - 1)
    here = torch.arange(width, device=x.device) == place[:, None]
    t = tokens.double()
    middle = t.mean(-1, keepdim=True)
    each = 1 / ((t - middle).square().mean(-1, keepdim=True) + EPS).sqrt()
    gain = 1 + (each * (t.abs() + t.abs().mean(-1, keepdim=True))).square().mean(-1, keepdim=True)
    rate = s.dim**0.5 / t.norm(dim=-1).clamp_min(1e-12)
    value = torch.stack((middle[:, 0], each[:, 0], rate))
    terms = torch.stack((t.abs().mean(-1), (gain * each)[:, 0], rate))
    exponent = torch.arange(0, head, 2, device=x.device, dtype=torch.float64) / head
    turns = (length[:, None] / 10000.0 ** exponent.double()).repeat(1, 2)[:, None]
    if angles is not None:
        turns = torch.cat((turns, angles.double()[length.clamp_max(batch + 4)][:, None]), 1)
    made = torch.stack((turns.cos(), turns.sin()), 2).flatten(1, 2)
    yield {
        "tail": Truth(torch.where(here[..., None], tokens[:, None], 0)),
        "logits": Truth(torch.stack([torch.where(here[:, None], half, 0) for half in same.chunk(2, 1)])),
        "rates": x.truth(value, terms, s.dim, x.wide),
        "tables": x.truth(made, 1 + turns.abs().repeat_interleave(2, 1), 0, x.wide),
    }


def _several(x: Inputs, s: Sizes) -> int:
    """Items of a step: more than a tile of products has. In float64 it has one."""
    return s.batch + 1 if x.dtype == torch.float64 else 66


@case("channels")
def step_products(x: Inputs, s: Sizes, *, norm: bool, bias: bool) -> Yielded:
    """Of several items, and of one."""
    from optimized.kernels import step_products as kernel

    batch = _several(x, s)
    tokens, rates = x.normal(batch, s.dim, seed=64), x.normal(3, batch, seed=65, wide=True).contiguous()
    w_qkv, w_q = x.normal(21, s.dim, seed=66), x.normal(s.experts * 10, s.dim, seed=67)
    scale, shift, gamma = (x.weight(*shape, s.dim, seed=68 + i) for i, shape in enumerate([(), (), (s.experts,)]))
    given = (scale, shift if bias else None, gamma) if norm else None
    found = {}
    for name, count in (("all", batch), ("one", 1)):
        some = rates[:, :count].contiguous()
        found[name] = kernel.step_products(tokens[:count], some, given, w_qkv, w_q[..., None], s.experts)
    yield found
    t, made = tokens.double(), []
    for size in (False, True):
        m, rate, r = rates.double().abs()[..., None] if size else rates.double()[..., None]
        first = other = (t.abs() if size else t)[None].expand(s.experts, -1, -1)
        if norm:
            w, g = (v.double().abs() if size else v.double() for v in (scale, gamma))
            first, other = (first + m if size else first - m) * rate * w, other * r * g[:, None]
            if bias:
                first = first + (shift.double().abs() if size else shift.double())
        w, q = (v.double().abs() if size else v.double() for v in (w_qkv, w_q))
        each = other @ q.view(s.experts, 10, s.dim).mT
        made.append(torch.cat((first[0] @ w.mT, each.transpose(0, 1).flatten(1)), 1))
    truth = x.truth(*made, s.dim)
    short = 0.0 if x.dtype == x.wide else torch.finfo(x.dtype).eps  # of what is normalised, rounded
    truth = Truth(truth.value, truth.slack + short * made[1])
    yield {"all": truth, "one": Truth(truth.value[:1], truth.slack[:1])}


@case("channels")
def step_output(x: Inputs, s: Sizes, *, average: bool, parts: bool) -> Yielded:
    """What is not taken is not read. Of one item in parts, or of several."""
    from optimized.kernels import step_attention
    from optimized.kernels import step_output as kernel

    batch, local, heads, head, count = 1 if parts else _several(x, s), 3, 2, 6, 2 if parts else 1
    units = local + s.experts * heads
    kinds = torch.arange(batch * s.experts).view(batch, s.experts) % 2 + 1
    kinds[1:2] = 0
    hidden = torch.cat((torch.zeros(batch, local), (kinds != 1).repeat_interleave(heads, 1)), 1).bool().to(x.device)
    a = x.normal(batch, units, count, head, seed=70, wide=parts)
    totals = 1 + x.normal(batch, units, count, seed=71, wide=True).abs()
    tops = x.normal(batch, units, count, seed=72, wide=True)
    dirty = a.masked_fill(hidden[..., None, None], torch.nan).contiguous()
    scores = x.normal(batch, s.experts, seed=73, wide=True).contiguous()
    handed = scores.masked_fill(kinds.to(x.device) != 1, torch.nan)
    w_local, w_expert = x.normal(s.dim, local * head, seed=74), x.normal(s.experts * s.dim, heads * head, seed=75)
    null, length = x.weight(s.experts, s.dim, seed=76), torch.arange(3, 3 + batch, device=x.device)
    sums = torch.stack((tops, totals), -1)
    given = (dirty, sums) if parts else (dirty[:, :, 0], None)
    attended = step_attention.Attended(*given, kinds.int().to(x.device), handed)
    out = kernel.step_output(attended, w_local, w_expert[..., None], null, length, average)
    yield {"out": out, "length": length}
    kinds = kinds.to(x.device)
    weight = (
        torch.exp2(tops.double() - tops.double().amax(-1, keepdim=True)) if parts else torch.ones_like(tops.double())
    )
    below = (weight * totals.double()).sum(-1, keepdim=True) if parts else 1.0
    found = []
    for size in (False, True):
        rows, w, e, z, b = (t.double().abs() if size else t.double() for t in (a, w_local, w_expert, null, scores))
        rows = (rows * weight[..., None]).sum(2) / below
        first, rest = rows[:, :local].flatten(1) @ w.mT, rows[:, local:].unflatten(1, (s.experts, heads)).flatten(2)
        y = torch.einsum("bec,edc->bed", rest, e.view(s.experts, s.dim, -1)) * b[..., None]
        terms = torch.where((kinds == 1)[..., None], y, torch.where((kinds == 2)[..., None], z, 0))
        total = first + terms.sum(1)
        found.append(torch.where(kinds[:, :1] > 0, total / (s.experts + 1), total) if average else total)
    truth = x.truth(*found, (local + s.experts * heads) * head)
    short = 0.0 if x.dtype == x.wide or not parts else torch.finfo(x.dtype).eps  # of the sum of parts, rounded
    yield {
        "out": Truth(truth.value, truth.slack + (short + 8 * count * x.eps) * found[1]),
        "length": Truth(torch.arange(4, 4 + batch)),
    }


# --- heads -----------------------------------------------------------------------------------------------------------


@case("heads")
def null_slot(x: Inputs, s: Sizes, *, keep: bool, lengths: bool) -> Yielded:
    from optimized.kernels import null_slot as kernel

    rows, shape = s.experts * s.batch, (s.experts * s.batch, s.length, s.heads, s.dim_head)
    q, out, dout, dq = (x.normal(*shape, seed=20 + i) for i in range(4))
    null_k, null_v = (x.normal(s.experts, s.heads, s.dim_head, seed=24 + i) for i in range(2))
    lse = x.normal(rows, s.heads, s.length, seed=26, wide=True)
    drawn = (torch.rand(rows, s.heads, s.length, generator=generator(27)) < 0.6) / 0.6
    kept = x.here(drawn, wide=True) if keep else None
    keys = (torch.arange(rows, dtype=torch.int32) * 3 % 7).to(x.device) if lengths else None  # the first has none
    root, z = s.dim_head**0.5, 1.0 if kept is None else kept.double().transpose(1, 2)[..., None]
    k0, v0 = (t.double().repeat_interleave(s.batch, 0)[:, None] for t in (null_k, null_v))
    wide_q, wide_out, wide_dout = q.double(), out.double(), dout.double()
    s0 = ((wide_q * k0).sum(-1, keepdim=True) / root).transpose(1, 2).squeeze(-1)
    after = torch.logaddexp(lse.double(), s0)
    into = dq.contiguous() if x.blank else dq.clone(memory_format=torch.contiguous_format)
    merged, merged_lse = kernel.merge(q, null_k, null_v, out, lse, kept, keys)
    dnull = kernel.merge_backward(q, null_k, null_v, out, x.here(after, wide=True), kept, dout, into)
    yield {"merged": merged, "merged lse": merged_lse, "dq": into, "dnull": dnull}

    def as_rows(t: Tensor) -> Tensor:
        return t.transpose(1, 2)[..., None]

    before = lse.double() if keys is None else lse.double().masked_fill((keys == 0)[:, None, None], -torch.inf)
    p0 = as_rows((s0 - torch.logaddexp(before, s0)).exp())
    # exp makes the error of a logit a relative one of the weights.
    gain = 1 + (wide_q * k0).abs().sum(-1, keepdim=True) / root
    parts = (1 - p0) * wide_out, z * p0 * v0
    terms = gain * (parts[0].abs() + wide_out.abs() * p0 + parts[1].abs())
    made_lse = torch.logaddexp(before, s0)
    truths = {
        "merged": x.truth(sum(parts), terms, s.dim_head),
        "merged lse": x.truth(made_lse, gain.squeeze(-1).transpose(1, 2) + made_lse.abs(), s.dim_head, x.wide),
    }
    # The backward as the kernel's file has it, of whatever out and lse it is handed.
    p0 = as_rows((s0 - after).exp())
    gain = gain + as_rows(after).abs()
    pairs = [(wide_dout * t).sum(-1, keepdim=True) for t in (v0, wide_out)]
    sizes = [(wide_dout * t).abs().sum(-1, keepdim=True) for t in (v0, wide_out)]
    ds, most = (z * p0 * pairs[0] - p0 * pairs[1]) / root, gain * (z * p0 * sizes[0] + p0 * sizes[1]) / root
    truths["dq"] = x.truth(dq.double() + ds * k0, dq.double().abs() + most * k0.abs(), 2 * s.dim_head)

    def over_rows(*pair: Tensor) -> Tensor:
        return torch.stack([t.unflatten(0, (s.experts, s.batch)).sum((1, 2)) for t in pair])

    around = over_rows((most * wide_q).abs(), (gain * z * p0 * wide_dout).abs())
    count = s.batch * s.length + 2 * s.dim_head
    truths["dnull"] = x.truth(over_rows(ds * wide_q, z * p0 * wide_dout), around, count)
    yield truths


def _turned(t: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    first, second = t.chunk(2, -1)
    if transposed:
        other = sin * t
        first, second = other.chunk(2, -1)
        return t * cos + torch.cat((second, -first), -1)
    return t * cos + torch.cat((-second, first), -1) * sin


@case("heads")
def finite(x: Inputs, s: Sizes, *, turned: bool) -> Yielded:
    """Some heads of some tokens with a number that is none, or infinite, or too large."""
    from optimized.kernels import finite as kernel

    if s.dim_head % 2:  # has no halves
        yield {}
        yield {}
        return
    qkv = x.packed(s.batch, s.length, 3 * s.heads, s.dim_head, seed=20).unflatten(2, (3, s.heads)).clone()
    largest = size_of(qkv)
    for i, bad in enumerate((float("inf"), 200.0, float("nan"))):  # of a query, a key, a value
        qkv[i % s.batch, i * (s.length - 1) // 2, i, i % s.heads, i % s.dim_head] = bad
    angles = 10 * draw((s.length, s.dim_head), "normal", 28)
    cos, sin = (x.here(table, wide=True) for table in (angles.cos(), angles.sin()))
    safe, *odd = kernel.finite_heads(x.lay(qkv), (cos, sin) if turned else None, 100.0)
    spoilt = x.normal(s.batch, s.length, s.heads, s.dim_head, seed=21).contiguous()
    lse = x.normal(s.batch, s.heads, s.length, seed=22, wide=True).contiguous()
    clean, mask = (spoilt.double(), lse.double()), x.mask(s._replace(n=s.length)) if turned else None
    seen = kernel.spoil(spoilt, lse, *odd, mask, WINDOW)
    yield {
        "safe": safe,
        "odd": torch.stack((*odd, seen)).to(x.dtype),
        "spoilt": torch.where(spoilt.isnan(), 7.0, spoilt),
        "lse": lse,
    }
    q, k, v = qkv.double().unbind(2)
    if turned:
        tables = [table.double()[:, None] for table in (cos, sin)]
        q, k = (_turned(t, *tables, False) for t in (q, k))
    odd_q, odd_kv = (q.abs() > 100) | q.isnan(), (k.abs() > 100) | k.isnan() | (v.abs() > 100) | v.isnan()
    odd_q, odd_kv = odd_q.any(-1), odd_kv.any(-1)
    made = torch.stack((q, k, v), 2)
    hidden = torch.stack((odd_q, odd_kv, odd_kv), 2)[..., None]
    truths = {"safe": x.truth(made.masked_fill(hidden, 0), 2 * largest * (~hidden).double().expand_as(made), 0)}
    visible = odd_kv if mask is None else odd_kv & mask[..., None]
    back = torch.arange(s.length, device=x.device)[:, None] - torch.arange(s.length, device=x.device)
    near = ((back >= 0) & (back <= WINDOW)).double()
    seen = odd_q | (torch.einsum("ij,bjh->bih", near, visible.double()) > 0)
    truths["odd"] = Truth(torch.stack((odd_q, odd_kv, seen)).double())
    truths["spoilt"] = Truth(clean[0].masked_fill(seen[..., None], 7.0))
    yield {**truths, "lse": Truth(clean[1].masked_fill(seen.mT, torch.inf))}


@case("heads")
def rotary(x: Inputs, s: Sizes, *, positions: bool, transposed: bool) -> Yielded:
    from optimized.kernels import rotary as kernel

    if s.dim_head % 2:  # has no halves
        yield {}
        yield {}
        return
    rows = s.experts * s.batch
    t = x.packed(rows, s.length, s.heads, s.dim_head, seed=20)
    angles = 10 * draw((max(s.positions, s.length), s.dim_head), "normal", 28)
    cos, sin = (x.here(table, wide=True) for table in (angles.cos(), angles.sin()))
    at = torch.randint(s.positions, (rows, s.length), generator=generator(29)).to(x.device)
    given = cos, sin, x.lay(at) if positions else None, transposed
    pair = torch.stack((t, t), 2)  # as keys lie beside values
    kernel.rotate_into(pair[:, :, 0], pair[:, :, 0], *given)
    found = {"rotated": kernel.rotate(t, *given), "in place": pair}
    found |= zip(("cos", "sin"), kernel.tables(s.positions, s.dim_head, x.device, x.wide))
    yield found
    place = at if positions else torch.arange(s.length, device=x.device).expand(rows, -1)
    tables = [table.double()[place][:, :, None] for table in (cos, sin)]
    made = _turned(t.double(), *tables, transposed)
    terms = size_of(t) * (tables[0].abs() + size_of(tables[1]))
    truth = x.truth(made, terms, 0)
    beside = torch.stack((made, t.double()), 2)
    truths = {"rotated": truth, "in place": Truth(beside, torch.stack((truth.slack, 0 * terms.expand_as(made)), 2))}
    frequencies = 10000.0 ** (-torch.arange(0, s.dim_head, 2, dtype=torch.float64, device=x.device) / s.dim_head)
    angles = torch.arange(s.positions, device=x.device)[:, None] * frequencies.repeat(2)
    for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
        truths[name] = Truth(table, torch.finfo(x.wide).eps * table.abs() + 32 * s.positions * 2.0**-52)
    yield truths


@case("heads")
def window(x: Inputs, s: Sizes, *, masked: bool, causal: bool) -> Yielded:
    from optimized.kernels import window as kernel
    from optimized.ops.rotary import rotary_tables

    if s.dim_head % 2 or s.dim_head > 128:  # has no halves, or too many channels
        yield {}
        yield {}
        return
    shape, n = (s.batch, s.length, s.heads, s.dim_head), s.length
    qkv = x.packed(s.batch, n, 3 * s.heads, s.dim_head, seed=30).unflatten(2, (3, s.heads))
    dout, reach = x.normal(*shape, seed=31), max(n // 5, 1)
    mask = x.mask(s._replace(n=n)) if masked else None
    band = kernel.Band.of(n, reach, causal, mask)
    angles = rotary_tables(n, s.dim_head, x.device, x.wide)
    out, lse = kernel.window_attention(*qkv.unbind(2), band)
    made = kernel.window_attention_backward(dout, qkv.unbind(2), out, lse, band, angles)
    yield {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), made.unbind(2)))}
    # The dense form, (B, H, N, ...). A logit's error is one of a weight, relatively; half precision rounds P and dS. Of
    # those, and of sums of d or N terms:
    short = torch.finfo(x.dtype).eps
    step = 0.0 if x.dtype == x.wide else 2 * short
    sums_of = (s.dim_head + n + 24) * x.eps * (2 if x.dtype == torch.float64 else 1)
    cos, sin = (t[:, None] for t in rotary_tables(n, s.dim_head, x.device, torch.float64))
    q, k, v, g = (t.double().transpose(1, 2) for t in (*qkv.unbind(2), dout))
    root = s.dim_head**0.5
    at = torch.arange(n, device=x.device)
    apart = at - at[:, None]
    seen = ((apart >= -reach) & (apart <= (0 if causal else reach))).expand(s.batch, 1, n, n)
    if mask is not None:
        seen = seen & mask[:, None, None] & mask[:, None, :, None]
    seen = seen | (apart == 0)
    scores = (q @ k.mT / root).masked_fill(~seen, -torch.inf)
    most = (_lengths(q) @ _lengths(k).mT / root * seen).amax(-1, keepdim=True)
    gain = sums_of * (1 + most)
    p, true_lse = scores.softmax(-1), scores.logsumexp(-1)
    result = p @ v
    slack = {"out": (gain + step) * (p @ v.abs() + result.abs()), "lse": gain[..., 0] * (1 + true_lse.abs())}
    dp, delta = g @ v.mT, (g * result).sum(-1, keepdim=True)
    ds = p * (dp - delta) / root
    off = (g.abs() * slack["out"]).sum(-1, keepdim=True) + sums_of * (
        g.abs() @ v.abs().mT + (g * result).abs().sum(-1, keepdim=True)
    )
    ds_off = p / root * (2 * gain * ((dp - delta).abs()) + off) + step * ds.abs()
    truths = {"out": result, "lse": true_lse, "dv": p.mT @ g}
    slack["dv"] = (2 * p * (gain + step)).mT @ g.abs() + sums_of * p.mT @ g.abs()
    for name, weights, error, other in (("dq", ds, ds_off, k), ("dk", ds.mT, ds_off.mT, q)):
        turned = (weights @ other).transpose(1, 2)
        truths[name] = _turned(turned, cos, sin, True).transpose(1, 2)
        around = error @ other.abs() + (2 * step + sums_of) * weights.abs() @ other.abs()
        slack[name] = around + around.roll(s.dim_head // 2, -1)  # a rotation mixes both halves
    last = torch.finfo(x.dtype)
    found = {}
    for name, t in truths.items():
        bound = slack[name] + (last.eps * t.abs() + last.smallest_normal if name != "lse" else 0)
        found[name] = Truth(*((t, bound) if name == "lse" else (t.transpose(1, 2), bound.transpose(1, 2))))
    yield found


def _lengths(t: Tensor) -> Tensor:
    return t.norm(dim=-1, keepdim=True)


@case("heads")
def value_score(x: Inputs, s: Sizes) -> Yielded:
    from optimized.kernels import value_score as kernel

    rows = s.experts * s.batch
    v, dv = (x.packed(rows, s.length, s.heads, s.dim_head, seed=31 + i) for i in range(2))
    scores = x.normal(s.batch, s.experts, s.length, seed=30, wide=True)
    scores[:, :, ::3] = 1
    g, in_place = dv.clone(), v.clone()
    found = {"scaled": kernel.value_score(v, scores), "in place": in_place, "dv": dv}
    kernel.value_score_(in_place, scores)
    found["dscores"] = kernel.value_score_backward_(dv, v, scores)
    gk = x.normal(*g.shape, seed=33)
    dk, elsewhere = (torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for _ in range(2))
    apart = g.transpose(1, 2).contiguous().transpose(1, 2)
    found |= {"apart dscores": kernel.value_score_backward(gk, apart, v, scores, dk, elsewhere)}
    found |= {"apart dv": elsewhere, "dk": dk}
    yield found
    wide = scores.double().transpose(0, 1).flatten(0, 1)[..., None, None]
    products = g.double() * v.double()
    truths = {"scaled": v.double() * wide, "in place": v.double() * wide, "dv": g.double() * wide}
    truths = {name: x.truth(t, t.abs(), 0) for name, t in truths.items()}
    by_slot = [t.sum((-2, -1)).unflatten(0, (s.experts, s.batch)).transpose(0, 1) for t in (products, products.abs())]
    by_slot = x.truth(*by_slot, s.heads * s.dim_head, x.wide)
    apart = {"apart dscores": by_slot, "apart dv": truths["dv"], "dk": x.truth(gk.double(), gk.abs().double(), 0)}
    yield {**truths, "dscores": by_slot, **apart}


@case("heads")
def step_attention(x: Inputs, s: Sizes, *, rotary: bool, everybody: bool, parts: bool, unit: bool) -> Yielded:
    """What is not seen holds NaN. Of several items the first has no memory, the second fewer tokens than a window, and
    the last one no place left in its block.

    A query, a new value and a key of the window are too large; of memories keys of both signs and a value are infinite,
    and, of several items, a logit is NaN.
    """
    from optimized.kernels import step_attention as kernel

    if s.dim_head % 2:  # has no halves
        yield {}
        yield {}
        return
    batch, width, window, local, slots = 1 if parts else s.batch + 2, 4, s.length + 2, s.heads + 2, s.length + 4
    shape, units = (batch, s.experts), local + s.experts * s.heads
    projected = x.normal(batch, (3 * local + s.experts * s.heads) * s.dim_head, seed=80).contiguous()
    turns = 3 * x.drawn((batch, 2, s.dim_head), 81)
    turns[:, 0] = turns[:, 0, : s.dim_head // 2].repeat(1, 2)
    tables = torch.stack((turns.cos(), turns.sin()), 2).flatten(1, 2).to(x.device, x.wide)
    start = width * (torch.arange(batch, device=x.device) + (batch == 1))
    since = torch.where(start == start[-1], width + 1, 2)
    length, place = start + since, since.clamp_max(width - 1)
    near = x.normal(2, batch, window + width, local, s.dim_head, seed=82).contiguous()
    keys = x.normal(2, *shape, slots, s.heads, s.dim_head, seed=83).contiguous()
    q_logits, logits = (x.normal(*shape, n, seed=84 + i, wide=True).contiguous() for i, n in enumerate((width, slots)))
    q_logits[1:-1, 0] = torch.tensor([1.0, -1.0, 1.0, 1.0])  # the third is the second to reach the threshold
    threshold = torch.full(shape, -0.5, dtype=x.wide, device=x.device)
    filled = torch.arange(slots, device=x.device) < slots - 2
    positions = torch.where(filled, 1, -1).expand(*shape, -1).contiguous()
    back = window + place[:, None] - torch.arange(window + width, device=x.device)
    seen = (back >= 0) & (back <= length.clamp_max(window)[:, None])
    near.masked_fill_(~(seen & (back > 0))[None, :, :, None, None], torch.nan)
    keys.masked_fill_(~filled[None, None, None, :, None, None], torch.nan)
    projected[0, [0, (2 * local + 1) * s.dim_head]] = near[0, -1, window + width - 2, -1, 0] = 200.0
    keys[0, -1, [-1, 0], 0, -1, 0] = torch.tensor([torch.inf, -torch.inf], dtype=x.dtype, device=x.device)
    keys[1, -1, -1, 0, 0, 0] = torch.inf
    odd = torch.zeros(batch, units, dtype=torch.bool, device=x.device)
    odd[0, :2] = odd[-1, local - 1] = odd[-1, -1] = odd[-1, local + s.heads - 1] = odd[-1, -s.heads] = True
    if not parts:
        logits[1, 0, 0], odd[1, local : local + s.heads] = torch.nan, True
    null = x.weight(2, s.experts, s.heads, 1, s.dim_head, seed=86)
    held = kernel.Held(length, start, *near.clone(), q_logits, threshold, logits, positions, *keys)
    given = None if everybody else 2, rotary, unit, 100.0, 2 if parts else None
    made = kernel.step_attention(projected, tables, held, null, *given)
    at = torch.arange(batch, device=x.device), window + place
    new = torch.stack((held.local_keys[at], held.local_values[at]))
    out, taken = made.results, made.kinds == 1
    if made.sums is not None:
        weight = torch.exp2(made.sums[..., 0] - made.sums[..., 0].amax(-1, keepdim=True))
        out = (out * weight[..., None]).sum(2) / (made.sums[..., 1] * weight).sum(-1, keepdim=True)
    there = torch.cat((torch.ones_like(taken[:, :1]).expand(-1, local), taken.repeat_interleave(s.heads, 1)), 1)
    yield {
        "out": torch.where(there[..., None], out, 0),
        "new": new,
        "kinds": made.kinds,
        "scores": torch.where(taken, made.scores, 0),
    }
    so_far = torch.arange(width, device=x.device) <= place[:, None]
    own = q_logits.gather(2, place[:, None, None].expand(*shape, 1))[..., 0]
    picked = (own >= threshold) & (((q_logits >= -0.5) & so_far[:, None]).sum(-1) <= 2)
    picked = (picked | everybody) & (start > 0)[:, None]
    kinds = torch.where(picked, 1, torch.where(length >= width, 2, 0)[:, None])
    truths = {
        "kinds": Truth(kinds),
        "scores": x.truth((1.0 if unit else own.double().sigmoid()) * picked, 1 + own.double().abs(), 0, x.wide),
    }
    q, k, v, rest = projected.double().unflatten(1, (-1, s.dim_head)).split((local,) * 3 + (units - local,), 1)
    cos, sin, *others = (table[:, None] for table in tables.double().unbind(1))
    q, k = (_turned(t, cos, sin, False) for t in (q, k))
    if rotary:
        rest = _turned(rest, *others, False)
    truths["new"] = x.truth(torch.stack((k, v)), 2 * torch.stack((k, v)).abs() + 4, 0)
    near = near.double().nan_to_num()
    near[0, at[0], at[1]], near[1, at[0], at[1]] = k, v
    around = torch.where(seen, 1.0, 0.0)[:, None].expand(-1, local, -1)  # (B, h, w + W): weights of values, 0: unseen
    sides = [(q, *near.transpose(2, 3), around)]
    keys, values = (
        torch.cat((a.double().expand(batch, -1, -1, -1, -1), b.double().nan_to_num(0, 0, 0).transpose(2, 3)), 3)
        for a, b in zip(null[:, None], keys)
    )
    score = logits.double() * 0 + 1 if unit else logits.double().sigmoid()  # of NaN NaN
    score = torch.nn.functional.pad(score * filled, (1, 0), value=1.0)
    by_head = [t.flatten(1, 2) for t in (keys, values, score[:, :, None].expand(-1, -1, s.heads, -1))]
    sides.append((rest, *by_head))
    found = []
    for q, k, v, weight in sides:
        s_qk = torch.einsum("bhd,bhkd->bhk", q, k) / s.dim_head**0.5
        p = s_qk.masked_fill(weight == 0, -torch.inf).softmax(-1) * weight
        size = torch.einsum("bhd,bhkd->bhk", q.abs(), k.abs()).amax(-1, keepdim=True) / s.dim_head**0.5
        found.append(((p[..., None] * v).sum(2), (p[..., None] * v.abs()).sum(2), size.expand(-1, -1, s.dim_head)))
    value, terms, size = (torch.cat(t, 1) for t in zip(*found))
    short = 0.0 if x.dtype == x.wide else torch.finfo(x.dtype).eps
    exact = (s.dim_head + window + 30) * x.eps * (2 if x.dtype == torch.float64 else 1)
    bound = 2 * (exact * (1 + size) + 2 * short * size) * (terms + value.abs()) + torch.finfo(x.dtype).eps * value.abs()
    value = torch.where(there[..., None], value.masked_fill(odd[..., None], torch.nan), 0)
    truths["out"] = Truth(value, bound.masked_fill(odd[..., None], 0))
    yield truths


@case("heads")
def memory_attention(x: Inputs, s: Sizes, *, dropout: bool) -> Yielded:
    yield from _over_a_memory(x, s, dropout, 3)


@case("heads")
def memory_keys(x: Inputs, s: Sizes, *, dropout: bool) -> Yielded:
    """Of which several programs share the blocks."""
    yield from _over_a_memory(x, s, dropout, 4)


def _over_a_memory(x: Inputs, s: Sizes, dropout: bool, blocks: int) -> Yielded:
    """Of three blocks both directions, of four the gradient of keys alone."""
    from optimized.kernels import memory_attention as kernel
    from optimized.kernels import memory_keys
    from optimized.kernels.memory_tiles import Memories

    if s.dim_head > 128 or s.length > 1000:  # too many channels, or pairs for the truth
        yield {}
        yield {}
        return
    width, k = max(s.length // 2, 1), s.length + 1
    n, shape = 2 + blocks * width, (s.experts, s.batch, blocks, s.length, s.heads, s.dim_head)
    logits, shown = draw((s.batch, s.experts, n), "normal", 40), torch.ones(s.batch, n, dtype=torch.bool)
    listed = [t.to(x.device) for t in remembered(logits, shown, k, width, 2)]
    filled = torch.arange(s.length, s.length + listed[1].numel(), dtype=torch.int32).view(listed[1].shape) % (
        s.length + 1
    )
    q, dout = (x.normal(*shape, seed=41 + i) for i in range(2))
    kv = x.normal(s.experts, s.batch, n, 2, s.heads, s.dim_head, seed=43)
    null_kv = x.normal(2, s.experts, s.heads, 1, s.dim_head, seed=44)
    scores = x.lay(logits.sigmoid().to(x.device, x.wide))
    seed, rate = torch.tensor([7 << 40], device=x.device), 0.25 if dropout else 0.0
    m = Memories(q, kv, scores, null_kv, *listed, filled.to(x.device), seed, rate)
    out, lse = kernel.memory_attention(m)
    if blocks == 3:
        asked = "out", "lse", "dq", "dkv", "dscores", "dnull"
        yield dict(zip(asked, (out, lse, *kernel.memory_attention_backward(dout, m, out, lse))))
    else:
        asked, dkv = ("dkv", "dscores"), torch.zeros_like(kv, memory_format=torch.contiguous_format)
        delta = (dout.contiguous().to(x.wide) * out.to(x.wide)).sum(-1).transpose(3, 4).contiguous()
        yield {"dkv": dkv, "dscores": memory_keys.keys_gradient(m, dout.contiguous(), lse, delta, dkv).sum(2)}
    # All columns, of which a block sees some, behind the null key: (E, B, J, H, C, 1 + L). Errors as of `window`.
    short, root = torch.finfo(x.dtype).eps, s.dim_head**0.5
    step = 0.0 if x.dtype == x.wide else 2 * short
    at = torch.where(torch.arange(k, device=x.device) < listed[1][..., None], listed[0].long(), n)
    sight = torch.zeros(*at.shape[:3], n + 1, dtype=torch.bool, device=x.device).scatter_(-1, at, True)[..., :n]
    sight = torch.cat((torch.ones_like(sight[..., :1]), sight), -1).transpose(0, 1)[:, :, :, None, None]
    full = torch.arange(s.length, device=x.device) < m.q_counts.transpose(0, 1)[..., None]
    full = full[:, :, :, None, :, None]
    wide_q, g = (t.double().transpose(3, 4) for t in (q, dout))
    g = torch.where(full, g, 0)
    keys, values = (
        torch.cat((a.expand(-1, s.batch, -1, -1, -1), b), -2)[:, :, None]
        for a, b in zip(null_kv.double()[:, :, None], kv.double().transpose(2, 4).unbind(3))
    )
    weight = torch.nn.functional.pad(scores.double().transpose(0, 1), (1, 0), value=1.0)[:, :, None, None, None]
    p = (wide_q @ keys.mT / root).masked_fill(~sight, -torch.inf)
    true_lse, p = p.logsumexp(-1), torch.where(full, p.softmax(-1), 0)
    z = _draws(shape, n, seed, rate).to(p) if dropout else 1.0
    sums_of = (s.dim_head + k + 25) * x.eps * (2 if x.dtype == torch.float64 else 1)
    gain = sums_of * (1 + ((_lengths(wide_q) @ _lengths(keys).mT / root) * sight).amax(-1, keepdim=True))
    share = p * z * weight
    result, size = share @ values, share @ values.abs()
    bounds = {"out": (gain + step) * (size + result.abs()), "lse": gain[..., 0] * (1 + true_lse.abs())}
    dp, delta = (g @ values.mT) * z * weight, (g * result).sum(-1, keepdim=True)
    ds = p * (dp - delta) / root
    off = (g.abs() * bounds["out"]).sum(-1, keepdim=True) + sums_of * (
        (g.abs() @ values.abs().mT) * z * weight + (g * result).abs().sum(-1, keepdim=True)
    )
    ds_off = p / root * (2 * gain * (dp - delta).abs() + off) + step * ds.abs()
    pz = p * z
    u, u_off = pz.mT @ g, (2 * pz * (gain + step)).mT @ g.abs() + blocks * s.length * x.eps * pz.mT @ g.abs()
    dk = (ds.mT @ wide_q).sum(2)
    dk_off = (ds_off.mT @ wide_q.abs() + (2 * step + blocks * sums_of) * ds.abs().mT @ wide_q.abs()).sum(2)
    around = ds_off @ keys.abs() + (2 * step + sums_of) * ds.abs() @ keys.abs()
    u, u_off, values, weight = u.sum(2), u_off.sum(2), values[:, :, 0], weight[:, :, 0, :, 0, :, None]
    dv, dv_off = u * weight, u_off * weight
    by_head = (u * values).sum((2, -1)), ((u_off + s.heads * sums_of * u.abs()) * values.abs()).sum((2, -1))

    def columns(dk: Tensor, dv: Tensor) -> Tensor:
        return torch.stack((dk, dv), 2)[..., 1:, :].movedim(4, 2)

    def null(dk: Tensor, dv: Tensor) -> Tensor:
        return torch.stack((dk, dv))[..., :1, :].sum(2)

    count = s.batch * blocks * s.length * x.eps
    most = null((ds.abs().mT @ wide_q.abs()).sum(2), (pz.mT @ g.abs()).sum(2))
    made = {
        "out": (result.transpose(3, 4), bounds["out"].transpose(3, 4)),
        "dq": ((ds @ keys).transpose(3, 4), around.transpose(3, 4)),
        "dkv": (columns(dk, dv), columns(dk_off, dv_off)),
        "dscores": tuple(t[..., 1:].transpose(0, 1) for t in by_head),
        "dnull": (null(dk, dv), null(dk_off, dv_off) + count * most),
    }
    last, found = torch.finfo(x.dtype), {}
    for name, (value, bound) in made.items():
        found[name] = Truth(value, bound + last.eps * value.abs() + last.smallest_normal)
    found["lse"] = Truth(torch.where(full[..., 0], true_lse, torch.inf), bounds["lse"])
    yield {name: found[name] for name in asked}


@case("heads")
def attention(x: Inputs, s: Sizes, *, null: bool, lengths: bool, dropout: bool) -> Yielded:
    from optimized.kernels import attention as kernel

    # Too many channels, or pairs for the truth; on a GPU half precision alone.
    if s.dim_head > 64 or s.length > 1000 or (x.dtype == x.wide and (x.blank or x.device.type == "cuda")):
        yield {}
        yield {}
        return
    rows, keys, rate = s.experts * s.batch, s.length + 2, 0.25 if dropout else 0.0
    q, dout = (x.normal(rows, s.length, s.heads, s.dim_head, seed=50 + i) for i in range(2))
    kv = x.normal(rows, keys, 2, s.heads, s.dim_head, seed=52).contiguous()
    null_k, null_v = (x.normal(s.experts, s.heads, s.dim_head, seed=53 + i) for i in range(2))
    shape, g = (rows, s.heads, s.length), generator(55)
    bits = torch.randint(-(2**31), 2**31, (*shape, (keys + 31) // 32), dtype=torch.int32, generator=g).to(x.device)
    z = x.here((torch.rand(shape, generator=g) < 0.6).double() / (1 - rate), wide=True)
    counts = (torch.arange(rows, dtype=torch.int32) * 3 % (keys + 1)).to(x.device) if lengths else None
    made = (x.lay(bits), z) if dropout else None
    call = kernel.Attention(s.dim_head**-0.5, (null_k, null_v) if null else None, counts, rate, made)
    out, lse = kernel.attention(q, *kv.unbind(2), call)
    dkv = torch.empty_like(kv)
    dq, dnull = kernel.attention_backward(dout, (q, *kv.unbind(2)), out, lse, call, dkv.unbind(2))
    yield {"out": out, "lse": lse, "dq": dq, "dkv": dkv} | ({} if dnull is None else {"dnull": dnull})
    # All keys behind the null key: (R, H, L, 1 + S). Errors as of `window`.
    short, root = torch.finfo(x.dtype).eps, s.dim_head**0.5
    step = 0.0 if x.dtype == x.wide else 2 * short
    wide_q, g = (t.double().transpose(1, 2) for t in (q, dout))
    heads = (t.double().repeat_interleave(s.batch, 0)[:, None] for t in (null_k, null_v))
    k, v = (torch.cat((a, b), 1).transpose(1, 2) for a, b in zip(heads, kv.double().unbind(2)))
    seen = torch.ones(rows, 1 + keys, dtype=torch.bool, device=x.device)
    seen[:, 0] = null
    if counts is not None:
        seen[:, 1:] = torch.arange(keys, device=x.device) < counts[:, None]
    if dropout:
        z = torch.cat((z.double()[..., None], unpacked(bits, keys).double() / (1 - rate)), -1)
    else:
        z = torch.ones(*shape, 1 + keys, dtype=torch.float64, device=x.device)
    scores = (wide_q @ k.mT / root).masked_fill(~seen[:, None, None], -torch.inf)
    true_lse, some = scores.logsumexp(-1), seen.any(-1)[:, None, None, None]
    p = torch.where(some, scores.softmax(-1), 0)
    sums_of = (s.dim_head + s.length + 26) * x.eps * (2 if x.dtype == torch.float64 else 1)
    gain = sums_of * (1 + (_lengths(wide_q) @ _lengths(k).mT / root * seen[:, None, None]).amax(-1, keepdim=True))
    share = p * z
    result, size = share @ v, share @ v.abs()
    off_out = (gain + step) * (size + result.abs())
    dp, delta = (g @ v.mT) * z, (g * result).sum(-1, keepdim=True)
    ds = p * (dp - delta) / root
    off = (g.abs() * off_out).sum(-1, keepdim=True) + sums_of * (
        (g.abs() @ v.abs().mT) * z + (g * result).abs().sum(-1, keepdim=True)
    )
    ds_off = p / root * (2 * gain * (dp - delta).abs() + off) + step * ds.abs()
    dk, dv = ds.mT @ wide_q, share.mT @ g
    dk_off = ds_off.mT @ wide_q.abs() + (2 * step + sums_of) * ds.abs().mT @ wide_q.abs()
    dv_off = (2 * share * (gain + step)).mT @ g.abs() + sums_of * share.mT @ g.abs()

    def of_keys(dk: Tensor, dv: Tensor) -> Tensor:
        return torch.stack((dk, dv), 2)[..., 1:, :].permute(0, 3, 2, 1, 4)

    def of_null(dk: Tensor, dv: Tensor) -> Tensor:
        return torch.stack((dk, dv))[..., 0, :].unflatten(1, (s.experts, s.batch)).sum(2)

    around = ds_off @ k.abs() + (2 * step + sums_of) * ds.abs() @ k.abs()
    made = {
        "out": (result.transpose(1, 2), off_out.transpose(1, 2)),
        "dq": ((ds @ k).transpose(1, 2), around.transpose(1, 2)),
        "dkv": (of_keys(dk, dv), of_keys(dk_off, dv_off)),
    }
    if null:
        made["dnull"] = of_null(dk, dv), of_null(dk_off, dv_off) * (1 + s.batch * s.length * x.eps)
    last = torch.finfo(x.dtype)
    truths = {name: Truth(t, bound + last.eps * t.abs() + last.smallest_normal) for name, (t, bound) in made.items()}
    truths["lse"] = Truth(true_lse, gain[..., 0] * (1 + true_lse.abs()))
    yield {name: truths[name] for name in ("out", "lse", "dq", "dkv", *(["dnull"] if null else []))}


def unpacked(bits: Tensor, keys: int) -> Tensor:
    """0 or 1 for every key: the bits of words (..., W) from the lowest one up."""
    return (bits[..., None] >> torch.arange(32, device=bits.device) & 1).flatten(-2)[..., :keys]


@case("heads")
def keep(x: Inputs, s: Sizes) -> Yielded:
    """Bits of as many queries as keys, bit for bit, and the null slot's."""
    from optimized.kernels import keep as kernel

    if s.length > 1000:  # too many pairs for the truth
        yield {}
        yield {}
        return
    rows, keys = s.experts * s.batch, 7 * s.length + 3
    shape = kernel.numbers(rows, s.heads, s.length, keys, x.device).shape
    drawn = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator(56))
    rates = 0.25, 0.1, 0.003, 1e-4
    found = [kernel.kept(drawn.to(x.device), s.length, keys, rate, x.wide) for rate in rates]
    yield {f"{name} {i}": t for i, pair in enumerate(found) for name, t in zip(("bits", "keep"), pair)}
    m, a, c, number, b, n = (
        t.long() for t in drawn.split((*[s.length] * 4, *[(shape[-1] - 4 * s.length) // 2] * 2), -1)
    )
    m, a, c = (t[..., None, None] for t in (m, a, c))
    b, n = (t.unflatten(-1, (-1, 8))[:, :, None] for t in (b, n))

    def in_32_bits(t: Tensor) -> Tensor:
        return (t + 2**31) % 2**32 - 2**31

    h = in_32_bits((m | 1) * b + a)
    h = in_32_bits(h * (n | 1) + (h >> 16))
    h = in_32_bits(h * 0x7FEB352D + (h >> 15)) ^ c
    below = 255 - ((h[..., None] >> torch.arange(32) & 1) << torch.arange(8)[:, None]).sum(-2)  # (R, H, L, W, 32)
    truths = {}
    for i, rate in enumerate(rates):
        share = round((1 - rate) * 2**32)
        t = (share + (a & 0xFFFFFF)) >> 24
        bits = ((below < t).long() << torch.arange(32)).sum(-1)
        truths[f"bits {i}"] = Truth(in_32_bits(bits).int())
        truths[f"keep {i}"] = Truth((number + 2**31 < share).double() / (1 - rate), 2 * x.eps)
    yield truths


def _draws(shape: tuple[int, ...], n: int, seed: Tensor, rate: float) -> Tensor:
    """Of dropout, (E, B, J, H, C, 1 + L): 0 or 1 / (1 - rate), in NumPy's integers of 64 bits without a sign."""
    import numpy as np

    experts, batch, blocks, slots, heads, _ = shape
    queries = np.arange(experts * batch * heads * blocks * slots, dtype=np.uint64)
    z = queries.reshape(experts, batch, heads, blocks, slots, 1) * np.uint64(n + 1) + np.arange(n + 1, dtype=np.uint64)
    z = np.uint64(int(seed)) + z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    kept = (z ^ (z >> np.uint64(31))) >> np.uint64(40) & np.uint64(0xFFFFFF)
    return torch.from_numpy((kept >= rate * 2**24) / (1 - rate)).transpose(2, 3).to(seed.device)
