"""The connection table read, filtered and changed, beside `conntrack` and /proc; real entries."""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from podwire.kernel import netns, sysctl
from podwire.kernel.ctnetlink import (
    Entry,
    EventKind,
    Events,
    Filter,
    Match,
    Status,
    Table,
    TcpState,
    Tuple,
)
from podwire.kernel.ctnetlink.counting import flow_key
from podwire.kernel.ctnetlink.filters import abilities
from podwire.net import parse_address as A

TRACKING = """
table inet tracking {
  chain in {
    type filter hook prerouting priority -200
    ct state new ct mark set 0x17
  }
  chain zone-out {
    type filter hook output priority -300
    udp dport 7777 ct zone set 9
    udp sport 7777 ct zone set 9
  }
  chain zone-in {
    type filter hook prerouting priority -300
    udp dport 7777 ct zone set 9
    udp sport 7777 ct zone set 9
  }
  chain nat {
    type nat hook output priority -100
    ip daddr 10.96.0.1 udp dport 53 dnat ip to 127.0.0.1
  }
}
"""


@pytest.fixture
def table(netns_fd: int) -> Iterator[Table]:
    with Table(netns_fd) as table:
        yield table


def tool(fd: int, *arguments: str) -> str:
    result = netns.run(fd, ["conntrack", *arguments])
    assert result.returncode == 0, result.stderr
    return result.stdout


def udp(source: str, sport: int, destination: str, dport: int, **more: object) -> Entry:
    there = Tuple(A(source), A(destination), 17, sport, dport)
    return Entry(there, there.reversed(), Status.CONFIRMED, 300)._replace(**more)


def tcp(source: str, sport: int, destination: str, dport: int, **more: object) -> Entry:
    there = Tuple(A(source), A(destination), 6, sport, dport)
    status = Status.CONFIRMED | Status.ASSURED | Status.SEEN_REPLY
    entry = Entry(there, there.reversed(), status, 300, state=TcpState.ESTABLISHED)
    return entry._replace(**more)


def traffic(fd: int) -> None:
    """Real flows over loopback: UDP with and without answer, NAT, a zone, TCP, ICMP, IPv6."""
    assert netns.run(fd, ["nft", "-f", "-"], stdin=TRACKING).returncode == 0
    netns.run(fd, ["ip", "route", "add", "10.96.0.0/16", "dev", "lo"])
    for family, address, port in (
        (socket.AF_INET, "127.0.0.1", 53),
        (socket.AF_INET6, "::1", 53),
        (socket.AF_INET, "127.0.0.1", 7777),
    ):
        with (
            netns.socket(fd, family, socket.SOCK_DGRAM) as server,
            netns.socket(fd, family, socket.SOCK_DGRAM) as client,
        ):
            server.bind((address, port))
            for _ in range(3):
                client.sendto(b"question", ("10.96.0.1", 53) if port == 53 and family == 2
                              else (address, port))  # fmt: skip
                _, peer = server.recvfrom(99)
                server.sendto(b"answer", peer)
                client.recv(99)
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with (
            netns.socket(fd, family, socket.SOCK_STREAM) as server,
            netns.socket(fd, family, socket.SOCK_STREAM) as client,
        ):
            server.bind((address, 8080))
            server.listen()
            client.connect((address, 8080))
            accepted, _ = server.accept()
            client.sendall(b"x" * 1000)
            accepted.recv(2000)
            accepted.close()
    assert netns.run(fd, ["ping", "-c1", "-W2", "127.0.0.1"]).returncode == 0
    assert netns.run(fd, ["ping", "-c1", "-W2", "::1"]).returncode == 0


FIELD = re.compile(r"(\w+)=(\S+)")


def as_printed(line: str) -> tuple[object, ...]:
    """What a line of `conntrack -L -o extended` says, without what changes by itself (timeout)."""
    fields: dict[str, list[str]] = {}
    for name, value in FIELD.findall(line):
        fields.setdefault(name, []).append(value)
    words = line.split()
    state = words[5] if words[5].isupper() and "=" not in words[5] else ""
    return (
        int(words[3]),
        *(tuple(fields.get(name, [])) for name in ("src", "dst", "sport", "dport", "type", "id",
                                                   "packets", "bytes", "mark", "zone")),
        state,
        "[ASSURED]" in line,
        "[UNREPLIED]" in line,
    )  # fmt: skip


