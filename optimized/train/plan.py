"""What the options come to, with the text: all checked before any work."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from optimized.prove.arguments import Parser
from optimized.train import checkpoints, counts, data, saved, text, tokens
from optimized.train.data import Split
from optimized.train.ranks import world
from optimized.train.settings import Settings
from optimized.train.sizes import SHARED, SIZES
from optimized.train.text import Text
from optimized.train.tokens import Tokenizer
from optimized.train.trainer import Way
from optimized.transformer import TransformerConfig


class Plan(NamedTuple):
    """parameters, macs: of the model; macs a token, forward. state: of a checkpoint to go on from."""

    text: Text
    tokenizer: Tokenizer
    tokenizer_file: Path | None
    split: Split
    settings: Settings
    way: Way
    parameters: int
    macs: float
    bytes_per_token: float
    checkpoint_every: int
    state: dict[str, Any] | None


def plan_of(args: argparse.Namespace, parser: Parser) -> Plan:
    """Exits with status 2 on an error."""
    _defaults(args)
    way = _way(args, parser)
    with refused(parser, "--tokenizer"):
        tokenizer = tokens.tokenizer_of(args.tokenizer)
    with refused(parser, "TEXT"):
        read = text.read(args.text, args.library)
        numbers = tokenizer.encode(read.data)
        split = data.split(numbers, args.validation, args.context)
    with refused(parser, "model"):
        config = _config(args, tokenizer.vocab_size)
        macs = counts.macs_per_token(config, args.context)
    settings = Settings(
        model=config, dtype=args.dtype, seed=args.seed, text=data.digest(numbers),
        **{name: getattr(args, name) for name in _OF_TRAINING},
    )  # fmt: skip
    state = None
    if args.out is not None:
        with refused(parser, "--out"):
            _folder(args.out)
            state = checkpoints.read(args.out, settings)
    parameters = counts.parameters_of(config)
    per_token = len(read.data) / len(numbers)
    every = args.checkpoint_every or args.evaluate_every
    return Plan(read, tokenizer, args.tokenizer, split, settings, way, parameters, macs, per_token, every, state)


_OF_TRAINING = (
    "context", "batch", "steps", "rate", "warmup", "decay", "clip", "validation", "evaluate_every", "evaluate_tokens",
    "log_every",
)  # fmt: skip


@contextmanager
def refused(parser: Parser, argument: str) -> Iterator[None]:
    """Errors become one of this argument, unless they name one themselves."""
    try:
        yield
    except ImportError as error:
        needs = {"TEXT": "expected a file, since this Python comes without pydoc_data.topics"}
        parser.error(f"{argument}: {needs.get(argument, f'expected the library {error.name} to be installed')}")
    except (OSError, TypeError, ValueError) as error:
        parser.error(f"{argument}: {error}")


def _defaults(args: argparse.Namespace) -> None:
    args.size = args.size or ("small" if args.device == "cuda" else "tiny")
    for name, value in {**SHARED, **SIZES[args.size]._asdict()}.items():
        if hasattr(args, name) and getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("warmup", "evaluate_every"):
        if getattr(args, name) is None:
            setattr(args, name, max(args.steps // 10, 1))


def _way(args: argparse.Namespace, parser: Parser) -> Way:
    _, size = world()
    if args.parallel and size == 1:
        parser.error(f"--parallel: expected several processes, started by torchrun, got {args.parallel!r} with one")
    parts = size * args.accumulate
    if args.batch % parts:
        parser.error(f"--batch: expected a multiple of {parts} (processes times --accumulate), got {args.batch}")
    if args.warmup > args.steps:
        parser.error(f"--warmup: expected at most the {args.steps} --steps, got {args.warmup}")
    style = (args.parallel or "ddp") if size > 1 else None
    return Way(style, args.accumulate, args.compile, args.checkpointing)


def _config(args: argparse.Namespace, vocab_size: int) -> TransformerConfig:
    layers = tuple(args.layers[i % len(args.layers)] for i in range(args.depth))
    mixture: dict[str, Any] = {}
    if "mixture" in layers:
        mixture = {
            "num_experts": args.experts,
            "num_routed_queries": args.queries,
            "num_routed_key_values": args.memory,
            "capacity_factor": args.capacity,
            "solver": args.solver,
        }
        if args.solver != "sigmoid":
            mixture["straight_through"] = True  # a cache, which generation needs, takes no other scores of a solver
    window = args.window if {"mixture", "local"} & set(layers) else None
    return TransformerConfig(
        vocab_size=vocab_size, dim=args.dim, layers=layers, heads=args.heads, dim_head=args.dim_head,
        window=window, mixture=mixture, dropout=args.dropout,
    )  # fmt: skip


def _folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise ValueError(f"expected a folder that may be written, got {path}")
    others = [name for name in (saved.CONFIG, saved.STATE) if (path / name).exists()]
    if others and not (path / checkpoints.FILE).exists():
        raise ValueError(
            f"expected the folder of a run, or an empty one, got {path} with {' and '.join(others)} of another"
        )
