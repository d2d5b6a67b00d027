"""Local attention: values and gradients against the oracles, and the window by perturbation rather than by formula."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from harness import BOTH, EVERY_KERNEL, attention_backends, check, check_identical, counted, expectation, interpreted
from hypothesis import example, given
from hypothesis import strategies as st
from runs import BASELINE_OF, cast, compare, watch_attention
from strategies import COTANGENTS, LAYOUTS, MASKS, SEEDS, VALUES, cotangent, draw, draw_mask, generator, lay_out
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import optimized
import reference
from optimized import ops
from optimized.attention.banded import MAX_BLOCK, MIN_BLOCK
from optimized.plan import Request, obstacle
from reference import oracle
from reference.local_attention import ROWS

# Around the block lengths that the banded code declares, and small ones.
EDGES = [MIN_BLOCK + i for i in (-1, 0, 1)]
LENGTHS = (1, 2, 3, 5, 17, *EDGES, 2 * MIN_BLOCK, 2 * MIN_BLOCK + 1, 97)
WINDOWS = (1, 2, 5, *EDGES, 200)


@dataclass(frozen=True)
class LocalCase:
    """One call of `local_attention`."""

    batch: int = 2
    n: int = 17
    dim: int = 12
    heads: int = 2
    dim_head: int = 4
    window: int = 5
    causal: bool = False
    norm: bool = True
    values: str = "normal"
    mask: str = "none"
    layout: str = "contiguous"
    cotangent: str = "dense"
    seed: int = 0

    def leaves(self) -> dict[str, Tensor]:
        g = generator(self.seed + 11)
        inner = self.heads * self.dim_head
        t = {"x": draw((self.batch, self.n, self.dim), self.values, self.seed)}
        t["w_qkv"] = torch.randn(3 * inner, self.dim, generator=g, dtype=torch.float64) * self.dim**-0.5
        t["w_out"] = torch.randn(self.dim, inner, generator=g, dtype=torch.float64) * inner**-0.5
        if self.norm:
            t["norm_weight"] = torch.randn(self.dim, generator=g, dtype=torch.float64)
            t["norm_bias"] = torch.randn(self.dim, generator=g, dtype=torch.float64)
        if self.layout == "expanded":
            t["x"] = t["x"][:1].expand_as(t["x"]).clone()
        return t

    def valid(self, device: torch.device) -> Tensor | None:
        mask = draw_mask(self.batch, self.n, self.mask, self.seed)
        return None if mask is None else mask.to(device)


@dataclass
class Run:
    out: Tensor
    grads: dict[str, Tensor]
    logit_size: float


def call(implementation: ModuleType, case: LocalCase, t: dict[str, Tensor], mask: Tensor | None) -> Tensor:
    rest = {name: value for name, value in t.items() if name != "x"}
    return implementation.local_attention(t["x"], case.window, mask, case.causal, heads=case.heads, **rest)


def run(
    implementation: ModuleType,
    case: LocalCase,
    under_test: torch.dtype,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    hostile: bool = False,
) -> Run:
    """Data rounded to under_test, held in dtype. hostile: in the case's layout, NaN in masked tokens."""
    dtype = dtype or under_test
    mask = case.valid(device)
    t = {name: cast(v, under_test, dtype, device) for name, v in case.leaves().items()}
    if hostile and mask is not None and case.layout != "expanded":
        t["x"] = t["x"].masked_fill(~mask[..., None], math.nan)
    if hostile:
        t = {
            name: lay_out(v, case.layout if name == "x" or (v.ndim > 1 and case.layout != "expanded") else "contiguous")
            for name, v in t.items()
        }
    t = {name: v.detach().requires_grad_() for name, v in t.items()}
    with watch_attention() as sizes:
        out = call(implementation, case, t, mask)
    g = cotangent(tuple(out.shape), case.cotangent, case.seed)
    g = (
        torch.ones((), dtype=dtype, device=device).expand(out.shape)
        if case.cotangent == "sum"
        else cast(g, under_test, dtype, device)
    )
    return Run(out.detach(), dict(zip(t, torch.autograd.grad(out, list(t.values()), g))), max(sizes))


