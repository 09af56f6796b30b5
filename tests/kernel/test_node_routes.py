"""Routes between nodes: real nodes in namespaces, real packets, and somebody who interferes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from podwire.kernel import address, link, neighbour, route, vxlan
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.link import End
from podwire.kernel.monitor import Group, Monitor
from podwire.kernel.netlink import NetlinkSocket
from podwire.kube.objects import Metadata, Node, NodeAddress, NodeSpec, NodeStatus
from podwire.kube.store import Store
from podwire.net import parse_address, parse_prefix
from podwire.nodes import OVERLAY_DEVICES, RouteCompiler
from podwire.nodes.table import Routing, TunnelProtocol
from podwire.wiring.routes import NodeRoutes
from tests.conftest import present
from tests.traffic import udp_source

A, P = parse_address, parse_prefix
NAMES = ("n1", "n2", "n3")
UNDERLAY_MTU = 1600
DEVICE = OVERLAY_DEVICES["vxlan"]


@dataclass
class Member:
    """A node: its namespace, with an underlay link and a link that holds a pod's address."""

    name: str
    number: int
    fd: int
    sock: NetlinkSocket
    routes: NodeRoutes
    compiler: RouteCompiler

    def pod(self, family: int) -> str:
        return f"10.244.{self.number}.9" if family == 4 else f"fd10:0:0:{self.number}::9"


class Cluster:
    """Three nodes on one underlay, dual stack."""

    def __init__(
        self,
        routing: Routing,
        make_netns: Callable[[], int],
        families: tuple[int, ...] = (4, 6),
        protocol: TunnelProtocol = "vxlan",
    ) -> None:
        self.routing = routing
        self.protocol: TunnelProtocol = protocol
        self.families = families
        self.store = Store()
        switch = make_netns()
        self.members: list[Member] = []
        with NetlinkSocket(netns_fd=switch) as middle:
            middle.run(link.add_bridge(End("br0", mtu=UNDERLAY_MTU), up=True))
            bridge = present(middle, "br0").index
            for number, name in enumerate(NAMES, 1):
                member = self._member(name, number, make_netns(), routing)
                self.members.append(member)
                middle.run(
                    link.add_veth(
                        End(name, mtu=UNDERLAY_MTU),
                        End("eth0", member.fd, mtu=UNDERLAY_MTU),
                        up=True,
                        master=bridge,
                    )
                )
                self._underlay(member)

    def _member(self, name: str, number: int, fd: int, routing: Routing) -> Member:
        sock = NetlinkSocket(netns_fd=fd)
        compiler = RouteCompiler(name, routing, protocol=self.protocol)
        return Member(name, number, fd, sock, NodeRoutes(fd), compiler)

    def _underlay(self, member: Member) -> None:
        sock, n = member.sock, member.number
        sock.run(link.change("eth0", up=True), link.add_bridge(End("pods"), up=True))
        eth0, pods = present(sock, "eth0").index, present(sock, "pods").index
        sock.run(
            address.add(InterfaceAddress(eth0, A(f"192.168.7.{n}"), 24)),
            address.add(InterfaceAddress(eth0, A(f"fd07::{n}"), 64)),
            address.add(InterfaceAddress(pods, A(member.pod(4)), 24)),
            address.add(InterfaceAddress(pods, A(member.pod(6)), 64)),
        )

    def put(self, *numbers: int, host: str = "", pods: bool = True) -> None:
        for n in numbers:
            by_family = {4: f"192.168.7.{host or n}", 6: f"fd07::{host or n}"}
            addresses = [by_family[family] for family in self.families]
            self.store.put(
                Node(
                    metadata=Metadata(name=f"n{n}"),
                    spec=NodeSpec(
                        pod_cidrs=[f"10.244.{n}.0/24", f"fd10:0:0:{n}::/64"] if pods else []
                    ),
                    status=NodeStatus(
                        addresses=[NodeAddress(type="InternalIP", address=a) for a in addresses]
                    ),
                )
            )

    def apply(self) -> None:
        changes = self.store.take()
        for member in self.members:
            member.routes.apply(member.compiler.update(changes))

    def close(self) -> None:
        for member in self.members:
            member.routes.close()
            member.sock.close()


@pytest.fixture(params=["direct", "vxlan"])
def cluster(request: pytest.FixtureRequest, make_netns: Callable[[], int]) -> Iterator[Cluster]:
    made = Cluster(request.param, make_netns)
    made.put(1, 2, 3)
    made.apply()
    yield made
    made.close()


def exchange(
    client: Member, server: Member, family: int, *, size: int = 8, wait_s: float = 4
) -> str:
    """The source that the second one's pod saw of a datagram; "" if none came."""
    source, to = client.pod(family), server.pod(family)
    return udp_source(client.fd, server.fd, to, source=source, size=size, wait_s=wait_s)


