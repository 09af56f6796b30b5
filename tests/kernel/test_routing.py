"""Addresses, routes, rules and neighbours: what is added reads back equal, also to the oracle."""

from __future__ import annotations

import errno
import os
import socket
from functools import partial

import pytest
from pyroute2 import NetNS

from podwire.errors import KernelError
from podwire.kernel import address, link, neighbour, netns, route, rule, vxlan
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.link import End
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import format_address, parse_address, parse_prefix
from tests.conftest import present

MAC = bytes.fromhex("0a5800000001")
P, A = parse_prefix, parse_address
OURS = 0xAB
IFA_F_TENTATIVE = 0x40


@pytest.fixture
def eth0(sock: NetlinkSocket) -> int:
    """The index of a link that is up, with 10.1.0.1/16 and fd01::1/64."""
    sock.run(link.add_veth(End("eth0"), End("peer"), up=True), link.change("peer", up=True))
    found = present(sock, "eth0")
    sock.run(
        address.add(InterfaceAddress(found.index, A("10.1.0.1"), 16)),
        address.add(InterfaceAddress(found.index, A("fd01::1"), 64)),
    )
    return found.index


def test_addresses(sock: NetlinkSocket, netns_fd: int, eth0: int) -> None:
    single = InterfaceAddress(eth0, A("10.1.0.9"), 32, address.SCOPE_LINK)
    sock.run(address.add(single), address.add(single))
    found = {entry.address: entry for entry in address.dump(sock, link=eth0)}
    assert found[A("10.1.0.9")].scope == address.SCOPE_LINK
    assert found[A("fd01::1")].flags & address.F_NODAD
    assert not found[A("fd01::1")].flags & IFA_F_TENTATIVE
    with NetNS(f"/proc/{os.getpid()}/fd/{netns_fd}", flags=0) as ip:
        brd = {
            a.get_attr("IFA_LOCAL"): a.get_attr("IFA_BROADCAST") for a in ip.get_addr(index=eth0)
        }
    assert brd["10.1.0.1"] == "10.1.255.255"
    assert brd["10.1.0.9"] is None
    sock.run(address.delete(single))
    families = [len(entry.address) for entry in address.dump(sock, family=socket.AF_INET)]
    assert families == [4, 4]  # lo and eth0


def test_routes_read_back_equal(sock: NetlinkSocket, netns_fd: int, eth0: int) -> None:
    wanted = {
        route.direct(P("10.2.0.0/16"), eth0, protocol=OURS),
        route.direct(P("fd02::/64"), eth0, protocol=OURS, mtu=1400),
        route.via(P("10.3.0.0/24"), A("10.1.0.7"), eth0, protocol=OURS, metric=7, advmss=1300),
        route.via(P("10.4.0.0/24"), A("192.0.2.1"), eth0, onlink=True, protocol=OURS),
        route.via(P("10.5.0.0/24"), A("fd01::9"), eth0, protocol=OURS, source=A("10.1.0.1")),
        route.via(P("0.0.0.0/0"), A("10.1.0.7"), eth0, protocol=OURS, table=10100),
        route.via(P("::/0"), A("fd01::9"), eth0, protocol=OURS, table=77),
        route.Route(P("10.9.0.0/16"), protocol=OURS, kind=route.BLACKHOLE),
    }
    sock.run(*map(route.add, wanted))
    assert set(route.dump(sock, protocol=OURS)) == wanted
    assert [str(r.prefix) for r in route.dump(sock, table=10100)] == ["0.0.0.0/0"]
    assert route.dump(sock, table=10101, family=socket.AF_INET) == []
    with NetNS(f"/proc/{os.getpid()}/fd/{netns_fd}", flags=0) as ip:
        (seen,) = [
            r
            for r in ip.route("dump", family=socket.AF_INET)
            if r.get_attr("RTA_DST") == "10.3.0.0"
        ]
    assert seen.get_attr("RTA_GATEWAY") == "10.1.0.7"
    assert seen.get_attr("RTA_PRIORITY") == 7
    assert seen.get_attr("RTA_METRICS").get_attr("RTAX_ADVMSS") == 1300

    with pytest.raises(KernelError) as caught:
        sock.run(route.add(next(iter(wanted))))
    assert caught.value.errno == errno.EEXIST
    changed = route.via(P("10.3.0.0/24"), A("10.1.0.8"), eth0, protocol=OURS, metric=7)
    sock.run(route.add(changed, replace=True))
    assert [r.gateway for r in route.dump(sock, protocol=OURS) if r.metric == 7] == [A("10.1.0.8")]
    sock.run(*map(route.delete, route.dump(sock, protocol=OURS)))
    assert route.dump(sock, protocol=OURS) == []
    assert route.dump(sock, table=route.TABLE_MAIN)  # the kernel's own are still there


def test_ipv6_addresses_take_packets_once_they_are_awaited(
    sock: NetlinkSocket, netns_fd: int
) -> None:
    for number in range(1, 200):
        own = A(f"fd00::{number:x}")
        sock.run(address.add(InterfaceAddress(1, own, 128)))
        assert route.await_local(sock, [own, A("10.0.0.1")])
        with netns.socket(netns_fd, socket.AF_INET6, socket.SOCK_DGRAM) as client:
            client.connect((format_address(own), 9))
            assert A(client.getsockname()[0]) == own  # it would go by lo
    assert not route.await_local(sock, [A("fd00:1::")], 0.01)


