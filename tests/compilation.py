"""Compiles every Triton kernel ahead of time, which needs no GPU, and reads registers, spills and shared memory.

    python tests/compilation.py --target sm_90 --out FILE.json     # one target; --sizes one: fewer
    python tests/compilation.py --table docs/generated/compilation.md        # all targets, as a table

The wrappers of `optimized.kernels` run on small CPU tensors with the launch of a kernel replaced by a recorder, so that
what is compiled is what they launch. Recording needs the compiler's kernels, not the interpreter's, and the decorator
chooses between them at import: so this is a process of its own, `compile_in_child` for tests.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import DTYPES, WIDE, Inputs, Settings, Sizes, all_on, combinations, each, on_and_off
from launches import all_kernels

from optimized.kernels.launch import MAX_BLOCK_D, ROWS_IN_REGISTERS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import record  # noqa: E402


class Target(NamedTuple):
    """A GPU to compile for."""

    backend: str
    architecture: int | str
    warp_size: int
    shared_limit: int  # bytes that one program may have
    title: str


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, "A100"),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, "H100"),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, "B200"),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, "MI300"),
}

# Which configurations: every case, at sizes on both sides of its block limits.

BASE = Sizes(group=1, ks=(7, 7), length=7)


def call(
    families: str, dtype: torch.dtype, settings: Settings, weights: torch.dtype | None = None, **sizes: int
) -> None:
    """The wrappers of these cases on zeros."""
    x = Inputs(torch.device("cpu"), dtype, weights, blank=True)
    for _, case, switches in each(families.split(), settings):
        case.results(x, BASE._replace(**sizes), **switches)


SIZES = ("all", "one")  # `call_at_every_size` too, or `call_at_ordinary_sizes` alone


def call_at_every_size() -> None:
    """Sizes of 1 are among them because Triton makes constants of these, which is other code."""
    for dtype in DTYPES:
        ordinary = combinations if dtype == torch.bfloat16 else on_and_off
        longest = ROWS_IN_REGISTERS // dtype.itemsize
        rows = [(2000, on_and_off), (longest + 1, on_and_off), (100, all_on), (longest, all_on)]
        for n, settings in rows if dtype in WIDE else ():
            call("rows", dtype, settings, n=n)
        for dim, settings in [(64, ordinary), (MAX_BLOCK_D + 64, all_on), (1024, all_on)]:
            call("channels", dtype, settings, dim=dim)
        for heads, dim, settings in [(8, 64, ordinary), (8, 128, all_on), (2, 16, all_on)]:
            call("heads", dtype, settings, heads=heads, dim_head=dim)
    for dtype in DTYPES[2:]:  # activations in half precision with parameters in float32, as under autocast
        call("channels", dtype, all_on, torch.float32)
    call("rows", torch.float32, all_on, n=1)
    call("channels", torch.bfloat16, all_on, dim=1)
    call("heads", torch.bfloat16, all_on, heads=1, dim_head=2)


def call_at_ordinary_sizes(of_float32: int = 64) -> None:
    """In float32, of this head dimension, and bfloat16, with optional inputs present."""
    call("rows", torch.float32, all_on, n=2000)
    for dtype, dim_head in ((torch.float32, of_float32), (torch.bfloat16, 64)):
        call("channels heads", dtype, all_on, heads=8, dim_head=dim_head)


# From calls to signatures.


class Launch(NamedTuple):
    """What decides the machine code of a kernel, in the terms of `triton.compiler.ASTSource`."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        constants = {name: str(value) for name, value in self.constants.items()}
        return repr((self.kernel.__name__, self.signature, constants, self.attributes, self.options))


def specialize(kernel: Any, bound: dict[str, Any], options: dict[str, Any], backend: str) -> Launch:
    """As Triton does at a launch: constants, integers equal to 1, multiples of 16, aligned pointers."""
    from triton.runtime.jit import mangle_type

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        tensor, specialized = isinstance(value, torch.Tensor), not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (not tensor and value == 1 and specialized):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        found = []
        if specialized and not parameter.do_not_specialize_on_alignment:
            found += [["tt.divisibility", 16]] if (value.data_ptr() if tensor else value) % 16 == 0 else []
        if specialized and tensor and backend == "hip":  # whose storage is below 2 GiB
            found += [["tt.pointer_range", 32]]
        if found:
            attributes[(i,)] = found
    return Launch(kernel, signature, constants, attributes, options)


