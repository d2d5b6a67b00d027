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
SHADES = {
    "killed": "#2e8b57",
    "survived": "#c0392b",
    "raised": "#e0a030",
    "equivalent": "#9aa5b1",
    "needs a GPU": "#dfe4ea",
    "not run": "#b9a3d6",
}

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
    return reports[0] | {"totals": dict(sorted(Counter(row["outcome"] for row in rows).items())), "mutants": rows}


def draw(found: dict[str, Any], path: Path) -> None:
    """Mutants by class against the files of tests: which one noticed first."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    rows = sorted(found["mutants"], key=lambda row: CLASSES.index(row["bug"]))
    files = sorted({row["test"].split("::")[0].removeprefix("tests/test_").removesuffix(".py") for row in rows} - {""})
    half = -(-len(rows) // 2)
    figure, axes = plt.subplots(1, 2, figsize=(15, 0.155 * half + 2.2), layout="constrained")
    for axis, part in zip(axes, (rows[:half], rows[half:])):
        bug = None
        for i, row in enumerate(part):
            if row["bug"] != bug:
                bug = row["bug"]
                axis.axhline(i - 0.5, color="#34495e", lw=0.6)
                axis.text(len(files) + 0.6, i, bug, fontsize=7, va="center", fontweight="bold")
            shade = SHADES.get(row["outcome"], "#8e44ad")
            file = row["test"].split("::")[0].removeprefix("tests/test_").removesuffix(".py")
            if file:
                axis.barh(i, 0.9, left=files.index(file) - 0.45, height=0.8, color=shade)
            else:
                axis.barh(i, len(files) - 0.1, left=-0.45, height=0.5, color=shade, alpha=0.8)
        names = [row["name"] for row in part]
        axis.set_yticks(range(len(part)), names, fontsize=6.5)
        axis.set_xticks(range(len(files)), [f.replace("_", " ") for f in files], rotation=35, ha="left", fontsize=8)
        axis.xaxis.tick_top()
        axis.set(xlim=(-0.6, len(files) + 4.2), ylim=(half - 0.5, -0.5))
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    present = [kind for kind in SHADES if found["totals"].get(kind)]
    handles = [Patch(color=SHADES[k], label=f"{k}: {found['totals'][k]}") for k in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    figure.suptitle("Which file of tests noticed a mutant first", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
