"""Nodes come, go and change address; the table says what follows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from podwire.kube.objects import Metadata, Node, NodeAddress, NodeSpec, NodeStatus
from podwire.kube.store import Store
from podwire.net import parse_address, parse_prefix
from podwire.nodes import Neighbour, NodeRoute, RouteCompiler, RouteTable, Tunnel
from podwire.nodes.compiler import tunnel_mac
from podwire.nodes.table import Routing

A, P = parse_address, parse_prefix


def node(name: str, addresses: str, cidrs: str, *, label: str = "") -> Node:
    return Node(
        metadata=Metadata(name=name, labels={"x": label}),
        spec=NodeSpec(pod_cidrs=cidrs.split()),
        status=NodeStatus(
            addresses=[
                NodeAddress(type="Hostname", address=name),
                *(NodeAddress(type="InternalIP", address=a) for a in addresses.split()),
            ]
        ),
    )


ONE = node("n1", "192.168.0.1 fd00::1", "10.244.0.0/24 fd10::/64")
TWO = node("n2", "192.168.0.2 fd00::2", "10.244.1.0/24 fd10:0:0:1::/64")
THREE = node("n3", "192.168.0.3", "10.244.2.0/24")


class Cluster:
    """A store and a compiler of node n1."""

    def __init__(self, routing: Routing, *nodes: Node) -> None:
        self.store = Store()
        self.compiler = RouteCompiler("n1", routing)
        for each in nodes:
            self.store.put(each)

    def table(self) -> RouteTable:
        return self.compiler.update(self.store.take())


def test_direct_routes_of_both_families() -> None:
    table = Cluster("direct", ONE, TWO, THREE).table()
    assert table.routes == {
        NodeRoute(P("10.244.1.0/24"), A("192.168.0.2")),
        NodeRoute(P("fd10:0:0:1::/64"), A("fd00::2")),
        NodeRoute(P("10.244.2.0/24"), A("192.168.0.3")),
    }
    assert table.pod_prefixes == {P("10.244.0.0/24"), P("fd10::/64")}
    assert P("192.168.0.3/32") in table.cluster_prefixes
    assert P("10.244.0.0/24") in table.cluster_prefixes
    assert (table.overhead, table.neighbours, table.fdb) == (0, frozenset(), frozenset())
    assert table.problems == {}


def test_vxlan_entries_follow_from_the_node_alone() -> None:
    table = Cluster("vxlan", ONE, TWO).table()
    mac = tunnel_mac("n2")
    assert mac[0] & 3 == 2  # locally administered, unicast
    assert table.routes == {
        NodeRoute(P("10.244.1.0/24"), A("10.244.1.0"), A("192.168.0.2")),
        NodeRoute(P("fd10:0:0:1::/64"), A("fd10:0:0:1::"), A("192.168.0.2")),
    }
    assert table.neighbours == {
        Neighbour(A("10.244.1.0"), mac),
        Neighbour(A("fd10:0:0:1::"), mac),
    }
    assert table.fdb == {Tunnel(mac, A("192.168.0.2"))}
    assert table.tunnel_addresses == {A("10.244.0.0"), A("fd10::")}
    assert (table.tunnel_mac, table.underlay) == (tunnel_mac("n1"), A("192.168.0.1"))
    assert table.overhead == 50
    assert P("192.168.0.2/32") not in table.cluster_prefixes


def test_an_ipv6_underlay_costs_70_bytes() -> None:
    cluster = Cluster("vxlan", node("n1", "fd00::1 192.168.0.1", "fd10::/64"), THREE)
    table = cluster.table()
    assert table.overhead == 70
    assert table.fdb == frozenset()
    assert "no InternalIP of the family" in table.problems["n3"]


def test_nodes_come_go_and_move() -> None:
    cluster = Cluster("direct", ONE)
    first = cluster.table()
    assert first.routes == frozenset()
    assert cluster.table() is first
    cluster.store.put(TWO)
    assert len(cluster.table().routes) == 2
    cluster.store.put(node("n2", "192.168.0.22 fd00::2", "10.244.1.0/24 fd10:0:0:1::/64"))
    moved = cluster.table()
    assert NodeRoute(P("10.244.1.0/24"), A("192.168.0.22")) in moved.routes
    # a heartbeat or a label is no change
    cluster.store.put(
        node("n2", "192.168.0.22 fd00::2", "10.244.1.0/24 fd10:0:0:1::/64", label="y")
    )
    assert cluster.table() is moved
    cluster.store.remove(Node, ("", "n2"))
    assert cluster.table().routes == frozenset()


def test_bad_nodes_are_named_and_do_not_stop_the_others() -> None:
    table = Cluster(
        "direct",
        ONE,
        TWO,
        node("bad", "not-an-address", "10.244.1.0/24 300.0.0.0/8"),
        node("new", "", "10.244.9.0/24"),
        node("zz", "192.168.0.9", "10.244.1.0/24"),
    ).table()
    assert {str(route.prefix) for route in table.routes} == {"fd10:0:0:1::/64"}
    assert table.owners[P("10.244.1.0/24")] == "bad"
    assert set(table.problems) == {"bad", "n2", "new", "zz"}
    assert "is taken by node bad" in table.problems["zz"]


def test_without_the_own_node_there_is_nothing_to_do() -> None:
    table = Cluster("vxlan", TWO, THREE).table()
    assert (table.routes, table.tunnel_mac, table.pod_prefixes) == (frozenset(), b"", frozenset())
    assert "no InternalIP" in table.problems["n1"]


def test_the_way_of_a_packet() -> None:
    table = Cluster("vxlan", ONE, TWO).table()
    pod = A("10.244.0.7")
    assert table.way(pod, A("10.244.0.8")).node == "n1"
    way = table.way(pod, A("10.244.1.8"))
    assert (way.node, way.gateway, way.overlay, way.masquerade) == (
        "n2",
        A("10.244.1.0"),
        True,
        False,
    )
    assert table.way(pod, A("192.0.2.1")).masquerade
    assert table.way(A("fd10::7"), A("2001:db8::1")).masquerade
    assert not table.way(A("192.168.0.1"), A("192.0.2.1")).masquerade
    assert not Cluster("direct", ONE, TWO).table().way(pod, A("192.168.0.2")).masquerade


def test_configured_prefixes_are_not_masqueraded() -> None:
    store = Store()
    store.put(ONE)
    compiler = RouteCompiler("n1", "direct", no_masquerade=[P("172.16.0.0/12")])
    table = compiler.update(store.take())
    assert not table.way(A("10.244.0.7"), A("172.20.1.1")).masquerade


@st.composite
def clusters(draw: st.DrawFn) -> list[Node]:
    numbers = draw(st.lists(st.integers(1, 60), max_size=8))
    return [
        node(f"n{i}", f"192.168.0.{n}", f"10.{n & 3}.{n}.0/{draw(st.sampled_from([24, 26]))}")
        for i, n in enumerate(numbers)
    ]


@given(clusters(), clusters(), st.sampled_from(["direct", "vxlan"]))
def test_history_does_not_matter(before: list[Node], after: list[Node], routing: Routing) -> None:
    stepwise, at_once = Cluster(routing, *before), Cluster(routing, *after)
    stepwise.table()
    stepwise.store.replace(Node, after)
    assert stepwise.table() == at_once.table()


@given(clusters(), st.binary(min_size=4, max_size=4))
def test_the_way_is_the_longest_prefix(nodes: list[Node], tail: bytes) -> None:
    table = Cluster("direct", *nodes).table()
    destination = bytes([10, tail[1] & 3, tail[2] & 63, tail[3]])
    every = [*table.pod_prefixes, *(route.prefix for route in table.routes)]
    best = max((p for p in every if destination in p), key=lambda p: p.length, default=None)
    way = table.way(b"\xc0\0\2\1", destination)
    assert way.node == (table.owners[best] if best else "")
