"""Neighbours (ARP, NDP) and forwarding entries of bridges and VXLAN devices (FDB).

Ours are permanent: the neighbour table is shared by all namespaces (gc_thresh3 = 1,024), and
permanent entries are exempt from its collection.

Source: rtnetlink(7); include/uapi/linux/neighbour.h.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from podwire.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_REPLACE,
    NetlinkSocket,
    Request,
    attr,
    attributes,
    number,
    u8,
    u32,
)
from podwire.net import Address, address_family, format_address

RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
_NDMSG = struct.Struct("=B3xiHBB")  # family, link index, state, flags, type
_AF_BRIDGE = 7
_DST, _LLADDR, _IFINDEX, _PROTOCOL = 1, 2, 8, 12
_NTF_SELF, _NTF_MASTER = 2, 4

NUD_PERMANENT = 0x80


class Neighbour(NamedTuple):
    """Who has `address` on the link with that index. `protocol` says who made the entry."""

    link: int
    address: Address
    mac: bytes
    state: int = NUD_PERMANENT
    protocol: int = 0

    def __str__(self) -> str:
        return f"{format_address(self.address)} at {self.mac.hex(':')} on link {self.link}"


class Forward(NamedTuple):
    """Where frames to `mac` go: on a VXLAN link to the tunnel end `remote`, else out of the link.

    `on_bridge` means that the entry is one of the bridge that the link is a port of.
    """

    link: int
    mac: bytes
    remote: Address = b""
    on_bridge: bool = False
    state: int = NUD_PERMANENT

    def __str__(self) -> str:
        to = f" to {format_address(self.remote)}" if self.remote else ""
        return f"{self.mac.hex(':')}{to} on link {self.link}"


def add(neighbour: Neighbour) -> Request:
    """Add or replace."""
    return Request(
        RTM_NEWNEIGH,
        NLM_F_CREATE | NLM_F_REPLACE,
        _encode(neighbour),
        f"add the neighbour {neighbour}",
    )


def delete(neighbour: Neighbour) -> Request:
    """Delete; ENOENT when there is none."""
    return Request(RTM_DELNEIGH, 0, _encode(neighbour), f"delete the neighbour {neighbour}")


def add_forward(forward: Forward) -> Request:
    """Add or replace."""
    return Request(
        RTM_NEWNEIGH,
        NLM_F_CREATE | NLM_F_REPLACE,
        _encode_forward(forward),
        f"add the forwarding entry {forward}",
    )


def delete_forward(forward: Forward) -> Request:
    """Delete; ENOENT when there is none."""
    body = _encode_forward(forward)
    return Request(RTM_DELNEIGH, 0, body, f"delete the forwarding entry {forward}")


def dump(sock: NetlinkSocket, *, link: int = 0, family: int = 0) -> list[Neighbour]:
    """All neighbours, or those of one link or family."""
    families = (family,) if family else (socket.AF_INET, socket.AF_INET6)
    found: list[Neighbour] = []
    for each in families:
        body = _NDMSG.pack(each, 0, 0, 0, 0) + (u32(_IFINDEX, link) if link else b"")
        found += [parse(reply) for reply in sock.dump(RTM_GETNEIGH, body, "neighbours")]
    return found


def dump_forwards(sock: NetlinkSocket, *, link: int = 0) -> list[Forward]:
    """All forwarding entries, or those of one link."""
    body = _NDMSG.pack(_AF_BRIDGE, 0, 0, 0, 0) + (u32(_IFINDEX, link) if link else b"")
    replies = sock.dump(RTM_GETNEIGH, body, "forwarding entries")
    return [_parse_forward(reply) for reply in replies]


def parse(body: bytes) -> Neighbour:
    """A neighbour from the body of RTM_NEWNEIGH."""
    _, link, state, _, _ = _NDMSG.unpack_from(body)
    get = attributes(body, 12).get
    return Neighbour(link, get(_DST, b""), get(_LLADDR, b""), state, number(get(_PROTOCOL, b"")))


def _parse_forward(body: bytes) -> Forward:
    """A forwarding entry from the body of RTM_NEWNEIGH of family AF_BRIDGE."""
    _, link, state, flags, _ = _NDMSG.unpack_from(body)
    get = attributes(body, 12).get
    on_bridge = not flags & _NTF_SELF
    return Forward(link, get(_LLADDR, b""), get(_DST, b""), on_bridge, state)


def _encode(neighbour: Neighbour) -> bytes:
    family = address_family(neighbour.address)
    body = _NDMSG.pack(family, neighbour.link, neighbour.state, 0, 0)
    body += attr(_DST, neighbour.address) + u8(_PROTOCOL, neighbour.protocol)
    return body + attr(_LLADDR, neighbour.mac) if neighbour.mac else body


def _encode_forward(forward: Forward) -> bytes:
    flags = _NTF_MASTER if forward.on_bridge else _NTF_SELF
    body = _NDMSG.pack(_AF_BRIDGE, forward.link, forward.state, flags, 0)
    body += attr(_LLADDR, forward.mac)
    return body + attr(_DST, forward.remote) if forward.remote else body
