"""Our Triton kernels beside PyTorch's own operations, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import optimized
from optimized import ops
from optimized.attention import module_name
from optimized.mixture import _combine
from optimized.plan import Request, choose
from optimized.prove.party import Party
from optimized.prove.setup import Setup
from optimized.routed_attention import attend_rows, gather, rotate
from optimized.routing import route_both

OWN = ("routing", "dispatch", "mixture")  # stages with kernels of ours
BOUND = 1e-10  # of relative differences in float64: seen are 1e-14 at most, and mistakes are far above


class Compared(NamedTuple):
    """Kernels of ours beside PyTorch's: the largest relative difference of values and of gradients."""

    stage: str
    kernels: str
    values: float
    gradients: float

    @property
    def equal(self) -> bool:
        return self.values <= BOUND and self.gradients <= BOUND  # False for NaN


def compare_kernels(setup: Setup, backend: str) -> list[Compared]:
    """Every stage with kernels of ours, by them and by PyTorch from the same inputs; in float64, where rounding hides
    nothing and no logit is within it of a kink.
    """
    party = Party(optimized, torch.float64, torch.float64, setup)
    layer, attn, x, n = party.layer, party.layer.attn, party.x, party.x.shape[1]
    with optimized.use_backends(**dict.fromkeys(OWN, "torch")), torch.no_grad():
        routes, inverse = layer.query_router.decide(x, party.slots)
        rows = gather(x, routes, inverse, None, triton=False)
    positions = routes.indices.transpose(0, 1).flatten(0, 1)
    cos, sin = ops.rotary_tables(n, layer.dim_head, x.device, x.dtype)
    routers, ks = (layer.query_router, layer.key_value_router), (party.slots, party.slots)
    attention = module_name(choose("routed_attention", Request(x.device, x.dtype, layer.dim_head)).name, x.device)

    def leaf(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_()

    def by_triton() -> bool:
        return choose("dispatch", Request(x.device, x.dtype)).triton

    gamma = leaf(attn.norm.gamma)
    weights = [leaf(t) for t in (attn.to_q.weight, attn.to_kv.weight, attn.to_out.weight, attn.null_kv)]
    spread = torch.linspace(0.5, 1, routes.scores.numel(), dtype=x.dtype, device=x.device)
    scores, local = leaf(spread.view_as(routes.scores)), leaf(x)
    y, queries, keys_values = leaf(rows), leaf(rows), leaf(rows)
    q = leaf(rows.flatten(0, 1).unflatten(-1, (layer.heads, -1)))

    def route() -> tuple[Tensor, ...]:
        found = layer.query_router(x, party.slots)
        return found.logits, found.indices.double(), found.scores

    def dispatch() -> tuple[Tensor, ...]:
        return gather(x, routes, inverse, gamma, by_triton()), rotate(q, cos, sin, positions, by_triton())

    def route_all() -> tuple[Tensor, ...]:
        if by_triton():
            *found, q_routes, kv_routes, _ = route_both(x, routers, (None, None), (gamma, gamma), ks, None)
        else:
            decided = [router.decide(x, k) for router, k in zip(routers, ks)]
            found = [gather(x, *decision, gamma, triton=False) for decision in decided]
            q_routes, kv_routes = (taken for taken, _ in decided)
        return *found, q_routes.scores, kv_routes.scores

    def attend() -> tuple[Tensor, ...]:
        scored = routes._replace(scores=scores)
        settings = None, 0.0, False, False, True, by_triton()
        return (attend_rows(queries, keys_values, routes, scored, *weights, *settings),)

    def combine() -> tuple[Tensor, ...]:
        return (_combine(y, routes._replace(scores=scores), inverse, local, False, None, None, x.dtype),)

    def run(call: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor], name: str) -> tuple[tuple[Tensor, ...], ...]:
        with optimized.use_backends(**dict.fromkeys(OWN, name)):
            outs = call()
            graph = [out for out in outs if out.requires_grad]
            generator = torch.Generator(x.device).manual_seed(0)
            cotangents = [torch.empty_like(out).normal_(generator=generator) for out in graph]
            return outs, torch.autograd.grad(graph, leaves, cotangents)

    found = []
    for stage, what, call, leaves in (
        ("routing", "logits, solver, selection", route, [x, layer.query_router.routing_token]),
        ("dispatch", "gather and norm, rotation", dispatch, [x, gamma, q]),
        ("both at once", "both routers, their rows", route_all, [x, gamma, *(r.routing_token for r in routers)]),
        ("experts", f"value scores, null slot of {attention}", attend, [queries, keys_values, scores, *weights]),
        ("combination", "sum over the experts", combine, [y, scores, local]),
    ):
        pairs = zip(run(call, leaves, backend), run(call, leaves, "torch"))
        found.append(Compared(stage, what, *(max_difference(mine, theirs) for mine, theirs in pairs)))
    return found


def max_difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference over the largest element; NaN if there is one anywhere."""
    found = [(a - b).detach().abs().max() / b.detach().abs().max() for a, b in zip(actual, expected)]
    return float(torch.stack(found).max())
