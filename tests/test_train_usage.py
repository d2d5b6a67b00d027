"""`python -m optimized.train`: what it refuses, and what it does with a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optimized.train import job, saved
from optimized.transformer import Decoder
from tests.training import ALONE, SMALL, book_in, run

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    return book_in(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trained(book: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(book, "--out", str(folder), *SMALL)[0] == 0
    return folder


BAD = [
    ("--dim-head 7", "model: dim_head: expected an even number"),
    ("--batch 3 --accumulate 2", "--batch: expected a multiple of 2"),
    ("--parallel ddp", "--parallel: expected several processes"),
    ("--warmup 13", "--warmup: expected at most the 12 --steps"),
    ("--context 4096", "TEXT: expected a text whose training part has more tokens than --context 4096"),
    ("--rate 0", "--rate: expected a number of more than 0"),
    ("--rate nan", "--rate: expected a number"),
    ("--layers dense,conv", "--layers: expected some of dense, local, mixture"),
    ("--experts 0", "--experts: expected an integer from 1"),
    ("--context 1", "--context: expected an integer from 2"),
    ("--prompt a", "--prompt: expected with --generate"),
    ("--generate 3", "--out: expected a folder with a trained model for --generate"),
    ("--check --seed 1", "--out: expected a folder with a trained model for --check"),
    ("--out {folder} --seed 3", "seed: 3, there 0"),
    ("--out {folder} --dim 24", "model.dim: 24, there 16"),
    ("--tokenizer {folder}/none.json", "--tokenizer: "),
]


@pytest.mark.parametrize(("options", "said"), BAD, ids=[options for options, _ in BAD])
def test_wrong_usage(options: str, said: str, book: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [word.format(folder=trained) for word in options.split()]
    with pytest.raises(SystemExit, match="2"):
        job.main([book, *SMALL, *argv])
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--generate", "3", "--steps", "5"], "--steps: expected without --generate, which trains nothing"),
        (["--generate", "3", "--check"], "--check: expected without --generate"),
        (["book", "--generate", "3"], "TEXT: expected none with --generate"),
        (["--generate", "3", "--prompt", ""], "--prompt: expected a text of one token at least"),
        (["--check", "--steps", "3"], "--steps: expected without --check"),
        (["--check", "nowhere.txt"], "TEXT: "),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_usage_of_a_trained_model(
    argv: list[str], said: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        job.main(["--out", str(trained), *argv])
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_is_no_checkpoint_and_no_model_is_refused(
    book: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    for argv, said in (
        ([book, *SMALL], "expected a checkpoint of a training, got"),
        (["--generate", "3"], "expected a folder with a trained model, got"),
    ):
        with pytest.raises(SystemExit, match="2"):
            job.main([*argv, "--out", str(tmp_path)])
        assert said in " ".join(capsys.readouterr().err.split())


def test_another_model_is_not_written_over(book: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        job.main([book, *SMALL, "--out", str(tmp_path)])
    assert "with config.json of another" in " ".join(capsys.readouterr().err.split())


def test_text_of_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b").mkdir()
    for name, held in (("b/2.txt", "two"), ("1.txt", "\u00fcne"), (".hidden", "no")):
        (tmp_path / name).write_text(held, encoding="utf-8")
    assert job.text.read([tmp_path], False).data.decode() == "\u00fcne\ntwo"
    (tmp_path / "b" / "3.bin").write_bytes(b"ab\xff")
    with pytest.raises(SystemExit, match="2"):
        job.main([str(tmp_path), *SMALL])
    assert f"TEXT: expected UTF-8, got {tmp_path}/b/3.bin: byte 2 is 0xff" in " ".join(capsys.readouterr().err.split())


def test_it_generates(trained: Path) -> None:
    argv = "--out", str(trained), "--generate", "9", "--prompt", "It is", "--device", "cpu", "--no-color"
    status, printed = run(*argv, "--temperature", "0")
    assert status == 0
    text, _, figures = printed.rpartition("\n\n")
    assert text.startswith("It is")
    assert figures.startswith("9 tokens, ")
    assert run(*argv, "--seed", "1")[1].rpartition("\n\n")[0] == run(*argv, "--seed", "1")[1].rpartition("\n\n")[0]
    model, tokenizer = saved.load(trained, ALONE.device)
    given, expected = tokenizer.encode(b"It is").long()[None], bytearray()
    for _ in range(9):
        given = torch.cat((given, model(given)[:, -1:].argmax(-1)), 1)
        expected.append(int(given[0, -1]))
    assert text == "It is" + job.continuation.printable(expected.decode(errors="replace"))


@pytest.mark.needs("tokenizers")
def test_what_is_no_tokenizer_is_refused(book: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        job.main([book, *SMALL, "--tokenizer", book])
    assert "--tokenizer: expected a file of the library tokenizers" in " ".join(capsys.readouterr().err.split())


def test_without_the_library_of_tokenizers(
    book: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SystemExit, match="2"):
        job.main([book, *SMALL, "--tokenizer", book])
    assert "--tokenizer: expected the library tokenizers to be installed" in capsys.readouterr().err


class LooksAhead(Decoder):
    """Adds a little of the last token."""

    def forward(self, given: Tensor, *args: Any, **named: Any) -> Any:
        return super().forward(given, *args, **named) + 1e-3 * given[:, -1:, None]


def test_a_model_that_looks_ahead_fails(trained: Path, book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = book, "--out", str(trained), "--check", "--device", "cpu", "--context", "33"
    assert run(*argv)[0] == 0
    monkeypatch.setattr(saved, "Decoder", LooksAhead)
    status, printed = run(*argv)
    assert status == 1
    assert "future of token 16 replaced by noise" in printed


def test_the_help_is_readable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        job.main(["--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "python -m optimized.train --out FOLDER --generate N" in printed
