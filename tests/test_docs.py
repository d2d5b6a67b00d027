"""Pages: links lead somewhere, files that are named exist, the first example runs; and the writer of their tables."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from harness import check_identical
from markdown_it import MarkdownIt
from record import REPORTS, ROOT, read, table, write_between

import optimized.parallel
import reference

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
API = (optimized, reference, optimized.parallel, optimized.attention)
SOURCES = sorted(p for folder in ("reference", "optimized", "tests", "docs") for p in (ROOT / folder).rglob("*.py"))
CHECKS = runpy.run_path(str(ROOT / "docs" / "site_checks.py"))


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


def test_the_site_shows_every_page_once() -> None:
    listed = re.findall(r"^ *- (?:[\w ]+: )?([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(ROOT).as_posix() for page in PAGES)


@pytest.mark.parametrize(
    ("text", "loads"),
    [
        ('<script src="https://a/b.js"></script><a href="https://c">c</a>', 1),
        ('<link rel=stylesheet href=//a/b.css><link rel="canonical" href="https://a">', 1),
        ("@import 'https://a/b.css'; p {background: url(https://a/b.png)}", 2),
        ('<img src="../a.png"><script src="assets/b.js"></script>p {background: url("data:image/png;base64,AA")}', 0),
    ],
)
def test_what_a_page_loads_from_elsewhere_is_seen(text: str, loads: int) -> None:
    assert len(list(CHECKS["loaded"](text))) == loads


def test_a_page_that_is_rendered_otherwise_is_seen() -> None:
    text = "a\n- b\n- c\n"
    assert CHECKS["differences"](text, "<p>a\n- b\n- c</p>") == {"ul": (1, 0), "li": (2, 0)}
    assert CHECKS["differences"](text, "<p>a</p><ul><li>b</li><li>c</li></ul>") == {}


def test_one_version_everywhere() -> None:
    """In the project's metadata, how it is cited, and at the top of what changed."""
    places = {
        "pyproject.toml": r'^version = "(.*)"$',
        "CITATION.cff": r"^version: (.*)$",
        "CHANGELOG.md": r"^## (\S+) - ",
    }
    found = {file: re.findall(said, (ROOT / file).read_text(), re.MULTILINE)[:1] for file, said in places.items()}
    assert len(set(map(tuple, found.values()))) == 1, found
    assert all(found.values())


