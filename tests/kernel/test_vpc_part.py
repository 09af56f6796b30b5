"""SNAT and marks of VPC mode with real packets: a node with two ENIs, pods, and a world."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import pytest

from podwire.datapath.iptables import vpc as ipt
from podwire.datapath.nftables.vpc import TABLE, VpcPart
from podwire.datapath.vpc import VpcTable
from podwire.kernel import link, netns, sysctl
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import parse_address, parse_prefix

Part: TypeAlias = VpcPart | ipt.VpcPart

PRIMARY, SECONDARY, POD, WORLD = "10.0.0.11", "10.0.0.12", "10.0.0.77", "203.0.113.10"
PORT = 8080


def ip(fd: int, script: str) -> None:
    """Run `ip -batch` in a namespace."""
    done = netns.run(fd, ["ip", "-batch", "-"], stdin=script)
    assert done.returncode == 0, done.stderr


class Node:
    """eth0 (primary) and eth1 lead to the world, which answers each address by its own link.

    The pod's address belongs to eth1: table 2, rules 512, 1024 and 1536 as the wiring makes them.
    """

    def __init__(self, make: Callable[[], int]) -> None:
        self.node, self.pod, self.world = make(), make(), make()
        self._plug()
        ip(
            self.world,
            f"""addr add 10.0.0.1/32 dev w0
            addr add {WORLD}/32 dev lo
            link set w0 up
            link set w1 up
            route add {PRIMARY} dev w0
            route add {SECONDARY} dev w1
            route add {POD} via {SECONDARY} dev w1 onlink
            """,
        )
        ip(
            self.node,
            f"""addr add {PRIMARY}/32 dev eth0
            addr add {SECONDARY}/32 dev eth1
            link set eth0 up
            link set eth1 up
            link set eni0 up
            route add 10.0.0.1 dev eth0
            route add default via 10.0.0.1 dev eth0
            route add 10.0.0.1 dev eth1 table 2
            route add default via 10.0.0.1 dev eth1 table 2
            route add {POD} dev eni0
            addr add 169.254.1.1/32 dev eni0
            rule add to {POD} lookup main prio 512
            rule add fwmark 0x80/0x80 lookup main prio 1024
            rule add from {POD} lookup 2 prio 1536
            """,
        )
        ip(
            self.pod,
            f"""addr add {POD}/32 dev eth0
            link set eth0 up
            route add 169.254.1.1 dev eth0
            route add default via 169.254.1.1 dev eth0
            """,
        )

    def _plug(self) -> None:
        with NetlinkSocket(netns_fd=self.node) as sock:
            sock.run(
                link.add_veth(link.End("eth0"), link.End("w0", self.world)),
                link.add_veth(link.End("eth1"), link.End("w1", self.world)),
                link.add_veth(link.End("eni0"), link.End("eth0", self.pod)),
            )
        loose = {"net.ipv4.conf.all.rp_filter": 0, "net.ipv4.conf.default.rp_filter": 0}
        sysctl.write({"net.ipv4.ip_forward": 1, **loose}, self.node)
        # A source that does not belong to the link it comes from is dropped, as EC2 does.
        strict = {f"net.ipv4.conf.w{i}.rp_filter": 1 for i in (0, 1)}
        sysctl.write({"net.ipv4.ip_forward": 1, **strict}, self.world)


@pytest.fixture
def node(make_netns: Callable[[], int]) -> Node:
    return Node(make_netns)


def nftables(fd: int) -> Part:
    return VpcPart(fd)


def iptables_nft(fd: int) -> Part:
    return ipt.VpcPart(fd, "nft")


@pytest.fixture(params=[nftables, iptables_nft])
def part(node: Node, request: pytest.FixtureRequest) -> Iterator[Part]:
    part: Part = request.param(node.node)
    part.start()
    yield part
    part.cleanup()
    part.close()


TABLE_OF_NODE = VpcTable("eth0", parse_address(PRIMARY), (parse_prefix("10.0.0.0/16"),))


@contextlib.contextmanager
def listening(fd: int, address: str) -> Iterator[socket.socket]:
    with netns.socket(fd, socket.AF_INET, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, PORT))
        server.listen()
        server.settimeout(3)
        yield server


def reach(source: int, target: int, address: str, listen_on: str = "") -> str:
    """Connect from one namespace to the other; the address the server saw, "" if it saw none."""
    with (
        listening(target, listen_on or address) as server,
        netns.socket(source, socket.AF_INET, socket.SOCK_STREAM) as client,
    ):
        client.settimeout(2)
        try:
            client.connect((address, PORT))
        except OSError:
            return ""
        connection, (seen, _) = server.accept()
        with connection:
            connection.sendall(b"x")
            assert client.recv(1) == b"x"
        return seen


def nft(fd: int, script: str) -> str:
    done = netns.run(fd, ["nft", "-f", "-"], stdin=script + "\n")
    assert done.returncode == 0, done.stderr
    return done.stdout


def listed(fd: int) -> str:
    return netns.run(fd, ["nft", "list", "table", "ip", TABLE]).stdout


def test_pods_leave_the_vpc_as_the_primary_address(node: Node, part: Part) -> None:
    assert reach(node.pod, node.world, WORLD) == POD  # by its own ENI, as a stranger would see it
    part.apply(TABLE_OF_NODE)
    assert reach(node.pod, node.world, WORLD) == PRIMARY
    assert reach(node.pod, node.world, "10.0.0.1") == POD  # inside the VPC: no NAT
    assert reach(node.node, node.world, WORLD) == PRIMARY


def test_iptables_legacy(node: Node) -> None:
    part = ipt.VpcPart(node.node, "legacy")
    try:
        part.apply(TABLE_OF_NODE)
        assert part.verify() == []
        assert reach(node.pod, node.world, WORLD) == PRIMARY
    finally:
        part.cleanup()


@pytest.mark.parametrize("ports", ["prng", "hashrandom", "none"])
def test_every_way_of_choosing_ports(node: Node, part: Part, ports: str) -> None:
    part.apply(replace(TABLE_OF_NODE, random_ports=ports))
    assert reach(node.pod, node.world, WORLD) == PRIMARY


def test_excluded_cidrs_see_the_pod(node: Node, part: Part) -> None:
    near = (*TABLE_OF_NODE.near, parse_prefix("203.0.113.0/24"), parse_prefix("203.0.113.8/29"))
    part.apply(replace(TABLE_OF_NODE, near=near))
    assert reach(node.pod, node.world, WORLD) == POD


def test_external_snat_leaves_it_to_others(node: Node, part: Part) -> None:
    part.apply(replace(TABLE_OF_NODE, snat=False))
    assert reach(node.pod, node.world, WORLD) == POD


def translate(node: Node, part: Part, match: str, to: str) -> None:
    """A Service by the tools of the same data path, as kube-proxy's: it comes before ours."""
    if isinstance(part, VpcPart):
        rule = f"ip daddr {match} dnat to {to}"
        hook = "type nat hook prerouting priority dstnat;"
        nft(node.node, f"table ip foreign {{\n chain pre {{\n {hook} {rule}\n }}\n}}")
    else:
        rule = f"-t nat -I PREROUTING -d {match} -j DNAT --to-destination {to}"
        assert netns.run(node.node, [str(part._iptables), *rule.split()]).returncode == 0


