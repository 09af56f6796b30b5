"""Real packets through the Service rules: what the given cases leave open."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from podwire.kube import objects as kube
from podwire.net import Protocol
from tests.conformance.service_cases import Cluster, Probe, Seen, parse_end
from tests.conformance.service_model import Model
from tests.conformance.service_net import Net
from tests.service_objects import endpoint_slice, history, service

CASE: dict[str, Any] = {
    "node": {
        "name": "node-a",
        "ips": ["192.168.50.10", "192.168.51.10", "2001:db8:50::10"],
        "podCIDR": "10.20.1.0/24",
    },
    "config": {
        "detectLocal": {"mode": "ClusterCIDR", "cidr": "10.20.0.0/16"},
        "nodePortAddresses": ["192.168.50.0/24", "2001:db8:50::/64"],
        "serviceCIDRs": ["10.96.0.0/16", "fd00:96::/112"],
    },
}


@pytest.fixture(scope="module", params=["nftables", "iptables-nft", "iptables-legacy"])
def net(request: pytest.FixtureRequest) -> Iterator[Net]:
    with Net(request.param) as net:
        yield net


def started(net: Net, *objects: kube.Resource, family: str = "IPv4", **config: object) -> Cluster:
    cluster = Cluster({**CASE, "config": {**CASE["config"], **config}})
    net.begin(cluster, family)
    for obj in objects:
        cluster.store.put(obj)
    net.apply(cluster.compiler.update(cluster.store.take()))
    return cluster


def changed(net: Net, cluster: Cluster, *objects: kube.Resource) -> None:
    for obj in objects:
        cluster.store.put(obj)
    net.apply(cluster.compiler.update(cluster.store.take()))


PORTS = itertools.cycle(range(10_000, 60_000))
"""Source ports of clients: a pair that is used again soon finds the kernel's old entry."""


def connect(net: Net, to: str, source: str, *, port: int = 80, count: int = 12) -> list[Seen]:
    probes = [Probe("pod", source, next(PORTS), to, port, Protocol.TCP) for _ in range(count)]
    return net.connect(probes)


def test_affinity_over_ipv6_outlives_the_loss_of_another_backend(net: Net) -> None:
    backends = [f"fd00:20:1::{i}" for i in range(1, 5)]
    sticky = service(ip="fd00:96::1", session_affinity="ClientIP")
    cluster = started(net, sticky, _slice6(backends), family="IPv6")
    clients = [f"fd00:20:1::1:{i:x}" for i in range(1, 25)]
    before = {
        client: {s.endpoint for s in connect(net, "fd00:96::1", client)} for client in clients
    }
    assert {len(endpoints) for endpoints in before.values()} == {1}
    assert len(set().union(*before.values())) == 4
    changed(net, cluster, _slice6(backends[1:]))
    gone = "[fd00:20:1::1]:8080"
    after = {client: {s.endpoint for s in connect(net, "fd00:96::1", client)} for client in clients}
    assert {len(endpoints) for endpoints in after.values()} == {1}
    for client in clients:
        assert before[client] == {gone} or after[client] == before[client]
        assert after[client] != {gone}


def _slice6(addresses: list[str]) -> kube.EndpointSlice:
    slice_ = endpoint_slice(addresses=addresses)
    return kube.EndpointSlice(
        metadata=slice_.metadata,
        address_type="IPv6",
        endpoints=slice_.endpoints,
        ports=slice_.ports,
    )


def test_localhost_node_ports_are_served_and_guarded(net: Net) -> None:
    ports = [kube.ServicePort(name="http", port=80, node_port=30080)]
    started(
        net,
        service(type="NodePort", ports=ports),
        endpoint_slice(),
        nodePortAddresses=["192.168.50.10/32", "localhost"],
    )
    local = Probe("host", "127.0.0.1", 40001, "127.0.0.1", 30080, Protocol.TCP)
    remote = Probe("external", "198.51.100.7", 40002, "127.0.0.1", 30080, Protocol.TCP)
    spoofed = Probe("external", "127.0.0.1", 40003, "192.168.50.10", 30080, Protocol.TCP)
    seen = net.connect([local, remote, spoofed])
    assert [one.verdict for one in seen] == ["dnat", "drop", "drop"]
    assert seen[0].source != "127.0.0.1"
    # the answer finds its way back to the process
    net.open("c", local)
    assert net.reply("c") == (("127.0.0.1", 30080), ("127.0.0.1", 40001))


