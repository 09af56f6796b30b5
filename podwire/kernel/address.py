"""Addresses of interfaces. rtnetlink messages RTM_{NEW,DEL,GET}ADDR.

Source: rtnetlink(7); include/uapi/linux/if_addr.h.
"""

from __future__ import annotations

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
    u32,
)
from podwire.net import Address, address_family, format_address

RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
_IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_ADDRESS, _LOCAL, _BROADCAST, _FLAGS = 1, 2, 4, 8

F_NODAD = 0x02
F_NOPREFIXROUTE = 0x200

SCOPE_GLOBAL, SCOPE_LINK = 0, 253


class InterfaceAddress(NamedTuple):
    """An address on the link with that index. `length` is the prefix length of its network."""

    link: int
    address: Address
    length: int
    scope: int = SCOPE_GLOBAL
    flags: int = 0


def add(address: InterfaceAddress) -> Request:
    """Add or replace.

    IPv6 addresses are usable at once (no duplicate detection): ours come from a pool.
    IPv4 networks get their broadcast address, as ip(8) with ``brd +`` does.
    """
    flags = address.flags | (F_NODAD if len(address.address) == 16 else 0)
    body = _body(address) + u32(_FLAGS, flags)
    host_bits = 32 - address.length
    if len(address.address) == 4 and host_bits >= 2:
        last = int.from_bytes(address.address, "big") | ((1 << host_bits) - 1)
        body += attr(_BROADCAST, last.to_bytes(4, "big"))
    return Request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body, f"add {_say(address)}")


def delete(address: InterfaceAddress) -> Request:
    return Request(RTM_DELADDR, 0, _body(address), f"delete {_say(address)}")


def dump(sock: NetlinkSocket, *, link: int = 0, family: int = 0) -> list[InterfaceAddress]:
    """All addresses, or those of one link, or of one family (socket.AF_INET, AF_INET6)."""
    body = _IFADDR.pack(family, 0, 0, 0, link)
    return [parse(reply) for reply in sock.dump(RTM_GETADDR, body, "addresses")]


def own(netns_fd: int | None = None) -> frozenset[Address]:
    """The addresses that the namespace (default: the caller's) itself has."""
    with NetlinkSocket(netns_fd=netns_fd) as sock:
        return frozenset(each.address for each in dump(sock))


def parse(body: bytes) -> InterfaceAddress:
    """An address from the body of RTM_NEWADDR."""
    _, length, flags, scope, link = _IFADDR.unpack_from(body)
    found = attributes(body, _IFADDR.size)
    address = found.get(_LOCAL) or found.get(_ADDRESS, b"")
    return InterfaceAddress(
        link, address, length, scope, number(found[_FLAGS]) if _FLAGS in found else flags
    )


def _body(address: InterfaceAddress) -> bytes:
    family = address_family(address.address)
    header = _IFADDR.pack(family, address.length, 0, address.scope, address.link)
    return header + attr(_LOCAL, address.address) + attr(_ADDRESS, address.address)


def _say(address: InterfaceAddress) -> str:
    text = format_address(address.address)
    return f"the address {text}/{address.length} on link {address.link}"
