"""What a run was made on: the processor or GPU, and versions of packages."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

PACKAGES = ("triton", "flash-attn", "flash-attn-4", "numpy", "verified-mixture-of-attention")
MODULES = {"flash-attn": "flash_attn.flash_attn_interface", "flash-attn-4": "flash_attn.cute.interface"}


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def versions(packages: Sequence[str] = PACKAGES) -> str:
    """In words: of Python, torch, and those of these packages that are installed."""
    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    return ", ".join(found + [f"{package} {v}" for package in packages if (v := version(package))])


def version(package: str) -> str | None:
    """None: not installed. That of flash-attn also where its folder was copied without its metadata."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    with contextlib.suppress(ImportError, KeyError):
        name = MODULES[package]
        importlib.import_module(name)
        return str(getattr(sys.modules[name.rpartition(".")[0]], "__version__", "of unknown version"))
    return None
