"""Every wrapper of `optimized.kernels` on inputs that are the same wherever they are computed, with how much two right
results may differ: by another number of warps, by another block size, by Triton's interpreter.

    python tests/pieces.py --out FILE.pt     # all of them interpreted, on the CPU: for `test_gpu_lane.py`

Integers, and what is only copied, must be equal. Of other results two are within twice the error that either may have:
a sum of T terms in whatever order, of which each went through a few roundings, is off by at most (T + few) / 2 eps of
the sum of their absolute values. `store` is the rounding to a result's dtype: one unit in the last place, since the
interpreter cuts off what a GPU rounds.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import multiprocessing
import os
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":  # before Triton is first imported
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parent.parent))

import compilation
import torch
from strategies import draw, generator
from torch import Tensor

EPSILONS = (0.3, 4.0, 0.7)  # of the solvers: eps, eps_init, eps_decay


class Result(NamedTuple):
    """slack: by how much two may differ, by element or for all; None: not at all."""

    value: Tensor
    slack: Tensor | float | None = None


Results = dict[str, Result]


class Numbers:
    """Inputs drawn on the CPU and rounded to `rounded`, computed with in `dtype` on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rounded: torch.dtype | None = None):
        self.device, self.dtype, self.rounded = device, dtype, rounded or dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.eps = torch.finfo(torch.promote_types(self.rounded, torch.float32)).eps  # of the arithmetic

    def here(self, t: Tensor, wide: bool = False) -> Tensor:
        """A tensor in the dtype under test, or in that of its arithmetic."""
        rounded = torch.promote_types(self.rounded, torch.float32) if wide else self.rounded
        return t.to(rounded).to(self.wide if wide else self.dtype).to(self.device)

    def normal(self, *shape: int, seed: int, wide: bool = False) -> Tensor:
        return self.here(draw(shape, "normal", seed), wide)

    def result(self, value: Tensor, terms: Tensor | float, count: int) -> Result:
        """Of sums of so many terms, whose absolute values sum to `terms`, through a dozen roundings more."""
        terms = terms.to(value.device) if isinstance(terms, Tensor) else terms
        stored = torch.finfo(self.rounded if value.dtype == self.dtype else torch.float32).eps
        stored = min(stored, torch.finfo(value.dtype).eps) if self.dtype == self.rounded else stored
        least = 2 * stored * torch.finfo(self.rounded if value.dtype == self.dtype else value.dtype).smallest_normal
        return Result(value, (count + 12) * self.eps * terms + 2 * stored * value.double().abs() + least)


def size_of(t: Tensor) -> float:
    return t.double().abs().max().item()


# --- rows ------------------------------------------------------------------------------------------------------------


