"""What a token gets depends on it and on tokens before it. Autograd does not see a leak through a selection: the tokens
after a cut are changed, and what comes before it must stay as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.conformance.causal.case import CausalCase
from tests.conformance.causal.data import cases, noise, planted
from tests.conformance.causal.subject import CausalSubject, checked_on
from tests.conformance.data import EITHER
from tests.conformance.subject import assert_unchanged, call
from tests.strategies import cotangent

CUT = cases(cut=True, remember_all=EITHER, experts=(1, 2), prenorm=EITHER)


def finite_tails(case: CausalCase, x: Tensor) -> dict[str, Tensor]:
    """Other tokens from the cut on, by what they are."""
    rest = x[:, case.cut :]
    return {
        "noise": noise(case, tuple(rest.shape)).to(x),
        "reversed": rest.flip(1) if rest.shape[1] > 1 else -rest,
        "the first token repeated": x[:, :1].expand_as(rest),
        "large": 1e4 * noise(case, tuple(rest.shape), 2).to(x),
    }


def assert_the_past_stays(
    run: Callable[[Tensor], Tensor], case: CausalCase, x: Tensor, tails: dict[str, Tensor]
) -> None:
    """run(x) before the cut, bit for bit; of a layer whose calls differ by themselves, to rounding."""
    cut = case.cut
    before, again = run(x)[:, :cut], run(x)[:, :cut]
    for name, tail in tails.items():
        after = run(torch.cat((x[:, :cut], tail), 1))[:, :cut]
        if torch.equal(before, again):
            wrong = (after != before).any(-1)[0].nonzero().flatten().tolist()
            change = (after - before).abs().max().item()
            assert not wrong, f"tokens from {cut} on changed ({name}): token {wrong[0]} changed by {change:.3g}"
        else:
            assert_unchanged(after, before, f"tokens from {cut} on changed ({name}): those before")


@checked_on(CUT)
def no_token_sees_a_later_one(subject: CausalSubject, case: CausalCase) -> None:
    """Tokens from a cut on replaced by noise, reversed, repeated, large: outputs before it stay, bit for bit."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    x = subject.move(inputs)["x"]
    assert_the_past_stays(lambda t: call(layer, t), case, x, finite_tails(case, x))


@checked_on(CUT, "non_finite")
def no_token_sees_a_later_one_that_is_not_finite(subject: CausalSubject, case: CausalCase) -> None:
    """The same, with NaN and infinity."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    x = subject.move(inputs)["x"]
    tails = {str(v): torch.full_like(x[:, case.cut :], v) for v in (math.nan, math.inf)}
    assert_the_past_stays(lambda t: call(layer, t), case, x, tails)


@checked_on(CUT)
def gradients_of_the_past_take_no_later_token(subject: CausalSubject, case: CausalCase) -> None:
    """Of a loss on tokens before a cut: none of tokens after it, and the others, and those of parameters, do not depend
    on these."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    x = subject.move(inputs)["x"]
    g = cotangent(tuple(x.shape), "dense", case.seed).to(x)[:, : case.cut]
    named = dict(layer.named_parameters())
    runs = []
    for tail in (x[:, case.cut :], finite_tails(case, x)["noise"]):
        leaf = torch.cat((x[:, : case.cut], tail), 1).requires_grad_()
        found = torch.autograd.grad(call(layer, leaf)[:, : case.cut], [leaf, *named.values()], g, allow_unused=True)
        runs.append(dict(zip(("x", *named), found)))
    of_later = runs[0]["x"][:, case.cut :]
    assert not of_later.any(), f"a loss on the {case.cut} first tokens has a gradient of a later one"
    for name, before in runs[0].items():
        after = runs[1][name]
        assert (before is None) == (after is None), f"the gradient of {name}: there is one now and then"
        if before is not None:
            what = f"tokens from {case.cut} on changed (noise): the gradient of {name}, of a loss on those before,"
            assert_unchanged(after, before, what)


@checked_on(CUT)
def a_prefix_has_the_output_of_the_whole(subject: CausalSubject, case: CausalCase) -> None:
    """The first tokens alone have the outputs that they have at the start of a longer sequence, but for rounding."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    x = subject.move(inputs)["x"]
    whole, part = call(layer, x), call(layer, x[:, : case.cut])
    assert_unchanged(part, whole[:, : case.cut], f"the first {case.cut} of {case.n} tokens alone: the output")
