"""Tables that are read at any width: on a narrow terminal in another form, or cell by cell, but never cut."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

BORDER = 3  # columns for each cell: a line and two spaces; and a last line


class Column(NamedTuple):
    """room: the least width of text that may be wrapped; None: it may not."""

    name: str
    right: bool = False
    room: int | None = None


@dataclass(frozen=True)
class Form:
    """One way to lay a table out. ends: rows that end a section."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Text]]
    ends: Collection[int] = ()

    @property
    def width(self) -> int:
        cells = zip(*([Text(column.name) for column in self.columns], *self.rows))
        widths = [
            max(cell_len(line) for cell in of for line in cell.plain.split("\n"))
            if column.room is None
            else column.room
            for column, of in zip(self.columns, cells)
        ]
        return sum(widths) + BORDER * len(widths) + 1

    def table(self, title: str, caption: str | None) -> Table:
        table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
        for column in self.columns:
            table.add_column(
                column.name, justify="right" if column.right else "left", no_wrap=column.room is None, overflow="fold"
            )
        for i, row in enumerate(self.rows):
            table.add_row(*row, end_section=i in self.ends)
        return table

    def stacked(self, title: str, caption: str | None) -> Group:
        """A line for each cell, beneath the first of its row."""
        lines = [Text(title, style="italic")]
        for row in self.rows:
            lines.append(Text.assemble((row[0].plain, "bold")))
            for column, cell in zip(self.columns[1:], row[1:]):
                if cell.plain:
                    lines.append(Text.assemble(f"  {column.name}: ", cell))
        return Group(*lines, *([Text(caption, style="dim italic")] if caption else []))


def fitted(width: int, title: str, caption: str | None, *forms: Form) -> RenderableType:
    """The first form that is no wider, else the first one stacked. Names of its columns are then in one line."""
    for form in forms:
        if form.width <= width:
            return form.table(title, caption)
    return forms[0].stacked(title, caption)
