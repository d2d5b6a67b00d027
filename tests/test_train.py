"""`python -m optimized.train`: it trains, goes on where it was stopped or killed, refuses, checks and generates."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import check_identical
from programs.ranks import Ranks as Processes
from programs.ranks import two_ranks
from torch import Tensor

from optimized.train import checkpoints, data, files, job, law, saved, tokens
from optimized.train.arguments import parse
from optimized.train.keeping import Keeper
from optimized.train.optimizer import LEAST, optimizer_of, rate_at
from optimized.train.plan import Plan, plan_of
from optimized.train.ranks import Ranks
from optimized.train.stopping import Stopping
from optimized.train.trainer import Trainer, Way
from optimized.transformer import Decoder
from tests.test_main import LINES

pytestmark = pytest.mark.cpu

SIZES = "--depth 2 --dim 16 --dim-head 8 --window 8 --experts 2 --queries 2 --memory 8"
STEPS = "--context 32 --batch 4 --steps 12 --rate 0.02 --log-every 5 --evaluate-every 6 --evaluate-tokens 128"
SMALL = f"{SIZES} {STEPS} --device cpu --no-color".split()
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"Chapter {i}. {LINES}" for i in range(12)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def trained(book: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """Folder, exit status, what was printed."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, *run(book, "--out", str(folder), *SMALL, "--dropout", "0.1", "--accumulate", "2")


def run(*argv: str) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = job.main(argv)
    return status, printed.getvalue()


def planned(*argv: str) -> Plan:
    return plan_of(*parse(argv))


def trainer_of(plan: Plan, ranks: Ranks = ALONE, way: Way | None = None) -> Trainer:
    return Trainer(plan.settings, plan.split, ranks, way or plan.way)


def curve_of(folder: Path) -> dict[str, Any]:
    """Without times."""
    report = json.loads((folder / "curve.json").read_text())
    for noted in (*report["training"], *report["validation"]):
        noted.pop("seconds")
        noted.pop("tokens_per_second", None)
    return {name: report[name] for name in ("settings", "training", "validation")}


def test_the_loss_falls_and_the_past_stands_still(trained: tuple[Path, int, str]) -> None:
    folder, status, printed = trained
    assert status == 0, printed
    assert printed.count("identical") == 6
    assert "6 futures replaced and the past unmoved" in printed
    curve = curve_of(folder)
    assert [n["step"] for n in curve["training"]] == [5, 6, 10, 12]
    assert [n["step"] for n in curve["validation"]] == [0, 6, 12]
    assert curve["validation"][0]["loss"] > curve["validation"][1]["loss"] > curve["validation"][2]["loss"]
    assert f"validation loss from {curve['validation'][0]['loss']:.4f} to" in printed
    for noted in curve["training"]:
        assert [round(sum(layer), 3) for layer in noted["loads"]] == [1, 1]
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert not [path for path in folder.iterdir() if path.suffix == ".partial"]


def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of the step that comes after this one."""
    train_step = Trainer.train_step

    def interrupted(trainer: Trainer) -> None:
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        train_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", interrupted)


def test_resumed_is_uninterrupted(
    trained: tuple[Path, int, str], book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, from between two notes, with dropout."""
    argv = book, "--out", str(tmp_path), *SMALL, "--dropout", "0.1", "--accumulate", "2"
    with monkeypatch.context() as patch:
        interrupted_at(6, patch)
        status, printed = run(*argv)
    assert (status, "Stopped at step 7 of 12" in printed) == (130, True), printed
    status, printed = run(*argv)
    assert (status, "Goes on at step 7 of 12" in printed) == (0, True), printed
    assert curve_of(tmp_path) == curve_of(trained[0])
    whole, resumed = (torch.load(folder / "checkpoint.pt") for folder in (trained[0], tmp_path))
    assert whole["model"].keys() == resumed["model"].keys()
    for name, value in whole["model"].items():
        check_identical(resumed["model"][name], value, name)
        for kind, moment in whole["optimizer"]["state"][name].items():
            check_identical(resumed["optimizer"]["state"][name][kind], moment, f"{name} {kind}")


