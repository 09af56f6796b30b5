"""What leaves the cluster is masqueraded, what stays is not: real packets, three namespaces."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from podwire.datapath.iptables.nodes import NodesPart as IptablesPart
from podwire.datapath.nftables.nodes import TABLE, NodesPart
from podwire.kernel import address, link, netns, route, sysctl
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.iptables import FLAVOURS, Flavour
from podwire.kernel.link import End
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import Prefix, parse_address, parse_prefix
from podwire.nodes import RouteTable
from tests.conftest import present
from tests.traffic import udp_source

A, P = parse_address, parse_prefix
POD, NODE, WORLD, PEER = "10.244.1.9", "192.0.2.1", "192.0.2.9", "10.244.2.9"
POD6, NODE6, WORLD6 = "fd10:0:0:1::9", "2001:db8::1", "2001:db8::9"


@dataclass
class Net:
    """A pod behind a node, and a world with no route back to pods but a peer's address."""

    pod: int
    node: int
    world: int
    part: NodesPart | IptablesPart


def table(*more: Prefix) -> RouteTable:
    own = frozenset({P("10.244.1.0/24"), P("fd10:0:0:1::/64")})
    return RouteTable("n1", "direct", pod_prefixes=own, cluster_prefixes=own | set(more))


def on_iptables(flavour: Flavour) -> Callable[[int], IptablesPart]:
    return lambda fd: IptablesPart(fd, flavour)


EVERY_PATH = pytest.mark.parametrize(
    "net",
    [NodesPart, on_iptables("nft"), on_iptables("legacy")],
    ids=["nftables", "iptables-nft", "iptables-legacy"],
    indirect=True,
)