@pytest.mark.parametrize("family", [4, 6])
def test_pods_of_all_nodes_reach_each_other(cluster: Cluster, family: int) -> None:
    for client in cluster.members:
        for server in cluster.members:
            assert exchange(client, server, family) == client.pod(family)
    assert [member.routes.status()["problems"] for member in cluster.members] == [{}, {}, {}]


def test_the_same_table_again_changes_nothing(cluster: Cluster) -> None:
    assert [member.routes.verify() for member in cluster.members] == [[], [], []]


def test_what_somebody_deleted_comes_back(cluster: Cluster) -> None:
    one, two, _ = cluster.members
    monitor = Monitor([Group.LINK, Group.NEIGHBOUR, Group.IPV4_ROUTE, Group.IPV6_ROUTE], one.fd)
    foreign = route.direct(P("198.51.100.0/24"), present(one.sock, "pods").index)
    one.sock.run(route.add(foreign))
    assert not [event for event in monitor.drain() if one.routes.concerns(event)]
    gone = route.dump(one.sock, protocol=80)[0]
    one.sock.run(route.delete(gone))
    assert any(one.routes.concerns(event) for event in monitor.drain())
    (repair,) = one.routes.verify()
    assert str(gone.prefix) in repair

    if cluster.routing == "vxlan":
        one.sock.run(link.delete(DEVICE))
        assert any(one.routes.concerns(event) for event in monitor.drain())
        assert one.routes.verify()
    monitor.close()
    assert exchange(one, two, 4) == one.pod(4)
    assert foreign in route.dump(one.sock)


def test_a_route_of_somebody_else_stays(cluster: Cluster) -> None:
    one = cluster.members[0]
    cluster.store.remove(Node, ("", "n2"))
    cluster.apply()
    assert exchange(one, cluster.members[1], 4, wait_s=0.2) == ""
    foreign = route.direct(P("10.244.2.0/24"), present(one.sock, "pods").index)
    one.sock.run(route.add(foreign))
    cluster.put(2)
    cluster.apply()
    assert foreign in route.dump(one.sock)
    (problem,) = one.routes.status()["problems"].values()  # type: ignore[attr-defined]
    assert "10.244.2.0/24" in problem
    assert "not podwire's" in problem
    one.sock.run(route.delete(foreign))
    assert len(one.routes.verify()) == 1
    assert one.routes.status()["problems"] == {}


def test_a_node_returns_with_a_new_address(cluster: Cluster) -> None:
    one, two, _ = cluster.members
    eth0 = present(two.sock, "eth0").index
    for entry in address.dump(two.sock, link=eth0):
        if entry.scope == address.SCOPE_GLOBAL:
            two.sock.run(address.delete(entry))
    two.sock.run(
        address.add(InterfaceAddress(eth0, A("192.168.7.22"), 24)),
        address.add(InterfaceAddress(eth0, A("fd07::22"), 64)),
    )
    assert exchange(one, two, 4, wait_s=0.2) == ""
    cluster.put(2, host="22")
    cluster.apply()
    for family in (4, 6):
        assert exchange(one, two, family) == one.pod(family)
        assert exchange(two, one, family) == two.pod(family)


def test_the_mtu_follows_the_underlay(cluster: Cluster) -> None:
    one, two, _ = cluster.members
    overhead = 50 if cluster.routing == "vxlan" else 0
    assert one.routes.pod_mtu() == UNDERLAY_MTU - overhead
    assert exchange(one, two, 4, size=UNDERLAY_MTU - overhead - 28)
    one.sock.run(link.change("eth0", mtu=1400))
    one.routes.verify()
    assert one.routes.pod_mtu() == 1400 - overhead
    if overhead:
        assert present(one.sock, DEVICE).mtu == 1350


def test_cleanup_leaves_only_what_others_made(cluster: Cluster) -> None:
    one = cluster.members[0]
    foreign = route.direct(P("198.51.100.0/24"), present(one.sock, "pods").index)
    one.sock.run(route.add(foreign))
    one.routes.cleanup()
    one.routes.cleanup()
    assert link.find(one.sock, DEVICE) is None
    assert route.dump(one.sock, protocol=80) == []
    assert foreign in route.dump(one.sock)


def test_switching_to_direct_takes_the_device_away(cluster: Cluster) -> None:
    one = cluster.members[0]
    cluster.store.take()
    compiler = RouteCompiler("n1", "direct")
    store = Store()
    for each in cluster.store.all(Node).values():
        store.put(each)
    one.routes.apply(compiler.update(store.take()))
    assert link.find(one.sock, DEVICE) is None
    assert len(route.dump(one.sock, protocol=80)) == 4


