"""One connection table entry: what the kernel's attributes say, and how to say it back."""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

from podwire.kernel import netlink
from podwire.net import Address, Protocol, address_family

SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK

NFGENMSG = struct.Struct(">BBH")  # family, version, resource id
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
_UNTRACKED_SO_FAR = b"\x0a"
"""IP_CT_TCP_FLAG_SACK_PERM and _BE_LIBERAL, as the kernel sets them on what it picks up in its
middle: nothing is known of the windows, and no packet is invalid for being outside of one."""
_REOPENS = b"\x0e"
"""And _CLOSE_INIT, the end that sent the first FIN: without, a SYN begins no other connection."""


class Message(IntEnum):
    """IPCTNL_MSG_CT_…, with the subsystem."""

    NEW = SUBSYSTEM | 0
    GET = SUBSYSTEM | 1
    DELETE = SUBSYSTEM | 2
    GET_STATS_CPU = SUBSYSTEM | 4
    GET_STATS = SUBSYSTEM | 5


class Attribute(IntEnum):
    """CTA_…"""

    TUPLE_ORIG = 1
    TUPLE_REPLY = 2
    STATUS = 3
    PROTOINFO = 4
    HELP = 5
    NAT_SRC = 6
    TIMEOUT = 7
    MARK = 8
    COUNTERS_ORIG = 9
    COUNTERS_REPLY = 10
    USE = 11
    ID = 12
    NAT_DST = 13
    TUPLE_MASTER = 14
    ZONE = 18
    TIMESTAMP = 20
    MARK_MASK = 21
    LABELS = 22
    FILTER = 25
    STATUS_MASK = 26


class Status(IntFlag):
    """IPS_… (the bits that tell a reader something)."""

    EXPECTED = 1 << 0
    SEEN_REPLY = 1 << 1
    ASSURED = 1 << 2
    CONFIRMED = 1 << 3
    SRC_NAT = 1 << 4
    DST_NAT = 1 << 5
    SRC_NAT_DONE = 1 << 7
    DST_NAT_DONE = 1 << 8
    DYING = 1 << 9
    FIXED_TIMEOUT = 1 << 10
    OFFLOAD = 1 << 14
    HW_OFFLOAD = 1 << 15


class TcpState(IntEnum):
    """TCP_CONNTRACK_…, as `conntrack -L` prints them."""

    NONE = 0
    SYN_SENT = 1
    SYN_RECV = 2
    ESTABLISHED = 3
    FIN_WAIT = 4
    CLOSE_WAIT = 5
    LAST_ACK = 6
    TIME_WAIT = 7
    CLOSE = 8
    SYN_SENT2 = 9


class SctpState(IntEnum):
    """SCTP_CONNTRACK_…"""

    NONE = 0
    CLOSED = 1
    COOKIE_WAIT = 2
    COOKIE_ECHOED = 3
    ESTABLISHED = 4
    SHUTDOWN_SENT = 5
    SHUTDOWN_RECD = 6
    SHUTDOWN_ACK_SENT = 7
    HEARTBEAT_SENT = 8
    HEARTBEAT_ACKED = 9


class Tuple(NamedTuple):
    """One direction. ICMP has no ports: `source_port` is the echo's id, `destination_port` is
    type << 8 | code. `zone` is set only where the zone holds for this direction alone.
    """

    source: Address
    destination: Address
    protocol: int
    source_port: int = 0
    destination_port: int = 0
    zone: int | None = None

    @property
    def family(self) -> int:
        return address_family(self.source)

    def reversed(self) -> Tuple:
        """The reply of an entry without NAT. Only for protocols with ports."""
        return Tuple(
            self.destination, self.source, self.protocol, self.destination_port, self.source_port
        )


class Counters(NamedTuple):
    """One direction's accounting."""

    packets: int
    bytes: int


class Entry(NamedTuple):
    """All that the kernel tells of an entry; None where it tells nothing (accounting and
    timestamps are off by default, events of destroyed entries have no timeout).
    """

    original: Tuple
    reply: Tuple
    status: Status = Status(0)
    timeout_s: int | None = None
    mark: int = 0
    zone: int = 0
    id: int | None = None
    use: int = 0
    state: int | None = None
    """A TcpState or SctpState."""
    counters_original: Counters | None = None
    counters_reply: Counters | None = None
    start_ns: int | None = None
    """Wall clock, nanoseconds since the epoch."""
    stop_ns: int | None = None
    labels: int = 0
    helper: str = ""
    master: Tuple | None = None

    @property
    def state_name(self) -> str:
        return state_name(self.original.protocol, self.state)


