"""Small scopes, exhausted: every order, mask, and routing of a few tokens; and certificates for the exact solver, whose
answers can be checked without knowing how to find them.

Interpreted, the exhaustive cases are thinned by a stride; all of them are run by PyTorch's kernels, and on a GPU.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from harness import BOTH, check_identical, interpreted
from strategies import generator
from torch import Tensor

import optimized
import reference
from optimized import ops
from optimized.plan import Request, choose

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
TRITON = pytest.mark.parametrize("kernels", ["triton"], indirect=True)


def thinned(rows: Tensor, most: int, shift: int = 0) -> Tensor:
    """rows, or where kernels are interpreted about `most` of them; another shift takes others."""
    stride = -(-len(rows) // most)
    return rows[shift % stride :: stride] if interpreted() and stride > 1 else rows


# --- selection: every order, every mask ------------------------------------------------------------------------------

INF, NAN = math.inf, math.nan
PATTERNS = (
    (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0),
    (7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0),
    (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    (-0.0, 0.0, -0.0, 0.0, 0.0, -0.0, 0.0, -0.0),
    (NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN),
    (-INF, -INF, -INF, -INF, -INF, -INF, -INF, -INF),
    (NAN, -INF, NAN, -INF, INF, NAN, INF, -INF),
    (INF, 0.0, -0.0, -INF, NAN, 1e-45, -1e-45, 0.0),
    (2.0, -1.0, 2.0, NAN, -1.0, 2.0, NAN, -1.0),
    (-3e38, 3e38, -INF, INF, -1.0, 1.0, 3e38, -3e38),
)


def weak_orders(n: int) -> list[tuple[int, ...]]:
    """Every assignment of ranks to n items: the ranks that occur are 0 .. r - 1."""
    return [ranks for ranks in itertools.product(range(n), repeat=n) if len(set(ranks)) == max(ranks) + 1]


def ranking(values: list[float], shown: list[bool]) -> list[int]:
    """The declared rule: valid before masked, numbers before NaN, larger first (-0.0 == 0.0), smaller index first."""

    def place(i: int) -> tuple[int, float, int]:
        if not shown[i]:
            return (2, 0.0, i)
        return (1, 0.0, i) if math.isnan(values[i]) else (0, -values[i], i)

    return sorted(range(len(values)), key=place)


def selected(rankings: list[list[int]], shown: list[list[bool]], k: int) -> tuple[list, list, list]:
    """Indices, slot masks and inverse maps of the first k of each ranking."""
    indices, slots, inverses = [], [], []
    for order, row in zip(rankings, shown):
        chosen = sorted(i for i in order[:k] if row[i]) + sorted(i for i in order[:k] if not row[i])
        indices.append(chosen)
        slots.append([row[i] for i in chosen])
        inverses.append([chosen.index(i) if i in chosen and row[i] else -1 for i in range(len(row))])
    return indices, slots, inverses


def check_selection(implementation: ModuleType, kernels: str, logits: Tensor, mask: Tensor | None, k: int) -> None:
    batch, experts, n = logits.shape
    values = logits.flatten(0, 1).tolist()
    shown = [[True] * n for _ in values] if mask is None else mask.repeat_interleave(experts, 0).tolist()
    rankings = [ranking(v, row) for v, row in zip(values, shown)]
    expected = [torch.tensor(t, device=logits.device) for t in selected(rankings, shown, k)]
    if implementation is reference:
        actual = reference.select(logits, k, mask)
    else:
        actual = ops.select(logits, mask, k, kernels == "triton")
    for name, a, e, dtype in zip(
        ("indices", "slots", "inverse"), actual, expected, (torch.int64, torch.bool, torch.int32)
    ):
        check_identical(a, e.view(batch, experts, -1).to(dtype), name)


def kernels_of(request: pytest.FixtureRequest) -> str:
    return request.node.callspec.params["implementation"]


@pytest.mark.parametrize(("n", "count"), [(1, 1), (2, 3), (3, 13), (4, 75), (5, 541), (6, 4683)])
@FLOATS
@BOTH
def test_selection_of_every_weak_order(
    implementation: ModuleType,
    dtype: torch.dtype,
    n: int,
    count: int,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    orders = torch.tensor(weak_orders(n))
    assert len(orders) == count  # the Fubini numbers
    for k in range(1, n + 1):
        ranks = thinned(orders, 40 if dtype == torch.float32 else 13, k)
        logits = (n // 2 - ranks).to(dtype)[None].to(device)  # both signs, and 0
        check_selection(implementation, kernels_of(request), logits, None, k)


@pytest.mark.parametrize("n", range(1, 9))
@FLOATS
@BOTH
def test_selection_under_every_mask(
    implementation: ModuleType, dtype: torch.dtype, n: int, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """Every mask of n tokens over every pattern of values, for every k."""
    masks = torch.tensor(list(itertools.product((False, True), repeat=n)))
    patterns = torch.tensor(PATTERNS, dtype=dtype)[:, :n]
    for k in range(1, n + 1):
        mask = thinned(masks, 2 if dtype == torch.float32 else 1, k)
        logits = patterns.expand(len(mask), -1, -1).contiguous()
        check_selection(implementation, kernels_of(request), logits.to(device), mask.to(device), k)


# --- combination: every routing --------------------------------------------------------------------------------------


@dataclass
class Routings:
    """Items: every routing of n tokens to k slots of 2 experts, under every token mask."""

    indices: Tensor  # (items, 2, k)
    slots: Tensor  # (items, 2, k)
    mask: Tensor  # (items, n)

    @classmethod
    def of(cls, n: int, k: int, ordered: bool) -> Routings:
        """ordered: in every order of the slots, too."""
        every = itertools.permutations if ordered else itertools.combinations
        one = list(itertools.product(every(range(n), k), itertools.product((False, True), repeat=k)))
        items = [
            ((first[0], second[0]), (first[1], second[1]), mask)
            for first, second, mask in itertools.product(one, one, itertools.product((False, True), repeat=n))
        ]
        return cls(*(torch.tensor(part) for part in zip(*items)))

    def some(self, most: int, shift: int) -> Routings:
        return Routings(*(thinned(t, most, shift) for t in (self.indices, self.slots, self.mask)))


@dataclass
class Terms:
    """Integers, multiples of 6: quotients by 1, 2 and 3 are integers too, and every sum is exact in any order."""

    y: Tensor  # (items, 2, k, D)
    scores: Tensor  # (items, 2, k)
    local: Tensor | None  # (items, n, D)
    null: Tensor | None  # (D)
    g: Tensor  # (items, n, D)


DIM = 2


def terms_of(r: Routings, local: bool, null: bool, dtype: torch.dtype, device: torch.device) -> Terms:
    g = generator(17)
    items, n = r.mask.shape

    def sixes(*shape: int) -> Tensor:
        return (6 * torch.randint(-20, 21, shape, generator=g)).to(dtype).to(device)

    k = r.indices.shape[-1]
    scores = torch.tensor([-1.0, 1.0, 2.0, 3.0])[torch.randint(4, (items, 2, k), generator=g)].to(dtype).to(device)
    return Terms(
        sixes(items, 2, k, DIM),
        scores,
        sixes(items, n, DIM) if local else None,
        sixes(DIM) if null else None,
        sixes(items, n, DIM),
    )


def by_hand(r: Routings, t: Terms, average: bool) -> dict[str, np.ndarray]:
    """Output and gradients, slot by slot, over all items at a time."""
    indices, slots, mask = (a.numpy() for a in (r.indices, r.slots, r.mask))
    y, scores, g = (a.cpu().double().numpy() for a in (t.y, t.scores, t.g))
    items, n = mask.shape
    places = list(itertools.product(range(2), range(indices.shape[-1]), range(n)))
    total, count = np.zeros((items, n, DIM)), np.zeros((items, n))
    for e, slot, token in places:
        here = (indices[:, e, slot] == token) & slots[:, e, slot]
        total[here, token] += scores[here, e, slot, None] * y[here, e, slot]
        count[here, token] += 1
    if t.local is not None:
        total += t.local.cpu().double().numpy()
        count += 1
    share = 1 / np.maximum(count, 1)[..., None] if average else np.ones((items, n, 1))
    out = np.rint(total * share) if average else total
    if t.null is not None:
        out[count == 0] = t.null.cpu().double().numpy()
    out[~mask] = 0
    passed = np.rint(g * share) * mask[..., None]
    found = {"out": out, "y": np.zeros_like(y), "scores": np.zeros_like(scores)}
    for e, slot, token in places:
        here = (indices[:, e, slot] == token) & slots[:, e, slot]
        found["y"][here, e, slot] = scores[here, e, slot, None] * passed[here, token]
        found["scores"][here, e, slot] = (y[here, e, slot] * passed[here, token]).sum(-1)
    if t.local is not None:
        found["local"] = passed
    if t.null is not None:
        found["null"] = (g * ((count == 0) & mask)[..., None]).sum((0, 1))
    return found


def by(implementation: ModuleType, r: Routings, t: Terms, average: bool) -> dict[str, Tensor]:
    device, dtype = t.y.device, t.y.dtype
    items, n = r.mask.shape
    indices, slots, mask = (a.to(device) for a in (r.indices, r.slots, r.mask))
    leaves = {name: getattr(t, name) for name in ("y", "scores", "local", "null")}
    leaves = {name: a.clone().requires_grad_() for name, a in leaves.items() if a is not None}
    y, scores, local, null = (leaves.get(name) for name in ("y", "scores", "local", "null"))
    if implementation is reference:
        logits = torch.zeros(items, 2, n, device=device)
        routes = reference.Routes(indices, slots, scores, logits)
        weighted = y * scores[..., None]
        out = reference.combine(
            weighted, routes, n, local=local, average_routed=average, null_routed_token=null, mask=mask
        )
    else:
        routing = scores, indices, slots, ops.inverse_map(indices, slots, n)
        triton = choose("mixture", Request(device, dtype)).triton
        out = ops.combine(y.transpose(0, 1), *routing, local, null, mask, average, dtype, triton)
    return {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), t.g)))}


@pytest.mark.parametrize(
    ("n", "k", "ordered"),
    [(1, 1, True), (2, 1, True), (2, 2, True), (3, 1, True), (3, 2, True), (3, 3, True), (4, 4, False)],
    ids=str,
)
@BOTH
def test_combination_of_every_routing(
    implementation: ModuleType, n: int, k: int, ordered: bool, device: torch.device
) -> None:
    """Which slot holds which token, slot masks, token masks; each with and without local, null token and average.

    Values and every gradient, exactly. Four tokens: in slots of their own order, so which experts hold which tokens.
    """
    every = Routings.of(n, k, ordered)
    for i, (local, null, average) in enumerate(itertools.product((False, True), repeat=3)):
        dtype = (torch.float32, torch.float64)[(i + n) % 2]
        r = every.some(6, 5 * i)
        t = terms_of(r, local, null, dtype, device)
        expected = by_hand(r, t, average)
        actual = by(implementation, r, t, average)
        assert actual.keys() == expected.keys()
        for name, a in actual.items():
            check_identical(a, torch.as_tensor(expected[name]).to(dtype).to(device), name)


# --- the exact solver: certificates ----------------------------------------------------------------------------------

ROWS, LENGTH = 24, 33
SHIFTS = (0.0, 1000.0, -1000.0)


def rows_of(kind: str, seed: int) -> Tensor:
    """float64 (ROWS, LENGTH), multiples of 2^-10 below 200, which float32 holds exactly beside a shift of 1000."""
    g = generator(seed)
    s = torch.randn(ROWS, LENGTH, generator=g, dtype=torch.float64)
    if kind == "close":
        s *= 0.05
    elif kind == "wide":
        s *= 30
    elif kind == "saturated":  # several far above the rest
        s[:, ::5] += 20
    elif kind == "ties":
        s = (2 * s).round()
    elif kind == "constant":
        s = s[:, :1].expand_as(s).clone()
    return (s * 1024).round() / 1024


KINDS = pytest.mark.parametrize("kind", ["normal", "close", "wide", "saturated", "ties", "constant"])
MASSES = (0.5, 1.0, 3.375, 16.0, LENGTH - 0.5, float(LENGTH))


@dataclass
class Certificate:
    """Of scores in [0, 1]: the multiplier a that they imply, from the largest of those below 1, all in float64.

    exponents: (s + a) / eps. error: by how much a score may be off (see `rounding`). unique: a is determined, by a
    score below 1 that is more than rounding; a mass that saturated tokens make up by themselves leaves none.
    """

    exponents: Tensor
    valid: Tensor
    mass: Tensor  # min(k, valid tokens)
    error: float
    unique: Tensor


def rounding(kernels: str, dtype: torch.dtype, logits: Tensor, k: float, eps: float) -> float:
    """Bound of the error of a score.

    The exponent x = (s + a) / eps is a sum of logits over eps and of two logarithms, of k and of at most N; each of
    the operations that make it up rounds once relative to the largest term: a division of s, the subtraction and the
    addition of the maximum in logsumexp, a subtraction of logarithms, a sum s + a, a division: less than 8, of eps / 2
    each. A sum of N exponentials and its logarithm add N eps / 2, an exponential 2 eps. And x of the size of x itself:
    exp(x) |x| is at most 1. Our kernel takes logits relative to the largest free one before it divides, which is exact
    for neighbours: there no logit is a term.
    """
    n = logits.shape[-1]
    terms = abs(math.log(k)) + math.log(n) + 1
    if kernels != "triton":
        terms += logits.abs().max().item() / eps
    return torch.finfo(dtype).eps * (4 * terms + n / 2 + 2)


def certificate(kernels: str, scores: Tensor, logits: Tensor, mask: Tensor | None, k: float, eps: float) -> Certificate:
    s, lam = logits.double(), scores.detach().double()
    valid = torch.ones_like(s, dtype=torch.bool) if mask is None else mask[:, None].expand_as(s)
    free = valid & (lam < 1)
    best = torch.where(free, s, -INF).argmax(-1, keepdim=True)
    exponents = (s - s.gather(-1, best)) / eps + lam.gather(-1, best).log()
    count = valid.sum(-1)
    error = rounding(kernels, scores.dtype, logits, k, eps)
    unique = (count > k) & (torch.where(free, lam, 0).amax(-1) > 2 * error)
    return Certificate(exponents, valid, count.double().clamp_max(k), error, unique)


def solver_cases(kind: str, dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor | None, float]]:
    """Logits (rows, 1, LENGTH), mask, k: every shift, masked and not, every mass."""
    cases = []
    for i, (shift, masked, k) in enumerate(itertools.product(SHIFTS, (False, True), MASSES)):
        s = thinned(rows_of(kind, i), 1, i)
        mask = torch.rand(ROWS, LENGTH, generator=generator(i)) < 0.7 if masked else None
        mask = None if mask is None else thinned(mask, 1, i).to(device)
        cases.append(((s + shift).to(dtype)[:, None].to(device), mask, k))
    return cases


@KINDS
@FLOATS
@pytest.mark.parametrize("eps", [0.03, 1.0])
@BOTH
def test_certificate_of_the_exact_solver(
    implementation: ModuleType,
    kind: str,
    dtype: torch.dtype,
    eps: float,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    """Scores are min(1, exp((s + a) / eps)) for one a per row, of mass min(k, valid tokens), and grow with s."""
    kernels, proved = kernels_of(request), 0
    for logits, mask, k in solver_cases(kind, dtype, device):
        scores = implementation.capped_simplex(logits, k, mask, eps=eps)
        assert scores.dtype == dtype
        c = certificate(kernels, scores, logits, mask, k, eps)
        assert ((scores >= 0) & (scores <= 1)).all()
        assert not scores[~c.valid].any()
        full = c.valid.sum(-1) <= k
        assert (scores[full] == c.valid[full]).all(), "all fit: every score is 1"
        implied = torch.where(c.valid, c.exponents.clamp_max(0).exp(), 0)
        off = (scores.double() - implied).abs()
        assert (off[c.unique] <= 2 * c.error).all()  # the score that gives a is off itself
        residual = (implied.sum(-1) - c.mass).abs()
        # Only scores below 1 move with a, each by at most itself times the error: together at most the mass.
        assert (residual[c.unique] <= 2 * c.error * c.mass[c.unique]).all()
        # Of all rows, those without such an a too: what was rounded up to 1 lacks as much.
        assert ((scores.double().sum(-1) - c.mass).abs() <= 2 * c.error * c.mass.clamp_min(1)).all()
        order = torch.where(c.valid, logits.double(), -INF).argsort(-1)
        assert (scores.gather(-1, order).diff(dim=-1) >= 0).all()
        proved += int(c.unique.sum())
    assert proved


@KINDS
@FLOATS
@pytest.mark.parametrize("eps", [0.03, 1.0])
@BOTH
def test_certificate_of_the_exact_solvers_gradient(
    implementation: ModuleType,
    kind: str,
    dtype: torch.dtype,
    eps: float,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    """ds sums to 0, is 0 where a score is 1, and elsewhere w (g - c) / eps for one c per row."""
    kernels, proved = kernels_of(request), 0
    for i, (logits, mask, k) in enumerate(solver_cases(kind, dtype, device)):
        leaf = logits.clone().requires_grad_()
        scores = implementation.capped_simplex(leaf, k, mask, eps=eps)
        g = torch.randn(logits.shape, generator=generator(100 + i), dtype=torch.float64).to(dtype).to(device)
        (ds,) = torch.autograd.grad(scores, leaf, g)
        c = certificate(kernels, scores, logits, mask, k, eps)
        ds, g = ds.double(), g.double()
        assert not ds[~c.valid].any()
        assert not ds[c.valid.sum(-1) <= k].any(), "all fit: nothing moves"
        saturated = c.valid & (c.exponents > 2 * c.error) & c.unique[..., None]
        assert not ds[saturated].any()
        w = torch.where(c.valid & ~saturated, c.exponents.clamp_max(0).exp(), 0)
        terms = w * (g.abs() + g.abs().amax(-1, keepdim=True)) / eps
        # A weight is off by its error, a weighted mean by as much, and by N roundings of its sums.
        error = 4 * c.error + torch.finfo(dtype).eps * LENGTH
        # A token that may count as either, saturated or free, leaves two right answers.
        decided = c.unique & ~(c.valid & (c.exponents.abs() <= 2 * c.error)).any(-1)
        assert (ds.sum(-1).abs() <= error * terms.sum(-1))[decided].all()
        mean = (w * g).sum(-1, keepdim=True) / w.sum(-1, keepdim=True)
        # By row: where all weight is one token's, the others' is small, and so is what that one has left.
        off = (ds - w * (g - mean) / eps).abs()
        assert (off <= error * terms.sum(-1, keepdim=True))[decided].all()
        proved += int(decided.sum())
    assert proved or kind == "constant"


@KINDS
@FLOATS
@TRITON
def test_the_kernel_does_not_see_a_shift(kernels: str, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Bit for bit, forward and backward, where the shifted logits are exact."""
    s = thinned(rows_of(kind, 3), 4)[:, None].to(device)
    g = torch.randn(s.shape, generator=generator(5), dtype=torch.float64).to(dtype).to(device)
    for k in (0.5, 3.375, 16.0):
        found = []
        for shift in SHIFTS:
            leaf = (s + shift).to(dtype).requires_grad_()
            assert torch.equal(leaf.double() - shift, s)
            scores = optimized.capped_simplex(leaf, k)
            found.append((scores.detach(), *torch.autograd.grad(scores, leaf, g)))
        for other in found[1:]:
            for actual, expected in zip(other, found[0]):
                check_identical(actual, expected)
