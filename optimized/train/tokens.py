"""Text as numbers and back: bytes, or the pieces of a tokenizer's file."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Integer
from torch import Tensor

FILE = "tokenizer.json"  # beside a trained model
CHUNK = 2**16  # characters, about, that a tokenizer is given at once


class Tokenizer(Protocol):
    vocab_size: int
    name: str

    def encode(self, data: bytes) -> Integer[Tensor, " N"]:
        """Numbers of a UTF-8 text."""

    def writer(self) -> Callable[[int], str]:
        """Takes numbers one by one, and returns the text that is whole with each; U+FFFD for what is no UTF-8."""


class Bytes:
    """A byte is a token."""

    vocab_size = 256
    name = "bytes"

    def encode(self, data: bytes) -> Integer[Tensor, " N"]:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

    def writer(self) -> Callable[[int], str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(bytes([token]))


class Pieces:
    """Of a file in the format of the library `tokenizers`. A text is cut at ends of lines, into chunks."""

    def __init__(self, path: Path) -> None:
        """Raises ImportError without the library, ValueError for what is no such file."""
        from tokenizers import Tokenizer as Read

        try:
            self.inner = Read.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"expected a file of the library tokenizers, got {path}: {error}") from None
        self.vocab_size = self.inner.get_vocab_size()
        self.name = f"{self.vocab_size} pieces"

    def encode(self, data: bytes) -> Integer[Tensor, " N"]:
        chunks, size = [""], 0
        for line in data.decode().splitlines(keepends=True):
            if size > CHUNK:
                chunks.append("")
                size = 0
            chunks[-1] += line
            size += len(line)
        found = self.inner.encode_batch(chunks, add_special_tokens=False)
        return torch.cat([torch.tensor(one.ids, dtype=torch.int32) for one in found])

    def writer(self) -> Callable[[int], str]:
        seen: list[int] = []
        written = ""

        def write(token: int) -> str:
            nonlocal written
            seen.append(token)
            text = self.inner.decode(seen, skip_special_tokens=False)
            if text.endswith("\ufffd"):  # perhaps the first bytes of a character
                return ""
            new, written = text[len(written) :], text
            return new

        return write


def tokenizer_of(path: Path | None) -> Tokenizer:
    """None: bytes. Raises ImportError, OSError or ValueError."""
    if path is None:
        return Bytes()
    with path.open("rb"):  # says what is wrong with a path better than the library
        pass
    return Pieces(path)
