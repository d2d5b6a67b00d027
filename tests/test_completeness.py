"""Backward completeness: whichever inputs ask for a gradient, each gets the one it gets among all of them; and whatever
the layout of a cotangent, its values decide.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from harness import EVERY_KERNEL, check_identical, interpreted
from stages import LAYERS, STAGES, N, cotangent_of, layer_stage, stage
from strategies import LAYOUTS, lay_out
from torch import Tensor

import optimized

EVERY_STAGE = pytest.mark.parametrize("name", list(STAGES))
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


INTERPRETED_LAYOUT = {torch.float64: "sliced", torch.float32: "sum", torch.bfloat16: "transposed"}  # one each


def subsets(leaves: tuple[str, ...], dtype: torch.dtype) -> list[tuple[str, ...]]:
    """All of up to five; of more: none, each, pairs, all but one, all. Pairs in float64 alone."""
    count = len(leaves)
    sizes = range(count + 1) if count <= 5 else {0, 1, count - 1, count} | ({2} if dtype == torch.float64 else set())
    found = [wanted for size in sorted(sizes) for wanted in itertools.combinations(leaves, size)]
    if interpreted():  # a few, by a stride that is none of the sizes' multiples
        most = 2 if dtype == torch.float64 else 1
        found = found[1 :: -(-len(found) // most)]
    return found


def check_gradient(
    name: str, got: Tensor | None, expected: Tensor | None, like: Tensor, slack: Tensor | None = None
) -> None:
    """slack: by how much they may differ, where PyTorch sums; nothing by default."""
    assert (got is None) == (expected is None), f"{name}: {'no gradient' if got is None else 'a gradient'}"
    if got is not None and expected is not None:
        assert (got.dtype, got.shape, got.device) == (like.dtype, like.shape, like.device), name
        if slack is None:
            check_identical(got, expected, name)
        else:
            assert ((got - expected).abs() <= slack).all(), name


def order_of_sums(name: str, leaf: str, tensors: dict[str, Tensor], out: Tensor, g: Tensor) -> Tensor | None:
    """The query scores of `routed_attention` are multiplied in by PyTorch, which sums over channels as they lie."""
    if (name, leaf) != ("routed_attention", "q_scores"):
        return None
    terms = (g.double() * out.double()).abs().sum(-1) / tensors[leaf].double().abs()
    return out.shape[-1] * torch.finfo(tensors[leaf].dtype).eps * terms


@EVERY_STAGE
@DTYPES
@EVERY_KERNEL
def test_subsets_of_requires_grad(kernels: str, dtype: torch.dtype, name: str, device: torch.device) -> None:
    """Bit for bit, by our kernels: what is left out of a backward changes no sum of what is in it."""
    made = stage(name, dtype, device)
    out, full = made.run(optimized, made.tensors, made.leaves)
    assert all(t is not None and t.any() and t.isfinite().all() for t in full.values())
    for wanted in subsets(made.leaves, dtype):
        again, found = made.run(optimized, made.tensors, wanted)
        check_identical(again, out)
        for leaf in wanted:
            slack = None
            if kernels == "torch":  # libraries of products may choose by where their inputs happen to lie
                slack = 8 * torch.finfo(full[leaf].dtype).eps * full[leaf].abs().max()
            check_gradient(f"{leaf} of {wanted}", found[leaf], full[leaf], made.tensors[leaf], slack)


def cotangents(out: Tensor) -> dict[str, Tensor]:
    """By layout, and the two that autograd makes: of .sum(), stride 0 everywhere, and of .mean(1)."""
    found = {layout: lay_out(cotangent_of(out), layout) for layout in LAYOUTS[1:]}
    one = torch.ones((), dtype=out.dtype, device=out.device)
    found["sum"] = one.expand(out.shape)
    found["sum over tokens"] = cotangent_of(out)[:, :1].expand_as(out)
    return found


@EVERY_STAGE
@DTYPES
@EVERY_KERNEL
def test_layouts_of_the_cotangent(kernels: str, dtype: torch.dtype, name: str, device: torch.device) -> None:
    made = stage(name, dtype, device)
    out = made.call(optimized, made.tensors)
    for layout, g in cotangents(out).items():
        if interpreted() and layout != INTERPRETED_LAYOUT[dtype]:
            continue
        plain = g.clone(memory_format=torch.contiguous_format)
        assert layout == "unaligned" or g.stride() != plain.stride(), layout
        _, expected = made.run(optimized, made.tensors, made.leaves, plain)
        _, found = made.run(optimized, made.tensors, made.leaves, g)
        for leaf in made.leaves:
            slack = order_of_sums(name, leaf, made.tensors, out, plain)
            check_gradient(f"{leaf}, {layout}", found[leaf], expected[leaf], made.tensors[leaf], slack)


@EVERY_KERNEL
@pytest.mark.parametrize("name", ["layer", "layer_local", "layer_cross"])
def test_nothing_to_choose_has_gradient_zero(kernels: str, name: str, device: torch.device) -> None:
    """Zeros exactly for the routing tokens, which took no decision, and for the null token, which stands in for nobody;
    whichever subset asks for theirs.
    """
    made = layer_stage(**{**LAYERS[name], "k_q": N, "k_kv": N})(torch.float64)
    made = replace(made, tensors={key: t.to(device) for key, t in made.tensors.items()})
    _, full = made.run(optimized, made.tensors, made.leaves)
    assert all(t is not None for t in full.values())
    zero = {leaf for leaf, t in full.items() if not t.any()}
    idle = {"query_router.routing_token", "key_value_router.routing_token", "null_routed_token"}
    assert zero == idle & full.keys()
    for leaf in ("query_router.routing_token", "attn.to_q.weight"):
        _, found = made.run(optimized, made.tensors, (leaf, "x"))
        for key in (leaf, "x"):
            check_gradient(key, found[key], full[key], made.tensors[key])