def as_ours(entry: Entry) -> tuple[object, ...]:
    directions = (entry.original, entry.reply)
    ports = entry.original.protocol in (6, 17)
    counters = [c for c in (entry.counters_original, entry.counters_reply) if c]
    text = socket.inet_ntop
    return (
        entry.original.protocol,
        tuple(text(d.family, d.source) for d in directions),
        tuple(text(d.family, d.destination) for d in directions),
        tuple(str(d.source_port) for d in directions) if ports else (),
        tuple(str(d.destination_port) for d in directions) if ports else (),
        () if ports else tuple(str(d.destination_port >> 8) for d in directions),
        () if ports else tuple(str(d.source_port) for d in directions),
        tuple(str(c.packets) for c in counters),
        tuple(str(c.bytes) for c in counters),
        (str(entry.mark),),
        (str(entry.zone),) if entry.zone else (),
        entry.state_name if entry.original.protocol == 6 else "",
        bool(entry.status & Status.ASSURED),
        not entry.status & Status.SEEN_REPLY,
    )


def test_full_parse_says_what_the_tool_prints(netns_fd: int, table: Table) -> None:
    sysctl.write(
        {"net.netfilter.nf_conntrack_acct": 1, "net.netfilter.nf_conntrack_timestamp": 1}, netns_fd
    )
    traffic(netns_fd)
    printed = []
    for family in ("ipv4", "ipv6"):
        printed += tool(netns_fd, "-L", "-f", family, "-o", "extended").splitlines()
    ours = list(table.entries())
    assert Counter(map(as_ours, ours)) == Counter(map(as_printed, printed))
    assert {entry.original.protocol for entry in ours} == {1, 6, 17, 58}
    assert {entry.zone for entry in ours} == {0, 9}
    assert any(entry.status & Status.DST_NAT for entry in ours)
    assert all(entry.start_ns and entry.timeout_s for entry in ours)


def test_counting_agrees_with_the_full_parse(netns_fd: int, table: Table) -> None:
    traffic(netns_fd)
    made = [
        entry
        for port in range(1000, 1400)
        for entry in (
            tcp("10.0.0.1", port, "10.96.0.1", 80),
            tcp("fd00::1", port, "fd00::2", 443, state=TcpState.SYN_SENT, mark=7),
            udp("10.0.0.2", port, "10.0.0.9", 53),
            udp("fd00::3", port, "fd00::2", 53),
            udp("10.0.0.2", port, "10.0.0.9", 53, zone=4),
        )
    ]
    assert table.create(made) == {}
    counted: Counter[object] = Counter()
    for portion in table.flow_counts():
        counted.update(portion)
    entries = list(table.entries())
    assert len(entries) == sum(counted.values()) == table.usage().used >= 2000
    # only what times by itself (a closing TCP flow) may move between the two dumps
    assert counted == Counter(map(flow_key, entries))


def test_usage_and_statistics_agree_with_the_tool(netns_fd: int, table: Table) -> None:
    traffic(netns_fd)
    assert table.usage() == (
        int(tool(netns_fd, "-C")),
        int(sysctl.read("net.netfilter.nf_conntrack_max")),
    )
    expected: dict[int, dict[str, int]] = {
        int(fields.pop("cpu")): {name: int(value) for name, value in fields.items()}
        for fields in (dict(FIELD.findall(line)) for line in tool(netns_fd, "-S").splitlines())
    }
    assert table.cpu_statistics() == expected
    proc, totals = table.proc_statistics(), table.statistics()
    assert proc["entries"] == table.usage().used
    for name in ("drop", "early_drop", "insert_failed", "invalid", "search_restart"):
        assert proc[name] == totals[name] == sum(cpu[name] for cpu in expected.values())


MIXED = [
    *(udp("10.0.0.1", port, "10.96.0.10", 53, mark=5) for port in range(1, 30)),
    *(udp("10.0.0.1", port, "10.96.0.11", 53) for port in range(1, 30)),
    *(udp("10.0.0.1", port, "10.96.0.10", 53, zone=3) for port in range(1, 30)),
    *(tcp("10.0.0.2", port, "10.96.0.10", 53) for port in range(1, 30)),
    *(udp("fd00::1", port, "fd00::a", 53) for port in range(1, 30)),
    *(udp("fd00::1", port, "fd00::b", 53) for port in range(1, 30)),
]

