"""Pods on eBPF: direct delivery, no borrowed addresses, masquerade of what leaves the cluster."""

import socket

import pytest

from podwire.datapath.ebpf.layout import Reason
from podwire.datapath.ebpf.nodes import NodesPart
from podwire.datapath.ebpf.pods import EbpfPods
from podwire.datapath.ebpf.programs import Programs
from podwire.kernel import netns
from podwire.net import parse_address, parse_prefix
from podwire.nodes import RouteTable
from tests.kernel.ebpf_world import HOST_MAC, MAC, NEEDS_EBPF, NODE, OUTSIDE, POD, REMOTE, World

pytestmark = NEEDS_EBPF


@pytest.fixture(scope="module")
def world():
    with World() as made:
        programs = Programs(made.name)
        pods, nodes = EbpfPods(programs), NodesPart(programs)

        def start():
            pods.start()
            nodes.start()
            pods.replace(made.pod_link(n) for n in (1, 2))
            nodes.apply(
                RouteTable(
                    "node",
                    "direct",
                    underlay=parse_address(NODE[4]),
                    pod_prefixes=frozenset({parse_prefix("10.244.0.0/24")}),
                    cluster_prefixes=frozenset({parse_prefix("10.244.0.0/16")}),
                )
            )

        netns.call(made.spaces["node"], start)
        made.programs, made.pods = programs, pods
        for family in (4, 6):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                for space, addresses in (
                    ("pod1", POD[1]),
                    ("pod2", POD[2]),
                    ("outside", REMOTE),
                    ("outside", OUTSIDE),
                    ("node", NODE),
                ):
                    made.serve(space, addresses[family], 80, kind)
        yield made
        programs.close()


KINDS = [socket.SOCK_STREAM, socket.SOCK_DGRAM]


def forwarded(world):
    """Packets that the node's own stack has forwarded."""
    out = netns.run(world.spaces["node"], ["cat", "/proc/net/snmp", "/proc/net/snmp6"]).stdout
    rows = [line.split() for line in out.splitlines()]
    names, values = [row for row in rows if row[0] == "Ip:"][:2]
    v4 = int(values[names.index("ForwDatagrams")])
    v6 = next(int(row[1]) for row in rows if row[0] == "Ip6OutForwDatagrams")
    return v4 + v6


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_pods_reach_pods_node_and_world_past_the_stack(world, family, kind):
    before = forwarded(world)
    for source, target, seen in (
        ("pod1", POD[2], POD[1]),
        ("pod1", REMOTE, POD[1]),
        ("pod2", NODE, POD[2]),
        ("node", POD[1], NODE),
        ("outside", POD[1], OUTSIDE),
    ):
        for _ in range(3):
            answer = world.ask(source, target[family], 80, kind)
            assert answer == (target[family], seen[family])
    assert forwarded(world) == before


def test_what_leaves_the_cluster_bears_the_nodes_address(world):
    for kind in KINDS:
        assert world.ask("pod1", OUTSIDE[4], 80, kind) == (OUTSIDE[4], NODE[4])
        assert world.ask("pod1", REMOTE[4], 80, kind) == (REMOTE[4], POD[1][4])
    done = netns.run(world.spaces["pod1"], ["ping", "-c2", "-i0.1", "-W1", OUTSIDE[4]])
    assert " 0% packet loss" in done.stdout


@pytest.mark.parametrize(("family", "other"), [(4, "10.244.0.77"), (6, "fd44::77")])
def test_a_pod_cannot_use_an_address_that_is_not_its_own(world, family, other):
    pod = world.spaces["pod1"]
    flags = "" if family == 4 else " nodad"
    world.batch(pod, f"addr add {other}/{32 if family == 4 else 128} dev eth0{flags}")
    before = world.programs.outcomes()["spoofed"]
    try:
        with pytest.raises(TimeoutError):
            world.ask("pod1", POD[2][family], 80, source=(other, 0), timeout=0.3)
    finally:
        world.batch(pod, f"addr del {other}/{32 if family == 4 else 128} dev eth0")
    assert world.programs.outcomes()["spoofed"] > before


def test_nor_another_mac(world):
    pod = world.spaces["pod2"]
    world.batch(pod, "link set eth0 address 02:00:00:00:09:09")
    try:
        with pytest.raises((TimeoutError, OSError)):
            world.ask("pod2", POD[1][4], 80, timeout=0.3)
    finally:
        world.batch(pod, f"link set eth0 address {MAC[2]}")
        world.batch(
            pod,
            f"neigh replace 169.254.1.1 lladdr {HOST_MAC[2]} dev eth0 nud permanent",
            f"neigh replace fe80::1 lladdr {HOST_MAC[2]} dev eth0 nud permanent",
            "route replace default via 169.254.1.1 dev eth0 onlink",
            "route replace default via fe80::1 dev eth0 onlink",
        )
    assert world.ask("pod2", POD[1][4], 80)[0] == POD[1][4]


def test_refusals_are_reported_with_their_flow(world):
    from podwire.datapath.ebpf.layout import EVENT, FLOW
    from podwire.kernel.bpf import RingBuffer

    ring = RingBuffer(world.programs.maps["events"])
    list(ring.read())
    world.batch(world.spaces["pod1"], "addr add 10.244.0.78/32 dev eth0")
    with netns.socket(world.spaces["pod1"], socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind(("10.244.0.78", 5555))
        client.sendto(b"x", (POD[2][4], 9))
    assert ring.wait(2)
    events = [EVENT.unpack(record) for record in ring.read()]
    world.batch(world.spaces["pod1"], "addr del 10.244.0.78/32 dev eth0")
    flows = [FLOW.unpack(event[-1]) for event in events if event[1] == Reason.SPOOFED]
    assert any(
        flow[0].endswith(parse_address("10.244.0.78")) and flow[3] == b"\0\x09" for flow in flows
    )
    ring.close()


@pytest.mark.parametrize("family", [4, 6])
def test_a_pod_that_is_going_sends_nothing_more(world, family):
    """Its link is there until the CNI plugin has taken it away."""
    index = world.ifindex("pod2")
    link = world.pods._links[index]
    world.pods.remove(index)
    try:
        for target in (POD[1], NODE, OUTSIDE):
            with pytest.raises(TimeoutError):
                world.ask("pod2", target[family], 80, socket.SOCK_DGRAM, timeout=0.1)
    finally:
        world.pods.add(link)
    assert world.ask("pod2", POD[1][family], 80)[0] == POD[1][family]
