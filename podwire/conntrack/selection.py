"""Which entries somebody asks for, in the words of the cluster, and as filters for the kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from podwire.conntrack.attribution import Kind, attribute
from podwire.conntrack.names import Names, Place, Role
from podwire.conntrack.source import Source
from podwire.errors import InvalidObject
from podwire.kernel.ctnetlink import Entry, Filter, Match, Status
from podwire.kernel.ctnetlink.counting import flow_key
from podwire.net import Address, Protocol, parse_address

_STATUS_STATES = {
    "UNREPLIED": (0, Status.SEEN_REPLY),
    "REPLIED": (Status.SEEN_REPLY, Status.SEEN_REPLY),
    "ASSURED": (Status.ASSURED, Status.ASSURED),
    "OFFLOAD": (Status.OFFLOAD, Status.OFFLOAD),
}


@dataclass(frozen=True)
class Selection:
    """All that is given must hold. `pod` and `service` are ``namespace/name``."""

    pod: str = ""
    service: str = ""
    namespace: str = ""
    address: Address = b""
    """At either end, before or after translation."""
    target: Address = b""
    """Who answers."""
    target_port: int | None = None
    protocol: Protocol | None = None
    state: str = ""
    kind: Kind | None = None

    def __bool__(self) -> bool:
        return self != _ALL

    @property
    def exact(self) -> bool:
        """Whether the filters fit just what is meant."""
        by_status = not self.state or self.state in _STATUS_STATES
        return by_status and not (self.namespace or self.kind)

    def filters(self, names: Names) -> list[Filter]:
        """Filters that together fit a superset of what is meant; none: there can be nothing.

        Raises InvalidObject for a pod or Service that is not known.
        """
        match = Match(protocol=self.protocol)
        status, mask = _STATUS_STATES.get(self.state, (0, 0))
        base = Filter(original=match, status=status, status_mask=mask)
        if self.target:
            port = self.target_port if self.protocol is not None else None
            return [base._replace(reply=Match(self.target, b"", self.protocol, port))]
        if self.service:
            return self._service_filters(names, base)
        addresses = [self.address] if self.address else []
        if self.pod:
            addresses = names.addresses(self.pod)
            if not addresses:
                raise InvalidObject("no address of it is known here", object=f"Pod {self.pod}")
        if not addresses:
            return [base]
        found: list[Filter] = []
        for each in addresses:
            found.append(base._replace(original=match._replace(source=each)))
            found.append(base._replace(reply=match._replace(source=each)))
            if not self.pod:
                found.append(base._replace(original=match._replace(destination=each)))
                found.append(base._replace(reply=match._replace(destination=each)))
        return found

    def _service_filters(self, names: Names, base: Filter) -> list[Filter]:
        namespace, _, name = self.service.rpartition("/")
        ports = [
            port
            for port in (names.services.ports.values() if names.services else ())
            if (port.name.namespace, port.name.name) == (namespace, name)
        ]
        if not ports:
            raise InvalidObject(
                "no such Service is programmed here", object=f"Service {self.service}"
            )
        matches = [
            Match(b"", address, port.name.protocol, None, frontend.port)
            for port in ports
            if self.protocol in (None, port.name.protocol)
            for frontend in port.frontends
            for address in (
                [frontend.address]
                if frontend.address
                else [a for a in names.own_addresses if (len(a) == 4) == (port.name.family == 4)]
            )
        ]
        return [base._replace(original=match) for match in matches]

    def fits(self, entry: Entry, names: Names) -> bool:
        """Whether the entry is meant."""
        if self.protocol is not None and entry.original.protocol != self.protocol:
            return False
        if self.target and (
            entry.reply.source != self.target
            or self.target_port not in (None, entry.reply.source_port)
        ):
            return False
        if self.address and self.address not in ends(entry):
            return False
        return self._fits_state(entry) and self._fits_names(entry, names)

    def _fits_state(self, entry: Entry) -> bool:
        if self.state in _STATUS_STATES:
            status, mask = _STATUS_STATES[self.state]
            return entry.status & mask == status
        return not self.state or entry.state_name == self.state

    def _fits_names(self, entry: Entry, names: Names) -> bool:
        if not (self.pod or self.service or self.namespace or self.kind):
            return True
        flow = attribute(flow_key(entry), names)
        service = f"{flow.service.namespace}/{flow.service.name}" if flow.service else ""
        if self.pod and Place(Role.POD, self.pod) not in (flow.client, flow.server):
            return False
        if self.service and service != self.service:
            return False
        if self.kind and flow.kind is not self.kind:
            return False
        owners = {
            place.name.partition("/")[0]
            for place in (flow.client, flow.server)
            if place.role is Role.POD and place.name
        }
        owners.add(service.partition("/")[0])
        return not self.namespace or self.namespace in owners

    def entries(self, source: Source, names: Names) -> Iterator[Entry]:
        """What is meant, each entry once, read through the kernel's filters."""
        filters = self.filters(names)
        for index, filter_ in enumerate(filters):
            for entry in source.entries(filter_):
                seen = any(other.fits(entry) for other in filters[:index])
                if not seen and self.fits(entry, names):
                    yield entry


_ALL = Selection()


def ends(entry: Entry) -> tuple[Address, ...]:
    """Every address of an entry."""
    original, reply = entry.original, entry.reply
    return (original.source, original.destination, reply.source, reply.destination)


def parse(query: Mapping[str, str]) -> Selection:
    """From a query's words: pod, service, namespace, address, target, protocol, state, kind.

    Raises InvalidObject.
    """
    target, port = _target(query.get("target", ""))
    protocol = query.get("protocol", "").upper()
    kind = query.get("kind", "")
    state = query.get("state", "").upper()
    if protocol and protocol not in Protocol.__members__:
        raise InvalidObject(f"not a protocol: {protocol!r} ({', '.join(Protocol.__members__)})")
    if kind and kind not in {each.value for each in Kind}:
        raise InvalidObject(f"not a kind: {kind!r} ({', '.join(each.value for each in Kind)})")
    return Selection(
        pod=_qualified(query.get("pod", "")),
        service=_qualified(query.get("service", "")),
        namespace=query.get("namespace", ""),
        address=parse_address(query["address"]) if query.get("address") else b"",
        target=target,
        target_port=port,
        protocol=Protocol[protocol] if protocol else None,
        state=state,
        kind=Kind(kind) if kind else None,
    )


def _qualified(name: str) -> str:
    """``name`` is that of namespace default."""
    return name if not name or "/" in name else f"default/{name}"


def _target(text: str) -> tuple[Address, int | None]:
    """``10.0.0.1``, ``10.0.0.1:53``, ``fd00::1``, ``[fd00::1]:53``."""
    if not text:
        return b"", None
    host, port = text, ""
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    elif text.count(":") == 1:
        host, port = text.split(":")
    if port and not port.isdecimal():
        raise InvalidObject(f"not an ADDRESS[:PORT]: {text!r}")
    return parse_address(host), int(port) if port else None
