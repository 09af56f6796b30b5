"""Whose entries they are."""

from __future__ import annotations

from collections import Counter

import pytest

from podwire.conntrack import attribution, rows
from podwire.conntrack.attribution import Kind, SnatTarget, Tally, attribute
from podwire.conntrack.names import Names, Role
from podwire.kernel.ctnetlink import Entry
from podwire.kernel.ctnetlink.counting import flow_key
from podwire.net import Protocol
from tests.unit.conntrack.worlds import (
    CLIENT,
    DNS,
    DNS_IP,
    GONE,
    NAMES,
    NODE,
    NODE_PORT,
    OTHER_NODE,
    OUTSIDE,
    WEB,
    WEB_IP,
    A,
    entry,
)

UDP = Protocol.UDP


@pytest.mark.parametrize(
    ("made", "kind", "service"),
    [
        (entry(CLIENT, WEB, 8080), Kind.POD_POD, None),
        (entry(CLIENT, WEB_IP, 80, via=(WEB, 8080)), Kind.SERVICE, "web"),
        (entry(NODE, DNS_IP, 53, via=(DNS, 5353), protocol=UDP), Kind.SERVICE, "dns"),
        (entry(CLIENT, DNS_IP, 53, protocol=UDP, answered=False), Kind.SERVICE, "dns"),
        (entry(CLIENT, OUTSIDE, 443, snat=NODE), Kind.EGRESS, None),
        (entry(CLIENT, OTHER_NODE, 10250), Kind.NODE, None),
        (entry(NODE, OUTSIDE, 443), Kind.NODE, None),
        (entry(OUTSIDE, NODE, 22), Kind.OUTSIDE, None),
        (entry(OUTSIDE, NODE, NODE_PORT, via=(DNS, 5353), protocol=UDP), Kind.OUTSIDE, "dns"),
        (entry(OUTSIDE, OTHER_NODE, NODE_PORT, protocol=UDP), Kind.OUTSIDE, None),
        (entry(CLIENT, GONE, 80), Kind.POD_POD, None),
        (entry("127.0.0.1", "127.0.0.1", 80), Kind.NODE, None),
    ],
)
def test_kinds(made: Entry, kind: Kind, service: str | None) -> None:
    flow = attribute(flow_key(made), NAMES)
    assert flow.kind is kind
    assert (flow.service.name if flow.service else None) == service


def tally_of(*entries: Entry, names: Names = NAMES) -> Tally:
    tally = Tally(names)
    tally.add(Counter(map(flow_key, entries)))
    return tally


def test_a_tally_counts_what_attribute_says() -> None:
    made = [
        *[entry(CLIENT, WEB_IP, 80, via=(WEB, 8080), source_port=n) for n in range(30)],
        *[entry(CLIENT, OUTSIDE, 443, snat=NODE, source_port=n) for n in range(20)],
        *[entry(CLIENT, DNS_IP, 53, protocol=UDP, answered=False, source_port=n) for n in range(5)],
        entry(OUTSIDE, NODE, 22),
        entry(GONE, WEB, 8080),
    ]
    tally = tally_of(*made)
    assert tally.total == 57
    assert {kind: n for kind, n in tally.kinds.items() if n} == Counter(
        attribute(flow_key(each), NAMES).kind for each in made
    )
    pods = tally.by_name(Role.POD)
    client = pods["default/client"]
    assert (client.opened, client.outside, client.services, client.unreplied) == (55, 20, 35, 5)
    assert pods["default/web"].answered == 31
    assert pods[GONE].opened == 1  # no name: by address
    assert tally.gone_pods() == 1
    assert {name: peer.answered for name, peer in tally.by_service().items()} == {
        "default/web": 30, "default/dns": 5,
    }  # fmt: skip
    assert tally.by_state() == {("TCP", "ESTABLISHED"): 52, ("UDP", "UNREPLIED"): 5}
    assert tally.natted == 50


def test_snat_ports_are_held_against_the_local_range() -> None:
    tally = tally_of(*[entry(CLIENT, OUTSIDE, 443, snat=NODE, source_port=n) for n in range(90)])
    assert tally.snat == {SnatTarget(A(NODE), A(OUTSIDE), 443, 6): 90}
    (row,) = rows.snat_rows(tally, (32768, 32867))
    assert (row["entries"], row["local_ports"], row["ratio"], row["warning"]) == (
        90, 100, 0.9, True,
    )  # fmt: skip
    assert not rows.snat_rows(tally, (32768, 60999))[0]["warning"]


def test_small_remotes_are_forgotten_before_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attribution, "MOST_REMOTES", 100)
    tally = Tally(NAMES)
    for number in range(400):
        remote = f"198.51.{number >> 8}.{number & 255}"
        busy = 5 if number == 7 else 1
        made = [entry(CLIENT, remote, 443, source_port=n, snat=NODE) for n in range(busy)]
        tally.add(Counter(map(flow_key, made)))
    assert tally.approximate
    assert tally.total == 404
    assert len(tally.peers) <= 102
    assert "198.51.0.7" in tally.by_name(Role.OUTSIDE)  # the largest is kept
    assert tally.by_name(Role.POD)["default/client"].opened == 404


def test_an_entrys_row_shows_nat_and_names() -> None:
    row = rows.entry_row(entry(CLIENT, WEB_IP, 80, via=(WEB, 8080)), NAMES)
    assert (row["kind"], row["service"], row["state"]) == ("service", "default/web", "ESTABLISHED")
    assert row["original"]["source_name"] == "default/client"
    assert row["original"]["destination"] == WEB_IP
    assert (row["reply"]["source"], row["reply"]["source_name"]) == (WEB, "default/web")
    assert "DST_NAT" in row["status"]
    assert row["bytes"] is None
