"""Which entries: spelled for the kernel as far as it can, checked again here.

Kernels differ. CTA_STATUS and CTA_MARK came early, CTA_FILTER (addresses, protocol, ports) with
Linux 5.8 for dumps and about 6.11 for deletes, CTA_ZONE with 6.8; and Linux 6.18 compares IPv6
addresses in CTA_FILTER the wrong way round. A delete that the kernel understands as "everything"
is not to be found out in production, so every kind is tried with real entries in a namespace of
its own, once per process.
"""

from __future__ import annotations

import contextlib
import os
import socket
from functools import lru_cache
from typing import NamedTuple

from podwire.errors import KernelError
from podwire.kernel import netlink, netns
from podwire.kernel.ctnetlink.entries import (
    NFGENMSG,
    Attribute,
    Entry,
    Message,
    Status,
    Tuple,
    address_attributes,
    big16,
    big32,
    create_request,
    parse,
)
from podwire.net import Address, Protocol

_IP_SRC, _IP_DST, _PROTO_NUM, _SRC_PORT, _DST_PORT = 1, 2, 8, 16, 32


class Match(NamedTuple):
    """Fields of one direction; empty or None matches everything."""

    source: Address = b""
    destination: Address = b""
    protocol: int | None = None
    source_port: int | None = None
    destination_port: int | None = None

    def fits(self, direction: Tuple) -> bool:
        return (
            (not self.source or self.source == direction.source)
            and (not self.destination or self.destination == direction.destination)
            and self.protocol in (None, direction.protocol)
            and self.source_port in (None, direction.source_port)
            and self.destination_port in (None, direction.destination_port)
        )

    @property
    def family(self) -> int:
        """AF_UNSPEC where no address is named."""
        size = len(self.source or self.destination)
        return {4: socket.AF_INET, 16: socket.AF_INET6}.get(size, socket.AF_UNSPEC)


_ANY = Match()


class Filter(NamedTuple):
    """All of these must hold. `status` and `mark` are compared under their masks."""

    family: int = socket.AF_UNSPEC
    original: Match = _ANY
    reply: Match = _ANY
    status: int = 0
    status_mask: int = 0
    mark: int = 0
    mark_mask: int = 0
    zone: int | None = None

    def fits(self, entry: Entry) -> bool:
        """Whether the entry is meant."""
        return (
            self.family in (socket.AF_UNSPEC, entry.original.family)
            and self.original.fits(entry.original)
            and self.reply.fits(entry.reply)
            and entry.status & self.status_mask == self.status
            and entry.mark & self.mark_mask == self.mark
            and self.zone in (None, entry.zone)
        )

    def __bool__(self) -> bool:
        """Whether it leaves anything out."""
        return self != EVERYTHING

    @property
    def families(self) -> tuple[int, ...]:
        """The families to ask for: the kernel compares tuples of one family at a time."""
        found = self.family or self.original.family or self.reply.family
        if found:
            return (found,)
        if self.original == _ANY and self.reply == _ANY:
            return (socket.AF_UNSPEC,)
        return (socket.AF_INET, socket.AF_INET6)

    def kinds(self, family: int) -> frozenset[str]:
        """Which abilities of the kernel the filter asks for."""
        tuples = self.original != _ANY or self.reply != _ANY
        asked = {
            "status": self.status_mask,
            "mark": self.mark_mask,
            "zone": self.zone is not None,
            f"tuple{6 if family == socket.AF_INET6 else 4}": tuples,
            "family": family and not tuples,
        }
        return frozenset(kind for kind, needed in asked.items() if needed)

    def body(self, family: int, kinds: frozenset[str]) -> bytes:
        """The request's body, with only these kinds of filter in it."""
        out = NFGENMSG.pack(family, 1 if "family" in kinds else 0, 0)  # version 1: it counts
        if "status" in kinds:
            out += big32(Attribute.STATUS, self.status)
            out += big32(Attribute.STATUS_MASK, self.status_mask)
        if "mark" in kinds:
            out += big32(Attribute.MARK, self.mark) + big32(Attribute.MARK_MASK, self.mark_mask)
        if "zone" in kinds:
            out += big16(Attribute.ZONE, self.zone or 0)
        if kinds & {"tuple4", "tuple6"}:
            original, original_flags = _spell(Attribute.TUPLE_ORIG, self.original)
            reply, reply_flags = _spell(Attribute.TUPLE_REPLY, self.reply)
            flags = netlink.u32(1, original_flags) + netlink.u32(2, reply_flags)
            out += original + reply + netlink.nest(Attribute.FILTER, flags)
        return out