def test_programs_are_as_new_as_the_extra_wants_them(pytestconfig: pytest.Config) -> None:
    versions = pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py")).PROGRAMS
    wanted = dict(re.findall(r'"(\w+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert versions == {name: wanted[name] for name in versions}


@pytest.mark.parametrize("package", API, ids=[package.__name__ for package in API])
def test_every_public_name_is_on_a_page_of_the_api(package: ModuleType) -> None:
    """By where it is found: a function that has a file of its name stands in the package as that file."""
    pages = "\n".join(page.read_text() for page in sorted((ROOT / "docs/api").glob("*.md")))
    named = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    files = {file.stem for file in Path(package.__file__).parent.glob("*.py")}
    expected = {f"{package.__name__}.{name}" + f".{name}" * (name in files) for name in package.__all__}
    assert expected <= set(named)


def test_files_of_docs_that_are_named_exist() -> None:
    found = {}
    for file in (*PAGES, *SOURCES):
        named = re.findall(r"(?<![\w/])docs/[\w./-]+\.(?:md|py|png|html)\b", file.read_text())
        found[file.relative_to(ROOT).as_posix()] = [name for name in named if not (ROOT / name).exists()]
    assert sum(map(len, found.values())) == 0, {file: names for file, names in found.items() if names}


def sources(text: str) -> Iterator[tuple[int, int]]:
    """First line and end of every run of lines, outside of code, that begin with a bar."""
    code, start = False, None
    for at, line in enumerate([*text.split("\n"), ""]):
        code ^= line.startswith("```")
        if line.lstrip().startswith("|") and not code:
            start = at if start is None else start
        elif start is not None:
            yield start, at
            start = None


def rendered(text: str) -> Iterator[tuple[int, int, list[int]]]:
    """First line and end of every table, and the cells of its rows, the heading first."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            where, cells = token.map, []
        elif token.type == "tr_open":
            cells.append(0)
        elif token.type in ("th_open", "td_open"):
            cells[-1] += 1
        elif token.type == "table_close":
            yield *where, cells


def no_tables(text: str) -> list[str]:
    """What looks like a table and is none, or is another one."""
    lines, tables = text.split("\n"), {(start, end): cells for start, end, cells in rendered(text)}
    wrong = [f"line {start + 1}: no table" for start, end in sources(text) if (start, end) not in tables]
    for (start, end), cells in tables.items():
        # A renderer fills rows up and drops what is left over. Every bar counts that has no backslash before it.
        bars = [len(re.findall(r"(?<!\\)\|", line)) - 1 for line in lines[start:end]]
        if bars[:1] + bars[2:] != cells or len(set(bars)) != 1 or len(cells) < 2:
            wrong.append(f"line {start + 1}: columns {bars}, rendered {cells}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tables_are_shown(page: Path) -> None:
    assert no_tables(page.read_text()) == []


def test_blank_lines_keep_marks_and_tables_apart() -> None:
    """Some renderers take what follows a comment for a part of it, and what follows a table for a row."""
    marks = {}
    for page in PAGES:
        lines = page.read_text().split("\n")
        found = [at for at, line in enumerate(lines) if re.fullmatch(r"<!-- \w+:(begin|end) -->", line)]
        marks[page.relative_to(ROOT).as_posix()] = [
            lines[at] for at in found if lines[at + 1 if "begin" in lines[at] else at - 1]
        ]
    assert sum(map(len, marks.values())) == 0, {page: said for page, said in marks.items() if said}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("a\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nb", []),
        ("| a |\n|---|\n| `x \\| y` |\n\n```\n| no |\n```\n", []),
        ("| a | b |\n|---|---|\n<!-- c:begin -->\n| 1 | 2 |\n", ["line 4: no table", "line 1: columns [2, 2]"]),
        ("| a | b |\n|---|---|\n\n| 1 | 2 |\n", ["line 4: no table", "line 1: columns [2, 2]"]),
        ("| a | b |\n|---|\n| 1 | 2 |\n", ["line 1: no table"]),
        ("| a | b |\n|---|---|\n| 1 |\n| 1 | 2 |\n", ["line 1: columns [2, 2, 1, 2], rendered [2, 2, 2]"]),
        ("| a | b |\n|---|---|\n| 1 | `x|y` |\n", ["line 1: columns [2, 2, 3], rendered [2, 2]"]),
        ("| a |\n|---|\n| 1 |\nwords\n", ["line 1: no table", "line 1: columns [1, 1, 1, -1]"]),
        ("<div>\n| a |\n|---|\n| 1 |\n", ["line 2: no table"]),
    ],
)
def test_what_is_no_table_is_seen(text: str, wrong: list[str]) -> None:
    found = no_tables(text)
    assert [line[: len(said)] for line, said in zip(found, wrong)] == wrong
    assert len(found) == len(wrong)


def test_first_use_in_the_readme_runs() -> None:
    example, causal = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    made: dict = {}
    exec(example, made)
    assert made["out"].shape == (16, 400, 512)
    exec(causal, later := dict(made))
    assert later["out"].shape == (2, 1, 512)
    assert later["cache"].length.tolist() == [308, 308]
    assert made["q_routes"].indices.shape == made["q_routes"].scores.shape == (16, 4, 100)
    assert made["q_routes"].load.shape == (16, 4)


def test_the_causal_layer_is_used_as_its_page_says() -> None:
    made: dict = {}
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "docs/causal.md").read_text(), re.DOTALL):
        exec(example, made)
    torch.testing.assert_close(made["step"], made["out"][:, 69:70])
    assert made["static"].length.tolist() == [70, 70]


@pytest.mark.needs("transformers")
@pytest.mark.cpu
def test_transformers_are_used_as_their_page_says() -> None:
    ours, theirs = re.findall(r"```python\n(.*?)```", (ROOT / "docs/transformer.md").read_text(), re.DOTALL)
    made: dict = {}
    exec(ours, made)
    assert made["logits"].shape == (2, 100, 256)
    assert made["loads"].queries.shape == (2, 2, 4)
    assert made["new"].shape == (2, 20)
    assert made["token"].shape == (2,)
    assert made["after"].shape == (2, 256)
    assert made["static"].length.tolist() == [90, 120]
    exec(theirs, made)
    assert made["loss"].isfinite()
    assert made["new"].shape[1] > 100
    check_identical(made["again"].lm_head.weight, made["model"].lm_head.weight)


@pytest.mark.parametrize("package", [optimized, reference], ids=lambda package: package.__name__)
@pytest.mark.parametrize("local", [False, True], ids=["routed", "with-local-attention"])
def test_what_the_layer_does_not_do(package: ModuleType, local: bool) -> None:
    """As docs/layer.md says: no causality, no residual, no logits of masked tokens. Positions: see `test_mixture`."""
    window = {"local_attn": True, "local_attn_window_size": 2} if local else {}
    sizes = {"num_routed_queries": 4, "num_routed_key_values": 4, "num_experts": 2, "dim_head": 8, "heads": 2}
    layer = package.MixtureOfAttention(12, **sizes, **window, dropout=0.0, dtype=torch.float64)
    x = torch.randn(1, 16, 12, dtype=torch.float64, requires_grad=True)
    out, (q_routes, _) = layer(x, return_routes=True)
    (gradient,) = torch.autograd.grad(out[0, :8].square().sum(), x)
    assert gradient[0, 8:].any(), "what comes later has no influence"

    left_out = [n for n in range(16) if n not in q_routes.indices]
    assert len(left_out) >= 8
    if not local:
        check_identical(out[0, left_out], layer.null_routed_token[0].expand(len(left_out), -1))

    mask = torch.arange(16)[None] < 9
    poisoned = x.detach().masked_fill(~mask[..., None], float("nan"))
    for routes in layer(poisoned, mask=mask, return_routes=True)[1]:
        assert not routes.logits[..., 9:].any()
        assert routes.logits[..., :9].all()


def test_every_report_says_what_it_is_of() -> None:
    """Those without a kind are of the suite: the writers of tables tell them apart by it."""
    reports = {path.stem: read(path) for path in sorted(REPORTS.glob("*.json"))}
    suites = {name for name, report in reports.items() if "worst_fraction" in report}
    assert suites == {name for name, report in reports.items() if "kind" not in report}
    for name in reports.keys() - suites:
        assert reports[name]["kind"] == name.split("-")[0]


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
