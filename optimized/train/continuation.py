"""`--generate N --prompt TEXT`: what a trained model writes, as it writes it."""

from __future__ import annotations

import time

import torch
from jaxtyping import Int64
from rich.console import Console
from torch import Tensor

from optimized.prove.text import visible
from optimized.train.tokens import Tokenizer
from optimized.transformer import Decoder, stream


def prompt_of(prompt: str, tokenizer: Tokenizer) -> Int64[Tensor, "1 N"]:
    """ValueError for one without tokens."""
    tokens = tokenizer.encode(prompt.encode(errors="surrogateescape")).long()[None]
    if not tokens.shape[1]:
        raise ValueError(f"expected a text of one token at least, got {prompt!r}")
    return tokens


def run(
    console: Console,
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: Int64[Tensor, "1 N"],
    count: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    """Prints the prompt, whose tokens are given, and a continuation."""
    device = tokens.device
    generator = torch.Generator(device).manual_seed(seed)
    console.print(printable(prompt), style="bold", end="", markup=False, soft_wrap=True)
    write, begun, made = tokenizer.writer(), time.perf_counter(), 0
    for token in stream(model, tokens, count, temperature=temperature, top_p=top_p, generator=generator):
        console.print(printable(write(int(token))), end="", markup=False, soft_wrap=True)
        made += 1
    seconds = time.perf_counter() - begun
    console.print(f"\n\n{made} tokens, {made / seconds:.0f} a second", style="dim")


def printable(text: str) -> str:
    """Nothing that steers a terminal but ends of lines and tabs."""
    return "".join(c if c in "\n\t" else visible(c) for c in text)
