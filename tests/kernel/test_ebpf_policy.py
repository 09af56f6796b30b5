"""Policies on eBPF with real sockets: what connects is what the table's evaluator says."""

import socket

import pytest

from podwire.datapath.ebpf.policy import PolicyPart
from podwire.datapath.ebpf.programs import Programs
from podwire.kernel import netns
from podwire.net import Protocol, parse_address
from podwire.policy import Packet, Verdict
from tests.kernel.ebpf_policies import enforce, policy, populate
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, OUTSIDE, POD, REMOTE, World

pytestmark = NEEDS_EBPF

KINDS = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}
OPEN = [80, 81, 8016, 8017]


@pytest.fixture(scope="module")
def world():
    with World() as made:
        made.part = PolicyPart(programs=Programs(made.name, made.spaces["node"]))
        made.part.start()
        populate(made)
        for kind in KINDS.values():
            for space, addresses in (("pod1", POD[1]), ("pod2", POD[2]), ("outside", REMOTE)):
                for family in (4, 6):
                    for port in OPEN:
                        made.serve(space, addresses[family], port, kind)
        yield made
        made.part.cleanup()


SOURCES = {"pod1": POD[1], "pod2": POD[2], "node": NODE, "outside": OUTSIDE}
TARGETS = [POD[1], POD[2], REMOTE]


def check(world, table, protocols=tuple(KINDS), families=(4, 6)):
    for space, source in SOURCES.items():
        for target in TARGETS:
            if source is target or (space, target) == ("outside", REMOTE):
                continue
            for family in families:
                for protocol in protocols:
                    for port in OPEN:
                        packet = Packet(
                            parse_address(source[family]),
                            parse_address(target[family]),
                            protocol,
                            port,
                            source_node="node" if space == "node" else None,
                        )
                        judged = table.judge(packet)
                        ends = [judged.egress]
                        if target is not REMOTE:  # whose node is not here to enforce
                            ends.append(judged.ingress)
                        allowed = all(end.verdict is not Verdict.DENY for end in ends)
                        wait = 3 if allowed else 0.08
                        seen = world.observe(
                            space, target[family], port, KINDS[protocol], tries=1, timeout=wait
                        )
                        connects = seen == {(target[family], source[family])}
                        assert connects == allowed, (space, target, packet)


SPECS = {
    "deny all ingress": {"podSelector": {}, "policyTypes": ["Ingress"]},
    "deny all": {
        "podSelector": {"matchLabels": {"app": "web"}},
        "policyTypes": ["Ingress", "Egress"],
    },
    "clients on some ports": {
        "podSelector": {"matchLabels": {"app": "web"}},
        "policyTypes": ["Ingress"],
        "ingress": [
            {
                "from": [{"podSelector": {"matchLabels": {"app": "client"}}}],
                "ports": [
                    {"protocol": "TCP", "port": 80},
                    {"protocol": "UDP", "port": 8000, "endPort": 8016},
                ],
            }
        ],
    },
    "blocks with an exception": {
        "podSelector": {},
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [{"ipBlock": {"cidr": "192.168.0.0/16", "except": ["192.168.9.0/30"]}}]},
            {"from": [{"ipBlock": {"cidr": "fd09::/64"}}], "ports": [{"port": 81}]},
        ],
    },
    "egress to clients only": {
        "podSelector": {"matchLabels": {"app": "web"}},
        "policyTypes": ["Egress"],
        "egress": [{"to": [{"podSelector": {"matchLabels": {"app": "client"}}}]}],
    },
}


@pytest.mark.parametrize("name", list(SPECS))
def test_what_connects_is_what_the_evaluator_says(world, name):
    protocols = [Protocol.TCP] if name.startswith("deny") else list(KINDS)
    check(world, enforce(world, policy("p", SPECS[name])), protocols)


def test_an_open_connection_outlives_a_policy_and_answers_always_pass(world):
    enforce(world)
    with netns.socket(world.spaces["pod2"], socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(3)
        client.connect((POD[1][4], 80))
        closed = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        enforce(world, policy("all", closed))
        client.send(b"who")
        assert client.recv(100).decode().split()[0] == POD[1][4]
    assert world.observe("pod2", POD[1][4], 80, tries=1, timeout=0.2) == {"silence"}
    enforce(world)
    assert world.ask("pod2", POD[1][4], 80)[0] == POD[1][4]


@pytest.mark.parametrize("direction", ["Ingress", "Egress"])
@pytest.mark.parametrize("target", ["pod1", "outside"])
def test_datagrams_that_nobody_answers_are_judged_anew(world, target, direction):
    closed = policy("all", {"podSelector": {}, "policyTypes": [direction]})
    enforce(world)
    address = {"pod1": POD[1], "outside": OUTSIDE}[target][4]
    with (
        netns.socket(world.spaces[target], socket.AF_INET, socket.SOCK_DGRAM) as server,
        netns.socket(world.spaces["pod2"], socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        server.settimeout(3)
        server.bind((address, 0))
        client.connect(server.getsockname())
        client.send(b"1")
        _, sender = server.recvfrom(10)
        enforce(world, closed)
        client.send(b"2")
        enforce(world)
        client.send(b"3")
        judged = direction == "Egress" or target == "pod1"
        assert server.recv(10) == (b"3" if judged else b"2")
        client.settimeout(3)
        server.sendto(b"answer", sender)
        assert client.recv(10) == b"answer"
        enforce(world, closed)
        client.send(b"4")
        assert (b"3" if not judged else b"") + b"4" == b"".join(
            server.recv(10) for _ in range(1 if judged else 2)
        )
    enforce(world)


def test_verify_repairs_what_others_broke(world):
    enforce(world, policy("p", SPECS["deny all ingress"]))
    growing = world.part._programs.growing["rules"]
    growing.map.delete(next(growing.map.keys()))
    assert world.part.verify() == ["1 entries of map rules"]
    assert world.part.verify() == []
