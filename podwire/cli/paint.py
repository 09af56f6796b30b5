"""Colours and aligned tables for people; plain text when standard output is not a terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

_CODES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "blue": 34, "cyan": 36}
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def coloured() -> bool:
    """Whether to colour: a terminal, and neither NO_COLOR nor a dumb one (no-color.org)."""
    if "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return False
    return sys.stdout.isatty()


def paint(colour: str, text: str) -> str:
    """`text` in bold, dim, red, green, yellow, blue or cyan where colours are shown."""
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if coloured() else text


def width(text: str) -> int:
    """Columns that `text` takes, escape sequences not counted."""
    return len(_ESCAPE.sub("", text))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines, the header dim. Cells may be painted."""
    widths = [max(map(width, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell + " " * (size - width(cell)) for cell, size in zip(cells, widths, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [paint("dim", line(header)), *map(line, rows)]
