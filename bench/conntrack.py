"""The connection table: top talkers, attributed, beside `conntrack -L`; deletes, events, memory.

Tables are filled by netlink in namespaces of their own. nf_conntrack_max is one number for the
whole machine: it is raised for the bench (under a lock that the tests share) and restored.

    make bench BENCH=conntrack
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from bench.report import Report
from podwire.conntrack import facts
from podwire.conntrack.inspector import Inspector
from podwire.conntrack.names import Names, Place, Role
from podwire.kernel import link, netns, sysctl
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
from podwire.kernel.ctnetlink.filters import abilities
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import Address, Protocol, parse_address, parse_prefix
from podwire.services import (
    Frontend,
    FrontendKind,
    NodeFacts,
    ProxyConfig,
    ServicePort,
    ServicePortName,
    backend,
)
from tests.service_objects import service_table

LIMIT = "net.netfilter.nf_conntrack_max"
LOCK = "/run/lock/podwire-conntrack-max"
NODE = parse_address("192.0.2.1")
LOCAL = [parse_address(f"10.244.0.{i}") for i in range(2, 112)]
PEERS = [parse_address(f"10.244.{i >> 7}.{i & 127}") for i in range(256, 1256)]
REMOTES = 2000
ESTABLISHED = Status.CONFIRMED | Status.SEEN_REPLY | Status.ASSURED


class Cluster:
    """110 pods on the node, 1,000 elsewhere, 200 Services of three backends, remotes outside."""

    def __init__(self) -> None:
        self.random = random.Random(7)
        self.remotes = [self.random.randbytes(4) for _ in range(REMOTES)]
        self.services = {
            parse_address(f"10.96.{i >> 8}.{i & 255}"): self.random.sample(PEERS, 3)
            for i in range(1, 201)
        }
        self.addresses = list(self.services)

    def names(self) -> Names:
        places = {a: Place(Role.POD, f"default/local-{i}") for i, a in enumerate(LOCAL)}
        places |= {a: Place(Role.POD, f"default/peer-{i}") for i, a in enumerate(PEERS)}
        ports = [
            ServicePort(
                name=ServicePortName("default", f"s{i}", "", Protocol.TCP, 4),
                frontends=(Frontend(FrontendKind.CLUSTER_IP, address, 80),),
                cluster=tuple(backend(a, 8080) for a in backends),
                has_endpoints=True,
            )
            for i, (address, backends) in enumerate(self.services.items())
        ]
        table = service_table(ports, NodeFacts("n1", (NODE,)), ProxyConfig())
        return Names(places, [parse_prefix("10.244.0.0/16")], [NODE], table, "n1")

    def entries(self, count: int) -> Iterator[Entry]:
        """Half through Services, a fifth pod to pod (UDP), the rest masqueraded to the outside.

        Each pod speaks to its own few peers, as pods do: 10 Services, 20 pods, 30 remotes.
        """
        for number in range(count):
            pod = number % len(LOCAL)
            port = 1024 + number // len(LOCAL)
            pick = self.random.random()
            if pick < 0.5:
                address = self.addresses[(pod * 7 + int(pick * 20)) % len(self.addresses)]
                answered_by = self.random.choice(self.services[address])
                yield tcp(LOCAL[pod], port, address, 80, answered_by, 8080, LOCAL[pod])
            elif pick < 0.7:
                peer = PEERS[(pod * 11 + int(pick * 100)) % len(PEERS)]
                there = Tuple(LOCAL[pod], peer, Protocol.UDP, port, 53)
                yield Entry(there, there.reversed(), ESTABLISHED, 600)
            else:
                remote = self.remotes[(pod * 37 + int(pick * 100)) % REMOTES]
                yield tcp(LOCAL[pod], port, remote, 443, remote, 443, NODE)


def tcp(
    source: Address, port: int, destination: Address, destination_port: int,
    server: Address, server_port: int, back_to: Address,
) -> Entry:  # fmt: skip
    # masqueraded entries keep their port where it is free; here each has one of its own
    return Entry(
        Tuple(source, destination, Protocol.TCP, port, destination_port),
        Tuple(server, back_to, Protocol.TCP, server_port, port),
        ESTABLISHED,
        600,
        state=TcpState.ESTABLISHED,
    )


@contextlib.contextmanager
def filled(entries: Iterator[Entry]) -> Iterator[Table]:
    """A namespace of its own with these entries in its table (duplicates are left out)."""
    fd = netns.create()
    try:
        with NetlinkSocket(netns_fd=fd) as sock:
            sock.run(link.change("lo", up=True))
        with Table(fd) as table:
            batch: list[Entry] = []
            for entry in entries:
                batch.append(entry)
                if len(batch) == 8192:
                    table.create(batch)
                    batch = []
            table.create(batch)
            yield table
    finally:
        os.close(fd)


@contextlib.contextmanager
def raised_limit(wanted: int) -> Iterator[None]:
    with open(LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int(sysctl.read(LIMIT))
        if before < wanted:
            sysctl.write({LIMIT: wanted})
        try:
            yield
        finally:
            sysctl.write({LIMIT: before})


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


_TOOL = ["sh", "-c", "conntrack -L >/dev/null 2>&1"]


def dumps(report: Report, cluster: Cluster, table: Table, count: int, rounds: int) -> None:
    """By turns, so that other load on the machine meets both."""
    names = cluster.names()
    inspector = Inspector(table, lambda: names, table.netns_fd)
    used = table.usage().used
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):
        theirs.append(used / seconds(lambda: netns.run(table.netns_fd, _TOOL, timeout_s=60)))
        ours.append(used / seconds(inspector.tally))
    tally = inspector.tally()
    assert tally.total == used, (tally.total, used)
    assert sum(tally.kinds.values()) == used
    report.row(
        f"top talkers of {count:,} entries, attributed; peer: conntrack -L",
        [rate / 1000 for rate in ours], "k/s",
        peer=[rate / 1000 for rate in theirs], ratio_at_least=1.3,
    )  # fmt: skip


def deletes(report: Report) -> None:
    """1,000 of 70,000 entries, by destination, ten times."""
    victim, others = parse_address("10.250.0.9"), PEERS
    entries = [
        Entry(there, there.reversed(), ESTABLISHED, 600)
        for number in range(70_000)
        for there in [
            Tuple(LOCAL[number % 100], victim if number < 1000 else others[number % 1000],
                  Protocol.UDP, 1024 + number // 100 % 60000, 53)
        ]
    ]  # fmt: skip
    filter_ = Filter(original=Match(destination=victim, protocol=Protocol.UDP, destination_port=53))
    samples: list[float] = []
    abilities()  # once per process, at the agent's start
    with filled(iter(entries)) as table:
        for _ in range(10):
            before = table.usage().used
            samples.append(1000 * seconds(lambda: table.delete(filter_)))
            assert table.usage().used == before - 1000
            table.create(entries[:1000])
    report.row("delete by destination, 1,000 of 70,000", samples, "ms", at_most=50)


FLOWS_PER_S, FLOW_SECONDS = 80_000, 3
_GENERATOR = """
import sys, time
from podwire.kernel.netlink import NETFILTER, NetlinkSocket
from podwire.kernel.ctnetlink import Entry, Tuple
from podwire.kernel.ctnetlink.entries import create_request
per_s, seconds = int(sys.argv[1]), int(sys.argv[2])
batches = []
for step in range(seconds * 100):
    batch = []
    for i in range(step * per_s // 100, (step + 1) * per_s // 100):
        there = Tuple(b"\\x0a\\0" + (i >> 12 & 0xffff).to_bytes(2, "big"), b"\\x0a\\1\\0\\1",
                      17, 1024 + (i & 4095), 53)
        batch.append(create_request(Entry(there, there.reversed(), timeout_s=600)))
    batches.append(batch)
with NetlinkSocket(NETFILTER) as sock:
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.monotonic()
    for step, batch in enumerate(batches):
        sock.attempt(batch)
        left = began + (step + 1) / 100 - time.monotonic()
        if left > 0:
            time.sleep(left)
    print(time.monotonic() - began, flush=True)
"""


def events(report: Report) -> None:
    """New entries at a steady pace from another process; every one must be heard of."""
    wanted = FLOWS_PER_S * FLOW_SECONDS
    with filled(iter(())) as table:
        with netns.entered(table.netns_fd):
            child = subprocess.Popen(
                [sys.executable, "-c", _GENERATOR, str(FLOWS_PER_S), str(FLOW_SECONDS)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        with child, Events(frozenset({EventKind.NEW}), table.netns_fd) as stream:
            assert child.stdin
            assert child.stdout
            assert child.stdout.readline() == "ready\n"
            child.stdin.write("\n")
            child.stdin.flush()
            heard = lost = 0
            deadline = time.monotonic() + 60
            while heard < wanted and time.monotonic() < deadline and not lost:
                stream.wait(1)
                for event in stream.drain():
                    heard += event.kind is EventKind.NEW
                    lost += event.kind is EventKind.LOST
            took = float(child.stdout.readline())
    report.row("new flows made", [wanted / took / 1000], "k/s", at_least=FLOWS_PER_S / 1000 * 0.98)
    report.row("events lost of 240,000", [float(wanted - heard)], "", at_most=0)


_MEMORY = """
import gc, json, sys
from bench.conntrack import Cluster, Inspector, Table
from podwire.agent.conntrack_metrics import ConntrackCollector
def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return [int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")]
names = Cluster().names()
table = Table()
inspector = Inspector(table, lambda: names)
collector = ConntrackCollector(inspector, inspector)
inspector.sample()
gc.collect()
before = resident()[0]
for _ in range(3):
    collector.show(inspector.tally(), (32768, 60999))
    list(collector.collect())
print(json.dumps([before, *resident()]))
"""


def memory(report: Report, table: Table) -> None:
    """What a reading adds to a process that does as the agent does."""
    found = netns.run(table.netns_fd, [sys.executable, "-c", _MEMORY], timeout_s=120)
    before, _, most = json.loads(found.stdout)
    report.row("memory added by readings of 500,000, at most", [most - before], "MB", at_most=50)


def main() -> int:
    report = Report("conntrack", "The connection table, beside conntrack-tools 1.4.7")
    cluster = Cluster()
    refusal = facts.settings().refusal
    with contextlib.ExitStack() as stack:
        if not refusal:
            stack.enter_context(raised_limit(700_000))
        elif facts.settings().limit < 600_000:
            print(f"500,000 entries are left out: {refusal}", file=sys.stderr)
        with filled(cluster.entries(50_000)) as table:
            dumps(report, cluster, table, 50_000, rounds=7)
        deletes(report)
        events(report)
        if not refusal or facts.settings().limit >= 600_000:
            with filled(cluster.entries(500_000)) as table:
                dumps(report, cluster, table, 500_000, rounds=3)
                memory(report, table)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
