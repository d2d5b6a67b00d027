"""Tokens from a decoder, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from optimized.transformer.decoding import decoding
from optimized.transformer.models import Decoder
from optimized.transformer.stepping import obstacle_to_recording
from reference import contract
from reference.contract import TokenMask


def generate(
    model: Decoder,
    tokens: Int64[Tensor, "B N"],
    max_new_tokens: int,
    mask: TokenMask | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos: int | None = None,
    generator: torch.Generator | None = None,
    graph: bool | None = None,
) -> Int64[Tensor, "B M"]:
    """The tokens of `stream` side by side, M <= max_new_tokens of them, without the prompt."""
    found = stream(model, tokens, max_new_tokens, mask, temperature, top_p, eos, generator, graph)
    return torch.stack(list(found), 1)


def stream(
    model: Decoder,
    tokens: Int64[Tensor, "B N"],
    max_new_tokens: int,
    mask: TokenMask | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos: int | None = None,
    generator: torch.Generator | None = None,
    graph: bool | None = None,
) -> Iterator[Int64[Tensor, " B"]]:
    """The next token of every item, (B), at most max_new_tokens times.

    Args:
        model: a `Decoder` in evaluation mode.
        tokens: (B, N) prompts. mask: (B, N) or (1, N); False for padding, on the left, say. Every item has a token.
        temperature: of the logits; 0 takes the most likely token.
        top_p: sample among the fewest most likely tokens that have this much probability together.
        eos: the token that ends an item, which repeats it from then on; the end of all ends the iteration, and to know
            it the host waits for the device.
        generator: of random numbers, on the device of the tokens.
        graph: replay steps as CUDA graphs. None: where that can be done and is worth it; True: refused where it cannot
            be done; False: call them.
    Behind the prompt by `Decoder.step`, in place, where the model can (`obstacle_to_steps`), which stays as it is
    meanwhile; else from a cache that is a value.
    Raises TypeError or ValueError naming the argument, before the first token is asked for.
    """
    if not isinstance(model, Decoder):
        contract.reject("model", "a Decoder", type(model).__name__, TypeError)
    if model.training:
        contract.reject("model", "a model in evaluation mode (`model.eval()`)", "one in training mode")
    contract.tensor("tokens", tokens, "B", "N", dtypes=(torch.int64,))
    valid = contract.token_mask("mask", mask, tokens)
    if valid is not None and not bool(valid.any(1).all()):
        contract.reject("mask", "a valid token in every item", "an item without one")
    contract.positive_int("max_new_tokens", max_new_tokens)
    contract.number("temperature", temperature, "a finite number >= 0", lambda v: v >= 0)
    contract.number("top_p", top_p, "a number in (0, 1]", lambda v: 0 < v <= 1)
    if eos is not None:
        contract.integer("eos", eos, least=0)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            contract.reject("generator", "a torch.Generator", contract.describe(generator), TypeError)
        if generator.device.type != tokens.device.type:
            contract.reject("generator", f"a generator on {tokens.device}", f"one on {generator.device}")
    if graph is not None and contract.flag("graph", graph):
        obstacle = model.obstacle_to_steps() or obstacle_to_recording(model, tokens.device)
        if obstacle is not None:
            contract.reject("graph", "None or False, where steps cannot be recorded", f"True for {obstacle}")
    return _stream(model, tokens, max_new_tokens, valid, temperature, top_p, eos, generator, graph)


def _stream(
    model: Decoder,
    tokens: Tensor,
    most: int,
    mask: Tensor | None,
    temperature: float,
    top_p: float,
    eos: int | None,
    generator: torch.Generator | None,
    graph: bool | None,
) -> Iterator[Tensor]:
    token = tokens[:, -1]
    ended = torch.zeros_like(tokens[:, 0], dtype=torch.bool)
    for i in range(most):
        with torch.no_grad():  # not around a yield, where it would hold for the caller
            if i == 0:
                logits, cache = model(tokens, mask, use_cache=True, last=True)
                logits = logits[:, 0]
            else:
                if i == 1:  # the first token does not wait for what the others need
                    logits_after = decoding(model, cache, most - 1, graph)
                    del cache
                logits = logits_after(token)
            token = sample(logits, temperature, top_p, generator)
            if eos is not None:
                token = token.masked_fill(ended, eos)
                ended = ended | (token == eos)
        yield token
        if eos is not None and bool(ended.all()):
            return


def sample(
    logits: Float[Tensor, "B V"], temperature: float, top_p: float, generator: torch.Generator | None
) -> Int64[Tensor, " B"]:
    """A token of each row, by probabilities in at least float32."""
    if temperature == 0:
        return logits.argmax(-1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probabilities = ((wide - wide.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        best, at = probabilities.sort(dim=-1, descending=True, stable=True)
        before = best.cumsum(-1) - best
        best = best.masked_fill(before >= top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, at, best)
    return probabilities.multinomial(1, generator=generator)[:, 0]
