"""Services on iptables, both flavours: what the kernel holds after changes, restarts, meddling."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings

from podwire.datapath.iptables.services import ServicesPart
from podwire.errors import KernelError
from podwire.kernel import iptables as kernel_iptables
from podwire.kernel import netns
from podwire.kernel.ipset import IpSets
from podwire.kernel.iptables import FLAVOURS, Hook, Iptables, TableChange
from podwire.kube import objects as kube
from tests.service_objects import CONFIG, Cluster, endpoint_slice, histories, service

TABLES = ("nat", "mangle", "filter")


class Proxy(Cluster):
    """The data path of one namespace."""

    def __init__(self, fd: int, flavour: kernel_iptables.Flavour) -> None:
        super().__init__(ServicesPart(CONFIG, fd, flavour), CONFIG)
        self.fd, self.flavour = fd, flavour
        self.sets = IpSets(fd)
        self.part.start()

    def tables(self, family: int = 4) -> dict[str, dict[str, tuple[str, ...]]]:
        iptables = Iptables(family, self.flavour, self.fd)
        return {table: iptables.save(table) for table in TABLES}

    def state(self) -> object:
        self.part.flush()
        return [self.tables(4), self.tables(6), self.sets.elements("")]

    def run(self, *words: str) -> None:
        done = netns.run(self.fd, [f"iptables-{self.flavour}", *words])
        assert done.returncode == 0, done.stderr


@pytest.fixture(params=FLAVOURS)
def make_proxy(
    request: pytest.FixtureRequest, make_netns: Callable[[], int]
) -> Callable[..., Proxy]:
    return lambda fd=None: Proxy(make_netns() if fd is None else fd, request.param)


@pytest.fixture
def proxy(make_proxy: Callable[[], Proxy]) -> Proxy:
    return make_proxy()


def all_kinds() -> list[kube.Resource]:
    """Services that between them use every chain and set."""
    ports = [
        kube.ServicePort(name="http", port=80, node_port=30080),
        kube.ServicePort(name="dns", port=53, protocol="UDP", node_port=30053),
        kube.ServicePort(name="sctp", port=99, protocol="SCTP", node_port=30099),
    ]
    outside = {"type": "LoadBalancer", "ports": ports, "external_ips": ["203.0.113.1"]}
    return [
        service(external_traffic_policy="Local", session_affinity="ClientIP", **outside),
        endpoint_slice(addresses=["10.20.1.11", "10.20.1.12", "10.20.2.21"]),
        service("plain", ip="10.96.0.2"),
        endpoint_slice("plain", [f"10.20.3.{i}" for i in range(1, 8)]),
        service("empty", ip="10.96.0.3", type="NodePort", ports=[
            kube.ServicePort(name="http", port=80, node_port=30081)]),
        service("six", ip="fd00:96::1"),
    ]  # fmt: skip


def test_rules_are_printed_as_they_were_written(proxy: Proxy) -> None:
    proxy.put(*all_kinds())
    proxy.part.flush()
    assert proxy.part._apply_all(proxy.part._table) == []  # everything read back: no difference


def test_applying_the_same_table_again_runs_no_program(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = proxy.put(*all_kinds())
    proxy.part.flush()
    monkeypatch.setattr(netns, "run", lambda *_, **__: pytest.fail("a program ran"))
    proxy.part.apply(table)
    proxy.part.flush()


def test_one_change_rewrites_only_its_own_chains(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 200):
        proxy.store.put(service(f"s{number}", ip=f"10.96.0.{number}"))
        proxy.store.put(endpoint_slice(f"s{number}", [f"10.20.1.{number}", f"10.20.2.{number}"]))
    proxy.put()
    scripts: list[str] = []
    run = netns.run

    def spy(fd, command, *, stdin="", **more):
        scripts.append(stdin)
        return run(fd, command, stdin=stdin, **more)

    monkeypatch.setattr(netns, "run", spy)
    proxy.put(endpoint_slice("s7", ["10.20.1.7", "10.20.2.7", "10.20.2.8"]))
    chains = re.findall(r"^:(\S+)", "".join(scripts), re.M)
    assert len(chains) == 1
    scripts.clear()
    proxy.put(service("new", ip="10.96.3.1"), endpoint_slice("new"))
    assert len(re.findall(r"^:", "".join(scripts), re.M)) <= 5
    assert len("".join(scripts).splitlines()) < 60


def test_a_restart_writes_nothing_and_keeps_affinity(
    make_proxy: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_proxy()
    first.put(*all_kinds())
    good = first.state()
    name = next(n for n in first.sets.sizes("podwire-svc4-a-"))
    first.sets.restore([f"add {name} 10.20.1.5 timeout 600"])
    second = make_proxy(first.fd)
    monkeypatch.setattr(Iptables, "_restore", lambda *_: pytest.fail("rules were written"))
    second.put(*all_kinds())
    monkeypatch.undo()
    assert second.sets.sizes(name) == {name: 1}
    second.sets.restore([f"del {name} 10.20.1.5"])
    assert second.state() == good


def test_a_restart_takes_away_what_went_meanwhile(make_proxy: Callable[..., Proxy]) -> None:
    first = make_proxy()
    first.put(*all_kinds())
    second = make_proxy(first.fd)
    second.put(*all_kinds()[2:])
    third = make_proxy()
    third.put(*all_kinds()[2:])
    assert second.state() == third.state()


def test_meddling_is_found_and_repaired_and_strangers_stay(proxy: Proxy) -> None:
    theirs = ("-s 192.0.2.1/32 -j DROP", "-d 192.0.2.2/32 -j ACCEPT")
    proxy.run("-A", "FORWARD", *theirs[0].split())
    proxy.sets.restore(["create theirs hash:ip", "add theirs 192.0.2.1"])
    proxy.put(*all_kinds())
    good = proxy.state()
    assert proxy.part.verify() == []
    proxy.run("-t", "nat", "-F")
    proxy.sets.restore(["del podwire-svc4-cluster-ips 10.96.0.2"])
    repairs = proxy.part.verify()
    assert any("chains of iptables" in text for text in repairs)
    assert any("hooked into" in text for text in repairs)
    assert "restored the set podwire-svc4-cluster-ips" in repairs
    assert proxy.state() == good
    assert proxy.part.verify() == []
    proxy.run("-I", "FORWARD", *theirs[1].split())
    proxy.put(endpoint_slice(addresses=["10.20.1.13"]))
    assert {*theirs} <= {*proxy.tables()["filter"]["FORWARD"]}
    proxy.part.cleanup()
    assert {*proxy.tables()["filter"]["FORWARD"]} == {*theirs}
    assert all(not name.startswith("PODWIRE") for t in proxy.tables().values() for name in t)
    assert proxy.sets.elements("") == {"theirs": {"192.0.2.1"}}
    proxy.part.cleanup()  # again is no error


def test_a_change_that_does_not_fit_reads_the_kernel_back(proxy: Proxy) -> None:
    proxy.put(*all_kinds())
    for table in TABLES:
        proxy.run("-t", table, "-F")
        proxy.run("-t", table, "-X")
    proxy.put(endpoint_slice("plain", ["10.20.3.1"]))
    proxy.part.verify()
    state = proxy.state()
    fresh = Proxy(netns.create(), proxy.flavour)
    try:
        fresh.put(*all_kinds(), endpoint_slice("plain", ["10.20.3.1"]))
        assert fresh.state() == state
    finally:
        os.close(fresh.fd)


def test_cleanup_finds_what_ran_with_the_other_flavour(make_netns: Callable[[], int]) -> None:
    fd = make_netns()
    for flavour in FLAVOURS:
        Proxy(fd, flavour).put(*all_kinds())
    ServicesPart(CONFIG, fd).cleanup()
    for flavour in FLAVOURS:
        for table in TABLES:
            assert not any(
                name.startswith("PODWIRE") for name in Iptables(4, flavour, fd).save(table)
            )


def test_many_chains_at_once_are_written_callees_first(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_iptables, "_CHAINS_AT_ONCE", 7)
    proxy.put(*all_kinds())
    assert proxy.part._apply_all(proxy.part._table) == []


def test_a_refused_line_is_named(proxy: Proxy) -> None:
    iptables = Iptables(4, proxy.flavour, proxy.fd)
    rules = ["-p tcp -j DROP", "-p tcp --no-such-option -j DROP"]
    with pytest.raises(KernelError, match="no-such-option -j DROP'"):
        iptables.restore({"filter": TableChange({"PODWIRE-X": rules}, hooks=[Hook("INPUT", "")])})
    assert "PODWIRE-X" not in iptables.save("filter")
    with pytest.raises(KernelError, match="Error in line 1"):
        proxy.sets.restore(["add nowhere 192.0.2.1"])


def test_refused_packets_are_counted_in_the_status(proxy: Proxy) -> None:
    proxy.put(*all_kinds())
    status = proxy.part.status()[f"iptables-{proxy.flavour}"]
    assert isinstance(status, dict)
    assert (status["packets_rejected"], status["packets_dropped"]) == (0, 0)


@given(histories(25))
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_incremental_and_cold_start_leave_the_same_state(
    make_proxy: Callable[[], Proxy], history
) -> None:
    warm, cold = make_proxy(), make_proxy()
    cold.put(*warm.play(history))
    assert warm.state() == cold.state()
    assert warm.part._apply_all(warm.part._table) == []


def begin(proxy: Proxy, address: str, times: int) -> None:
    """As many connections of the node itself; nobody answers."""
    for _ in range(times):
        with netns.socket(proxy.fd, socket.AF_INET, socket.SOCK_STREAM) as client:
            client.setblocking(False)
            client.connect_ex((address, 80))


@pytest.mark.parametrize("affinity", ["None", "ClientIP"])
def test_frontends_and_backends_count_their_connections(proxy: Proxy, affinity: str) -> None:
    for words in (["link", "set", "lo", "up"], ["route", "add", "default", "dev", "lo"]):
        assert netns.run(proxy.fd, ["ip", *words]).returncode == 0
    table = proxy.put(
        service(external_ips=["203.0.113.1"], session_affinity=affinity),
        endpoint_slice(addresses=["10.20.1.11", "10.20.2.21"]),
        service("empty", ip="10.96.0.3"),
        service("beside", ip="10.96.0.2"),
    )
    ports = {name.name: port for name, port in table.ports.items()}
    begin(proxy, "10.96.0.1", 6)
    begin(proxy, "203.0.113.1", 3)
    counts = proxy.part.counts(ports["web"])
    words = f"iptables-{proxy.flavour} nat PODWIRE-SVC-T4-"
    assert all(element.startswith(words) for element, _ in counts.frontends.values())
    assert [seen for _, seen in counts.frontends.values()] == [6, 3]
    assert list(counts.backends) == list(ports["web"].cluster)
    assert sum(counts.backends.values()) == 9
    assert proxy.part.counts(ports["web"]) == counts, "reading changes nothing"
    assert [*proxy.part.counts(ports["empty"]).frontends.values()] == [
        ("ipset podwire-svc4-rejected", None)
    ]
