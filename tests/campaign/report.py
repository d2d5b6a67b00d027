"""One HTML file about the states of some runs: on a CPU, on a GPU, of several seeds."""

from __future__ import annotations

import html as escaping
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.record import table as markdown_table

from . import plots
from .kind import DRAWN, KINDS
from .state import Part, as_ranges
from .tally import Band, Tally

Run = tuple[dict[str, Any], dict[str, Part]]

STYLE = """
body { font: 14px/1.45 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 0.7em 0 }
td, th { border: 1px solid #ccc; padding: 2px 8px; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums } code { font-size: 11px; word-break: break-all }
img { max-width: 100% } details { margin: 0.5em 0 }
"""


def place(header: dict[str, Any]) -> str:
    """Where a run was, and with which kernels."""
    kernels = header["kernels"] if header["device"] == "cuda" or header["kernels"] == "torch" else "interpreted triton"
    return f"{header['device']}, {kernels}"


def of_kind(runs: Sequence[Run], kind: str) -> list[tuple[dict[str, Any], Part]]:
    return [(header, parts[kind]) for header, parts in runs if kind in parts]


def merged(runs: Sequence[Run], kind: str) -> Tally:
    out = Tally()
    for _, part in of_kind(runs, kind):
        out.merge(part.tally)
    return out


def distinct(runs: Sequence[Run], kind: str) -> int:
    """Over all runs. The same seed draws the same cases on every device: there they count once.

    Runs of one seed have no chunk in common, or all of those of the shorter one; otherwise this is a lower bound.
    """
    digests: set[tuple[str, str]] = set()
    by_seed: dict[int, list[Part]] = {}
    for header, part in of_kind(runs, kind):
        digests.update((dtype, digest) for dtype, found in part.tally.small.items() for digest in found)
        by_seed.setdefault(header["seed"], []).append(part)
    total = len(digests)
    for parts in by_seed.values():
        large = [sum(p.tally.cases.values()) - sum(p.tally.small_cases.values()) for p in parts]
        apart = sum(len(p.done) for p in parts) == len(set().union(*(p.done for p in parts)))
        total += sum(large) if apart else max(large)
    return total


