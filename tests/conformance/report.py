"""The verdicts as a table for the terminal, and as Markdown, JSON or HTML.

Texts of somebody else's errors are no markup anywhere: for rich they are `Text`, in Markdown code.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import platform
import re
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optimized.prove.environment import version
from tests.conformance.examine import FAILS, HOLDS, NOT_OFFERED, Verdict
from tests.record import table as markdown_table

SUFFIXES = (".md", ".json", ".html")
STYLES = {HOLDS: "green", FAILS: "bold red", NOT_OFFERED: "dim"}


def versions_of(spec: str) -> dict[str, str]:
    """Python, PyTorch, and the distributions that the module comes from, with what they require."""
    top = spec.partition(":")[0].split(".")[0]
    found = {"python": platform.python_version(), "torch": importlib.metadata.version("torch")}
    for distribution in sorted(set(importlib.metadata.packages_distributions().get(top, ()))):
        found[distribution] = importlib.metadata.version(distribution)
        for requirement in importlib.metadata.requires(distribution) or ():
            name = re.match(r"[\w.-]+", requirement)
            if name and "extra ==" not in requirement:
                found.setdefault(name[0], version(name[0]) or "")
    return {name: version for name, version in found.items() if version}


def summary(verdicts: list[Verdict]) -> str:
    counts = Counter(v.verdict for v in verdicts)
    return ", ".join(f"{counts[kind]} {word}" for kind, word in ((HOLDS, "hold"), (FAILS, "fail"))) + (
        f", {counts[NOT_OFFERED]} not offered"
    )


def table(spec: str, verdicts: list[Verdict]) -> Table:
    made = Table(title=Text(f"conformance of {spec}: {summary(verdicts)}"), title_justify="left")
    made.add_column("property")
    made.add_column("verdict", no_wrap=True)
    made.add_column("smallest example, and reason", overflow="fold")
    for v in verdicts:
        why = "\n".join(line for line in (v.example, *v.reason.splitlines()[:1]) if line)
        made.add_row(v.title, Text(v.verdict, STYLES[v.verdict]), Text(why))
    return made


def code(text: str) -> str:
    """Markdown that shows the text as it is, in a cell of a table too.

    Not between backticks, in which no pipe after a backslash can be written; and in code, where `:ok:` is no picture.
    """
    escaped = re.sub(r"[&<>|`*_~$\[\]\\]", lambda c: f"&#{ord(c[0])};", text)
    return f"<code>{escaped}</code>" if text else ""


def block(text: str, language: str = "") -> list[str]:
    """Lines of a fence that is longer than any in the text."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)
    return [f"{fence}{language}", *text.splitlines(), fence]


def command(spec: str, causal: bool) -> str:
    return f"pytest --impl {spec} {'--causal ' * causal}--impl-report FILE"


def markdown(spec: str, device: str, verdicts: list[Verdict], causal: bool = False) -> str:
    lines = [
        f"# Conformance of {code(spec)}",
        "",
        f"{summary(verdicts)}. Written by {code(command(spec, causal))}, on device {device}, with "
        + ", ".join(f"{name} {version}" for name, version in versions_of(spec).items())
        + ".",
        "",
    ]
    rows = []
    for v in verdicts:
        name = f"[{v.title}](#{v.title.replace(' ', '-')})" if v.verdict == FAILS else v.title
        verdict = f"**{FAILS}**" if v.verdict == FAILS else v.verdict
        rows.append((name, verdict, code((v.reason.splitlines() or [""])[0])))
    lines.append(markdown_table(("property", "verdict", "reason"), rows))
    failures = [v for v in verdicts if v.verdict == FAILS]
    if failures:
        lines += ["", "Each snippet runs from the root of this repository and raises the error shown above it."]
    for v in failures:
        what = " ".join(v.what.split())
        lines += ["", f"## {v.title}", "", what, ""]
        if v.example:
            lines += [f"Smallest example: {v.example}", ""]
        lines += block(v.reason)
        if v.snippet:
            lines += ["", *block(v.snippet, "python")]
    return "\n".join(lines) + "\n"


def as_json(spec: str, device: str, verdicts: list[Verdict], causal: bool = False) -> str:
    report = {
        "impl": spec,
        "causal": causal,
        "device": device,
        "versions": versions_of(spec),
        "summary": summary(verdicts),
        "properties": [v.as_dict() for v in verdicts],
    }
    return json.dumps(report, indent=1) + "\n"


def html(spec: str, device: str, verdicts: list[Verdict], causal: bool = False) -> str:
    """One file without links to others."""
    console = Console(record=True, width=150, file=io.StringIO())
    versions = ", ".join(f"{name} {version}" for name, version in versions_of(spec).items())
    console.print(Text(f"{command(spec, causal)}, on device {device}, with {versions}"))
    console.print(table(spec, verdicts))
    for v in verdicts:
        if v.verdict == FAILS:
            console.print(Text.assemble("\n", (v.title, "bold"), f": {' '.join(v.what.split())}"))
            console.print(Text(f"{v.reason}\n\n{v.snippet}"))
    return console.export_html(inline_styles=True)


def write(path: Path, spec: str, device: str, verdicts: list[Verdict], causal: bool = False) -> None:
    render = {".md": markdown, ".json": as_json, ".html": html}[path.suffix]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(spec, device, verdicts, causal), encoding="utf-8")
