"""Parts of a page that a script writes: what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""

from __future__ import annotations

from pathlib import Path


def write_between(path: Path, name: str, text: str) -> None:
    page = path.read_text()
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    if begin not in page:
        raise SystemExit(f"{path}: no {begin.strip()} in it")
    path.write_text(f"{page.split(begin)[0]}{begin}{text}\n{end}{page.split(end)[1]}")
