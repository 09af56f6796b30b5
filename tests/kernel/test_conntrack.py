"""Cleaning, selecting, watching and setting the kernel's table; the eBPF data path's own."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from podwire.agent.conntrack import apply_options
from podwire.agent.conntrack_metrics import ConntrackCollector
from podwire.agent.options import ConntrackOptions
from podwire.agent.reaping import ReapingPart
from podwire.agent.sysctls import Sysctls
from podwire.conntrack import facts, stale
from podwire.conntrack.ebpf import EbpfSource
from podwire.conntrack.inspector import Inspector
from podwire.conntrack.stale import Removal
from podwire.datapath.ebpf.connections import Connections
from podwire.datapath.ebpf.programs import Programs, missing
from podwire.datapath.ebpf.services import ServicesPart as EbpfServices
from podwire.errors import InvalidObject, KernelError, PodwireError
from podwire.kernel import netns, sysctl
from podwire.kernel.ctnetlink import Entry, Events, Filter, Status, Table
from podwire.kernel.ctnetlink.filters import abilities
from podwire.net import Protocol
from podwire.services import ServiceTable
from tests.kernel.ebpf_services import VIP, make_port, make_table
from tests.kernel.ebpf_world import POD, World
from tests.unit.conntrack.worlds import (
    CLIENT,
    DNS,
    DNS_IP,
    NAMES,
    NODE,
    NODE_PORT,
    OUTSIDE,
    WEB,
    WEB_IP,
    entry,
    service_port,
    service_table,
)

UDP = Protocol.UDP
OTHER = "10.244.1.9"


@pytest.fixture
def table(netns_fd: int) -> Iterator[Table]:
    with Table(netns_fd) as table:
        yield table


def flows(count: int, *where: Any, first: int = 1000, **more: Any) -> list[Entry]:
    return [entry(*where, source_port=n, **more) for n in range(first, first + count)]


DEAD = [
    *flows(30, CLIENT, DNS_IP, 53, via=(OTHER, 5353), protocol=UDP),
    *flows(20, CLIENT, DNS_IP, 53, via=(OTHER, 5354), protocol=UDP, first=2000),
    *flows(10, OUTSIDE, NODE, NODE_PORT, via=(OTHER, 5353), protocol=UDP),
]
ALIVE = [
    *flows(30, OUTSIDE, DNS_IP, 53, via=(DNS, 5353), protocol=UDP),
    *flows(10, "203.0.113.7", NODE, NODE_PORT, protocol=UDP),  # a program of the node's own
    *flows(10, CLIENT, "198.51.100.1", 53, via=(OTHER, 5353), protocol=UDP),  # another proxy's
    *flows(10, CLIENT, DNS_IP, 53, via=(OTHER, 5353)),  # TCP
]
FULL = service_table(service_port("dns", UDP, DNS_IP, 53, (DNS, 5353), (OTHER, 5353), (OTHER, 5354),
                                  node_port=NODE_PORT))  # fmt: skip
LESS = service_table(service_port("dns", UDP, DNS_IP, 53, (DNS, 5353), node_port=NODE_PORT))


def originals(table: Table) -> Counter[Any]:
    return Counter(each.original for each in table.entries())


class Rules:
    """A data path that notes when it is told what."""

    requirements = ()

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self) -> None: ...
    def apply(self, table: ServiceTable) -> None:
        self.calls.append("apply")

    def flush(self) -> None:
        self.calls.append("flush")

    def verify(self) -> list[str]:
        return ["one"]

    def cleanup(self) -> None: ...
    def status(self) -> dict[str, object]:
        return {"rules": 1}


@pytest.mark.parametrize("way", ["filters", "entries", "no filters"])
def test_stale_flows_go_and_nobody_elses(
    netns_fd: int, table: Table, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "entries":
        monkeypatch.setattr(stale, "MOST_FILTERS", 1)
    if way == "no filters":
        none = abilities()._replace(dump=frozenset(), delete=frozenset())
        monkeypatch.setattr("podwire.kernel.ctnetlink.filters.abilities", lambda: none)
        monkeypatch.setattr(stale, "abilities", lambda: none)
    removals: list[Removal] = []
    path = Rules()
    part = ReapingPart(path, removals.append, netns_fd)
    part.start()
    assert table.create(DEAD + ALIVE) == {}
    part.apply(FULL)
    part.flush()  # the first pass judges all, and all of these serve
    assert originals(table).total() == len(DEAD + ALIVE)
    part.apply(LESS)
    assert originals(table).total() == len(DEAD + ALIVE)  # until the data path's deletes are out
    part.flush()
    assert originals(table) == Counter(each.original for each in ALIVE)
    assert removals[-1].deleted(4) == len(DEAD)
    assert removals[-1].deleted(6) == 0
    assert part.status() == {"rules": 1, "stale flows deleted": len(DEAD)}
    assert part.verify() == ["one"]
    passes = len(removals)
    part.apply(LESS)
    part.flush()
    assert len(removals) == passes  # nothing changed: the table is not read
    assert path.calls == ["apply", "flush"] * 3


def test_an_endpoint_that_comes_back_keeps_its_flows(netns_fd: int, table: Table) -> None:
    part = ReapingPart(Rules(), lambda removal: None, netns_fd)
    part.start()
    table.create(DEAD)
    part.apply(FULL)
    part.flush()
    part.apply(LESS)
    part.apply(FULL)
    part.flush()
    assert originals(table).total() == len(DEAD)


def test_a_pass_that_failed_is_made_again(
    netns_fd: int, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = ReapingPart(Rules(), lambda removal: None, netns_fd)
    part.start()
    table.create(DEAD)
    part.apply(LESS)

    def refuse(*_: object) -> Removal:
        raise KernelError("no")

    with monkeypatch.context() as patch:
        patch.setattr(stale, "remove", refuse)
        part.flush()
    assert originals(table).total() == len(DEAD)
    part.verify()
    assert originals(table).total() == 0


@pytest.fixture
def inspector(netns_fd: int, table: Table) -> Inspector:
    table.create(DEAD + ALIVE)
    table.create(flows(5, CLIENT, WEB_IP, 80, via=(WEB, 8080)))
    table.create(flows(7, CLIENT, OUTSIDE, 443, snat=NODE))
    return Inspector(table, lambda: NAMES, netns_fd)


def test_status_and_advice(inspector: Inspector, netns_fd: int) -> None:
    status = inspector.status()
    assert status["used"] == len(DEAD + ALIVE) + 12
    assert status["limit"] == int(sysctl.read("net.netfilter.nf_conntrack_max"))
    assert not status["pressure"]
    assert status["timeouts"]["udp_timeout"] == 30
    assert (status["accounting"], status["timestamps"]) == (False, False)
    assert status["full_messages"] in (0, None)
    sysctl.write({"net.netfilter.nf_conntrack_acct": 1}, netns_fd)
    assert inspector.status()["accounting"]
    advice = inspector.advise()
    assert "first one set it" in advice["refusal"]
    before = sysctl.read("net.netfilter.nf_conntrack_max")
    with pytest.raises(PodwireError, match="first one set it"):
        inspector.apply()
    assert sysctl.read("net.netfilter.nf_conntrack_max") == before


def test_ls_and_top(inspector: Inspector) -> None:
    listed = list(inspector.ls({"service": "web"}))
    assert len(listed) == 5
    assert all(row["reply"]["source_name"] == "default/web" for row in listed)
    some = list(inspector.ls({"limit": "3"}))
    assert len(some) == 4
    assert some[-1] == {"more": len(DEAD + ALIVE) + 9}
    groups = inspector.top({})["groups"]
    assert {"name": "default/web", "entries": 5, "unreplied": 0} in groups["service"]
    (egress,) = (row for row in groups["snat"] if row["destination"] == OUTSIDE)
    assert egress["entries"] == 7


@pytest.mark.parametrize(
    ("query", "gone"),
    [
        ({"service": "web"}, 5),
        ({"pod": "web"}, 5),
        ({"target": f"{OTHER}:5354", "protocol": "udp"}, 20),
        ({"kind": "egress"}, 17),  # with the other proxy's flows, to an address that is outside
        ({"stale": "1"}, 60),
    ],
)
def test_flush_shows_first_what_would_go(
    inspector: Inspector, table: Table, query: dict[str, str], gone: int
) -> None:
    if query.get("kind"):
        gone = len(list(inspector.ls(query)))
    before = table.usage().used
    shown = inspector.flush(query)
    assert (shown["entries"], shown["deleted"]) == (gone, False)
    assert table.usage().used == before
    assert inspector.flush(query | {"yes": "1"})["deleted"]
    assert table.usage().used == before - gone
    assert inspector.flush(query)["entries"] == 0


def test_nothing_is_flushed_by_mistake(inspector: Inspector, table: Table) -> None:
    before = table.usage().used
    for query in ({}, {"yes": "1"}, {"yes": "1", "limit": "5"}):
        with pytest.raises(InvalidObject, match="say what to flush"):
            inspector.flush(query)
    assert table.usage().used == before


def test_watch_tells_of_events_and_of_an_overrun(
    inspector: Inspector, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.delete(Filter(family=socket.AF_INET))
    stop = threading.Event()
    rows = inspector.watch({"protocol": "udp"}, stop.is_set)
    assert next(rows) == {}  # now it listens
    table.create(flows(1, CLIENT, DNS_IP, 53, via=(DNS, 5353), protocol=UDP))
    row = next(row for row in rows if row)
    assert (row["event"], row["service"]) == ("NEW", "default/dns")
    stop.set()
    assert [row for row in rows if row] == []
    monkeypatch.setattr("podwire.conntrack.inspector.Events", partial(Events, buffer_bytes=4096))
    stop.clear()
    rows = inspector.watch({}, stop.is_set)
    assert next(rows) == {}
    made = flows(300, OUTSIDE, NODE, 22)
    table.create(made)
    seen: list[dict[str, Any]] = []
    for row in rows:
        if not row:
            break
        seen.append(row)
    assert {"event": "LOST"} in seen
    anew = [row for row in seen if row["event"] == "EXISTING"]
    assert len(anew) == table.usage().used == 301


def test_kube_proxys_settings(netns_fd: int) -> None:
    options = ConntrackOptions(
        max_per_core=32768,
        min=131072,
        tcp_established_timeout_s=86400,
        tcp_close_wait_timeout_s=3600,
        udp_timeout_s=250,
        tcp_be_liberal=True,
    )
    refusals = netns.call(netns_fd, lambda: apply_options(options, Sysctls(), cores=64))
    (refusal,) = refusals
    assert refusal.startswith("nf_conntrack_max stays ")
    assert "not 1048576" in refusal
    here = facts.settings(netns_fd)
    assert here.tcp_be_liberal
    assert (
        here.timeouts["tcp_timeout_established"],
        here.timeouts["tcp_timeout_close_wait"],
        here.timeouts["udp_timeout"],
        here.timeouts["udp_timeout_stream"],
    ) == (86400, 3600, 250, 120)
    assert netns.call(netns_fd, lambda: apply_options(ConntrackOptions(), Sysctls())) == []


@pytest.mark.skipif(bool(missing()), reason=f"lacks {', '.join(missing())}")
def test_the_ebpf_data_paths_own_table() -> None:
    with World() as world:
        programs = Programs(world.name)
        try:
            check_ebpf_table(world, programs)
        finally:
            programs.close()


def check_ebpf_table(world: World, programs: Programs) -> None:
    part = EbpfServices(programs=programs)
    netns.call(world.spaces["node"], part.start)
    port = make_port("web", 80, [POD[1][4]], family=4, protocol=Protocol.TCP)
    netns.call(world.spaces["node"], lambda: part.apply(make_table([port])))
    world.serve("pod1", POD[1][4], 80)
    for _ in range(5):
        assert world.ask("pod2", VIP[4], 80)[0] == POD[1][4]
    source = EbpfSource(programs)
    entries = list(source.entries())
    through = [each for each in entries if socket.inet_ntoa(each.original.destination) == VIP[4]]
    assert len(through) == 5
    for each in through:
        assert socket.inet_ntoa(each.original.source) == POD[2][4]
        assert (socket.inet_ntoa(each.reply.source), each.reply.source_port) == (POD[1][4], 80)
        assert each.status & (Status.SEEN_REPLY | Status.DST_NAT) == (
            Status.SEEN_REPLY | Status.DST_NAT
        )
        assert each.state_name in ("ESTABLISHED", "FIN_WAIT", "TIME_WAIT", "CLOSE")
    assert 2 * len(entries) == len(list(Connections(programs).items()))
    assert source.usage().used == len(entries)
    counted = sum(sum(portion.values()) for portion in source.flow_counts())
    assert counted == len(entries)
    inspector = Inspector(source, lambda: NAMES, world.spaces["node"])
    assert inspector.status()["source"] == "ebpf"
    assert inspector.top({})["entries"] == len(entries)
    assert inspector.flush({"address": VIP[4], "yes": "1"})["entries"] == 5
    assert source.usage().used == len(entries) - 5
    assert not list(source.entries(Filter(status=Status.DST_NAT, status_mask=Status.DST_NAT)))


def test_the_table_closes_what_it_opened(netns_fd: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Table(netns_fd) as table:
        table.create(DEAD)
        next(iter(table.entries()))
        next(iter(table.flow_counts()))
    assert len(os.listdir("/proc/self/fd")) == before


DEPLOY = Path(__file__).parents[2] / "deploy"
METRIC = re.compile(r"\b(?:node_nf|podwire|kubeproxy)_conntrack_\w+")


def test_dashboard_and_alerts_ask_for_what_is_exported(inspector: Inspector) -> None:
    collector = ConntrackCollector(inspector, inspector)
    collector.show(inspector.tally(), (32768, 60999))
    registry = CollectorRegistry()
    registry.register(collector)
    text = generate_latest(registry).decode()
    exported = set(re.findall(r"^([a-z_]+)[{ ]", text, re.MULTILINE))
    for file in ("grafana-conntrack.json", "alerts-conntrack.yaml"):
        asked = set(METRIC.findall((DEPLOY / file).read_text()))
        assert len(asked) > 4
        assert asked <= exported, asked - exported
    values = dict(re.findall(r"^(\S+(?:\{.*\})?) (\S+)$", text, re.MULTILINE))
    assert float(values["node_nf_conntrack_entries"]) == inspector.source.usage().used
    services = values['podwire_conntrack_kind_entries{kind="service"}']
    assert float(services) == len(DEAD) - 10 + 5  # without those from outside
    assert values["podwire_conntrack_full_in_seconds"] == "+Inf"
    service = 'podwire_conntrack_service_entries{namespace="default",service="web"}'
    assert float(values[service]) == 5


def test_removals_are_counted_under_kube_proxys_name(inspector: Inspector, table: Table) -> None:
    collector = ConntrackCollector(inspector, inspector)
    collector.removed(stale.remove(table, stale.judge_all(LESS)))
    registry = CollectorRegistry()
    registry.register(collector)
    text = generate_latest(registry).decode()
    name = "kubeproxy_conntrack_reconciler_deleted_entries_total"
    assert f'{name}{{ip_family="IPv4"}} {len(DEAD)}.0' in text
    assert f'{name}{{ip_family="IPv6"}} 0.0' in text
    assert "kubeproxy_conntrack_reconciler_sync_duration_seconds_count 1.0" in text


def test_top_is_a_full_screen_and_gives_the_terminal_back(inspector: Inspector) -> None:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(leader, (24, 80))
    before = termios.tcgetattr(follower)
    with netns.entered(inspector.source.netns_fd):  # type: ignore[attr-defined]
        child = subprocess.Popen(
            [sys.executable, "-m", "podwire", "conntrack", "top", "--raw", "--interval", "0.5"],
            stdin=follower, stdout=follower, stderr=subprocess.PIPE,
            env=os.environ | {"TERM": "xterm"},
        )  # fmt: skip
    try:
        screen = until(leader, "REMOTE")
        assert screen.startswith("\x1b[?1049h")
        assert CLIENT in screen
        os.write(leader, b"t")
        assert "UDP REPLIED" in until(leader, "STATE") or "UDP ASSURED" in until(leader, "UDP")
        termios.tcsetwinsize(leader, (10, 40))
        child.send_signal(signal.SIGWINCH)
        lines = until(leader, "\x1b[H").split("\x1b[H")[-1]
        assert lines.count("\r\n") < 24
        os.write(leader, b"q")
        assert "\x1b[?1049l" in until(leader, "\x1b[?1049l")
        assert child.wait(10) == 0
        assert termios.tcgetattr(follower) == before
    finally:
        child.kill()
        child.wait()
        os.close(leader)
        os.close(follower)


def until(leader: int, text: str) -> str:
    """What the terminal shows up to some text."""
    shown = ""
    while text not in shown:
        assert select.select([leader], [], [], 20)[0], shown
        shown += os.read(leader, 65536).decode(errors="replace")
    return shown