def rows(x: Numbers, n: int, steps: int = 20, batch: int = 2) -> Results:
    """Selection and both solvers for two groups of two experts; rows with a mask, ties, and a NaN."""
    from optimized.kernels import capped_simplex, coordinate_descent, selection

    shown = torch.arange(n) % 7 != 3
    mask = shown.expand(batch, n).contiguous().to(x.device)
    ks, masses = (max(n // 3, 1), max(n // 5, 1)), (0.4 * n, max(0.2 * n, 0.6))
    exact, (scores, a, counts) = _off_kinks(x, shown, masses, steps, batch)
    logits = x.here(exact)
    tied = logits.round()
    tied[0, 1, -1] = torch.nan
    found: Results = {}
    for name, s in (("", logits), ("of ties ", tied)):
        for side, made in zip(("q", "kv"), selection.select_groups(s, mask, ks, logits)):
            for part, t in zip(("indices", "slots", "inverse", "picked"), made):
                found[f"{name}{part} {side}"] = Result(t)
    made = coordinate_descent.coordinate_descent(logits, mask, masses, steps, *EPSILONS)
    size = 4 + size_of(exact)
    # Each step adds a few roundings of numbers as large as logits and temperature, which the next ones forget.
    found["descent scores"] = Result(made[0], 64 * x.eps * size / EPSILONS[0])
    found["descent a"] = Result(made[1], 64 * x.eps * size)
    found["descent counts"] = Result(made[2])
    saved = [x.here(t) for t in (scores, a, counts)]
    g = x.normal(batch, 4, n, seed=1)
    inverses = [found[f"inverse {side}"].value for side in ("q", "kv")]
    grads = [x.normal(batch, 2, k, seed=2 + i) for i, k in enumerate(ks)]
    slack = 64 * x.eps * size_of(g) * size / EPSILONS[0]
    dense = [coordinate_descent.coordinate_descent_backward(g, logits, mask, *saved, masses[0], *EPSILONS)]
    picked = coordinate_descent.coordinate_descent_picked_backward(
        tuple(grads), tuple(inverses), g, logits, mask, *saved, masses, *EPSILONS
    )
    found["descent gradient"] = Result(dense[0], slack)
    found["descent picked gradient"] = Result(picked, slack)
    made = capped_simplex.capped_simplex(logits, mask, masses, EPSILONS[0])
    found["exact scores"] = Result(made[0], 64 * x.eps * size / EPSILONS[0])
    found["exact threshold"] = Result(made[1])
    capped = [
        torch.ops.moa.capped_simplex(s.contiguous(), shown.expand(batch, n), m, EPSILONS[0])
        for s, m in zip(exact.chunk(2, 1), masses)
    ]
    saved = [x.here(torch.cat(parts, 1)) for parts in zip(*capped)]
    found["exact gradient"] = Result(
        capped_simplex.capped_simplex_backward(g, logits, mask, *saved, EPSILONS[0]), slack
    )
    found["exact picked gradient"] = Result(
        capped_simplex.capped_simplex_picked_backward(
            tuple(grads), tuple(inverses), g, logits, mask, *saved, EPSILONS[0]
        ),
        slack,
    )
    return found


def _off_kinks(
    x: Numbers, shown: Tensor, masses: tuple[float, float], steps: int, batch: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits, and what PyTorch's solver leaves for each; the first draw of which none lies close to a kink.

    Within rounding of one a token could go either way, and so could its gradient.
    """
    n = len(shown)
    for seed in itertools.count():
        exact = draw((batch, 4, n), "normal", 1000 * seed + n).to(x.rounded).double()
        solved = [
            torch.ops.moa.coordinate_descent(s.contiguous(), shown.expand(batch, n), mass, steps, *EPSILONS)
            for s, mass in zip(exact.chunk(2, 1), masses)
        ]
        saved = tuple(torch.cat(parts, i) for parts, i in zip(zip(*solved), (1, 2, 2)))
        if (exact[..., shown] + saved[1][:-1, ..., None]).abs().min() > 2e-5:
            return exact, saved
    raise AssertionError


# --- channels --------------------------------------------------------------------------------------------------------

BATCH, EXPERTS, KS, POSITIONS = 2, 3, (7, 11), 50


def _routing(x: Numbers, n: int, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, slots and inverse map, of which some slots are masked."""
    from optimized import ops

    g = generator(seed)
    indices = torch.rand(BATCH, EXPERTS, n, generator=g).argsort(-1)[..., :k].sort(-1).values
    slots = torch.rand(BATCH, EXPERTS, k, generator=g) < 0.8
    return tuple(t.to(x.device) for t in (indices, slots, ops.inverse_map(indices, slots, n)))


def channels(x: Numbers, dim: int, experts: int = EXPERTS, n: int = 50) -> Results:
    """Router, dispatch and combination: tokens of so many channels. experts: of the router."""
    from optimized.kernels import combine, gather_norm, router_logits
    from optimized.kernels.token_gradient import RouterGradient, TakenRows, token_gradient

    tokens, found = x.normal(BATCH, n, dim, seed=dim), {}
    wide, root = tokens.double(), dim**0.5
    shown = torch.rand(BATCH, n, generator=generator(3)) < 0.8
    mask = shown.to(x.device)
    norms = x.here(wide.cpu().norm(dim=-1), wide=True)
    made = gather_norm.token_norms(tokens)
    found["norms"] = x.result(made, made, dim)

    routing = [_routing(x, n, k, 10 + k) for k in KS]
    gammas = [x.normal(EXPERTS, dim, seed=4 + i) for i in range(2)]
    taken = tuple(gather_norm.Taken(*r[:2], gamma) for r, gamma in zip(routing, gammas))
    gradients = tuple(x.normal(EXPERTS, BATCH, k, dim, seed=6 + i) for i, k in enumerate(KS))
    for side, rows_ in zip(("q", "kv"), gather_norm.gather_norm(tokens, norms, taken)):
        found[f"rows {side}"] = x.result(rows_, rows_.double().abs(), 0)
    bare = tuple(group._replace(gamma=None) for group in taken)
    for side, rows_ in zip(("q", "kv"), gather_norm.gather_norm(tokens, None, bare)):
        found[f"bare rows {side}"] = Result(rows_)
    dgammas, dots = gather_norm.slot_gradients(tokens, norms, taken, gradients)
    largest = size_of(tokens) * max(map(size_of, gradients)) * max(map(size_of, gammas))
    found["dots"] = x.result(dots.sum(0), largest * dim, dim)
    for side, d in zip(("q", "kv"), dgammas):
        found[f"dgamma {side}"] = x.result(d, size_of(tokens) * size_of(gradients[0]) * root / norms.min().item(), 60)

    r = x.normal(experts, dim, seed=8)
    g = x.normal(BATCH, experts, n, seed=9, wide=True)
    absolute = torch.einsum("bnd,ed->ben", wide.abs(), r.double().abs())
    for name, scale in (("plain", None), ("cosine", 8.0)):
        made = router_logits.router_logits(tokens, r, mask, scale)
        sizes = absolute
        if scale is not None:
            sizes = absolute / wide.norm(dim=-1)[:, None] * (scale / r.double().norm(dim=-1))[:, None]
            found["factors"] = x.result(made[2], made[2].double().abs(), dim)
        found[f"{name} logits"] = x.result(made[0], sizes, dim)
        # What the backward is handed is made here, so that only its own roundings count.
        factors = x.here(torch.empty(BATCH, 0), wide=True)
        logits = torch.einsum("bnd,ed->ben", wide, r.double())
        rates = torch.ones_like(logits)
        if scale is not None:
            cr = (scale / r.double().norm(dim=-1)).expand(BATCH, -1)
            factors = x.here(cr.cpu(), wide=True)
            rates = cr[..., None] / wide.norm(dim=-1)[:, None]
        saved = x.here((logits * rates).cpu(), wide=True)
        dr = router_logits.routing_token_gradient(g, tokens, r, mask, saved, norms, factors)
        terms = torch.einsum("ben,bnd->ed", g.double().abs() * rates, wide.abs())
        if scale is not None:
            terms = terms + (g.double() * saved.double()).abs().sum((0, 2))[:, None] * r.double().abs() / (
                r.double().square().sum(-1, keepdim=True)
            )
        one = x.result(dr, terms, BATCH * n)
        coarse = 2**-10 if x.rounded == torch.bfloat16 else 0.0  # TF32, which the interpreter knows nothing of
        found[f"{name} dr"] = Result(dr, one.slack + coarse * terms)
        for groups in (0, 2):
            handed = x.here(dots.cpu(), wide=True) if groups else None
            rows_ = tuple(TakenRows(gr, ro[2], ga) for gr, ro, ga in zip(gradients, routing, gammas))[:groups]
            router = RouterGradient(g, saved, r, factors)
            dx = token_gradient(tokens, mask, norms, rows_, handed, router)
            # Sums over experts; the term in x takes away what a token's norm does not feel.
            terms = size_of(dx) + experts * size_of(g) * size_of(rates) * size_of(r)
            found[f"{name} dx of {groups}"] = x.result(dx, terms, 4 * experts)
    dx = token_gradient(tokens, None, norms, (TakenRows(gradients[0], routing[0][2], None),), None, None)
    found["bare dx"] = x.result(dx, size_of(dx), EXPERTS)

    indices, slots, inverse = routing[0]
    scores = x.normal(BATCH, EXPERTS, KS[0], seed=11, wide=True)
    y, local, null = gradients[0], x.normal(BATCH, n, dim, seed=12), x.normal(dim, seed=13)
    g = x.normal(BATCH, n, dim, seed=14)
    for name, optional in (("local", (local, None, mask, True)), ("null", (None, null, None, False))):
        out = combine.combine(y, scores, inverse, *optional, x.dtype)
        found[f"combined {name}"] = x.result(out, size_of(out), EXPERTS)
        dy, dscores, dlocal, dnull = combine.combine_backward(g, y, scores, indices, slots, inverse, *optional)
        found[f"dy {name}"] = x.result(dy, dy.double().abs(), EXPERTS)
        found[f"dscores {name}"] = x.result(dscores, dim * size_of(g) * size_of(y), dim)
        if dlocal is not None:
            found["dlocal"] = x.result(dlocal, dlocal.double().abs(), EXPERTS)
        if dnull is not None:
            found["dnull"] = x.result(dnull, BATCH * n * size_of(g), BATCH * n)
    return found


# --- heads -----------------------------------------------------------------------------------------------------------


def heads(x: Numbers, count: int, dim: int, length: int = 40) -> Results:
    """What surrounds the attention of the experts: null slot, rotary positions, value scores."""
    from optimized.kernels import null_slot, rotary, value_score

    experts, batch = 2, 2
    shape, found = (experts * batch, length, count, dim), {}
    q, out, dout, dq = (x.normal(*shape, seed=20 + i) for i in range(4))
    null_k, null_v = (x.normal(experts, count, dim, seed=24 + i) for i in range(2))
    lse = x.normal(shape[0], count, length, seed=26, wide=True)
    keep = x.here((torch.rand(shape[0], count, length, generator=generator(27)) < 0.6) / 0.6, wide=True)
    lengths = torch.tensor([3, 0, 2, 9], dtype=torch.int32, device=x.device)
    k0, v0 = (t.double().repeat_interleave(batch, 0)[:, None] for t in (null_k, null_v))
    root = dim**0.5
    # exp makes the error of a logit a relative one of the weights.
    gain = 1 + ((q.double() * k0).abs().sum(-1) / root)[..., None]
    merged, merged_lse = null_slot.merge(q, null_k, null_v, out, lse, keep, lengths)
    found["merged"] = x.result(merged, gain * (out.double().abs() + size_of(keep) * v0.abs()), dim)
    found["merged lse"] = x.result(merged_lse, gain[..., 0].transpose(1, 2) + merged_lse.double().abs(), dim)

    s0 = ((q.double() * k0).sum(-1) / root).transpose(1, 2)
    after = torch.logaddexp(lse.double(), s0)
    p0 = (s0 - after).exp().transpose(1, 2)[..., None]
    after = x.here(after.cpu(), wide=True)
    into = dq.clone()
    dnull = null_slot.merge_backward(q, null_k, null_v, out, after, keep, dout, into)
    gain = gain + after.double().abs().transpose(1, 2)[..., None]
    z = gain * p0 * keep.double().transpose(1, 2)[..., None]
    pairs = [(dout.double() * t).abs().sum(-1, keepdim=True) for t in (v0, out.double())]
    ds = (z * pairs[0] + gain * p0 * pairs[1]) / root
    found["dq"] = x.result(into, dq.double().abs() + ds * k0.abs(), 2 * dim)
    parts = [
        (t.double().abs()).unflatten(0, (experts, batch)).sum((1, 2)) for t in (ds * q.double(), z * dout.double())
    ]
    found["dnull"] = x.result(dnull, torch.stack(parts), batch * length + 2 * dim)

    if dim % 2 == 0:
        cos, sin = rotary.tables(POSITIONS, dim, x.device, x.wide)
        for name, t in (("cos", cos), ("sin", sin)):
            found[name] = Result(t, 2 * torch.finfo(x.wide).eps * t.double().abs() + 64 * POSITIONS * 2.0**-52)
        angles = 10 * draw((POSITIONS, dim), "normal", 28)
        cos, sin = (x.here(t, wide=True) for t in (angles.cos(), angles.sin()))
        positions = torch.randint(POSITIONS, shape[:2], generator=generator(29)).to(x.device)
        for transposed in (False, True):
            turned = rotary.rotate(q, cos, sin, positions, transposed)
            found[f"rotated {transposed}"] = x.result(turned, 2 * size_of(q), 0)
            in_place = torch.stack((q, q), 2)  # as keys lie beside values
            rotary.rotate_into(in_place[:, :, 0], in_place[:, :, 0], cos, sin, positions, transposed)
            found[f"rotated in place {transposed}"] = x.result(in_place, 2 * size_of(q), 0)

    scores = x.normal(batch, experts, length, seed=30, wide=True)
    scores[0, :, ::3] = 1
    v = x.normal(*shape, seed=31)
    scaled = value_score.value_score(v, scores)
    found["scaled"] = x.result(scaled, scaled.double().abs(), 0)
    in_place = v.clone()
    value_score.value_score_(in_place, scores)
    found["scaled in place"] = x.result(in_place, in_place.double().abs(), 0)
    dv = dout.clone()
    dscores = value_score.value_score_backward_(dv, v, scores)
    found["dv"] = x.result(dv, dv.double().abs(), 0)
    found["dscores"] = x.result(dscores, count * dim * size_of(v) * size_of(dout), count * dim)
    return found


# --- every configuration ---------------------------------------------------------------------------------------------


def modules() -> list[ModuleType]:
    """Of the kernels."""
    import optimized.kernels as package

    return [
        importlib.import_module(f"{package.__name__}.{entry.name}") for entry in pkgutil.iter_modules(package.__path__)
    ]


def name_of(kernel: Any) -> str:
    return kernel.fn.__name__


@contextmanager
def launching_by(replacement: Callable[..., None]) -> Iterator[None]:
    """The wrappers launch by another function."""
    with ExitStack() as patches:
        for module in modules():
            if hasattr(module, "launch") and not hasattr(module, "launch_compiled"):
                patches.enter_context(mock.patch.object(module, "launch", replacement))
        yield


def reached(call: Callable[[], None]) -> set[tuple[Any, ...]]:
    """Kernel, and constants but for the sizes of blocks, of all that a call launches; nothing runs."""
    found = set()

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        named = {n: str(value) for n, value in constants.items() if n == "ONE_BLOCK" or "BLOCK" not in n}
        found.add((name_of(kernel), *sorted(named.items())))

    with launching_by(record):
        call()
    return found


Call = Callable[[], None]


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def _row_calls() -> dict[int, Call]:
    from optimized.kernels.launch import CHUNK, ROWS_IN_REGISTERS

    most = max(ROWS_IN_REGISTERS // 4, CHUNK)
    call, all_on = compilation.call_row_kernels, compilation.all_on
    return {n: functools.partial(call, torch.float32, n, all_on) for n in [*_powers(most), most + 1]}


def _channel_calls() -> dict[int, Call]:
    from optimized.kernels.launch import MAX_BLOCK_D

    call, all_on = compilation.call_channel_kernels, compilation.all_on
    sizes = [*_powers(MAX_BLOCK_D), MAX_BLOCK_D + 1]
    return {dim: functools.partial(call, torch.float32, torch.float32, dim, all_on) for dim in sizes}


def _head_calls() -> dict[int, Call]:
    call, all_on = compilation.call_head_kernels, compilation.all_on
    return {dim: functools.partial(call, torch.float32, 3, dim, all_on) for dim in _powers(512)[1:]}


class Axis(NamedTuple):
    """calls: of the wrappers, by size; piece: of such a size."""

    calls: Callable[[], dict[int, Call]]
    piece: Callable[[Numbers, int], Results]


AXES = {
    "rows": Axis(_row_calls, lambda x, n: rows(x, n, 5, 1)),
    "channels": Axis(_channel_calls, lambda x, dim: channels(x, dim, n=20)),
    "heads": Axis(_head_calls, lambda x, dim: heads(x, 3, dim)),
}


def sizes_of(axis: str) -> list[int]:
    """The smallest and the largest size at which a kernel has some number of warps, rows of a tile, or loop.

    In float32: float64 is that of test_boundaries.py.
    """
    classes: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for size, call in AXES[axis].calls().items():
        for configuration in reached(call):
            classes[configuration].append(size)
    return sorted({size for found in classes.values() for size in (min(found), max(found))})


# --- all of them -----------------------------------------------------------------------------------------------------

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Piece = Callable[[Numbers], Results]
PIECES: dict[str, tuple[Piece, tuple[torch.dtype, ...]]] = {
    "rows of 1": (lambda x: rows(x, 1, 3), DTYPES[:2]),
    "rows of 300": (lambda x: rows(x, 300), DTYPES[:2]),
    "rows of 2500": (lambda x: rows(x, 2500, 5, 1), DTYPES[:2]),
    "1 channel": (lambda x: channels(x, 1), DTYPES[1:3]),
    "100 channels": (lambda x: channels(x, 100), DTYPES),
    "20 experts": (lambda x: channels(x, 70, 20), DTYPES[1:3]),
    "heads": (lambda x: heads(x, 3, 10), DTYPES),
    "wide heads": (lambda x: heads(x, 2, 128), DTYPES[1:3]),
}
BRIEF = ("rows of 300", "1 channel", "wide heads")


def every_piece(brief: bool = False) -> Iterator[tuple[str, torch.dtype]]:
    """brief: one of each kind, in float32."""
    for name, (_, dtypes) in PIECES.items():
        for dtype in dtypes:
            if not brief or (name in BRIEF and dtype == torch.float32):
                yield name, dtype
    for axis in () if brief else AXES:
        for size in sizes_of(axis):
            yield f"{axis}: {size}", torch.float32


def compute(name: str, dtype: torch.dtype, device: torch.device) -> Results:
    x = Numbers(device, dtype)
    if name in PIECES:
        return PIECES[name][0](x)
    axis, size = name.split(": ")
    return AXES[axis].piece(x, int(size))


def differences(actual: Results, expected: Results) -> list[str]:
    """What is beyond its slack, or has NaN where the other has none, in words."""
    assert actual.keys() == expected.keys()
    found = []
    for name, (value, _) in actual.items():
        other, slack = expected[name]
        other = other.to(value.device)
        assert (value.shape, value.is_floating_point()) == (other.shape, other.is_floating_point()), name
        a, b = value.double(), other.double()
        nan = a.isnan()
        if not torch.equal(nan, b.isnan()):
            found.append(f"{name}: NaN in other places")
            continue
        apart = torch.where((a == b) | nan, 0.0, (a - b).abs())  # infinities are equal
        bound = slack.to(apart.device) if isinstance(slack, Tensor) else torch.full_like(apart, slack or 0.0)
        bad = ~(apart <= bound)
        if bad.any():
            at = tuple(bad.nonzero()[0].tolist())
            what = f"{int(bad.sum())} of {a.numel()} elements"
            found.append(f"{name}: {what}, at {at} {a[at].item()} and {b[at].item()}, allowed {bound[at].item():.2g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", required=True)
    parser.add_argument("--brief", action="store_true", help="one of each kind, in float32")
    given = parser.parse_args()
    from optimized.plan import Request, obstacle

    torch.set_num_threads(1)
    why = obstacle("routing", "triton_interpreted", Request(torch.device("cpu"), torch.float32))
    if why is not None:
        parser.exit(1, f"{why}\n")
    # Those of many channels take longest.
    keys = sorted(every_piece(given.brief), key=lambda key: -int(key[0].partition("channels: ")[2] or 0))
    with multiprocessing.get_context("fork").Pool() as pool:
        made = dict(pool.imap_unordered(_interpret, keys, chunksize=1))
    torch.save(made, given.out)


def _interpret(key: tuple[str, torch.dtype]) -> tuple[Any, dict[str, Tensor]]:
    results = compute(*key, torch.device("cpu"))
    return (key[0], str(key[1])), {name: result.value for name, result in results.items()}


if __name__ == "__main__":
    main()
