"""`python -m optimized.train [TEXT ...]`: trains, and what else can be asked for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console

from optimized.prove.arguments import DTYPES, Parser
from optimized.prove.console import make_console
from optimized.train import continuation, law, report, run, saved, text
from optimized.train.arguments import parse
from optimized.train.plan import plan_of, refused
from optimized.train.ranks import joined, world

CHECKED = 512  # tokens that --check looks at, unless --context says otherwise


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: as --help says. Raises SystemExit(2) for wrong usage."""
    args, parser = parse(argv)
    console = make_console(not args.no_color)
    console.quiet = world()[0] > 0
    try:
        if args.generate is not None:
            return _generate(args, parser, console)
        if args.check:
            return _check(args, parser, console)
        plan = plan_of(args, parser)
        with joined(args.device) as ranks, run.deterministic(args.deterministic):
            return run.run(plan, ranks, args.out, console)
    except KeyboardInterrupt:
        console.print("\nInterrupted. What was written before is whole.", style="yellow")
        return 130


def _generate(args: argparse.Namespace, parser: Parser, console: Console) -> int:
    with refused(parser, "--out"):
        model, tokenizer = saved.load(args.out, torch.device(args.device))
    prompt = "The " if args.prompt is None else args.prompt
    temperature = 0.8 if args.temperature is None else args.temperature
    top_p = 1.0 if args.top_p is None else args.top_p
    with refused(parser, "--prompt"):
        tokens = continuation.prompt_of(prompt, tokenizer).to(args.device)
    with _mixed(args):
        continuation.run(console, model, tokenizer, prompt, tokens, args.generate, temperature, top_p, args.seed)
    return 0


def _check(args: argparse.Namespace, parser: Parser, console: Console) -> int:
    with refused(parser, "--out"):
        model, tokenizer = saved.load(args.out, torch.device(args.device))
    with refused(parser, "TEXT"):
        read = text.read(args.text, bool(args.library))
        wanted = args.context or CHECKED
        numbers = tokenizer.encode(read.data)[-wanted:].long()[None].to(args.device)
        if numbers.shape[1] < 2:
            raise ValueError(f"expected two tokens at least, got {numbers.shape[1]} in {read.name}")
    console.print(
        report.header(
            {"text": f"the last {numbers.shape[1]} tokens of {read.name}", "model": report.model(model.config)}
        )
    )
    console.print()
    with torch.no_grad(), _mixed(args):
        found = law.cuts(model, numbers, model.config.vocab_size, model.config.window or 1)
    console.print(law.table(found, console.width))
    return report.verdict(console, [cut.failure for cut in found if cut.failure], report.unmoved(found))


def _mixed(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device, DTYPES[args.dtype], enabled=args.dtype != "float32")
