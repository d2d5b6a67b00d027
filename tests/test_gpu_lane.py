"""What only a GPU shows: every configuration of a launch alone, other numbers of warps than ours, side streams and
threads, a busy device, memory full of NaN, and Triton's interpreter against the GPU on the same inputs.

CUDA graphs: test_cuda_graphs.py. More than 2^31 elements: test_large.py. Reads out of bounds and races: memcheck.py.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import os
import pkgutil
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import compilation
import pieces
import pytest
import torch
from harness import check_identical, stages_by
from pieces import Numbers, Result, Results, differences
from strategies import LayerCase, cotangent, generator
from torch import Tensor

import optimized
import optimized.kernels
from optimized.kernels import launch as launching

ROOT = Path(__file__).parent.parent
MODULES = [
    importlib.import_module(f"optimized.kernels.{entry.name}")
    for entry in pkgutil.iter_modules(optimized.kernels.__path__)
]
TRITON = pytest.mark.parametrize("kernels", ["triton"], indirect=True)


def name_of(kernel: Any) -> str:
    return kernel.fn.__name__


@contextmanager
def launching_by(replacement: Callable[..., None]) -> Iterator[None]:
    """The wrappers launch by another function."""
    with ExitStack() as patches:
        for module in MODULES:
            if module is not launching and hasattr(module, "launch"):
                patches.enter_context(mock.patch.object(module, "launch", replacement))
        yield


# --- every configuration ---------------------------------------------------------------------------------------------


def reached(call: Callable[[], None]) -> set[tuple[Any, ...]]:
    """Kernel, and constants but for the sizes of blocks, of all that a call launches; nothing runs."""
    found = set()

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        rest = {name: str(value) for name, value in constants.items() if "BLOCK" not in name}
        found.add((name_of(kernel), *sorted(rest.items()), ("whole", constants.get("ONE_BLOCK"))))

    with launching_by(record):
        call()
    return found


def powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def row_calls(dtype: torch.dtype) -> dict[int, Callable[[], None]]:
    most = max(launching.ROWS_IN_REGISTERS // dtype.itemsize, launching.CHUNK)
    return {
        n: lambda n=n: compilation.call_row_kernels(dtype, n, compilation.all_on) for n in [*powers(most), most + 1]
    }


def channel_calls(dtype: torch.dtype) -> dict[int, Callable[[], None]]:
    sizes = [*powers(launching.MAX_BLOCK_D), launching.MAX_BLOCK_D + 1]
    return {d: lambda d=d: compilation.call_channel_kernels(dtype, dtype, d, compilation.all_on) for d in sizes}


def head_calls(dtype: torch.dtype) -> dict[int, Callable[[], None]]:
    return {d: lambda d=d: compilation.call_head_kernels(dtype, 3, d, compilation.all_on) for d in powers(512)[1:]}


AXES: dict[str, tuple[Callable[[torch.dtype], dict[int, Any]], Callable[[Numbers, int], Results]]] = {
    "rows": (row_calls, lambda x, n: pieces.rows(x, n, 5, 1)),
    "channels": (channel_calls, pieces.channels),
    "heads": (head_calls, lambda x, d: pieces.heads(x, 3, d)),
}


def sizes_of(axis: str, dtype: torch.dtype) -> list[int]:
    """The smallest and the largest size at which a kernel has some number of warps, rows of a tile, or loop."""
    classes: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for size, call in AXES[axis][0](dtype).items():
        for configuration in reached(call):
            classes[configuration].append(size)
    return sorted({size for found in classes.values() for size in (min(found), max(found))})


def configurations() -> Iterator[Any]:
    """In float64 they are test_boundaries.py's."""
    for axis, dtype in (("rows", torch.float32), *((a, d) for a in ("channels", "heads") for d in pieces.DTYPES[1:3])):
        for size in sizes_of(axis, dtype):
            yield pytest.param(axis, size, dtype, id=f"{axis}-{size}-{str(dtype).removeprefix('torch.')}")


