"""docs/generated/benchmarks.md, its plots and the table of speed in README.md, from tests/reports/benchmarks-*.json.

Run from the repository root after `python -m tests.benchmarks --device cuda --out tests/reports/benchmarks-h100.json`
and `python -m tests.benchmarks --device cpu --out tests/reports/benchmarks-cpu.json`; either will do.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.record import REPORTS, read, table, write_between  # noqa: E402

FORWARD, BOTH = DIRECTIONS = ("forward", "forward+backward")
Report = dict[str, Any]

# Okabe and Ito's colours, told apart by colour-blind readers; the kind of K by the line's style besides.
BLUE, SKY, ORANGE, YELLOW, PURPLE, BLACK = "#0072B2", "#56B4E9", "#E69F00", "#F0E442", "#CC79A7", "#000000"
LINES = {  # device: (label, competitor, group, colour, style, marker)
    "cuda": [
        ("dense attention", "dense", "sweep K = N/8", BLACK, ":", "s"),
        ("reference, K = N/8", "reference", "sweep K = N/8", ORANGE, "-", "^"),
        ("reference, K = 1024", "reference", "sweep K = 1024", ORANGE, "--", "v"),
        ("this layer, K = N/8", "optimized", "sweep K = N/8", BLUE, "-", "o"),
        ("this layer, K = 1024", "optimized", "sweep K = 1024", BLUE, "--", "D"),
        ("as a CUDA graph, K = N/8", "optimized graph", "sweep K = N/8", SKY, "-", "o"),
        ("as a CUDA graph, K = 1024", "optimized graph", "sweep K = 1024", SKY, "--", "D"),
    ],
    "cpu": [
        ("dense attention", "dense", "fixed K", BLACK, ":", "s"),
        ("reference, K = 128", "reference", "fixed K", ORANGE, "--", "v"),
        ("reference, K = 128, local attention", "reference", "fixed K, local", ORANGE, "-", "^"),
        ("this layer, K = 128", "optimized", "fixed K", BLUE, "--", "D"),
        ("this layer, K = 128, local attention", "optimized", "fixed K, local", BLUE, "-", "o"),
    ],
}
# Libraries' kernels in blue; hatched where the colours begin again. No red beside green.
STAGES = {
    "GEMM": (BLUE, ""), "attention": (SKY, ""), "router": (ORANGE, ""), "solver": (YELLOW, ""),
    "selection": (PURPLE, ""), "gather": ("#777777", ""), "null slot": (ORANGE, "///"), "combine": (PURPLE, "///"),
    "dx": (YELLOW, "///"), "rotary": (SKY, "///"), "norm": (BLUE, "///"), "copies": (BLACK, ""),
    "other": ("#DDDDDD", ""),
}  # fmt: skip
OURS = ("as a CUDA graph", "this layer")  # the first that was measured stands beside the floor
PART_STAGE = {"attention": "attention", "local attention": "attention", "copy": "copies"}  # of the floor; else GEMM


def load(folder: Path) -> list[Report]:
    """GPUs' reports first, the newest before others: its table stands in README.md."""
    reports = sorted(
        (read(path) for path in folder.glob("benchmarks-*.json")), key=lambda r: r["started"], reverse=True
    )
    return sorted(reports, key=lambda report: report["device"] != "cuda")


def leading(reports: list[Report]) -> list[Report]:
    """The first of each machine: other installations on it have their tables only."""
    first: dict[str, Report] = {}
    for report in reports:
        first.setdefault(report["hardware"]["name"], report)
    return list(first.values())


def longest(reports: list[Report]) -> list[Report]:
    """Of each machine the one whose lines have most points, of equals the first."""
    best: dict[str, Report] = {}
    for report in reports:
        name = report["hardware"]["name"]
        best[name] = max(best.get(name, report), report, key=points)
    return list(best.values())


def find(report: Report, case: str, competitor: str, direction: str) -> dict[str, Any]:
    """The row, or {}."""
    key = (case, competitor, direction)
    return next((r for r in report["rows"] if (r["case"], r["competitor"], r["direction"]) == key), {})


