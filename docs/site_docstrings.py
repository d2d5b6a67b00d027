"""What the site makes of docstrings. An extension of Griffe.

Blocks of arguments, which are indented, become lists. Of a class of fields, a named tuple or a dataclass, these are
listed, with their shapes and the comments that stand beside them.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Object

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


def fields(cls: Class) -> list[str]:
    """A line of Markdown for each, as the source has it."""
    found = []
    for name, field in cls.attributes.items():
        said, _, comment = field.source.strip().partition("  # ")
        if said.startswith(f"{name}:") and "ClassVar" not in said:
            found.append(f"- `{said}`" + f": {comment}" * bool(comment))
    return found


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = listed(obj.docstring.value)

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        of_fields = "dataclass" in cls.labels or "NamedTuple" in map(str, cls.bases)
        decorated = any("dataclass" in str(decorator.value) for decorator in cls.decorators)
        if cls.docstring and (of_fields or decorated) and (found := fields(cls)):
            cls.docstring.value += "\n\n**Fields**\n\n" + "\n".join(found)
