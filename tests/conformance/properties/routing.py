"""Options of the routers, and routing at forward."""

from __future__ import annotations

import inspect
from dataclasses import replace

import torch
from hypothesis import strategies as st

from tests.conformance.data import EITHER, cases, graded, planted
from tests.conformance.registry import checked_on
from tests.conformance.subject import NotOffered, Subject, assert_equals_reference, assert_unchanged, call
from tests.strategies import LayerCase

ITERATIONS = {"eps": st.just(1.0), "straight_through": st.just(False), "n_iters": st.integers(1, 20)}


@checked_on(cases(options=st.fixed_dictionaries(ITERATIONS)))
def soft_scores_scale_queries_and_values(subject: Subject, case: LayerCase) -> None:
    """straight_through=False: outputs and values are times the soft scores of coordinate descent."""
    state, inputs = graded(case)
    assert_equals_reference(subject, case, state, inputs)


COSINE = ITERATIONS | {"cosine_sim_routing": st.just(True), "cosine_sim_scale": st.sampled_from((0.5, 1.0))}


@checked_on(cases(options=st.fixed_dictionaries(COSINE)))
def cosine_routing_ignores_the_norms(subject: Subject, case: LayerCase) -> None:
    """cosine_sim_routing: logits are cosines times the scale, of tokens and routing tokens of any size."""
    state, inputs = graded(case, unit=True)
    inputs["x"] *= 0.5 + (torch.arange(case.n) % 5)[None, :, None]
    for name in ("query_router.routing_token", "key_value_router.routing_token"):
        state[name] *= 3.0
    assert_equals_reference(subject, case, state, inputs)


# Some soft scores saturate, fewer than K: the iterates are elsewhere, and which tokens are the K best is beyond doubt.
EXACT = {"eps": st.sampled_from((0.3, 0.1)), "straight_through": st.just(False), "solver": st.just("exact")}


@checked_on(cases(options=st.fixed_dictionaries(EXACT)))
def the_exact_solver_returns_the_limit(subject: Subject, case: LayerCase) -> None:
    """solver="exact": soft scores of mass min(K * 9/8, N), and their gradients."""
    state, inputs = graded(case)
    names = ("query_router.routing_token", "key_value_router.routing_token")
    assert_equals_reference(subject, case, state, inputs, gradients_of=names)


@st.composite
def blocks(draw: st.DrawFn) -> LayerCase:
    """Two or three blocks, each at least twice as long as what is picked from it; none is short."""
    count = draw(st.integers(2, 3))
    each_q, each_kv = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    width = 2 * max(each_q, each_kv) + draw(st.integers(0, 3))
    sizes = {"n": count * width, "k_q": count * each_q, "k_kv": count * each_kv}
    return draw(cases(options=st.just({"route_block_size": width}), **sizes))


@checked_on(blocks())
def route_block_size_routes_from_every_block(subject: Subject, case: LayerCase) -> None:
    """route_block_size: K / blocks tokens come from each block."""
    state, inputs, _ = planted(case, block=case.options["route_block_size"])
    assert_equals_reference(subject, case, state, inputs)


@checked_on(cases(options=st.just({"learned_routing_tokens": True})))
def routing_tokens_can_be_passed_at_forward(subject: Subject, case: LayerCase) -> None:
    """learned_routing_tokens=True: forward takes `query_routing_tokens` and `key_value_routing_tokens`."""
    state, inputs, _ = planted(case)
    tokens = {
        argument: state.pop(f"{router}.routing_token")
        for argument, router in (
            ("query_routing_tokens", "query_router"),
            ("key_value_routing_tokens", "key_value_router"),
        )
    }
    layer = subject.build(case)
    try:
        inspect.signature(layer.forward).bind(inputs["x"], **tokens)
    except TypeError as error:
        raise AssertionError(f"the constructor accepts learned_routing_tokens=True, but forward: {error}") from error
    assert_equals_reference(subject, case, state, inputs | tokens)


@checked_on(
    cases(queries=EITHER, key_values=EITHER), needs=("state_dict", "num_routed_queries", "num_routed_key_values")
)
def slots_can_be_overridden_at_forward(subject: Subject, case: LayerCase) -> None:
    """num_routed_queries and num_routed_key_values of a call take the place of the constructor's."""
    state, inputs, _ = planted(case)
    slots = {"num_routed_queries": case.k_q, "num_routed_key_values": case.k_kv}
    built = replace(case, k_q=case.k_q + 3, k_kv=1 if case.k_kv > 1 else 4)
    assert_equals_reference(subject, built, state, inputs | slots, same_as=case, without=slots)


@checked_on(cases(experts=(1, 2), batch=(1, 2)), needs=("state_dict", "return_routes", "routes"))
def returned_routes_can_be_given_back(subject: Subject, case: LayerCase) -> None:
    """return_routes: the tokens of every expert; `routes=` with them has its say, and not the routers."""
    state, inputs, picked = planted(case)
    read_by_routers = slice(2 * case.experts)
    for name in ("attn.to_q.weight", "attn.to_kv.weight"):
        state[name][:, read_by_routers] = 0.0
    layer = subject.build(case, state)
    given = subject.move(inputs)
    result = call(layer, **given, return_routes=True)
    try:
        out, (q_routes, kv_routes) = result
        found = q_routes.indices.cpu()
    except (TypeError, ValueError, AttributeError) as error:
        raise NotOffered(f"forward: return_routes gives out something else ({error})", "return_routes") from error
    expected = [[row.nonzero().flatten().tolist() for row in item] for item in picked]
    assert found.sort(dim=-1).values.tolist() == expected, "the query routes are not the tokens with the K best logits"
    given["x"] = given["x"].clone()
    given["x"][..., read_by_routers] *= -1.0
    again = call(layer, **given, routes=(q_routes, kv_routes))
    assert_unchanged(again, out, "routes given back, and other logits: the output")
