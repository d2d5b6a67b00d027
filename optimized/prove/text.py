"""A text as a sequence of vectors, without a trained model: what `python -m optimized` runs on."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

TOKEN = re.compile(r"\w+(?:['\u2019]\w+)*|([^\w\s])\1*")
MIN_TOKENS = 256  # of a text; fewer show little
MAX_GRAM = 4
BUCKETS = 2**14  # few n-grams share one; those that do make two words a little more alike
POSITION = 0.5  # size of the position signal; that of a word is 1, so that what a word says outweighs where it stands


@dataclass(frozen=True)
class Text:
    """tokens: words, and runs of one punctuation mark. spaced[i]: white space stood before token i. total: tokens of
    the whole text, of which these are the first.
    """

    name: str
    tokens: list[str]
    spaced: list[bool]
    total: int


def read(path: Path | None, limit: int) -> Text:
    """The first `limit` tokens of a UTF-8 file, by default of the reference manual that comes with Python.

    Raises OSError or UnicodeDecodeError for the file, ImportError if this Python comes without the manual.
    """
    if path is not None:
        return tokenize(str(path), path.read_text(encoding="utf-8"), limit)
    from pydoc_data.topics import topics

    return tokenize(
        "Python language reference (pydoc_data.topics)", "\n".join(topics[t] for t in sorted(topics)), limit
    )


def tokenize(name: str, text: str, limit: int) -> Text:
    found = list(TOKEN.finditer(text))
    ends = [0, *(match.end() for match in found)]
    kept = found[:limit]
    return Text(name, [m[0] for m in kept], [m.start() > end for m, end in zip(kept, ends)], len(found))


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