def record_launches(backend: str, sizes: str) -> list[Launch]:
    """Every distinct launch; of all sizes, the ordinary ones also with nothing known of divisibility and alignment."""
    from triton.runtime.jit import JITFunction

    torch.set_num_threads(1)
    recorded: dict[str, Launch] = {}
    known = True

    def record(self: Any, *args: Any, grid: Any, warmup: bool = False, **keywords: Any) -> None:
        arguments = {name: value for name, value in keywords.items() if name in self.arg_names}
        options = {name: value for name, value in keywords.items() if name not in self.arg_names}
        launch = specialize(self, dict(zip(self.arg_names, args)) | arguments, options, backend)
        launch = launch if known else launch._replace(attributes={})
        recorded.setdefault(launch.key, launch)

    JITFunction.run = record
    if sizes == "all":
        call_at_every_size()
        known = False
        call_at_ordinary_sizes()
    else:
        call_at_ordinary_sizes(32)  # which is the same code, unrolled half as far
    return list(recorded.values())


# Compilation.


def compile_launch(launch: Launch, target: Target) -> dict[str, Any]:
    """A row of the report: which configuration, and either what it needs or why it does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget

    row: dict[str, Any] = {
        "kernel": launch.kernel.__name__,
        "dtypes": sorted({t for t in launch.signature.values() if t.startswith(("*fp", "*bf"))}),
        "aligned": bool(launch.attributes),
        "constants": {name: str(value) for name, value in (launch.constants | launch.options).items()},
    }
    source = triton.compiler.ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, GPUTarget(*target[:3]), launch.options)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {str(error)[-1000:]}"}
    read = read_amdgcn(compiled.asm["amdgcn"]) if target.backend == "hip" else read_ptxas(log.getvalue())
    return row | read | {"shared": compiled.metadata.shared}


def read_ptxas(log: str) -> dict[str, int]:
    """From the assembler's own report. Registers per thread; bytes per thread that are spilled to memory."""
    patterns = {
        "registers": r"Used (\d+) registers",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
    }
    # A function that is not inlined has lines of its own.
    return {name: max(int(n) for n in re.findall(pattern, log)) for name, pattern in patterns.items()}


def read_amdgcn(text: str) -> dict[str, int]:
    """From the metadata of the kernel: vector registers spilled, 4 bytes each, and scalar ones, kept in vector ones."""
    count = {name: int(n) for name, n in re.findall(r"^\s*\.(\w+_count):\s+(\d+)$", text, re.MULTILINE)}
    spilled = 4 * count["vgpr_spill_count"]
    return {
        "registers": count["vgpr_count"],
        "spill_stores": spilled,
        "spill_loads": spilled,
        "scalar_spills": count["sgpr_spill_count"],
    }


