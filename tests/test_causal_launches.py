"""How many small operations a training step of the causal layer starts: each waits for the host, and for the GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from launches import launching_by, name_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import optimized
from optimized.ops import operator

# Of PyTorch's 12 are matrix products, 10 make scores of logits and their gradients, 2 add up gradients of x, 2 join
# what both routers have, 1 fills the gradient of keys' scores, and 1 scales the weights of keys by gamma.
MOST = {"PyTorch's": 28, "ours": 42}


class Started(TorchDispatchMode):
    """Names of PyTorch's operations that start a kernel on a GPU; memory is zeros, since no kernel of ours runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **kwargs or {})
        name = func._opname
        if "empty" in name:
            return out.zero_()
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(first, Tensor) and first.numel() and not func.is_view and name != "_unsafe_view":
            self.names.append(name)
        return out


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.interpreted
def test_a_training_step_starts_few(kernels: str, device: torch.device) -> None:
    """N a multiple of W, no mask and no cache: then nothing is moved or padded."""
    layer = optimized.MixtureOfAutoregressiveAttention(
        32,
        num_routed_queries=2,
        num_routed_key_values=5,
        local_attn_window_size=8,
        dim_head=16,
        heads=2,
        device=device,
        dtype=torch.bfloat16,
    )
    x = torch.ones(2, 32, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    cotangent, ours = torch.ones_like(x), []

    def record(kernel: Any, *given: Any, **constants: Any) -> None:
        ours.append(name_of(kernel))

    # A mode that looks on would have every operator called by the dispatcher, which hides what it is made of.
    with launching_by(record), mock.patch.object(operator, "is_plain", return_value=True), Started() as started:
        layer(x).backward(cotangent)
    found = {"PyTorch's": Counter(started.names), "ours": Counter(ours)}
    for kind, most in MOST.items():
        assert 0 < found[kind].total() <= most, found[kind]
