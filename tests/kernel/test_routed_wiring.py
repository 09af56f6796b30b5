"""Routed pods as on EKS: what they see, that packets flow, and who interferes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import pytest

from podwire.errors import KernelError
from podwire.kernel import address, link, netns, route, rule, sysctl
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.link import End
from podwire.kernel.monitor import Monitor
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import parse_address, parse_prefix
from podwire.wiring import Attachment, Key, Pod, PodAddress
from podwire.wiring.interference import GROUPS
from podwire.wiring.routed import RoutedWiring, host_ifname
from tests.conftest import present
from tests.traffic import udp_source

A, P = parse_address, parse_prefix
ENI_TABLE = 2


def attachment(name: str, *addresses: str, table: int = 0, ifname: str = "eth0") -> Attachment:
    return Attachment(
        key=Key("podwire", f"id-{name}", ifname),
        pod=Pod("default", name),
        addresses=tuple(PodAddress(A(a), 24) for a in addresses),
        mtu=9001,
        wiring="routed",
        route_table=table,
    )


@dataclass
class Node:
    """A node with an underlay link, the wiring, and a way to make pods."""

    fd: int
    sock: NetlinkSocket
    wiring: RoutedWiring
    make: Callable[[], int]

    def pod(self, name: str, *addresses: str, table: int = 0) -> tuple[int, Attachment]:
        fd = self.make()
        return fd, self.wiring.attach(attachment(name, *addresses, table=table), fd)

    def ip(self, *arguments: str) -> list[str]:
        done = netns.run(self.fd, ["ip", *arguments])
        return [line.strip() for line in done.stdout.splitlines()]


@pytest.fixture
def node(make_netns: Callable[[], int]) -> Iterator[Node]:
    fd = make_netns()
    wiring = RoutedWiring(fd)
    with NetlinkSocket(netns_fd=fd) as sock:
        yield Node(fd, sock, wiring, make_netns)
    wiring.close()


@pytest.mark.parametrize(
    ("namespace", "name", "ifname", "expected"),
    [
        ("default", "nginx", "eth0", "enic440f455693"),
        ("ns", "pod", "eth0", "enie34aba5891b"),
        ("ns", "pod", "1", "eni8428dce294f"),
        ("default", "web-0", "eth0", "eni0d7763386da"),
    ],
)
def test_names_are_the_originals(namespace: str, name: str, ifname: str, expected: str) -> None:
    made = Attachment(key=Key("n", "c", ifname), pod=Pod(namespace, name))
    assert host_ifname(made) == expected


def test_inside_the_pod_it_looks_like_eks(node: Node) -> None:
    fd, made = node.pod("web-0", "10.0.1.5", "fd00::5")

    def lines(*arguments: str) -> list[str]:
        return [s.strip() for s in netns.run(fd, ["ip", *arguments]).stdout.splitlines()]

    # The kernel tells of a carrier some time later (linkwatch); until then it says "linkdown".
    assert [line.removesuffix(" linkdown") for line in lines("route")] == [
        "default via 169.254.1.1 dev eth0",
        "169.254.1.1 dev eth0 scope link",
    ]
    assert lines("neigh", "show", "169.254.1.1") == [
        f"169.254.1.1 dev eth0 lladdr {made.host_mac.hex(':')} PERMANENT proto 112"
    ]
    shown = lines("addr", "show", "dev", "eth0")
    assert "mtu 9001" in shown[0]
    assert f"link/ether {made.mac.hex(':')}" in shown[1]
    assert "inet 10.0.1.5/32 scope global eth0" in shown
    assert any(line.startswith("inet6 fd00::5/128 scope global") for line in shown)
    assert not any("tentative" in line for line in shown)
    routes = [line.split(" metric")[0] for line in lines("-6", "route")]
    assert "default via fe80::1 dev eth0" in routes
    assert "fe80::1 dev eth0" in routes
    assert node.wiring.check(made, fd) == []
    assert made.host_ifname == "eni0d7763386da"
    assert node.wiring.links() == {"eni0d7763386da"}


def test_without_a_cloud_there_are_no_rules(node: Node) -> None:
    node.pod("a", "10.0.1.5")
    assert {each.priority for each in rule.dump(node.sock)} == {0, 32766, 32767}
    (shown,) = node.ip("route", "show", "10.0.1.5")
    assert shown.startswith("10.0.1.5 dev eni")
    assert "scope link" in shown


def test_rules_of_primary_and_secondary_enis(node: Node) -> None:
    node.pod("first", "10.0.1.5", table=route.TABLE_MAIN)
    node.pod("second", "10.0.1.6", table=ENI_TABLE)
    assert [line.split(" proto")[0] for line in node.ip("rule")] == [
        "0:\tfrom all lookup local",
        "512:\tfrom all to 10.0.1.5 lookup main",
        "512:\tfrom all to 10.0.1.6 lookup main",
        "1536:\tfrom 10.0.1.6 lookup 2",
        "32766:\tfrom all lookup main",
        "32767:\tfrom all lookup default",
    ]


@pytest.mark.parametrize("pair", [("10.0.1.5", "10.0.1.6"), ("fd00::5", "fd00::6")])
def test_pods_reach_each_other_and_the_node(node: Node, pair: tuple[str, str]) -> None:
    node.sock.run(link.add_bridge(End("eth0"), up=True))
    eth0 = present(node.sock, "eth0").index
    mine = "192.168.0.1" if "." in pair[0] else "fd01::1"
    length = 24 if "." in mine else 64
    node.sock.run(address.add(InterfaceAddress(eth0, A(mine), length)))
    one, _ = node.pod("one", pair[0], table=ENI_TABLE)
    two, _ = node.pod("two", pair[1], table=ENI_TABLE)
    assert udp_source(one, two, pair[1]) == pair[0]
    assert udp_source(node.fd, two, pair[1]) == mine
    assert udp_source(one, node.fd, mine) == pair[0]


def test_traffic_leaves_by_the_table_of_its_eni(node: Node) -> None:
    """Two ways out, each with a world behind it that answers to the same address."""
    worlds: list[int] = []
    for index, name in enumerate(("eth0", "eth1")):
        world = node.make()
        worlds.append(world)
        node.sock.run(link.add_veth(End(name), End("eth0", world), up=True))
        outer = present(node.sock, name).index
        node.sock.run(address.add(InterfaceAddress(outer, A(f"10.0.{index}.1"), 24)))
        table = ENI_TABLE if index else route.TABLE_MAIN
        way = route.via(P("0.0.0.0/0"), A(f"10.0.{index}.254"), outer, table=table)
        node.sock.run(route.add(way))
        with NetlinkSocket(netns_fd=world) as sock:
            eth0 = present(sock, "eth0").index
            sock.run(
                link.change(eth0, up=True),
                address.add(InterfaceAddress(eth0, A(f"10.0.{index}.254"), 24)),
                address.add(InterfaceAddress(eth0, A("198.51.100.1"), 32)),
                route.add(route.via(P("10.0.9.0/24"), A(f"10.0.{index}.1"), eth0)),
            )
    first, _ = node.pod("first", "10.0.9.1", table=route.TABLE_MAIN)
    second, _ = node.pod("second", "10.0.9.2", table=ENI_TABLE)
    assert udp_source(first, worlds[0], "198.51.100.1") == "10.0.9.1"
    assert udp_source(second, worlds[1], "198.51.100.1") == "10.0.9.2"
    assert udp_source(second, worlds[0], "198.51.100.1", wait_s=0.3) == ""


def test_a_false_source_does_not_leave(node: Node) -> None:
    node.sock.run(link.add_bridge(End("eth0"), up=True))
    eth0 = present(node.sock, "eth0").index
    node.sock.run(address.add(InterfaceAddress(eth0, A("192.168.0.1"), 24)))
    fd, made = node.pod("liar", "10.0.1.5")
    node.pod("victim", "10.0.1.6")
    with NetlinkSocket(netns_fd=fd) as pod:
        index = present(pod, "eth0").index
        pod.run(address.add(InterfaceAddress(index, A("10.0.1.6"), 32)))
    to = "192.168.0.1"
    assert udp_source(fd, node.fd, to, source="10.0.1.5") == "10.0.1.5"
    assert udp_source(fd, node.fd, to, source="10.0.1.6", wait_s=0.3) == ""
    assert sysctl.read(f"net.ipv4.conf.{made.host_ifname}.rp_filter", node.fd) == "1"


def test_what_somebody_wiped_comes_back(node: Node) -> None:
    fd, made = node.pod("a", "10.0.1.5", "fd00::5", table=ENI_TABLE)
    other, _ = node.pod("b", "10.0.1.6", table=ENI_TABLE)
    assert node.wiring.restore() == []
    foreign = rule.from_prefix(P("10.9.9.9/32"), 1536, 7)
    monitor = Monitor(GROUPS, node.fd)
    node.sock.run(rule.add(foreign), rule.delete(foreign), rule.add(foreign))
    assert not any(map(node.wiring.concerns, monitor.drain()))
    for command in (
        ["rule", "flush"],
        ["-6", "rule", "flush"],
        ["route", "del", "10.0.1.5"],
        ["neigh", "del", "10.0.1.6", "dev", host_ifname(attachment("b"))],
    ):
        node.ip(*command)
        assert any(map(node.wiring.concerns, monitor.drain())), command
    monitor.close()
    node.sock.run(rule.add(rule.Rule(32766, route.TABLE_MAIN)), rule.add(foreign))
    problems = node.wiring.check(made, fd)
    assert any("rule 512" in problem for problem in problems)
    assert any("route 10.0.1.5/32" in problem for problem in problems)
    repairs = node.wiring.restore()
    assert len(repairs) == 8  # 6 rules, a route, a neighbour
    assert node.wiring.restore() == []
    assert node.wiring.check(made, fd) == []
    assert udp_source(fd, other, "10.0.1.6") == "10.0.1.5"
    assert foreign in rule.dump(node.sock)


def test_a_restarted_agent_removes_what_nobody_owns(node: Node) -> None:
    _, kept = node.pod("kept", "10.0.1.5", table=ENI_TABLE)
    node.pod("orphan", "10.0.1.6", table=ENI_TABLE)
    again = RoutedWiring(node.fd)
    again.reconcile([kept])
    ours = [each for each in rule.dump(node.sock) if each.protocol]
    assert {str(each.destination) for each in ours if each.priority == 512} == {"10.0.1.5/32"}
    assert {str(r.prefix) for r in route.dump(node.sock, protocol=112)} == {"10.0.1.5/32"}
    assert again.restore() == []
    again.close()


def test_silence_and_purge(node: Node) -> None:
    fd, made = node.pod("a", "10.0.1.5", table=ENI_TABLE)
    other, _ = node.pod("b", "10.0.1.6", table=ENI_TABLE)
    assert udp_source(fd, other, "10.0.1.6") == "10.0.1.5"
    node.wiring.silence(made)
    assert udp_source(fd, other, "10.0.1.6", wait_s=0.3) == ""
    assert not [each for each in rule.dump(node.sock) if "10.0.1.5" in str(each)]
    assert node.wiring.restore() == []
    node.wiring.silence(made)
    node.wiring.purge([made.host_ifname])
    node.wiring.purge([made.host_ifname])
    assert len(node.wiring.links()) == 1
    node.wiring.silence(made)
    assert node.wiring.check(made, fd) != []


def test_a_late_del_of_the_old_sandbox_spares_the_new(node: Node) -> None:
    _, old = node.pod("web-0", "10.0.1.5", table=ENI_TABLE)
    fd, new = node.pod("web-0", "10.0.1.6", table=ENI_TABLE)
    assert new.host_ifname == old.host_ifname
    node.wiring.silence(old)
    node.wiring.purge([old.host_ifname])
    assert node.wiring.check(new, fd) == []
    # nor does an index of an earlier boot hit another link
    lo = msgspec.structs.replace(old, host_ifindex=present(node.sock, "lo").index)
    node.wiring.silence(lo)
    assert present(node.sock, "lo").up


def test_a_failed_attach_leaves_nothing(node: Node) -> None:
    fd = node.make()
    with NetlinkSocket(netns_fd=fd) as pod:
        pod.run(link.add_bridge(End("eth0")))
    with pytest.raises(KernelError, match="already exists"):
        node.wiring.attach(attachment("a", "10.0.1.5"), fd)
    assert node.wiring.links() == set()
    fd = node.make()
    with NetlinkSocket(netns_fd=fd) as pod:  # the pod's routes will be refused
        pod.run(
            link.add_bridge(End("br0"), up=True),
            route.add(route.direct(P("169.254.1.1/32"), 2)),
        )
    with pytest.raises(KernelError, match="File exists"):
        node.wiring.attach(attachment("b", "10.0.1.6", table=ENI_TABLE), fd)
    assert node.wiring.links() == set()
    assert not [each for each in rule.dump(node.sock) if each.protocol == 112]
    assert os.fstat(fd)


def test_many_pods_at_once(node: Node) -> None:
    def start(n: int) -> Attachment:
        return node.pod(f"pod-{n}", f"10.0.2.{n}", table=ENI_TABLE)[1]

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(start, range(1, 41)))
    assert node.wiring.restore() == []
    assert len(node.wiring.links()) == 40
    assert len([each for each in rule.dump(node.sock) if each.protocol == 112]) == 80
    for each in made:
        node.wiring.silence(each)
    node.wiring.purge([each.host_ifname for each in made])
    assert node.wiring.links() == set()
    assert node.wiring.restore() == []
