"""`podwire conntrack top`: the largest users of the table on a full screen, over any terminal.

Plain escape sequences: the alternate screen, the cursor home, lines cut to the width. `render` is
pure; `run` owns the terminal and gives it back also when it is interrupted.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from podwire.terminal import paint, table, width

GROUPS = ("pod", "service", "remote", "node", "state", "kind", "snat")
_KEYS = {"p": "pod", "s": "service", "r": "remote", "n": "node", "t": "state", "k": "kind",
         "m": "snat"}  # fmt: skip
_LOSSES = ("drop", "early_drop", "insert_failed", "connections_full", "ports_exhausted")
_HELP = (
    "p pods  s services  r remotes  n nodes  t states  k kinds  m snat   o order  + - pace  q quit"
)
_Columns: TypeAlias = tuple[tuple[str, str], ...]
_PEER: _Columns = (
    ("ENTRIES", "entries"), ("OPENED", "opened"), ("ANSWERED", "answered"),
    ("SERVICES", "services"), ("OUTSIDE", "outside"), ("UNREPLIED", "unreplied"),
)  # fmt: skip
_COLUMNS: dict[str, _Columns] = {
    "pod": _PEER,
    "service": (("ENTRIES", "entries"), ("UNREPLIED", "unreplied")),
    "remote": _PEER,
    "node": _PEER,
    "state": (("ENTRIES", "entries"),),
    "kind": (("ENTRIES", "entries"),),
    "snat": (("PORTS", "entries"), ("OF", "local_ports"), ("MASQUERADE MAY", "masquerade_ports")),
}
_TITLES = {"pod": "POD", "service": "SERVICE", "remote": "REMOTE", "node": "NODE",
           "state": "STATE", "kind": "KIND", "snat": "NODE ADDRESS → DESTINATION"}  # fmt: skip


@dataclass(frozen=True)
class View:
    """What is shown, and in which order (a column's index)."""

    group: str = "pod"
    order: int = 0
    interval_s: float = 2.0

    def pressed(self, key: str) -> View:
        """The view after a key."""
        if key in _KEYS:
            return replace(self, group=_KEYS[key], order=0)
        if key == "o":
            return replace(self, order=(self.order + 1) % len(_COLUMNS[self.group]))
        if key in "+-":
            factor = 0.5 if key == "+" else 2
            return replace(self, interval_s=min(60.0, max(0.5, self.interval_s * factor)))
        return self


def render(
    answer: dict[str, Any],
    view: View,
    *,
    width: int,
    height: int,
    before: dict[str, int] | None = None,
) -> list[str]:
    """The whole screen, keys in the last line. `before` are entries by name a moment ago."""
    lines = screen(answer, view, rows=max(1, height - 5), before=before)[: height - 1]
    lines += [""] * (height - 1 - len(lines))
    return [cut(line, width) for line in [*lines, paint("dim", _HELP)]]


def screen(
    answer: dict[str, Any], view: View, *, rows: int, before: dict[str, int] | None = None
) -> list[str]:
    """Figures, and the group's table of at most so many rows."""
    columns = _COLUMNS[view.group]
    field = columns[view.order][1]
    found = sorted(answer["groups"][view.group], key=lambda r: (-r[field], r["name"]))[:rows]
    header = [_TITLES[view.group], *(title for title, _ in columns)]
    header[view.order + 1] += " ▼"
    if before is not None:
        header.append("CHANGE")
    cells = [_cells(row, columns, before) for row in found]
    return [*_head_lines(answer), "", *table(header, cells)]


def _cells(row: dict[str, Any], columns: _Columns, before: dict[str, int] | None) -> list[str]:
    name = paint("red", row["name"]) if row.get("warning") else row["name"]
    cells = [name, *(f"{row[field]:,}" for _, field in columns)]
    if before is not None:
        change = row["entries"] - before.get(row["name"], 0)
        cells.append(f"{change:+,}" if change else "")
    return cells


def full_in(answer: dict[str, Any]) -> str:
    """When the table will be full, in words."""
    seconds = answer["full_in_s"]
    if seconds is None:
        return "not filling"
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"full in {seconds / size:.0f} {unit}"
    return paint("red", f"full in {seconds} seconds")


def _head_lines(answer: dict[str, Any]) -> list[str]:
    """How full, how fast; what the entries are."""
    used, limit = answer["used"], answer["limit"]
    percent = 100 * used / limit if limit else 0
    colour = "red" if percent >= 80 else "yellow" if percent >= 60 else "green"
    losses = "  ".join(
        paint("red", f"{name} {answer['rates'][name]:,.1f}/s")
        for name in _LOSSES
        if answer["rates"].get(name)
    )
    first = (
        f"{paint('bold', answer['source'])} {used:,} of {limit:,} "
        f"{paint(colour, f'{percent:.1f} %')}  {answer['growth_per_s']:+,.1f}/s, "
        f"{full_in(answer)}  {losses}"
    )
    second = (
        f"translated {answer['translated']:,}  unreplied {answer['unreplied']:,}  "
        f"assured {answer['assured']:,}  of gone pods {answer['gone_pods']:,}  "
        f"read in {answer['read_ms']:,.0f} ms"
        + ("  (small remotes left out)" if answer["approximate"] else "")
    )
    return [first.rstrip(), second]


def cut(line: str, columns: int) -> str:
    """The line in so many columns; escape sequences take none."""
    if width(line) <= columns:
        return line
    out, used, index = "", 0, 0
    while index < len(line) and used < columns:
        if line[index] == "\x1b":
            end = line.index("m", index) + 1
            out, index = out + line[index:end], end
            continue
        out, used, index = out + line[index], used + 1, index + 1
    return out + ("\x1b[0m" if "\x1b" in out else "")


@contextmanager
def _screen() -> Generator[int]:
    """The terminal in our hands: its descriptor; as it was afterwards."""
    fd = sys.stdin.fileno()
    saved = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        sys.stdout.write("\x1b[?1049h\x1b[?25l")
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, saved)
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()


def run(ask: Callable[[], dict[str, Any]], group: str, interval_s: float) -> int:
    """Show until `q`; the exit status."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print("podwire: top needs a terminal; --once prints once", file=sys.stderr)
        return 2
    view = View(group, 0, interval_s)
    wake, waker = os.pipe()

    def resized(_number: int, _frame: object) -> None:
        os.write(waker, b"w")

    before_signal = signal.signal(signal.SIGWINCH, resized)
    try:
        with _screen() as fd:
            return _loop(ask, view, fd, wake)
    finally:
        signal.signal(signal.SIGWINCH, before_signal)
        os.close(wake)
        os.close(waker)


def _loop(ask: Callable[[], dict[str, Any]], view: View, fd: int, wake: int) -> int:
    before: dict[str, dict[str, int]] = {}
    while True:
        answer = ask()
        due = time.monotonic() + view.interval_s
        while True:
            size = shutil.get_terminal_size()
            lines = render(
                answer, view, width=size.columns, height=size.lines, before=before.get(view.group)
            )
            sys.stdout.write("\x1b[H" + "\x1b[K\r\n".join(lines) + "\x1b[J")
            sys.stdout.flush()
            left = max(0.0, due - time.monotonic())
            ready = select.select([fd, wake], [], [], left)[0]
            if not ready:
                break
            if wake in ready:
                os.read(wake, 64)
            if fd in ready:
                key = os.read(fd, 1).decode(errors="replace")
                if key in ("q", "\x03", ""):
                    return 0
                view = view.pressed(key)
        before = {
            name: {row["name"]: row["entries"] for row in rows}
            for name, rows in answer["groups"].items()
        }
