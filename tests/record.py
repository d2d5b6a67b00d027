"""What a report says of where it was made, its file, and tables in Markdown: for all that writes or reads one."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from optimized.prove.environment import processor, version

ROOT = Path(__file__).parent.parent
REPORTS = ROOT / "tests" / "reports"
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


def made(device: torch.device, folders: Iterable[str], commit: str | None = None) -> dict[str, Any]:
    """Where, by what and of which sources. commit: where the files lie outside of git, as copied ones do."""
    return {
        "device": device.type,
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit or _command("git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"),
        "hashes": {folder: tree_hash(folder) for folder in folders},
    }


def hardware(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {"name": processor(), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
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
        "host": f"{processor()}, {os.cpu_count()} cores",
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {package: version(package) or "not installed" for package in PACKAGES}
    if torch.version.cuda:
        found |= {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
    return found


def tree_hash(folder: str) -> str:
    """sha256 over names and contents of the Python files of a folder."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / folder).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error


def earlier(path: Path, same: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a report that another one goes on with; none where there is no file.

    same: what must be in it as it is here. Raises ValueError.
    """
    if not path.exists():
        return []
    found = read(path)
    for name, expected in same.items():
        if found.get(name) != expected:
            raise ValueError(f"{path}: expected {name} {expected}, got {found.get(name)}; remove it to start anew")
    return found["runs"]


def write(path: Path, report: Any, indent: int = 1) -> None:
    write_text(path, json.dumps(report, indent=indent) + "\n")


def write_text(path: Path, text: str) -> None:
    """In one step: a run that is killed leaves what came before, and of two at a time one is the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{threading.get_native_id()}.partial")  # of no other process or thread
    partial.write_text(text)
    partial.replace(path)


def table(heading: Sequence[str], rows: Iterable[Sequence[Any]], left: int | None = None) -> str:
    """Markdown. left: padded to be read as it is, that many columns to the left and numbers to the right of theirs."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (heading, *rows)]
    if left is None:
        rule = ["---"] * len(heading)
    else:
        widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(heading))]
        pads = [str.ljust if i < left else str.rjust for i in range(len(heading))]
        lines = [[pad(cell, w) for pad, cell, w in zip(pads, line, widths)] for line in lines]
        rule = ["-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)]
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, f"|{'|'.join(rule)}|", *body])


def around(path: Path, name: str) -> tuple[str, str]:
    """A page up to `<!-- NAME:begin -->` and from `<!-- NAME:end -->`; ValueError where these are not there once."""
    page = path.read_text()
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{path}: expected {begin.strip()} and {end} once")
    return page.split(begin)[0] + begin, end + page.split(end)[1]


def write_between(path: Path, name: str, text: str) -> None:
    """Into a page, between the two. Blank lines keep the marks apart: to some renderers a table ends only there."""
    before, after = around(path, name)
    write_text(path, f"{before}\n{text}\n\n{after}")
