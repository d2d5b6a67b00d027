"""What the site is made of: hooks of mkdocs. It is laid out as the repository is, so every relative link holds in both.

README.md is its front page. Of other files those are published that a page links to, reports and sources.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SCRIPTS = (".py", ".pyc")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#:]+)\)")  # to a file or a folder, not to an address


def on_files(files: Files, config: Any) -> Files:
    """Paths from the root of the repository, and what the pages link to besides; no generator of a page."""
    theirs = [file for file in files if Path(file.abs_src_path or "").is_relative_to(ROOT / "docs")]
    paths = {ROOT / name for name in PAGES} | {ROOT / "docs" / file.src_uri for file in theirs}
    pages = {path for path in paths if path.suffix == ".md"}
    linked = {(page.parent / target).resolve() for page in pages for _, target in LINK.findall(page.read_text())}
    published = {path for path in paths if path.suffix not in SCRIPTS} | {path for path in linked if path.is_file()}
    for file in theirs:
        files.remove(file)
    for path in sorted(published):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File(uri, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A site has no page for a folder: its name stays, without a link."""
    here = (ROOT / page.file.src_uri).parent

    def bare(found: re.Match[str]) -> str:
        name, target = found.groups()
        return str(name) if (here / target).is_dir() else found[0]

    return LINK.sub(bare, markdown)