def groups(report: Report) -> dict[str, list[str]]:
    """Names of the cases by group, shorter sequences first."""
    found: dict[str, list[str]] = {}
    for name in in_order(report):
        found.setdefault(report["cases"][name]["group"], []).append(name)
    return found


def in_order(report: Report) -> list[str]:
    """Names of the cases. The report has them in order of importance."""
    cases = report["cases"]
    return sorted(cases, key=lambda name: (cases[name]["n"], cases[name]["window"] is not None))


# --- tables ----------------------------------------------------------------------------------------------------------


def aligned(rows: list[list[str]], left: int = 1) -> str:
    """The heading first. Where nothing follows it, nothing was measured."""
    return table(rows[0], rows[1:], left) if len(rows) > 1 else "Not measured."


def milliseconds(value: float) -> str:
    """Three digits, never fewer than the whole ones."""
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def number(row: dict[str, Any], key: str, style: str) -> str:
    return format(row[key], style) if key in row else "-"


def pair(rows: list[dict[str, Any]], key: str, style: str) -> str:
    """Forward / forward+backward."""
    return both([number(row, key, style) for row in rows])


def both(cells: list[str]) -> str:
    return "-" if set(cells) == {"-"} else " / ".join(cells)


def timing(row: dict[str, Any]) -> str:
    if "p50" not in row:
        return "-"
    return f"{milliseconds(row['p50'])} ({milliseconds(row['p20'])}, {milliseconds(row['p80'])})"


def shape(case: dict[str, Any]) -> str:
    said = [f"B {case['batch']}, N {case['n']}, D {case['dim']}, H {case['heads']}, d {case['dim_head']}"]
    said.append(f"E {case['experts']}, K {case['slots']}, {case['dtype']}")
    said += [f"window {case['window']}"] * (case["window"] is not None)
    said += [f"dropout {case['dropout']}"] * (case["dropout"] > 0)
    return ", ".join(said + [f"mask with {case['mask']}"] * (case["mask"] != "none"))


def group_table(report: Report, cases: list[str]) -> str:
    heading = ["case", "competitor", "forward ms", "fwd+bwd ms", "TFLOP/s", "x floor", "peak MiB", "kernels", "copies"]
    lines = [[*heading, "host ms"]]
    for case in cases:
        floor = report["floors"].get(case, {})
        if FORWARD in floor:
            sums = [milliseconds(floor[d]["ms"]) for d in DIRECTIONS]
            lines.append([case, "floor", *sums, *["-"] * 6])
        for competitor in dict.fromkeys(r["competitor"] for r in report["rows"] if r["case"] == case):
            rows = [find(report, case, competitor, direction) for direction in DIRECTIONS]
            if any("p50" in row for row in rows):
                columns = (("tflops", ".3g"), ("over_floor", ".2f"), ("peak_mib", ".0f"), ("kernels", "d"))
                figures = [pair(rows, *column) for column in (*columns, ("copies", "d"), ("host_ms", ".3f"))]
                lines.append([case, competitor, *map(timing, rows), *figures])
    return aligned(lines, 2)


def missing_table(report: Report) -> str:
    """What was not measured, and why; nothing is left out in silence."""
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in report["rows"]:
        if "reason" in row:
            by_case = reasons.setdefault((row["competitor"], row["reason"]), {})
            by_case.setdefault(row["case"], []).append(row["direction"])
    for case, floor in report["floors"].items():
        if "reason" in floor:
            reasons.setdefault(("floor", floor["reason"]), {})[case] = list(DIRECTIONS)
    if not reasons:
        return "Everything was measured."
    lines = [["competitor", "reason", "cases"]]
    for (competitor, reason), by_case in reasons.items():
        cases = (name if len(d) == len(DIRECTIONS) else f"{name} ({d[0]})" for name, d in by_case.items())
        lines.append([competitor, reason, ", ".join(cases)])
    return aligned(lines, 3)


def floor_table(report: Report, cases: list[str]) -> str:
    lines = [["case", "part", "ms"]]
    for case in cases:
        for part, ms in report["floors"].get(case, {}).get(BOTH, {}).get("parts", {}).items():
            lines.append([case, part, milliseconds(ms)])
    return aligned(lines, 2)


