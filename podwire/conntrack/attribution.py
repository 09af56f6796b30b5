"""Whose entries they are: by kind, pod, Service, remote and state, and SNAT ports in use.

Tallies are fed with counts by FlowKey (`kernel.ctnetlink`) and stay bounded: pods and Services by
the cluster, remote addresses and SNAT targets by `MOST_REMOTES`, beyond which the small ones are
forgotten (`approximate` says so; totals stay exact).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from podwire.conntrack.names import Names, Place, Role
from podwire.kernel.ctnetlink import FlowKey, Status
from podwire.kernel.ctnetlink.entries import state_name
from podwire.net import Address, protocol_name
from podwire.services import ServicePortName

MOST_REMOTES = 65536
MASQUERADE_PORTS = 65535 - 1024 + 1  # what the kernel may choose from when no range is given

# As plain numbers: members of an IntFlag are slow to compare.
_SEEN_REPLY, _SRC_NAT = int(Status.SEEN_REPLY), int(Status.SRC_NAT)
_NAT = _SRC_NAT | int(Status.DST_NAT)
_TOLD = int(Status.SEEN_REPLY | Status.ASSURED | Status.OFFLOAD)


class Kind(Enum):
    """Who talks to whom. The first that fits, in this order."""

    OUTSIDE = "outside"
    """Opened by somebody outside of the cluster (perhaps through a Service)."""
    SERVICE = "service"
    """Opened by a pod or node through a Service."""
    EGRESS = "egress"
    """A pod to the outside."""
    POD_POD = "pod-pod"
    NODE = "node"
    """A node is one of the ends."""


class Flow(NamedTuple):
    """One kind of flow, attributed."""

    kind: Kind
    client: Place
    server: Place
    service: ServicePortName | None


def attribute(key: FlowKey, names: Names) -> Flow:
    """Who opened it, who answers, through which Service."""
    client, server = names.place(key.source), names.place(key.reply_source)
    service = names.service(key.protocol, key.destination, key.destination_port)
    return Flow(_kind_of(client.role, server.role, service is not None), client, server, service)


def _kind_of(client: Role, server: Role, service: bool) -> Kind:
    if client is Role.OUTSIDE:
        return Kind.OUTSIDE
    if service:
        return Kind.SERVICE
    if client is Role.POD and server is not Role.NODE:
        return Kind.POD_POD if server is Role.POD else Kind.EGRESS
    return Kind.NODE


# The same by small numbers, which hash faster: rank of client × 6 + rank of server × 2 + service
_ROLES, _ALL_KINDS = list(Role), list(Kind)
_KIND_NUMBERS = [
    _ALL_KINDS.index(_kind_of(client, server, service))
    for client in _ROLES
    for server in _ROLES
    for service in (False, True)
]
_OUTSIDE = _ROLES.index(Role.OUTSIDE)


class Peer:
    """What one address takes part in."""

    __slots__ = ("answered", "opened", "outside", "place", "rank", "services", "unreplied")

    def __init__(self, place: Place) -> None:
        self.place = place
        self.rank = _ROLES.index(place.role)
        self.opened = 0
        self.answered = 0
        self.outside = 0
        """Of those opened: to somebody outside of the cluster, through no Service."""
        self.services = 0
        """Of those opened: through a Service."""
        self.unreplied = 0
        """Of those opened: never answered."""

    @property
    def entries(self) -> int:
        return self.opened + self.answered

    def add(self, other: Peer) -> None:
        self.opened += other.opened
        self.answered += other.answered
        self.outside += other.outside
        self.services += other.services
        self.unreplied += other.unreplied


class SnatTarget(NamedTuple):
    """What needs a source port of its own for each connection."""

    node_address: Address
    destination: Address
    destination_port: int
    protocol: int


class Tally:
    """Counts of one reading of the table."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self.total = 0
        self.states: dict[tuple[int, int | None, int], int] = {}
        """By protocol, state, and the bits SEEN_REPLY, ASSURED and OFFLOAD of the status."""
        self.natted = 0
        self.peers: dict[Address, Peer] = {}
        self.approximate = False
        self._kinds = [0] * len(_ALL_KINDS)
        self._services: dict[ServicePortName, Peer] = {}
        self._frontends: dict[tuple[Address, int, int], Peer | None] = {}
        self._snat: dict[tuple[Address, Address, int, int], int] = {}

    def add(self, counts: Mapping[FlowKey, int]) -> None:
        """A portion of the table. The loop over distinct keys, a microsecond each."""
        peers, frontends, states, snat = self.peers, self._frontends, self.states, self._snat
        kinds = self._kinds
        for key, count in counts.items():
            (
                source, destination, protocol, port,
                reply_source, reply_destination, reply_port, status, state,
            ) = key  # fmt: skip
            client = peers.get(source) or self._peer(source)
            server = peers.get(reply_source) or self._peer(reply_source)
            frontend = (destination, protocol, port)
            if frontend in frontends:
                service = frontends[frontend]
            else:
                service = frontends[frontend] = self._service(frontend)
            client.opened += count
            server.answered += count
            number = client.rank * 6 + server.rank * 2
            if service is not None:
                number += 1
                service.answered += count
                client.services += count
            elif server.rank == _OUTSIDE:
                client.outside += count
            kinds[_KIND_NUMBERS[number]] += count
            if not status & _SEEN_REPLY:
                client.unreplied += count
                if service is not None:
                    service.unreplied += count
            shape = (protocol, state, status & _TOLD)
            states[shape] = states.get(shape, 0) + count
            if status & _NAT:
                self.natted += count
                if status & _SRC_NAT:
                    target = (reply_destination, reply_source, reply_port, protocol)
                    snat[target] = snat.get(target, 0) + count
        self.total += sum(counts.values())
        if len(peers) > MOST_REMOTES:
            self._forget_small_remotes()
        if len(frontends) > MOST_REMOTES:
            frontends.clear()

    def _peer(self, address: Address) -> Peer:
        peer = self.peers[address] = Peer(self._names.place(address))
        return peer

    def _service(self, frontend: tuple[Address, int, int]) -> Peer | None:
        destination, protocol, port = frontend
        name = self._names.service(protocol, destination, port)
        if name is None:
            return None
        place = Place(Role.POD, f"{name.namespace}/{name.name}")
        return self._services.setdefault(name, Peer(place))

    def _forget_small_remotes(self) -> None:
        """Down to half. Peers of the cluster are kept whatever their size."""
        self.approximate = True
        remotes = [a for a, peer in self.peers.items() if peer.rank == _OUTSIDE]
        remotes.sort(key=lambda address: self.peers[address].entries)
        for address in remotes[: max(0, len(remotes) - MOST_REMOTES // 2)]:
            del self.peers[address]
        if len(self._snat) > MOST_REMOTES // 2:
            largest = sorted(self._snat.items(), key=lambda item: -item[1])
            self._snat = dict(largest[: MOST_REMOTES // 4])

    # --- what people ask --------------------------------------------------------------------------

    @property
    def kinds(self) -> dict[Kind, int]:
        return dict(zip(_ALL_KINDS, self._kinds, strict=True))

    @property
    def snat(self) -> dict[SnatTarget, int]:
        """Source ports in use."""
        return {SnatTarget(*target): used for target, used in self._snat.items()}

    def by_name(self, role: Role) -> dict[str, Peer]:
        """Peers of one role by name; both families of a pod or node are one. Where no name is
        known (remotes; pods that are gone), by address.
        """
        out: dict[str, Peer] = {}
        for address, peer in self.peers.items():
            if peer.place.role is role:
                name = self._names.label(address)
                out.setdefault(name, Peer(peer.place)).add(peer)
        return out

    def by_service(self) -> dict[str, Peer]:
        """Services by ``namespace/name``, all ports and families of one together: `answered` are
        the entries through it, `unreplied` those of them without an answer.
        """
        out: dict[str, Peer] = {}
        for name, peer in self._services.items():
            out.setdefault(f"{name.namespace}/{name.name}", Peer(peer.place)).add(peer)
        return out

    def by_state(self) -> dict[tuple[str, str], int]:
        """Counts by protocol and state, as the field's tools name them. What has no state is
        UNREPLIED, REPLIED or ASSURED (not to be evicted while the table is full).
        """
        out: dict[tuple[str, str], int] = {}
        for (protocol, state, status), count in self.states.items():
            name = state_name(protocol, state)
            if not name:
                name = (
                    "ASSURED"
                    if status & Status.ASSURED
                    else "REPLIED"
                    if status & Status.SEEN_REPLY
                    else "UNREPLIED"
                )
            label = (protocol_name(protocol), name)
            out[label] = out.get(label, 0) + count
        return out

    def with_status(self, bits: int) -> int:
        """Entries whose status has one of these bits (SEEN_REPLY, ASSURED, OFFLOAD)."""
        return sum(count for (_, _, status), count in self.states.items() if status & bits)

    def gone_pods(self) -> int:
        """Entries of addresses in a pod range that no pod known here has."""
        return sum(
            peer.entries
            for peer in self.peers.values()
            if peer.place.role is Role.POD and not peer.place.name
        )
