"""Options of `python -m optimized`, all checked before any work."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from optimized.prove import text
from optimized.prove.text import MIN_TOKENS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SUFFIXES = (".png", ".pdf", ".svg")


LARGEST = 2**31 - 1  # more tokens, channels, experts or neighbours no tensor has


def positive(text: str) -> int:
    return integer(text, 1, LARGEST)


def seed(text: str) -> int:
    return integer(text, -(2**63), 2**64 - 1)  # those of torch.manual_seed


def integer(text: str, least: int, most: int) -> int:
    with contextlib.suppress(ValueError):
        if least <= int(text) <= most:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected an integer from {least} to {most}, got {text!r}")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(text.visible(message))


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, text.Text]:
    """Options and text, all checked before any work. Exits with status 2 on an error."""
    parser = Parser(
        prog="python -m optimized",
        description="Run Mixture of Attention on a text, forward and backward, and hold every stage against the "
        "reference in float64, and our Triton kernels against PyTorch's. Exit status: 0 all within budget, 1 a stage "
        "failed, 2 wrong usage.",
    )
    add = parser.add_argument
    add("file", nargs="?", type=Path, metavar="FILE", help="UTF-8 text (default: Python's own language reference)")
    add("--tokens", type=positive, default=8192, metavar="N", help="tokens taken from its start (default: %(default)s)")
    add("--dim", type=positive, default=256, metavar="D", help="model dimension (default: %(default)s)")
    add("--heads", type=positive, default=4, metavar="H", help="attention heads of D / H (default: %(default)s)")
    add("--experts", type=positive, default=4, metavar="E", help="experts (default: %(default)s)")
    add("--slots", type=positive, metavar="K", help="tokens that each expert picks (default: N / 8)")
    add("--window", type=positive, default=64, metavar="W", help="window of local attention (default: %(default)s)")
    add("--seed", type=seed, default=0, metavar="S", help="of parameters and word vectors (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    add("--dtype", nargs="+", choices=DTYPES, help="(default: float32, and on cuda bfloat16 too)")
    add("--causal", action="store_true", help="the strictly causal layer: replace the future, and see the past unmoved")
    add("--processes", type=positive, metavar="R", help="shard the text over R processes (gloo, or NCCL on GPUs), and "
        "hold them against one")  # fmt: skip
    add("--plot", type=Path, metavar="IMAGE", help="draw the routing map (.png, .pdf, .svg); needs matplotlib")
    add("--no-color", action="store_true", help="mark routed words by numbers in place of colours")
    args = parser.parse_args(argv)

    if args.dim % (2 * args.heads):
        parser.error(f"--dim: expected a multiple of 2 H = {2 * args.heads}, got {args.dim}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a device that is there, got 'cuda' without CUDA")
    if args.plot is not None and (reason := plot_obstacle(args.plot)):
        parser.error(f"--plot: {reason}")
    if args.causal and args.plot is not None:
        parser.error("--plot: expected without --causal, which draws none")
    if args.processes is not None:
        if args.causal or args.plot is not None:
            parser.error("--processes: expected without --causal and --plot")
        if args.device != "cpu" and torch.cuda.is_available() and args.processes > torch.cuda.device_count():
            parser.error(f"--processes: expected at most the {torch.cuda.device_count()} GPUs, got {args.processes}")
    if args.tokens < MIN_TOKENS:
        parser.error(f"--tokens: expected at least {MIN_TOKENS}, got {args.tokens}")
    try:
        read = text.read(args.file, args.tokens)
    except ImportError:
        parser.error("FILE: expected a file, since this Python comes without pydoc_data.topics")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"FILE: expected a readable UTF-8 file, got {args.file}: {error}")
    n = len(read.tokens)
    if n < MIN_TOKENS:
        parser.error(f"FILE: expected at least {MIN_TOKENS} tokens, got {n} in {read.name}")
    if args.processes is not None and n % args.processes:  # plain shards are equal
        read = text.read(args.file, n - n % args.processes)
        n = len(read.tokens)
    args.slots = args.slots or n // 8
    # Near N nothing is left to choose, and the solver sits on its kinks.
    if args.slots > n // 2:
        parser.error(f"--slots: expected at most half of the {n} tokens, got {args.slots}")
    least, there = least_memory(args, n) / 2**30, memory() / 2**30
    if least > there:
        parser.error(
            f"--tokens, --dim, --experts: expected what fits into {there:.3g} GiB of memory, got {n} tokens, "
            f"D {args.dim} and {args.experts} experts, which take {least:.3g} GiB at least"
        )
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.dtype = args.dtype or (["float32", "bfloat16"] if args.device.type == "cuda" else ["float32"])
    return args, read


def least_memory(args: argparse.Namespace, n: int) -> int:
    """Bytes of the oracle's weights, of its logits, and of a vector for each token and n-gram, and nothing else."""
    weights = 4 * (args.experts + 1) * args.dim**2
    return 8 * (weights + args.experts * n + args.dim * n) + 4 * args.dim * text.BUCKETS


def memory() -> float:
    """Bytes of this machine; infinitely many where the system does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def plot_obstacle(path: Path) -> str | None:
    """Why no plot can be written there, or None."""
    if path.suffix.lower() not in SUFFIXES:
        return f"expected a name that ends in {', '.join(SUFFIXES)}, got {path}"
    if not path.parent.is_dir():
        return f"expected a file in an existing folder, got {path}"
    if path.exists() and not path.is_file():
        return f"expected a file, got {path}, which is something else"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return f"expected a file that may be written, got {path}"
    if importlib.util.find_spec("matplotlib") is None:
        return "expected matplotlib to be installed: pip install 'verified-mixture-of-attention[plots]'"
    return None
