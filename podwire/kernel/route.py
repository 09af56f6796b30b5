"""Routes. rtnetlink messages RTM_{NEW,DEL,GET}ROUTE.

A `Route` is a value that compares equal to what the kernel reports after `add`, so the difference
between what should be and what is, is a difference of sets. `direct` and `via` fill in what the
kernel would: scope link for IPv4 without a gateway, metric 1024 for IPv6.

Source: rtnetlink(7); include/uapi/linux/{rtnetlink,lwtunnel}.h; ip-route(8) for `encap ip`.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from podwire.errors import KernelError
from podwire.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NetlinkSocket,
    Request,
    attr,
    attributes,
    nest,
    number,
    u16,
    u32,
)
from podwire.net import Address, Prefix, address_family, format_address

RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
# rtmsg: family, destination and source length, TOS, table, protocol, scope, type, flags
_RTMSG = struct.Struct("=BBBBBBBBI")
_NEXTHOP = struct.Struct("=HBBi")  # rtnexthop: length, flags, hops, link index
_DST, _SRC, _IIF, _OIF, _GATEWAY, _PRIORITY, _PREFSRC = 1, 2, 3, 4, 5, 6, 7
_METRICS, _MULTIPATH, _TABLE, _MARK, _VIA = 8, 9, 15, 16, 18
_ENCAP_TYPE, _ENCAP = 21, 22
_METRIC_MTU, _METRIC_ADVMSS = 2, 8
_ONLINK = 4
# Lightweight tunnels: the attributes of `encap ip` and `encap ip6` have the same numbers.
_ENCAP_KINDS = {4: 2, 16: 4}  # LWTUNNEL_ENCAP_IP, LWTUNNEL_ENCAP_IP6, by the underlay's family
_TUNNEL_ID, _TUNNEL_DST, _TUNNEL_SRC, _TUNNEL_FLAGS = 1, 2, 3, 6
_TUNNEL_CHECKSUM = 1  # TUNNEL_CSUM, in network order
_BE16, _BE64 = struct.Struct(">H"), struct.Struct(">Q")

TABLE_MAIN, TABLE_LOCAL = 254, 255
SCOPE_UNIVERSE, SCOPE_LINK = 0, 253
PROTOCOL_BOOT, PROTOCOL_STATIC = 3, 4

UNICAST, BLACKHOLE = 1, 6

_UNSPECIFIED = {socket.AF_INET: bytes(4), socket.AF_INET6: bytes(16)}


class NextHop(NamedTuple):
    """One way of a multipath route. `weight` counts from 1."""

    gateway: Address
    link: int
    weight: int


class Encapsulation(NamedTuple):
    """The tunnel key of a route on a collect-metadata device: packets travel to `remote` as `id`.

    `local` b"": the underlay's routes choose the source. `checksum`: the outer UDP header has one,
    which receivers of IPv6 demand.
    """

    id: int
    remote: Address
    local: Address = b""
    checksum: bool = False


class Route(NamedTuple):
    """`link` is the index of the outgoing link; `metric`, `mtu`, `advmss` 0 mean unset.

    `gateway` may be of the other family than `prefix`. A multipath route has `nexthops` and
    neither link nor gateway of its own.
    """

    prefix: Prefix
    link: int = 0
    gateway: Address = b""
    table: int = TABLE_MAIN
    metric: int = 0
    scope: int = SCOPE_UNIVERSE
    protocol: int = PROTOCOL_BOOT
    kind: int = UNICAST
    source: Address = b""
    onlink: bool = False
    mtu: int = 0
    advmss: int = 0
    nexthops: tuple[NextHop, ...] = ()
    tunnel: Encapsulation | None = None

    def __str__(self) -> str:
        text = f"{self.prefix} table {self.table}"
        if self.gateway:
            text += f" via {format_address(self.gateway)}"
        if self.tunnel:
            text += f" through a tunnel to {format_address(self.tunnel.remote)}"
        return f"{text} on link {self.link}" if self.link else text


def direct(
    prefix: Prefix,
    link: int,
    *,
    table: int = TABLE_MAIN,
    metric: int = 0,
    protocol: int = PROTOCOL_BOOT,
    source: Address = b"",
    mtu: int = 0,
) -> Route:
    """A route to what is on the link itself."""
    ipv4 = prefix.bits == 32
    return Route(
        prefix,
        link,
        table=table,
        metric=metric or (0 if ipv4 else 1024),
        scope=SCOPE_LINK if ipv4 else SCOPE_UNIVERSE,
        protocol=protocol,
        source=source,
        mtu=mtu,
    )


def via(
    prefix: Prefix,
    gateway: Address,
    link: int,
    *,
    onlink: bool = False,
    table: int = TABLE_MAIN,
    metric: int = 0,
    protocol: int = PROTOCOL_BOOT,
    source: Address = b"",
    mtu: int = 0,
    advmss: int = 0,
    tunnel: Encapsulation | None = None,
) -> Route:
    """A route through a gateway; `onlink`: the gateway is on the link although no route says so."""
    return Route(
        prefix,
        link,
        gateway,
        table=table,
        metric=metric or (0 if prefix.bits == 32 else 1024),
        protocol=protocol,
        source=source,
        onlink=onlink,
        mtu=mtu,
        advmss=advmss,
        tunnel=tunnel,
    )


def add(route: Route, *, replace: bool = False) -> Request:
    """Add; an equal destination, table and metric is EEXIST unless it may be replaced."""
    flags = NLM_F_CREATE | (NLM_F_REPLACE if replace else NLM_F_EXCL)
    return Request(RTM_NEWROUTE, flags, _encode(route), f"add the route {route}")


def delete(route: Route) -> Request:
    """Delete; ESRCH when there is none."""
    return Request(RTM_DELROUTE, 0, _encode(route), f"delete the route {route}")


def dump(
    sock: NetlinkSocket, *, family: int = 0, table: int = 0, protocol: int = 0, link: int = 0
) -> list[Route]:
    """Routes of every table, filtered in the kernel by whatever is given."""
    families = (family,) if family else (socket.AF_INET, socket.AF_INET6)
    found: list[Route] = []
    for each in families:
        body = _RTMSG.pack(each, 0, 0, 0, 0, protocol, 0, 0, 0)
        if table:
            body += u32(_TABLE, table)
        if link:
            body += u32(_OIF, link)
        try:
            bodies = sock.dump(RTM_GETROUTE, body, "routes")
        except KernelError as error:
            if table and error.errno == errno.ENOENT:  # a table that nobody has used yet
                continue
            raise
        found += [parse(reply) for reply in bodies]
    return found


def await_local(sock: NetlinkSocket, addresses: Iterable[Address], timeout_s: float = 1.0) -> bool:
    """Wait until packets to these IPv6 addresses of the namespace's own come in; whether they do.

    The kernel puts the route of an address into the local table from a work queue, also without
    duplicate detection: on a busy machine some milliseconds after it has answered to the request.
    Source: net/ipv6/addrconf.c, addrconf_dad_work.
    """
    missing = {each for each in addresses if len(each) == 16}
    deadline, pause = time.monotonic() + timeout_s, 0.0002
    while missing:
        local = dump(sock, family=socket.AF_INET6, table=TABLE_LOCAL)
        missing -= {each.prefix.address for each in local}
        if missing and time.monotonic() > deadline:
            return False
        if missing:
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
    return True


def resolve(
    destination: Address, *, source: Address = b"", mark: int = 0, input_link: int = 0
) -> Request:
    """Ask which route a packet would take; the answer is for `parse` (ENETUNREACH: none)."""
    family = address_family(destination)
    bits = len(destination) * 8
    body = _RTMSG.pack(family, bits, bits if source else 0, 0, 0, 0, 0, 0, 0)
    body += attr(_DST, destination)
    if source:
        body += attr(_SRC, source)
    if input_link:
        body += u32(_IIF, input_link)
    if mark:
        body += u32(_MARK, mark)
    return Request(RTM_GETROUTE, 0, body, f"find the route to {format_address(destination)}")


def parse(body: bytes) -> Route:
    """A route from the body of RTM_NEWROUTE."""
    family, length, _, _, table, protocol, scope, kind, flags = _RTMSG.unpack_from(body)
    found = attributes(body, 12)
    get = found.get
    mtu = advmss = 0
    nexthops: tuple[NextHop, ...] = ()
    if _METRICS in found:
        metrics = attributes(found[_METRICS])
        mtu = number(metrics.get(_METRIC_MTU, b""))
        advmss = number(metrics.get(_METRIC_ADVMSS, b""))
    if _MULTIPATH in found:
        nexthops = tuple(_parse_nexthops(found[_MULTIPATH]))
    return Route(
        Prefix(get(_DST) or _UNSPECIFIED[family], length),
        number(get(_OIF, b"")),
        get(_GATEWAY) or get(_VIA, b"")[2:],
        number(found[_TABLE]) if _TABLE in found else table,
        number(get(_PRIORITY, b"")),
        scope,
        protocol,
        kind,
        get(_PREFSRC, b""),
        bool(flags & _ONLINK),
        mtu,
        advmss,
        nexthops,
        _parse_tunnel(found),
    )


def _parse_tunnel(found: Mapping[int, bytes]) -> Encapsulation | None:
    if number(found.get(_ENCAP_TYPE, b"")) not in _ENCAP_KINDS.values():
        return None
    get = attributes(found[_ENCAP]).get
    local = get(_TUNNEL_SRC, b"")
    flags = int.from_bytes(get(_TUNNEL_FLAGS, b""), "big")
    return Encapsulation(
        int.from_bytes(get(_TUNNEL_ID, b""), "big"),
        get(_TUNNEL_DST, b""),
        local if any(local) else b"",
        bool(flags & _TUNNEL_CHECKSUM),
    )


def _encode_tunnel(tunnel: Encapsulation) -> bytes:
    parts = [attr(_TUNNEL_ID, _BE64.pack(tunnel.id)), attr(_TUNNEL_DST, tunnel.remote)]
    if tunnel.local:
        parts.append(attr(_TUNNEL_SRC, tunnel.local))
    if tunnel.checksum:
        parts.append(attr(_TUNNEL_FLAGS, _BE16.pack(_TUNNEL_CHECKSUM)))
    kind = u16(_ENCAP_TYPE, _ENCAP_KINDS[len(tunnel.remote)])
    return kind + nest(_ENCAP, *parts)


def _parse_nexthops(data: bytes) -> list[NextHop]:
    nexthops: list[NextHop] = []
    offset = 0
    while offset + 8 <= len(data):
        length, _, hops, link = _NEXTHOP.unpack_from(data, offset)
        found = attributes(data[offset + 8 : offset + length])
        gateway = found.get(_GATEWAY) or found.get(_VIA, b"")[2:]
        nexthops.append(NextHop(gateway, link, hops + 1))
        offset += max(8, (length + 3) & ~3)
    return nexthops


def _encode_nexthop(nexthop: NextHop) -> bytes:
    gateway = attr(_GATEWAY, nexthop.gateway)
    size = _NEXTHOP.size + len(gateway)
    return _NEXTHOP.pack(size, 0, nexthop.weight - 1, nexthop.link) + gateway


def _encode(route: Route) -> bytes:
    prefix = route.prefix
    family = address_family(prefix.address)
    flags = _ONLINK if route.onlink else 0
    table = route.table if route.table < 256 else 0
    parts = [
        _RTMSG.pack(
            family, prefix.length, 0, 0, table, route.protocol, route.scope, route.kind, flags
        )
    ]
    if table == 0:
        parts.append(u32(_TABLE, route.table))
    if prefix.length:
        parts.append(attr(_DST, prefix.address))
    if route.gateway:
        if len(route.gateway) == len(prefix.address):
            parts.append(attr(_GATEWAY, route.gateway))
        else:
            family = struct.pack("=H", address_family(route.gateway))
            parts.append(attr(_VIA, family + route.gateway))
    if route.nexthops:
        parts.append(attr(_MULTIPATH, b"".join(map(_encode_nexthop, route.nexthops))))
    if route.link:
        parts.append(u32(_OIF, route.link))
    if route.metric:
        parts.append(u32(_PRIORITY, route.metric))
    if route.source:
        parts.append(attr(_PREFSRC, route.source))
    if route.tunnel:
        parts.append(_encode_tunnel(route.tunnel))
    if route.mtu or route.advmss:
        pairs = ((_METRIC_MTU, route.mtu), (_METRIC_ADVMSS, route.advmss))
        parts.append(nest(_METRICS, *(u32(kind, value) for kind, value in pairs if value)))
    return b"".join(parts)
