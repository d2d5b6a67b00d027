"""A text as a sequence of vectors, without a trained model: what `python -m optimized` runs on."""

from __future__ import annotations

import io
import re
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

TOKEN = re.compile(r"\w+(?:['\u2019]\w+)*|([^\w\s])\1*")
MIN_TOKENS = 256  # of a text; fewer show little
MAX_GRAM = 4
BUCKETS = 2**14  # few n-grams share one; those that do make two words a little more alike
POSITION = 0.5  # size of the position signal; that of a word is 1, so that what a word says outweighs where it stands
BLOCK = 2**13  # characters read at a time
MAX_TOKEN = 2**10  # characters of a token: longer ones, which no word is, go on as the next


@dataclass(frozen=True)
class Text:
    """tokens: words, and runs of one punctuation mark, of visible characters. spaced[i]: white space stood before
    token i. more: the text goes on after these.
    """

    name: str
    tokens: list[str]
    spaced: list[bool]
    more: bool


def read(path: Path | None, limit: int) -> Text:
    """The first `limit` tokens of a UTF-8 file, by default of the reference manual that comes with Python.

    Of a file no more is read than they take. Raises OSError or UnicodeDecodeError for the file, ImportError if this
    Python comes without the manual.
    """
    if path is not None:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("not a regular file")  # a pipe may never end, nor begin
        with path.open(encoding="utf-8") as file:
            return tokenize(visible(str(path)), file, limit)
    from pydoc_data.topics import topics

    text = io.StringIO("\n".join(topics[t] for t in sorted(topics)))
    return tokenize("Python language reference (pydoc_data.topics)", text, limit)


def tokenize(name: str, file: TextIO, limit: int) -> Text:
    """The first `limit` tokens of what `file` holds. Keeps no more of it than a block and a token."""
    tokens: list[str] = []
    spaced: list[bool] = []
    rest, space, ended = "", False, False
    while not ended:
        block = file.read(BLOCK)
        ended = not block
        rest += block
        at = 0
        while match := TOKEN.search(rest, at):
            # Two characters tell whether a word goes on: an apostrophe, and what follows it.
            if len(match[0]) < MAX_TOKEN and match.end() + 2 > len(rest) and not ended:
                break
            if len(tokens) == limit:
                return Text(name, tokens, spaced, more=True)
            tokens.append(visible(match[0][:MAX_TOKEN]))
            spaced.append(space or match.start() > at)
            at, space = min(match.end(), match.start() + MAX_TOKEN), False
        left = rest[at:].lstrip()
        space = space or len(left) < len(rest) - at
        rest = left
    return Text(name, tokens, spaced, more=False)


def visible(text: str) -> str:
    """Characters that would steer a terminal, or turn the reading direction, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def grams(word: str) -> list[str]:
    """Substrings of up to 4 characters of the word between boundary marks: alike words share most of theirs."""
    marked = f"\2{word}\3"
    return [marked[i : i + n] for n in range(1, MAX_GRAM + 1) for i in range(len(marked) - n + 1)]


def embed(tokens: list[str], dim: int, seed: int) -> Float[Tensor, "N D"]:
    """A float32 vector per token: the seeded vectors of its n-grams, summed and scaled to size 1 per channel, plus a
    sinusoidal position signal, so that no two tokens are equal. The same on every machine.
    """
    words = {word: i for i, word in enumerate(dict.fromkeys(tokens))}
    hashed = [[zlib.crc32(gram.encode()) % BUCKETS for gram in grams(word)] for word in words]
    table = torch.randn(BUCKETS, dim, generator=torch.Generator().manual_seed(seed))
    offsets = torch.tensor([0, *map(len, hashed)]).cumsum(0)[:-1]
    summed = F.embedding_bag(torch.tensor([h for row in hashed for h in row]), table, offsets, mode="sum")
    meaning = F.normalize(summed, dim=-1) * dim**0.5
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(len(tokens), dtype=torch.float64), frequency)
    place = torch.cat((angle.sin(), angle.cos()), dim=-1)[:, :dim]
    return meaning[torch.tensor([words[token] for token in tokens])] + POSITION * place.float()


def typical(words: list[str], logits: Float[Tensor, " N"], count: int) -> list[str]:
    """The distinct words (no punctuation) with the highest logits."""
    ranked = (words[i] for i in logits.argsort(descending=True).tolist())
    return list(dict.fromkeys(word for word in ranked if word[0].isalnum()))[:count]