@pytest.fixture
def net(request: pytest.FixtureRequest, make_netns: Callable[[], int]) -> Iterator[Net]:
    pod, node, world = make_netns(), make_netns(), make_netns()
    with (
        NetlinkSocket(netns_fd=pod) as p,
        NetlinkSocket(netns_fd=node) as n,
        NetlinkSocket(netns_fd=world) as w,
    ):
        n.run(
            link.add_veth(End("pod"), End("eth0", pod)),
            link.add_veth(End("eth0"), End("eth0", world)),
        )
        for sock, name, addresses in (
            (p, "eth0", (f"{POD}/24", f"{POD6}/64")),
            (n, "pod", ("10.244.1.1/24", "fd10:0:0:1::1/64")),
            (n, "eth0", (f"{NODE}/24", f"{NODE6}/64")),
            (w, "eth0", (f"{WORLD}/24", f"{PEER}/24", f"{WORLD6}/64")),
        ):
            index = present(sock, name).index
            sock.run(link.change(index, up=True))
            for text in addresses:
                plain, _, length = text.partition("/")
                sock.run(address.add(InterfaceAddress(index, A(plain), int(length))))
        eth0 = present(p, "eth0").index
        p.run(
            route.add(route.via(P("0.0.0.0/0"), A("10.244.1.1"), eth0)),
            route.add(route.via(P("::/0"), A("fd10:0:0:1::1"), eth0)),
        )
        eth0 = present(n, "eth0").index
        n.run(route.add(route.direct(P("10.244.2.0/24"), eth0)))
    sysctl.write({"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1}, node)
    part = getattr(request, "param", NodesPart)(node)
    part.start()
    part.apply(table(P("10.244.2.0/24")))
    yield Net(pod, node, world, part)
    part.close()


@EVERY_PATH
def test_only_what_leaves_the_cluster(net: Net) -> None:
    assert udp_source(net.pod, net.world, WORLD) == NODE
    assert udp_source(net.pod, net.world, WORLD6) == NODE6
    assert udp_source(net.pod, net.world, PEER) == POD
    assert udp_source(net.node, net.world, WORLD) == NODE


@EVERY_PATH
def test_what_is_the_cluster_changes(net: Net) -> None:
    net.part.apply(table(P("10.0.0.0/8"), P("10.244.2.0/24"), P("192.0.2.0/24"), P("0.0.0.0/2")))
    assert udp_source(net.pod, net.world, WORLD) == POD
    net.part.apply(table(P("10.244.2.0/24"), P("255.255.255.0/24"), P("::/0")))
    assert udp_source(net.pod, net.world, WORLD) == NODE
    assert udp_source(net.pod, net.world, WORLD6) == POD6
    assert net.part.verify() == []


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_on_iptables_meddling_is_repaired(net: Net, flavour: Flavour) -> None:
    net.part.cleanup()
    part = IptablesPart(net.node, flavour)
    part.start()
    part.apply(table(P("10.244.2.0/24")))
    for command in (
        [f"iptables-{flavour}", "-t", "nat", "-F"],
        ["ipset", "flush", "podwire-nodes4-pods"],
        ["ipset", "add", "podwire-nodes4-cluster", "192.0.2.0/24"],
    ):
        assert netns.run(net.node, command).returncode == 0
        assert len(part.verify()) >= 1, command
        assert part.verify() == []
        assert udp_source(net.pod, net.world, WORLD) == NODE
    again = IptablesPart(net.node, flavour)
    again.start()
    again.apply(table())
    assert udp_source(net.pod, net.world, PEER) == NODE
    again.cleanup()
    assert "PODWIRE" not in netns.run(net.node, [f"iptables-{flavour}-save"]).stdout
    assert netns.run(net.node, ["ipset", "list", "-n"]).stdout == ""


def test_sets_follow_the_table(net: Net) -> None:
    net.part.apply(table(P("10.0.0.0/8"), P("10.244.2.0/24"), P("192.0.2.0/24"), P("0.0.0.0/2")))
    assert net.part.status() == {
        "pods-ipv4": 1,
        "pods-ipv6": 1,
        "cluster-ipv4": 2,  # 0.0.0.0/2 covers all of 10.0.0.0/8
        "cluster-ipv6": 1,
        "nodes-ipv4": 0,
        "nodes-ipv6": 0,
    }
    assert udp_source(net.pod, net.world, WORLD) == POD
    net.part.apply(table(P("10.244.2.0/24"), P("255.255.255.0/24"), P("::/0")))
    assert udp_source(net.pod, net.world, WORLD) == NODE
    assert udp_source(net.pod, net.world, WORLD6) == POD6
    assert net.part.verify() == []


def test_a_new_process_adopts_what_is_there(net: Net) -> None:
    again = NodesPart(net.node)
    again.start()
    assert again.status() == net.part.status()
    assert udp_source(net.pod, net.world, WORLD) == NODE
    again.apply(table())
    assert udp_source(net.pod, net.world, PEER) == NODE
    again.close()


def test_repairs(net: Net) -> None:
    assert net.part.verify() == []
    for command, repair in (
        (f"delete table inet {TABLE}", "rules"),
        (f"flush chain inet {TABLE} postrouting", "rules"),
        (f"flush set inet {TABLE} pods-ipv4", "set podwire-nodes pods-ipv4"),
        (f"add element inet {TABLE} cluster-ipv4 {{ 192.0.2.0/24 }}", "set"),
    ):
        assert netns.run(net.node, ["nft", command]).returncode == 0
        repairs = net.part.verify()
        assert any(repair in line for line in repairs), command
        assert net.part.verify() == []
        assert udp_source(net.pod, net.world, WORLD) == NODE


def test_cleanup(net: Net) -> None:
    net.part.cleanup()
    net.part.cleanup()
    assert netns.run(net.node, ["nft", "list", "ruleset"]).stdout == ""


OVERLAY = {"tunnel_mac": b"\x0a\0\0\0\0\1", "node_addresses": frozenset({A(NODE), A(NODE6)})}


@EVERY_PATH
def test_the_overlays_guard_comes_and_goes_with_it(net: Net) -> None:
    """What it does is seen in test_overlay_guard."""
    plain = table(P("10.244.2.0/24"))
    overlay = replace(plain, routing="vxlan", **OVERLAY)
    for each in (plain, overlay, plain):
        net.part.apply(each)
        assert net.part.verify() == []
        open = each is plain
        assert is_heard(net.pod, net.node, "10.244.1.1", 8472) == open
        assert is_heard(net.pod, net.node, "fd10:0:0:1::1", 8472) == open
        assert is_heard(net.pod, net.node, "10.244.1.1", 8473)


@EVERY_PATH
def test_without_masquerade_everything_is_reached_with_the_pods_address(net: Net) -> None:
    net.part._masquerade = False
    net.part.apply(table())
    with NetlinkSocket(netns_fd=net.world) as world:
        eth0 = present(world, "eth0").index
        world.run(route.add(route.via(P("10.244.1.0/24"), A(NODE), eth0)))
    assert udp_source(net.pod, net.world, WORLD) == POD
    assert net.part.verify() == []


def is_heard(client: int, server: int, at: str, port: int) -> bool:
    """Whether a datagram to that port arrives."""
    family = socket.AF_INET6 if ":" in at else socket.AF_INET
    with (
        netns.socket(server, family, socket.SOCK_DGRAM) as receiver,
        netns.socket(client, family, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((at, port))
        sender.sendto(b"x", (at, port))
        return bool(select.select([receiver], [], [], 0.3)[0])
