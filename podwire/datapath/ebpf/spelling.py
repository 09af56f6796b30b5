"""A Service port in the words of the maps: pure, so that old and new can be compared.

What a port needs from outside — its id and its runs of backend slots — is its `Lease`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from podwire.datapath.ebpf.layout import (
    BACKEND_THIS_NODE,
    FRONTEND,
    FRONTEND_KEY,
    MAGLEV,
    MEMBER_KEY,
    RANGE_KEY,
    AddressFlag,
    DetectBy,
    FrontendFlag,
    MemberList,
    PrefixFlag,
    mapped,
    mapped_length,
    prefix_key,
)
from podwire.datapath.ebpf.slots import EMPTY, Run
from podwire.net import Address, Prefix, Protocol
from podwire.services import Backend, Frontend, FrontendKind, ServicePort, Settings
from podwire.services.model import is_loopback

_ANY = {4: mapped(bytes(4)), 6: bytes(16)}
_PRESENT = b"\1"
MAGLEV_ENTRIES = MAGLEV.size // 2


class Lease(NamedTuple):
    """What a Service port holds in the maps, besides what follows from its value."""

    service: int
    cluster: Run = EMPTY
    local: Run = EMPTY
    maglev: Run = EMPTY
    """In the map of tables; its size is counted in entries."""

    @property
    def runs(self) -> set[Run]:
        """In the map of backends."""
        return {self.cluster, self.local} - {EMPTY}


def external_list(port: ServicePort) -> tuple[Backend, ...]:
    """The backends that clients outside are balanced over."""
    return port.local if port.external_local else port.cluster


def table_room(run: Run) -> Run:
    """The elements of the map of tables that a Maglev table takes."""
    return Run(run.first, (run.size + MAGLEV_ENTRIES - 1) // MAGLEV_ENTRIES)


def with_lists(
    port: ServicePort, cluster: tuple[Backend, ...], local: tuple[Backend, ...]
) -> ServicePort:
    """`port` with other lists of backends."""
    return msgspec.structs.replace(port, cluster=cluster, local=local)


def frontend_key(port: ServicePort, frontend: Frontend) -> bytes:
    """Its key in the `frontends` map."""
    address = mapped(frontend.address) if frontend.address else _ANY[port.name.family]
    return FRONTEND_KEY.pack(address, frontend.port.to_bytes(2, "big"), port.name.protocol)


def frontends(
    port: ServicePort, lease: Lease, settings: Settings, *, dsr: bool = False
) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of the `frontends` map."""
    for frontend in port.frontends:
        flags = FrontendFlag.HAS_ENDPOINTS if port.has_endpoints else FrontendFlag(0)
        if not frontend.address:
            flags |= FrontendFlag.ANY_ADDRESS
        maglev = EMPTY
        if frontend.kind != FrontendKind.CLUSTER_IP:
            flags |= FrontendFlag.EXTERNAL
            maglev = lease.maglev
            if dsr:
                flags |= FrontendFlag.DSR
        elif settings.config.masquerade_all:
            flags |= FrontendFlag.MASQUERADE
        if port.is_local(frontend.kind):
            flags |= FrontendFlag.LOCAL
        if frontend.kind == FrontendKind.LOAD_BALANCER and port.source_ranges is not None:
            flags |= FrontendFlag.RANGED
        yield (
            frontend_key(port, frontend),
            FRONTEND.pack(
                lease.service,
                flags,
                port.affinity_timeout_s,
                *lease.cluster,
                *lease.local,
                *maglev,
            ),
        )


def needs_members(port: ServicePort) -> bool:
    """Whether programs ask later if a backend is still there: affinity, and UDP sockets."""
    return port.affinity_timeout_s > 0 or port.name.protocol == Protocol.UDP


def members(port: ServicePort, lease: Lease) -> Iterator[tuple[bytes, bytes]]:
    """Keys of the `members` map, with a value that says nothing."""
    lists: list[tuple[MemberList, tuple[Backend, ...]]] = []
    if needs_members(port):
        lists += [(MemberList.CLUSTER, port.cluster), (MemberList.LOCAL, port.local)]
    if port.externally_accessible:
        lists.append((MemberList.HERE, port.hosted))
    if port.serving != port.cluster:
        leaving = set(port.serving).difference(port.cluster, port.local)
        lists.append((MemberList.SERVING, tuple(leaving)))
    for list_, backends in lists:
        for backend in backends:
            address, number = mapped(backend[:-2]), backend[-2:]
            yield MEMBER_KEY.pack(address, lease.service, number, list_), _PRESENT


def ranges(port: ServicePort, lease: Lease) -> Iterator[tuple[bytes, bytes]]:
    """Keys of the `ranges` map, with a value that says nothing."""
    for prefix in port.source_ranges or ():
        if prefix.bits != (32 if port.name.family == 4 else 128):
            continue  # ::/0 would hold for IPv4, too
        length = 32 + mapped_length(prefix.address, prefix.length)
        yield RANGE_KEY.pack(length, lease.service, mapped(prefix.address)), _PRESENT


def backends(list: Iterable[Backend], service: int, own: frozenset[Address]) -> bytes:
    """Values of the `backends` map for one run, joined."""
    elsewhere = bytes(2) + service.to_bytes(4, sys.byteorder)
    here = BACKEND_THIS_NODE.to_bytes(2, sys.byteorder) + elsewhere[2:]
    return b"".join(
        mapped(backend[:-2]) + backend[-2:] + (here if backend[:-2] in own else elsewhere)
        for backend in list
    )


def own_addresses(settings: Settings) -> frozenset[Address]:
    """The node's addresses, 127.0.0.1 and ::1 among them."""
    return frozenset(settings.node.addresses) | {bytes([127, 0, 0, 1]), bytes(15) + b"\1"}


def node_flags(settings: Settings) -> dict[Address, AddressFlag]:
    """What the `addresses` map says of the node's own."""
    out: dict[Address, AddressFlag] = {}
    for address in own_addresses(settings):
        serves = settings.nodeports[4 if len(address) == 4 else 6].serves(address)
        flags = AddressFlag(0) if is_loopback(address) else AddressFlag.NODE
        out[address] = flags | (AddressFlag.NODE_PORT if serves else AddressFlag(0))
    return {address: flags for address, flags in out.items() if flags}


def prefixes(settings: Settings) -> dict[bytes, PrefixFlag]:
    """The `prefixes` map: the longest match must carry the flags of those around it, too."""
    flagged = [(p, PrefixFlag.LOCAL_PODS) for p in settings.config.detect_local.prefixes]
    flagged += [(p, PrefixFlag.SERVICES) for p in settings.service_cidrs]
    flagged.append((Prefix(bytes(4), 0), PrefixFlag(0)))  # or ::/0 would hold for IPv4, too
    out: dict[bytes, PrefixFlag] = {}
    for prefix, _ in flagged:
        flags = PrefixFlag(0)
        for other, flag in flagged:
            if _covers(other, prefix):
                flags |= flag
        out[prefix_key(*prefix)] = flags
    return out


def detection(settings: Settings) -> DetectBy:
    detect = settings.config.detect_local
    if detect.interface:
        return DetectBy.INTERFACE
    return DetectBy.CIDR if detect.prefixes else DetectBy.NONE


def _covers(wide: Prefix, narrow: Prefix) -> bool:
    return wide.bits == narrow.bits and wide.covers(narrow)
