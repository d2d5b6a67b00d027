"""What the site makes of docstrings: blocks of arguments, which are indented, become lists. An extension of Griffe."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

HEADING = re.compile(r"^(Args|Returns|Yields|Raises):$")
ENTRY = re.compile(r"^ {4}([\w*][\w*, ]*): (.*)")
NEXT = "    "


def listed(text: str) -> str:
    """A heading in bold, its entries as a list; what follows an entry deeper is a part of it."""
    lines: list[str] = []
    inside = False
    for line in text.split("\n"):
        if heading := HEADING.match(line):
            inside = True
            lines += [f"**{heading[1]}**", ""]
            continue
        inside &= not line or line.startswith(NEXT)
        entry = ENTRY.match(line) if inside else None
        if entry:
            names = ", ".join(f"`{name.strip()}`" for name in entry[1].split(","))
            line = f"- {names}: {entry[2]}"
        elif inside and not line.startswith(2 * NEXT):
            line = line.strip()
        lines.append(line)
    return "\n".join(lines)


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = listed(obj.docstring.value)
