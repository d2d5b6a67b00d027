"""Where a report was made: hardware, versions, commit, and hashes that say whether it is stale."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent
PACKAGES = (
    "triton",
    "flash-attn",
    "flash-attn-4",
    "mixture-of-attention",
    "CoLT5-attention",
    "numpy",
    "hypothesis",
    "pytest",
)
MODULES = {"flash-attn": "flash_attn.flash_attn_interface", "flash-attn-4": "flash_attn.cute.interface"}


def described(device: torch.device, commit: str | None) -> dict[str, Any]:
    """commit: where the files lie outside of git, as copied ones do."""
    folders = ("optimized", "reference", "tests/benchmarks")
    return {
        "device": device.type,
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit or _command("git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"),
        "hashes": {folder: tree_hash(folder) for folder in folders},
    }


def hardware(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {"name": _cpu(), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    found = torch.cuda.get_device_properties(device)
    fields = ("driver_version", "clocks.max.sm", "power.limit")
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={device.index or 0}"]
    told = (_command("nvidia-smi", *query) or "").split(", ")
    said = dict(zip(fields, told)) if len(told) == len(fields) else {}
    return {
        "name": found.name,
        "SMs": str(found.multi_processor_count),
        "memory": f"{found.total_memory / 2**30:.1f} GiB",
        "driver": said.get("driver_version", "unknown"),
        "clock": said.get("clocks.max.sm", "unknown"),
        "power": said.get("power.limit", "unknown"),
        "host": f"{_cpu()}, {os.cpu_count()} cores",
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {package: version(package) for package in PACKAGES}
    if torch.version.cuda:
        found |= {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
    return found


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return _version_of_module(MODULES[package]) if package in MODULES else "not installed"


def _version_of_module(name: str) -> str:
    """Of a package whose folder was copied without its metadata."""
    try:
        importlib.import_module(name)
    except ImportError:
        return "not installed"
    return str(getattr(sys.modules[name.rpartition(".")[0]], "__version__", "of unknown version"))


def tree_hash(folder: str) -> str:
    """sha256 over names and contents of the Python files of a folder."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / folder).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
