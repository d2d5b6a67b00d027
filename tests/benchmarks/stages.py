"""Which stage of the layer a CUDA kernel belongs to, by its name.

Our kernels: by the file of optimized/kernels that defines them. Libraries': by what their names contain.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import optimized

ORDER = (
    "router", "solver", "selection", "gather", "GEMM", "attention", "null slot", "combine", "dx", "rotary", "norm",
    "copies", "other",
)  # fmt: skip
MODULES = {
    "router_logits": "router",
    "coordinate_descent": "solver",
    "long_descent": "solver",
    "capped_simplex": "solver",
    "sigmoid": "solver",
    "long_selection": "selection",
    "memory": "selection",
    "candidates": "selection",
    "memory_places": "selection",
    "admitted": "selection",
    "memory_attention": "attention",
    "memory_keys": "attention",
    "admitted_rows": "GEMM",
    "scaled_weight": "GEMM",
    "finite": "rotary",
    "blend": "combine",
    "partial_sums": "dx",
    "gather_norm": "gather",
    "null_slot": "null slot",
    "router_gradient": "dx",
    "token_gradient": "dx",
    "window": "attention",
    "attention": "attention",
    "keep": "attention",
    "layer_norm": "norm",
    "step_tokens": "router",
    "step_products": "GEMM",
    "step_attention": "attention",
    "step_output": "GEMM",
    "value_score": "null slot",  # both are about values and scores around the flash kernel
}
LIBRARIES = (  # in this order: flash-attn 4's kernels are called cutlass too
    ("attention", ("flash", "fmha", "sdpa", "cudnn", "attention", "compute_dot_do_o")),
    ("GEMM", ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas")),
    ("norm", ("layer_norm", "layernorm", "gammabeta", "rms_norm")),
)


@functools.cache
def own_kernels() -> dict[str, str]:
    """Name of each Triton kernel to its stage, read from the sources: the names are not imported, they may change."""
    found = {}
    for path in sorted((Path(optimized.__file__).parent / "kernels").glob("*.py")):
        stage = MODULES.get(path.stem, path.stem.replace("_", " "))
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE):
            found[name] = stage
    return found


def is_copy(name: str) -> bool:
    return name.startswith(("Memcpy", "Memset"))


@functools.cache
def stage_of(kernel: str) -> str:
    if is_copy(kernel):
        return "copies"
    own = own_kernels()
    names = sorted((name for name in own if kernel.startswith(name)), key=len)
    if names:
        return own[names[-1]]
    lower = kernel.lower()
    return next((stage for stage, marks in LIBRARIES if any(mark in lower for mark in marks)), "other")
