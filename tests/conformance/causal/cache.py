"""A cache holds what a layer needs of the past to go on, in the layer's own form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.conformance.causal.case import CausalCase
from tests.conformance.causal.data import cases, noise, planted
from tests.conformance.causal.masks import spread
from tests.conformance.causal.subject import CausalSubject, checked_on
from tests.conformance.data import EITHER
from tests.conformance.subject import assert_unchanged, call

CHOICE = {"everybody": EITHER, "remember_all": EITHER, "experts": (1, 2), "prenorm": EITHER}


def go_on(layer: nn.Module, x: Tensor, cache: Any = None, **given: Any) -> tuple[Tensor, Any]:
    """Output and cache."""
    found = call(layer, x, **given, **({} if cache is None else {"cache": cache}), use_cache=True)
    pair = isinstance(found, tuple) and len(found) == 2
    assert pair, "use_cache=True: forward does not return (out, cache)"
    return found


@checked_on(cases(batch=(1, 2), pieces=True, rotary=EITHER, **CHOICE), "cache")
def decoding_in_any_pieces_is_the_whole(subject: CausalSubject, case: CausalCase) -> None:
    """A sequence passed in pieces of any lengths, with the cache of the piece before, has the outputs of the whole."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    given = subject.move(inputs)
    x = given.pop("x")
    outs, cache, at = [], None, 0
    for length in case.pieces:
        out, cache = go_on(layer, x[:, at : at + length], cache, **given)
        outs.append(out)
        at += length
    lengths = " + ".join(map(str, case.pieces))
    assert_unchanged(torch.cat(outs, 1), call(layer, x, **given), f"in pieces of {lengths} tokens: the output")


@checked_on(cases(**CHOICE), "cache")
def a_cache_is_a_value(subject: CausalSubject, case: CausalCase) -> None:
    """Going on from it does not change it: the same tokens have the same outputs again, after others too."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    x = subject.move(inputs)["x"]
    at = 1 + case.seed % (case.n - 1)
    cache = go_on(layer, x[:, :at])[1]
    first = go_on(layer, x[:, at:].clone(), cache)[0].detach().clone()
    go_on(layer, noise(case, (1, case.block + 1, case.dim)).to(x), cache)
    again = go_on(layer, x[:, at:].clone(), cache)[0]
    assert torch.equal(again, first), f"after {at} tokens: going on again from the same cache differs"


@checked_on(cases(batch=(2, 3), **CHOICE), "cache", "select")
def a_cache_can_be_reordered(subject: CausalSubject, case: CausalCase) -> None:
    """cache.select(index): items of the batch repeated and left out go on as themselves."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    x = subject.move(inputs)["x"]
    at = 1 + case.seed % (case.n - 1)
    index = torch.tensor([case.batch - 1, 0, case.batch - 1], device=x.device)
    taken = go_on(layer, x[:, :at])[1].select(index)
    found = go_on(layer, x[index][:, at:], taken)[0]
    assert_unchanged(found, call(layer, x[index])[:, at:], f"items {index.tolist()} after {at} tokens: the output")


@checked_on(cases(batch=(1, 2), **CHOICE), "cache", "crop")
def a_cache_can_be_cropped(subject: CausalSubject, case: CausalCase) -> None:
    """cache.crop(n): without the newest n tokens of the unfinished block it goes on as if they had never been there."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    x = subject.move(inputs)["x"]
    at = 1 + case.seed % case.n
    back = 1 + case.seed // 7 % ((at - 1) % case.block + 1)
    cropped = go_on(layer, x[:, :at])[1].crop(back)
    more = noise(case, (case.batch, case.block + 1, case.dim)).to(x)
    others = torch.cat((x[:, : at - back], more), 1)
    found = go_on(layer, others[:, at - back :], cropped)[0]
    what = f"{at} tokens without the newest {back}, and others: the output"
    assert_unchanged(found, call(layer, others)[:, at - back :], what)


@checked_on(cases(rotary=EITHER, **CHOICE), "cache", "mask")
def masked_tokens_do_not_advance_a_cache(subject: CausalSubject, case: CausalCase) -> None:
    """Passed in two pieces, masked tokens in both leave the outputs of the others as they are without them."""
    state, inputs = planted(case)
    layer = subject.build_any(case, state)
    longer, place = spread(case, inputs, min(1 + case.seed % 5, case.n))
    given = subject.move(longer)
    x, mask = given.pop("x"), given.pop("mask")
    at = 1 + case.seed // 3 % (x.shape[1] - 1)
    first, cache = go_on(layer, x[:, :at], mask=mask[:, :at], **given)
    second, _ = go_on(layer, x[:, at:], cache, mask=mask[:, at:], **given)
    found = torch.cat((first, second), 1)[:, place.to(x.device)]
    assert_unchanged(found, call(layer, **subject.move(inputs)), f"in two pieces, the first of {at}: the output")
