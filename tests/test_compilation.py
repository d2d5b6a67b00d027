"""Ahead-of-time compilation of every kernel for four GPUs, none of which is needed: see `compilation.py`.

Defect 8 of a public package: its kernel does not compile for bfloat16. Here every dtype has to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compilation import TARGETS, compile_in_child, excesses

ALL_DTYPES = {"*fp64", "*fp32", "*bf16", "*fp16"}
# The router, and rotary tables, are computed in no less than float32.
ROW_KERNELS = {
    "_tables_kernel",
    "_descent_kernel",
    "_descent_step_kernel",
    "_descent_sums_kernel",
    "_descent_backward_kernel",
    "_exact_kernel",
    "_exact_backward_kernel",
    "_sigmoid_backward_kernel",
    "_select_kernel",
    "_digits_kernel",
    "_place_kernel",
    "_memory_kernel",
    "_candidates_kernel",
}
INTEGER_KERNELS = {"_dropped_kernel", "_heirs_kernel", "_places_kernel", "_admitted_kernel"}
HALF_KERNELS = {"_attention_kernel", "_attention_queries_kernel", "_attention_keys_kernel"}  # on a GPU
LEFT_OUT = {"all": set(), "one": {"*fp16", "*fp64"}}
# Bytes that a thread may spill: sixteen registers around a reduction, in whatever version of Triton.
FEW = 64
# Numbers whose places are not known to be aligned are loaded one by one, each with an address of its own.
KNOWN_SPILLS_UNALIGNED = {
    "_attention_keys_kernel": 512,
    "_attention_queries_kernel": 384,
    "_memory_attention_kernel": 192,
    "_memory_keys_kernel": 1280,
    "_memory_queries_kernel": 832,
    "_norm_backward_kernel": 320,
    "_rows_kernel": 256,
    "_step_products_kernel": 128,
    "_step_tokens_kernel": 640,
}
# By kernel and block size: a row of 32768 logits is 64 registers of each thread; sums of 128 by 128 are 128 of each of
# 128 threads, which sm_90 multiplies from shared memory, and sm_80 from more registers.
KNOWN_SPILLS = {
    ("_rows_kernel", ""): 768,
    ("_descent_kernel", "16384"): 512,
    ("_descent_kernel", "32768"): 512,
    ("_select_kernel", "8192"): 512,
    ("_select_kernel", "16384"): 512,
    # Two sums of 128 keys by 64 channels are 128 registers of each thread; other blocks spill less and are slower.
    ("_attention_keys_kernel", ""): 512,
    ("_memory_keys_kernel", ""): 384,
    # A quarter faster than with 64 keys, which spill nothing: 64 queries by 128 keys are 64 registers, three times.
    ("_memory_queries_kernel", ""): 256,
    ("_step_tokens_kernel", ""): 384,  # on sm_100
    ("_window_keys_kernel", ""): 128,  # of float32, on gfx942
    # A memory of tens of thousands of columns in one program's registers: right, and slow.
    ("_dropped_kernel", "32768"): 1024,
    ("_dropped_kernel", "65536"): 5632,
    ("_heirs_kernel", "16384"): 128,
    ("_heirs_kernel", "32768"): 1536,
    ("_heirs_kernel", "65536"): 5632,
}
# Of gfx942, whose registers are those of 64 lanes: what it spills beyond these.
KNOWN_SPILLS_OF_AMD = {
    ("_heirs_kernel", "8192"): 256,
    ("_heirs_kernel", "16384"): 1536,
    ("_heirs_kernel", "32768"): 3584,
    ("_heirs_kernel", "65536"): 9472,
    ("_window_keys_kernel", ""): 5120,  # of heads of 128 channels
}


# What is launched is the same for all. One of each vendor where there are cores for it.
WHEN = {"sm_90": (), "gfx942": pytest.mark.thorough}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["one", pytest.param("all", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("target", [pytest.param(t, marks=WHEN.get(t, pytest.mark.nightly)) for t in TARGETS])
def test_defect_08_compiles_for_every_dtype(target: str, sizes: str, tmp_path: Path) -> None:
    """Every kernel that is launched, every dtype; fits in shared memory; spills nothing, or what is known.

    docs/generated/compilation.md is made with all sizes.
    """
    report = compile_in_child(target, tmp_path, sizes)
    rows = report["rows"]
    assert not [row for row in rows if "error" in row]
    assert {row["kernel"] for row in rows} == set(report["kernels"]), "a kernel that compilation.py never launches"
    for kernel in report["kernels"]:
        found = {dtype for row in rows if row["kernel"] == kernel for dtype in row["dtypes"]}
        expected = {"*fp64", "*fp32"} if kernel in (*ROW_KERNELS, "_keep_kernel") else ALL_DTYPES
        expected = ALL_DTYPES - {"*fp64"} if kernel in HALF_KERNELS else expected  # sums are in float32
        assert found == (set() if kernel in INTEGER_KERNELS else expected - LEFT_OUT[sizes]), kernel
    assert not excesses(report)
    assert not [row for row in rows if row["spill_stores"] > allowed_spill(row, target)]


def allowed_spill(row: dict[str, Any], target: str) -> int:
    constants = row["constants"]
    key = row["kernel"], constants.get("BLOCK", constants.get("LANES", ""))
    if not row["aligned"] and key[0] in KNOWN_SPILLS_UNALIGNED:
        return KNOWN_SPILLS_UNALIGNED[key[0]]
    return max(KNOWN_SPILLS.get(key, FEW), KNOWN_SPILLS_OF_AMD.get(key, 0) if target == "gfx942" else 0)