@st.composite
def local_cases(draw_: st.DrawFn, *, values: tuple[str, ...] = VALUES) -> LocalCase:
    return LocalCase(
        batch=draw_(st.integers(1, 2)),
        n=draw_(st.sampled_from(LENGTHS)),
        dim=draw_(st.sampled_from((4, 12, 17))),
        heads=draw_(st.integers(1, 2)),
        dim_head=draw_(st.sampled_from((2, 8, 10))),
        window=draw_(st.sampled_from(WINDOWS)),
        causal=draw_(st.booleans()),
        norm=draw_(st.booleans()),
        values=draw_(st.sampled_from(values)),
        mask=draw_(st.sampled_from(MASKS)),
        layout=draw_(st.sampled_from(LAYOUTS)),
        cotangent=draw_(st.sampled_from(COTANGENTS)),
        seed=draw_(SEEDS),
    )


def sized_for_half(case: LocalCase) -> LocalCase:
    """See `sized_for_half` in test_mixture.py."""
    return replace(
        case,
        n=case.n + 16,
        window=max(case.window, 5),
        dim=max(case.dim, 16),
        heads=2,
        dim_head=max(case.dim_head, 8),
        norm=case.norm or case.values != "normal",
        values="normal" if case.values in ("constant", "tiny", "ties", "integer") else case.values,
        mask={"none_valid": "random", "suffix": "long_suffix"}.get(case.mask, case.mask),
        cotangent="dense" if case.cotangent == "one_hot" else case.cotangent,
    )


@given(case=local_cases(values=("normal", "tiny", "integer")))
@example(case=LocalCase(batch=1, n=ROWS + 70, dim=4, heads=1, dim_head=2, window=40, mask="random"))
@counted
def test_reference_matches_the_oracle(case: LocalCase, device: torch.device) -> None:
    """One example crosses the rows that the reference takes at a time."""
    actual = run(reference, case, torch.float64, device, hostile=True)
    arrays = {name: v.numpy() for name, v in case.leaves().items()}
    mask = case.valid(torch.device("cpu"))
    expected = oracle.local_attention(
        arrays.pop("x"), case.window, None if mask is None else mask.numpy(), case.causal, heads=case.heads, **arrays
    )
    exact = torch.as_tensor(expected, device=device)
    baseline = run(reference, case, torch.float64, device, dtype=torch.float32).out
    # 8: LayerNorm of small numbers subtracts means of sums.
    scale = (8 + actual.logit_size) * exact.abs().max().item()
    check(
        actual.out,
        exact,
        baseline,
        stage="local_attention",
        backend="reference",
        expect=expectation(exact),
        scale=scale,
    )


@EVERY_KERNEL
@pytest.mark.parametrize(("backend", "dtype"), attention_backends("local_attention", dim_head=8))
@given(case=local_cases())
@counted
def test_optimized_matches(
    kernels: str, backend: str, case: LocalCase, dtype: torch.dtype, device: torch.device
) -> None:
    """Output and the gradients of x and of every weight."""
    if dtype in (torch.bfloat16, torch.float16):
        case = sized_for_half(case)
    # LayerNorm divides by the spread: where all channels of a token are equal it amplifies rounding without bound.
    case = replace(case, norm=case.norm and case.values != "tiny" and case.dim > 4)
    masked = obstacle("local_attention", backend, Request(device, dtype, 8, masked=True))
    case = case if masked is None else replace(case, mask="none")
    if backend == "banded_torch_efficient":
        case = replace(case, dim_head=8)
    exact = run(reference, case, dtype, device, dtype=torch.float64)
    baseline = run(reference, case, dtype, device, dtype=BASELINE_OF.get(dtype, dtype))
    with optimized.use_backends(local_attention=backend):
        actual = run(optimized, case, dtype, device, hostile=True)
    assert actual.out.dtype == dtype
    compare(actual, exact, baseline, stage="local_attention", dtype=dtype)