def backends_table(report: Report) -> str:
    lines = [["case", "backends of `optimized`"]]
    for case in in_order(report):
        chosen = find(report, case, "optimized", FORWARD).get("backends")
        if chosen:
            lines.append([case, ", ".join(f"{stage} `{backend}`" for stage, backend in chosen.items())])
    return aligned(lines, 2)


INTRODUCTION = """# Benchmarks

Times are medians in ms (20th and 80th percentile in brackets) of calls on random data, with cold caches, between two
CUDA events around each call; on the CPU by the clock. Forward is without gradients; fwd+bwd ends with the gradients of
x and of all parameters. Where two figures stand, they are forward / forward+backward. Dropout is 0, where the layer's
default is 0.1, and there is no mask, unless a case says otherwise.

- TFLOP/s: of the explicit count in [flops.py](../../tests/benchmarks/flops.py), each competitor its own work.
- x floor: over the floor, which is the batched products, the fastest attention that is installed, and one read of x
  and one write of the result, each measured bare in the same run and summed
  ([floor.py](../../tests/benchmarks/floor.py)).
- peak MiB: of the allocator, above inputs and parameters. A CUDA graph keeps a pool of its own: no figure.
- kernels and copies (memcpy, memset) of a call, by the profiler. host ms: until a call is enqueued. The
  reference checks routes by value, which waits for the device: its host time is all of its time.
- deterministic: PyTorch's mode as it is by default, which fills fresh memory besides.

Competitors: [competitors.py](../../tests/benchmarks/competitors.py). All of a report ran on one machine at one time,
all of a case in one process; where two processes shared the cases, each had a GPU of its own, and half of the host.
Written by `python docs/benchmarks.py`.
"""
PLOTS = {
    "speed.png": "Time against N",
    "memory.png": "Peak memory against N",
    "stages.png": "Time per stage",
}


def section(report: Report) -> str:
    said = [f"{key} {value}" for part in ("hardware", "versions") for key, value in report[part].items()]
    parts = [f"## {report['hardware']['name']}", ", ".join(said) + f". Commit {report['commit'] or 'unknown'}."]
    if not report["complete"]:
        parts.append("**This run was cut short.**")
    parts.append(f"{report['started']}, {report['seconds']:.0f} s.")
    if "product_tflops" in report.get("ceilings", {}):
        ceilings = report["ceilings"]
        parts[-1] += (
            f" In the same run a product of 8192 x 8192 matrices reached {ceilings['product_tflops']:.0f} "
            f"TFLOP/s in bfloat16, a copy of 1 GiB {ceilings['copy_tbs']:.2f} TB/s."
        )
    parts += [summary(report), f"*forward / forward+backward; {conditions(report)}.*"]
    found = groups(report)
    for group, cases in found.items():
        parts += [f"### {group}", "\n".join(f"- {name}: {shape(report['cases'][name])}" for name in cases)]
        parts.append(group_table(report, cases))
    if "standard" in found:
        parts += ["### Parts of the floor", floor_table(report, found["standard"])]
    parts += ["### Backends", backends_table(report), "### Not measured", missing_table(report)]
    return "\n\n".join(parts)


def summarised(report: Report) -> list[str]:
    """Names of the cases of a summary."""
    return groups(report).get("standard", []) if report["device"] == "cuda" else in_order(report)


def summary(report: Report) -> str:
    """The layer beside what it may replace."""
    columns = {"this layer": "optimized", "torch.compile": "optimized compiled"}
    columns |= {"reduce-overhead": "optimized reduce-overhead", "graphed callable": "optimized graphed"}
    columns |= {"as a CUDA graph": "optimized graph"}
    columns |= {"dense attention": "dense"}
    columns |= {"mixture-of-attention 0.0.25": "upstream", "reference": "reference"}
    cases = summarised(report)
    shown = {
        heading: name
        for heading, name in columns.items()
        if any("p50" in find(report, case, name, d) for case in cases for d in DIRECTIONS)
    }
    ours = [name for name in OURS if name in shown][:1]
    lines = [["ms", *shown, *(f"x floor: {name}" for name in ours), "peak MiB: layer, dense"]]
    for case in cases:
        rows_of = {name: [find(report, case, competitor, d) for d in DIRECTIONS] for name, competitor in shown.items()}
        cells = [both([milliseconds(r["p50"]) if "p50" in r else "-" for r in rows]) for rows in rows_of.values()]
        peaks = [number(find(report, case, name, BOTH), "peak_mib", ".0f") for name in ("optimized", "dense")]
        if set(cells) != {"-"}:
            floors = [pair(rows_of[name], "over_floor", ".2f") for name in ours]
            lines.append([case, *cells, *floors, ", ".join(peaks)])
    return aligned(lines)


