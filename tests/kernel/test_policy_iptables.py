"""Policies on iptables, both flavours: what the kernel holds, and what passes meanwhile."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from podwire.datapath.iptables.policy import PolicyPart
from podwire.kernel import netns
from podwire.kernel.ipset import IpSets
from podwire.kernel.iptables import FLAVOURS, Flavour, Iptables
from podwire.kube.objects import NetworkPolicy, Pod
from podwire.kube.store import Store
from podwire.net import format_address
from podwire.policy import PolicyCompiler, PolicyTable, Verdict
from tests.conformance.netpol_fabric import BRIDGE, Fabric
from tests.conformance.netpol_world import World
from tests.unit.policy.test_policy_laws import attachments, cluster, clusters, steps

DENY_ALL = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def policy(name: str, spec: dict[str, Any]) -> NetworkPolicy:
    return msgspec.convert(
        {"metadata": {"namespace": "x", "name": name}, "spec": spec}, NetworkPolicy
    )


class Node1:
    """Compiler and data path of one node."""

    def __init__(self, fd: int, flavour: Flavour) -> None:
        self.fd, self.flavour = fd, flavour
        self.store, self.compiler = Store(), PolicyCompiler("n1")
        self.sets = IpSets(fd)
        self.attached: set[tuple[str, str]] = set()
        self.part = PolicyPart(fd, BRIDGE, flavour)
        self.part.start()

    def compile(self) -> PolicyTable:
        wanted = {each.pod: each for each in attachments(self.store)}
        for key in self.attached - wanted.keys():
            self.compiler.detach(key)
        for key in wanted.keys() - self.attached:
            self.compiler.attach(wanted[key])
        self.attached = set(wanted)
        return self.compiler.update(self.store.take())

    def step(self, changes: list[tuple[bool, Any]]) -> PolicyTable:
        for remove, obj in changes:
            if remove:
                self.store.remove(type(obj), obj.key)
            else:
                self.store.put(obj)
        table = self.compile()
        self.part.apply(table)
        return table

    def chains(self) -> list[dict[str, tuple[str, ...]]]:
        return [Iptables(family, self.flavour, self.fd).save("mangle") for family in (4, 6)]

    def state(self) -> object:
        self.part.flush()
        return [*self.chains(), self.sets.elements("")]


@pytest.fixture(params=FLAVOURS)
def make_node(
    request: pytest.FixtureRequest, make_netns: Callable[[], int]
) -> Callable[..., Node1]:
    return lambda fd=None: Node1(make_netns() if fd is None else fd, request.param)


def some_changes() -> list[tuple[bool, Any]]:
    """Both families, blocks with hosts in them, ranges, every protocol, named ports."""
    ports = [{"name": "web", "containerPort": 80}]
    everything = cluster((*[({"p": "1"}, ports)] * 6, {"q": "x"}, {"q": "y"}))
    ports = [
        {"protocol": "TCP", "port": 80, "endPort": 90},
        {"protocol": "UDP", "port": 53},
        {"protocol": "SCTP"},
        {"port": "web"},
    ]
    peers = [
        {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.2/32"]}},
        {"ipBlock": {"cidr": "0.0.0.0/0"}},
        {"ipBlock": {"cidr": "fd00::/8"}},
    ]
    rules = [{"from": peers, "ports": ports}, {"from": [{"podSelector": {}}]}]
    egress = [{"to": [{"namespaceSelector": {}}], "ports": ports}]
    everything.append((False, policy("all", {**DENY_ALL, "ingress": rules, "egress": egress})))
    return everything


def test_rules_are_printed_as_they_were_written(make_node: Callable[[], Node1]) -> None:
    node = make_node()
    table = node.step(some_changes())
    node.part.flush()
    node.part._forget()
    assert node.part._replace(table) == []


def test_applying_the_same_table_again_runs_no_program(
    make_node: Callable[[], Node1], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node()
    table = node.step(some_changes())
    node.part.flush()
    monkeypatch.setattr(netns, "run", lambda *_, **__: pytest.fail("a program ran"))
    node.part.apply(table)
    node.part.flush()


def test_a_restart_writes_nothing(
    make_node: Callable[..., Node1], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_node()
    first.step(some_changes())
    first.part.flush()
    second = make_node(first.fd)
    monkeypatch.setattr(Iptables, "_restore", lambda *_: pytest.fail("rules were written"))
    second.step(some_changes())


def test_a_set_in_use_is_never_changed(
    make_node: Callable[[], Node1], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node()
    node.step(some_changes())
    lines: list[str] = []
    run = netns.run

    def spy(fd, command, *, stdin="", **more):
        if "restore" in command[-2:] or "restore" in command[0]:
            lines.extend(stdin.splitlines())
        return run(fd, command, stdin=stdin, **more)

    monkeypatch.setattr(netns, "run", spy)
    pod = next(iter(node.store.all(Pod).values()))
    other = msgspec.structs.replace(
        pod, metadata=msgspec.structs.replace(pod.metadata, labels={"p": "2"})
    )
    node.step(
        [(False, other), (False, policy("all", {"podSelector": {"matchLabels": {"p": "2"}}}))]
    )
    rules_at = lines.index("*mangle")
    made = {line.split()[1] for line in lines[:rules_at] if line.startswith("create")}
    changed = {line.split()[1] for line in lines if line.startswith(("add", "del"))}
    assert changed <= made
    assert not [line for line in lines if line.startswith("destroy")]


def test_meddling_is_repaired_and_strangers_stay(make_node: Callable[[], Node1]) -> None:
    node = make_node()
    run = [f"iptables-{node.flavour}", "-t", "mangle"]
    theirs = ["-A", "FORWARD", "-s", "192.0.2.1/32", "-j", "DROP"]
    assert netns.run(node.fd, [*run, *theirs]).returncode == 0
    node.step(some_changes())
    good = node.state()
    assert node.part.verify() == []
    assert netns.run(node.fd, [*run, "-F", "PODWIRE-POL-TO"]).returncode == 0
    name = next(name for name in node.sets.sizes("podwire-pol4-"))
    node.sets.restore([f"flush {name}"])
    assert len(node.part.verify()) >= 2
    assert node.state() == good
    node.part.cleanup()
    left = node.chains()
    assert not [name for chains in left for name in chains if name.startswith("PODWIRE")]
    assert left[0]["FORWARD"] == ("-s 192.0.2.1/32 -j DROP",)
    assert node.sets.elements("") == {}


@given(clusters, steps)
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_incremental_and_cold_start_leave_the_same_state(
    make_node: Callable[[], Node1], facts: Any, script: Any
) -> None:
    warm, cold = make_node(), make_node()
    table = warm.step(cluster(facts))
    for changes in script:
        table = warm.step(changes)
    cold.part.apply(table)
    assert warm.state() == cold.state()
    warm.part._forget()
    assert warm.part._replace(table) == []


class Traffic:
    """Two pods on one node, and datagrams from one to the other."""

    def __init__(self, flavour: Flavour) -> None:
        self.fabric = Fabric()
        self.world = World.of(
            {
                "namespaces": [{"name": "x"}],
                "nodes": [{"name": "n1", "ips": ["192.0.2.1"]}],
                "pods": [
                    {"namespace": "x", "name": name, "node": "n1", "ips": [f"10.0.0.{number}"],
                     "labels": {"app": name}}
                    for name, number in (("server", 2), ("client", 3))
                ],
            }
        )  # fmt: skip
        self.fabric.sync(self.world)
        self.compiler = PolicyCompiler("n1")
        for attachment in self.fabric.attachments("n1"):
            self.compiler.attach(attachment)
        self.part = PolicyPart(self.fabric.nodes["n1"].fd, BRIDGE, flavour)
        self.part.start()
        self.sockets: list[socket.socket] = []
        self.servers = {port: self._socket("x/server", port) for port in (80, 81)}

    def _socket(self, pod: str, port: int = 0) -> socket.socket:
        place = self.fabric.place(pod)
        made = netns.socket(place.fd, socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((format_address(place.addresses[0]), port))
        made.settimeout(0.5)
        self.sockets.append(made)
        return made

    def send(self, port: int) -> None:
        """One datagram of a new connection."""
        client = self._socket("x/client")
        client.sendto(b"hello", ("10.0.0.2", port))
        client.close()
        self.sockets.remove(client)

    def heard(self, port: int) -> int:
        """Datagrams that have arrived at the server since the last call."""
        server, count = self.servers[port], 0
        server.setblocking(False)
        try:
            while server.recv(100):
                count += 1
        except BlockingIOError:
            return count

    def put(self, *actions: dict[str, Any]) -> None:
        for action in actions:
            self.world.apply(action)
        self.part.apply(self.compiler.update(self.world.store.take()))

    def close(self) -> None:
        for each in self.sockets:
            each.close()
        self.fabric.close()


@pytest.fixture(params=FLAVOURS)
def traffic(request: pytest.FixtureRequest) -> Iterator[Traffic]:
    made = Traffic(request.param)
    yield made
    made.close()


def allow(name: str, label: str, port: int) -> dict[str, Any]:
    rule = {
        "from": [{"podSelector": {"matchLabels": {"flips": label}}}],
        "ports": [{"protocol": "UDP", "port": port}],
    }
    spec = {"podSelector": {"matchLabels": {"app": "server"}}, "ingress": [rule]}
    metadata = {"namespace": "x", "name": name}
    return {
        "op": "apply-policy",
        "policy": {"kind": "NetworkPolicy", "metadata": metadata, "spec": spec},
    }


def test_labels_flip_and_nothing_passes_that_no_table_allows(traffic: Traffic) -> None:
    def flip(label: str) -> dict[str, Any]:
        labels = {"app": "client", "flips": label}
        return {"op": "set-pod-labels", "namespace": "x", "name": "client", "labels": labels}

    traffic.put(flip("a"), allow("one", "a", 80), allow("two", "b", 80), allow("three", "c", 81))
    for number in range(40):
        traffic.put(flip("ab"[number % 2]))
        traffic.part.flush()
        for _ in range(5):
            traffic.send(80)
            traffic.send(81)
    assert traffic.heard(81) == 0
    assert traffic.heard(80) == 200


def test_denied_packets_are_dropped_and_counted(traffic: Traffic) -> None:
    traffic.put(allow("one", "a", 80))
    for _ in range(3):
        traffic.send(80)
    assert traffic.heard(80) == 0
    (count,) = [count for count in traffic.part.counts() if count.packets]
    assert (count.verdict, count.direction, count.packets) == (Verdict.DENY, "ingress", 3)
    assert [str(ref) for ref in count.policies] == ["NetworkPolicy x/one"]


def test_a_port_takes_what_is_addressed_to_its_pod(traffic: Traffic) -> None:
    """A second address that a pod gave itself is not delivered to."""
    server = traffic.fabric.place("x/server")
    done = netns.run(server.fd, ["ip", "addr", "add", "10.0.0.77/32", "dev", "eth0"])
    assert done.returncode == 0
    client = traffic.fabric.place("x/client")
    mac = ":".join(f"{octet:02x}" for octet in server.mac)
    neighbour = ["ip", "neigh", "add", "10.0.0.77", "lladdr", mac, "dev", "eth0"]
    assert netns.run(client.fd, neighbour).returncode == 0
    made = netns.socket(server.fd, socket.AF_INET, socket.SOCK_DGRAM)
    made.bind(("10.0.0.77", 99))
    made.settimeout(2)
    traffic.sockets.append(made)
    sender = traffic._socket("x/client")
    sender.sendto(b"before", ("10.0.0.77", 99))
    assert made.recv(100) == b"before"
    traffic.put()
    sender.sendto(b"after", ("10.0.0.77", 99))
    traffic.send(80)
    while not traffic.heard(80):  # sent later, so the first has had its time
        pass
    made.setblocking(False)
    with pytest.raises(BlockingIOError):
        made.recv(100)
