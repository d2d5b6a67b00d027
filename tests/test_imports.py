"""What `import optimized` takes with it, in processes of their own: no compiler, no Triton, and no need of either."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimized.attention.request import constant, too_old

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"  # as where it is not installed: an ImportError
HEAVY = (
    "triton",
    "torch._dynamo",
    "torch._inductor",
    "torch.utils.flop_counter",
    "torch.distributed.tensor",
    "transformers",
)
LAYER = """
import torch
import optimized

torch.set_num_threads(1)
torch.manual_seed(5)
layer = optimized.MixtureOfAttention(
    16, num_routed_queries=5, num_routed_key_values=6, num_experts=2, dim_head=8, heads=2,
    local_attn=True, local_attn_window_size=3,
)
x = torch.randn(2, 21, 16, requires_grad=True)
mask = torch.rand(2, 21) < 0.8
layer.eval()(x, mask=mask).square().sum().backward()
digest = [float(t.double().sum()) for t in (layer(x, mask=mask), x.grad, *(p.grad for p in layer.parameters()))]
"""


def printed(code: str) -> str:
    """By a fresh interpreter, which must not fail. Triton does not interpret there."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


NEW = "print(*set(sys.modules) - before)\n"
# The counter of FLOPs knows every operator, whichever is imported first; and it stays a module like others.
COUNTER = """
import torch.utils.flop_counter, optimized
import inspect
from optimized.ops.operator import OPERATORS
assert len(OPERATORS) > 20
known = torch.utils.flop_counter.flop_registry
print([name for name in OPERATORS if getattr(torch.ops.moa, name) not in known])
print("class FlopCounterMode" in inspect.getsource(torch.utils.flop_counter))
"""
KNOWN = ["[]", "True"]


def test_import_takes_neither_compiler_nor_triton() -> None:
    """What `import torch` alone loads is not ours to say. Nor does a call on the CPU take Triton, or the inductor."""
    before = "import sys, torch; before = set(sys.modules)\n"
    alone, *known = printed(f"{before}import reference\n{NEW}{COUNTER}").splitlines()
    assert known == KNOWN, "the counter before the operators"
    loaded = {"reference": alone.split()}
    imported, called = printed(f"{before}import optimized\n{NEW}{LAYER}print(*sys.modules)").splitlines()
    loaded["optimized"] = imported.split()
    for package, names in loaded.items():
        assert package in names
        assert not [name for name in names if name.startswith(HEAVY)]
    assert not [name for name in called.split() if name.startswith(("triton", "torch._inductor"))]


def test_without_triton_a_call_is_the_same() -> None:
    """Values, gradients, reasons, and FLOPs; and it is traced."""
    rest = """
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    layer(x, mask=mask).sum().backward()
print(*digest, counter.get_total_flops())
print(optimized.plan.obstacle("routing", "triton_interpreted", optimized.plan.Request(x.device, x.dtype)))
"""
    traced = """
compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
print(torch.equal(compiled(x, mask=mask), layer(x, mask=mask)))
program = torch.export.export(layer, (x.detach(),))
print(torch.equal(program.module()(x), layer(x)))
"""
    same, why, *equal = printed(WITHOUT_TRITON + LAYER + rest + traced).splitlines()
    assert why == "Triton is not installed"
    assert equal == ["True", "True"]
    with_it, why, *known = printed(LAYER + rest + COUNTER).splitlines()
    assert (with_it, why) == (same, "needs TRITON_INTERPRET=1")
    assert known == KNOWN, "the counter after the operators"


def test_a_probe_is_a_constant_to_the_compiler() -> None:
    """It is marked as torch.compile's own decorator marks one, and run, not traced: this one could not be."""
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked)
    assert vars(marked).items() <= vars(too_old).items()
    asked: list[str] = []

    @constant
    def probe(name: str) -> str | None:
        asked.append(str(os.stat(ROOT).st_mtime_ns))
        return name if sys.modules.get("torch") is torch else None

    @torch.compile(fullgraph=True, backend="eager")
    def call(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if probe("a") == "a" else x

    assert call(torch.zeros(1)) == call(torch.zeros(1)) == 1
    assert len(asked) == 1
