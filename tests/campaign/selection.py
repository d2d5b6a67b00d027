"""Cases of selection: indices, slot mask and inverse map of `ops.select`, exactly those that sorting gives."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimized import ops

from . import oracles
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
from .tally import Failure, Tally

NAME = "selection"
CHUNK = 500
VALUES = ("normal", "atoms", "ties", "integer", "constant", "grid", "huge", "tiny", "NaN", "ends of the range")
SLOTS = ("1", "some", "all but one", "all")
LEVELS = {
    "dtype": DTYPES,
    "length": LENGTHS,
    "rows": ROWS,
    "slots": SLOTS,
    "values": VALUES,
    "mask": tuple(MASKS),
    "layout": LAYOUTS,
}
ATOMS = np.array([0.0, -0.0, 1.0, 1.0, -1.0, 2.5, np.inf, -np.inf, np.nan])


@dataclass(frozen=True)
class Configuration:
    """Of one call."""

    batch: int
    experts: int
    n: int
    k: int
    dtype: str
    values: str
    mask: str
    layout: str

    def levels(self) -> tuple[int, ...]:
        slots = "all" if self.k == self.n else "1" if self.k == 1 else "all but one" if self.k == self.n - 1 else "some"
        names = (
            self.dtype,
            level_of_length(self.n),
            level_of_rows(self.batch * self.experts),
            slots,
            self.values,
            self.mask,
            self.layout,
        )
        return tuple(of.index(name) for of, name in zip(LEVELS.values(), names))


@dataclass(frozen=True)
class Case:
    """A configuration with its data."""

    configuration: Configuration
    logits: Array  # (B, E, N)
    mask: Array | None  # (B, N)

    def digest(self) -> str | None:
        return digest_of(astuple(self.configuration), self.logits, self.mask)


def compiled_for(c: Configuration) -> tuple[Any, ...]:
    """What Triton compiles the kernels anew for."""
    return c.dtype, (c.n - 1).bit_length(), c.mask == "none", c.layout == "unaligned"


def draw(seed: int, index: int) -> Case:
    """The case of an index."""
    rng = generator(seed, NAME, index)
    n = draw_length(rng)
    u = rng.random(8).tolist()
    k = (1, 1 + int(u[1] * n), 1 + int(u[1] * n), max(n - 1, 1), n)[int(u[0] * 5)]
    batch, experts = (1, 1, 2, 3)[int(u[2] * 4)], (1, 1, 2, 3)[int(u[3] * 4)]
    if n > 4096:
        batch, experts = 1, min(experts, 2)
    c = Configuration(
        batch, experts, n, k, pick(u[4], DTYPES), pick(u[5], VALUES), weigh(u[6], MASKS), draw_layout(u[7], n)
    )
    logits = draw_values(rng, (batch, experts, n), c.values).astype(c.dtype)
    if c.layout == "expanded":
        logits = np.broadcast_to(logits[:1], logits.shape)
    return Case(c, logits, draw_mask(rng, batch, n, c.mask))


def draw_values(rng: np.random.Generator, shape: tuple[int, int, int], values: str) -> Array:
    """float64 numbers; those of "atoms" and "NaN" hold what ranks by another rule than size."""
    size = 10 ** rng.uniform(-2, 2)
    if values == "atoms":
        return ATOMS[rng.integers(0, len(ATOMS), shape)]
    if values == "ties":
        return size * rng.standard_normal(max(shape[-1] // 4, 1))[rng.integers(0, max(shape[-1] // 4, 1), shape)]
    if values == "integer":
        return rng.integers(-3, 4, shape).astype(np.float64)
    if values == "constant":
        return np.full(shape, size * rng.standard_normal())
    if values == "ends of the range":
        ends = np.finfo(np.float32)
        atoms = np.array([ends.max, ends.min, ends.tiny, -ends.tiny, ends.smallest_subnormal, 0.0, -0.0])
        return atoms[rng.integers(0, len(atoms), shape)]
    t = size * rng.standard_normal(shape)
    if values == "grid":  # of bfloat16, near enough: many ties among many values
        return np.round(t / size * 8) / 8
    if values in ("huge", "tiny"):
        return t * 10 ** rng.uniform(10, 30) if values == "huge" else t * 10 ** rng.uniform(-44, -10)
    if values == "NaN":
        t[rng.random(shape) < rng.random()] = np.nan
    return t


def run(first: int, count: int, setting: Setting) -> Tally:
    """All launches, then one copy from the device, then one comparison for cases of about one length."""
    tally = Tally()
    cases = {i: draw(setting.seed, i) for i in range(first, first + count)}
    tally.cover(LEVELS, [case.configuration.levels() for case in cases.values()])
    for case in cases.values():
        tally.count(case.configuration.dtype, case.digest())
    done = _launch(cases, setting, tally)
    for group in by_length({i: cases[i].configuration.n for i in done}):
        wrong = _compare([cases[i] for i in group], [done[i] for i in group])
        for i, message in zip(group, wrong):
            if message:
                tally.failures.append(Failure(f"{cases[i].configuration}: {message}", setting.snippet(NAME, str(i))))
        for dtype in DTYPES:
            of = [i for i in group if cases[i].configuration.dtype == dtype]
            off = np.array([np.inf if wrong[group.index(i)] else 0.0 for i in of])
            tally.enter("selection", dtype, off, [setting.snippet(NAME, str(i)) for i in of])
    return tally


def _launch(cases: dict[int, Case], setting: Setting, tally: Tally) -> dict[int, tuple[Array, Array, Array]]:
    """Indices, slot mask and inverse map of every case, flat."""
    storages = {name: Storage(name) for name in (*DTYPES, "bool")}
    places = {}
    for i, case in cases.items():
        at = storages[case.configuration.dtype].add(case.logits, case.configuration.layout)
        places[i] = at, None if case.mask is None else storages["bool"].add(case.mask[:, None])
    buffers = {name: storage.to(setting.device) for name, storage in storages.items()}
    launched = {}
    for i, case in cases.items():
        c, (at, mask_at) = case.configuration, places[i]
        logits = buffers[c.dtype].as_strided((c.batch, c.experts, c.n), at.strides, at.offset)
        mask = None if mask_at is None else buffers["bool"].as_strided((c.batch, c.n), (c.n, 1), mask_at.offset)
        try:
            launched[i] = ops.select(logits, mask, c.k, setting.triton)
        except Exception as error:
            if broke_the_device(error):
                raise
            tally.failures.append(Failure(f"{c}: {error!r}", setting.snippet(NAME, str(i))))
    if not launched:
        return {}
    parts = []
    for which in range(3):
        ends = np.cumsum([found[which].numel() for found in launched.values()])[:-1]
        parts.append(np.split(flat([found[which] for found in launched.values()]), ends))
    return dict(zip(launched, zip(*parts)))


def by_length(lengths: dict[int, int]) -> list[list[int]]:
    """Indices of cases that are padded to one length."""
    groups: dict[int, list[int]] = {}
    for i, n in lengths.items():
        bound = next((b for b in (8, 24, 64, 128, 256) if n <= b), n.bit_length() << 16)
        groups.setdefault(bound, []).append(i)
    return list(groups.values())


def rows_of(cases: list[Case], width: int) -> tuple[Array, Array]:
    """Logits and valid tokens as padded rows."""
    shapes = [case.logits.shape for case in cases]
    s = padded([case.logits.reshape(-1, shape[-1]) for case, shape in zip(cases, shapes)], width, 0.0, np.float64)
    masks = [np.ones(shape[::2], bool) if case.mask is None else case.mask for case, shape in zip(cases, shapes)]
    return s, padded([np.repeat(m, shape[1], 0) for m, shape in zip(masks, shapes)], width, False, bool)


def _compare(cases: list[Case], found: list[tuple[Array, Array, Array]]) -> list[str]:
    """A message for each case, empty for one that is right."""
    rows = np.array([case.logits.shape[0] * case.logits.shape[1] for case in cases])
    n = np.repeat([case.configuration.n for case in cases], rows)
    k = np.repeat([case.configuration.k for case in cases], rows)
    width = int(n.max())
    indices, slots, inverse = oracles.select(*rows_of(cases, width), n, k)
    expected = indices, slots, inverse[np.arange(width) < n[:, None]]
    messages = [""] * len(cases)
    of_case = np.repeat(np.arange(len(cases)), rows)
    for name, which, per_row in (("indices", 0, k), ("slot mask", 1, k), ("inverse map", 2, n)):
        actual = np.concatenate([f[which] for f in found])
        differ = actual != expected[which]
        owner = np.repeat(of_case, per_row)
        for case in np.unique(owner[differ]):
            mine = owner == case
            at = int((differ & mine)[mine].argmax())
            pair = actual[mine][at], expected[which][mine][at]
            messages[case] += f"{name}: {int((differ & mine).sum())} differ; at {at} {pair[0]}, expected {pair[1]}. "
    return messages


def describe(index: int, setting: Setting) -> str:
    case = draw(setting.seed, index)
    with np.printoptions(threshold=40, linewidth=110):
        return f"{case.configuration}\nlogits:\n{case.logits}\nmask:\n{case.mask}"


def tensors(seed: int, index: int) -> tuple[Tensor, Tensor | None, int]:
    """Arguments of `optimized.select`, contiguous, to look closer."""
    case = draw(seed, index)
    mask = None if case.mask is None else torch.from_numpy(case.mask)
    return torch.from_numpy(np.ascontiguousarray(case.logits)), mask, case.configuration.k
