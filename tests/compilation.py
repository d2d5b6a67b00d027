"""Compile every kernel ahead of time, without a GPU: `python tests/compilation.py --target sm_90 --out FILE.json`.

Run as a script, never within pytest: there the kernels are interpreted, which their decorator decides at import. The
wrappers of `optimized.kernels` are called on CPU tensors with the launch replaced by a recorder; each distinct
signature is then compiled for the target, and ptxas (or the AMD metadata) tells registers and spills.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes a program may have
sys.path[:0] = [str(Path(__file__).parent.parent)]


def kernel_names() -> set[str]:
    """Every function of optimized.kernels that is launched on a grid."""
    from triton.runtime.jit import JITFunction

    import optimized.kernels

    found = set()
    for module in pkgutil.iter_modules(optimized.kernels.__path__):
        for name, value in vars(importlib.import_module(f"optimized.kernels.{module.name}")).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found.add(name)
    return found


def call_everything() -> None:
    """Each wrapper in every dtype and with every optional argument, at sizes on both sides of its block limits."""
    import torch

    from optimized.kernels import (
        capped_simplex,
        combine,
        coordinate_descent,
        gather_norm,
        null_slot,
        rotary,
        router_logits,
        selection,
        value_score,
    )

    for dtype, n, masked in itertools.product((torch.float64, torch.float32), (8192, 40000), (False, True)):
        s = torch.zeros(2, 3, n, dtype=dtype)
        mask = torch.ones(2, n, dtype=torch.bool) if masked else None
        saved = coordinate_descent.coordinate_descent(s, mask, 3.0, 20, 0.03, 4.0, 0.7)
        coordinate_descent.coordinate_descent_backward(s, s, mask, *saved, 3.0, 0.03, 4.0, 0.7)
        saved = capped_simplex.capped_simplex(s, mask, 3.0, 0.03)
        capped_simplex.capped_simplex_backward(s, s, mask, *saved, 0.03)
        selection.select(s, mask, 7)
    routing = (torch.zeros(2, 3, 7, dtype=torch.long), torch.ones(2, 3, 7, dtype=torch.bool))
    inverse = torch.zeros(2, 3, 50, dtype=torch.int32)
    mask = torch.ones(2, 50, dtype=torch.bool)
    for dtype, dim in ((torch.float64, 1024), (torch.float32, 64), (torch.bfloat16, 1024), (torch.float16, 1024)):
        wide = torch.promote_types(dtype, torch.float32)
        x, gamma = torch.zeros(2, 50, dim, dtype=dtype), torch.ones(3, dim, dtype=dtype)
        for g in (None, gamma):
            rows = gather_norm.gather_norm(x, *routing, g)
            gather_norm.gather_norm_backward(rows, x, *routing, inverse, g)
        scores = torch.ones(2, 3, 7, dtype=wide)
        for average, local, null in ((False, None, x[0, 0]), (True, x, None)):
            combine.combine(rows, scores, inverse, local, null, mask, average, dtype)
            combine.combine_backward(x, rows, scores, *routing, inverse, local, null, mask, average)
        for scale in (None, 8.0):
            logits, norms = router_logits.router_logits(x, gamma, mask, scale)
            router_logits.router_logits_backward(logits, x, gamma, mask, logits, norms, scale)
        dim_head = 64 if dim == 64 else 128
        q = torch.zeros(6, 7, 2, dim_head, dtype=dtype)
        null, lse = torch.zeros(3, 2, dim_head, dtype=dtype), torch.zeros(6, 2, 7, dtype=wide)
        for keep, lengths in ((None, None), (lse, torch.ones(6, dtype=torch.int32))):
            null_slot.merge(q, null, null, q, lse, keep, lengths)
            null_slot.merge_backward(q, null, null, q, lse, keep, q, q)
        table = torch.zeros(50, dim_head, dtype=wide)
        for positions, transposed in ((None, False), (torch.zeros(6, 7, dtype=torch.long), True)):
            rotary.rotate(q, table, table, positions, transposed)
        value_score.value_score_backward(q, q, lse[:, 0])
        value_score.value_score(q, lse[:, 0])


def record_launches() -> list[tuple[Any, dict, dict, dict]]:
    """(kernel, signature, constants, options) of every distinct launch of `call_everything`."""
    import torch
    from triton.runtime.jit import JITFunction

    pointers = {
        torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
        torch.int8: "*i8", torch.bool: "*i1", torch.int32: "*i32", torch.int64: "*i64",
    }  # fmt: skip
    seen: dict[str, tuple[Any, dict, dict, dict]] = {}

    def record(self: Any, *args: Any, grid: Any = None, warmup: bool = False, **keywords: Any) -> None:
        bound = dict(zip(self.arg_names, args)) | {k: v for k, v in keywords.items() if k in self.arg_names}
        options = {k: v for k, v in keywords.items() if k not in self.arg_names}
        signature, constants = {}, {}
        for parameter in self.params:
            value = bound[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = pointers[value.dtype]
            else:
                signature[parameter.name] = "i64" if abs(value) >= 2**31 or parameter.name.endswith("_bits") else "i32"
        key = repr((self.fn.__name__, signature, {k: str(v) for k, v in constants.items()}, options))
        seen.setdefault(key, (self, signature, constants, options))

    JITFunction.run = record
    call_everything()
    return list(seen.values())


def resources(compiled: Any, target: str) -> dict[str, int]:
    """Registers per thread, bytes spilled, bytes of shared memory."""
    shared = int(compiled.metadata.shared)
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        counts = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
        return {"registers": counts["vgpr_count"], "spilled": 4 * counts["vgpr_spill_count"], "shared": shared}
    report = assemble(compiled.asm["ptx"])
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    return {"registers": max(registers), "spilled": max(spills, default=0), "shared": shared}


def assemble(ptx: str) -> str:
    """What ptxas -v says; of the assemblers that come with Triton, by the first that knows this version of PTX."""
    import triton

    arch = re.search(r"\.target (\w+)", ptx)
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    complaints = []
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "kernel.ptx"
        source.write_text(ptx)
        for ptxas in sorted(folder.glob("ptxas*")):
            command = [
                str(ptxas),
                "-v",
                f"--gpu-name={arch.group(1) if arch else ''}",
                str(source),
                "-o",
                f"{work}/out",
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return done.stderr
            complaints.append(done.stderr)
    raise RuntimeError("; ".join(complaints))


def compile_all(target: str) -> Iterator[dict[str, Any]]:
    """One row per configuration: kernel, its pointers and constants, resources or the error."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launches = record_launches()
    for i, (kernel, signature, constants, options) in enumerate(launches):
        print(f"\r{target}: {i + 1} of {len(launches)}", end="", file=sys.stderr)
        row: dict[str, Any] = {
            "kernel": kernel.fn.__name__,
            "dtypes": sorted({t for t in signature.values() if t.startswith(("*fp", "*bf"))}),
            "constants": {k: str(v) for k, v in constants.items()},
        }
        try:
            source = ASTSource(kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
            yield row | resources(compiled, target)
        except Exception as error:
            yield row | {"error": f"{type(error).__name__}: {str(error)[-400:]}"}
    print(file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    import triton

    rows = list(compile_all(given.target))
    report = {"triton": triton.__version__, "target": given.target, "kernels": sorted(kernel_names()), "rows": rows}
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