def test_the_mark_of_others_stays_on_the_packet(net: Net) -> None:
    started(net, service(session_affinity="ClientIP"), endpoint_slice())
    net.nft.run(
        "table inet marks {\n"
        "  counter kept { }\n"
        "  chain early { type filter hook prerouting priority -150; meta mark set 0xbeef0001; }\n"
        "  chain late { type filter hook forward priority 10;\n"
        "    meta mark 0xbeef0001 ct status dnat counter name kept\n"
        "  }\n"
        "}\n"
    )
    try:
        connect(net, "10.96.0.1", "10.20.1.5", count=5)
        assert net.nft.counters(1, "marks")["kept"][0] == 5
    finally:
        net.nft.run("delete table inet marks")


def test_no_packet_sees_half_of_a_change(net: Net) -> None:
    """Backends come and go under a Service while clients connect: each is served."""
    backends = [f"10.20.1.{i}" for i in range(11, 21)]
    cluster = started(net, service(), endpoint_slice(addresses=backends))
    stop = threading.Event()
    failures: list[BaseException] = []

    def churn() -> None:
        rng = random.Random(1)
        try:
            while not stop.is_set():
                some = rng.sample(backends, rng.randint(1, len(backends)))
                changed(net, cluster, endpoint_slice(addresses=some))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=churn)
    thread.start()
    seen = []
    endpoints: set[str] = set()
    try:  # a slow machine makes few changes in 15 rounds: then until every backend had its turn
        for rounds in range(150):
            if rounds >= 15 and len(endpoints) == len(backends):
                break
            new = connect(net, "10.96.0.1", "10.20.1.5", count=150)
            seen += new
            endpoints |= {one.endpoint for one in new}
    finally:
        stop.set()
        thread.join()
    assert failures == []
    assert {one.verdict for one in seen} == {"dnat"}
    assert endpoints == {f"{backend}:8080" for backend in backends}


SOURCES = {
    "IPv4": ["10.20.1.11", "10.20.1.99", "10.20.2.21", "198.51.100.7", "192.168.50.10"],
    "IPv6": ["fd00:20:1::11", "fd00:20:1::99", "2001:db8:7::7", "2001:db8:50::10"],
}
DESTINATIONS = {
    "IPv4": "10.96.0.1 10.96.0.2 10.96.0.3 10.96.0.4 10.96.0.9 203.0.113.1 203.0.113.2 192.0.2.1 "
    "192.0.2.2 198.51.100.99 192.168.50.10 192.168.50.10 192.168.51.10",
    "IPv6": "fd00:96::1 fd00:96::2 fd00:96::3 fd00:96::4 fd00:96::9 fd00:e::1 fd00:1b::1 "
    "2001:db8:50::10 2001:db8:50::10",
}


def random_probe(rng: random.Random, family: str) -> Probe:
    return Probe(
        rng.choice(["pod", "external", "host"]),
        rng.choice(SOURCES[family]),
        rng.randint(10_000, 60_000),
        rng.choice(DESTINATIONS[family].split()),
        rng.choice([80, 80, 53, 53, 81, 30001, 30002]),
        rng.choice([Protocol.TCP, Protocol.UDP]),
    )


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
@given(seed=st.integers(0, 1 << 32))
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_packets_and_evaluator_agree(net: Net, family: str, seed: int) -> None:
    rng = random.Random(seed)
    cluster = started(net, family=family)
    for keep, obj in history(rng, 30):
        if keep:
            cluster.store.put(obj)
        else:
            cluster.store.remove(type(obj), obj.key)
        net.apply(cluster.compiler.update(cluster.store.take()))
    model = Model()
    model.begin(cluster, family)
    probes = [random_probe(rng, family) for _ in range(60)]
    for probe, seen in zip(probes, net.connect(probes), strict=True):
        if probe.origin != "host" and probe.source in CASE["node"]["ips"]:
            continue  # the kernel refuses its own address from outside before anybody else
        said = model.resolve(probe)
        assert seen.verdict == said.verdict, (probe, said.reason)
        if seen.verdict == "dnat":
            possible = model.possible(probe)
            if parse_end(seen.endpoint)[0] in CASE["node"]["ips"]:
                # Which of the node's addresses the node sees itself by is the kernel's choice.
                seen, possible = seen.endpoint, [one.endpoint for one in possible]
            assert seen in possible, (probe, said.reason)
