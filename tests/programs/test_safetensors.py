"""The state dict as a file of safetensors, which holds no tensor twice and nothing that is not contiguous."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs.layers import OPTIONS, PACKAGES, call_of, layer_of

pytestmark = [pytest.mark.cpu, pytest.mark.needs("safetensors")]


@PACKAGES
@pytest.mark.parametrize("option", ["default", "local mask", "cross"])
def test_round_trip(package: str, option: str, tmp_path: Path) -> None:
    """Saved by one package, loaded by either: the same output bit for bit; names and shapes in the file's header."""
    from safetensors import safe_open
    from safetensors.torch import load_file, load_model, save_file, save_model

    of = OPTIONS[option]
    layer, call = layer_of(package, **of.arguments), call_of(of, 12)
    out = layer(**call)
    save_file(layer.state_dict(), tmp_path / "state.safetensors")
    save_model(layer, str(tmp_path / "model.safetensors"))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == {name: tuple(t.shape) for name, t in layer.state_dict().items()}
    for loaded_by in ("reference", "optimized"):
        by_state, by_model = (layer_of(loaded_by, seed=5, **of.arguments) for _ in range(2))
        by_state.load_state_dict(load_file(tmp_path / "state.safetensors"))
        load_model(by_model, str(tmp_path / "model.safetensors"))
        for again in (by_state, by_model):
            for name, t in layer.state_dict().items():
                assert torch.equal(again.state_dict()[name], t), name
            if loaded_by == package:
                assert torch.equal(again(**call), out)
