"""Which endpoints a node uses for a Service's port.

Conditions, terminating fallback, topology hints and traffic policies, as kube-proxy has them
(KEP-1669, KEP-2433, KEP-3015; kubernetes/kubernetes: pkg/proxy/topology.go).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from podwire.errors import InvalidObject
from podwire.kube.objects import Endpoint, EndpointHints, EndpointSlice
from podwire.net import Address, Protocol, parse_address
from podwire.services.model import Backend, Family

READY, SERVING, TERMINATING, LOCAL = 1, 2, 4, 8
_LEAVING = SERVING | TERMINATING

PROTOCOLS: Mapping[str, Protocol] = {
    "TCP": Protocol.TCP,
    "UDP": Protocol.UDP,
    "SCTP": Protocol.SCTP,
}
FAMILIES: Mapping[str, Family] = {"IPv4": 4, "IPv6": 6}


class State(NamedTuple):
    """An endpoint's condition bits, and its topology hints."""

    bits: int
    hints: EndpointHints | None = None


def serves_here(state: State) -> bool:
    """Whether the endpoint is on this node, and ready or on its way out."""
    return bool(state.bits & LOCAL and state.bits & (READY | SERVING))


class Selection(NamedTuple):
    """The lists of one port, sorted; see `ServicePort`."""

    cluster: tuple[Backend, ...]
    local: tuple[Backend, ...]
    on_node: tuple[Backend, ...]
    has_endpoints: bool


class SliceEndpoints(NamedTuple):
    """What a slice says, read once: addresses with their state, and the ports they have."""

    family: Family
    endpoints: list[tuple[Address, State]]
    ports: list[tuple[str, Protocol, bytes]]
    """Name, protocol, packed number."""
    problem: str


_STATES: dict[int, State] = {bits: State(bits) for bits in range(16)}


def read_slice(slice_: EndpointSlice, node_name: str) -> SliceEndpoints | None:
    """The endpoints of a slice; None when it is of no use (FQDN, no ports).

    Only the first address of an endpoint counts. Unset conditions: ready and serving, not
    terminating. Addresses that no endpoint may have are left out and named in `problem`.
    """
    family = FAMILIES.get(slice_.address_type)
    if family is None:
        return None
    ports = [
        (port.name, PROTOCOLS[port.protocol or "TCP"], port.port.to_bytes(2, "big"))
        for port in slice_.ports or ()
        if port.name is not None
        and port.port
        and 0 < port.port < 65536
        and (port.protocol or "TCP") in PROTOCOLS
    ]
    if not ports:
        return None
    endpoints: list[tuple[Address, State]] = []
    bad: list[str] = []
    for endpoint in slice_.endpoints or ():
        if not endpoint.addresses:
            continue
        address = _usable(endpoint.addresses[0], family)
        if address is None:
            bad.append(repr(endpoint.addresses[0]))
        else:
            endpoints.append((address, _state(endpoint, node_name)))
    problem = ""
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        problem = f"endpoint addresses set aside: {', '.join(bad[:3])}{more}"
    return SliceEndpoints(family, endpoints, ports, problem)


def _usable(text: str, family: Family) -> Address | None:
    """The address; None where it is none, of the other family, or one that no endpoint may have."""
    try:
        address = parse_address(text)
    except InvalidObject:
        return None
    fits = len(address) == (4 if family == 4 else 16)
    return address if fits and not _is_impossible(address) else None


def _state(endpoint: Endpoint, node_name: str) -> State:
    conditions, hints = endpoint.conditions, endpoint.hints
    bits = (
        (conditions.ready is not False) * READY
        | (conditions.serving is not False) * SERVING
        | (conditions.terminating is True) * TERMINATING
        | (endpoint.node_name == node_name) * LOCAL
    )
    return State(bits, hints) if hints else _STATES[bits]


def _is_impossible(address: Address) -> bool:
    """Loopback, unspecified and multicast: traffic must not be led there (CVE-2020-8558)."""
    first = address[0]
    if len(address) == 4:
        return first in (0, 127) or first >= 224
    return first == 0xFF or (first == 0 and address[:15] == bytes(15))


def gather(
    slices: Iterable[SliceEndpoints], family: Family, port_name: str, protocol: Protocol
) -> dict[Backend, State]:
    """The endpoints of one port. Of an endpoint in two slices the one not terminating counts."""
    found: dict[Backend, State] = {}
    for slice_ in slices:
        if slice_.family != family:
            continue
        for name, slice_protocol, number in slice_.ports:
            if name != port_name or slice_protocol != protocol:
                continue
            if not found:
                found = {address + number: state for address, state in slice_.endpoints}
                if len(found) == len(slice_.endpoints):
                    continue
                found = {}
            for address, state in slice_.endpoints:
                backend = address + number
                before = found.get(backend)
                if before is None or _rank(state) < _rank(before):
                    found[backend] = state
    return found


def _rank(state: State) -> tuple[bool, bool, int, str]:
    """Smaller is better: not terminating, ready, then anything that does not depend on order."""
    bits = state.bits
    return (bool(bits & TERMINATING), not bits & READY, -bits, repr(state.hints))


def select(
    endpoints: Mapping[Backend, State],
    *,
    uses_cluster: bool,
    uses_local: bool,
    node_name: str,
    zone: str,
) -> Selection:
    """Choose among the endpoints of one port for policies Cluster and Local."""
    if not uses_local and all(
        state.bits & READY and not state.hints for state in endpoints.values()
    ):
        cluster = tuple(sorted(endpoints))
        on_node = [b for b, state in endpoints.items() if state.bits & LOCAL]
        return Selection(cluster, (), tuple(sorted(on_node)), bool(cluster))

    ready = {b: state for b, state in endpoints.items() if state.bits & READY}
    last_resort = [b for b, state in endpoints.items() if state.bits & _LEAVING == _LEAVING]
    has_endpoints = bool(ready or last_resort)
    cluster_list: list[Backend] = []
    if uses_cluster:
        cluster_list = _near(ready, node_name, zone) or last_resort
    local_list: list[Backend] = []
    if uses_local:
        local_list = [b for b, state in ready.items() if state.bits & LOCAL]
        if not local_list:
            local_list = [b for b in last_resort if endpoints[b].bits & LOCAL]
    on_node = {b for b in cluster_list if endpoints[b].bits & LOCAL}.union(local_list)
    return Selection(
        tuple(sorted(cluster_list)),
        tuple(sorted(local_list)),
        tuple(sorted(on_node)),
        has_endpoints,
    )


def _near(ready: Mapping[Backend, State], node_name: str, zone: str) -> list[Backend]:
    """The ready endpoints that the topology hints leave for this node.

    Hints count only when every ready endpoint has them and one names this node (or, failing
    that, its zone): else a zone without endpoints would be cut off.
    """
    for names_of, mine in ((_node_hints, node_name), (_zone_hints, zone)):
        if not mine:
            continue
        chosen: list[Backend] = []
        for backend, state in ready.items():
            names = names_of(state)
            if not names:
                break
            if mine in names:
                chosen.append(backend)
        else:
            if chosen:
                return chosen
    return list(ready)


def _node_hints(state: State) -> list[str]:
    hints = state.hints
    return [hint.name for hint in (hints.for_nodes if hints else None) or ()]


def _zone_hints(state: State) -> list[str]:
    hints = state.hints
    return [hint.name for hint in (hints.for_zones if hints else None) or ()]