def killed(call: Any, at: int) -> bool:
    """Whether a process that does this is killed before it waits for the disk for the at-th time."""
    child = os.fork()
    if child == 0:
        fsync, waited = os.fsync, 0

        def count(where: int) -> None:
            nonlocal waited
            waited += 1
            if waited == at:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(where)

        os.fsync = count  # type: ignore[assignment]
        call()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_at_any_moment_it_goes_on(book: str, tmp_path: Path) -> None:
    """At each of the moments of writing: the checkpoint is the one before or the new one, and a model is there."""
    plan = planned(book, "--out", str(tmp_path), *SMALL)
    trainer = trainer_of(plan)
    keeper = Keeper(tmp_path, plan, trainer)
    keeper.keep()
    trainer.train_step()
    found, at = [], 1
    while killed(keeper.keep, at):
        state = checkpoints.read(tmp_path, plan.settings)
        assert state is not None
        found.append(state["progress"]["step"])
        saved.load(tmp_path, ALONE.device)
        json.loads((tmp_path / "curve.json").read_text())
        at += 1
    assert found[0] == 0
    assert found == sorted(found)
    assert at > 8  # four files, and the folder after each
    state = checkpoints.read(tmp_path, plan.settings)
    assert state is not None
    assert state["progress"]["step"] == 1


def test_half_a_file_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write(path, lambda file: file.write(b"whole"))

    def half(file: Any) -> None:
        file.write(b"ha")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        files.write(path, half)
    assert path.read_bytes() == b"whole"


def whole_state(trainer: Trainer, folder: Path) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    return checkpoints.save(folder, trainer)


def spread(rank: int, argv: tuple[str, ...], folder: Path) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Losses of two steps of two processes, of either style, and the parameters after. Each leaves a checkpoint."""
    plan, losses, states = planned(*argv), [], []
    for style in ("ddp", "fsdp"):
        trainer = trainer_of(plan, Ranks(rank, 2, ALONE.device), Way(style, accumulate=2))
        for _ in range(2):
            trainer.train_step()
        losses.append(trainer.progress()["total"])
        losses.append(trainer.evaluate(1.0)["loss"])
        assert all(not cut.failure for cut in law.cuts(trainer.logits, trainer.sequences(), 256, 8))
        states.append(whole_state(trainer, folder / style))
    return losses, states


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with two_ranks() as pair:
        yield pair


def test_two_processes_are_one(book: str, tmp_path: Path, processes: Processes) -> None:
    """To rounding: losses, parameters by the way that they went; and one process goes on from either's checkpoint."""
    argv = (book, *SMALL)
    found = processes.run(spread, argv, tmp_path)
    plan = planned(*argv)
    trainer = trainer_of(plan)
    first = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for _ in range(2):
        trainer.train_step()
    losses = [trainer.progress()["total"], trainer.evaluate(1.0)["loss"]]
    for of_rank, _ in found:
        torch.testing.assert_close(torch.tensor(of_rank), torch.tensor(2 * losses), rtol=1e-5, atol=0)
    went = torch.cat([(p - first[name]).flatten() for name, p in trainer.model.named_parameters()])
    for state in found[0][1]:
        off = torch.cat([(state[name] - p).flatten() for name, p in trainer.model.named_parameters()])
        assert off.norm() <= 1e-3 * went.norm()
    trainer.train_step()
    for style in ("ddp", "fsdp"):
        state = checkpoints.read(tmp_path / style, plan.settings)
        assert state is not None
        resumed = trainer_of(plan)
        checkpoints.load(state, resumed)
        resumed.train_step()
        totals = torch.tensor([resumed.progress()["total"], trainer.progress()["total"]])
        torch.testing.assert_close(totals[0], totals[1], rtol=1e-5, atol=0)


