"""Addresses, prefixes and protocols as the data paths want them: packed bytes.

An address is `bytes` in network order, 4 (IPv4) or 16 (IPv6) long: it hashes fast, compares in
numeric order and goes into netlink and eBPF maps unchanged. `ipaddress` objects cost 2-4 µs each,
which at 250,000 endpoints is a second.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from podwire.errors import InvalidObject

Address: TypeAlias = bytes


class Protocol(IntEnum):
    """IANA protocol numbers of what Services and policies speak about."""

    ICMP = 1
    TCP = 6
    UDP = 17
    ICMPV6 = 58
    SCTP = 132


def protocol_name(number: int) -> str:
    """``TCP``, …; of a protocol that nobody here speaks about, its number."""
    try:
        return Protocol(number).name
    except ValueError:
        return str(number)


def parse_address(text: str) -> Address:
    """The packed form of an address.

    Leading zeros in IPv4 (``010.002.003.004``) are read as decimal, as Kubernetes does for stored
    objects; IPv4-mapped IPv6 addresses become IPv4. Raises InvalidObject.
    """
    try:
        if ":" in text:
            packed = socket.inet_pton(socket.AF_INET6, text)
            return packed[12:] if packed.startswith(_MAPPED) else packed
        return socket.inet_pton(socket.AF_INET, text)
    except (OSError, ValueError, TypeError):
        parts = text.split(".") if isinstance(text, str) else []  # pyright: ignore[reportUnnecessaryIsInstance]
        if len(parts) == 4 and all(p.isascii() and p.isdigit() and len(p) < 9 for p in parts):
            numbers = [int(p) for p in parts]
            if max(numbers) < 256:
                return bytes(numbers)
        raise InvalidObject(f"not an IP address: {text!r}") from None


_MAPPED = bytes(10) + b"\xff\xff"


def parse_addresses(texts: Iterable[str]) -> tuple[Address, ...]:
    """Those that are addresses, for objects in which some need not be."""
    found: list[Address] = []
    for text in texts:
        with contextlib.suppress(InvalidObject):
            found.append(parse_address(text))
    return tuple(found)


def address_family(address: Address) -> socket.AddressFamily:
    """AF_INET or AF_INET6."""
    return socket.AF_INET if len(address) == 4 else socket.AF_INET6


def format_address(address: Address) -> str:
    """Canonical text (RFC 5952 for IPv6)."""
    return socket.inet_ntop(address_family(address), address)


def format_endpoint(address: Address, port: int) -> str:
    """``10.0.0.1:80`` or ``[fd00::1]:80``."""
    text = format_address(address)
    return f"{text}:{port}" if len(address) == 4 else f"[{text}]:{port}"


def parse_mac(text: str) -> bytes:
    """An Ethernet address of hexadecimal digits and colons. Raises ValueError."""
    return bytes.fromhex(text.replace(":", ""))


def link_local(mac: bytes) -> Address:
    """The IPv6 address that is made from a MAC by EUI-64 (RFC 4291, appendix A)."""
    return b"\xfe\x80" + bytes(6) + bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]


class Prefix(NamedTuple):
    """A CIDR. `address` has its host bits cleared; `length` is in bits."""

    address: Address
    length: int

    @property
    def bits(self) -> int:
        """32 or 128."""
        return len(self.address) * 8

    @property
    def first(self) -> Address:
        return self.address

    @property
    def last(self) -> Address:
        size = len(self.address)
        host = (1 << (size * 8 - self.length)) - 1
        return (int.from_bytes(self.address, "big") | host).to_bytes(size, "big")

    def __contains__(self, address: object) -> bool:
        return (
            isinstance(address, bytes)
            and len(address) == len(self.address)
            and self.address <= address <= self.last
        )

    def covers(self, other: Prefix) -> bool:
        """Whether every address of `other` is inside."""
        return other.length >= self.length and other.address in self

    def __str__(self) -> str:
        return f"{format_address(self.address)}/{self.length}"


@lru_cache(maxsize=4096)
def parse_prefix(text: str) -> Prefix:
    """A CIDR from stored objects: host bits are cleared, leading zeros and blanks around accepted.

    A bare address is a full-length prefix. Raises InvalidObject.
    """
    address_text, slash, length_text = text.strip().partition("/")
    address = parse_address(address_text)
    bits = len(address) * 8
    if not slash:
        return Prefix(address, bits)
    if not (length_text.isascii() and length_text.isdigit() and int(length_text) <= 128):
        raise InvalidObject(f"not a CIDR: {text!r}")
    length = int(length_text)
    if ":" in address_text and bits == 32:  # an IPv4-mapped prefix counts its bits from 96
        length -= 96
    if not 0 <= length <= bits:
        raise InvalidObject(f"not a CIDR: {text!r}")
    return network(address, length)


def host_prefix(address: Address) -> Prefix:
    """The prefix of this address alone: /32 or /128."""
    return Prefix(address, len(address) * 8)


def network(address: Address, length: int) -> Prefix:
    """The prefix of that length which the address is in."""
    shift = len(address) * 8 - length
    number = int.from_bytes(address, "big") >> shift << shift
    return Prefix(number.to_bytes(len(address), "big"), length)


def disjoint(prefixes: Iterable[Prefix]) -> tuple[Prefix, ...]:
    """Those that no other one covers, IPv4 first, in order."""
    out: list[Prefix] = []
    for prefix in sorted(set(prefixes), key=lambda p: (len(p.address), p.address, p.length)):
        if not (out and out[-1].covers(prefix)):
            out.append(prefix)
    return tuple(out)


def range_to_prefixes(first: int, last: int, bits: int) -> list[tuple[int, int]]:
    """The fewest prefixes ``(value, length)`` that cover the inclusive range, in order."""
    out: list[tuple[int, int]] = []
    while first <= last:
        size = min(first & -first if first else 1 << bits, 1 << (last - first + 1).bit_length() - 1)
        out.append((first, bits - size.bit_length() + 1))
        first += size
    return out
