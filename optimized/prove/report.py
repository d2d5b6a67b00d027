"""What `python -m optimized` prints."""

from __future__ import annotations

import argparse

import torch
from jaxtyping import Bool, Float
from rich.console import Console, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text as Styled
from torch import Tensor

from optimized.prove.decisions import picked
from optimized.prove.environment import hardware, versions
from optimized.prove.kernels import BOUND, Compared
from optimized.prove.stages import Row
from optimized.prove.tables import Column, Form, fitted
from optimized.prove.text import Text, typical
from optimized.routing import Routes

EXCERPT = 120  # tokens
# No red beside green; the first four differ in lightness, too, and are seen on a dark terminal.
COLOURS = ("#2f7fd0", "#e69f00", "#c44fc4", "#8c8c8c", "#7cc6f2", "#f0e442", "#8a6de9", "#a8870a")
SUPERSCRIPT = str.maketrans("0123456789", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


def colour(expert: int) -> str:
    return COLOURS[expert % len(COLOURS)]


def described(args: argparse.Namespace) -> str:
    return (
        f"D {args.dim}, {args.heads} heads of {args.dim // args.heads}, {args.experts} experts, {args.slots} slots "
        f"each for queries and for keys/values, window {args.window}, cosine_sim_routing, seed {args.seed}"
    )


def header(args: argparse.Namespace, text: Text, layer: str) -> Table:
    """layer: in words."""
    n = len(text.tokens)
    of = f"the first {n} tokens" if text.more else f"all {n} tokens"
    if n < args.tokens:
        of += f" (fewer than the {args.tokens} asked for)"
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in (
        ("text", f"{text.name}: {of}, {len(set(text.tokens))} distinct"),
        ("layer", layer),
        ("hardware", hardware(args.device)),
        ("versions", versions()),
    ):
        grid.add_row(Styled(label, style="bold"), Styled(value))
    return grid


def results(rows: list[Row], device: torch.device, width: int) -> RenderableType:
    memory = "torch.cuda's allocator" if device.type == "cuda" else "resident memory of the process"
    caption = (
        "worst / budget: the largest error over what reference.testing allows; 1 is the limit. ref.: the reference in "
        "the same dtype, with this package's decisions handed to it; opt.: this package. Time, and peak memory above "
        f"the start ({memory}), stand in the last row of what was measured together; gradients: forward and backward."
    )
    wide, narrow = [], []
    for row in rows:
        verdict = Styled(row.verdict, style="bold red" if row.failure else "green")
        times, memories = [Styled("")] * 2, [Styled("")] * 2
        if row.measured is not None:
            times = [Styled(f"{m.milliseconds:.1f}") for m in row.measured]
            memories = [Styled("n/a" if m.mebibytes is None else f"{m.mebibytes:.0f}") for m in row.measured]
        wide.append([Styled(row.stage), Styled(row.backend), Styled(row.dtype), verdict, *times, *memories])
        both = [Styled("\n").join(pair) for pair in (times, memories)]
        narrow.append([Styled(f"{row.stage}\n  {row.backend}, {row.dtype}"), verdict, *both])
    ends = {i for i, row in enumerate(rows) if i + 1 == len(rows) or rows[i + 1].dtype != row.dtype}
    names = [Column("stage"), Column("backend"), Column("dtype")]
    names += [Column(name, right=True) for name in ("worst / budget", "ref. ms", "opt. ms", "ref. MiB", "opt. MiB")]
    few = [Column("stage\n  backend, dtype")]
    few += [Column(name, right=True) for name in ("worst /\nbudget", "ref. ms\nopt. ms", "ref. MiB\nopt. MiB")]
    forms = Form(names, wide, ends), Form(few, narrow, ends)
    return fitted(width, "Against the reference in float64", caption, *forms)


def kernels(rows: list[Compared], where: str, width: int) -> RenderableType:
    caption = (
        f"Largest difference over the largest element, forward and backward, in float64; the bound is {BOUND:g}. "
        "Their registers and shared memory: docs/generated/compilation.md."
    )
    wide, narrow = [], []
    for row in rows:
        verdict = Styled("pass", style="green") if row.equal else Styled("FAIL", style="bold red")
        found = [Styled(f"{row.values:.1e}"), Styled(f"{row.gradients:.1e}"), verdict]
        wide.append([Styled(row.stage), Styled(row.kernels), *found])
        narrow.append([Styled(f"{row.stage}\n  {row.kernels}"), *found])
    figures = [Column(name, right=True) for name in ("values", "gradients", "verdict")]
    forms = (
        Form([Column("stage"), Column("kernels"), *figures], wide),
        Form([Column("stage\n  kernels"), *figures], narrow),
    )
    return fitted(width, f"Our Triton kernels against PyTorch's ({where})", caption if rows else None, *forms)


def show_routing(console: Console, text: Text, routes: tuple[Routes, Routes]) -> None:
    """An excerpt coloured by the experts that picked its tokens, and what each expert picked. routes: of one item."""
    plain = console.no_color or console.color_system is None
    queries, keys_values = (picked(r)[0].cpu() for r in routes)
    logits = routes[0].logits[0].cpu()
    where, shown = excerpt(text, queries, logits, plain)
    console.print(Styled(f"Who picked what as a query ({where})", style="italic"))
    if plain:
        console.print("superscripts: the experts that picked the token; none: no expert")
    else:
        legend = [Styled(f"expert {e + 1}", style=colour(e)) for e in range(len(logits))]
        legend += [Styled("several (colour: the highest logit)", style="bold underline"), Styled("none", style="dim")]
        console.print(Styled("  ").join(legend))
    console.print(shown)
    console.print()
    console.print(experts_table(text, queries, keys_values, logits, console.width))
    counts = enumerate(queries.sum(0).bincount().tolist())
    console.print("tokens by number of experts that picked them: " + ", ".join(f"{n}: {count}" for n, count in counts))


def excerpt(text: Text, chosen: Bool[Tensor, "E N"], logits: Float[Tensor, "E N"], plain: bool) -> tuple[str, Styled]:
    """Legend and text of the stretch in which the expert seen least is seen most. plain: superscripts for colours."""
    length = min(EXCERPT, len(text.tokens))
    start = int(chosen.float().unfold(-1, length, 1).sum(-1).amin(0).argmax())
    best = logits.masked_fill(~chosen, -torch.inf).argmax(0)
    shown = Styled()
    for i in range(start, start + length):
        owners = chosen[:, i].nonzero().flatten().tolist()
        style = Style(dim=True)
        if owners:
            style = Style(color=colour(int(best[i])), bold=len(owners) > 1, underline=len(owners) > 1)
        shown.append(" " * (text.spaced[i] and i > start))
        shown.append(text.tokens[i], None if plain else style)
        if plain:
            shown.append("\u00b7".join(str(e + 1) for e in owners).translate(SUPERSCRIPT))
    return f"tokens {start + 1} to {start + length}", shown


def experts_table(
    text: Text,
    queries: Bool[Tensor, "E N"],
    keys_values: Bool[Tensor, "E N"],
    logits: Float[Tensor, "E N"],
    width: int,
) -> RenderableType:
    """Load of each expert, the share of the text's distinct words that it queries with, and its most typical words."""
    rows = []
    distinct = len(set(text.tokens))
    for e, (q, kv) in enumerate(zip(queries, keys_values)):
        words = {text.tokens[i] for i in q.nonzero().flatten().tolist()}
        rows.append(
            [
                Styled(f"expert {e + 1}", style=colour(e)),
                *(Styled(str(int(count))) for count in (q.sum(), kv.sum(), (q & kv).sum())),
                Styled(f"{100 * len(words) / distinct:.0f} %"),
                Styled(", ".join(typical(text.tokens, logits[e], 6))),
            ]
        )
    forms = [
        Form(
            [
                Column("expert"),
                *(Column(name, right=True) for name in names),
                Column("most typical words (highest logits)", room=24),
            ],
            rows,
        )
        for names in (
            ("queries", "keys/values", "both", "distinct words"),
            ("queries", "keys/\nvalues", "both", "distinct\nwords"),
        )
    ]
    return fitted(width, "Experts (their routers are seeded, not trained)", None, *forms)
