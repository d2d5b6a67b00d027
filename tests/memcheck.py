"""Runs every Triton kernel, forward and backward, at awkward sizes: something for a memory checker to watch. No test.

    compute-sanitizer --tool memcheck --padding 64 --error-exitcode 1 python tests/memcheck.py
    compute-sanitizer --tool racecheck python tests/memcheck.py    # shared memory of the reductions
    python tests/memcheck.py --device cpu                                             # interpreted: that it runs

Every tensor is an allocation of its own, so that an access beyond its end is one beyond an allocation. It starts one
element in, and is strided where that is allowed. Masked tokens of a layer hold NaN, and no result may. On the CPU long
sequences are left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise argparse.ArgumentTypeError(f"expected I/N with 1 <= I <= N, got {text!r}")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="(default: %(default)s)")
parser.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="the I-th of N parts, side by side")
given = parser.parse_args()
# Read when torch first allocates, and when Triton is first imported.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
os.environ["TRITON_INTERPRET"] = str(int(given.device == "cpu"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from cases import SMALL, Case, Inputs, Settings, Sizes, all_on, combinations, each, on_and_off  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import optimized  # noqa: E402
from optimized.kernels.launch import ROWS_IN_REGISTERS  # noqa: E402

LENGTHS = (1, 17, 1000, 8193)
CHANNELS = (1, 64, 1000)
SHORT = 100  # tokens of a layer that the interpreter can take
LOCAL = {"local_attn": True, "local_attn_window_size": 9}
LAYERS: tuple[tuple[int, str, str, dict[str, Any]], ...] = (  # tokens, dtype, mask, and what is not the default
    (1, "float32", "none", {}),
    (1, "bfloat16", "random", {"dim": 1, "heads": 1, "dim_head": 2, **LOCAL}),
    (17, "float32", "random", LOCAL),
    (17, "float64", "random", {"average_routed": True, "rotary": True, "cosine_sim_routing": True}),
    (17, "float16", "all", {"solver": "exact", "straight_through": False}),
    (17, "bfloat16", "random", {"prenorm": False, "learned_routing_tokens": True, "dropout": 0.3}),
    (40, "float32", "random", {"dim": 33, "dim_context": 70, "heads": 3, "dim_head": 10}),
    (1000, "float32", "random", {"dim": 1000, "num_experts": 5, "dropout": 0.3, "rotary": True, **LOCAL}),
    (1000, "bfloat16", "none", {"dim": 1000, "route_block_size": 130, "average_routed": True}),
    (8193, "bfloat16", "random", {"cosine_sim_routing": True, **LOCAL}),
    (8193, "float32", "random", {"solver": "exact", "straight_through": False, "dim": 1}),
    (ROWS_IN_REGISTERS // 4 + 1, "float32", "random", {"dim": 8, "heads": 1, "straight_through": False}),
)


def awkward(t: Tensor) -> Tensor:
    """The same values one element into their storage, the last two dimensions stored the other way round."""
    turned = t.detach().mT if t.ndim > 1 else t.detach()
    storage = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    storage[1:] = turned.reshape(-1)
    out = storage[1:].view(turned.shape)
    return out.mT if t.ndim > 1 else out


def make_mask(kind: str, n: int) -> Tensor | None:
    return {"none": None, "random": torch.rand(2, n) > 0.3, "all": torch.zeros(2, n, dtype=torch.bool)}[kind]


class Awkward(Inputs):
    """hidden: no token is shown where a case has a mask."""

    hidden = False

    def __init__(self, dtype: torch.dtype):
        super().__init__(torch.device(given.device), dtype, lay=awkward, compared=False)

    def mask(self, s: Sizes) -> Tensor:
        return super().mask(s).logical_and(torch.tensor(not self.hidden))


class Hidden(Awkward):
    hidden = True


def run_case(x: Awkward, case: Case, s: Sizes, switches: dict[str, bool]) -> None:
    """Rows hold ties, and a NaN: of a row with one, picked scores and scores alone are NaN."""
    for name, t in case.results(x, s, **switches).items():
        if name.startswith("indices"):
            assert (t >= 0).all(), name
            assert (t < s.n).all(), name
        assert "picked of" in name or "NaN" in name or not t.isnan().any(), name


def run_layer(n: int, dtype: torch.dtype, kind: str, arguments: dict[str, Any]) -> None:
    with torch.device(given.device):
        _run_layer(n, dtype, kind, arguments)


def _run_layer(n: int, dtype: torch.dtype, kind: str, arguments: dict[str, Any]) -> None:
    sizes = {"dim": 64, "heads": 2, "dim_head": 16, "num_experts": 3, "num_routed_queries": 7}
    arguments = {**sizes, "num_routed_key_values": 11, **arguments}
    rotary = arguments.pop("rotary", False)
    layer = optimized.MixtureOfAttention(**arguments, dtype=dtype)
    for parameter in layer.parameters():
        parameter.data = awkward(parameter)
    inputs: dict[str, Any] = {"mask": make_mask(kind, n)}
    x = tokens(n, layer.dim, dtype, inputs["mask"])
    if "dim_context" in arguments:
        inputs["context_mask"] = make_mask(kind, n + 3)
        inputs["context"] = tokens(n + 3, layer.dim_context, dtype, inputs["context_mask"])
    if rotary:
        inputs["rotary_emb"] = awkward(torch.randn(n, layer.dim_head))
    if arguments.get("learned_routing_tokens"):
        for name in ("query_routing_tokens", "key_value_routing_tokens"):
            inputs[name] = awkward(torch.randn(2, layer.num_experts, layer.dim, dtype=dtype)).requires_grad_()
    out = layer(x, **inputs)
    leaves = [t for t in (x, *inputs.values(), *layer.parameters()) if isinstance(t, Tensor) and t.requires_grad]
    grads = torch.autograd.grad(out, leaves, awkward(torch.randn_like(out)), allow_unused=True)
    for t in (out, *grads):
        assert t is None or t.isfinite().all(), "not finite"


def tokens(n: int, dim: int, dtype: torch.dtype, mask: Tensor | None) -> nn.Parameter:
    x = torch.randn(2, n, dim, dtype=dtype)
    return nn.Parameter(awkward(x if mask is None else x.masked_fill(~mask[..., None], torch.nan)))


def runs() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Name, function, arguments."""
    for dtype in (torch.float32, torch.float64):
        lengths = (*LENGTHS, ROWS_IN_REGISTERS // dtype.itemsize + 1) if given.device == "cuda" else LENGTHS[:2]
        for n in lengths:
            yield from of_family("rows", Awkward(dtype), on_and_off, n=n)
            yield from of_family("rows", Hidden(dtype), all_on, n=n)
    for dtype in (torch.float32, torch.bfloat16):
        for dim in CHANNELS:
            every = (dtype, dim) == (torch.float32, 64) and given.device == "cuda"
            yield from of_family("channels", Awkward(dtype), combinations if every else all_on, dim=dim)
        for heads, dim in ((1, 2), (3, 10), (8, 64)):
            settings = combinations if given.device == "cuda" else all_on
            yield from of_family("heads", Awkward(dtype), settings, heads=heads, dim_head=dim)


def of_family(family: str, x: Awkward, settings: Settings, **sizes: int) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    s = (Sizes() if given.device == "cuda" else SMALL)._replace(**sizes)
    for name, case, switches in each([family], settings):
        on = ", ".join(switch for switch in switches if switches[switch])
        hidden = ", all masked" if x.hidden else ""
        yield f"{name} ({on}), {sizes}, {x.dtype}{hidden}", run_case, (x, case, s, switches)


def layers() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    for n, dtype, mask, arguments in LAYERS:
        if given.device == "cuda" or n <= SHORT:
            name = f"layer, {n} tokens, {dtype}, mask {mask}, {arguments}"
            yield name, run_layer, (n, getattr(torch, dtype), mask, arguments)


def main() -> None:
    torch.manual_seed(0)
    kernels = "triton" if given.device == "cuda" else "triton_interpreted"
    # Attention by PyTorch's plain operations: only our kernels are in question.
    stages = ("routing", "dispatch", "local_attention", "mixture")
    chosen = {**dict.fromkeys(stages, kernels), "routed_attention": "math"}
    first, parts = given.part
    start = time.monotonic()
    with optimized.use_backends(**chosen):
        for name, function, arguments in [*runs(), *layers()][first - 1 :: parts]:
            function(*arguments)
            if given.device == "cuda":
                torch.cuda.synchronize()
            print(f"{time.monotonic() - start:5.0f} s  {name}", flush=True)


if __name__ == "__main__":
    main()
