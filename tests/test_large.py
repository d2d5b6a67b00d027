"""Tensors of more than 2^31 elements: what lies at their far end is computed as it is alone, bit for bit.

All else is 0, of which no sum takes notice. Every kernel that addresses tokens, rows or logits passes through here,
forward and backward; one test at a time, each within 45 GB, since a GPU may be shared by several workers.
"""

from __future__ import annotations

import fcntl
import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness import check_identical, stages_by
from launches import launching_by, name_of
from strategies import draw
from torch import Tensor

import optimized
from optimized.kernels import (
    capped_simplex,
    combine,
    coordinate_descent,
    gather_norm,
    long_descent,
    long_selection,
    null_slot,
    rotary,
    router_logits,
    selection,
    value_score,
)
from optimized.kernels import launch as launching
from optimized.kernels.router_gradient import RouterGradient, router_gradient
from optimized.kernels.token_gradient import TakenRows, token_gradient

TAIL = 64  # tokens that are not 0: as many as a chunk of any kernel holds, and the first of theirs
LIMIT = 2**31

pytestmark = pytest.mark.parametrize("kernels", ["triton"], indirect=True)


class Sizes:
    """Of tokens and channels, of heads of a row, and of rows of logits: on a GPU beyond the limit."""

    def __init__(self, device: torch.device):
        large = device.type == "cuda"
        self.limit = LIMIT if large else 0
        self.n, self.dim = (2**21 + TAIL, 1024) if large else (512 + TAIL, 8)
        self.heads = (2**6, 2**15 + TAIL, 8, 128) if large else (2, 64 + TAIL, 2, 4)
        self.rows = (2**17 + 1, 2**14) if large else (3, 2**6)


