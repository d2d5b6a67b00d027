"""Our Triton kernels beside PyTorch's own operations: the operators of a layer's calls, each in both its forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import optimized
from optimized.ops.operator import OPERATORS
from optimized.prove.party import Party
from optimized.prove.setup import Setup

BOUND = 1e-10  # of relative differences in float64: seen are 1e-14 at most, and mistakes are far above
STAGES = {  # what is compared, and the operators that hold it
    ("routing", "logits, solver, selection"): ("router_logits", "pick"),
    ("dispatch", "gather and norm, rotation"): ("gather_norm", "window_attention"),
    ("both at once", "both routers, their rows"): ("routed_rows",),
    ("experts", "rotation, value scores, null slot"): ("expert_attention",),
    ("combination", "sum over the experts"): ("combine",),
}


class Compared(NamedTuple):
    """Kernels of ours beside PyTorch's: the largest relative difference of values and of gradients."""

    stage: str
    kernels: str
    values: float
    gradients: float

    @property
    def equal(self) -> bool:
        return self.values <= BOUND and self.gradients <= BOUND  # False for NaN


class Recorded(TorchDispatchMode):
    """Calls of our operators: `calls` has pairs of a name and the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "moa":
            self.calls.append((func._opname, args))
        return func(*args, **kwargs or {})


def compare_kernels(setup: Setup) -> list[Compared]:
    """Every operator of `STAGES`, by kernels of ours and by PyTorch from the same inputs; in float64, where rounding
    hides nothing and no logit is within it of a kink.
    """
    every = record_calls(Party(optimized, torch.float64, torch.float64, setup))
    # One of those that differ in nothing but tensors: the last, whose scores are not all 1.
    calls = {(name, *constants(args)): (name, args) for name, args in every}.values()
    found = []
    for (stage, what), names in STAGES.items():
        differences = [compare(name, args) for name, args in calls if name in names]
        values, gradients = (float(torch.tensor(part, dtype=torch.float64).max()) for part in zip(*differences))
        found.append(Compared(stage, what, values, gradients))
    return found


def record_calls(party: Party) -> list[tuple[str, tuple]]:
    """Of the operators, with their arguments: those of one router, of the layer, and of the layer by injected routes.

    The injected scores differ from slot to slot, and tokens have rotary positions: else neither would be seen.
    """
    layer, x = party.layer, party.x
    angles = torch.linspace(0, 3, x.shape[1] * layer.config.dim_head, dtype=x.dtype, device=x.device)
    with torch.no_grad(), Recorded() as recorded:
        routes = layer.query_router(x, party.slots)
        layer(x)
        spread = torch.linspace(0.5, 1, routes.scores.numel(), dtype=x.dtype, device=x.device)
        scored = routes._replace(scores=spread.view_as(routes.scores))
        layer(x, routes=(scored, scored), rotary_emb=angles.view(x.shape[1], -1))
    return recorded.calls


def constants(args: tuple) -> tuple:
    return tuple(a for a in args if not isinstance(a, Tensor))


def compare(name: str, args: tuple) -> tuple[float, float]:
    """Differences of values and of gradients between the two forms of an operator."""
    mine, theirs = (run(name, args, triton) for triton in (True, False))
    return max_difference(mine[0], theirs[0]), max_difference(mine[1], theirs[1])


def run(name: str, args: tuple, triton: bool) -> tuple[list[Tensor], Sequence[Tensor]]:
    """All results, and the gradients of all arguments that have one, of a cotangent that is drawn."""
    operator = OPERATORS[name]
    given = dict(zip(operator.names, args)) | {"triton": triton}
    leaves = {}
    for argument in operator.wrt:
        if given[argument] is not None:
            leaves[argument] = given[argument].detach().clone().requires_grad_()
    outs = operator(**given | leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    graph = [out for out in outs if out.requires_grad]
    generator = torch.Generator(graph[0].device).manual_seed(0)
    cotangents = [torch.empty_like(out).normal_(generator=generator) for out in graph]
    return [out.detach().double() for out in outs], torch.autograd.grad(graph, list(leaves.values()), cotangents)


def max_difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference over the largest element; NaN if there is one anywhere."""
    found = [(a - b).abs().max() / b.abs().max().clamp_min(1e-300) for a, b in zip(actual, expected) if b.numel()]
    return float(torch.stack(found).max())
