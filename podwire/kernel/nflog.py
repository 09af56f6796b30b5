"""Packets that a rule logs (``log group N``), as they come, with their addresses and ports.

One listener per group and namespace; a second one is refused (EBUSY).
Source: include/uapi/linux/netfilter/nfnetlink_log.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import NamedTuple

from podwire.errors import KernelError
from podwire.kernel import netlink, netns
from podwire.net import Address, Protocol

_SUBSYSTEM = 4 << 8
_PACKET, _CONFIG = 0, 1
_CFG_COMMAND, _CFG_MODE, _CFG_TIMEOUT, _CFG_THRESHOLD = 1, 2, 4, 5
_BIND = 1
_COPY_PACKET = 2
_PAYLOAD, _PREFIX = 9, 10
_RECEIVE_BYTES = 1 << 16
_PORTS = (Protocol.TCP, Protocol.UDP, Protocol.SCTP)


class Logged(NamedTuple):
    """One packet. `port` is the destination's; `icmp_type` is None for other protocols."""

    prefix: str
    source: Address
    destination: Address
    protocol: int
    source_port: int
    port: int
    icmp_type: int | None


class Listener:
    """Reads one group of a namespace (default: the caller's). Raises KernelError (EBUSY)."""

    def __init__(self, group: int, netns_fd: int | None = None, copy_bytes: int = 128) -> None:
        self._socket = netns.socket(netns_fd, socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETFILTER)
        self._socket.bind((0, 0))
        self._socket.settimeout(5)
        mode = struct.pack(">IBB", copy_bytes, _COPY_PACKET, 0)
        try:
            self._configure(group, netlink.attr(_CFG_COMMAND, bytes([_BIND])))
            self._configure(
                group,
                netlink.attr(_CFG_MODE, mode),
                netlink.attr(_CFG_TIMEOUT, struct.pack(">I", 1)),
                netlink.attr(_CFG_THRESHOLD, struct.pack(">I", 16)),
            )
        except BaseException:
            self._socket.close()
            raise
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def _configure(self, group: int, *attributes: bytes) -> None:
        body = struct.pack(">BBH", 0, 0, group) + b"".join(attributes)
        flags = netlink.NLM_F_REQUEST | netlink.NLM_F_ACK
        self._socket.send(netlink.message(_SUBSYSTEM | _CONFIG, flags, 1, body))
        while True:
            for kind, _, _, body in netlink.messages(self._socket.recv(_RECEIVE_BYTES)):
                if kind != netlink.NLMSG_ERROR:  # packets may come before it
                    continue
                (code,) = struct.unpack_from("=i", body)
                if code:
                    busy = -code == errno.EBUSY
                    what = "another process reads it" if busy else os.strerror(-code)
                    raise KernelError(f"cannot read log group {group}: {what}", errno=-code)
                return

    def drain(self) -> list[Logged]:
        """What has been logged since; an overrun of the socket loses some, and is no error."""
        packets = (
            _parse(body[4:])
            for datagram in netlink.drain(self._socket)
            for kind, _, _, body in netlink.messages(datagram)
            if kind == _SUBSYSTEM | _PACKET
        )
        return [packet for packet in packets if packet is not None]


def _parse(body: bytes) -> Logged | None:
    found = netlink.attributes(body)
    payload = found.get(_PAYLOAD, b"")
    parsed = parse_packet(payload)
    if parsed is None:
        return None
    return Logged(netlink.string(found.get(_PREFIX, b"")), *parsed)


def parse_packet(
    packet: bytes,
) -> tuple[Address, Address, int, int, int, int | None] | None:
    """Addresses, protocol, ports and ICMP type of an IP packet; None for what is none.

    IPv6 extension headers are stepped over as far as the bytes go.
    """
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 20:
        source, destination, protocol = packet[12:16], packet[16:20], packet[9]
        rest = packet[(packet[0] & 15) * 4 :]
    elif version == 6 and len(packet) >= 40:
        source, destination, protocol = packet[8:24], packet[24:40], packet[6]
        rest = packet[40:]
        while protocol in (0, 43, 60) and len(rest) >= 8:  # hop-by-hop, routing, destination
            protocol, rest = rest[0], rest[(rest[1] + 1) * 8 :]
    else:
        return None
    if protocol in _PORTS and len(rest) >= 4:
        return source, destination, protocol, *struct.unpack(">HH", rest[:4]), None
    if protocol in (Protocol.ICMP, Protocol.ICMPV6) and rest:
        return source, destination, protocol, 0, 0, rest[0]
    return source, destination, protocol, 0, 0, None