def test_ways_of_one_loss(book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, computed again in the backward, and in parts: the losses of two steps."""
    monkeypatch.setattr(Decoder, "compile", functools.partialmethod(Decoder.compile, backend="eager", fullgraph=True))
    plan, totals = planned(book, *SMALL), []
    for way in (Way(), Way(checkpointing=True), Way(compiled=True), Way(accumulate=4)):
        trainer = trainer_of(plan, way=way)
        for _ in range(2):
            trainer.train_step()
        totals.append(trainer.progress()["total"])
    assert totals[1:3] == totals[:1] * 2
    torch.testing.assert_close(torch.tensor(totals[3]), torch.tensor(totals[0]), rtol=1e-5, atol=0)


def test_half_precision_and_determinism(book: str) -> None:
    few = "--steps", "4", "--depth", "3"
    status, printed = run(
        book, *SMALL, *few, "--dtype", "bfloat16", "--deterministic", "--layers", "mixture,local,dense"
    )
    assert status == 0, printed
    assert "1 mixture, 1 local, 1 dense layers" in printed
    assert "Nothing is kept without --out" in printed
    assert not torch.are_deterministic_algorithms_enabled()


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
    ("--tokenizer {folder}/config.json", "--tokenizer: expected a file of the library tokenizers"),
]


@pytest.mark.parametrize(("options", "said"), BAD, ids=[options for options, _ in BAD])
def test_wrong_usage(
    options: str, said: str, book: str, trained: tuple[Path, int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [word.format(folder=trained[0]) for word in options.split()]
    with pytest.raises(SystemExit, match="2"):
        job.main([book, *SMALL, "--dropout", "0.1", *argv])
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
    argv: list[str], said: str, trained: tuple[Path, int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        job.main(["--out", str(trained[0]), *argv])
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


def test_a_full_disk_ends_it(book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(where: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, printed = run(book, *SMALL, "--out", str(tmp_path), "--steps", "1")
    assert status == 1
    assert "No space left on device: step 1 is not kept" in printed


def test_text_of_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b").mkdir()
    for name, held in (("b/2.txt", "two"), ("1.txt", "\u00fcne"), (".hidden", "no")):
        (tmp_path / name).write_text(held, encoding="utf-8")
    assert job.text.read([tmp_path], False).data.decode() == "\u00fcne\ntwo"
    (tmp_path / "b" / "3.bin").write_bytes(b"ab\xff")
    with pytest.raises(SystemExit, match="2"):
        job.main([str(tmp_path), *SMALL])
    assert f"TEXT: expected UTF-8, got {tmp_path}/b/3.bin: byte 2 is 0xff" in " ".join(capsys.readouterr().err.split())


def test_it_generates(trained: tuple[Path, int, str]) -> None:
    argv = "--out", str(trained[0]), "--generate", "9", "--prompt", "It is", "--device", "cpu", "--no-color"
    status, printed = run(*argv, "--temperature", "0")
    assert status == 0
    text, _, figures = printed.rpartition("\n\n")
    assert text.startswith("It is")
    assert figures.startswith("9 tokens, ")
    assert run(*argv, "--seed", "1")[1].rpartition("\n\n")[0] == run(*argv, "--seed", "1")[1].rpartition("\n\n")[0]
    model, tokenizer = saved.load(trained[0], ALONE.device)
    given, expected = tokenizer.encode(b"It is").long()[None], bytearray()
    for _ in range(9):
        given = torch.cat((given, model(given)[:, -1:].argmax(-1)), 1)
        expected.append(int(given[0, -1]))
    assert text == "It is" + job.continuation.printable(expected.decode(errors="replace"))


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


def test_a_model_that_looks_ahead_fails(
    trained: tuple[Path, int, str], book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = book, "--out", str(trained[0]), "--check", "--device", "cpu", "--context", "33"
    assert run(*argv)[0] == 0
    monkeypatch.setattr(saved, "Decoder", LooksAhead)
    status, printed = run(*argv)
    assert status == 1
    assert "future of token 16 replaced by noise" in printed


def test_a_loss_that_does_not_fall_fails(book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Trainer.evaluate

    def rising(trainer: Trainer, bytes_per_token: float) -> dict[str, Any]:
        found = evaluate(trainer, bytes_per_token)
        found["loss"] = 1.0 + trainer.step
        return found

    monkeypatch.setattr(Trainer, "evaluate", rising)
    status, printed = run(book, *SMALL, "--steps", "2")
    assert status == 1
    assert "the validation loss did not fall: 1.0000 nats at first, 3.0000 at last" in printed


def test_a_loss_that_is_no_number_ends_it(book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose checkpoint is the last one before."""
    losses = Trainer._losses

    def broken(trainer: Trainer, rows: Tensor, watch: bool = False) -> Any:
        found, loads = losses(trainer, rows, watch)
        return found * (float("nan") if trainer.step >= 2 and trainer.called.training else 1), loads

    monkeypatch.setattr(Trainer, "_losses", broken)
    status, printed = run(book, *SMALL, "--out", str(tmp_path), "--checkpoint-every", "1")
    assert status == 1
    assert "the loss is nan at step 3: try a lower --rate" in printed
    assert torch.load(tmp_path / "checkpoint.pt")["progress"]["step"] == 2


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


def test_a_second_signal_ends_it_at_once() -> None:
    with Stopping() as stopping:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_help_is_readable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        job.main(["--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "python -m optimized.train --out FOLDER --generate N" in printed
