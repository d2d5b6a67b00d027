"""What the wrappers share: block sizes, dtypes, and numbers that Triton would round."""

from __future__ import annotations

import functools
import struct
import threading
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK_D = 4096  # channels in registers at a time; longer rows are read in pieces
ROWS_IN_REGISTERS = 131072  # bytes: 64 float32 in each of 512 threads
CHUNK = 8192  # elements of a longer row that are read at a time
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# Triton's own two, without its wrapper, which takes as long as a launch.


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@functools.lru_cache(1024)
def next_power_of_2(n: int) -> int:
    """The least that is not smaller than n >= 1."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(1024)
def double_bits(value: float) -> int:
    """Triton passes a Python float as float32, so a double travels as the integer of its bits."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@triton.jit
def from_bits(bits):
    """The double; Triton passes the bits of one below 1e-314 as int32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def norm_floor(norm):
    """1e-12 in the dtype of the norms; Triton to 3.6 rounds a number beside float64 to float32."""
    return tl.full((), 1e-12, norm.dtype)


@triton.jit
def clamped_norm(norm):
    """By which a row is divided."""
    return tl.maximum(norm, norm_floor(norm))


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def by_item(rows: Tensor) -> tuple[Tensor, int]:
    """Rows (B, R, N) that lie side by side within an item, and how far it is from an item to the next.

    Those of one router are half of the rows that both have: no copy.
    """
    if rows.stride()[1:] != (rows.shape[2], 1):
        rows = rows.contiguous()
    return rows, rows.stride(0)


@functools.cache
def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def arithmetic(dtype: torch.dtype) -> Any:
    """Triton's name of the dtype that numbers of `dtype` are computed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def channel_constants(dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """DTYPE, BLOCK_D and num_warps of a kernel that handles rows of `dim` channels.

    A warp for 4 KB: with fewer threads more rows are in flight, and a sum over channels needs no shared memory.
    """
    block = min(next_power_of_2(dim), MAX_BLOCK_D)
    warps = max(block * wide(dtype).itemsize // 4096, 1)
    return {"DTYPE": arithmetic(dtype), "BLOCK_D": block, "num_warps": warps}


# What Triton compiled, by kernel, device and all that it specialises a launch by. Triton finds it anew at each launch,
# in 20 us and more, which is longer than many a kernel runs. `_exactly`: the same by the very numbers of a launch, that
# take less to look up.
_compiled: dict[tuple[Any, ...], Any] = {}
_exactly: dict[tuple[Any, ...], tuple[Any, tuple[str, ...]]] = {}
_specialized: dict[int, tuple[Any, tuple[bool, ...]]] = {}
MOST_LAUNCHES = 4096  # that `_exactly` holds: the lengths of sequences may never repeat
# Triton's interpreter replaces functions of triton.language for the time of a launch: of two at once, one fails or the
# process does.
_interpreting = threading.RLock()
_ON_HIP = torch.version.hip is not None  # where a launch is specialised by the size of storages too


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants), on the device of the first argument, which is a tensor.

    Tensors are contiguous, or their strides are among the arguments. Those of bool are bytes to the kernel.
    """
    first = arguments[0]
    if not first.is_cuda:
        with _interpreting:
            kernel[grid](*_as_bytes(arguments), **constants)
        return
    if _ON_HIP:
        kernel[grid](*_as_bytes(arguments), **constants)
        return
    device = first.get_device()
    if device != _current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *arguments, **constants)
        return
    launch_compiled(kernel, grid, device, arguments, constants)


def launch_compiled(
    kernel: Any, grid: tuple[int, ...], device: int, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """By what was compiled at an earlier launch that Triton would have specialised alike, else by Triton."""
    # By identity: Triton hashes a kernel by its source, under a lock. A tensor is passed as its address: of a tensor
    # Triton asks the driver whether it lies on the device.
    exact, given = [id(kernel), device, *constants, *constants.values()], []
    for a in arguments:
        if a.__class__ is int or a is None:
            given.append(a)
            exact.append(a)
        elif isinstance(a, Tensor):
            address = a.data_ptr()
            given.append(address)
            exact.append(a.dtype)
            exact.append(address % 16)
        else:
            given.append(a)
            exact.append(a)
    found = _exactly.get(key := tuple(exact))
    if found is None:
        arguments = _as_bytes(arguments)
        specialization = _specialization(kernel, device, arguments, constants)
        compiled = _compiled.get(specialization)
        if compiled is None:
            _compiled[specialization] = kernel[grid](*arguments, **constants)
            return
        if len(_exactly) >= MOST_LAUNCHES:  # threads that both saw one fewer have put one each
            _exactly.clear()
        found = _exactly[key] = compiled, kernel.arg_names[len(arguments) :]
    compiled, names = found
    for name in names:
        given.append(constants[name])
    _start(compiled, (*grid, 1, 1)[:3], device, given)


def _as_bytes(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Masks as int8, which Triton loads on every target."""
    return tuple([a.view(torch.int8) if isinstance(a, Tensor) and a.dtype == torch.bool else a for a in arguments])


def _start(compiled: Any, grid: tuple[int, ...], device: int, arguments: list[Any]) -> None:
    """compiled[grid](*arguments); without what Triton prepares for hooks where nobody hooks in."""
    hooks = triton.knobs.runtime
    if not (_idle(hooks.launch_enter_hook) and _idle(hooks.launch_exit_hook)):
        compiled[grid](*arguments)
        return
    run = compiled.run  # loads the kernel at its first launch
    run(*grid, _stream(device), compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def _current_device() -> int:
    """That of PyTorch, which has a context already where there is a tensor of it."""
    return torch._C._cuda_getDevice()


def _stream(device: int) -> int:
    """The current one."""
    return triton.runtime.driver.active.get_current_stream(device)


def _idle(hook: Any) -> bool:
    """A chain of hooks without any, or whatever a version of Triton has in its place."""
    return hook is None or not getattr(hook, "calls", True)


def _specialization(
    kernel: Any, device: int, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, ...]:  # fmt: skip
    found = _specialized.get(id(kernel))
    if found is None:
        found = kernel, tuple(not parameter.do_not_specialize for parameter in kernel.params)
        _specialized[id(kernel)] = found
    return (id(kernel), device, *constants.items(), *map(_specialize, arguments, found[1]))


def _specialize(argument: Any, specialized: bool) -> Any:
    """As finely as Triton does: dtype and alignment of a tensor, width of an integer; 1 and multiples of 16 apart."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        narrow = -(2**31) <= argument < 2**31
        return (narrow, argument == 1, argument % 16 == 0) if specialized else narrow
    return argument
