"""Parts of `python -m optimized.train`: tokens, batches, rates, files and signals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from optimized.train import data, files, job, law, saved, tokens
from optimized.train.optimizer import LEAST, optimizer_of, rate_at
from optimized.train.ranks import Ranks
from optimized.train.stopping import Stopping
from tests.test_main import LINES
from tests.training import ALONE, SMALL, book_in, planned, run, trainer_of

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    return book_in(tmp_path_factory.mktemp("text"))


def test_bytes_that_are_no_text_are_replaced() -> None:
    write = tokens.Bytes().writer()
    assert [write(byte) for byte in "\u00fca".encode() + b"\xff!"] == ["", "\u00fc", "a", "\ufffd", "!"]
    assert job.continuation.printable("a\x1b[1m\n\tb") == "a\\x1b[1m\n\tb"


@pytest.mark.needs("tokenizers")
def test_pieces_of_a_tokenizer(book: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train([book], trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    path = tmp_path / "pieces.json"
    tokenizer.save(str(path))
    pieces = tokens.tokenizer_of(path)
    text = f"{LINES}\u00fc\u20ac"
    write = pieces.writer()
    assert "".join(write(int(token)) for token in pieces.encode(text.encode())) == text
    status, printed = run(book, *SMALL, "--tokenizer", str(path), "--out", str(tmp_path / "out"))
    assert status == 0, printed
    assert f"as {pieces.vocab_size} pieces" in printed
    report = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert report["bytes_per_token"] > 1.5
    assert saved.load(tmp_path / "out", ALONE.device)[1].vocab_size == pieces.vocab_size


def test_batches_depend_on_seed_and_step() -> None:
    text = torch.arange(1000)
    batches = data.Batches(text, context=9, batch=4, seed=1)
    assert batches.each == 110
    first = batches.at(0)
    rounds = torch.cat([batches.at(step) for step in range(55)])
    assert torch.equal(batches.at(0), first)
    assert torch.equal(rounds[:, 1:], rounds[:, :-1] + 1)
    for one in rounds[:110], rounds[110:]:
        assert one[:, 0].unique().numel() == 110
        assert (one[:, 0].sort().values.diff() == 9).all()
    assert not torch.equal(rounds[:110], rounds[110:])
    assert not torch.equal(data.Batches(text, 9, 4, seed=2).at(0), first)


def test_parts_of_a_text_are_apart() -> None:
    parts = data.split(torch.arange(100), 0.1, 5)
    assert torch.equal(torch.cat(parts), torch.arange(100))
    assert len(parts.validation) == 10
    unseen = data.windows(parts.validation, 5, 7)
    assert (unseen >= 90).all()
    assert unseen[0, 0] == 90
    assert unseen[-1, -1] == 99
    assert data.windows(torch.arange(6), 5, 3).tolist() == [list(range(6))] * 3


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(step, 11, 2, 4.0) for step in range(11)]
    assert rates[:3] == [2.0, 4.0, 4.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == 4.0 * LEAST


def test_matrices_decay_and_nothing_else(book: str) -> None:
    trainer = trainer_of(planned(book, *SMALL))
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decaying, rest = ({names[id(p)] for p in group["params"]} for group in trainer.optimizer.param_groups)
    assert decaying | rest == set(names.values())
    assert {name.rpartition(".")[2] for name in rest} == {"weight", "null_kv", "null_tokens", "routing_token"}
    assert all("norm" in name for name in rest if name.endswith("weight"))
    assert not [name for name in decaying if "norm" in name]
    assert optimizer_of(trainer.model, 1.0, 0.3).param_groups[0]["weight_decay"] == 0.3


def test_the_law_finds_a_look_at_the_next_token() -> None:
    """Only the last row before a cut can show it, and only where the next token is another."""
    tokens = torch.arange(32).view(2, 16)
    ahead = law.cuts(lambda t: t.roll(-1, 1).float()[..., None], tokens, 256, 4)
    assert [(cut.at, cut.logits, cut.changed) for cut in ahead] == [
        *((8, 16, changed) for changed in (2, 2, 0)),
        *((4, 8, changed) for changed in (2, 2, 0)),
    ]
    assert ahead[0].failure == "future of token 8 replaced by noise: 2 of 16 logits changed"
    honest = law.cuts(lambda t: t.cumsum(1).float()[..., None], tokens, 256, 4)
    assert not any(cut.changed or cut.failure for cut in honest)


def test_dropout_differs_by_step_and_process_and_is_in_training_alone(book: str) -> None:
    plan, seeds = planned(book, *SMALL, "--dropout", "0.5"), set()
    for ranks in (Ranks(0, 2, ALONE.device), Ranks(1, 2, ALONE.device)):
        trainer = trainer_of(plan, ranks)
        for _ in range(2):
            trainer.train_step()
            seeds.add(torch.initial_seed())
    assert len(seeds) == 4
    trainer = trainer_of(plan)
    first, again = (trainer.evaluate(1.0)["loss"] for _ in range(2))
    assert first == again
    trainer.train_step()
    assert trainer.called.training


def test_a_second_signal_ends_it_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell runs this in the background
    with Stopping() as stopping:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_half_a_file_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write(path, lambda file: file.write(b"whole"))

    def half(file: Any) -> None:
        file.write(b"ha")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        files.write(path, half)
    assert path.read_bytes() == b"whole"
