"""What `python -m optimized.train` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text as Styled

from optimized.prove.environment import hardware, versions
from optimized.prove.tables import Column, Form, fitted
from optimized.train.law import Cut
from optimized.train.plan import Plan
from optimized.train.ranks import Ranks
from optimized.transformer import TransformerConfig


def described(plan: Plan, ranks: Ranks) -> dict[str, str]:
    s, way, split = plan.settings, plan.way, plan.split
    per_step = f"{s.batch} x {s.context} tokens"
    if way.accumulate > 1:
        per_step += f" in {way.accumulate} parts"
    how = [s.dtype] + ["compiled"] * way.compiled + ["activation checkpointing"] * way.checkpointing
    over = f", {way.style} over {ranks.size} processes" if way.style else ""
    gpus = f", {ranks.size} of them" * (ranks.size > 1 and ranks.device.type == "cuda")
    return {
        "text": f"{plan.text.name}: {len(plan.text.data):,} bytes, as {plan.tokenizer.name}: "
        f"{len(split.train):,} tokens to train on, {len(split.validation):,} to validate",
        "model": model(s.model),
        "size": f"{plan.parameters:,} parameters, {plan.macs:,.0f} multiply-adds a token forward",
        "training": f"{s.steps} steps of {per_step}, AdamW at {s.rate:g} after {s.warmup}, "
        f"decay {s.decay:g}, clipped at {s.clip:g}, seed {s.seed}, {', '.join(how)}{over}",
        "hardware": hardware(ranks.device) + gpus,
        "versions": versions(),
    }  # fmt: skip


def model(c: TransformerConfig) -> str:
    kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(c.layers).items())
    said = f"D {c.dim}, {kinds} layers, {c.heads} heads of {c.dim_head}"
    if c.window is not None:
        said += f", window {c.window}"
    if c.mixture:
        m = c.mixture
        said += (
            f", {m['num_experts']} experts, each with a memory of {m['num_routed_key_values']} and about "
            f"{m['num_routed_queries']} queries of {c.window} tokens, scores: {m['solver']}"
        )
    return said


def header(rows: dict[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in rows.items():
        grid.add_row(Styled(label, style="bold"), Styled(value))
    return grid


def spread(noted: dict[str, Any]) -> str:
    """Load of the busiest and the idlest expert, over the mean of their layer."""
    layers = [[share * len(layer) for share in layer] for layer in noted["loads"]]
    if not layers:
        return "-"
    return f"{min(map(min, layers)):.2f} to {max(map(max, layers)):.2f}"


def line(noted: dict[str, Any]) -> str:
    return f"loss {noted['loss']:.4f}, {noted['tokens_per_second']:,.0f} tokens/s, loads {spread(noted)}"


def evaluated(found: dict[str, Any], steps: int, noted: dict[str, Any] | None) -> str:
    """noted: of training, at the same step."""
    said = f"step {found['step']} of {steps}: validation loss {found['loss']:.4f}"
    return said if noted is None else f"{said}, training {line(noted)}"


def losses(curve: dict[str, list[dict[str, Any]]], width: int) -> RenderableType:
    """Of the validation part, the training loss beside it, from the first to the last."""
    noted = {n["step"]: n for n in curve["training"]}
    rows = []
    for found in curve["validation"]:
        beside = noted.get(found["step"])
        more = ["", "", "", ""]
        if beside is not None:
            speed = f"{beside['tokens_per_second']:,.0f}"
            more = [
                f"{beside['loss']:.4f}",
                speed,
                spread(beside),
                f"{100 * max(beside['without_slot'], default=0):.1f} %",
            ]
        rows.append(
            [*map(Styled, (str(found["step"]), f"{found['loss']:.4f}", f"{found['bits_per_byte']:.4f}", *more))]
        )
    names = (
        "step",
        "validation\nloss, nats",
        "bits\na byte",
        "training\nloss",
        "tokens\na second",
        "loads over\ntheir mean",
        "without\na slot",
    )
    columns = [Column(name, right=True) for name in names]
    caption = (
        "loads: tokens that the idlest and the busiest expert of any layer took, over the mean of its layer. "
        "without a slot: tokens that an expert would have taken, in the layer where this is most."
    )
    return fitted(width, "How the loss fell", caption, Form(columns, rows))


def unmoved(cuts: list[Cut]) -> str:
    return f"{len(cuts)} futures replaced and the past unmoved"


def verdict(console: Console, failures: Sequence[str], passed: str) -> int:
    """Exit status."""
    for failure in failures:
        console.print(f"\n{failure}", style="red", markup=False)
    if failures:
        console.print("\n[bold red]FAIL[/]")
        return 1
    console.print(f"\n[bold green]PASS[/]  {passed}")
    return 0
