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
from podwire.net import Address, Protocol
from podwire.services import ServicePortName

MOST_REMOTES = 65536
MASQUERADE_PORTS = 65535 - 1024 + 1  # what the kernel may choose from when no range is given


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


_KINDS = {
    (Role.POD, Role.POD): Kind.POD_POD,
    (Role.POD, Role.OUTSIDE): Kind.EGRESS,
}


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
    return Flow(kind_of(client.role, server.role, service is not None), client, server, service)


def kind_of(client: Role, server: Role, service: bool) -> Kind:
    if client is Role.OUTSIDE:
        return Kind.OUTSIDE
    if service:
        return Kind.SERVICE
    return _KINDS.get((client, server), Kind.NODE)


class Peer:
    """What one address takes part in."""

    __slots__ = ("answered", "opened", "outside", "place", "services", "unreplied")

    def __init__(self, place: Place) -> None:
        self.place = place
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
        self.kinds: dict[Kind, int] = dict.fromkeys(Kind, 0)
        self.states: dict[tuple[int, int | None, int], int] = {}
        """By protocol, state, and the bits SEEN_REPLY, ASSURED and OFFLOAD of the status."""
        self.natted = 0
        self.peers: dict[Address, Peer] = {}
        self.services: dict[ServicePortName, Peer] = {}
        """`answered`: entries through it; `unreplied`: those of them without an answer."""
        self.snat: dict[SnatTarget, int] = {}
        self.approximate = False
        self._frontends: dict[tuple[int, Address, int], ServicePortName | None] = {}

    def add(self, counts: Mapping[FlowKey, int]) -> None:
        """A portion of the table. About a microsecond for each distinct key."""
        peers, frontends, states, kinds = self.peers, self._frontends, self.states, self.kinds
        for key, count in counts.items():
            protocol, source, destination, port, reply_source, _, _, status, state = key
            self.total += count
            client = peers.get(source) or self._peer(source)
            server = peers.get(reply_source) or self._peer(reply_source)
            frontend = (protocol, destination, port)
            if frontend in frontends:
                service = frontends[frontend]
            else:
                service = frontends[frontend] = self._names.service(protocol, destination, port)
            client.opened += count
            server.answered += count
            kinds[kind_of(client.place.role, server.place.role, service is not None)] += count
            unreplied = 0 if status & 2 else count
            client.unreplied += unreplied
            if service is not None:
                through = self.services.get(service) or self._service(service)
                through.answered += count
                through.unreplied += unreplied
                client.services += count
            elif server.place.role is Role.OUTSIDE:
                client.outside += count
            shape = (protocol, state, status & 0x4006)
            states[shape] = states.get(shape, 0) + count
            if status & 0x30:
                self.natted += count
                if status & 0x10:
                    self._masqueraded(key, count)
        if len(peers) > MOST_REMOTES:
            self._forget_small_remotes()
        if len(frontends) > MOST_REMOTES:
            frontends.clear()

    def _peer(self, address: Address) -> Peer:
        peer = self.peers[address] = Peer(self._names.place(address))
        return peer

    def _service(self, name: ServicePortName) -> Peer:
        peer = self.services[name] = Peer(Place(Role.POD, f"{name.namespace}/{name.name}"))
        return peer

    def _masqueraded(self, key: FlowKey, count: int) -> None:
        target = SnatTarget(
            key.reply_destination, key.reply_source, key.reply_source_port, key.protocol
        )
        self.snat[target] = self.snat.get(target, 0) + count

    def _forget_small_remotes(self) -> None:
        """Down to half. Peers of the cluster are kept whatever their size."""
        self.approximate = True
        remotes = [a for a, peer in self.peers.items() if peer.place.role is Role.OUTSIDE]
        remotes.sort(key=lambda address: self.peers[address].entries)
        for address in remotes[: max(0, len(remotes) - MOST_REMOTES // 2)]:
            del self.peers[address]
        if len(self.snat) > MOST_REMOTES // 2:
            largest = sorted(self.snat.items(), key=lambda item: -item[1])
            self.snat = dict(largest[: MOST_REMOTES // 4])

    # --- what people ask --------------------------------------------------------------------------

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
        """Services by ``namespace/name``: all ports and families of one together."""
        out: dict[str, Peer] = {}
        for name, peer in self.services.items():
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


def protocol_name(number: int) -> str:
    """``TCP``, … or the number."""
    try:
        return Protocol(number).name
    except ValueError:
        return str(number)
