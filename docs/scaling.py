"""The table of docs/parallel.md, from tests/reports/scaling-*.json. Run from the repository root:

python docs/scaling.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.record import REPORTS, read, table, write_between  # noqa: E402

DENSE = "ring attention"  # a dense layer; of one device PyTorch's attention as such
WHAT = ("competitor", "n", "slots", "block", "causal", "experts")
Rows = list[dict[str, Any]]


def label(competitor: str, n: int, slots: int, block: int | None, causal: bool, experts: int) -> str:
    if competitor == DENSE:
        return f"{n:,}, dense attention"
    return f"{n:,}, E {experts}, K {slots:,}" + ", blocks aligned" * (block is not None) + ", causal" * causal


def short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def milliseconds(rows: Rows) -> list[float] | None:
    """Forward, and forward and backward, as a graph where there is one."""
    found = {row["direction"]: row.get("graph_ms", row.get("ms")) for row in rows}
    return None if len(found) < 2 or None in found.values() else [found["forward"], found["both"]]


def lines(rows: Rows) -> Iterator[tuple[str, ...]]:
    ranks = sorted({row["ranks"] for row in rows})
    for what in dict.fromkeys(tuple(row[name] for name in WHAT) for row in rows):
        same = [row for row in rows if tuple(row[name] for name in WHAT) == what]
        by_ranks = {r: [row for row in same if row["ranks"] == r] for r in ranks}
        times = {r: milliseconds(found) for r, found in by_ranks.items()}
        cells = [" / ".join(map(short, times[r] or ())) or "-" for r in ranks]
        first, last = times[ranks[0]], times[ranks[-1]]
        gain = " / ".join(f"{a / b:.2f}" for a, b in zip(first, last)) if first and last else "-"
        most = [max((row["peak_mib"] for row in by_ranks[r] if "peak_mib" in row), default=None) for r in ranks]
        sent = max((row.get("sent", 0.0) for row in by_ranks[ranks[-1]]), default=0.0)
        bytes_of = "" if what[0] == DENSE else short(sent / 1e6)  # its own is not counted
        yield label(*what), *cells, gain, " / ".join("-" if m is None else f"{m:,.0f}" for m in most), bytes_of


def trained(steps: Rows) -> str:
    """Steps of training, of one device's tokens on each."""
    rows = []
    for row in steps:
        alone = next(r for r in steps if r["ranks"] == 1)["tokens_per_second"] * row["ranks"]
        style = {None: "one device", "ddp": "DistributedDataParallel", "fsdp": "fully_shard"}[row["style"]]
        cells = (row["ranks"], short(row["ms"]), f"{row['tokens_per_second']:,.0f}")
        rows.append((style, *cells, f"{row['tokens_per_second'] / alone:.2f}", short(row["peak_mib"])))
    first = steps[0]
    what = f"`{first['size']}`, {first['parameters'] / 1e6:.0f} M parameters"
    what += f", {first['tokens'] // first['ranks']:,} tokens a device"
    heading = ("a step of training", "devices", "ms", "tokens a second", "of as many alone", "peak MiB of a rank")
    return table(heading, rows, left=1) + f"\n\n*{what}, called eagerly.*"


def text() -> str:
    parts = []
    for path in sorted(REPORTS.glob("scaling-*.json")):
        found = read(path)
        ranks = sorted({row["ranks"] for row in found["rows"]})
        heading = ("N, ms", *(f"R = {r}" for r in ranks), "speed-up", "peak MiB of a rank", "MB sent by a rank")
        made = f"{found['hardware']['name']}, torch {found['versions']['torch']}"
        linked = f"*{made}; [report](../tests/reports/{path.name})*"
        parts.append(table(heading, lines(found["rows"]), left=1) + "\n\n" + linked)
        if found.get("training"):
            parts.append(trained(found["training"]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    write_between(ROOT / "docs" / "parallel.md", "measured", text())
