"""Where the jobs print."""

from __future__ import annotations

import sys

from rich.console import Console


def make_console(color: bool) -> Console:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # the text may hold what the terminal's encoding lacks
    console = Console(no_color=None if color else True, highlight=False)
    if not console.is_terminal:
        console.width = 120
    return console
