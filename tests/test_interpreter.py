"""What Triton's interpreter can't see, as it is in the installed Triton: the rows of docs/interpreter.md.

A failure here is news, not a defect of ours: Triton has mended or changed something. Update the row, and this test.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from strategies import generator
from torch import Tensor
from triton.runtime.interpreter import InterpreterError

pytestmark = pytest.mark.cpu  # where kernels are interpreted
ROOT = Path(__file__).parent.parent
CHANGED = "the interpreter does this otherwise than docs/interpreter.md says: update its row, and this test"


@triton.jit
def _binary(x, y, out, DOT: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    if DOT:
        i = i[:, None] * N + i[None, :]
        tl.store(out + i, tl.dot(tl.load(x + i), tl.load(y + i), input_precision=PRECISION))
    else:
        tl.store(out + i, tl.load(x + i) + tl.load(y + i))


def product(dtype: torch.dtype, precision: str, n: int = 16) -> tuple[Tensor, Tensor]:
    """By the kernel, and by PyTorch in float32."""
    a, b = (torch.randn(n, n, generator=generator(i)).to(dtype) for i in range(2))
    out = torch.zeros(n, n)
    _binary[(1,)](a, b, out, DOT=True, PRECISION=precision, N=n)
    return out, a.float() @ b.float()


def test_bfloat16_arithmetic_is_that_of_its_bits() -> None:
    x, y = torch.tensor([2.5, -5.0]).bfloat16(), torch.tensor([2.0, 1.0]).bfloat16()
    out = torch.zeros(2).bfloat16()
    _binary[(1,)](x, y, out, DOT=False, PRECISION="ieee", N=2)
    bits = (t.view(torch.int16) for t in (x, y, out))
    a, b, found = bits
    assert torch.equal(found, a + b), CHANGED
    out, exact = product(torch.bfloat16, "ieee")
    assert (out - exact).abs().max() > 1e6, CHANGED


@triton.jit
def _round(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


def test_conversion_to_bfloat16_cuts_off() -> None:
    x = torch.tensor([1 + 3 * 2**-8, 2 - 2**-9, -1 - 3 * 2**-8, 1.0])
    out = torch.zeros(4).bfloat16()
    _round[(1,)](x, out, N=4)
    cut = (x.view(torch.int32) >> 16 << 16).view(torch.float32)
    assert torch.equal(out.float(), cut), CHANGED
    assert not torch.equal(out, x.bfloat16()), CHANGED


def test_input_precision_is_ignored() -> None:
    results = [product(torch.float32, precision)[0] for precision in ("tf32", "tf32x3", "ieee")]
    assert torch.equal(results[0], results[1]), CHANGED
    assert torch.equal(results[0], results[2]), CHANGED


def test_products_smaller_than_hardware_has() -> None:
    assert torch.equal(*product(torch.float32, "ieee", n=1)), CHANGED


@triton.jit
def _copy(x, out, LIMIT: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i, mask=i < LIMIT))


def test_masked_load_without_other_gives_zero() -> None:
    out = torch.full((4,), 7.0)
    _copy[(1,)](torch.ones(4), out, LIMIT=1, N=4)
    assert out.tolist() == [1, 0, 0, 0], CHANGED


def test_reads_beyond_a_tensor_are_not_noticed() -> None:
    """Within a larger allocation of ours, so that the test itself is harmless."""
    buffer, out = torch.arange(8.0), torch.zeros(8)
    _copy[(1,)](buffer[:4], out, LIMIT=8, N=8)
    assert torch.equal(out, buffer), CHANGED


def test_memory_that_nobody_wrote_is_read_as_it_is() -> None:
    left_over, out = torch.full((4,), 3.0), torch.zeros(4)
    _copy[(1,)](torch.empty(4).set_(left_over), out, LIMIT=4, N=4)
    assert torch.equal(out, left_over), CHANGED


@triton.jit
def _race(last, count):
    tl.store(last, tl.program_id(0))
    tl.store(count, tl.load(count) + 1)


def test_races_do_not_happen() -> None:
    """Programs run one after another, in the order of the grid."""
    for _ in range(3):
        last, count = torch.zeros(2, dtype=torch.int32).split(1)
        _race[(50,)](last, count)
        assert (last.item(), count.item()) == (49, 50), CHANGED


@triton.jit
def _assert(out):
    tl.device_assert(tl.load(out) == 1, "never")
    tl.store(out, 5)


def test_device_assert_does_nothing() -> None:
    out = torch.zeros(1)
    _assert[(1,)](out, debug=True)
    assert out.item() == 5, CHANGED


@triton.jit
def _scalar_and_block(x, out, WHERE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    positive = tl.load(x) > 0
    if WHERE:
        tl.store(out + i, tl.where(positive, i, 0))
    else:
        tl.store(out + i, tl.where(positive & (i < 2), 1, 0))


def test_scalar_comparison_with_a_block_raises() -> None:
    out = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(InterpreterError, match="bitwise_and"):
        _scalar_and_block[(1,)](torch.ones(1), out, WHERE=False, N=4)
    _scalar_and_block[(1,)](torch.ones(1), out, WHERE=True, N=4)
    assert out.tolist() == [0, 1, 2, 3], CHANGED


@triton.jit
def _fill(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.full((N,), 1.0, tl.float32))


def test_options_of_a_launch_mean_nothing() -> None:
    """More warps than there are, a number that is no power of two, an option that no target knows."""
    for options in ({"num_warps": 4096}, {"num_warps": 3}, {"num_stages": 99}, {"no_such_option": 1}):
        out = torch.zeros(4)
        _fill[(1,)](out, N=4, **options)
        assert out.sum() == 4, CHANGED


def test_blocks_beyond_any_register_file() -> None:
    out = torch.zeros(2**20)
    _fill[(1,)](out, N=2**20, num_warps=1)
    assert out.sum() == 2**20, CHANGED


@triton.jit
def _double(x, out):
    tl.store(out, tl.load(x) * 2)


def test_int32_wraps_in_silence() -> None:
    out = torch.zeros(1, dtype=torch.int64)
    _double[(1,)](torch.tensor([2**31 - 1], dtype=torch.int32), out, debug=True)
    assert out.item() == -2, CHANGED


@triton.jit
def _sum(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N))))


def test_sums_are_numpys() -> None:
    """Bit for bit, whatever order that is: not the tree over lanes and warps of a GPU."""
    x, out = torch.randn(1024, generator=generator(0)), torch.zeros(1)
    _sum[(1,)](x, out, N=1024, num_warps=8)
    assert out.item() == np.sum(x.numpy()).item(), CHANGED


@triton.jit
def _constant(n, out):
    tl.store(out, n.to(tl.int64))


def test_an_argument_of_1_is_no_constant() -> None:
    out = torch.zeros(1, dtype=torch.int64)
    _constant[(1,)](1, out)
    assert out.item() == 1, CHANGED


@triton.jit
def _python(x, out):
    result = {"any": 1}["any"] if tl.load(x) > 0 else 2.5
    tl.store(out, sorted([result])[0])


def test_any_python_runs() -> None:
    """A dict and a built-in function of Python: neither compiles."""
    out = torch.zeros(1)
    _python[(1,)](torch.ones(1), out)
    assert out.item() == 1, CHANGED


@triton.jit
def _count(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.cumsum(tl.load(x + i) > 0))


def test_cumsum_of_booleans_counts() -> None:
    out = torch.zeros(8, dtype=torch.int32)
    _count[(1,)](torch.ones(8), out, N=8)
    assert out.tolist() == list(range(1, 9)), CHANGED


# --- the table, and the guards that read the source -----------------------------------------------------------------


def test_the_table_has_a_row_for_each_test() -> None:
    rows = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "interpreter.md").read_text())
    tree = ast.parse(Path(__file__).read_text())
    here = [f.name for f in tree.body if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")]
    assert sorted(set(rows)) == sorted(here)


def kernel_calls() -> Iterator[tuple[str, str, ast.Call]]:
    """File and line, name, and node of each call of triton.language in a kernel."""
    for path in sorted((ROOT / "optimized" / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            function = node.func if isinstance(node, ast.Call) else None
            if isinstance(function, ast.Attribute) and getattr(function.value, "id", "") == "tl":
                yield f"{path.name}:{node.lineno}", function.attr, node


def test_masked_loads_of_our_kernels_say_what_else() -> None:
    loads = [(where, call) for where, name, call in kernel_calls() if name == "load"]
    assert len(loads) > 50
    keywords = [(where, {k.arg for k in call.keywords}, len(call.args)) for where, call in loads]
    assert [where for where, names, count in keywords if count > 1 or ("mask" in names and "other" not in names)] == []


def test_our_kernels_use_nothing_that_only_a_gpu_can_test() -> None:
    """Atomics, assertions and assembly; a product says its precision, or has operands that have but one."""
    refused = re.compile(r"atomic|device_assert|assume|inline_asm|debug_barrier|extern")
    assert [(where, name) for where, name, _ in kernel_calls() if refused.search(name)] == []
