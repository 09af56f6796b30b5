"""How commands print what they were told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from podwire.terminal import table


def print_json(answer: object) -> None:
    """For programs: `--json`."""
    print(json.dumps(answer, indent=2))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned, with a header."""
    print("\n".join(table(header, rows)))


def indented(lines: Iterable[str]) -> list[str]:
    """What belongs to the line above."""
    return [f"  {line}" for line in lines]
