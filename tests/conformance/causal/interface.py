"""It can be built, called and loaded as documented."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tests.conformance.causal.case import CausalCase
from tests.conformance.causal.data import cases, noise, planted
from tests.conformance.causal.subject import CausalSubject, checked_on
from tests.conformance.data import EITHER
from tests.conformance.subject import assert_unchanged, call
from tests.strategies import cotangent, draw

EXAMPLE = CausalCase(
    batch=1, n=130, dim=512, experts=2, heads=8, dim_head=64, k_q=12, k_kv=12, window=64, block=64,
)  # fmt: skip


@checked_on(st.just(EXAMPLE))
def the_documented_example_runs(subject: CausalSubject, case: CausalCase) -> None:
    """That of the published package: the window of local attention is that of routing, unless another is given."""
    layer = subject.factory(
        case.dim,
        num_routed_queries=case.k_q,
        num_routed_key_values=case.k_kv,
        local_attn_window_size=case.window,
        routed_window_size=None,
        num_experts=case.experts,
    ).to(subject.device)
    out = layer(draw((case.batch, case.n, case.dim), "normal", case.seed).float().to(subject.device))
    assert out.shape == (case.batch, case.n, case.dim), f"the output has shape {tuple(out.shape)}"
    assert out.isfinite().all(), "the output is not finite"


@checked_on(cases(experts=(1, 2), prenorm=EITHER), "state_dict")
def state_dict_has_the_names_and_shapes(subject: CausalSubject, case: CausalCase) -> None:
    """Parameters are named and shaped as the reference's, and load and save unchanged."""
    expected, layer = subject.ORACLE(**case.arguments()), subject.build(case)
    found, wanted = ({name: tuple(p.shape) for name, p in made.named_parameters()} for made in (layer, expected))
    assert found == wanted, f"differs in {sorted(set(found.items()) ^ set(wanted.items()))}"
    layer.load_state_dict({n: t.to(subject.device) for n, t in expected.state_dict().items()}, strict=False)
    saved = layer.state_dict()
    for name, t in expected.state_dict().items():
        assert torch.equal(saved[name].cpu(), t), f"{name} was saved otherwise than loaded"


@checked_on(cases(prenorm=EITHER), "device", "dtype")
def device_and_dtype_at_construction(subject: CausalSubject, case: CausalCase) -> None:
    """Parameters stand on the device and in the dtype that the constructor was told."""
    layer = subject.construct(case, device=subject.device, dtype=torch.bfloat16)
    for name, p in layer.named_parameters():
        assert p.dtype == torch.bfloat16, f"{name} is {p.dtype}"
        assert p.device.type == torch.device(subject.device).type, f"{name} is on {p.device}"


@checked_on(cases(experts=(1, 2), prenorm=EITHER))
def inputs_are_left_alone(subject: CausalSubject, case: CausalCase) -> None:
    """A call does not write to x."""
    x = subject.move(case.inputs())["x"]
    before = x.clone()
    call(subject.build(case), x)
    assert torch.equal(x, before), "x was overwritten"


@checked_on(st.one_of(cases(batch=(0,), prenorm=EITHER), cases(n=0, batch=(1, 2), prenorm=EITHER)))
def no_items_and_no_tokens_are_legal(subject: CausalSubject, case: CausalCase) -> None:
    """A batch of no items, and items of no tokens, give an output of the same shape."""
    x = subject.move(case.inputs())["x"]
    out = call(subject.build_any(case, case.state()), x)
    assert out.shape == x.shape, f"the output has shape {tuple(out.shape)}"


@checked_on(cases(blocks=(0, 0), window=st.integers(1, 6), experts=(1, 2), prenorm=EITHER))
def a_sequence_within_a_block_is_legal(subject: CausalSubject, case: CausalCase) -> None:
    """N <= W, and N on either side of w: the outputs are finite, and those of the first tokens of a longer sequence."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    x = subject.move(inputs)["x"]
    out = call(layer, x)
    assert out.shape == x.shape, f"the output has shape {tuple(out.shape)}"
    assert out.isfinite().all(), "the output is not finite"
    longer = call(layer, torch.cat((x, noise(case, (case.batch, case.block, case.dim)).to(x)), 1))
    assert_unchanged(longer[:, : case.n], out, f"{case.block} tokens more: the output of the first {case.n}")


@checked_on(cases(everybody=True, remember_all=EITHER, blocks=(2, 3), experts=(1, 2), prenorm=EITHER))
def every_token_may_be_a_query(subject: CausalSubject, case: CausalCase) -> None:
    """num_routed_queries >= W, in several blocks: the outputs are finite. (Elsewhere there is a choice.)"""
    state, inputs = planted(case)
    out = call(subject.build_any(case, state), subject.move(inputs)["x"])
    assert out.shape == inputs["x"].shape, f"the output has shape {tuple(out.shape)}"
    assert out.isfinite().all(), "the output is not finite"


@checked_on(cases(blocks=(0, 1), experts=(1, 2), prenorm=EITHER), "state_dict")
def every_parameter_has_a_gradient(subject: CausalSubject, case: CausalCase) -> None:
    """Of zeros if need be, also where nobody is routed: gradients of many machines are added up in step."""
    state, inputs = planted(case)
    layer = subject.build(case, state)
    out = call(layer, subject.move(inputs)["x"])
    g = cotangent(tuple(out.shape), "dense", case.seed).to(out)
    named = dict(layer.named_parameters())
    found = torch.autograd.grad(out, list(named.values()), g, allow_unused=True)
    without = [name for name, grad in zip(named, found) if grad is None]
    assert not without, f"no gradient of {', '.join(without)}"
