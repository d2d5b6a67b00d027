"""Strong scaling over several devices, one process for each:

    torchrun --nproc-per-node R -m tests.benchmarks.several --out FILE.json

for R = 1, 2, 4, 8 in turn: rows of other R stay in the file. `ContextParallel`, eager and as a CUDA graph, and
PyTorch's ring attention around a dense layer (PyTorch has no Ulysses); memory and bytes of the rank that takes most.
Then steps of training (`several_training`). Without a GPU by gloo, for a try: give small --tokens and --size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import parallelize_module

import optimized
from optimized.parallel import ContextParallel
from optimized.parallel.volume import Traffic
from optimized.train.sizes import SIZES
from tests import record
from tests.benchmarks.several_training import training

DIM, HEADS, EXPERTS = 1024, 16, (4, 8)
TOKENS = (262_144, 1_048_576)
DENSE_TOKENS = 262_144  # a million take 16 times as long: minutes


@dataclass(frozen=True)
class Case:
    """slots: K. block: of routing, None for whole rows; as long as a shard of eight."""

    n: int
    slots: int
    block: int | None = None
    causal: bool = False
    experts: int = EXPERTS[0]

    def layer(self, **where: Any) -> nn.Module:
        sizes: dict[str, Any] = {
            "heads": HEADS,
            "dim_head": DIM // HEADS,
            "num_experts": self.experts,
            "dropout": 0.0,
            **where,
        }
        if self.causal:
            return optimized.MixtureOfAutoregressiveAttention(
                DIM, num_routed_queries=64, num_routed_key_values=self.slots, local_attn_window_size=256, **sizes
            )
        sizes |= {"num_routed_queries": self.slots, "num_routed_key_values": self.slots, "cosine_sim_routing": True}
        return optimized.MixtureOfAttention(DIM, route_block_size=self.block, **sizes)


def cases(tokens: Sequence[int], experts: Sequence[int]) -> list[Case]:
    found = []
    for count, n in itertools.product(experts, tokens):
        few = min(1024, n // 8)
        found += [Case(n, few, experts=count), Case(n, n // 8, n // 8, experts=count)]
        found += [Case(n, few, causal=True, experts=count)]
    return found


class Dense(nn.Module):
    """Projections around dense attention."""

    def __init__(self, **where: Any) -> None:
        super().__init__()
        self.to_qkv, self.to_out = (
            nn.Linear(DIM, 3 * DIM, bias=False, **where),
            nn.Linear(DIM, DIM, bias=False, **where),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS, metavar="E", help="(default: %(default)s)")
    parser.add_argument("--size", choices=SIZES, default="medium", help="of the trained model (default: %(default)s)")
    parser.add_argument("--dense-tokens", type=int, default=DENSE_TOKENS, metavar="N",
                        help="at most, of the dense layer: its time grows with N² (default: %(default)s)")  # fmt: skip
    parser.add_argument("--commit", help="for the report, where the files are a copy outside of git")
    parser.add_argument("--budget", type=float, default=1e9, metavar="SECONDS", help="begin nothing after so many")
    return parser.parse_args(given)


class Bench:
    """What all measurements share."""

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self.mesh, self.device, self.cuda = mesh, device, device.type == "cuda"
        self.where = {"device": device, "dtype": torch.bfloat16 if self.cuda else torch.float32}

    def steps(self, layer: nn.Module, n: int) -> dict[str, Callable[[], Any]]:
        x = torch.randn(1, n // self.mesh.size(), DIM, **self.where).requires_grad_()  # type: ignore[arg-type]
        cotangent = torch.randn_like(x)

        def forward() -> None:
            with torch.no_grad():
                layer(x)

        def both() -> None:
            for p in (x, *layer.parameters()):
                p.grad = None
            layer(x).backward(cotangent)

        return {"forward": forward, "both": both}

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Of the slowest rank; the mean of as many calls as take a quarter of a second, at least two."""
        call()
        once = self._together(call, 1)
        return self._together(call, min(max(int(250 / max(once, 1e-3)), 2), 50))

    def _together(self, call: Callable[[], Any], times: int) -> float:
        self.wait()
        begun = time.perf_counter()
        for _ in range(times):
            call()
        self.wait()
        taken = torch.tensor([(time.perf_counter() - begun) * 1000 / times], device=self.device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return float(taken)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        dist.barrier()

    def most(self, value: float) -> float:
        found = torch.tensor([float(value)], device=self.device, dtype=torch.float64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)

    def graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.wait()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, capture_error_mode="thread_local"):  # NCCL's watchdog asks events meanwhile
            call()
        return recorded.replay

    def measure(self, layer: nn.Module, n: int, graph: bool) -> list[dict[str, Any]]:
        rows = []
        for direction, call in self.steps(layer, n).items():
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            call()
            peak = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else 0.0
            with Traffic(self.mesh.size(), self.mesh.get_local_rank()) as sent:
                call()
            row = {"direction": direction, "ms": self.milliseconds(call), "peak_mib": self.most(peak)}
            row |= {"sent": self.most(sent.bytes), "collectives": sent.calls}
            if graph and self.cuda:
                row["graph_ms"] = self.milliseconds(self.graph(call))
            rows.append(row)
        return rows

    def ours(self, case: Case) -> list[dict[str, Any]]:
        layer = case.layer(**self.where)
        if self.mesh.size() > 1:
            layer = parallelize_module(layer, self.mesh, ContextParallel())
        return self.measure(layer, case.n, graph=True)

    def ring(self, case: Case) -> list[dict[str, Any]]:
        """Full attention: neither balanced nor causal."""
        from torch.distributed.tensor.experimental._attention import _cp_options

        _cp_options.enable_load_balance = False
        dense = Dense(**self.where)
        if self.mesh.size() == 1:
            return self.measure(dense, case.n, graph=False)
        some = torch.zeros(1, self.mesh.size(), device=self.device)
        with context_parallel(self.mesh, buffers=[some], buffer_seq_dims=[1]):
            return self.measure(dense, case.n, graph=False)


