"""`python -m optimized [FILE]`: the layer on a real text, held against the reference stage by stage.

Our Triton kernels are held against PyTorch's own beside it, without a GPU in Triton's interpreter.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.progress import Progress

from optimized.prove import causal, plot, processes, report
from optimized.prove.arguments import parse
from optimized.prove.console import make_console
from optimized.prove.interpreter import run_kernels
from optimized.prove.setup import prepare
from optimized.prove.stages import STEPS, prove
from optimized.prove.text import visible


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if every row is within its budget or bound, else 1. Raises SystemExit(2) for wrong usage."""
    args, text = parse(argv)
    started = time.perf_counter()
    console = make_console(not args.no_color)
    if args.causal:
        return causal.run(args, text, console)
    if args.processes is not None:
        return processes.run(args, text, console)
    console.print(report.header(args, text, report.described(args)))
    console.print()
    setup = prepare(args, text)
    proofs = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=STEPS * len(args.dtype) + 1)
        for name in args.dtype:

            def tick(what: str, name: str = name) -> None:
                progress.update(task, description=f"{what}, {name}", advance=1)

            proofs.append(prove(setup, name, tick))
        tick("kernels", "float64")
        where, kernels, broken = run_kernels(setup)
    rows = [row for proof in proofs for row in proof.rows]
    console.print(report.results(rows, args.device, console.width))
    for own in dict.fromkeys(proof.backends for proof in proofs):
        names = ", ".join(name for name, proof in zip(args.dtype, proofs) if proof.backends == own)
        console.print(f"Backends of the layer's own call, {names}: {own}")
    for row in rows:
        if row.note:
            console.print(f"Announced to the comparison, {row.stage}, {row.dtype}: {row.note}", markup=False)
    console.print()
    console.print(report.kernels(kernels, where, console.width))
    console.print()
    report.show_routing(console, text, proofs[0].routes)
    if args.plot is not None:
        queries, keys_values = proofs[0].routes
        plot.draw(args.plot, text, queries, keys_values, proofs[0].soft[0], proofs[0].mass)
        console.print(f"Routing map: {visible(str(args.plot))}", markup=False)
    failures = [row.failure for row in rows if row.failure]
    failures += [f"kernels of {row.stage}: unlike PyTorch's" for row in kernels if not row.equal]
    failures += [broken] if broken else []
    for failure in failures:
        console.print(f"\n{failure}", style="red", markup=False)
    seconds = time.perf_counter() - started
    if failures:
        total = len(rows) + len(kernels) + bool(broken)
        console.print(f"\n[bold red]FAIL[/]  {len(failures)} of {total} rows, {seconds:.1f} s")
        return 1
    equal = f", kernels of {len(kernels)} stages equal PyTorch's" * bool(kernels)
    console.print(f"\n[bold green]PASS[/]  {len(rows)} rows within budget{equal}, {seconds:.1f} s")
    return 0
