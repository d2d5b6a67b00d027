"""Whether a decoder can take steps in place, and whether these can be recorded as CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optimized.autoregressive import CLASSES, MixtureOfAutoregressiveAttention
from optimized.autoregressive_attention import MemoryAttention
from optimized.autoregressive_local import CausalLocalAttention
from optimized.plain import attached, plain
from optimized.transformer.attentions import DenseAttention
from optimized.transformer.block import Block, SwiGLU

_ATTENTIONS = {"dense": DenseAttention, "local": CausalLocalAttention, "mixture": MixtureOfAutoregressiveAttention}
_INSIDE = {"attn": MemoryAttention, "local_attn": CausalLocalAttention}  # of a mixture
# Of which no forward asks the device for anything.
_QUIET = {
    *CLASSES, *_ATTENTIONS.values(), Block, SwiGLU, nn.RMSNorm, nn.Embedding, nn.Linear, nn.ModuleList,
}  # fmt: skip


def obstacle_to_steps(model: Any, cls: type[nn.Module]) -> str | None:
    """Of a decoder that should be of this class: the first module that is given more than tokens and is not as it was
    made, which may expect the arguments of a call; and why. Modules inside of these may be anything.
    """
    named: list[tuple[str, Any, type[nn.Module]]] = [("model", model, cls)]
    for i, block in enumerate(model.blocks):
        named.append((f"blocks.{i}", block, Block))
        if type(block) is Block:
            inside = _INSIDE if block.kind == "mixture" else {}
            named.append((f"blocks.{i}.attention", block.attention, _ATTENTIONS[block.kind]))
            named += [(f"blocks.{i}.attention.{n}", getattr(block.attention, n, None), c) for n, c in inside.items()]
    for name, module, expected in named:
        found = attached(module, expected) or _mode_of(module)
        if found is not None:
            return f"{name}, which {found}"
    return None


def obstacle_to_recording(model: Any, device: torch.device) -> str | None:
    """Why steps of a model that can take them may not be replayed: a replay runs no code of Python."""
    if device.type != "cuda":
        return f"tokens on {device}"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a stream that is being captured"
    for name, module in model.named_modules():
        own = type(module) in _QUIET or not name
        found = plain(module, type(module), bias=True) if own else f"is of class {type(module).__name__}"
        found = found or _mode_of(module)
        if found is not None:
            return f"{name or 'model'}, which {found}"
    return None


def _mode_of(module: nn.Module) -> str | None:
    if module.training:
        return "is in training mode"
    return None if module._compiled_call_impl is None else "is compiled"
