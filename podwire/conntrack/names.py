"""Who an address is: a pod, a node or the outside; and which Service a connection goes through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from podwire.errors import InvalidObject
from podwire.kube.objects import EndpointSlice, Node, Pod
from podwire.kube.store import Store
from podwire.net import Address, Prefix, Protocol, format_address, parse_address, parse_prefix
from podwire.services import ServicePortName, ServiceTable


class Role(Enum):
    """Where an address lives."""

    POD = "pod"
    NODE = "node"
    OUTSIDE = "outside"


class Place(NamedTuple):
    """An address's owner. A pod's name is ``namespace/name``; empty in a pod range: it is gone, or
    not known here.
    """

    role: Role
    name: str = ""


_OUTSIDE = Place(Role.OUTSIDE)
_UNKNOWN_POD = Place(Role.POD)


class Names:
    """One moment's owners. Without arguments it knows nothing: every address is outside."""

    def __init__(
        self,
        places: Mapping[Address, Place] | None = None,
        pod_prefixes: Sequence[Prefix] = (),
        own_addresses: Iterable[Address] = (),
        services: ServiceTable | None = None,
        node: str = "",
    ) -> None:
        self._places = dict(places or {})
        self._pod_prefixes = tuple(pod_prefixes)
        self.own_addresses = frozenset(own_addresses)
        self.services = services
        for address in self.own_addresses:
            self._places.setdefault(address, Place(Role.NODE, node))

    def place(self, address: Address) -> Place:
        """The owner of an address."""
        found = self._places.get(address)
        if found is not None:
            return found
        if _stays_on_link(address):
            return Place(Role.NODE)
        if any(address in prefix for prefix in self._pod_prefixes):
            return _UNKNOWN_POD
        return _OUTSIDE

    def label(self, address: Address) -> str:
        """The owner's name, or the address where there is none."""
        return self.place(address).name or format_address(address)

    def service(
        self, protocol: int, destination: Address, destination_port: int
    ) -> ServicePortName | None:
        """The Service that a client addresses there."""
        if self.services is None:
            return None
        try:
            number = Protocol(protocol)
        except ValueError:
            return None
        found = self.services.frontends.get((destination, number, destination_port))
        if found is not None:
            return found[1].name
        if destination not in self.own_addresses:
            return None
        family = 4 if len(destination) == 4 else 6
        port = self.services.node_ports.get((family, number, destination_port))
        return port.name if port is not None else None

    def addresses(self, pod: str) -> list[Address]:
        """The addresses of a pod (``namespace/name``)."""
        wanted = Place(Role.POD, pod)
        return [address for address, place in self._places.items() if place == wanted]


def _stays_on_link(address: Address) -> bool:
    """Loopback, unspecified, link-local and multicast addresses are never outside."""
    if len(address) == 4:
        return address[0] in (0, 127) or address[0] >= 224 or address[:2] == b"\xa9\xfe"
    first = address[0] << 8 | address[1]
    return first >= 0xFF00 or first & 0xFFC0 == 0xFE80 or address[:15] == bytes(15)


def from_store(
    store: Store,
    services: ServiceTable | None,
    own_addresses: Iterable[Address],
    node: str,
    pod_prefixes: Sequence[Prefix] = (),
) -> Names:
    """Names from what an agent knows: Pods, and pods that EndpointSlices name; Nodes.

    A pod on the node's network has the node's addresses: they stay the node's.
    """
    places: dict[Address, Place] = {}
    prefixes = list(pod_prefixes)
    for slice_ in store.all(EndpointSlice).values():
        for endpoint in slice_.endpoints or ():
            target = endpoint.target_ref
            if target is not None and target.kind == "Pod":
                _enter(places, endpoint.addresses, Role.POD, f"{target.namespace}/{target.name}")
    for (namespace, name), pod in store.all(Pod).items():
        if not pod.spec.host_network and pod.status.phase not in ("Succeeded", "Failed"):
            texts = [ip.ip for ip in pod.status.pod_ips] or [pod.status.pod_ip]
            _enter(places, texts, Role.POD, f"{namespace}/{name}")
    for (_, name), each in store.all(Node).items():
        texts = [entry.address for entry in each.status.addresses if entry.type.endswith("IP")]
        _enter(places, texts, Role.NODE, name)
        for text in each.spec.pod_cidrs or [each.spec.pod_cidr]:
            with contextlib.suppress(InvalidObject):
                prefixes.append(parse_prefix(text))
    return Names(places, prefixes, own_addresses, services, node)


def _enter(places: dict[Address, Place], texts: Iterable[str], role: Role, name: str) -> None:
    for text in texts:
        with contextlib.suppress(InvalidObject):
            places[parse_address(text)] = Place(role, name)