def state_name(protocol: int, state: int | None) -> str:
    """``ESTABLISHED``, …; empty for protocols without states."""
    if state is None:
        return ""
    states = {Protocol.TCP: TcpState, Protocol.SCTP: SctpState}.get(Protocol(protocol))
    try:
        return states(state).name if states else ""
    except ValueError:
        return str(state)


# --- parse ----------------------------------------------------------------------------------------


def parse(body: bytes) -> Entry | None:
    """An entry from a message's body (nfgenmsg first); None where no tuples are in it."""
    found = netlink.attributes(body, NFGENMSG.size)
    original, reply = found.get(Attribute.TUPLE_ORIG), found.get(Attribute.TUPLE_REPLY)
    if original is None or reply is None:
        return None
    master = found.get(Attribute.TUPLE_MASTER)
    stamps = netlink.attributes(found.get(Attribute.TIMESTAMP, b""))
    helper = netlink.attributes(found.get(Attribute.HELP, b""))
    tuple_ = _parse_tuple(original)
    return Entry(
        original=tuple_,
        reply=_parse_tuple(reply),
        status=Status(_u32(found.get(Attribute.STATUS)) or 0),
        timeout_s=_u32(found.get(Attribute.TIMEOUT)),
        mark=_u32(found.get(Attribute.MARK)) or 0,
        zone=_U16.unpack(found[Attribute.ZONE])[0] if Attribute.ZONE in found else 0,
        id=_u32(found.get(Attribute.ID)),
        use=_u32(found.get(Attribute.USE)) or 0,
        state=_parse_state(found.get(Attribute.PROTOINFO)),
        counters_original=_parse_counters(found.get(Attribute.COUNTERS_ORIG)),
        counters_reply=_parse_counters(found.get(Attribute.COUNTERS_REPLY)),
        start_ns=_u64(stamps.get(1)),
        stop_ns=_u64(stamps.get(2)),
        labels=int.from_bytes(found.get(Attribute.LABELS, b""), "little"),
        helper=netlink.string(helper.get(1, b"")),
        master=_parse_tuple(master) if master else None,
    )


def _u32(payload: bytes | None) -> int | None:
    return None if payload is None else _U32.unpack(payload)[0]


def _u64(payload: bytes | None) -> int | None:
    return None if payload is None else _U64.unpack(payload)[0]


def _parse_tuple(payload: bytes) -> Tuple:
    parts = netlink.attributes(payload)
    ip = netlink.attributes(parts.get(1, b""))
    proto = netlink.attributes(parts.get(2, b""))
    number = proto.get(1, b"\0")[0]
    if 2 in proto or 3 in proto:
        source_port, destination_port = _port(proto.get(2)), _port(proto.get(3))
    else:
        base = 7 if 7 in proto else 4  # ICMPv6 or ICMP: id, type, code
        kind, code = proto.get(base + 1, b"\0")[0], proto.get(base + 2, b"\0")[0]
        source_port, destination_port = _port(proto.get(base)), kind << 8 | code
    return Tuple(
        ip.get(1) or ip.get(3) or b"",
        ip.get(2) or ip.get(4) or b"",
        number,
        source_port,
        destination_port,
        _port(parts[3]) if 3 in parts else None,
    )


def _port(payload: bytes | None) -> int:
    return _U16.unpack(payload)[0] if payload else 0


def _parse_state(protoinfo: bytes | None) -> int | None:
    """TCP's or SCTP's state: attribute 1 of either nest."""
    if protoinfo is None:
        return None
    for nest in netlink.attributes(protoinfo).values():
        state = netlink.attributes(nest).get(1)
        if state:
            return state[0]
    return None


def _parse_counters(payload: bytes | None) -> Counters | None:
    if payload is None:
        return None
    found = netlink.attributes(payload)
    return Counters(_u64(found.get(1)) or 0, _u64(found.get(2)) or 0)


# --- spell ----------------------------------------------------------------------------------------


