"""What must hold of the site, or a strict build fails: hooks of mkdocs.

Its Markdown is another dialect than that of most readers of the repository. So every page is rendered by both, and what
it is made of is counted. And nothing may be loaded from elsewhere: a reader without a network sees all of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

log = logging.getLogger("mkdocs.hooks.site")
KINDS = ("h1", "h2", "h3", "p", "ul", "ol", "li", "table", "tr", "td", "pre", "code", "img", "strong", "em")
COMMONMARK = MarkdownIt("commonmark").enable("table")
LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\"'> ]+"
    r"|<link\b[^>]*\brel=[\"']?(?:stylesheet|preload|preconnect|icon)\b[^>]*\bhref=[\"']?(?:https?:)?//[^\"'> ]+"
    r"|(?:@import\s+|url\()[\"']?(?:https?:)?//[^\"') ]+"
)


def counted(html: str) -> dict[str, int]:
    return {kind: len(re.findall(rf"<{kind}[ >/]", html)) for kind in KINDS}


def differences(markdown: str, html: str) -> dict[str, tuple[int, int]]:
    """Kinds of elements of which CommonMark makes another number, and both numbers."""
    expected, found = counted(COMMONMARK.render(markdown)), counted(html)
    return {kind: (expected[kind], found[kind]) for kind in KINDS if expected[kind] != found[kind]}


def loaded(text: str) -> Iterator[str]:
    """What HTML or CSS takes from another host. A link that a reader follows is none."""
    return (found[0] for found in LOADED.finditer(text))


def on_page_content(html: str, page: Any, **_: Any) -> None:
    if ":::" in page.markdown:
        return  # from docstrings
    for kind, (expected, found) in differences(page.markdown, html).items():
        log.warning(f"{page.file.src_uri}: {found} <{kind}> where CommonMark makes {expected}")


def on_post_build(config: Any) -> None:
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for what in loaded(path.read_text(encoding="utf-8")):
                log.warning(f"{path.name} loads {what}")