def write(path: Path, made: dict[str, Any], ranks: int, rows: list[dict], steps: list[dict]) -> None:
    """Beside what a run of another number of ranks left."""
    before = json.loads(path.read_text()) if path.exists() else {}
    parts = {"rows": rows, "training": steps}
    for name, new in parts.items():
        kept = [row for row in before.get(name, []) if row["ranks"] != ranks]
        parts[name] = [*kept, *({**row, "commit": made["commit"]} for row in new)]
    record.write(path, {"kind": "scaling", **made, **parts})


def main(given: list[str] | None = None) -> int:
    args, begun = arguments(given), time.perf_counter()
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    bench, first = Bench(mesh, device), dist.get_rank() == 0
    rows = []
    for case in cases(args.tokens, args.experts):
        runs = {"ContextParallel": bench.ours}
        once = case == Case(case.n, case.slots) and case.n <= args.dense_tokens
        if cuda and once:  # for each length; its kernels are those of a GPU
            runs["ring attention"] = bench.ring
        for name, run in runs.items():
            if bench.most(time.perf_counter() - begun) > args.budget:
                continue
            try:
                found = run(case)
            except (RuntimeError, NotImplementedError) as error:
                found = [{"direction": "forward", "reason": str(error).strip().split("\n")[0][:200]}]
            rows += [{"ranks": mesh.size(), "competitor": name, **asdict(case), **row} for row in found]
            if first:
                for row in rows[-len(found) :]:
                    cells = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
                    print(" ".join(cells), flush=True)
            if cuda:
                torch.cuda.empty_cache()
    steps = []
    if bench.most(time.perf_counter() - begun) <= args.budget:
        steps = training(device.type, mesh.size(), args.size, bench.most, bench.wait)
    if first:
        print(*steps, sep="\n", flush=True)
    if first and args.out is not None:
        write(args.out, record.made(device, ("optimized", "tests"), args.commit), mesh.size(), rows, steps)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
