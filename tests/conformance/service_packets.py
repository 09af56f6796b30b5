"""Packets as bytes: the first of a connection, answers, errors; and what is read off the wire.

Every packet carries a marker of eight bytes that no translation touches, so that it is known again
wherever it turns up, also quoted inside an ICMP error: in TCP the timestamp option, in SCTP the
initiate tag and window, else the payload.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import cache

from podwire.net import Protocol, format_address, parse_address

ETHERTYPES = {4: 0x0800, 16: 0x86DD}
SYN, RST, PSH, ACK = 0x02, 0x04, 0x08, 0x10
_MARKER = re.compile(rb"PW(\d{6})")


def marker(number: int) -> bytes:
    return b"PW%06d" % number


def find_marker(packet: bytes) -> int | None:
    found = _MARKER.search(packet)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Wire:
    """An IP packet taken apart. Ports are 0 where there are none."""

    source: str
    destination: str
    protocol: int
    source_port: int
    destination_port: int
    payload: bytes
    """The transport header and what follows."""

    @property
    def is_error(self) -> bool:
        """An ICMP error, or a TCP reset."""
        if self.protocol == Protocol.ICMP:
            return self.payload[0] in (3, 11, 12)
        if self.protocol == Protocol.ICMPV6:
            return self.payload[0] < 128
        return self.protocol == Protocol.TCP and bool(self.payload[13] & RST)

    @property
    def answered(self) -> tuple[str, int, str, int]:
        """Source and destination of the packet that this one answers."""
        return (self.destination, self.destination_port, self.source, self.source_port)

    @property
    def quoted(self) -> Wire:
        """The packet inside an ICMP error."""
        return parse(self.payload[8:])


def parse(packet: bytes) -> Wire:
    """An IP packet, possibly cut short."""
    if packet[0] >> 4 == 4:
        protocol, start, size, at = packet[9], (packet[0] & 15) * 4, 4, 12
    else:
        protocol, start, size, at = packet[6], 40, 16, 8
    payload = packet[start:]
    ports = (0, 0)
    if protocol in (Protocol.TCP, Protocol.UDP, Protocol.SCTP):
        ports = struct.unpack_from(">HH", payload)
    addresses = packet[at : at + size], packet[at + size : at + 2 * size]
    return Wire(
        format_address(addresses[0]), format_address(addresses[1]), protocol, *ports, payload
    )


def first(
    source: str, destination: str, protocol: Protocol, ports: tuple[int, int], number: int
) -> bytes:
    """The first packet of a connection: SYN, datagram, INIT or echo request."""
    tag = marker(number)
    if protocol == Protocol.TCP:
        return tcp(source, destination, ports, SYN, number, 0, tag)
    if protocol == Protocol.UDP:
        body = struct.pack(">HHHH", *ports, 16, 0) + tag
    elif protocol == Protocol.SCTP:
        init = struct.pack(">BBH", 1, 0, 20) + tag + struct.pack(">HHI", 10, 10, number)
        head = struct.pack(">HHI", *ports, 0)
        body = head + struct.pack("<I", crc32c(head + bytes(4) + init)) + init
        return _ip(source, destination, protocol, body)
    else:
        kind = 8 if protocol == Protocol.ICMP else 128
        body = struct.pack(">BBHHH", kind, 0, 0, ports[0], number & 0xFFFF) + tag
    return _ip(source, destination, protocol, body)


def tcp(
    source: str,
    destination: str,
    ports: tuple[int, int],
    flags: int,
    sequence: int,
    acknowledged: int,
    tag: bytes,
) -> bytes:
    """A TCP segment with the marker as its timestamps."""
    numbers = (sequence & 0xFFFFFFFF, acknowledged & 0xFFFFFFFF)
    head = struct.pack(">HHIIBBHHH", *ports, *numbers, 8 << 4, flags, 64000, 0, 0)
    return _ip(source, destination, Protocol.TCP, head + b"\1\1\x08\x0a" + tag)


def icmp_port_unreachable(quoted: bytes, source: str, destination: str) -> bytes:
    if ":" in source:
        body = struct.pack(">BBHI", 1, 4, 0, 0) + quoted
        return _ip(source, destination, Protocol.ICMPV6, body)
    return _ip(source, destination, Protocol.ICMP, struct.pack(">BBHI", 3, 3, 0, 0) + quoted)


def _ip(source: str, destination: str, protocol: Protocol, body: bytes) -> bytes:
    addresses = parse_address(source) + parse_address(destination)
    at = {Protocol.TCP: 16, Protocol.UDP: 6, Protocol.ICMP: 2, Protocol.ICMPV6: 2}.get(protocol)
    if at is not None:
        pseudo = b""
        if protocol != Protocol.ICMP:
            pseudo = addresses + struct.pack(">II", len(body), protocol)
        total = _checksum(pseudo + body)
        body = body[:at] + struct.pack(">H", total or 0xFFFF) + body[at + 2 :]
    if ":" in source:
        return struct.pack(">IHBB", 6 << 28, len(body), protocol, 64) + addresses + body
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0x4000, 64, protocol, 0)
    total = _checksum(head + addresses)
    return head[:10] + struct.pack(">H", total) + addresses + body


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) & 1:
        data += b"\0"
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@cache
def _crc32c_table() -> tuple[int, ...]:
    table: list[int] = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def crc32c(data: bytes) -> int:
    """RFC 9260, appendix A."""
    table, value = _crc32c_table(), 0xFFFFFFFF
    for octet in data:
        value = value >> 8 ^ table[(value ^ octet) & 0xFF]
    return value ^ 0xFFFFFFFF