def compile_all(name: str, jobs: int, sizes: str) -> dict[str, Any]:
    """The report of one target. Processes are forked after recording, since kernels can't be pickled."""
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    import triton

    target = TARGETS[name]
    launches = record_launches(target.backend, sizes)
    rows = []
    with multiprocessing.get_context("fork").Pool(jobs, _share, (launches, target)) as pool:
        for row in pool.imap(_compile_shared, range(len(launches))):
            rows.append(row)
            print(f"\r{name}: {len(rows)} of {len(launches)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {"triton": triton.__version__, "target": name, "kernels": sorted(all_kernels()), "rows": rows}


_shared: tuple[list[Launch], Target]


def _share(launches: list[Launch], target: Target) -> None:
    global _shared
    _shared = launches, target


def _compile_shared(i: int) -> dict[str, Any]:
    launches, target = _shared
    return compile_launch(launches[i], target)


def compile_in_child(name: str, folder: Path, sizes: str = "all") -> dict[str, Any]:
    """The report of one target, from a process that compiles, and does so anew. sizes: one of `SIZES`."""
    out = folder / f"{name}.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, __file__, "--target", name, "--out", str(out), "--sizes", sizes]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
    return record.read(out)


# The table.

INTRODUCTION = """# What the kernels need of a GPU

Every Triton kernel of `optimized/kernels`, compiled ahead of time by Triton {triton} for four GPUs, none of which is
needed for it. {count} configurations for each: every dtype that a kernel takes, optional inputs present and absent,
sizes on both sides of each block limit, ordinary sizes also with unknown alignment. `tests/test_compilation.py`
compiles one size of each with optional inputs present, with `-m nightly` the same ones as here, and
fails if one does not compile, needs too much shared memory, or spills much more than here.

No kernel runs for this. That it compiles says nothing about its results, which are tested on an H100 (sm_90).

Written by `python tests/compilation.py --table docs/generated/compilation.md`.

Each cell: the most over all configurations of **registers** of a thread, bytes of a thread that are **spilled** from
registers to memory, and bytes of **shared memory** of a program. A spill is correct but slow; shared memory beyond the
limit of the target makes the launch fail. Registers and spills of gfx942 are those of a lane's vector registers.
"""

SPILLS = """## Configurations that spill

Bytes of a thread, the most over optional inputs and alignment.
"""

BEYOND = """## Beyond the shared memory of the target

These compile but can't be launched there.
"""


def render_table(reports: dict[str, dict[str, Any]]) -> str:
    """The Markdown of docs/generated/compilation.md."""
    first = next(iter(reports.values()))
    parts = [INTRODUCTION.format(triton=first["triton"], count=len(first["rows"]))]
    parts.append(record.table(["kernel", "configurations", *map(_heading, reports)], _kernel_lines(reports)))
    parts.append(SPILLS)
    parts.append(record.table(["kernel", "dtypes", "blocks", *reports], _spill_lines(reports)))
    if excessive := [(name, row) for name, report in reports.items() for row in excesses(report)]:
        lines = [[name, _code(row["kernel"]), _types(row), _blocks(row), str(row["shared"])] for name, row in excessive]
        parts.append(BEYOND)
        parts.append(record.table(["target", "kernel", "dtypes", "blocks", "bytes"], lines))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def excesses(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that ask for more shared memory than a program of the target may have."""
    limit = TARGETS[report["target"]].shared_limit
    return [row for row in report["rows"] if row.get("shared", 0) > limit]


def _kernel_lines(reports: dict[str, dict[str, Any]]) -> list[list[str]]:
    lines = []
    for kernel in next(iter(reports.values()))["kernels"]:
        cells = []
        for report in reports.values():
            rows = [row for row in report["rows"] if row["kernel"] == kernel]
            failed = sum("error" in row for row in rows)
            compiled = [row for row in rows if "error" not in row]
            most = [max((row[k] for row in compiled), default=0) for k in ("registers", "spill_stores", "shared")]
            cells.append(" / ".join(map(str, most)) + (f", {failed} do not compile" if failed else ""))
        lines.append([_code(kernel), str(len(rows)), *cells])
    return lines


def _spill_lines(reports: dict[str, dict[str, Any]]) -> list[list[str]]:
    spilled: dict[tuple[str, ...], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, report in reports.items():
        for row in report["rows"]:
            if row.get("spill_stores"):
                found = spilled[_code(row["kernel"]), _types(row), _blocks(row)]
                found[name] = max(found[name], row["spill_stores"])
    return [[*key, *(str(found[name]) for name in reports)] for key, found in sorted(spilled.items())]


def _heading(name: str) -> str:
    return f"{name} ({TARGETS[name].title})"


def _code(text: str) -> str:
    return f"`{text}`"


def _types(row: dict[str, Any]) -> str:
    return ", ".join(t.removeprefix("*") for t in row["dtypes"])


def _blocks(row: dict[str, Any]) -> str:
    sizes = {k: v for k, v in row["constants"].items() if k.startswith(("BLOCK", "ROWS", "num_warps"))}
    return ", ".join(f"{k} {v}" for k, v in sizes.items())


def write_table(path: Path) -> None:
    reports = {}
    for name in TARGETS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            reports[name] = compile_in_child(name, Path(folder))
        print(f"{name}: {len(reports[name]['rows'])}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    path.write_text(render_table(reports))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, help="compile for this one alone, and write --out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON: a row for each configuration")
    parser.add_argument("--sizes", choices=SIZES, default="all", help="with --target (default: %(default)s)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="Markdown: all targets")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    given = parser.parse_args()
    if given.table:
        write_table(given.table)
    elif given.target and given.out:
        record.write(given.out, compile_all(given.target, given.jobs, given.sizes))
    else:
        parser.error("expected --table FILE, or --target and --out FILE")


if __name__ == "__main__":
    main()
