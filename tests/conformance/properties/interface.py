"""It can be built, called and loaded as documented."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

import reference
from tests.conformance.data import EITHER, cases, tensors, windows
from tests.conformance.registry import checked_on
from tests.conformance.subject import Subject, call
from tests.strategies import LayerCase, draw

EXAMPLE = {"batch": 16, "n": 50, "dim": 512, "experts": 4, "k_q": 100, "k_kv": 100}
EXAMPLES = (
    LayerCase(**EXAMPLE),
    LayerCase(**EXAMPLE, options={"local_attn": True, "local_attn_window_size": 5}),
    LayerCase(**EXAMPLE, options={"prenorm": True, "dropout": 0.1}),
)


@checked_on(st.sampled_from(EXAMPLES), needs=())
def documented_examples_run(subject: Subject, case: LayerCase) -> None:
    """The three documented examples run: basic, local attention, pre-normalization and dropout."""
    layer = subject.factory(
        case.dim,
        num_routed_queries=case.k_q,
        num_routed_key_values=case.k_kv,
        num_experts=case.experts,
        **case.options,
    ).to(subject.device)
    out = layer(draw((case.batch, case.n, case.dim), "normal", case.seed).float().to(subject.device))
    assert out.shape == (case.batch, case.n, case.dim), f"the output has shape {tuple(out.shape)}"
    assert out.isfinite().all(), "the output is not finite"


@checked_on(windows(None, "multiple", experts=(1, 2, 3), prenorm=EITHER))
def state_dict_has_the_names_and_shapes(subject: Subject, case: LayerCase) -> None:
    """Parameters are named and shaped as the reference's, and load and save unchanged."""
    expected = reference.MixtureOfAttention(**case.arguments())
    layer = subject.build(case)
    found = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    wanted = {name: tuple(p.shape) for name, p in expected.named_parameters()}
    assert found == wanted, f"differs in {sorted(set(found.items()) ^ set(wanted.items()))}"
    layer.load_state_dict({n: t.to(subject.device) for n, t in expected.state_dict().items()}, strict=False)
    saved = layer.state_dict()
    for name, t in expected.state_dict().items():
        assert torch.equal(saved[name].cpu(), t), f"{name} was saved otherwise than loaded"


@checked_on(cases(prenorm=EITHER), needs=("device", "dtype"))
def device_and_dtype_at_construction(subject: Subject, case: LayerCase) -> None:
    """Parameters stand on the device and in the dtype that the constructor was told."""
    layer = subject.construct(case, device=subject.device, dtype=torch.bfloat16)
    for name, p in layer.named_parameters():
        assert p.dtype == torch.bfloat16, f"{name} is {p.dtype}"
        assert p.device.type == torch.device(subject.device).type, f"{name} is on {p.device}"


@checked_on(windows(None, "multiple", experts=(1, 2), prenorm=EITHER), needs=("mask",))
def inputs_are_left_alone(subject: Subject, case: LayerCase) -> None:
    """A call writes neither to x nor to the mask."""
    inputs = subject.move(case.inputs())
    inputs["mask"] = torch.ones(case.batch, case.n, dtype=torch.bool, device=subject.device)
    inputs["mask"][:, case.n // 2 :] = False
    before = {name: t.clone() for name, t in inputs.items()}
    call(subject.build(case), **inputs)
    for name, t in before.items():
        assert torch.equal(inputs[name], t), f"{name} was overwritten"


@checked_on(
    st.one_of(windows(None, "multiple", batch=(0,), prenorm=EITHER), cases(n=0, batch=(1, 2), prenorm=EITHER)),
    needs=(),
)
def no_items_and_no_tokens_are_legal(subject: Subject, case: LayerCase) -> None:
    """A batch of no items, and items of no tokens, give an output of the same shape."""
    state, inputs = tensors(case)
    out = call(subject.build_any(case, state), **subject.move(inputs))
    assert out.shape == inputs["x"].shape, f"the output has shape {tuple(out.shape)}"