def test_a_node_port_answers_by_the_link_it_came_in_on(node: Node, part: Part) -> None:
    translate(node, part, PRIMARY, POD)
    assert reach(node.world, node.pod, PRIMARY, listen_on=POD) == ""  # the answer leaves by eth1
    for snat in (True, False):
        part.apply(replace(TABLE_OF_NODE, snat=snat))
        assert reach(node.world, node.pod, PRIMARY, listen_on=POD) == "10.0.0.1"


@pytest.mark.parametrize("part", [nftables], indirect=True)
def test_a_service_whose_backend_is_beyond_the_vpc(node: Node, part: Part) -> None:
    """Its DNAT took effect already: a chain of type nat would not be called any more.

    iptables has no place for a rule that is.
    """
    translate(node, part, "10.96.0.1", WORLD)
    part.apply(TABLE_OF_NODE)
    assert reach(node.pod, node.world, "10.96.0.1", listen_on=WORLD) == PRIMARY


def test_a_service_with_a_backend_in_the_vpc_keeps_the_pods_address(node: Node, part: Part) -> None:
    translate(node, part, "10.96.0.1", "10.0.0.1")
    part.apply(TABLE_OF_NODE)
    assert reach(node.pod, node.world, "10.96.0.1", listen_on="10.0.0.1") == POD