@pytest.mark.parametrize("n", [MAX_BLOCK - 1, MAX_BLOCK, MAX_BLOCK + 1, 2 * MAX_BLOCK + 3])
@pytest.mark.parametrize("window", [MAX_BLOCK - 1, MAX_BLOCK, MAX_BLOCK + 1])
@pytest.mark.parametrize("causal", [False, True])
def test_optimized_matches_around_the_longest_block(n: int, window: int, causal: bool, device: torch.device) -> None:
    case = LocalCase(batch=1, n=n, window=window, causal=causal, mask="random", heads=1)
    exact = run(reference, case, torch.float32, device, dtype=torch.float64)
    baseline = run(reference, case, torch.float32, device)
    actual = run(optimized, case, torch.float32, device, hostile=True)
    compare(actual, exact, baseline, stage="local_attention", dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_the_norm_over_many_tokens(dtype: torch.dtype, device: torch.device) -> None:
    """PyTorch's LayerNorm on the CPU adds them up in the dtype of its input, and a sum in bfloat16 stops at 256."""
    case = LocalCase(batch=1, n=3000, dim=16, heads=2, dim_head=8, cotangent="sum", seed=1)
    exact = run(reference, case, dtype, device, dtype=torch.float64)
    actual, baseline = run(optimized, case, dtype, device), run(reference, case, dtype, device)
    compare(actual, exact, baseline, stage="local_attention", dtype=dtype)


@BOTH
@pytest.mark.parametrize(
    "case",
    [
        LocalCase(batch=1, n=6, dim=3, window=2, dim_head=2, mask="random"),
        LocalCase(batch=1, n=5, dim=4, window=1, dim_head=2, causal=True, norm=False),
    ],
    ids=["norm", "causal"],
)
def test_gradcheck(implementation: ModuleType, case: LocalCase, device: torch.device) -> None:
    t = {name: v.to(device).requires_grad_() for name, v in case.leaves().items()}
    mask = case.valid(device)

    def f(*leaves: Tensor) -> Tensor:
        return call(implementation, case, dict(zip(t, leaves)), mask)

    assert torch.autograd.gradcheck(f, tuple(t.values()), fast_mode=interpreted())


@BOTH
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "window"), [(1, 1), (20, 1), (20, 7), (20, 19), (20, 50), (MIN_BLOCK + 9, 33), (100, 3)])
def test_window_by_perturbation(
    implementation: ModuleType, n: int, window: int, causal: bool, device: torch.device
) -> None:
    """Changing token j changes exactly the outputs i with |i - j| <= w (causal: 0 <= i - j <= w)."""
    case = LocalCase(batch=1, n=n, window=window, causal=causal)
    t = {name: v.to(device) for name, v in case.leaves().items()}
    mask = torch.ones(1, n, dtype=torch.bool, device=device)
    if n > 10:
        mask[0, 4] = False
    before = call(implementation, case, t, mask)
    for j in sorted({0, n // 3, n - 1, min(4, n - 1)}):
        x = t["x"].clone()
        x[:, j] += 1.0
        x[:, j, 0] -= 3.0
        changed = (call(implementation, case, t | {"x": x}, mask) != before).any(-1)[0]
        distance = torch.arange(n, device=device) - j
        expected = (distance <= window) & (distance >= (0 if causal else -window)) & mask[0] & mask[0, j]
        assert torch.equal(changed, expected), f"token {j}: {changed.nonzero().flatten().tolist()}"


@BOTH
def test_wide_window_is_full_attention(implementation: ModuleType, device: torch.device) -> None:
    case = LocalCase(n=23, window=22)
    t = {name: v.to(device) for name, v in case.leaves().items()}
    out = call(implementation, case, t, None)
    for window in (23, 100, 10**6):
        torch.testing.assert_close(
            call(implementation, replace(case, window=window), t, None), out, rtol=1e-12, atol=1e-12
        )


@BOTH
def test_probabilities_sum_to_one(implementation: ModuleType, device: torch.device) -> None:
    """Values that do not depend on the token come out as they are, whatever the window and the mask."""
    case = LocalCase(n=40, norm=False, mask="random")
    t = {name: v.to(device) for name, v in case.leaves().items()}
    inner = case.heads * case.dim_head
    t["x"][..., 0] = 1.0
    t["w_qkv"][2 * inner :] = 0
    t["w_qkv"][2 * inner :, 0] = 1
    mask = case.valid(device)
    out = call(implementation, case, t, mask)
    expected = t["w_out"].sum(-1).expand(out.shape) * mask[..., None]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@BOTH
def test_masked_tokens_take_no_part(implementation: ModuleType, device: torch.device) -> None:
    """Outputs and gradients 0, content irrelevant even when NaN, bit for bit; a batch item without valid tokens too."""
    case = LocalCase(batch=3, n=40, mask="none_valid")
    mask = case.valid(device)
    leaves = {name: v.to(device) for name, v in case.leaves().items()}
    g = torch.randn(3, 40, case.dim, generator=generator(3), dtype=torch.float64).to(device)
    runs = []
    for filler in (0.0, math.nan, math.inf):
        t = leaves | {"x": torch.where(mask[..., None], leaves["x"], filler)}
        t = {name: v.detach().clone().requires_grad_() for name, v in t.items()}
        out = call(implementation, case, t, mask)
        grads = torch.autograd.grad(out, list(t.values()), g)
        assert not out[~mask].any()
        assert not grads[0][~mask].any()
        runs.append((out.detach(), *grads))
    for other in runs[1:]:
        for a, b in zip(other, runs[0]):
            check_identical(a, b)


@BOTH
def test_padding_changes_nothing(implementation: ModuleType, device: torch.device) -> None:
    case = LocalCase(n=37, window=6)
    t = {name: v.to(device) for name, v in case.leaves().items()}
    out = call(implementation, case, t, None)
    for extra in (1, 5, 27, 60):
        x = torch.cat((t["x"], torch.full((2, extra, case.dim), math.nan, dtype=torch.float64, device=device)), 1)
        mask = torch.arange(37 + extra, device=device).expand(2, -1) < 37
        got = call(implementation, case, t | {"x": x}, mask)
        torch.testing.assert_close(got[:, :37], out, rtol=1e-11, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("window", [8, 64])
def test_memory_is_linear_in_the_length(window: int, device: torch.device) -> None:
    """Never N x N: no tensor of a forward and backward has more than N (R + 2 w) elements, R at least 32."""
    n = 16384
    case = LocalCase(batch=1, n=n, dim=8, heads=1, dim_head=8, window=window)
    t = {name: v.float().to(device).requires_grad_() for name, v in case.leaves().items()}
    with LargestTensor() as largest:
        call(optimized, case, t, None).sum().backward()
    block = max(window, MIN_BLOCK)
    # Keys are held per block: span * dim_head / block numbers a token; the mask has span.
    assert largest.numel <= n * (block + 2 * window) * max(1.0, 8 / block) * 1.1
    assert largest.numel < n * n / 50


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "window"), [(1, 1), (17, 3), (40, 39)])
def test_one_operator_for_a_windowed_kernel(
    n: int, window: int, causal: bool, kernels: str, device: torch.device
) -> None:
    """What surrounds a kernel with windows (all of which need a GPU), around attention written out: the reference."""
    heads, dim_head, dim = 2, 6, 5
    g = generator(n)
    x, w_qkv, w_out = (
        torch.randn(shape, generator=g, dtype=torch.float64).to(device).requires_grad_()
        for shape in ((2, n, dim), (3 * heads * dim_head, dim), (dim, heads * dim_head))
    )
    actual = ops.window_attention(x, w_qkv, w_out, None, heads, window, causal, "math", kernels == "triton")[0]
    exact = reference.local_attention(x, window, causal=causal, w_qkv=w_qkv, w_out=w_out, heads=heads)
    cotangent = torch.randn(exact.shape, generator=g, dtype=torch.float64).to(device)
    pairs = [(actual, exact)]
    pairs += zip(*(torch.autograd.grad(out, (x, w_qkv, w_out), cotangent) for out in (actual, exact)))
    for found, expected in pairs:
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "dim_head"), [(0, 4), (1, 2), (300, 64), (100001, 6)])
def test_rotary_tables(n: int, dim_head: int, dtype: torch.dtype, kernels: str, device: torch.device) -> None:
    """Of Python's own cosine: an angle of 100000 keeps its digits."""
    cos, sin = ops.rotary_tables(n, dim_head, device, dtype, kernels == "triton")
    assert cos.shape == sin.shape == (n, dim_head)
    assert cos.dtype == sin.dtype == dtype
    for i in {0, n // 2, n - 1} if n else ():
        for j in range(dim_head):
            angle = i * 10000.0 ** (-2 * (j % (dim_head // 2)) / dim_head)
            # 2 to a rounded exponent of up to log2(10000) = 13.3.
            bound = torch.finfo(dtype).eps + 13.3 * torch.finfo(torch.float64).eps * angle
            assert abs(cos[i, j].item() - math.cos(angle)) <= bound
            assert abs(sin[i, j].item() - math.sin(angle)) <= bound
