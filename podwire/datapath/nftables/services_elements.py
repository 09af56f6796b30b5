"""A ServicePort as elements of table `podwire-services`. Pure, but for the affinity ids.

An element is its key and data as the kernel holds them; the key of an interval is its first and
last key together. `Spelling` is all that one port needs in the kernel.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from podwire.datapath.nftables.services_affinity import AffinityIds, AffinityList
from podwire.datapath.nftables.services_rules import (
    AFFINITY,
    CLUSTER_IP,
    EXTERNAL,
    EXTERNAL_LOCAL,
    LISTS,
    SPACES,
    TABLE,
    Rule,
)
from podwire.kernel.nftables import IP, IP6, Data, Element, Set
from podwire.net import Address
from podwire.services import (
    Backend,
    Family,
    Frontend,
    FrontendKind,
    NodePortScope,
    ServicePort,
    Settings,
)

Spelling: TypeAlias = dict[str, dict[bytes, Data]]
"""By set: key → data (None in sets)."""

INTERVALS = frozenset({"ranges"})
"""Sets of concatenated intervals."""
SHARED = frozenset({"cluster-ips", "hairpin"})
"""Sets whose elements several ports may need."""
LATE = frozenset(f"{space}{lst}backends" for space in SPACES for lst in LISTS)
"""Maps whose deletes wait: a packet that has just read a number of backends may still come."""

_PAD = b"\0\0"
_FAMILIES: Mapping[Family, int] = {4: IP, 6: IP6}


def _host_u32(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


_SLOTS = tuple(map(_host_u32, range(1024)))


def target(family: Family, name: str) -> Set:
    return Set(_FAMILIES[family], TABLE, name)


def element_sets() -> list[str]:
    """The sets and maps that `spell` fills."""
    out = ["cluster-ips", "hairpin", "ranged", "ranges", "affinity-backends"]
    for space in SPACES:
        out += [space + name for name in ("rejected", "dropped", "frontends", "shortcuts")]
        for lst in LISTS:
            names = ("backends", "affinity-lists", "affinity-counts", "affinity-slots")
            out += [space + lst + name for name in names]
    return out


def to_element(name: str, key: bytes, data: Data) -> Element:
    if name in INTERVALS:
        half = len(key) // 2
        return Element(key[:half], data, key[half:])
    return Element(key, data)


def from_element(element: Element) -> tuple[bytes, Data]:
    return element.key + (element.end or b""), element.data


def spell(port: ServicePort, ids: AffinityIds, rules: set[Rule]) -> Spelling:
    """All elements of one port; the chains that they need are added to `rules`."""
    writer = _Writer(port, ids, rules)
    for frontend in port.frontends:
        writer.frontend(frontend)
    writer.hairpin()
    return writer.out


def affinity_keys(port: ServicePort) -> Iterator[tuple[str, str, bytes]]:
    """Policy, map and key under which the lists of a port with affinity are found."""
    for frontend in port.frontends:
        space, key = "" if frontend.address else "nodeport-", _key(port, frontend)
        local = port.is_local(frontend.kind)
        yield "local" if local else "cluster", f"{space}affinity-lists", key
        if local and frontend.kind != FrontendKind.CLUSTER_IP:
            yield "cluster", f"{space}shortcut-affinity-lists", key


def counting(port: ServicePort, frontend: Frontend) -> tuple[str, bytes]:
    """The set or map whose element decides about the frontend and counts its packets; its key."""
    space = "" if frontend.address else "nodeport-"
    if not port.has_endpoints:
        name = "rejected"
    else:
        local = port.is_local(frontend.kind)
        name = "frontends" if (port.local if local else port.cluster) else "dropped"
    return space + name, _key(port, frontend)


class _Writer:
    def __init__(self, port: ServicePort, ids: AffinityIds, rules: set[Rule]) -> None:
        self.out: Spelling = {}
        self._port = port
        self._ids = ids
        self._rules = rules

    def frontend(self, frontend: Frontend) -> None:
        port = self._port
        space = "" if frontend.address else "nodeport-"
        key = _key(port, frontend)
        if frontend.kind == FrontendKind.CLUSTER_IP:
            self._put("cluster-ips", frontend.address, None)
            treatment = CLUSTER_IP
        elif port.external_local:
            treatment = EXTERNAL_LOCAL
        else:
            treatment = EXTERNAL
        if frontend.kind == FrontendKind.LOAD_BALANCER and port.source_ranges is not None:
            self._put("ranged", key, None)
            for prefix in port.source_ranges:
                self._put("ranges", key + prefix.first + key + prefix.last, None)
        if not port.has_endpoints:
            self._put(f"{space}rejected", key, None)
            return
        backends = port.local if port.is_local(frontend.kind) else port.cluster
        if not backends:
            self._put(f"{space}dropped", key, None)
        if treatment == EXTERNAL_LOCAL and port.cluster:
            number = self._backends(space, "shortcut-", key, port.cluster, "cluster")
            self._put(f"{space}shortcuts", key, _host_u32(number))
        elif not backends:
            return
        scope = "local" if port.is_local(frontend.kind) else "cluster"
        number = self._backends(space, "", key, backends, scope)
        self._put(f"{space}frontends", key, _host_u32(treatment | number))

    def hairpin(self) -> None:
        for backend in self._port.on_node:
            address = backend[:-2]
            self._put("hairpin", address + address, None)

    def _backends(
        self, space: str, lst: str, key: bytes, backends: Sequence[Backend], scope: str
    ) -> int:
        """Write a list of backends; the class by which it is found."""
        if not backends:
            return 0
        count = len(backends)
        if self._port.affinity_timeout_s:
            known = self._ids.list_of((self._port.name, scope), backends)
            if known is not None:
                return self._affinity(space, lst, key, backends, known)
        slots = self._set(f"{space}{lst}backends")
        for slot, backend in zip(_slots(count), backends, strict=True):
            slots[key + slot] = backend + _PAD
        self._rules.add(Rule(space, lst, "lb", count))
        return count

    def _affinity(
        self, space: str, lst: str, key: bytes, backends: Sequence[Backend], known: AffinityList
    ) -> int:
        name, count = space + lst, len(backends)
        timeout_s = self._port.affinity_timeout_s
        self._put(f"{name}affinity-lists", key, _host_u32(known.id))
        self._put(f"{name}affinity-counts", key, _host_u32(count))
        slots = self._set(f"{name}affinity-slots")
        by_id = self._set("affinity-backends")
        for slot, backend in zip(_slots(count), backends, strict=True):
            number = _host_u32(known.id | known.numbers[backend])
            slots[key + slot] = number
            by_id[number] = backend + _PAD
        self._rules.add(Rule(space, lst, "new", count))
        self._rules.add(Rule(space, lst, "affinity", timeout_s))
        return AFFINITY | timeout_s

    def _set(self, name: str) -> dict[bytes, Data]:
        return self.out.setdefault(name, {})

    def _put(self, name: str, key: bytes, data: Data) -> None:
        self._set(name)[key] = data


def _slots(count: int) -> Iterable[bytes]:
    return _SLOTS[:count] if count <= len(_SLOTS) else map(_host_u32, range(count))


def _key(port: ServicePort, frontend: Frontend) -> bytes:
    return frontend.address + struct.pack(">B3xH2x", port.name.protocol, frontend.port)


def settings_ranges(settings: Settings, family: Family) -> Mapping[str, list[tuple[bytes, bytes]]]:
    """The inclusive ranges of the plain interval sets."""
    size = 4 if family == 4 else 16
    cidrs = [(p.first, p.last) for p in settings.service_cidrs if len(p.address) == size]
    scope = settings.nodeports[family]
    return {"service-cidrs": cidrs, "nodeport-addresses": list(_scope_ranges(scope, size))}


def _scope_ranges(scope: NodePortScope, size: int) -> Iterator[tuple[Address, Address]]:
    """The addresses that may serve node ports, loopback taken out unless it may."""
    whole = (bytes(size), b"\xff" * size)
    ranges = sorted(
        {whole} if scope.prefixes is None else {(p.first, p.last) for p in scope.prefixes}
    )
    hole: tuple[Address, Address] | None = (b"\x7f\0\0\0", b"\x7f\xff\xff\xff")
    if size == 16:
        hole = (bytes(15) + b"\1", bytes(15) + b"\1")
    elif scope.loopback:
        hole = None
    reached = -1
    for first, last in ranges:
        start, end = max(int.from_bytes(first, "big"), reached + 1), int.from_bytes(last, "big")
        reached = max(reached, end)
        for low, high in _without(start, end, hole):
            if low <= high:
                yield low.to_bytes(size, "big"), high.to_bytes(size, "big")


def _without(
    start: int, end: int, hole: tuple[Address, Address] | None
) -> Iterator[tuple[int, int]]:
    if hole is None:
        yield start, end
        return
    first, last = (int.from_bytes(edge, "big") for edge in hole)
    yield start, min(end, first - 1)
    yield max(start, last + 1), end
