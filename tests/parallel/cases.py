"""Calls of a layer in parallel, and of the same layer in one process: outputs and all gradients are to be equal.

What the ranks have is put together here, in the process of the tests: of tokens side by side, of the shares that the
ranks have of a gradient the sum.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from programs.layers import DIM, DIM_HEAD, call_of, layer_of
from programs.layers import Option as Call
from strategies import draw
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

import optimized
from optimized.parallel import ContextParallel, ExpertParallel

STYLES: dict[str, Any] = {
    "context": lambda: ContextParallel(),
    "sharded": lambda: ContextParallel(shard_experts=True),
    "experts": lambda: ExpertParallel(),
}
SHARDED = ("x", "context", "mask", "context_mask")  # over the ranks, in context parallelism
CAUSAL = {
    "num_routed_queries": 2,
    "num_routed_key_values": 5,
    "local_attn_window_size": 4,
    "dim_head": DIM_HEAD,
    "heads": 2,
}


@dataclass(frozen=True)
class Case:
    """arguments: of the constructor; given: of the call, besides x, by name. n: tokens of the sequence."""

    n: int = 21
    arguments: Mapping[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    experts: int = 2
    causal: bool = False
    style: str = "context"
    plain: bool = False  # plain shards, no DTensors
    inject: bool = False  # routes of the layer's own, as decisions from outside
    hide: bool = False  # NaN in masked tokens
    nan: tuple[int, ...] = ()  # tokens of the first item that are NaN
    seed: int = 0

    def layer(self, **more: Any) -> Any:
        if not self.causal:
            return layer_of("optimized", self.seed, num_experts=self.experts, **{**self.arguments, **more})
        sizes = {**CAUSAL, "num_experts": self.experts, "dtype": torch.float64, **self.arguments, **more}
        layer = optimized.MixtureOfAutoregressiveAttention(DIM, **sizes)
        for i, (_, p) in enumerate(sorted(layer.named_parameters())):
            p.data = draw(tuple(p.shape), "normal", 100 * self.seed + i).to(p.dtype) * 0.4
        return layer

    def call(self) -> dict[str, Any]:
        call: dict[str, Any] = dict(call_of(Call(self.arguments, self.given), self.n, self.seed))
        if self.hide:
            call["x"] = call["x"].masked_fill(~call["mask"][..., None], torch.nan)
        call["x"][0, list(self.nan)] = torch.nan
        for name, t in call.items():
            if t.is_floating_point() and name != "rotary_emb":
                call[name] = t.requires_grad_()
        return call

    def cotangent(self) -> Tensor:
        return draw((2, self.n, DIM), "normal", 7000 + self.seed)


def run(rank: int, cases: Sequence[Case]) -> list[dict[str, Tensor]]:
    """Of one rank: what it has of each case."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return [run_one(case, mesh) for case in cases]


def run_one(case: Case, mesh: DeviceMesh) -> dict[str, Tensor]:
    layer = parallelize_module(copy.deepcopy(case.layer()), mesh, STYLES[case.style]())
    return called(layer, case, mesh)


def called(layer: nn.Module, case: Case, mesh: DeviceMesh) -> dict[str, Tensor]:
    """out, and the gradients of inputs (d x, say) and parameters. Gradients of DTensors are whole."""
    whole = case.call()
    if case.inject:
        with torch.no_grad():
            whole["routes"] = case.layer()(**whole, return_routes=True)[1]
    call, cotangent = {}, case.cotangent()
    for name, t in whole.items():
        call[name] = t
        if case.style != "experts" and name in SHARDED:
            own = part(t, mesh).detach().clone()
            call[name] = own if case.plain else as_dtensor(own, t, mesh)
            call[name].requires_grad_(t.requires_grad)
    if case.style != "experts":
        cotangent = part(cotangent, mesh)
    out, found = answered(layer, case, call)
    local = out.to_local() if isinstance(out, DTensor) else out
    (local * cotangent).sum().backward()
    found["out"] = local.detach()
    for name, t in call.items():
        if isinstance(t, Tensor) and t.requires_grad:
            assert t.grad is not None, name
            grad = t.grad
            if isinstance(grad, DTensor):  # before PyTorch 2.12 that of an uneven one ends up replicated
                grad = grad.redistribute(mesh, t.placements).to_local()
            found[f"d {name}"] = grad
    for name, p in layer.named_parameters():
        assert p.grad is not None, f"{name}: no gradient"
        found[name] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
    return found


def answered(layer: nn.Module, case: Case, call: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The output, and what the routers decided, which all ranks know."""
    if case.causal:
        return layer(**call), {}
    out, pair = layer(**call, return_routes=True)
    found = {}
    for side, routes in zip(("queries", "keys"), pair):
        for name in ("indices", "mask", "scores"):
            found[f"{side}: {name}"] = getattr(routes, name).detach().double()
    return out, found


def part(t: Tensor, mesh: DeviceMesh) -> Tensor:
    """The rank's tokens: as torch.chunk cuts them, and none for those it has no chunk for."""
    each = -(-t.shape[1] // mesh.size())
    return t[:, mesh.get_local_rank() * each :][:, :each].contiguous()


def as_dtensor(own: Tensor, whole: Tensor, mesh: DeviceMesh) -> DTensor:
    contiguous = torch.empty(whole.shape).stride()
    return DTensor.from_local(own, mesh, [Shard(1)], run_check=False, shape=whole.shape, stride=contiguous)


def alone(case: Case) -> dict[str, Tensor]:
    """The same of one process."""
    layer, call = case.layer(), case.call()
    if case.inject:
        with torch.no_grad():
            call["routes"] = layer(**call, return_routes=True)[1]
    out, found = answered(layer, case, call)
    (out * case.cotangent()).sum().backward()
    found["out"] = out.detach()
    found |= {f"d {name}": t.grad for name, t in call.items() if isinstance(t, Tensor) and t.requires_grad}
    return found | {name: p.grad for name, p in layer.named_parameters()}


def together(case: Case, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Of what the ranks have: tokens side by side; full gradients, which are equal on all ranks; else the sum."""
    found = {}
    for name in parts[0]:
        each = [p[name] for p in parts]
        if case.style != "experts" and name in ("out", *(f"d {name}" for name in SHARDED)):
            found[name] = torch.cat(each, 1)
        elif ": " in name or case.style == "experts" or (case.style == "sharded" and not name.startswith("d ")):
            whole = each[0].isnan(), each[0].nan_to_num()
            for t in each[1:]:
                assert all(map(torch.equal, (t.isnan(), t.nan_to_num()), whole)), f"{name}: differs between ranks"
            found[name] = each[0]
        else:
            found[name] = torch.stack(each).sum(0)
    return found


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: Any = "") -> None:
    """To 1e-12 of the largest number of each."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].isfinite().all(), f"{what}: {name} is not finite"
        largest = float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=1e-12 * max(largest, 1), msg=lambda text, n=name: f"{what}, {n}: {text}"
        )


def check(ranks: Any, world: int, cases: Sequence[Case]) -> None:
    """All cases by one call of the processes."""
    parts = ranks.run(run, cases, world=world)
    for i, case in enumerate(cases):
        assert_equal(together(case, [p[i] for p in parts]), alone(case), case)


def styled(cases: Sequence[Case], style: str) -> list[Case]:
    return [replace(case, style=style) for case in cases]