def test_an_ipv6_underlay_carries_both_families(make_netns: Callable[[], int]) -> None:
    cluster = Cluster("vxlan", make_netns, families=(6,))
    cluster.put(1, 2)
    cluster.apply()
    one, two, _ = cluster.members
    for family in (4, 6):
        assert exchange(one, two, family, size=UNDERLAY_MTU - 70 - 48) == one.pod(family)
    assert one.routes.verify() == []
    cluster.close()


def test_the_device_is_guarded_before_it_goes_up(make_netns: Callable[[], int]) -> None:
    cluster = Cluster("vxlan", make_netns)
    one = cluster.members[0]
    seen: list[bool] = []
    guarded = NodeRoutes(one.fd, guard=lambda: seen.append(present(one.sock, DEVICE).up))
    cluster.put(1, 2, 3)
    guarded.apply(one.compiler.update(cluster.store.take()))
    assert (seen, present(one.sock, DEVICE).up) == ([False], True)
    guarded.close()
    cluster.close()


def test_a_device_of_another_kind_is_replaced(make_netns: Callable[[], int]) -> None:
    """As podwire made it before: for one VNI, by forwarding entries alone."""
    cluster = Cluster("vxlan", make_netns)
    one, two, _ = cluster.members
    old = vxlan.Vxlan(4096, 8472, local=A("192.168.7.1"))
    one.sock.run(vxlan.add_vxlan(End(DEVICE), old, up=True))
    to_two = route.via(
        P("10.244.2.0/24"),
        A("10.244.2.0"),
        present(one.sock, DEVICE).index,
        onlink=True,
        protocol=80,
    )
    one.sock.run(route.add(to_two))
    cluster.put(1, 2, 3)
    cluster.apply()
    assert vxlan.read(present(one.sock, DEVICE)).collect_metadata
    assert exchange(one, two, 4) == one.pod(4)
    assert one.routes.status()["problems"] == {}
    cluster.close()


def test_another_overlay_in_the_way_is_told_and_outlived(make_netns: Callable[[], int]) -> None:
    """flannel's device takes the same port; once it is gone, ours goes up."""
    cluster = Cluster("vxlan", make_netns)
    one, two, _ = cluster.members
    flannel = vxlan.Vxlan(1, 8472, local=A("192.168.7.1"))
    one.sock.run(vxlan.add_vxlan(End("flannel.1"), flannel, up=True))
    cluster.put(1, 2)
    cluster.apply()
    problems = one.routes.status()["problems"]
    assert any("UDP port is taken" in text for text in problems.values())  # type: ignore[attr-defined]
    one.sock.run(link.delete("flannel.1"))
    one.routes.verify()
    assert one.routes.status()["problems"] == {}
    assert exchange(one, two, 4) == one.pod(4)
    cluster.close()


def test_ipv6_pods_are_reached_where_another_route_covers_them(
    make_netns: Callable[[], int],
) -> None:
    cluster = Cluster("vxlan", make_netns)
    one, two, _ = cluster.members
    eth0 = present(one.sock, "eth0").index
    one.sock.run(route.add(route.direct(P("fd00::/8"), eth0)))
    cluster.put(1, 2)
    cluster.apply()
    assert one.routes.status()["problems"] == {}
    assert exchange(one, two, 6) == one.pod(6)
    assert one.routes.verify() == []
    cluster.store.remove(Node, ("", "n2"))
    cluster.apply()
    assert route.dump(one.sock, protocol=80) == []
    cluster.close()


def test_neighbours_are_permanent(make_netns: Callable[[], int]) -> None:
    cluster = Cluster("vxlan", make_netns)
    cluster.put(1, 2, 3)
    cluster.apply()
    one = cluster.members[0]
    entries = neighbour.dump(one.sock, link=present(one.sock, DEVICE).index)
    assert [e.state for e in entries if e.mac[:1] == b"\x0a"] == [neighbour.NUD_PERMANENT] * 4
    cluster.close()


def test_a_node_that_loses_its_pod_cidr_knows_its_neighbours_still(
    make_netns: Callable[[], int],
) -> None:
    """The kernel forgets them with the last IPv4 address of a link."""
    cluster = Cluster("vxlan", make_netns)
    cluster.put(1, 2, 3)
    cluster.apply()
    one = cluster.members[0]
    cluster.put(1, pods=False)
    cluster.apply()
    assert one.routes.status()["problems"] == {}
    found = neighbour.dump(one.sock, link=present(one.sock, DEVICE).index)
    expected = {A(text) for n in (2, 3) for text in (f"10.244.{n}.0", f"fd10:0:0:{n}::")}
    assert {e.address for e in found if e.state == neighbour.NUD_PERMANENT} >= expected
    assert one.routes.verify() == []
    cluster.close()
