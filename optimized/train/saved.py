"""A trained model in a folder: what `optimized.transformer` needs to make it again.

config.json holds a `TransformerConfig`, model.pt the state dict of a `Decoder`, and tokenizer.json, where tokens are
not bytes, the tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from optimized.train import files, tokens
from optimized.transformer import Decoder, TransformerConfig

CONFIG, STATE = "config.json", "model.pt"


def save(folder: Path, config: TransformerConfig, state: dict[str, Tensor], tokenizer: Path | None) -> None:
    if tokenizer is not None:
        pieces = tokenizer.read_bytes()
        files.write(folder / tokens.FILE, lambda file: file.write(pieces))
    files.write_json(folder / CONFIG, config.to_dict())
    files.write(folder / STATE, lambda file: torch.save(state, file))


def load(folder: Path, device: torch.device) -> tuple[Decoder, tokens.Tokenizer]:
    """In evaluation mode, and what its tokens are. Raises ValueError, OSError, or ImportError without `tokenizers`."""
    for name in (CONFIG, STATE):
        if not (folder / name).is_file():
            raise ValueError(f"expected a folder with a trained model, got {folder} without {name}")
    try:
        config = TransformerConfig.from_dict(json.loads((folder / CONFIG).read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a model's sizes in {folder / CONFIG}, got {error}") from None
    model = Decoder(config, device=device)
    try:
        model.load_state_dict(torch.load(folder / STATE, map_location=device, weights_only=True))
    except Exception as error:  # of many kinds, by what is in the file
        raise ValueError(f"expected the parameters of {folder / CONFIG} in {folder / STATE}, got {error}") from None
    path = folder / tokens.FILE
    return model.eval(), tokens.tokenizer_of(path if path.exists() else None)