def bands(runs: Sequence[Run], kinds: Iterable[str] = KINDS) -> list[tuple[str, Band]]:
    """By kind, quantity, dtype and place; selection is exact or fails."""
    out = []
    for kind in kinds:
        found: dict[tuple[str, str, str], Band] = {}
        for header, part in of_kind(runs, kind):
            for (quantity, dtype), band in part.tally.bands.items():
                found.setdefault((quantity.replace("_", " "), dtype, place(header)), Band()).merge(band)
            for failure in part.tally.failures if kind in DRAWN else ():
                # The smallest case that failed: it counts nowhere else.
                if excess := failure.excess():
                    quantity = excess[0] + " with its own routers" * failure.message.startswith("own routers")
                    key = quantity.replace("_", " "), excess[1], place(header)
                    found.setdefault(key, Band()).keep([(excess[2], failure.snippet)])
        out += [(", ".join(key), found[key]) for key in sorted(found)]
    return out


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    lines = [f"<tr>{cells}</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(_cell(value) for value in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


class Html(str):
    """Text that is no plain text any more."""


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f'<td class="n">{value:,}</td>'
    return f"<td>{value if isinstance(value, Html) else escape(value)}</td>"


def escape(text: Any) -> str:
    return escaping.escape(str(text))


def code(text: str) -> Html:
    return Html(f"<code>{escape(text)}</code>")


def counts_table(runs: Sequence[Run]) -> str:
    rows = []
    for kind in KINDS:
        for header, part in of_kind(runs, kind):
            tally = part.tally
            of = tally.distinct()
            dtypes = ", ".join(f"{dtype} {n:,}" for dtype, n in sorted(of.items()))
            run = sum(tally.cases.values())
            rate = run / tally.seconds if tally.seconds else 0.0
            rows.append(
                (
                    kind,
                    place(header),
                    header["seed"],
                    dtypes,
                    run,
                    sum(of.values()),
                    len(tally.failures),
                    f"{rate:,.0f}",
                )
            )
    head = ("kind", "where", "seed", "distinct by dtype", "run", "distinct", "failures", "a second and process")
    total = ", ".join(f"{kind} {distinct(runs, kind):,}" for kind in KINDS if of_kind(runs, kind))
    return f"{table(head, rows)}<p>Distinct over all runs: {total}.</p>"


def environments(runs: Sequence[Run]) -> str:
    rows = []
    for header, parts in runs:
        about = header["environment"]
        words = [f"{name} {value}" for name, value in (about["hardware"] | about["versions"]).items()]
        hashes = ", ".join(f"{name} {value[:12]}" for name, value in header["hashes"].items())
        chunks = ", ".join(f"{kind} {as_ranges(part.done)}" for kind, part in parts.items())
        rows.append((place(header), header["seed"], about["commit"] or "unknown", ", ".join(words), hashes, chunks))
    return table(("where", "seed", "commit", "hardware and versions", "sha256 of the sources", "chunks"), rows)


def failures(runs: Sequence[Run]) -> str:
    found = [(kind, place(h), f) for kind in KINDS for h, part in of_kind(runs, kind) for f in part.tally.failures]
    if not found:
        return "<p>None.</p>"
    return table(("kind", "where", "what", "again"), [(k, w, f.message, code(f.snippet)) for k, w, f in found])


def worst(runs: Sequence[Run], kind: str) -> str:
    rows = [
        (name, f"{fraction:.3g}", code(snippet))
        for name, band in bands(runs, [kind])
        for fraction, snippet in band.worst
    ]
    return table(("quantity", "of the budget", "again"), rows)


def html(runs: Sequence[Run]) -> str:
    """The whole page: no file, no script and no address in it."""
    parts = [
        "<!doctype html><meta charset='utf-8'><title>Campaign</title>",
        f"<style>{STYLE}</style>",
        "<h1>Campaign</h1>",
    ]
    parts.append(
        "<p>A case is one configuration, drawn independently of all others, with its data; its rows and elements don't "
        "count. An error is a fraction of its budget (<code>reference/testing.py</code>), where 1 fails.</p>"
    )
    parts += ["<h2>Counts</h2>", counts_table(runs), "<h2>Failures</h2>", failures(runs)]
    parts += ["<h2>Where</h2>", environments(runs), "<h2>Error bands</h2>"]
    parts.append("<p>The darker, the more cases; the line is at the worst, a diamond at a failure.</p>")
    for kind in KINDS:
        tally = merged(runs, kind)
        if not tally.cases:
            continue
        if kind != "selection":
            parts.append(plots.inline(plots.bands_figure(bands(runs, [kind]), kind)))
    for kind in KINDS:
        tally = merged(runs, kind)
        if not tally.cases:
            continue
        never = plots.never_met(tally)
        parts.append(f"<h2>What was drawn: {kind}</h2>")
        if tally.notes:
            parts.append(table(("of these cases", "number"), tally.notes.items()))
        parts.append(plots.inline(plots.marginals_figure(tally)))
        parts.append(f"<h3>Pairs of levels</h3><p>{len(never)} never met (dots).</p>")
        parts.append(plots.inline(plots.pairs_figure(tally)))
        if never:
            parts.append(f"<details><summary>which</summary><p>{escape('; '.join(never))}</p></details>")
        if kind != "selection":
            parts.append(f"<details><summary>the worst cases of {kind}</summary>{worst(runs, kind)}</details>")
    return "\n".join(parts) + "\n"


def markdown(runs: Sequence[Run]) -> str:
    """A table for a page: counts, and the worst of every quantity and dtype."""
    rows = []
    for kind in KINDS:
        places = dict.fromkeys(place(header) for header, _ in of_kind(runs, kind))
        for where in places:
            here = [(header, parts) for header, parts in runs if place(header) == where]
            worst_of = {name: max((f for f, _ in band.worst), default=0.0) for name, band in bands(here, [kind])}
            told = "; ".join(f"{name.replace(', ' + where, '')}: {f:.2f}" for name, f in worst_of.items())
            told = "exact" if kind == "selection" and not any(worst_of.values()) else told
            count, failed = distinct(here, kind), len(merged(here, kind).failures)
            rows.append((kind, where, f"{count:,}", failed, told))
    return markdown_table(("kind", "where", "distinct cases", "failures", "worst error, of its budget"), rows)


def picture(runs: Sequence[Run], path: Path) -> None:
    """The same in one PNG."""
    tallies = {kind: merged(runs, kind) for kind in KINDS if of_kind(runs, kind)}
    counts = ", ".join(f"{kind} {distinct(runs, kind):,}" for kind in tallies)
    failed = sum(len(tally.failures) for tally in tallies.values())
    where = " and ".join(dict.fromkeys(place(header) for header, _ in runs))
    title = f"Distinct cases: {counts}; failed: {failed}. On {where}."
    plots.summary(bands(runs, ("solver", *DRAWN)), tallies, title, path)