def test_resolve_and_multipath(sock: NetlinkSocket, netns_fd: int, eth0: int) -> None:
    with NetNS(f"/proc/{os.getpid()}/fd/{netns_fd}", flags=0) as ip:
        hops = [{"gateway": "10.1.0.7"}, {"gateway": "10.1.0.8", "hops": 2}]
        ip.route("add", dst="10.6.0.0/16", multipath=hops)
    (found,) = [r for r in route.dump(sock, family=socket.AF_INET) if r.nexthops]
    assert found.nexthops == (
        route.NextHop(A("10.1.0.7"), eth0, 1),
        route.NextHop(A("10.1.0.8"), eth0, 3),
    )
    (reply,) = sock.run(route.resolve(A("10.1.5.5")))
    assert (route.parse(reply).link, route.parse(reply).source) == (eth0, A("10.1.0.1"))
    with pytest.raises(KernelError, match=r"find the route to 192\.0\.2\.9") as caught:
        sock.run(route.resolve(A("192.0.2.9")))
    assert caught.value.errno == errno.ENETUNREACH


def test_routes_into_tunnels(sock: NetlinkSocket) -> None:
    metadata = vxlan.Vxlan(0, 8472, collect_metadata=True)
    sock.run(vxlan.add_vxlan(End("vx0"), metadata, up=True))
    to = partial(route.via, link=present(sock, "vx0").index, onlink=True, protocol=80)
    v4 = route.Encapsulation(4096, A("192.0.2.2"))
    v6 = route.Encapsulation(0xABCDEF, A("2001:db8::2"), A("2001:db8::1"), checksum=True)
    wanted = {
        to(P("10.7.1.0/24"), A("10.7.1.0"), tunnel=v4),
        to(P("10.7.2.0/24"), A("10.7.2.0"), tunnel=v6),
        to(P("fd07:1::/64"), A("fd07:1::"), tunnel=v4),
        to(P("fd07:2::/64"), A("fd07:2::"), tunnel=v6),
    }
    sock.run(*map(route.add, wanted))
    assert set(route.dump(sock, protocol=80)) == wanted
    moved = {each._replace(tunnel=v4._replace(remote=A("192.0.2.3"))) for each in wanted}
    sock.run(*(route.add(each, replace=True) for each in moved))
    assert set(route.dump(sock, protocol=80)) == moved
    sock.run(*map(route.delete, moved))
    assert route.dump(sock, protocol=80) == []


def test_rules(sock: NetlinkSocket) -> None:
    wanted = [
        rule.to_prefix(P("10.1.0.9/32"), 512, route.TABLE_MAIN, OURS),
        rule.Rule(1024, route.TABLE_MAIN, mark=0x80, mask=0x80, protocol=OURS),
        rule.from_prefix(P("10.1.0.9/32"), 1536, 10100, OURS),
        rule.Rule(10, 3, input="eth0", protocol=OURS),
        rule.from_prefix(P("fd01::9/128"), 1536, 3, OURS),
    ]
    sock.run(*map(rule.add, wanted))
    assert {entry for entry in rule.dump(sock) if entry.protocol == OURS} == set(wanted)
    with pytest.raises(KernelError, match=r"rule 512: from 0\.0\.0\.0/0 to 10\.1\.0\.9/32"):
        sock.run(rule.add(wanted[0]))
    sock.run(*map(rule.delete, wanted))
    assert [entry.priority for entry in rule.dump(sock, socket.AF_INET)] == [0, 32766, 32767]


def test_neighbours_and_forwards(sock: NetlinkSocket, eth0: int) -> None:
    entries = {
        neighbour.Neighbour(eth0, A("10.1.0.9"), MAC, protocol=OURS),
        neighbour.Neighbour(eth0, A("fe80::1"), MAC, protocol=OURS),
    }
    sock.run(*map(neighbour.add, entries), *map(neighbour.add, entries))
    known = neighbour.dump(sock, link=eth0)
    assert {entry for entry in known if entry.state == neighbour.NUD_PERMANENT} == entries
    sock.run(*map(neighbour.delete, entries))
    assert not [n for n in neighbour.dump(sock) if n.state == neighbour.NUD_PERMANENT]

    sock.run(
        vxlan.add_vxlan(End("vx0"), vxlan.Vxlan(5, 8472, local=A("10.1.0.1")), up=True),
        link.add_bridge(End("br0")),
    )
    vx0, br0, peer = (present(sock, name) for name in ("vx0", "br0", "peer"))
    sock.run(link.change("peer", master=br0.index))
    remote = neighbour.Forward(vx0.index, MAC, A("10.1.0.2"))
    local = neighbour.Forward(peer.index, MAC, on_bridge=True)
    sock.run(neighbour.add_forward(remote), neighbour.add_forward(local))
    assert remote in neighbour.dump_forwards(sock, link=vx0.index)
    assert local in neighbour.dump_forwards(sock)
    moved = remote._replace(remote=A("10.1.0.3"))
    sock.run(neighbour.add_forward(moved))
    assert [f for f in neighbour.dump_forwards(sock, link=vx0.index) if f.mac == MAC] == [moved]
    sock.run(neighbour.delete_forward(moved), neighbour.delete_forward(local))
    assert MAC not in {entry.mac for entry in neighbour.dump_forwards(sock) if entry.state == 0x80}


def test_a_large_batch_and_dump(sock: NetlinkSocket, eth0: int) -> None:
    routes = {
        route.direct(P(f"10.{i >> 8}.{i & 255}.0/24"), eth0, table=500) for i in range(512, 3512)
    }
    sock.run(*map(route.add, routes))
    assert set(route.dump(sock, table=500)) == routes
    again = [route.add(r).tolerating(errno.EEXIST) for r in routes]
    assert sock.attempt(again) == ([], [])
    _, failures = sock.attempt([route.add(r) for r in routes])
    assert len(failures) == 3000