@pytest.mark.gpu
@pytest.mark.parametrize(("axis", "size", "dtype"), list(configurations()))
def test_every_configuration(axis: str, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Against the same in float64, which has other blocks, and is itself tested against PyTorch."""
    actual = AXES[axis][1](Numbers(device, dtype), size)
    exact = AXES[axis][1](Numbers(device, torch.float64, dtype), size)
    assert not differences(actual, {name: Result(t.value, actual[name].slack) for name, t in exact.items()})


def test_configurations_are_those_of_the_wrappers() -> None:
    """All numbers of warps, rows in one block and in many."""
    found = set().union(*(reached(call) for call in row_calls(torch.float32).values()))
    warps = {dict(key[1:])["num_warps"] for key in found if key[0] == "_select_kernel"}
    assert warps == {"2", "4", "8", "16"}
    assert {dict(key[1:])["whole"] for key in found if key[0] == "_select_kernel"} == {True, False}
    assert {1, launching.ROWS_IN_REGISTERS // 4, launching.ROWS_IN_REGISTERS // 4 + 1} <= set(
        sizes_of("rows", torch.float32)
    )
    assert {1, launching.MAX_BLOCK_D, launching.MAX_BLOCK_D + 1} <= set(sizes_of("channels", torch.float32))


# --- other numbers of warps than ours ----------------------------------------------------------------------------------

# These write where they read: as their wrappers say, no number may be held by two warps.
IN_PLACE = {"_value_score_kernel", "_value_score_backward_kernel", "_rotary_kernel"}
FORCED = ((1, 1), (2, 4), (8, 2))  # warps and stages


@contextmanager
def forced(warps: int, stages: int) -> Iterator[set[str]]:
    """Every kernel has so many warps and stages; yields the names of those launched."""
    seen: set[str] = set()

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        name = name_of(kernel)
        seen.add(name)
        most = warps
        if name in IN_PLACE:
            numbers = constants["BLOCK_H"] * constants.get("BLOCK_D", constants.get("BLOCK_HALF"))
            most = max(min(warps, numbers // 32), 1)
        launching.launch(kernel, grid, *arguments, **constants | {"num_warps": most, "num_stages": stages})

    with launching_by(launch):
        yield seen


FORCED_PIECES = ("rows of 2500", "100 channels", "wide heads")


@pytest.mark.gpu
@pytest.mark.parametrize(("warps", "stages"), FORCED)
@pytest.mark.parametrize("name", FORCED_PIECES)
def test_other_numbers_of_warps(name: str, warps: int, stages: int, device: torch.device) -> None:
    """A kernel whose result hangs on them lacks a barrier, or reads what another warp is about to write."""
    plain = pieces.compute(name, torch.float32, device)
    with forced(warps, stages):
        runs = [pieces.compute(name, torch.float32, device) for _ in range(3)]
    assert not differences(runs[0], plain)
    for run in runs[1:]:
        for key, result in run.items():
            check_identical(result.value, runs[0][key].value, key)


@TRITON
def test_forcing_reaches_every_kernel(kernels: str) -> None:
    """The pieces above launch them all. Nothing runs: what is launched here has no effect."""
    with mock.patch.object(launching, "launch", lambda *arguments, **constants: None), forced(1, 1) as seen:
        for call in (row_calls, channel_calls, head_calls):
            call(torch.float32)[64]()
    assert seen == set(all_kernels())


def all_kernels() -> list[str]:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    functions = (item for module in MODULES for item in vars(module).items())
    return sorted(
        {n for n, f in functions if isinstance(f, (JITFunction, InterpretedFunction)) and n.endswith("_kernel")}
    )


SOFT = {"straight_through": False, "cosine_sim_routing": True, "eps": 0.3}
CASE = LayerCase(batch=2, n=96, dim=64, experts=2, heads=2, dim_head=16, k_q=24, k_kv=40, mask="random", rotary=True)
LAYERS = {
    "soft": replace(CASE, options=SOFT, average=True),
    "straight-through": replace(CASE, mask="none", seed=1),
    "exact, local": replace(CASE, options={**SOFT, "solver": "exact"}, window=9, seed=2),
    "cross": replace(CASE, rotary=False, context=80, seed=3),
}


class Work:
    """A layer on an input of its own; a run gives the output and the gradients of x and of all parameters."""

    def __init__(self, case: LayerCase, device: torch.device, dtype: torch.dtype = torch.float32):
        self.layer = optimized.MixtureOfAttention(**case.arguments(), device=device, dtype=dtype)
        self.layer.load_state_dict({name: t.to(dtype) for name, t in case.state().items()})
        self.given = {n: t.to(dtype if n in ("x", "context") else t.dtype).to(device) for n, t in case.inputs().items()}
        self.x = self.given["x"].requires_grad_()
        self.g = cotangent(tuple(self.x.shape), "dense", case.seed).to(dtype).to(device)

    def run(self) -> list[Tensor]:
        out = self.layer(**self.given)
        found = torch.autograd.grad(out, [self.x, *self.layer.parameters()], self.g, allow_unused=True)
        return [out.detach(), *(t for t in found if t is not None)]


def check_runs(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected)):
        check_identical(a, e, f"result {i}")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    """Our kernels, and attention that always adds up in the same order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with optimized.use_backends(**stages_by("triton"), routed_attention="math", local_attention="banded_math"):
        yield


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("warps", "stages"), [(1, 1), (8, 2)])
def test_layer_with_other_numbers_of_warps(warps: int, stages: int, device: torch.device) -> None:
    work = Work(LAYERS["soft"], device)
    plain = work.run()
    with forced(warps, stages) as seen:
        runs = [work.run() for _ in range(2)]
    assert len(seen) > 10
    check_runs(*runs)
    for a, e in zip(runs[0], plain):
        # Logits differ in their last digit, and no two are that close; the soft scores make it a few.
        assert (a - e).abs().max() <= 1e-4 * e.abs().max()


