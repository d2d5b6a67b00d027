"""Types of options, for every command of the tests: what is refused ends it with status 2, before any work."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    expected = f"an integer >= {least}" if most is None else f"an integer from {least} to {most}"

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) and (most is None or int(text) <= most):
                return int(text)
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


def seconds(text: str) -> float:
    """Infinity too: without end."""
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
