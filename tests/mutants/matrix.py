"""The kill matrix: a table for the terminal, a picture, and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.faults.taxonomy import CLASSES, described

from .mutant import Mutant
from .runner import OUTCOMES, Result

COLOURS = {"killed": "green", "survived": "red", "raised": "yellow", "broken": "magenta", "crashed": "magenta"}
# Blue and orange, told apart by colour-blind readers; what should not be is dark.
SHADES = {
    "killed": ("#0072B2", ""),
    "raised": ("#E69F00", ""),
    "equivalent": ("#BBBBBB", ""),
    "survived": ("#000000", ""),
    "needs a GPU": ("#DDDDDD", "///"),
    "not run": ("#DDDDDD", "..."),
}
OTHER = ("#CC79A7", "xxx")

WITHOUT_RESULT = ("needs a GPU", "not run")


def verdict(mutant: Mutant, result: Result | None) -> str:
    """The outcome; "equivalent" for a survivor of which it is known; of those without a result, why."""
    if result is None:
        return "needs a GPU" if mutant.device == "cuda" else "not run"
    return "equivalent" if mutant.equivalent and result.outcome == "survived" else result.outcome


def unexpected(mutants: Sequence[Mutant], results: dict[str, Result]) -> list[str]:
    """What fails a run: a mutant that no test noticed, and one noticed that was said to be equivalent."""
    lines = []
    for m in mutants:
        r = results.get(m.name)
        if r is not None and r.outcome not in (("survived",) if m.equivalent else ("killed", "raised")):
            lines.append(f"{m.name} ({m.bug}, {m.file}): {r.outcome} {r.test} {r.error}".strip())
    return lines


def table(mutants: Sequence[Mutant], results: dict[str, Result]) -> Table:
    made = Table(title="kill matrix", title_justify="left")
    for name in ("mutant", "class", "file", "outcome", "killed by", "seconds"):
        made.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
    for m in mutants:
        result = results.get(m.name)
        outcome = verdict(m, result)
        colour = COLOURS.get(outcome, "dim")
        seconds = f"{result.seconds:.0f}" if result else ""
        test = result.test.removeprefix("tests/") if result else ""
        made.add_row(m.name, m.bug, m.file.removeprefix("optimized/"), f"[{colour}]{outcome}[/]", _plain(test), seconds)
    return made


def totals(mutants: Sequence[Mutant], results: dict[str, Result]) -> Table:
    made = Table(title="by class", title_justify="left")
    kinds = ("killed", "equivalent", *OUTCOMES[1:], "not run", "needs a GPU")
    counts = {bug: Counter(verdict(m, results.get(m.name)) for m in mutants if m.bug == bug) for bug in CLASSES}
    shown = [kind for kind in kinds if kind == "killed" or any(c[kind] for c in counts.values())]
    made.add_column("class")
    for kind in shown:
        made.add_column(kind, justify="right")
    for bug, c in counts.items():
        if c:
            made.add_row(bug, *(str(c[kind] or "") for kind in shown))
    made.add_section()
    made.add_row("all", *(str(sum(c[kind] for c in counts.values())) for kind in shown))
    return made


def _plain(test: str) -> str:
    """rich reads [brackets] as markup."""
    return test.replace("[", r"\[")


def report(mutants: Sequence[Mutant], results: dict[str, Result], about: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for m in mutants:
        result = results.get(m.name)
        rows.append(
            {
                **{name: getattr(m, name) for name in ("name", "bug", "file", "device", "equivalent")},
                "public": described(m.public),
                "outcome": verdict(m, result),
                "test": result.test if result else "",
                "error": result.error.split("\n")[0] if result else "",
                "seconds": result.seconds if result else None,
            }
        )
    counts = Counter(row["outcome"] for row in rows)
    return {"kind": "mutants", **about, "totals": dict(sorted(counts.items())), "mutants": rows}


def joined(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first report, and of each mutant that has no result there the first that has one: those that need a GPU."""
    rows = []
    for row in reports[0]["mutants"]:
        others = [other for found in reports for other in found["mutants"] if other["name"] == row["name"]]
        rows.append(next((other for other in others if other["outcome"] not in WITHOUT_RESULT), row))
    totals = dict(sorted(Counter(row["outcome"] for row in rows).items()))
    also = [found["hardware"]["name"] for found in reports[1:]]
    return reports[0] | {"totals": totals, "mutants": rows, "also": also}


def draw(found: dict[str, Any], path: Path) -> None:
    """Mutants by class: how many each file of tests noticed first, and what became of all. Read at a page's width."""
    import matplotlib.pyplot as plt

    rows = found["mutants"]
    files = [file for file, _ in Counter(map(noticed_by, rows)).most_common() if file]
    bugs = [bug for bug in CLASSES if any(row["bug"] == bug for row in rows)]
    counts = Counter((row["bug"], noticed_by(row)) for row in rows)
    outcomes = Counter((row["bug"], row["outcome"]) for row in rows)
    figure, (cells, bars) = plt.subplots(
        1, 2, figsize=(10, 0.29 * len(bugs) + 2.0), width_ratios=(5, 2), sharey=True, layout="constrained"
    )
    most = max(counts[bug, file] for bug in bugs for file in files)
    cells.imshow(
        [[counts[bug, file] for file in files] for bug in bugs], cmap="Blues", vmin=0, vmax=most, aspect="auto"
    )
    for y, bug in enumerate(bugs):
        for x, file in enumerate(files):
            if number := counts[bug, file]:
                cells.text(x, y, number, ha="center", va="center", color="white" if number > most / 2 else "black")
    cells.set_yticks(range(len(bugs)), bugs)
    cells.set_xticks(range(len(files)), [file.replace("_", " ") for file in files], rotation=40, ha="left")
    cells.xaxis.tick_top()
    cells.tick_params(length=0)
    cells.set_xlabel("file of tests that noticed first, and how many")
    left = [0] * len(bugs)
    for outcome in dict.fromkeys((*SHADES, *found["totals"])):
        width = [outcomes[bug, outcome] for bug in bugs]
        if any(width):
            shade, hatch = SHADES.get(outcome, OTHER)
            label = f"{outcome}: {sum(width)}"
            bars.barh(range(len(bugs)), width, left=left, color=shade, hatch=hatch, edgecolor="white", label=label)
            left = [a + b for a, b in zip(left, width)]
    bars.set_xlabel("what became of them")
    bars.grid(axis="x", alpha=0.3)
    bars.set_axisbelow(True)
    bars.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    where = " and ".join(dict.fromkeys((found["hardware"]["name"], *found.get("also", ()))))
    figure.suptitle(f"{len(rows)} faults put into the layer, by class ({where})", fontsize=11)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def noticed_by(row: dict[str, Any]) -> str:
    """The file of the test that failed, in short; empty where none did."""
    return row["test"].split("::")[0].rpartition("/")[2].removeprefix("test_").removesuffix(".py")