@pytest.fixture
def sizes(device: torch.device) -> Iterator[Sizes]:
    """One at a time, also of several processes."""
    with (Path(tempfile.gettempdir()) / "moa-large-tensors.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Sizes(device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@pytest.fixture
def kernel_names(sizes: Sizes) -> Iterator[set[str]]:
    """Launched on a tensor beyond the limit."""
    seen: set[str] = set()

    def launch(kernel, grid, *arguments, **constants):  # type: ignore[no-untyped-def]
        if any(isinstance(a, Tensor) and a.numel() > sizes.limit for a in arguments):
            seen.add(name_of(kernel))
        launching.launch(kernel, grid, *arguments, **constants)

    with launching_by(launch):
        yield seen


def tail(device: torch.device, *shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return draw(shape, "normal", seed).to(dtype).to(device)


def behind_zeros(t: Tensor, n: int, dim: int = 1) -> Tensor:
    """t at the end of a dimension of length n."""
    out = t.new_zeros(*t.shape[:dim], n, *t.shape[dim + 1 :])
    out.narrow(dim, n - t.shape[dim], t.shape[dim]).copy_(t)
    return out


def check_ends(large: list[Tensor], small: list[Tensor]) -> None:
    for i, (a, e) in enumerate(zip(large, small)):
        assert e.any(), f"result {i}"
        check_identical(a, e, f"result {i}")


@pytest.mark.parametrize("cosine", [False, True])
def test_router_logits(kernels: str, cosine: bool, sizes: Sizes, kernel_names: set[str], device: torch.device) -> None:
    end, r = tail(device, 1, TAIL, sizes.dim), tail(device, 2, sizes.dim, seed=1)
    g, runs = tail(device, 1, 2, TAIL, seed=2, dtype=torch.float32), []
    for n in (sizes.n, TAIL):
        x, gradient = behind_zeros(end, n), behind_zeros(g, n, 2)
        logits, norms, factors = router_logits.router_logits(x, r, None, 8.0 if cosine else None)
        dr = router_logits.routing_token_gradient(gradient, x, r, None, norms, factors)
        router = RouterGradient(gradient, logits, r, factors)
        dx = router_gradient(x, None, norms, router)
        runs.append([logits[..., -TAIL:].clone(), dr, dx[:, -TAIL:].clone()])
    check_ends(*runs)
    assert kernel_names == {"_logits_kernel", "_dr_kernel", "_router_gradient_kernel"}


def identity(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, slots and inverse map of one expert that takes all tokens, in order."""
    all_ = torch.arange(n, device=device)[None, None]
    return all_, torch.ones_like(all_, dtype=torch.bool), all_.int()


def test_gather(kernels: str, sizes: Sizes, kernel_names: set[str], device: torch.device) -> None:
    """Tokens and rows beyond the limit."""
    end, gamma = tail(device, 1, TAIL, sizes.dim), tail(device, 1, sizes.dim, seed=1)
    g, runs = tail(device, 1, 1, TAIL, sizes.dim, seed=2), []
    for n in (sizes.n, TAIL):
        x, gradient, (indices, slots, inverse) = behind_zeros(end, n), behind_zeros(g, n, 2), identity(n, device)
        taken, norms = (gather_norm.Taken(indices, slots, gamma),), gather_norm.token_norms(x)
        (rows,) = gather_norm.gather_norm(x, norms, taken)
        found = rows[:, :, -TAIL:].clone()
        del rows
        (dgamma,), dots = gather_norm.slot_gradients(x, norms, taken, (gradient,))
        dx = token_gradient(x, None, norms, (TakenRows(gradient, inverse, gamma),), dots, None)
        runs.append([found, dgamma, dx[:, -TAIL:].clone()])
        del x, gradient, dx
    check_ends(*runs)
    assert kernel_names == {"_norms_kernel", "_gather_kernel", "_slots_gradient_kernel", "_tokens_gradient_kernel"}


@pytest.mark.parametrize("with_local", [False, True])
def test_combine(kernels: str, with_local: bool, sizes: Sizes, kernel_names: set[str], device: torch.device) -> None:
    ends = [tail(device, 1, TAIL, sizes.dim, seed=i) for i in (0, 1, 3)]
    nobody, runs = tail(device, sizes.dim, seed=2), []
    for n in (sizes.n, TAIL):
        y, beside, g = (behind_zeros(t, n) for t in ends)
        y, (indices, slots, inverse) = y[None], identity(n, device)
        if not with_local:  # some tokens are nobody's
            slots = slots & ((n - 1 - indices) % 3 != 1)
            inverse = torch.where(slots, inverse, -1)
        optional = (beside, None) if with_local else (None, nobody)
        scores = torch.full((1, 1, n), 0.75, device=device)
        out = combine.combine(y, scores, inverse, *optional, None, True, y.dtype)
        found = [out[:, -TAIL:].clone()]
        del out
        made = combine.combine_backward(g, y, scores, (indices, slots, inverse), *optional, None, True)
        dy, dscores, dlocal, dnull = made
        rest = dnull if dlocal is None else dlocal[:, -TAIL:].clone()
        runs.append([*found, dy[:, :, -TAIL:].clone(), dscores[..., -TAIL:].clone(), rest])
        del y, beside, g, made, dy, dlocal
    check_ends(*runs)
    assert kernel_names == {"_combine_kernel", "_slots_kernel", "_tokens_kernel"}


def test_null_slot(kernels: str, sizes: Sizes, kernel_names: set[str], device: torch.device) -> None:
    rows, length, heads, dim = sizes.heads
    runs = []
    null_k, null_v = (tail(device, rows, heads, dim, seed=i) for i in (1, 2))
    end = 16  # queries of one program, so that no sum over programs has two terms
    ends = [tail(device, 1, end, heads, dim, seed=i) for i in (3, 4, 5, 6)]
    for n in (length, end):
        large = n == length
        q, out, dout, dq = (behind_zeros(behind_zeros(t, n, 1), rows if large else 1, 0) for t in ends)
        lse = torch.full((q.shape[0], heads, n), 0.5, device=device)
        nulls = [t if large else t[-1:] for t in (null_k, null_v)]
        merged, merged_lse = null_slot.merge(q, *nulls, out, lse, None, None)
        dnull = null_slot.merge_backward(q, *nulls, merged, merged_lse, None, dout, dq)
        runs.append([merged[-1:, -end:], merged_lse[-1:, :, -end:], dq[-1:, -end:], dnull[:, -1:]])
        runs[-1] = [t.clone() for t in runs[-1]]
    check_ends(*runs)
    assert kernel_names == {"_merge_kernel", "_merge_backward_kernel"}


@pytest.mark.parametrize("transposed", [False, True])
def test_rotary(kernels: str, transposed: bool, sizes: Sizes, kernel_names: set[str], device: torch.device) -> None:
    rows, length, heads, dim = sizes.heads
    cos, sin = (tail(device, 50, dim, seed=i, dtype=torch.float32) for i in range(2))
    end = tail(device, 1, TAIL, heads, dim, seed=2)
    positions = torch.arange(TAIL, device=device)[None] % 50
    expected = rotary.rotate(end, cos, sin, positions, transposed)
    t = behind_zeros(behind_zeros(end, length, 1), rows, 0)
    at = behind_zeros(behind_zeros(positions, length, 1), rows, 0)
    kernel_names.clear()  # without a limit, on the CPU, the small call counts
    check_identical(rotary.rotate(t, cos, sin, at, transposed)[-1:, -TAIL:], expected)
    rotary.rotate_into(t, t, cos, sin, at, transposed)
    check_identical(t[-1:, -TAIL:], expected)
    assert not t[0].any()
    assert kernel_names == {"_rotary_kernel"}


def test_value_score(kernels: str, sizes: Sizes, kernel_names: set[str], device: torch.device) -> None:
    rows, length, heads, dim = sizes.heads
    end, g = (tail(device, 1, TAIL, heads, dim, seed=i) for i in range(2))
    scores = tail(device, 1, 1, TAIL, seed=2, dtype=torch.float32)
    runs = []
    for n in (length, TAIL):
        r = rows if n == length else 1
        v, dv = (behind_zeros(behind_zeros(t, n, 1), r, 0) for t in (end, g))
        s = behind_zeros(behind_zeros(scores, n, 2), r, 0)
        out = value_score.value_score(v, s)
        dscores = value_score.value_score_backward_(dv, v, s)
        value_score.value_score_(v, s)
        check_identical(v[-1:, -TAIL:], out[-1:, -TAIL:])
        runs.append([t[-1:, -TAIL:].clone() for t in (out, dv)] + [dscores[-1:, :, -TAIL:].clone()])
    check_ends(*runs)
    assert kernel_names == {"_value_score_kernel", "_value_score_in_place_kernel", "_value_score_backward_kernel"}


EPSILONS = (0.3, 4.0, 0.7)


@pytest.mark.parametrize("solver", ["iterative", "exact"])
def test_rows(kernels: str, solver: str, sizes: Sizes, kernel_names: set[str], device: torch.device) -> None:
    """More rows than one tensor has in 2^31 elements: selection, and a solver with its gradient."""
    count, n = sizes.rows
    k = max(n // 512, 3)
    row, g = (tail(device, 1, 1, n, seed=i, dtype=torch.float32) for i in range(2))
    runs = []
    for rows in (count, 1):
        s, grad = (behind_zeros(t, rows, 0) for t in (row, g))
        if solver == "exact":
            saved = capped_simplex.capped_simplex(s, None, k * 1.125, 0.3)
            found = [t[-1:].clone() for t in saved]
            out = capped_simplex.capped_simplex_backward(grad, s, None, *saved, 0.3)
        else:
            found = []
            for select in (selection.select_groups, long_selection.select_long):
                groups = select(s, None, (k,), s)
                found += [t[-1:].clone() for t in groups[0]]
                del groups
            scores = long_descent.descend_long(s, None, k * 1.125, 1, [EPSILONS[1], EPSILONS[0]])[0]
            found += [scores[-1:].clone()]
            del scores
            saved = coordinate_descent.coordinate_descent(s, None, k * 1.125, 6, *EPSILONS)
            found += [saved[0][-1:].clone(), torch.cat([t[:, -1:] for t in saved[1:]])]  # counts may be 0
            out = coordinate_descent.coordinate_descent_backward(grad, s, None, *saved, k * 1.125, *EPSILONS)
        runs.append([*found, out[-1:].clone()])
        del s, grad, saved, out
    check_ends(*runs)
    assert runs[0][-1].any()
    kernels_of = {
        "exact": {"_exact_kernel", "_exact_backward_kernel"},
        "iterative": {
            *("_select_kernel", "_digits_kernel", "_place_kernel", "_descent_step_kernel"),
            *("_descent_kernel", "_descent_sums_kernel", "_descent_backward_kernel"),
        },
    }
    assert kernel_names == kernels_of[solver]


def test_rotary_tables(kernels: str, sizes: Sizes, kernel_names: set[str], device: torch.device) -> None:
    n, dim = (2**24 + 1, 128) if device.type == "cuda" else (300, 128)
    cos, sin = rotary.tables(n, dim, device, torch.float32)
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    for at in (1, n // 2, n - 1):
        angles = (at * frequency).repeat(2).to(device)
        for table, expected in ((cos, angles.cos()), (sin, angles.sin())):
            # An angle of 2^24 is known to 2^-28 in float64; the rest is the rounding to float32.
            assert ((table[at] - expected).abs() <= 2.0**-23).all()
    assert kernel_names == {"_tables_kernel"}


def test_layer(kernels: str, sizes: Sizes, device: torch.device) -> None:
    """The tokens that all experts pick lie beyond the limit; what comes of them does not depend on the rest."""
    layer = optimized.MixtureOfAttention(
        sizes.dim, num_routed_queries=24, num_routed_key_values=40, num_experts=2, heads=2, dim_head=16, dropout=0.0,
        device=device, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.no_grad():
        for router in (layer.query_router, layer.key_value_router):
            router.routing_token.copy_(1 + 0.3 * tail(device, *router.routing_token.shape, seed=1))
    end = (0.5 + 0.3 * tail(device, 1, TAIL, sizes.dim, seed=2)).requires_grad_()
    g, runs = tail(device, 1, TAIL, sizes.dim, seed=3), []
    for large in (True, False):
        x = (behind_zeros(end.detach(), sizes.n) if large else end.detach()).requires_grad_()
        with optimized.use_backends(**stages_by(kernels), routed_attention="math"):
            out, routes = layer(x, return_routes=True)
        cotangent = behind_zeros(g, sizes.n) if large else g
        weights = [layer.attn.to_q.weight, layer.attn.to_kv.weight, layer.attn.to_out.weight, layer.attn.norm.gamma]
        dx, *grads = torch.autograd.grad(out, [x, *weights], cotangent)
        assert dx[:, -TAIL:].isfinite().all()
        assert dx[:, -TAIL:].any()
        first = x.shape[1] - TAIL
        runs.append([*(r.indices - first for r in routes), out[:, -TAIL:].detach().clone(), *grads])
        del x, out, cotangent, dx
    check_ends(*runs)
