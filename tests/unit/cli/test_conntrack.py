"""What `podwire conntrack` prints: pure functions from answers to lines."""

from __future__ import annotations

from typing import Any

import pytest

from podwire.cli import conntrack
from podwire.cli.conntrack_top import GROUPS, View, cut, full_in, render, screen
from podwire.conntrack import rows
from podwire.conntrack.attribution import Tally
from podwire.kernel.ctnetlink.counting import flow_key
from podwire.net import Protocol
from podwire.terminal import width
from tests.unit.conntrack.worlds import CLIENT, NAMES, NODE, OUTSIDE, WEB, WEB_IP, entry


def top_answer() -> dict[str, Any]:
    tally = Tally(NAMES)
    made = [entry(CLIENT, WEB_IP, 80, via=(WEB, 8080), source_port=n) for n in range(30)]
    made += [entry(CLIENT, OUTSIDE, 443, snat=NODE, source_port=n) for n in range(9)]
    for each in made:
        tally.add({flow_key(each): 1})
    figures = {"source": "kernel", "used": 39, "limit": 40, "growth_per_s": 1.5, "full_in_s": 9,
               "rates": {"drop": 2.0}, "read_ms": 3.1}  # fmt: skip
    return figures | rows.tally_groups(tally, (32768, 60999), 100)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("columns", "height"), [(20, 6), (80, 24), (200, 50)])
def test_the_screen_fits_the_terminal(group: str, columns: int, height: int) -> None:
    lines = render(top_answer(), View(group), width=columns, height=height, before={})
    assert len(lines) == height
    assert all(width(line) <= columns for line in lines)


def test_the_screen_shows_the_largest_first() -> None:
    lines = screen(top_answer(), View("pod"), rows=10, before={"default/web": 20})
    text = "\n".join(lines)
    assert "39 of 40 97.5 %" in text
    assert "full in 9 seconds" in text
    assert "drop 2.0/s" in text
    assert [line.split()[0] for line in lines[4:]] == ["default/client", "default/web"]
    assert lines[5].split()[-1] == "+10"


def test_keys() -> None:
    view = View().pressed("r")
    assert (view.group, view.order) == ("remote", 0)
    assert view.pressed("o").order == 1
    assert view.pressed("+").interval_s == 1
    assert view.pressed("x") == view
    assert screen(top_answer(), view.pressed("o"), rows=5)[3].split()[2:4] == ["OPENED", "▼"]


def test_cutting_keeps_colours_whole() -> None:
    assert cut("\x1b[31mred text\x1b[0m", 3) == "\x1b[31mred\x1b[0m"
    assert cut("short", 10) == "short"


def test_a_row_shows_both_directions() -> None:
    row = rows.entry_row(entry(CLIENT, WEB_IP, 80, via=(WEB, 8080)), NAMES)
    line = "  ".join(conntrack.row_cells(row))
    assert f"{CLIENT}:4000 (default/client) → {WEB_IP}:80 default/web" in line
    assert f"⇒ {WEB}:8080 (default/web)" in line
    row = rows.entry_row(entry(CLIENT, OUTSIDE, 443, snat=NODE), NAMES)
    assert f"as {NODE}:4000 (n1)" in "  ".join(conntrack.row_cells(row))


def test_icmp_has_no_ports() -> None:
    ping = entry(CLIENT, WEB, 8 << 8, protocol=Protocol.ICMP, source_port=77)
    line = "  ".join(conntrack.row_cells(rows.entry_row(ping, NAMES)))
    assert f"{CLIENT} (default/client) → {WEB} (default/web) type 8 id 77" in line


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "not filling"), (30, "30 seconds"), (600, "10 minutes"), (90000, "25 hours")],
)
def test_time_to_full_in_words(seconds: int | None, words: str) -> None:
    assert words in full_in({"full_in_s": seconds})