def address_attributes(source: Address, destination: Address) -> bytes:
    """CTA_TUPLE_IP; an empty address is left out."""
    base = 1 if len(source or destination) == 4 else 3
    present = [(base, source), (base + 1, destination)]
    return netlink.nest(1, *(netlink.attr(kind, value) for kind, value in present if value))


def _tuple_attribute(kind: Attribute, direction: Tuple) -> bytes:
    """CTA_TUPLE_… for an exact tuple."""
    number = direction.protocol
    source_port = _U16.pack(direction.source_port)
    if number in (Protocol.ICMP, Protocol.ICMPV6):
        base = 4 if number == Protocol.ICMP else 7
        ports = (
            netlink.attr(base, source_port)
            + netlink.u8(base + 1, direction.destination_port >> 8)
            + netlink.u8(base + 2, direction.destination_port & 0xFF)
        )
    else:
        ports = netlink.attr(2, source_port)
        ports += netlink.attr(3, _U16.pack(direction.destination_port))
    zone = b"" if direction.zone is None else netlink.attr(3, _U16.pack(direction.zone))
    return netlink.nest(
        kind,
        address_attributes(direction.source, direction.destination),
        netlink.nest(2, netlink.u8(1, number), ports),
        zone,
    )


def big32(kind: int, value: int) -> bytes:
    return netlink.attr(kind, _U32.pack(value))


def big16(kind: int, value: int) -> bytes:
    return netlink.attr(kind, _U16.pack(value))


def delete_request(entry: Entry) -> netlink.Request:
    """Delete exactly this entry. With its id, a successor with the same tuple is left alone; with
    its zone, an entry of another zone is never meant (without it, ENOENT hides failures).
    """
    body = NFGENMSG.pack(entry.original.family, 0, 0)
    body += _tuple_attribute(Attribute.TUPLE_ORIG, entry.original)
    if entry.zone:
        body += big16(Attribute.ZONE, entry.zone)
    if entry.id is not None:
        body += big32(Attribute.ID, entry.id)
    return netlink.Request(Message.DELETE, 0, body, "delete a connection table entry")


def create_request(entry: Entry) -> netlink.Request:
    """Make this entry: tuples, status, timeout, mark, zone, labels, TCP state. Where the reply is
    not the original reversed, NAT is set up, which needs no rule. Only protocols with ports.
    """
    original, reply = entry.original, entry.reply
    plain = original.reversed()
    body = NFGENMSG.pack(original.family, 0, 0)
    body += _tuple_attribute(Attribute.TUPLE_ORIG, original)
    body += _tuple_attribute(Attribute.TUPLE_REPLY, plain)
    if (reply.source, reply.source_port) != (plain.source, plain.source_port):
        body += _nat(Attribute.NAT_DST, reply.source, reply.source_port)
    if (reply.destination, reply.destination_port) != (plain.destination, plain.destination_port):
        body += _nat(Attribute.NAT_SRC, reply.destination, reply.destination_port)
    body += big32(Attribute.STATUS, entry.status) if entry.status else b""
    body += big32(Attribute.TIMEOUT, 60 if entry.timeout_s is None else entry.timeout_s)
    body += big32(Attribute.MARK, entry.mark) if entry.mark else b""
    body += big16(Attribute.ZONE, entry.zone) if entry.zone else b""
    if entry.labels:
        body += netlink.attr(Attribute.LABELS, entry.labels.to_bytes(16, "little"))
    if original.protocol == Protocol.TCP:
        state = netlink.u8(1, entry.state or TcpState.NONE)
        known = _REOPENS if entry.state == TcpState.TIME_WAIT else _UNTRACKED_SO_FAR
        flags = b"".join(netlink.attr(kind, known * 2) for kind in (4, 5))
        body += netlink.nest(Attribute.PROTOINFO, netlink.nest(1, state, flags))
    flags = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
    return netlink.Request(Message.NEW, flags, body, "make a connection table entry")


def _nat(kind: Attribute, address: Address, port: int) -> bytes:
    """CTA_NAT_…: exactly this address and port."""
    least, most = (1, 2) if len(address) == 4 else (4, 5)
    return netlink.nest(
        kind,
        netlink.attr(least, address) + netlink.attr(most, address),
        netlink.nest(3, big16(1, port) + big16(2, port)),
    )
