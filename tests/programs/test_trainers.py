"""Lightning and accelerate: loops that others wrote, around the layer."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from harness import check
from programs.layers import (
    OPTIONS,
    PACKAGES,
    Option,
    assert_all_agree,
    call_of,
    gradients_of,
    layer_of,
    loss_of,
    zero_if_none,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytestmark = pytest.mark.cpu

STEPS, RATE = 3, 0.05
OPTION = OPTIONS["local mask"]


def batches(dtype: torch.dtype, option: Option = OPTION) -> list[dict[str, Tensor]]:
    """As lengths come: more than K, fewer, more."""
    return [call_of(option, (12, 4, 17)[seed], seed, dtype=dtype) for seed in range(STEPS)]


def loader(dtype: torch.dtype) -> DataLoader:
    """Batches that are made already."""
    return DataLoader(batches(dtype), batch_size=None)


def by_hand(package: str, dtype: torch.dtype, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Parameters after a step of gradient descent for each batch."""
    layer = layer_of(package, dtype=dtype, **OPTION.arguments)
    optimizer = torch.optim.SGD(layer.parameters(), lr=RATE)
    for batch in batches(dtype):
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = loss_of(layer(**batch))
        loss.backward()
        optimizer.step()
    return {name: p.detach() for name, p in layer.named_parameters()}


@PACKAGES
@pytest.mark.needs("lightning")
def test_lightning_in_mixed_precision(package: str, tmp_path: Path) -> None:
    """Bit for bit a loop under autocast; and as exact as the reference is there."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer_of(package, dtype=torch.float32, **OPTION.arguments)
            self.dtypes: list[torch.dtype] = []

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            out = self.layer(**batch)
            self.dtypes.append(out.dtype)
            return loss_of(out)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=RATE)

    module = Module()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, precision="bf16-mixed", max_epochs=1, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(module, loader(torch.float32))
    assert module.dtypes == [torch.float32] * STEPS
    start = dict(layer_of(package, dtype=torch.float32, **OPTION.arguments).named_parameters())
    loop = by_hand(package, torch.float32, torch.bfloat16)
    exact = by_hand("reference", torch.float64)
    baseline = by_hand("reference", torch.float32, torch.bfloat16)
    for name, p in module.layer.named_parameters():
        assert torch.equal(p.detach(), loop[name]), name
        # What was learned.
        learned = [t - start[name].detach().to(t.dtype) for t in (p.detach(), exact[name], baseline[name])]
        check(*learned, stage="mixture_gradient", name=name, precision=torch.bfloat16)


def accelerated(package: str, accumulate: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The prepared layer and its parameters after as many steps as batches allow."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    layer = layer_of(package, **OPTION.arguments)
    optimizer = torch.optim.SGD(layer.parameters(), lr=RATE)
    layer, optimizer, data = accelerator.prepare(layer, optimizer, loader(torch.float64))
    for batch in data:
        with accelerator.accumulate(layer):
            accelerator.backward(loss_of(layer(**batch)))
            optimizer.step()
            optimizer.zero_grad()
    plain = accelerator.unwrap_model(layer)
    return plain, {name: p.detach() for name, p in plain.named_parameters()}


@PACKAGES
@pytest.mark.needs("accelerate")
def test_accelerate(package: str) -> None:
    _, found = accelerated(package, 1)
    assert_all_agree(found, by_hand(package, torch.float64))


@PACKAGES
@pytest.mark.needs("accelerate")
def test_accelerate_accumulates(package: str) -> None:
    """One step, on the mean of all batches' gradients."""
    _, found = accelerated(package, STEPS)
    layer = layer_of(package, **OPTION.arguments)
    grads = [gradients_of(layer, batch) for batch in batches(torch.float64)]
    expected = {name: p.detach() - RATE * sum(g[name] for g in grads) / STEPS for name, p in layer.named_parameters()}
    assert_all_agree(found, expected)
    assert all(zero_if_none(p).shape == p.shape for p in layer.parameters())
