"""`python -m optimized --causal`: a text through the strictly causal layer, and proof that no token sees a later one.

The future of a cut is replaced, by noise and by other things, and what came before must not change in a single bit,
outputs and gradients. Then the text is decoded in pieces from a cache, and must come out as it did at once.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.text import Text as Styled
from torch import Tensor

import reference
from optimized.autoregressive import MixtureOfAutoregressiveAttention
from optimized.prove import report
from optimized.prove.arguments import DTYPES
from optimized.prove.tables import Column, Form, fitted
from optimized.prove.text import Text, embed
from optimized.routing import Routes
from reference.testing import assert_matches

FUTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": torch.randn_like,
    "the same words, reversed": lambda x: x.flip(1),
    "1e4 times as large": lambda x: x * 1e4,
    "not a number": lambda x: torch.full_like(x, torch.nan),
}
BLOCKS = 8  # that are decoded at once, before single tokens
STEPS = 2 * len(FUTURES) + 3  # that progress shows, for each dtype


def described(args: argparse.Namespace) -> str:
    return (
        f"strictly causal: D {args.dim}, {args.heads} heads of {args.dim // args.heads}, {args.experts} experts, each "
        f"with a memory of {args.slots} and about {max(args.window // 4, 1)} queries of {args.window} tokens, window "
        f"{args.window}, seed {args.seed}"
    )


class Cut(NamedTuple):
    """What came out before the cut, with its future replaced. outputs, gradients: how many numbers changed."""

    dtype: str
    at: int
    future: str
    outputs: int
    gradients: int

    @property
    def failure(self) -> str | None:
        if not self.outputs + self.gradients:
            return None
        return (
            f"{self.dtype}, future of token {self.at} replaced by {self.future}: {self.outputs} outputs and "
            f"{self.gradients} gradients before it changed"
        )


class Proof(NamedTuple):
    """verdict: of decoding against the whole, as a fraction of its budget, or FAIL. held: bytes of the cache."""

    cuts: list[Cut]
    verdict: str
    failure: str | None
    held: int
    routes: tuple[Routes, Routes]


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Of the layer. An expert takes about a quarter of each block's tokens."""
    return {
        "dim": args.dim,
        "heads": args.heads,
        "dim_head": args.dim // args.heads,
        "num_experts": args.experts,
        "num_routed_queries": max(args.window // 4, 1),
        "num_routed_key_values": args.slots,
        "local_attn_window_size": args.window,
    }


def prove(args: argparse.Namespace, text: Text, name: str, tick: Callable[[str], None]) -> Proof:
    dtype = DTYPES[name]
    n = len(text.tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        state = reference.MixtureOfAutoregressiveAttention(**arguments(args)).state_dict()
        state["null_tokens"] = torch.randn_like(state["null_tokens"])  # zeros would hide that they are added
    layer = MixtureOfAutoregressiveAttention(**arguments(args), device=args.device, dtype=dtype)
    layer.load_state_dict({key: value.to(dtype) for key, value in state.items()})
    x = embed(text.tokens, args.dim, args.seed)[None].to(args.device, dtype)
    generator = torch.Generator().manual_seed(args.seed)
    cotangent = torch.randn(x.shape, generator=generator).to(args.device, dtype)

    tick("the text as it is")
    with torch.no_grad():
        _, cache, (queries, memory) = layer(x, use_cache=True, return_routes=True)
    cuts = []
    for at in (n // 2 + 1, n // 3 // args.window * args.window):
        before = _past(layer, x, cotangent, at)
        for future, replaced in FUTURES.items():
            tick(f"token {at}, future: {future}")
            other = torch.cat((x[:, :at], replaced(x[:, at:])), 1)
            found = _past(layer, other, cotangent, at)
            changed = [int((a != b).sum()) for a, b in zip(found, before)]
            cuts.append(Cut(name, at, future, *changed))
    tick("decoding")
    verdict, failure = _decoded(layer, state, x, args)
    routed = Routes(queries.indices.flatten(2), queries.mask.flatten(2), queries.scores.flatten(2), queries.logits)
    last = Routes(memory.positions[:, :, -1], memory.mask[:, :, -1], memory.scores[:, :, -1], memory.logits)
    return Proof(cuts, verdict, failure, _bytes(cache), (routed, last))


def _past(layer: MixtureOfAutoregressiveAttention, x: Tensor, g: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """Output before a token, and the gradient of what comes before it there."""
    x = x.detach().requires_grad_()
    out = layer(x)[:, :at]
    (gradient,) = torch.autograd.grad(out, x, g[:, :at])
    return out.detach(), gradient[:, :at]


def _decoded(
    layer: MixtureOfAutoregressiveAttention, state: dict[str, Tensor], x: Tensor, args: argparse.Namespace
) -> tuple[str, str | None]:
    """Some blocks at once, a piece, then token by token over two borders, against the whole by its budget."""
    n = x.shape[1]
    first = min(n // 2, BLOCKS * args.window)
    pieces = [first, min(args.window // 2 + 1, n - first)]
    pieces += [1] * min(2 * args.window + 2, n - sum(pieces))
    start, parts, cache = 0, [], None
    with torch.no_grad():
        for size in pieces:
            out, cache = layer(x[:, start : start + size], cache=cache, use_cache=True)
            parts.append(out)
            start += size
        exact, plain = (_of_reference(state, x[:, :start], args, precision) for precision in (torch.float64, x.dtype))
    decoded = torch.cat(parts, 1)
    scale = exact.abs().max().item() * args.dim**0.5
    try:
        match = assert_matches(decoded, exact, plain, stage="mixture", name="decoded", scale=scale)
    except AssertionError as error:
        return "FAIL", str(error)
    return f"{match.fraction:.2f}", None


def _of_reference(state: dict[str, Tensor], x: Tensor, args: argparse.Namespace, dtype: torch.dtype) -> Tensor:
    layer = reference.MixtureOfAutoregressiveAttention(**arguments(args), device=x.device, dtype=dtype)
    layer.load_state_dict({key: value.to(x.dtype).to(dtype) for key, value in state.items()})
    return layer(x.to(dtype))


def _bytes(cache: Any) -> int:
    return sum(t.numel() * t.element_size() for t in vars(cache).values() if isinstance(t, Tensor))


def table(cuts: list[Cut], width: int) -> RenderableType:
    rows = []
    for cut in cuts:
        verdict = Styled("FAIL", style="bold red") if cut.failure else Styled("identical", style="green")
        changed = [Styled(str(cut.outputs)), Styled(str(cut.gradients))]
        rows.append([Styled(str(cut.at)), Styled(cut.future), Styled(cut.dtype), *changed, verdict])
    columns = [Column("cut at", right=True), Column("future replaced by", room=12), Column("dtype")]
    columns += [Column("outputs\nchanged", right=True), Column("gradients\nchanged", right=True), Column("the past")]
    return fitted(width, "No token sees a later one", None, Form(columns, rows))


def run(args: argparse.Namespace, text: Text, console: Console) -> int:
    """Exit status, as of the main job."""
    started = time.perf_counter()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for in deterministic mode
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # gradients that are bit for bit the same need it
    try:
        return _run(args, text, console, started)
    finally:
        torch.use_deterministic_algorithms(before)


def _run(args: argparse.Namespace, text: Text, console: Console, started: float) -> int:
    console.print(report.header(args, text, described(args)))
    console.print()
    proofs = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=STEPS * len(args.dtype))
        for name in args.dtype:

            def tick(what: str, name: str = name) -> None:
                progress.update(task, description=f"{what}, {name}", advance=1)

            proofs.append(prove(args, text, name, tick))
    cuts = [cut for proof in proofs for cut in proof.cuts]
    console.print(table(cuts, console.width))
    for name, proof in zip(args.dtype, proofs):
        n = len(text.tokens)
        dense = 2 * n * args.dim * DTYPES[name].itemsize
        console.print(
            f"Decoded in pieces from a cache, {name}: {proof.verdict} of its budget. "
            f"The cache holds {proof.held / 2**20:.2f} MiB at any length, dense attention's {dense / 2**20:.2f} here."
        )
    console.print()
    report.show_routing(console, text, proofs[0].routes)
    failures = [cut.failure for cut in cuts if cut.failure] + [proof.failure for proof in proofs if proof.failure]
    for failure in failures:
        console.print(f"\n{failure}", style="red", markup=False)
    seconds = time.perf_counter() - started
    if failures:
        console.print(f"\n[bold red]FAIL[/]  {len(failures)} of {len(cuts) + len(proofs)}, {seconds:.1f} s")
        return 1
    console.print(f"\n[bold green]PASS[/]  {len(cuts)} futures replaced, the past unchanged, {seconds:.1f} s")
    return 0
