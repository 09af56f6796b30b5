"""Colours, aligned columns and a progress line for people; plain text where nobody looks.

Standard output decides: a terminal shows colours unless $NO_COLOR is set or it is a dumb one
(no-color.org), and lines that replace each other. Anything else gets neither.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence

_CODES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def live() -> bool:
    """Whether somebody looks: standard output is a terminal."""
    return sys.stdout.isatty()


def coloured() -> bool:
    """Whether to colour."""
    return live() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def paint(style: str, text: str) -> str:
    """`text` in bold, dim, red, green, yellow or cyan where colours are shown."""
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if coloured() else text


def progress(text: str) -> None:
    """A line that the next one replaces; nothing where lines cannot be replaced."""
    if live():
        print(f"\r\x1b[K{paint('dim', text)}", end="", flush=True)


def clear() -> None:
    """Take the progress line away."""
    if live():
        print("\r\x1b[K", end="", flush=True)


def width(text: str) -> int:
    """Columns that `text` takes, escape sequences not counted."""
    return len(_ESCAPE.sub("", text))


def pad(text: str, columns: int) -> str:
    """`text` with blanks behind it, so that it takes so many columns."""
    return text + " " * (columns - width(text))


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of rows that have equally many cells, which may be painted."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(pad, row, widths)).rstrip() for row in rows]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned lines below a dim header."""
    head, *lines = align([header, *rows])
    return [paint("dim", head), *lines]