# --- streams and threads ---------------------------------------------------------------------------------------------


def late(work: Work, x: Tensor, producer: torch.cuda.Stream) -> torch.cuda.Event:
    """x arrives late: whoever reads work.x too early finds NaN."""
    with torch.no_grad():
        work.x.fill_(torch.nan)
        producer.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(producer):
            torch.cuda._sleep(20_000_000)  # cycles: ten milliseconds
            work.x.copy_(x)
            return producer.record_event()


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", LAYERS)
def test_on_a_side_stream(name: str, device: torch.device) -> None:
    """x comes from yet another stream; the backward runs on that of the forward."""
    work = Work(LAYERS[name], device)
    x, expected = work.x.detach().clone(), work.run()
    producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(3):
        consumer.wait_event(late(work, x, producer))
        with torch.cuda.stream(consumer):
            found = work.run()
        torch.cuda.synchronize()
        check_runs(found, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_library_attention_on_a_side_stream(kernels: str, device: torch.device) -> None:
    """Whichever backends are taken in bfloat16; some add up gradients atomically, so of the output alone."""
    work = Work(replace(LAYERS["straight-through"], window=9), device, torch.bfloat16)
    x, expected = work.x.detach().clone(), work.run()
    producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(3):
        consumer.wait_event(late(work, x, producer))
        with torch.cuda.stream(consumer):
            found = work.run()
        torch.cuda.synchronize()
        check_identical(found[0], expected[0])
        assert all(t.isfinite().all() for t in found)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
def test_several_streams_at_once(device: torch.device) -> None:
    works = [Work(case, device) for case in LAYERS.values()]
    expected = [work.run() for work in works]
    streams = [torch.cuda.Stream() for _ in works]
    torch.cuda.synchronize()
    found: list[list[list[Tensor]]] = [[] for _ in works]
    for _ in range(25):
        for work, stream, results in zip(works, streams, found):
            with torch.cuda.stream(stream):
                results.append(work.run())
    torch.cuda.synchronize()
    for results, wanted in zip(found, expected):
        for run in results:
            check_runs(run, wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
def test_launches_compiled_on_a_side_stream(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(LAYERS["soft"], device)
    expected = work.run()
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "_specialized", {})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs = [work.run() for _ in range(2)]
    torch.cuda.synchronize()
    for run in (*runs, work.run()):
        check_runs(run, expected)


def first_use(device: torch.device) -> None:
    """Of everything, probes of attention libraries too, on a side stream."""
    work = Work(replace(LAYERS["straight-through"], window=9), device, torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = work.run()
    torch.cuda.synchronize()
    check_identical(found[0], work.run()[0])
    assert all(t.isfinite().all() for t in found)


@pytest.mark.gpu
def test_first_use_of_a_process_on_a_side_stream() -> None:
    code = "import torch, test_gpu_lane; test_gpu_lane.first_use(torch.device('cuda'))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("own_streams", [False, True], ids=["one stream", "own streams"])
def test_two_threads(own_streams: bool, device: torch.device) -> None:
    works = [Work(LAYERS[name], device) for name in ("soft", "exact, local")]
    expected = [work.run() for work in works]
    torch.cuda.synchronize()
    start = threading.Barrier(len(works))

    def repeat(work: Work) -> list[list[Tensor]]:
        with torch.cuda.stream(torch.cuda.Stream()) if own_streams else nullcontext():
            start.wait()
            return [work.run() for _ in range(20)]

    with concurrent.futures.ThreadPoolExecutor(len(works)) as pool:
        found = list(pool.map(repeat, works))
    torch.cuda.synchronize()
    for results, wanted in zip(found, expected):
        for run in results:
            check_runs(run, wanted)


# --- a busy device, and its memory -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", ["soft", "straight-through"])
def test_beside_a_busy_stream(name: str, device: torch.device) -> None:
    """Programs of a kernel start late and in another order when others hold the multiprocessors."""
    work = Work(LAYERS[name], device)
    expected = work.run()
    busy, a = torch.cuda.Stream(), torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    product, done, beside = torch.empty_like(a), torch.cuda.Event(), 0
    torch.cuda.synchronize()
    for i in range(50):
        if i == 0 or done.query():
            with torch.cuda.stream(busy):
                for _ in range(100):
                    torch.mm(a, a, out=product)
                done.record()
        check_runs(work.run(), expected)
        beside += not done.query()
    torch.cuda.synchronize()
    assert beside > 10, "the other stream was never busy"


def leave_nan(device: torch.device) -> None:
    """In memory that the allocator gives out next."""
    blocks = [torch.full((size // 4,), torch.nan, device=device) for i in range(9, 25) for size in [1 << i] * 6]
    del blocks


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", LAYERS)
def test_in_memory_full_of_nan(name: str, device: torch.device) -> None:
    work = Work(LAYERS[name], device)
    expected = work.run()
    for i in range(50):
        if i % 10 == 0:
            torch.cuda.empty_cache()
        leave_nan(device)
        assert torch.empty(1000, device=device).isnan().all()
        check_runs(work.run(), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
def test_in_little_memory(device: torch.device) -> None:
    """Of this process: the allocator has to give back what it caches again and again."""
    work = Work(LAYERS["soft"], device)
    expected = work.run()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    piece = 4 << 20  # bytes
    held: list[Tensor] = []
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * piece) / total)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            while True:
                held.append(torch.full((piece // 4,), torch.nan, device=device))
        del held[-16:]
        for _ in range(50):
            check_runs(work.run(), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        held.clear()
        torch.cuda.empty_cache()


# --- the interpreter and the GPU -------------------------------------------------------------------------------------


@TRITON
def test_interpreter_agrees(kernels: str, device: torch.device, tmp_path: Path) -> None:
    """On the same inputs, in a process of its own. On the CPU that is the interpreter twice: equal, and in brief."""
    out, brief = tmp_path / "interpreted.pt", device.type == "cpu"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    command = [sys.executable, str(ROOT / "tests" / "pieces.py"), "--out", str(out), *["--brief"] * brief]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        here = {key: pieces.compute(*key, device) for key in pieces.every_piece(brief)}
        printed = child.communicate()[0].decode()
    assert child.returncode == 0, printed[-2000:]
    there = torch.load(out)
    assert there.keys() == {(name, str(dtype)) for name, dtype in here}
    found = {}
    for (name, dtype), results in here.items():
        expected = {key: Result(*result) for key, result in there[name, str(dtype)].items()}
        if brief:
            expected = {key: Result(result.value) for key, result in expected.items()}
        if bad := differences(results, expected):
            found[name, dtype] = bad
    assert not found


def test_a_difference_is_seen() -> None:
    """In an integer, beyond its slack, a NaN; not within."""
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    for actual, expected, words in (
        (Result(one.int()), Result(2 * one.int()), "2 of 2 elements"),
        (Result(one), Result(one + 1e-3, 1e-4), "2 of 2 elements"),
        (Result(one), Result(nan, 1.0), "NaN in other places"),
    ):
        (found,) = differences({"it": actual}, {"it": expected})
        assert words in found
    assert not differences({"it": Result(one)}, {"it": Result(one + 1e-5, 1e-4)})
    assert not differences({"it": Result(nan)}, {"it": Result(nan)})
    x = torch.randn(5, generator=generator(0))
    assert not differences({"it": Result(x)}, {"it": Result(x.clone())})
