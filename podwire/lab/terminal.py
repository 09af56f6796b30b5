"""Colours and alignment for people; plain text when nobody looks (not a terminal, NO_COLOR)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import TextIO

_CODES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "blue": 34, "cyan": 36}
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


class Terminal:
    """Where to print, and whether it shows colours."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.colours = self.live and "NO_COLOR" not in os.environ

    def paint(self, text: str, *styles: str) -> str:
        """`text` in the named styles, or as it is."""
        if not self.colours or not styles or not text:
            return text
        codes = ";".join(str(_CODES[style]) for style in styles)
        return f"\x1b[{codes}m{text}\x1b[0m"

    def print(self, text: str = "") -> None:
        print(text, file=self.stream, flush=True)

    def progress(self, text: str) -> None:
        """A line that the next one replaces; nothing where lines cannot be replaced."""
        if self.live:
            print(f"\r\x1b[K{self.paint(text, 'dim')}", end="", file=self.stream, flush=True)

    def clear(self) -> None:
        """Take the progress line away."""
        if self.live:
            print("\r\x1b[K", end="", file=self.stream, flush=True)


def width(text: str) -> int:
    """Columns that `text` takes, colours not counted."""
    return len(_ESCAPE.sub("", text))


def pad(text: str, columns: int) -> str:
    return text + " " * (columns - width(text))


def table(rows: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """The rows with their cells aligned to the left."""
    if not rows:
        return []
    columns = max(map(len, rows))
    widths = [max((width(r[i]) for r in rows if i < len(r)), default=0) for i in range(columns)]
    return [gap.join(map(pad, row, widths)).rstrip() for row in rows]
