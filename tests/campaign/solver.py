"""Cases of the solvers: scores and their gradient, held against float64 in the error budgets of `reference.testing`.

Finite logits and NaN: what an infinite logit scores is not defined (see `reference.oracle`).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from optimized import ops
from reference.testing import STAGES

from . import oracles
from .comparison import Cases, Compared, compare
from .draws import (
    DTYPES,
    LAYOUTS,
    LENGTHS,
    MASKS,
    ROWS,
    Array,
    Storage,
    draw_layout,
    draw_length,
    draw_mask,
    flat,
    generator,
    level_of_length,
    level_of_rows,
    padded,
    pick,
    weigh,
)
from .kind import Setting, broke_the_device, digest_of
from .oracles import Kinks, Rows
from .selection import by_length, rows_of
from .tally import Failure, Tally

NAME = "solver"
CHUNK = 500
SOLVERS = ("iterative", "exact")
# By their shares: of what saturates every token, or leaves none, there is little to compare.
VALUES = {"normal": 6, "large": 2, "tiny": 2, "integer": 2, "constant": 1, "outlier": 2, "ties": 3, "shifted": 2}
VALUES |= {"huge": 1, "NaN": 1}
COTANGENTS = {"dense": 6, "one hot": 1, "ones": 1, "NaN where masked": 2}
MASSES = ("below 1", "whole", "fractional", "N")
STEPS = ("1", "2 - 5", "6 - 20", "21 - 40")
EPS = ("below 0.05", "0.05 - 0.3", "above 0.3")
EPS_INIT = ("below eps", "eps - 2", "above 2")
DECAYS = ("below 0.6", "0.6 - 0.9", "above 0.9")
LEVELS = {
    "solver": SOLVERS,
    "dtype": DTYPES,
    "length": LENGTHS,
    "rows": ROWS,
    "values": tuple(VALUES),
    "mask": tuple(MASKS),
    "mass": MASSES,
    "steps": STEPS,
    "eps": EPS,
    "eps_init": EPS_INIT,
    "eps_decay": DECAYS,
    "layout": LAYOUTS,
    "cotangent": tuple(COTANGENTS),
}


@dataclass(frozen=True)
class Configuration:
    """Of one call; the exact solver knows no steps and one temperature."""

    solver: str
    batch: int
    experts: int
    n: int
    mass: float
    n_iters: int
    eps: float
    eps_init: float
    eps_decay: float
    dtype: str
    values: str
    mask: str
    layout: str
    cotangent: str

    @property
    def coldest(self) -> float:
        """Temperature of the scores: no step has a lower one."""
        return max(self.eps_init * self.eps_decay**self.n_iters, self.eps) if self.solver == "iterative" else self.eps

    def levels(self) -> tuple[int, ...]:
        """The exact solver has the levels of what it does not read, too: they were drawn."""
        fractional = "below 1" if self.mass < 1 else "fractional"
        names = (
            self.solver,
            self.dtype,
            level_of_length(self.n),
            level_of_rows(self.batch * self.experts),
            self.values,
            self.mask,
            "N" if self.mass == self.n else "whole" if self.mass == int(self.mass) else fractional,
            STEPS[(self.n_iters > 1) + (self.n_iters > 5) + (self.n_iters > 20)],
            EPS[(self.eps >= 0.05) + (self.eps > 0.3)],
            EPS_INIT[(self.eps_init >= self.eps) + (self.eps_init >= self.eps and self.eps_init > 2)],
            DECAYS[(self.eps_decay >= 0.6) + (self.eps_decay > 0.9)],
            self.layout,
            self.cotangent,
        )
        return tuple(of.index(name) for of, name in zip(LEVELS.values(), names))


@dataclass(frozen=True)
class Case:
    """A configuration with its data."""

    configuration: Configuration
    logits: Array  # (B, E, N)
    mask: Array | None  # (B, N)
    g: Array  # (B, E, N), of the scores

    def digest(self) -> str | None:
        return digest_of(astuple(self.configuration), self.logits, self.mask, self.g)


def compiled_for(c: Configuration) -> tuple[Any, ...]:
    """What Triton compiles the kernels anew for."""
    return c.solver, c.dtype, (c.n - 1).bit_length(), c.mask == "none", c.layout == "unaligned"


def draw(seed: int, index: int) -> Case:
    """The case of an index."""
    rng = generator(seed, NAME, index)
    n = draw_length(rng)
    u = rng.random(20).tolist()
    batch, experts = (1, 1, 2, 3)[int(u[0] * 4)], (1, 1, 2, 3)[int(u[1] * 4)]
    if n > 4096:
        batch, experts = 1, min(experts, 2)
    mass = (float(n), float(1 + int(u[3] * n)), 0.3 + u[3] * (n - 0.3), 0.01 + 0.99 * u[3])[int(u[2] ** 0.6 * 4)]
    low, high = ((1, 1), (2, 5), (6, 20), (6, 20), (21, 40))[int(u[4] * 5)]
    c = Configuration(
        solver="iterative" if u[5] < 0.65 else "exact",
        batch=batch,
        experts=experts,
        n=n,
        mass=mass,
        n_iters=low + int(u[6] * (high - low + 1)),
        eps=pick(u[8], (0.03, 0.1, 1.0)) if u[7] < 0.3 else 0.01 * 200 ** u[8],
        eps_init=pick(u[10], (0.01, 1.0, 4.0)) if u[9] < 0.3 else 0.005 * 2000 ** u[10],
        eps_decay=pick(u[12], (0.5, 0.7, 1.0)) if u[11] < 0.3 else 0.3 + 0.7 * u[12],
        dtype=pick(u[13], DTYPES),
        values=weigh(u[14], VALUES),
        mask=weigh(u[15], MASKS),
        layout=draw_layout(u[16], n),
        cotangent=weigh(u[17], COTANGENTS),
    )
    logits = draw_values(rng, (batch, experts, n), c.values).astype(c.dtype)
    if c.layout == "expanded":
        logits = np.broadcast_to(logits[:1], logits.shape)
    mask = draw_mask(rng, batch, n, c.mask)
    return Case(c, logits, mask, draw_cotangent(rng, logits.shape, mask, c.cotangent).astype(c.dtype))


def draw_values(rng: np.random.Generator, shape: tuple[int, int, int], values: str) -> Array:
    size = 0.3 * 10 ** rng.uniform(0, 1.5)
    if values == "integer":
        return rng.integers(-3, 4, shape).astype(np.float64)
    if values == "constant":
        return np.full(shape, size * rng.standard_normal())
    if values == "ties":
        return size * rng.standard_normal(max(shape[-1] // 3, 1))[rng.integers(0, max(shape[-1] // 3, 1), shape)]
    t = size * rng.standard_normal(shape)
    if values == "large":
        t *= 30
    elif values == "tiny":
        t *= 10 ** rng.uniform(-30, -2)
    elif values == "huge":
        t *= 10 ** rng.uniform(2, 6)
    elif values == "shifted":
        t += rng.choice((3.0, -40.0, 100.0))
    elif values == "outlier":
        t.reshape(-1)[rng.integers(t.size)] = rng.choice((1000.0, -1000.0))
    elif values == "NaN":
        t[rng.random(shape) < rng.random() ** 4] = np.nan
    return t


def draw_cotangent(rng: np.random.Generator, shape: tuple[int, ...], mask: Array | None, cotangent: str) -> Array:
    if cotangent == "ones":
        return np.ones(shape)
    if cotangent == "one hot":
        g = np.zeros(shape)
        g.reshape(-1)[rng.integers(g.size)] = 1.0
        return g
    g = rng.standard_normal(shape)
    if cotangent == "NaN where masked" and mask is not None:
        g[np.broadcast_to(~mask[:, None], shape)] = np.nan
    return g


class Found(NamedTuple):
    """What an implementation returned, flat. a (T, B E); of the exact solver empty."""

    scores: Array
    gradient: Array
    a: Array


def run(first: int, count: int, setting: Setting) -> Tally:
    """All launches, then one copy from the device, then comparisons of cases of about one length."""
    tally = Tally()
    cases = {i: draw(setting.seed, i) for i in range(first, first + count)}
    tally.cover(LEVELS, [case.configuration.levels() for case in cases.values()])
    for case in cases.values():
        tally.count(case.configuration.dtype, case.digest())
    done = _launch(cases, setting, tally)
    for solver in SOLVERS:
        of = {i: cases[i].configuration.n for i in done if cases[i].configuration.solver == solver}
        for group in by_length(of):
            # A step then concerns the first rows only; the exact solver has none.
            group.sort(key=lambda i: -cases[i].configuration.n_iters)
            _judge(group, [cases[i] for i in group], [done[i] for i in group], setting, tally)
    tally.note("cases whose gradient is 0 everywhere", sum(not found.gradient.any() for found in done.values()))
    return tally


def _launch(cases: dict[int, Case], setting: Setting, tally: Tally) -> dict[int, Found]:
    storages = {name: Storage(name) for name in (*DTYPES, "bool")}
    places = {}
    for i, case in cases.items():
        c, own = case.configuration, storages[case.configuration.dtype]
        mask = None if case.mask is None else storages["bool"].add(case.mask[:, None])
        places[i] = own.add(case.logits, c.layout), mask, None if c.cotangent == "ones" else own.add(case.g)
    buffers = {name: storage.to(setting.device) for name, storage in storages.items()}
    one = {dtype: torch.ones((), dtype=getattr(torch, dtype), device=setting.device) for dtype in DTYPES}
    launched: dict[str, dict[int, tuple[Tensor, ...]]] = {dtype: {} for dtype in DTYPES}
    for i, case in cases.items():
        c, (at, mask_at, g_at) = case.configuration, places[i]
        shape = (c.batch, c.experts, c.n)
        logits = buffers[c.dtype].as_strided(shape, at.strides, at.offset).requires_grad_()
        mask = None if mask_at is None else buffers["bool"].as_strided((c.batch, c.n), (c.n, 1), mask_at.offset)
        if g_at is None:  # as .sum().backward() sends it
            g = one[c.dtype].expand(shape)
        else:
            g = buffers[c.dtype].as_strided(shape, g_at.strides, g_at.offset)
        try:
            launched[c.dtype][i] = _call(c, logits, mask, g, setting.triton)
        except Exception as error:
            if broke_the_device(error):
                raise
            tally.failures.append(Failure(f"{c}: {error!r}", setting.snippet(NAME, str(i))))
    found = {}
    for results in launched.values():
        if results:
            parts = []
            for which in range(3):
                ends = np.cumsum([r[which].numel() for r in results.values()])[:-1]
                parts.append(np.split(flat([r[which] for r in results.values()]), ends))
            found |= {i: Found(*p) for i, p in zip(results, zip(*parts))}
    return found


def _call(c: Configuration, logits: Tensor, mask: Tensor | None, g: Tensor, triton: bool) -> tuple[Tensor, ...]:
    if c.solver == "iterative":
        scores, a, _ = ops.coordinate_descent(logits, mask, c.mass, c.n_iters, c.eps, c.eps_init, c.eps_decay, triton)
    else:
        scores, a = ops.capped_simplex(logits, mask, c.mass, c.eps, triton)[0], logits.new_empty(0)
    return scores, *torch.autograd.grad(scores, logits, g), a


def _judge(group: list[int], cases: list[Case], found: list[Found], setting: Setting, tally: Tally) -> None:
    """Enters what the cases of a solver use of their budgets, and what fails."""
    of_case, rows, many, actual, gradient, g = _padded(cases, found)
    iterative = cases[0].configuration.solver == "iterative"
    judge = _judge_iterative if iterative else _judge_exact
    with np.errstate(divide="ignore", over="ignore", invalid="ignore", under="ignore"):
        messages, scores, gradients = judge(cases, found, rows, many, actual, gradient, g, tally)
    outside = many.inside & ((actual < 0) | (actual > 1))
    hidden = many.inside & ~rows.valid & ((actual != 0) | (gradient != 0))
    for case in np.unique(of_case[(outside | hidden).any(-1)]):
        messages[case] += "scores outside of [0, 1], or not 0 where masked. "
    solver = cases[0].configuration.solver
    for quantity, compared in (("scores", scores), ("gradient", gradients)):
        for dtype in DTYPES:
            of = np.flatnonzero(many.dtype == dtype)
            snippets = [setting.snippet(NAME, str(group[i])) for i in of]
            tally.enter(f"{solver} {quantity}", dtype, compared.fraction[of], snippets)
        seen = actual if quantity == "scores" else gradient
        for i in np.flatnonzero(~(compared.fraction <= 1)):
            row, token = compared.row[i], compared.token[i]
            where = f"row {row - many.starts[i]}, token {token}: {seen[row, token]:.9g}"
            messages[i] += f"{quantity}: {compared.fraction[i]:.3g} of the budget at {where}. "
    for i, message in zip(group, messages):
        if message:
            which = cases[group.index(i)].configuration
            tally.failures.append(Failure(f"{which}: {message}", setting.snippet(NAME, str(i))))


def _padded(cases: list[Case], found: list[Found]) -> tuple[Array, Rows, Cases, Array, Array, Array]:
    """Case of each row, rows of the oracle, cases, and padded in float64: scores, gradient, cotangent (0 if masked)."""
    configurations = [case.configuration for case in cases]
    counts = np.array([c.batch * c.experts for c in configurations])
    of_case = np.repeat(np.arange(len(cases)), counts)
    width = max(c.n for c in configurations)
    s, valid = rows_of(cases, width)
    names = ("mass", "n_iters", "eps", "eps_init", "eps_decay")
    rows = Rows(s, valid, *(np.array([getattr(c, name) for c in configurations])[of_case] for name in names))
    n = np.array([c.n for c in configurations])
    starts = np.concatenate(([0], counts.cumsum()[:-1]))
    many = Cases(starts, n, np.array([c.dtype for c in configurations]), np.arange(width) < n[of_case][:, None])
    scores, gradient = (
        padded([getattr(f, name).reshape(-1, c.n) for f, c in zip(found, configurations)], width, 0.0, np.float64)
        for name in ("scores", "gradient")
    )
    g = padded([case.g.reshape(-1, case.configuration.n) for case in cases], width, 0.0, np.float64)
    return of_case, rows, many, scores, gradient, np.where(valid, g, 0)


def _conditioning(rows: Rows, many: Cases, temperature: Array) -> Array:
    """(C,): as `conditioning` in test_routing: exp((s + a) / eps) makes a relative error |s| / eps times as large."""
    return many.n + many.largest(np.abs(np.nan_to_num(rows.s, posinf=0, neginf=0)) * rows.valid) / temperature


Judged = tuple[list[str], Compared, Compared]


def _judge_iterative(
    cases: list[Case], found: list[Found], rows: Rows, many: Cases, actual: Array, gradient: Array, g: Array,
    tally: Tally,
) -> Judged:  # fmt: skip
    """The gradient with the implementation's own saturated sets, once they agree with the oracle's but for kinks."""
    single = rows._replace(s=rows.s.astype(np.float32))
    eps = np.array([case.configuration.coldest for case in cases])
    exact = oracles.descend(rows)
    condition = many.n + many.worst_row(np.nan_to_num(exact.drift, posinf=0)) / eps
    scale = condition * many.largest(np.abs(np.nan_to_num(exact.scores)))
    scores = compare(many, actual, exact.scores, oracles.descend(single).scores, stage="scores", scale=scale)
    tally.note("cases whose budget of scores exceeds 1% of the largest score", _loose(many, scale, exact.scores))

    steps = int(rows.n_iters[0])
    a = np.concatenate([_iterates(f, case, steps) for f, case in zip(found, cases)], axis=1)
    poisoned = (np.isnan(rows.s) & rows.valid).any(-1, keepdims=True)
    kinks = Kinks(np.where(rows.valid & ~np.isnan(rows.s), rows.s, 0), a)
    largest_a = many.worst_row(np.abs(exact.a).max(0))
    eps_init = rows.eps_init[many.starts]
    size = 1 + largest_a + eps_init * np.log(many.n + 1) + many.largest(np.abs(kinks.s))
    bound = (32 * many.limit("eps") * size)[many.of_row()][:, None]
    messages = [""] * len(cases)
    for t in range(steps):
        active = int(np.searchsorted(-rows.n_iters, -t, side="left"))
        own = kinks.s[:active] < -exact.a[t, :active, None]
        differ = (own != kinks.free(t, active)) & rows.valid[:active] & ~poisoned[:active]
        if differ.any():
            tally.note("tokens within rounding of a kink", int(differ.sum()))
            gap = np.abs(kinks.s[:active] + exact.a[t, :active, None])
            for case in np.unique(many.of_row()[:active][(differ & ~(gap <= bound[:active])).any(-1)]):
                messages[case] += f"step {t}: a token away from every kink changed sides. "

    ds, own_scores = oracles.descend_gradient(rows, kinks, g)
    baseline, _ = oracles.descend_gradient(single, kinks, g.astype(np.float32))
    growth = rows.n_iters[many.starts] * (condition + largest_a / eps)
    scale = many.largest(np.abs(g)) * many.largest(np.abs(np.nan_to_num(own_scores))) / eps * growth
    # What a row gets whose scores are NaN is not defined; that it spoils no other row is.
    parts = [np.where(poisoned, 0, t) for t in (gradient, ds, baseline)]
    return messages, scores, _compare_gradients(many, parts, scale, g, eps)


def _iterates(found: Found, case: Case, steps: int) -> Array:
    """(steps, B E), the last ones repeated."""
    a = found.a.reshape(case.configuration.n_iters, -1).astype(np.float64)
    return np.concatenate((a, np.repeat(a[-1:], steps - len(a), 0)))


def _judge_exact(
    cases: list[Case], found: list[Found], rows: Rows, many: Cases, actual: Array, gradient: Array, g: Array,
    tally: Tally,
) -> Judged:  # fmt: skip
    single = rows._replace(s=rows.s.astype(np.float32))
    eps = np.array([case.configuration.eps for case in cases])
    exact, free = oracles.cap(rows)
    rough, rough_free = oracles.cap(single)
    condition = _conditioning(rows, many, eps)
    scale = condition * many.largest(np.abs(np.nan_to_num(exact)))
    scores = compare(many, actual, exact, rough, stage="scores", scale=scale)
    tally.note("cases whose budget of scores exceeds 1% of the largest score", _loose(many, scale, exact))

    ds = oracles.cap_gradient(rows, exact, free, g)
    baseline = oracles.cap_gradient(single, rough, rough_free, g.astype(np.float32))
    # As close as the budget of the scores lets them be.
    close = np.maximum(STAGES["scores"].floor * many.limit("eps") * condition, 1e-9)
    degenerate = oracles.about_to_saturate(rows, exact, close[many.of_row()])
    tally.note("rows about to saturate, whose gradient jumps", int(degenerate.sum()))
    ignored = degenerate[:, None] | (np.isnan(rows.s) & rows.valid).any(-1, keepdims=True)
    scale = many.largest(np.abs(g)) / eps * condition
    parts = [np.where(ignored, 0, t) for t in (gradient, ds, baseline)]
    return [""] * len(cases), scores, _compare_gradients(many, parts, scale, g, eps)


def _compare_gradients(many: Cases, parts: list[Array], scale: Array, g: Array, eps: Array) -> Compared:
    """What a score loses by underflow, its gradient loses times g / eps."""
    slope = np.maximum(many.largest(np.abs(g)) / eps, 1)
    return compare(many, *parts, stage="solver_gradient", scale=scale, vanishing=True, slope=slope)


def _loose(many: Cases, scale: Array, scores: Array) -> int:
    top = many.largest(np.abs(np.nan_to_num(scores)))
    return int((STAGES["scores"].floor * many.limit("eps") * scale > 0.01 * top).sum())


def describe(index: int, setting: Setting) -> str:
    case = draw(setting.seed, index)
    with np.printoptions(threshold=40, linewidth=110):
        return f"{case.configuration}\nlogits:\n{case.logits}\nmask:\n{case.mask}\ncotangent:\n{case.g}"
