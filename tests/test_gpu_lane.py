"""What only a GPU shows: every configuration of a launch alone, other numbers of warps than ours, side streams and
threads, a busy device, and memory full of NaN.

CUDA graphs: test_cuda_graphs.py. More than 2^31 elements: test_large.py. Reads out of bounds and races: memcheck.py.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import gc
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases import ORDINARY, Inputs, Sizes, all_on, each, one_by_one
from harness import check_identical, stages_by
from launches import AXES, all_kernels, configurations, launching_by, name_of, reached, sizes_of
from strategies import LayerCase, cotangent
from torch import Tensor

import optimized
from optimized.kernels import launch as launching

ROOT = Path(__file__).parent.parent
TRITON = pytest.mark.parametrize("kernels", ["triton"], indirect=True)


@pytest.mark.cpu
def test_the_memory_checker_sees_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its calls of the wrappers alone; nothing runs."""
    monkeypatch.setattr(sys, "argv", ["memcheck.py", "--device", "cpu"])
    for name in ("PYTORCH_NO_CUDA_MEMORY_CACHING", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")  # which it sets, so that they are as they were after this
    memcheck = importlib.import_module("memcheck")
    seen: set[str] = set()
    for name, _, (x, case, s, switches) in memcheck.runs():
        found = reached(lambda x=x, case=case, s=s, on=switches: case.results(x, s, **on))
        assert found, name
        seen |= {kernel for kernel, *_ in found}
    assert seen == all_kernels()


# --- other numbers of warps than ours ---------------------------------------------------------------------------------

# These write where they read: as their wrappers say, no number may be held by two warps.
IN_PLACE = {"_value_score_in_place_kernel", "_value_score_backward_kernel", "_rotary_kernel"}
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


@pytest.mark.gpu
@pytest.mark.parametrize(("warps", "stages"), FORCED)
@pytest.mark.parametrize("name", ["rows of 2500", "100 channels", "wide heads"])
def test_other_numbers_of_warps(name: str, warps: int, stages: int, device: torch.device) -> None:
    """A kernel whose result hangs on them lacks a barrier, or reads what another warp is about to write."""
    family, s, _ = ORDINARY[name]
    x = Inputs(device, torch.float32)
    for kernel, case, switches in each([family], one_by_one):
        with forced(warps, stages):
            assert not case.differences(x, s, **switches), kernel
            first, *rest = (case.results(x, s, **switches) for _ in range(3))
        for run in rest:
            for key, result in run.items():
                check_identical(result, first[key], key)


@TRITON
def test_forcing_reaches_every_kernel(kernels: str) -> None:
    """The cases launch them all. Nothing runs: what is launched here has no effect."""
    with mock.patch.object(launching, "launch"), forced(1, 1) as seen:
        for dtype in (torch.float32, torch.bfloat16):  # of one kernel half precision alone
            x = Inputs(torch.device("cpu"), dtype, blank=True)
            for _, case, switches in each(AXES, all_on):
                case.results(x, Sizes(), **switches)
    assert seen == all_kernels()


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


def check_every_run(found: list[list[list[Tensor]]], expected: list[list[Tensor]]) -> None:
    """By work, then by round."""
    for results, wanted in zip(found, expected, strict=True):
        for run in results:
            check_runs(run, wanted)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    """Our kernels, and attention that always adds up in the same order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with optimized.use_backends(**stages_by("triton"), routed_attention="math"):
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
    check_every_run(found, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
def test_launches_compiled_on_a_side_stream(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(LAYERS["soft"], device)
    expected = work.run()
    tables = [n for n, value in vars(launching).items() if isinstance(value, dict) and not n.startswith("__")]
    assert {"_compiled", "_exactly"} <= set(tables)
    for table in tables:  # whichever would remember an earlier launch
        monkeypatch.setattr(launching, table, {})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs = [work.run() for _ in range(2)]
    torch.cuda.synchronize()
    for run in (*runs, work.run()):
        check_runs(run, expected)


def run_child(*words: str) -> None:
    """By this Python, with the packages that it sees: flash-attn may lie on PYTHONPATH."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


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
    run_child("-c", code)


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
        # In the choice of backends of this thread, which is not another's.
        waiting = [pool.submit(contextvars.copy_context().run, repeat, work) for work in works]
        found = [future.result() for future in waiting]
    torch.cuda.synchronize()
    check_every_run(found, expected)


# --- a busy device, and its memory -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", ["soft", "straight-through"])
def test_beside_a_busy_stream(name: str, device: torch.device) -> None:
    """Programs of a kernel start late and in another order when others hold the multiprocessors."""
    work = Work(LAYERS[name], device)
    expected = work.run()
    busy, a = torch.cuda.Stream(), torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    product, done, beside, products = torch.empty_like(a), torch.cuda.Event(), 0, 16
    torch.cuda.synchronize()
    for i in range(50):
        if i == 0 or done.query():
            with torch.cuda.stream(busy):
                for _ in range(products):
                    torch.mm(a, a, out=product)
                done.record()
        check_runs(work.run(), expected)
        if done.query():  # on a busy host a run outlasts what a GPU does at once
            products = min(2 * products, 512)
        else:
            beside += 1
    torch.cuda.synchronize()
    assert beside > 10, "the other stream was never busy"


SMALL = 1 << 20  # bytes: beyond, a tensor comes from another pool of the allocator


def leave_nan(device: torch.device) -> None:
    """In all memory that the allocator holds, and at least six blocks of every size.

    Blocks of each size alone don't reach the pieces that an earlier test left between them.
    """
    blocks = [torch.empty(1 << i, dtype=torch.uint8, device=device) for i in range(9, 25) for _ in range(6)]
    del blocks
    free = [
        (block["size"], segment["segment_type"] == "small")
        for segment in torch.cuda.memory_snapshot()
        if segment["stream"] == 0 and tuple(segment["segment_pool_id"]) == (0, 0)
        for block in segment["blocks"]
        if block["state"] == "inactive"
    ]
    sizes = [size for size, small in free if not small and size > SMALL]
    for size, small in free:
        if small:  # at most 2 MiB, whole
            sizes += [min(size, SMALL), size - SMALL]
    # The largest first: the smallest piece that suffices is given out, so that each is filled to its end.
    blocks = [torch.full((n // 4,), torch.nan, device=device) for n in sorted(sizes, reverse=True) if n > 0]
    del blocks


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", LAYERS)
def test_in_memory_full_of_nan(name: str, device: torch.device) -> None:
    work = Work(LAYERS[name], device)
    expected = work.run()
    gc.collect()  # what it frees later would lie between what was filled
    full = 0
    for i in range(60):  # a piece freed meanwhile may be given out a few times: fifty runs count
        if i % 10 == 0:
            torch.cuda.empty_cache()
        leave_nan(device)
        full += bool(torch.empty(1000, device=device).isnan().all())
        check_runs(work.run(), expected)
    assert full >= 50, f"memory given out was full of NaN in {full} of 60 runs"


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
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            while len(held) < 1000:
                held.append(torch.full((piece // 4,), torch.nan, device=device))
        assert 16 < len(held) < 1000
        del held[-16:]
        for _ in range(50):
            check_runs(work.run(), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        held.clear()
        torch.cuda.empty_cache()


# --- every configuration ---------------------------------------------------------------------------------------------


def every_configuration() -> Iterator[Any]:
    for name, (family, s, dtypes) in ORDINARY.items():
        yield from (pytest.param(family, s, dtype, id=f"{name}-{dtype}") for dtype in dtypes)
    for family, axis in AXES.items():
        yield from (
            pytest.param(family, axis.at(size), torch.float32, id=f"{family}: {size}") for size in sizes_of(family)
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:  # where it is deselected, nobody waits for the sizes to be found
        every = list(every_configuration()) if metafunc.config.option.device == "cuda" else []
        metafunc.parametrize(("family", "s", "dtype"), every)


@pytest.mark.gpu
def test_every_configuration(family: str, s: Sizes, dtype: torch.dtype, device: torch.device) -> None:
    """Every case in every dtype, and wherever the wrappers choose another configuration: see cases.py.

    The interpreter is held to the same, by test_cases.py: whatever a GPU does otherwise shows against it.
    """
    x = Inputs(device, dtype)
    for name, case, switches in each([family], one_by_one):
        assert not case.differences(x, s, **switches), (name, switches)


def test_configurations_are_those_of_the_wrappers() -> None:
    """All numbers of warps, rows in one block and in many."""
    found = set().union(*(configurations("rows", size) for size in AXES["rows"].sizes))
    selections, descents = ([dict(k[1:]) for k in found if k[0] == f"_{of}_kernel"] for of in ("select", "descent"))
    assert {key["num_warps"] for key in selections} == {"1", "2", "4", "8"}
    assert {key["ONE_BLOCK"] for key in descents} == {"True", "False"}
    assert {"_digits_kernel", "_place_kernel", "_descent_step_kernel"} <= {key[0] for key in found}
    assert {1, launching.ROWS_IN_REGISTERS // 4, launching.ROWS_IN_REGISTERS // 4 + 1} <= set(sizes_of("rows"))
    assert {1, launching.MAX_BLOCK_D, launching.MAX_BLOCK_D + 1} <= set(sizes_of("channels"))
