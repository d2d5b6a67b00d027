"""Options of `python -m optimized.train`, each checked by itself. What they come to together: `plan`."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from optimized.prove.arguments import Parser, integer, positive
from optimized.prove.arguments import seed as seed_type
from optimized.train.ranks import STYLES
from optimized.train.sizes import SHARED, SIZES
from optimized.transformer.config import KINDS

SOLVERS = ("sigmoid", "iterative", "exact")
DTYPES = ("float32", "bfloat16")  # float16 needs a scaler of losses

DESCRIPTION = """Train a causal language model of Mixture of Attention layers on text, and show
what became of it. A run with --out goes on where it was stopped. Start it by
torchrun for several devices."""
STATUS = """exit status: 0 the loss fell and the past is unmoved by the future, 1 one of the
two failed, 2 wrong usage, 130 stopped by Ctrl-C (143 by SIGTERM), with a
checkpoint"""


def number(least: float, most: float, above: bool = False) -> Callable[[str], float]:
    """above: more than `least`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value or (value == least and not above)) or value > most or math.isinf(value):
            span = f"{'more than' if above else 'at least'} {least:g}" + f" and at most {most:g}" * math.isfinite(most)
            raise argparse.ArgumentTypeError(f"expected a number of {span}, got {text!r}")
        return value

    return parse


def kinds(text: str) -> list[str]:
    found = text.split(",")
    if not all(kind in KINDS for kind in found):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(KINDS)} with commas between, got {text!r}")
    return found


def count(text: str) -> int:
    return integer(text, 0, 2**31 - 1)


def two_or_more(text: str) -> int:
    return integer(text, 2, 2**31 - 1)


positive_number, not_negative = number(0, math.inf, above=True), number(0, math.inf)
probability, share = number(0, 0.999), number(0.001, 0.5)

TRAINING: list[tuple[str, list[tuple[str, dict[str, Any]]]]] = [
    ("text", [
        ("--library", {"action": argparse.BooleanOptionalAction, "help": "without TEXT: Python's sources too"}),
        ("--tokenizer", {"type": Path, "metavar": "FILE", "help": "of the library tokenizers (default: bytes)"}),
        ("--validation", {"type": share, "metavar": "SHARE", "help": "of the text, from its end"}),
    ]),
    ("model", [
        ("--size", {"choices": SIZES, "help": "defaults of all that follows (default: small on cuda, else tiny)"}),
        ("--layers", {"type": kinds, "metavar": "KINDS", "help": f"{', '.join(KINDS)}: repeated over the depth"}),
        ("--depth", {"type": positive, "metavar": "L", "help": "layers"}),
        ("--dim", {"type": positive, "metavar": "D", "help": "model dimension"}),
        ("--heads", {"type": positive, "metavar": "H", "help": "of attention (default: D / d)"}),
        ("--dim-head", {"type": positive, "metavar": "d", "help": "dimension of a head"}),
        ("--window", {"type": positive, "metavar": "w", "help": "of local attention; also the length of a block"}),
        ("--experts", {"type": positive, "metavar": "E", "help": "of a mixture layer"}),
        ("--queries", {"type": positive, "metavar": "Kq", "help": "tokens of a block that an expert updates, about"}),
        ("--memory", {"type": positive, "metavar": "K", "help": "tokens that an expert remembers"}),
        ("--capacity", {"type": positive_number, "metavar": "C", "help": "slots of an expert over its Kq"}),
        ("--solver", {"choices": SOLVERS, "help": "of scores"}),
        ("--dropout", {"type": probability, "metavar": "P", "help": "in training"}),
    ]),
    ("training", [
        ("--context", {"type": two_or_more, "metavar": "N", "help": "tokens of a sequence"}),
        ("--batch", {"type": positive, "metavar": "B", "help": "sequences of a step, of all devices together"}),
        ("--steps", {"type": positive, "metavar": "S", "help": "in all"}),
        ("--rate", {"type": positive_number, "metavar": "R", "help": "of learning, at its highest"}),
        ("--warmup", {"type": count, "metavar": "S", "help": "steps in which it rises (default: a tenth)"}),
        ("--decay", {"type": not_negative, "metavar": "R", "help": "of matrices, by AdamW"}),
        ("--clip", {"type": positive_number, "metavar": "NORM", "help": "of all gradients, at most"}),
        ("--evaluate-every", {"type": positive, "metavar": "S", "help": "steps (default: a tenth)"}),
        ("--evaluate-tokens", {"type": positive, "metavar": "T", "help": "of the validation part, about"}),
        ("--log-every", {"type": positive, "metavar": "S", "help": "steps between two points of the curve"}),
    ]),
    ("how it is computed", [
        ("--accumulate", {"type": positive, "metavar": "A", "help": "parts of a batch, one after the other"}),
        ("--compile", {"action": "store_true", "help": "by torch.compile"}),
        ("--checkpointing", {"action": "store_true", "help": "compute blocks again in the backward"}),
        ("--deterministic", {"action": "store_true", "help": "PyTorch's deterministic algorithms; a CPU needs none"}),
        ("--parallel", {"choices": STYLES, "help": "over processes of torchrun (default: ddp)"}),
        ("--checkpoint-every", {"type": positive, "metavar": "S", "help": "steps (default: as --evaluate-every)"}),
    ]),
]  # fmt: skip