def readme_table(report: Report) -> str:
    """What stands between the markers of README.md."""
    where = f"{report['hardware']['name']}, torch {report['versions']['torch']}"
    return f"{summary(report)}\n\n*{where}: forward / forward+backward; {conditions(report)}.*"


def conditions(report: Report) -> str:
    """Of the cases in a summary: what a layer as it comes, and a batch with padding, would not share."""
    cases = [report["cases"][name] for name in summarised(report)]
    dropouts = sorted({f"{case['dropout']:g}" for case in cases})
    masks = sorted({"no mask" if case["mask"] == "none" else f"mask with {case['mask']}" for case in cases})
    return f"dropout {' or '.join(dropouts)}, {' or '.join(masks)}"


# --- plots -----------------------------------------------------------------------------------------------------------


def curve(report: Report, competitor: str, group: str, direction: str, keys: tuple[str, ...]) -> list[list[float]]:
    """Columns N and these figures, where they were measured."""
    points = []
    for name, case in report["cases"].items():
        row = find(report, name, competitor, direction)
        if case["group"] == group and all(key in row for key in keys):
            points.append([case["n"], *(row[key] for key in keys)])
    return [list(column) for column in zip(*sorted(points))]


def points(report: Report) -> int:
    lines = (curve(report, line[1], line[2], FORWARD, ("p50",)) for line in LINES[report["device"]])
    return sum(len(line[0]) for line in lines if line)


def draw_against_n(path: Path, reports: list[Report], key: str, label: str) -> None:
    """Log-log, a row for each report, forward and forward+backward side by side."""
    drawn = [report for report in reports if points(report)]
    if not drawn:
        return
    figure = Figure(figsize=(10, 4.6 * len(drawn)), dpi=100, layout="constrained")
    parts = figure.subfigures(len(drawn), 1, squeeze=False).flat
    for part, report in zip(parts, drawn):
        row = part.subplots(1, 2, sharey=True)
        for axis, direction in zip(row, DIRECTIONS):
            for line in LINES[report["device"]]:
                _line(axis, report, line, direction, key)
            _proportional(axis, report, direction, key)
            lengths = sorted({x for drawn_line in axis.lines for x in drawn_line.get_xdata()})
            axis.set(xscale="log", yscale="log", xlabel="tokens N", title=direction.replace("+", " + "))
            axis.set_xticks(lengths, [f"{int(n) // 1024}k" if n >= 1024 else f"{int(n)}" for n in lengths])
            axis.xaxis.set_minor_locator(LogLocator(base=2, subs=()))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.grid(alpha=0.3, which="major")
        row[0].set_ylabel(label)
        part.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
        where = f"{report['hardware']['name']}, torch {report['versions']['torch']}"
        part.suptitle(f"{where}\n{swept(report)}", fontsize=11)
    figure.savefig(path)


def swept(report: Report) -> str:
    """What the cases of the lines have in common: their shape but for N and K; and their windows."""
    of = {line[2] for line in LINES[report["device"]]}
    cases = [case for case in report["cases"].values() if case["group"] in of]
    shapes = {shape(case | {"n": "N", "slots": "K", "window": None}) for case in cases}
    windows = sorted({case["window"] for case in cases} - {None})
    said = " or ".join(sorted(shapes)).replace("N N, ", "").replace("K K, ", "")
    return said + "".join(f"; local attention: window {window}" for window in windows)


def _line(axis: Axes, report: Report, line: tuple[str, ...], direction: str, key: str) -> None:
    label, competitor, group, colour, style, marker = line
    keys = ("p50", "p20", "p80") if key == "p50" else (key,)
    columns = curve(report, competitor, group, direction, keys)
    if not columns:
        return
    axis.plot(columns[0], columns[1], style, color=colour, marker=marker, markersize=5, linewidth=1.8, label=label)
    if key == "p50":
        axis.fill_between(columns[0], columns[2], columns[3], color=colour, alpha=0.15, linewidth=0)


