"""Encoding and decoding of netlink, without a kernel."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from podwire.kernel import geneve, netlink, route, rule, sysctl
from podwire.kernel.link import End
from podwire.net import Prefix

payloads = st.binary(max_size=40)


@given(st.lists(st.tuples(st.integers(1, 0x3FFF), payloads), max_size=8))
def test_attributes_come_back_in_order(pairs: list[tuple[int, bytes]]) -> None:
    data = b"".join(netlink.attr(kind, payload) for kind, payload in pairs)
    assert len(data) % 4 == 0
    assert list(netlink.each_attribute(data)) == pairs
    assert netlink.attributes(data) == dict(pairs)


@given(st.integers(0, 255), st.integers(0, 65535), st.integers(0, 2**32 - 1))
def test_numbers_keep_their_width(a: int, b: int, c: int) -> None:
    data = netlink.u8(1, a) + netlink.u16(2, b) + netlink.u32(3, c) + netlink.u64(4, c << 32)
    found = netlink.attributes(data)
    assert [len(found[kind]) for kind in (1, 2, 3, 4)] == [1, 2, 4, 8]
    assert [netlink.number(found[kind]) for kind in (1, 2, 3, 4)] == [a, b, c, c << 32]


def test_nests_and_strings() -> None:
    data = netlink.nest(18, netlink.text(1, "veth"), netlink.nest(2, netlink.u8(1, 7)))
    assert struct.unpack_from("=HH", data) == (len(data), 0x8000 | 18)
    inner = netlink.attributes(netlink.attributes(data)[18])
    assert netlink.string(inner[1]) == "veth"
    assert netlink.attributes(inner[2]) == {1: b"\7"}


@given(st.binary(max_size=64))
def test_damaged_attributes_end_the_walk(data: bytes) -> None:
    walked = list(netlink.each_attribute(data))
    assert sum(len(payload) for _, payload in walked) <= len(data)
    assert netlink.attributes(data) == dict(walked)


def addresses(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size).filter(any)


def prefixes(size: int) -> st.SearchStrategy[Prefix]:
    def cut(address: bytes, length: int) -> Prefix:
        host = size * 8 - length
        return Prefix(
            (int.from_bytes(address, "big") >> host << host).to_bytes(size, "big"), length
        )

    return st.builds(cut, addresses(size), st.integers(1, size * 8))


@st.composite
def routes(draw: st.DrawFn) -> route.Route:
    size = draw(st.sampled_from([4, 16]))
    return route.Route(
        draw(prefixes(size)),
        link=draw(st.integers(0, 2**31 - 1)),
        gateway=draw(st.sampled_from([b"", b"\1" * 4, b"\1" * 16])),
        table=draw(st.integers(1, 2**32 - 1)),
        metric=draw(st.integers(0, 2**32 - 1)),
        scope=draw(st.sampled_from([0, 253, 254])),
        protocol=draw(st.integers(0, 255)),
        kind=draw(st.integers(1, 9)),
        source=draw(st.sampled_from([b"", b"\2" * size])),
        onlink=draw(st.booleans()),
        mtu=draw(st.integers(0, 65535)),
        advmss=draw(st.integers(0, 65535)),
    )


@given(routes())
def test_a_route_survives_the_wire(wanted: route.Route) -> None:
    assert route.parse(route.add(wanted).body) == wanted


@given(st.sampled_from([4, 16]), st.data())
def test_a_rule_survives_the_wire(size: int, data: st.DataObject) -> None:
    wanted = rule.Rule(
        data.draw(st.integers(0, 2**32 - 1)),
        data.draw(st.integers(1, 2**32 - 1)),
        data.draw(prefixes(size)),
        data.draw(prefixes(size)),
        mark=data.draw(st.integers(0, 2**32 - 1)),
        mask=data.draw(st.integers(1, 2**32 - 1)),
        input=data.draw(st.sampled_from(["", "eth0"])),
        protocol=data.draw(st.integers(0, 255)),
        invert=data.draw(st.booleans()),
    )
    assert rule.parse(rule.add(wanted).body) == wanted


def test_sysctl_names() -> None:
    assert sysctl.path("net.ipv4.ip_forward") == "/proc/sys/net/ipv4/ip_forward"
    name = f"net.ipv6.conf.{sysctl.interface('eth0.100')}.forwarding"
    assert sysctl.path(name) == "/proc/sys/net/ipv6/conf/eth0.100/forwarding"


def test_a_geneve_device_is_asked_for_as_ip_does() -> None:
    """`ip link add gnv0 mtu 1400 type geneve external dstport 6081`."""
    request = geneve.add_geneve(End("gnv0", mtu=1400), geneve.Geneve(6081))
    found = netlink.attributes(request.body, 16)
    assert netlink.string(found[3]) == "gnv0"
    kind = netlink.attributes(found[18])
    assert netlink.string(kind[1]) == "geneve"
    assert netlink.attributes(kind[2]) == {5: b"\x17\xc1", 6: b""}


def test_a_route_into_a_tunnel_is_asked_for_as_ip_does() -> None:
    """`ip route add … encap ip6 id 4096 dst fd07::2 src fd07::1 csum via … dev …`."""
    tunnel = route.Encapsulation(4096, b"\xfd" * 16, b"\xfc" * 16, checksum=True)
    prefix = Prefix(bytes([10, 1, 2, 0]), 24)
    wanted = route.via(prefix, bytes([10, 1, 2, 0]), 7, onlink=True, tunnel=tunnel)
    found = netlink.attributes(route.add(wanted).body, 12)
    assert netlink.number(found[21]) == 4
    assert netlink.attributes(found[22]) == {
        1: (4096).to_bytes(8, "big"),
        2: b"\xfd" * 16,
        3: b"\xfc" * 16,
        6: b"\0\1",
    }
    assert route.parse(route.add(wanted).body) == wanted