def parser_of() -> Parser:
    sizes = "\n".join(
        textwrap.fill(f"  {name}: {size.described}", 79, subsequent_indent="    ") for name, size in SIZES.items()
    )
    parser = Parser(
        prog="python -m optimized.train",
        usage="%(prog)s [TEXT ...] [--out FOLDER] [options]\n"
        "       %(prog)s --out FOLDER --check [TEXT ...]\n"
        "       %(prog)s --out FOLDER --generate N [--prompt TEXT]",
        description=DESCRIPTION,
        epilog=f"sizes:\n{sizes}\n\n{STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("text", nargs="*", type=Path, metavar="TEXT", help="UTF-8 files, folders (default: what comes with Python)")
    add("--out", type=Path, metavar="FOLDER", help="checkpoint, curve and model; nothing is kept without it")
    add("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    add("--dtype", choices=DTYPES, help="of autocast (default: bfloat16 on cuda, else float32)")
    add("--seed", type=seed_type, default=0, metavar="S", help="of all that is random (default: %(default)s)")
    add("--no-color", action="store_true")
    for title, options in TRAINING:
        group = parser.add_argument_group(title)
        for name, how in options:
            group.add_argument(name, **_explained(name, how))
    group = parser.add_argument_group("of a trained model in --out")
    group.add_argument("--check", action="store_true", help="replace the future of a text, and see the past unmoved")
    group.add_argument("--generate", type=positive, metavar="N", help="write N tokens")
    group.add_argument("--prompt", metavar="TEXT", help="that they go on with")
    group.add_argument("--temperature", type=not_negative, metavar="T", help="0: the likeliest (default: 0.8)")
    group.add_argument("--top-p", type=number(0, 1, above=True), metavar="P", help="of the likeliest (default: 1)")
    return parser


def _explained(name: str, how: dict[str, Any]) -> dict[str, Any]:
    """With the default, where it does not depend on the size."""
    default = SHARED.get(_named(name))
    if default is None or "default" in how["help"]:
        return how
    return {**how, "help": f"{how['help']} (default: {','.join(default) if isinstance(default, list) else default})"}


def _named(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Parser]:
    """Exits with status 2 on an error. An option that does not go with what is asked for is one."""
    parser = parser_of()
    args = parser.parse_args(argv)
    asked = "--generate" if args.generate is not None else "--check" if args.check else None
    if asked:
        if args.generate is not None and args.check:
            parser.error("--check: expected without --generate")
        if args.out is None:
            parser.error(f"--out: expected a folder with a trained model for {asked}, got none")
        for _, options in TRAINING:
            for name, _ in options:
                takes = asked == "--check" and name in ("--library", "--context")
                if getattr(args, _named(name)) not in (None, False) and not takes:
                    parser.error(f"{name}: expected without {asked}, which trains nothing")
    if args.generate is None:
        for name in ("prompt", "temperature", "top_p"):
            if getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')}: expected with --generate")
    elif args.text:
        parser.error(f"TEXT: expected none with --generate, got {args.text[0]} (--prompt TEXT is what it goes on with)")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a device that is there, got 'cuda' without CUDA")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args, parser
