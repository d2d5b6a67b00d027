"""`python -m optimized.train`: it trains, goes on where it was stopped or killed, and is the same on two processes."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import check_identical
from programs.ranks import Ranks as Processes
from programs.ranks import two_ranks
from torch import Tensor

from optimized.train import checkpoints, law, saved
from optimized.train.keeping import Keeper
from optimized.train.ranks import Ranks
from optimized.train.trainer import Trainer, Way
from optimized.transformer import Decoder
from tests.training import ALONE, SMALL, book_in, planned, run, trainer_of

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    return book_in(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trained(book: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """Folder, exit status, what was printed."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, *run(book, "--out", str(folder), *SMALL, "--dropout", "0.1", "--accumulate", "2")


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


def test_a_full_disk_ends_it(book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(where: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, printed = run(book, *SMALL, "--out", str(tmp_path), "--steps", "1")
    assert status == 1
    assert "No space left on device: step 1 is not kept" in printed


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