def test_bits_of_others_stay(node: Node, part: Part) -> None:
    """The restore of the AWS VPC CNI clears the marks of other programs (its issue 3872)."""
    nft(
        node.node,
        """table ip foreign {
          chain before { type filter hook prerouting priority -160;
            iifname "eni0" meta mark set 0x5500
            iifname "eni0" ct state new ct mark set 0x4000
          }
          chain after { type filter hook prerouting priority 0;
            iifname "eni0" meta mark 0x5580 ct mark 0x4080 counter comment "outwards"
            iifname "eni0" meta mark 0x5500 ct mark 0x4000 counter comment "inwards"
            iifname "eni0" counter comment "all"
          }
        }""",
    )
    part.apply(TABLE_OF_NODE)
    assert reach(node.pod, node.world, WORLD) == PRIMARY
    assert reach(node.pod, node.world, "10.0.0.1") == POD
    outwards, inwards, everything = _counts(node.node)
    assert outwards > 0
    assert inwards > 0
    assert outwards + inwards == everything


def _counts(fd: int) -> list[int]:
    text = netns.run(fd, ["nft", "list", "chain", "ip", "foreign", "after"]).stdout
    return [
        int(line.split("packets ")[1].split()[0]) for line in text.splitlines() if "pack" in line
    ]


@pytest.mark.parametrize("part", [iptables_nft], indirect=True)
def test_wiped_or_changed_chains_come_back(node: Node, part: Part) -> None:
    assert isinstance(part, ipt.VpcPart)
    part.apply(TABLE_OF_NODE)
    tool = str(part._iptables)
    for damage in (
        f"{tool} -t nat -F {ipt.SNAT}",
        f"{tool} -t nat -D POSTROUTING 1",
        f"{tool} -t mangle -F",
    ):
        assert netns.run(node.node, damage.split()).returncode == 0
        (said,) = part.verify()
        assert ipt.SNAT in said
        assert part.verify() == []
    assert reach(node.pod, node.world, WORLD) == PRIMARY


@pytest.mark.parametrize("part", [nftables], indirect=True)
def test_a_wiped_or_changed_table_comes_back(node: Node, part: Part) -> None:
    part.apply(TABLE_OF_NODE)
    made = listed(node.node)
    assert part.verify() == []
    for damage in (
        f"delete table ip {TABLE}",
        f"flush chain ip {TABLE} postrouting",
        f"add element ip {TABLE} near {{ 203.0.113.0/24 }}",
    ):
        nft(node.node, damage)
        assert part.verify() == [f"made the rules of table {TABLE} again"]
        assert listed(node.node) == made
    assert reach(node.pod, node.world, WORLD) == PRIMARY


def test_applying_the_same_again_asks_the_kernel_for_nothing(
    node: Node, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    part.apply(TABLE_OF_NODE)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a call"))
    part.apply(replace(TABLE_OF_NODE))


def test_connections_outlive_a_change_and_the_end_of_the_agent(node: Node, part: Part) -> None:
    part.apply(TABLE_OF_NODE)
    with (
        listening(node.world, WORLD) as server,
        netns.socket(node.pod, socket.AF_INET, socket.SOCK_STREAM) as client,
    ):
        client.settimeout(3)
        client.connect((WORLD, PORT))
        connection, _ = server.accept()
        with connection:
            part.apply(
                replace(TABLE_OF_NODE, near=(*TABLE_OF_NODE.near, parse_prefix("10.9.0.0/16")))
            )
            flavour = () if isinstance(part, VpcPart) else (part._iptables.flavour,)
            with contextlib.closing(type(part)(node.node, *flavour)) as successor:
                successor.start()
                successor.apply(TABLE_OF_NODE)
            for _ in range(3):
                client.sendall(b"still here")
                assert connection.recv(16) == b"still here"


def test_cleanup_removes_only_ours(node: Node, part: Part) -> None:
    nft(node.node, "table ip foreign {\n}")
    part.apply(TABLE_OF_NODE)
    part.cleanup()
    tables = netns.run(node.node, ["nft", "list", "tables"]).stdout
    ours = [line for line in tables.splitlines() if "podwire" in line]
    assert not ours
    assert "table ip foreign" in tables.splitlines()
    for flavour in ("nft", "legacy"):
        for name in ("nat", "mangle"):
            save = ["iptables-" + flavour + "-save", "-t", name]
            assert "PODWIRE" not in netns.run(node.node, save).stdout
