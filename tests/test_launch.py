"""Launches of Triton kernels by what was compiled before: nothing may be reused that Triton would compile anew."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from optimized.kernels import launch
from optimized.kernels.launch import cdiv, launch_compiled, next_power_of_2


class Kernel:
    """In place of a Triton kernel (x_ptr, y_ptr, n, dim, BLOCK), n not specialised."""

    arg_names = ("x_ptr", "y_ptr", "n", "dim", "BLOCK")
    params = tuple(SimpleNamespace(do_not_specialize=name == "n") for name in arg_names)

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.served: list[int] = []  # which of the compiled ones, counted from 1

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_run(*arguments: Any, **constants: Any) -> Any:
            self.compiled.append((*arguments, constants))
            return Compiled((*grid, 1, 1)[:3], self.launched, self.served, len(self.compiled))

        return compile_and_run


class Compiled:
    """What it compiles to: takes all arguments in their order, and a grid of three."""

    function, packed_metadata = "function", "metadata"

    def __init__(
        self, grid: tuple[int, ...], launched: list[tuple[Any, ...]], served: list[int], number: int
    ) -> None:  # fmt: skip
        self.grid, self.launched, self.served, self.number = grid, launched, served, number

    def run(self, *given: Any) -> None:
        assert given[:3] == self.grid
        assert given[3] in ("stream 7", "stream 8")
        assert given[4:9] == ("function", "metadata", None, None, None)
        self.launched.append(given[9:])
        self.served.append(self.number)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert grid == self.grid
        return lambda *given: self.launched.append(("by Triton", *given))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_stream", lambda device: f"stream {device + 7}")


X = torch.zeros(64)
USUAL: dict[str, Any] = {"x": X, "y": None, "n": 5, "dim": 32, "device": 0, "BLOCK": 16, "num_warps": 4}


def start(kernel: Kernel, **changes: Any) -> None:
    c = USUAL | changes
    constants = {"BLOCK": c["BLOCK"], "num_warps": c["num_warps"]}
    launch_compiled(kernel, (3,), c["device"], (c["x"], c["y"], c["n"], c["dim"]), constants)


def test_the_second_launch_compiles_nothing() -> None:
    kernel, ones = Kernel(), torch.ones(64)
    start(kernel)
    start(kernel, x=ones, n=2**31 - 1)
    assert len(kernel.compiled) == 1
    assert kernel.launched == [(ones.data_ptr(), None, 2**31 - 1, 32, 16)]


def test_masks_are_bytes_to_triton_and_an_address_later() -> None:
    kernel, mask = Kernel(), torch.ones(64, dtype=torch.bool)
    for _ in range(2):
        start(kernel, y=mask)
    ((_, first, *_),) = kernel.compiled
    assert (first.dtype, first.data_ptr()) == (torch.int8, mask.data_ptr())
    assert [y for _, y, *_ in kernel.launched] == [mask.data_ptr()]


@pytest.mark.parametrize(
    "change",
    [
        {"x": X.double()},
        {"x": X[1:]},
        {"y": X},
        {"n": 2**31},
        {"dim": 24},
        {"dim": 1},
        {"device": 1},
        {"BLOCK": 32},
        {"num_warps": 8},
    ],
    ids=["dtype", "alignment", "present", "64 bits", "no multiple of 16", "one", "device", "constant", "option"],
)
def test_what_is_specialised_is_compiled_apart(change: dict[str, Any]) -> None:
    kernel = Kernel()
    start(kernel)
    start(kernel, **change)
    assert len(kernel.compiled) == 2
    for _ in range(2):  # looked up by what they have in common, then by their numbers
        start(kernel)
        start(kernel, **change)
    assert len(kernel.compiled) == 2
    assert kernel.served == [1, 2, 1, 2]


def test_lengths_that_never_repeat_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_LAUNCHES", 8)
    monkeypatch.setattr(launch, "_exactly", {})
    kernel = Kernel()
    for n in range(100):
        start(kernel, n=n)
        assert len(launch._exactly) <= 8
    assert len(kernel.compiled) == 1
    assert [n for _, _, n, _, _ in kernel.launched] == list(range(1, 100))


def test_threads_that_race_do_not_make_them_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """All four find room for one more at once, and put one each."""
    most, threads = 8, 4
    barrier = threading.Barrier(threads)

    class Raced(dict):  # type: ignore[type-arg]
        def __len__(self) -> int:
            found = super().__len__()
            if threading.current_thread() in racing:
                barrier.wait(60)
            return found

    exactly, kernel, lengths = Raced(), Kernel(), itertools.count()
    racing = [threading.Thread(target=lambda: start(kernel, n=next(lengths))) for _ in range(threads)]
    monkeypatch.setattr(launch, "MOST_LAUNCHES", most)
    monkeypatch.setattr(launch, "_exactly", exactly)
    for _ in range(most):  # the first compiles
        start(kernel, n=next(lengths))
    assert len(exactly) == most - 1
    for thread in racing:
        thread.start()
    for thread in racing:
        thread.join()
    assert len(exactly) == most - 1 + threads
    for _ in range(100):
        start(kernel, n=next(lengths))
        assert len(exactly) <= most
    assert len(kernel.launched) == most - 1 + threads + 100


def test_who_hooks_in_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton's profiler does."""
    import triton

    kernel = Kernel()
    start(kernel)
    start(kernel)
    hook = triton.knobs.runtime.launch_exit_hook
    monkeypatch.setattr(hook, "calls", [print])
    start(kernel)
    assert [isinstance(given[0], str) for given in kernel.launched] == [False, True]


def test_kernels_do_not_share() -> None:
    first, second = Kernel(), Kernel()
    start(first)
    start(second)
    assert len(second.compiled) == 1


@pytest.mark.parametrize("n", [*range(1, 70), 4096, 4097])
def test_sizes_of_blocks(n: int) -> None:
    """As Triton computes them."""
    import triton

    assert next_power_of_2(n) == triton.next_power_of_2(n)
    assert cdiv(n, 16) == triton.cdiv(n, 16)


@pytest.mark.cpu
def test_the_interpreter_replaces_what_it_would() -> None:
    """Within a launch no builtin is left in the namespaces, and afterwards all are as they were."""
    import inspect

    import triton.language as tl
    from triton.runtime import interpreter

    from optimized.kernels.capped_simplex import _exact_kernel

    def builtins() -> list[tuple[str, object]]:
        members = [found for namespace in (tl, tl.tensor, tl.math) for found in inspect.getmembers(namespace)]
        return [(name, member) for name, member in members if tl.core.is_builtin(member)]

    before = builtins()
    scope = interpreter._patch_lang(_exact_kernel.fn)
    left = builtins()
    scope.restore()
    assert len(before) > 100
    assert left == []
    assert builtins() == before
