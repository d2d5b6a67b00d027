"""Memory: what the layer keeps for its backward, stage by stage, as a formula of the shape; the peak on a GPU.

docs/performance.md states the same formula.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategies import LayerCase, generator
from torch import Tensor, nn

import optimized

CASE = LayerCase(batch=2, n=96, dim=48, experts=3, heads=2, dim_head=8, k_q=10, k_kv=14)
CASES = {
    "straight-through": CASE,
    "soft": replace(CASE, options={"straight_through": False}),
    "exact, soft": replace(CASE, options={"straight_through": False, "solver": "exact"}),
    "mask": replace(CASE, mask="suffix"),
    "cosine": replace(CASE, options={"cosine_sim_routing": True}),
}


def saved_bytes(case: LayerCase, itemsize: int) -> dict[str, int]:
    """By stage, without input and parameters. Numbers of the router and statistics take at least 4 bytes each."""
    b, n, e, h = case.batch, case.n, case.experts, case.heads
    wide, inner = max(itemsize, 4), case.heads * case.dim_head
    rows = e * b
    routes = rows * (case.k_q + case.k_kv) * (8 + 1 + wide)  # indices, slot masks, scores
    solver = 0
    if not case.options.get("straight_through", True):
        solver = 2 * rows * n * wide + 2 * 20 * 2 * rows * wide  # soft scores, iterates, counts
    return {
        "routing": 2 * rows * n * (wide + 4) + b * n * wide + 2 * rows * wide + routes + solver,  # logits, inverse maps
        "rows": rows * (case.k_q + case.k_kv) * case.dim * itemsize,
        "attention": rows * (2 * case.k_q + 2 * case.k_kv) * inner * itemsize + rows * h * case.k_q * wide,
        "combination": rows * case.k_q * case.dim * itemsize,
    }


def build(case: LayerCase, device: torch.device, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    layer = optimized.MixtureOfAttention(**(case.arguments() | {"dropout": 0.0}), device=device, dtype=dtype)
    given = {name: t.to(device) for name, t in case.inputs().items()}
    return layer, given | {"x": given["x"].to(dtype).requires_grad_()}


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_saved_for_backward(name: str, kernels: str, device: torch.device) -> None:
    """Distinct storages, but for those of inputs and parameters."""
    case = CASES[name]
    layer, given = build(case, device, torch.float32)
    known = {t.untyped_storage().data_ptr() for t in (*given.values(), *layer.parameters()) if isinstance(t, Tensor)}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = layer(**given)
    few = 1024  # lengths, and the like
    assert out.requires_grad
    assert sum(saved_bytes(case, 4).values()) * 0.9 <= sum(kept.values()) <= sum(saved_bytes(case, 4).values()) + few


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize("name", ["straight-through", "mask"])
def test_backward_makes_no_zeros(name: str, kernels: str, device: torch.device) -> None:
    """PyTorch would for each result of an operator that has no gradient, as large as all that is saved."""
    layer, given = build(CASES[name], device, torch.float32)
    out = layer(**given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out.backward(torch.randn(out.shape, generator=generator(3)).to(out))
    zeros = [event.cpu_parent for event in profile.events() if event.name == "aten::zeros"]
    # PyTorch's own attention makes some.
    assert not [parent for parent in zeros if parent is None or not re.match("aten::_.*attention", parent.name)]


def peak_of_both(layer: nn.Module, given: dict[str, Tensor], cotangent: Tensor) -> int:
    """Bytes above inputs and parameters, of the second of two calls."""

    def forget() -> None:
        layer.zero_grad(set_to_none=True)
        given["x"].grad = None

    for _ in range(2):
        forget()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer(**given).backward(cotangent)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_peak_of_both_directions(dtype: torch.dtype, device: torch.device) -> None:
    """Above inputs and parameters: what is saved, gradients of the parameters, and the most that one stage needs."""
    case = LayerCase(batch=2, n=4096, dim=512, experts=4, heads=8, dim_head=64, k_q=512, k_kv=512)
    layer, given = build(case, device, dtype)
    cotangent = torch.randn(given["x"].shape, generator=generator(3)).to(device, dtype)

    peak = peak_of_both(layer, given, cotangent)
    size, rows, inner = dtype.itemsize, case.experts * case.batch, case.heads * case.dim_head
    gradients = sum(p.numel() * size for p in layer.parameters())
    of_x = 2 * case.batch * case.n * case.dim * size  # out, then the gradient of x
    experts = rows * (case.k_q + case.k_kv) * (case.dim + 2 * inner) * size  # dy, dout, dq, dk, dv, of the rows
    allowed = sum(saved_bytes(case, size).values()) + gradients + of_x + experts
    assert peak <= 1.1 * allowed


class Dense(nn.Module):
    """Causal attention of all tokens between the same norm and projections as those of local attention."""

    def __init__(self, dim: int, heads: int, **where: Any) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim, **where)
        self.to_qkv, self.to_out = (nn.Linear(dim, width, bias=False, **where) for width in (3 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@pytest.mark.gpu
def test_peak_of_the_causal_layer_beside_dense_attention(device: torch.device) -> None:
    """At most 1.5 times, in a shape of the benchmark: rows of all columns, E N D numbers, are the largest it makes."""
    dim, where = 1024, {"device": device, "dtype": torch.bfloat16}
    layer = optimized.MixtureOfAutoregressiveAttention(
        dim, num_routed_queries=64, num_routed_key_values=512, local_attn_window_size=256, num_experts=4, heads=4,
        local_attn_heads=16, **where,
    )  # fmt: skip
    x = torch.randn(1, 8192, dim, generator=generator(3)).to(**where).requires_grad_()
    peaks = [peak_of_both(each, {"x": x}, torch.ones_like(x)) for each in (layer, Dense(dim, 16, **where))]
    assert peaks[0] <= 1.5 * peaks[1]
