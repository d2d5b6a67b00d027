"""Pages: links lead somewhere, files that are named exist, the first example runs; and the writer of their tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from record import ROOT, table, write_between

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted(p for folder in ("reference", "optimized", "tests", "docs") for p in (ROOT / folder).rglob("*.py"))


def links(text: str) -> Iterator[tuple[str, str]]:
    """Path and anchor of every link to a file or a heading here."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in links(page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), f"no {path}"
        assert not anchor or anchor in anchors(target.read_text()), f"no heading for {path}#{anchor}"


def test_links_are_found() -> None:
    text = "[a](b.md#c-d)\n```\n[no](x)\n```\n![e](f.png) [out](https://g) [h](#i)"
    assert list(links(text)) == [("b.md", "c-d"), ("f.png", ""), ("", "i")]
    assert anchors("# The `a` list: 2 of it\n## b") == {"the-a-list-2-of-it", "b"}


def test_index_leads_to_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    reached = {(index.parent / path).resolve() for path, _ in links(index.read_text())}
    assert set(PAGES) <= reached | {index}
    assert "docs/index.md" in {path for path, _ in links((ROOT / "README.md").read_text())}


def test_files_of_docs_that_are_named_exist() -> None:
    found = {}
    for file in (*PAGES, *SOURCES):
        named = re.findall(r"(?<![\w/])docs/[\w./-]+\.(?:md|py|png|html)\b", file.read_text())
        found[file.relative_to(ROOT).as_posix()] = [name for name in named if not (ROOT / name).exists()]
    assert sum(map(len, found.values())) == 0, {file: names for file, names in found.items() if names}


def test_first_use_in_the_readme_runs() -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    made: dict = {}
    exec(example, made)
    assert made["out"].shape == (16, 400, 512)
    assert made["q_routes"].indices.shape == made["q_routes"].scores.shape == (16, 4, 100)
    assert made["q_routes"].load.shape == (16, 4)


def test_table() -> None:
    assert table(("a", "b"), [(1, "x|y"), ("", None)]) == "| a | b |\n|---|---|\n| 1 | x\\|y |\n|  | None |"
    assert table(("a", "long"), [("wide", 2)], left=1) == "| a    | long |\n|------|-----:|\n| wide |    2 |"


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n")
    write_between(page, "x", "new")
    assert page.read_text() == "a\n<!-- x:begin -->\n\nnew\n\n<!-- x:end -->\nb\n"
    write_between(page, "x", "new")
    assert page.read_text() == "a\n<!-- x:begin -->\n\nnew\n\n<!-- x:end -->\nb\n"
    with pytest.raises(ValueError, match=r"expected <!-- y:begin --> and <!-- y:end --> once"):
        write_between(page, "y", "new")