EVERYTHING = Filter()


def _spell(kind: Attribute, match: Match) -> tuple[bytes, int]:
    """CTA_TUPLE_… with the fields that are named, and the flags that name them."""
    if match == _ANY:
        return b"", 0
    flags = (_IP_SRC if match.source else 0) | (_IP_DST if match.destination else 0)
    parts = address_attributes(match.source, match.destination) if flags else b""
    proto = b""
    for bit, number, value in (
        (_PROTO_NUM, 1, match.protocol),
        (_SRC_PORT, 2, match.source_port),
        (_DST_PORT, 3, match.destination_port),
    ):
        if value is not None:
            flags |= bit
            proto += netlink.u8(number, value) if number == 1 else big16(number, value)
    if match.protocol is None and proto:
        raise ValueError("ports without a protocol")
    return netlink.nest(kind, parts, netlink.nest(2, proto) if proto else b""), flags


class Abilities(NamedTuple):
    """What this kernel filters rightly: of family, status, mark, zone, tuple4, tuple6."""

    dump: frozenset[str]
    delete: frozenset[str]


@lru_cache(maxsize=1)
def abilities() -> Abilities:
    """Found out with real entries; empty where no namespace can be made."""
    try:
        fd = netns.create()
    except KernelError:
        return Abilities(frozenset(), frozenset())
    try:
        with netlink.NetlinkSocket(netlink.NETFILTER, fd) as sock:
            dump = {kind for kind in _probes() if _filters(sock, kind, delete=False)}
            delete = {kind for kind in _probes() if _filters(sock, kind, delete=True)}
    finally:
        os.close(fd)
    return Abilities(frozenset(dump), frozenset(delete))


def _filters(sock: netlink.NetlinkSocket, kind: str, *, delete: bool) -> bool:
    """Whether exactly the one entry meant is listed (deleted), of two that differ in all."""
    filter_, family = _probes()[kind]
    meant, other = _probe_entries(kind)
    flush = netlink.Request(Message.DELETE, 0, NFGENMSG.pack(0, 0, 0), "empty a table")
    body = filter_.body(family, frozenset({kind}))
    with contextlib.suppress(KernelError):
        sock.run(flush, create_request(meant), create_request(other))
        if delete:
            sock.run(netlink.Request(Message.DELETE, 0, body, "delete by a filter"))
            return _listed(sock, NFGENMSG.pack(0, 0, 0)) == {other.original}
        return _listed(sock, body) == {meant.original}
    return False


def _listed(sock: netlink.NetlinkSocket, body: bytes) -> set[Tuple]:
    entries = (parse(each) for each in sock.dump(Message.GET, body, "probe entries"))
    return {entry.original for entry in entries if entry}


@lru_cache
def _probes() -> dict[str, tuple[Filter, int]]:
    tuples = {size: _probe_tuple(size == 6, 1) for size in (4, 6)}
    return {
        "status": (Filter(status=0, status_mask=Status.ASSURED), socket.AF_UNSPEC),
        "mark": (Filter(mark=5, mark_mask=0xFF), socket.AF_UNSPEC),
        "zone": (Filter(zone=7), socket.AF_UNSPEC),
        "family": (Filter(family=socket.AF_INET6), socket.AF_INET6),
        "tuple4": (Filter(original=Match(*tuples[4][:5])), socket.AF_INET),
        "tuple6": (Filter(original=Match(*tuples[6][:5])), socket.AF_INET6),
    }


def _probe_entries(kind: str) -> tuple[Entry, Entry]:
    """The entry that the probe means, and another of the same family (except for `family`)."""
    six = kind in ("tuple6", "family")
    meant = _probe_tuple(six, 1)
    other = _probe_tuple(six and kind != "family", 3)
    answered = Status.CONFIRMED | Status.ASSURED | Status.SEEN_REPLY
    return (
        Entry(meant, meant.reversed(), Status.CONFIRMED, 60, mark=5, zone=7 * (kind == "zone")),
        Entry(other, other.reversed(), answered, 60, mark=9),
    )


def _probe_tuple(six: bool, last: int) -> Tuple:
    prefix = b"\xfd" + bytes(14) if six else b"\x0a\0\0"
    source, destination = prefix + bytes([last]), prefix + bytes([last + 1])
    return Tuple(source, destination, Protocol.UDP, 6 + last, 8 + last)
