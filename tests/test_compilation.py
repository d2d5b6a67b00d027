"""Ahead-of-time compilation of every kernel and configuration for four GPUs, in a child process (`compilation.py`).

Defect 8 of a public package: its kernel does not compile for bfloat16. Here every dtype has to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compilation import SHARED_MEMORY, TARGETS

HALVES = {"*bf16", "*fp16"}
ROW_KERNELS = {  # float32 or float64 by design: the router computes in no less
    "_descent_kernel", "_descent_backward_kernel", "_exact_kernel", "_exact_backward_kernel", "_select_kernel",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_defect_08_compiles_for_every_dtype(target: str, tmp_path: Path) -> None:
    """Every kernel, every dtype; within the shared memory of a program; spills no more than the table says."""
    report = tmp_path / "report.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    script = Path(__file__).with_name("compilation.py")
    command = [sys.executable, str(script), "--target", target, "--out", str(report)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(report.read_text())
    rows = found["rows"]
    assert not [row for row in rows if "error" in row]
    assert {row["kernel"] for row in rows} == set(found["kernels"]), "a kernel that nothing launches"
    for kernel in found["kernels"]:
        dtypes = {t for row in rows if row["kernel"] == kernel for t in row["dtypes"]}
        assert {"*fp64", "*fp32"} <= dtypes, kernel
        assert kernel in ROW_KERNELS or dtypes >= HALVES, kernel
    assert max(row["shared"] for row in rows) <= SHARED_MEMORY[target]
    # A whole row of float32 in registers is 64 of them in each thread, of float64 128: that may spill a little.
    for row in rows:
        assert row["spilled"] == 0 or row["kernel"] in ROW_KERNELS or "*fp64" in row["dtypes"], row