def _proportional(axis: Axes, report: Report, direction: str, key: str) -> None:
    """What growth with N would be from the last point of the layer at fixed K."""
    fixed = {"cuda": "sweep K = 1024", "cpu": "fixed K"}[report["device"]]
    columns = curve(report, "optimized", fixed, direction, (key,))
    if columns:
        (*_, last), (*_, end) = columns
        slope = [end * n / last for n in columns[0]]
        axis.plot(columns[0], slope, color="0.6", linewidth=1, label="proportional to N", zorder=0)


def floor_by_stage(parts: dict[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part, ms in parts.items():
        bare = re.sub(r" \(.*\)| backward", "", part)
        stage = PART_STAGE.get(bare, "GEMM")
        found[stage] = found.get(stage, 0.0) + ms
    return found


def draw_stages(path: Path, report: Report) -> None:
    """A small plot for each shape and direction: kernels of the layer stacked by stage, beside the floor."""
    standard = groups(report).get("standard", [])
    cases = [case for case in standard if "stage_ms" in find(report, case, "optimized", BOTH)]
    if not cases:
        return
    figure = Figure(figsize=(1.75 * len(cases) + 0.5, 8.0), dpi=100, layout="constrained")
    axes = figure.subplots(2, len(cases), squeeze=False)
    used: set[str] = set()
    for row, direction in zip(axes, DIRECTIONS):
        for axis, case in zip(row, cases):
            layer = find(report, case, "optimized", direction)
            floor = report["floors"].get(case, {}).get(direction, {})
            bars = [layer.get("stage_ms", {}), floor_by_stage(floor.get("parts", {}))]
            for x, stages in enumerate(bars):
                bottom = 0.0
                for stage, (colour, hatch) in STAGES.items():
                    height = stages.get(stage, 0.0)
                    if height:
                        axis.bar(x, height, 0.7, bottom, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
                        used.add(stage)
                    bottom += height
            axis.set_xticks([0, 1], ["layer", "floor"])
            whole = f"\ncalled: {milliseconds(layer['p50'])}" if "p50" in layer else ""
            axis.set_title(case + whole, fontsize=10)
            axis.margins(x=0.15)
            axis.grid(axis="y", alpha=0.3)
            axis.set_axisbelow(True)
        row[0].set_ylabel(f"{direction.replace('+', ' + ')}, ms")
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=c, hatch=h, edgecolor="white", label=s) for s, (c, h) in STAGES.items() if s in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=9, frameon=False)
    said = "called: the layer as it is called, which also waits for the host, and whose caches are cold"
    figure.suptitle(f"Time of the kernels by stage, ms, {report['hardware']['name']}\n{said}", fontsize=11)
    figure.savefig(path)


# --- all of it -------------------------------------------------------------------------------------------------------


def render(reports: list[Report], docs: Path, readme: Path) -> None:
    shown, lines = leading(reports), longest(reports)
    generated, pictures = docs / "generated", docs / "pictures"
    draw_against_n(pictures / "speed.png", lines, "p50", "time, ms")
    draw_against_n(pictures / "memory.png", lines, "peak_mib", "peak memory above inputs, MiB")
    draw_stages(pictures / "stages.png", shown[0])
    drawn = [f"![{title}](../pictures/{name})" for name, title in PLOTS.items() if (pictures / name).exists()]
    parts = [INTRODUCTION.rstrip(), *drawn, *map(section, reports)]
    (generated / "benchmarks.md").write_text("\n\n".join(parts) + "\n")
    write_between(readme, "benchmarks", readme_table(shown[0]))


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    reports = load(REPORTS)
    if not reports:
        print("expected tests/reports/benchmarks-*.json, written by python -m tests.benchmarks --out FILE")
        return 1
    render(reports, ROOT / "docs", ROOT / "README.md")
    for report in reports:
        print(f"{report['hardware']['name']}: {len(report['rows'])} rows, {report['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