FILTERS = [
    Filter(original=Match(destination=A("10.96.0.10"))),
    Filter(original=Match(destination=A("10.96.0.10"), protocol=17, destination_port=53), zone=0),
    Filter(original=Match(destination=A("10.96.0.10"), protocol=17, destination_port=53), zone=3),
    Filter(reply=Match(source=A("10.96.0.11"), protocol=17, source_port=53)),
    Filter(original=Match(destination=A("fd00::a"), protocol=17)),
    Filter(original=Match(source=A("fd00::1")), reply=Match(source=A("fd00::b"))),
    Filter(original=Match(protocol=17, destination_port=53)),
    Filter(status=0, status_mask=Status.SEEN_REPLY),
    Filter(mark=5, mark_mask=0xFF),
    Filter(family=socket.AF_INET6, status=0, status_mask=Status.ASSURED),
    Filter(family=socket.AF_INET),
]


@pytest.mark.parametrize("kernel_filters", [True, False], ids=["kernel", "fallback"])
@pytest.mark.parametrize("filter_", FILTERS)
def test_filters_mean_the_same_everywhere(
    table: Table, filter_: Filter, kernel_filters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel_filters:
        none = abilities()._replace(dump=frozenset(), delete=frozenset())
        monkeypatch.setattr("podwire.kernel.ctnetlink.filters.abilities", lambda: none)
    assert table.create(MIXED) == {}
    everything = Counter(map(identity, table.entries()))
    meant = Counter(identity(entry) for entry in table.entries() if filter_.fits(entry))
    assert 0 < len(meant) < len(everything)
    assert Counter(map(identity, table.entries(filter_))) == meant
    assert table.count(filter_) == meant.total()
    table.delete(filter_)
    assert Counter(map(identity, table.entries())) == everything - meant


def identity(entry: Entry) -> tuple[object, ...]:
    return entry.original, entry.zone, entry.mark


def test_a_filter_must_leave_something_out(table: Table) -> None:
    with pytest.raises(ValueError, match="everything"):
        table.delete(Filter())


def test_a_successor_is_not_deleted_in_its_predecessors_place(table: Table) -> None:
    table.create([udp("10.0.0.1", 1, "10.0.0.2", 53)])
    (old,) = table.entries()
    assert table.delete_entries([old]) == 1
    table.create([udp("10.0.0.1", 1, "10.0.0.2", 53)])
    (new,) = table.entries()
    if new.id != old.id:  # the id comes from the entry's place in memory and its tuple
        assert table.delete_entries([old]) == 0
    assert table.delete_entries([new]) == 1
    assert table.delete_entries([new]) == 0


def collect(events: Events, until: Callable[[list[EventKind]], bool]) -> list[EventKind]:
    seen: list[EventKind] = []
    while not until(seen):
        assert events.wait(10), seen
        seen += [event.kind for event in events.drain()]
    return seen


def test_events_tell_what_comes_changes_and_goes(netns_fd: int, table: Table) -> None:
    with Events(netns_fd=netns_fd) as events:
        traffic(netns_fd)
        seen = collect(events, lambda kinds: EventKind.UPDATE in kinds)
        assert seen[0] is EventKind.NEW
        there = Tuple(A("10.0.0.1"), A("10.0.0.2"), 17, 1, 53)
        table.create([Entry(there, there.reversed(), timeout_s=60, mark=9)])
        collect(events, lambda kinds: EventKind.NEW in kinds)
        table.delete(Filter(mark=9, mark_mask=0xFF))
        assert events.wait(10)
        gone = [event for event in events.drain() if event.kind is EventKind.DESTROY]
        assert there in [event.entry.original for event in gone if event.entry]


def test_an_overrun_is_told(netns_fd: int, table: Table) -> None:
    with Events(netns_fd=netns_fd, buffer_bytes=4096) as events:
        table.create([udp("10.0.0.1", port, "10.0.0.2", 53) for port in range(1, 200)])
        assert EventKind.LOST in [event.kind for event in events.drain()]
        assert len(list(table.entries())) == 199


def test_half_a_dump_disturbs_nobody(table: Table) -> None:
    table.create([udp("10.0.0.1", port, "10.0.0.2", 53) for port in range(1, 2000)])
    first = next(iter(table.entries()))
    assert first.original.destination_port == 53
    assert len(list(table.entries())) == 1999
