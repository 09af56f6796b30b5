"""What the names of a cluster stand for.

Source: the Kubernetes DNS specification 1.1.0 (kubernetes/dns, docs/specification.md). Where it is
silent, CoreDNS's answers: endpoints without hostname are named by their address with dashes, pod
names are any address of an existing namespace.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

from podwire.errors import InvalidObject
from podwire.kube.labels import SERVICE_NAME
from podwire.kube.objects import Endpoint, EndpointSlice, Namespace, Service
from podwire.kube.store import ChangeSet, Key
from podwire.lab.dns.message import (
    ANY_CLASS,
    IN,
    PAYLOAD,
    Code,
    Malformed,
    Name,
    Query,
    Record,
    Type,
    format_error,
    name_of,
    pack_name,
    parse_query,
    reply,
)
from podwire.net import Address, parse_address, parse_addresses

_VERSION = b"1.1.0"
_REVERSE_4, _REVERSE_6 = (b"in-addr", b"arpa"), (b"ip6", b"arpa")


class Zone:
    """The cluster's names; `update` follows the objects, `answer` turns a query into a reply.

    `hosts` are names outside the cluster domain that we answer too. Every other name is refused:
    there is no upstream.
    """

    def __init__(
        self,
        domain: str = "cluster.local",
        *,
        ttl: int = 5,
        hosts: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._domain = name_of(domain)
        self._ttl = ttl
        self._hosts = {
            name_of(name): [parse_address(text) for text in texts]
            for name, texts in (hosts or {}).items()
        }
        self._services: dict[Key, Service] = {}
        self._slices: dict[Key, dict[Key, EndpointSlice]] = {}  # by Service
        self._by_address: dict[Address, dict[Name, None]] = {}  # what PTR answers
        self._namespaces: set[bytes] = set()
        soa = pack_name((b"ns", b"dns", *self._domain)) + pack_name((b"hostmaster", *self._domain))
        timers = struct.pack("!IIIII", 1, 7200, 1800, 86400, ttl)
        self._soa = Record(self._domain, Type.SOA, ttl, soa + timers)

    # --- following the objects -------------------------------------------------------------------

    def update(self, changes: ChangeSet) -> None:
        """Take over what changed; the cost follows the change."""
        for key, namespace in changes.of(Namespace).items():
            name = key[1].encode()
            if namespace.new:
                self._namespaces.add(name)
            else:
                self._namespaces.discard(name)
        for key, service in changes.of(Service).items():
            self._forget(_cluster_ips(service.old), self._service_name(key))
            self._learn(_cluster_ips(service.new), self._service_name(key))
            if service.new:
                self._services[key] = service.new
            else:
                self._services.pop(key, None)
        for key, piece in changes.of(EndpointSlice).items():
            if piece.old:
                self._drop_slice(key, piece.old)
            if piece.new:
                self._add_slice(key, piece.new)

    def _service_name(self, key: Key) -> Name:
        return (key[1].encode(), key[0].encode(), b"svc", *self._domain)

    def _learn(self, addresses: Iterable[Address], name: Name) -> None:
        for address in addresses:
            self._by_address.setdefault(address, {})[name] = None

    def _forget(self, addresses: Iterable[Address], name: Name) -> None:
        for address in addresses:
            if names := self._by_address.get(address):
                names.pop(name, None)
                if not names:
                    del self._by_address[address]

    def _add_slice(self, key: Key, piece: EndpointSlice) -> None:
        service = _service_of(piece)
        self._slices.setdefault(service, {})[key] = piece
        for name, addresses in self._endpoint_names(service, piece):
            self._learn(addresses, name)

    def _drop_slice(self, key: Key, piece: EndpointSlice) -> None:
        service = _service_of(piece)
        if pieces := self._slices.get(service):
            pieces.pop(key, None)
            if not pieces:
                del self._slices[service]
        for name, addresses in self._endpoint_names(service, piece):
            self._forget(addresses, name)

    def _endpoint_names(
        self, service: Key, piece: EndpointSlice
    ) -> Iterator[tuple[Name, tuple[Address, ...]]]:
        """The reverse names: only endpoints with a hostname have one of their own."""
        for endpoint in piece.endpoints or ():
            if endpoint.hostname and _is_ready(endpoint):
                name = (endpoint.hostname.encode(), *self._service_name(service))
                yield name, _addresses_of(endpoint)

    # --- answering -------------------------------------------------------------------------------

    def answer(self, packet: bytes, *, udp: bool = True) -> bytes:
        """The reply to a query; ``b""`` when there is nothing to be said to it."""
        try:
            query = parse_query(packet)
        except Malformed as error:
            return format_error(error.id) if error.answerable else b""
        limit = min(query.payload, PAYLOAD) if udp else None
        if query.edns:
            return reply(query, Code.BAD_VERSION, authoritative=False, limit=limit)
        if query.opcode:
            return reply(query, Code.NOT_IMPLEMENTED, authoritative=False, limit=limit)
        if query.klass not in (IN, ANY_CLASS):
            return reply(query, Code.REFUSED, authoritative=False, limit=limit)
        found = self._find(query)
        if found is None:
            return reply(query, Code.REFUSED, authoritative=False, limit=limit)
        code, answers, additional = found
        if len(answers) > 1:  # spread clients that take the first one
            shift = query.id % len(answers)
            answers = answers[shift:] + answers[:shift]
        authority = () if answers else (self._soa,)
        return reply(query, code, answers, authority, additional, limit=limit)

    def _find(self, query: Query) -> tuple[Code, list[Record], list[Record]] | None:
        """Code, answers, additional records; None for names that are none of ours."""
        name = query.name
        if name[-2:] in (_REVERSE_4, _REVERSE_6):
            return self._reverse(query)
        if name in self._hosts:
            records = self._address_records(name, self._hosts[name], query.type)
            return Code.OK, records, []
        size = len(self._domain)
        if name[-size:] != self._domain:
            return None
        records = self._records(name[:-size])
        if records is None:
            return Code.NO_NAME, [], []
        answers = _chosen(records, query.type)
        additional: list[Record] = []
        if answers and answers[0].type == Type.SRV:
            additional = list(self._targets(answers))
        if answers and answers[0].type == Type.CNAME and query.type != Type.CNAME:
            answers += self._alias(answers[0], query.type)
        return Code.OK, answers, additional

    def _records(self, labels: Name) -> list[Record] | None:
        """All records of a name in our domain (without it); None when there is no such name."""
        match labels:
            case ():
                server = pack_name((b"ns", b"dns", *self._domain))
                return [self._soa, Record(self._domain, Type.NS, self._ttl, server)]
            case (b"dns-version",):
                text = bytes([len(_VERSION)]) + _VERSION
                return [Record((*labels, *self._domain), Type.TXT, self._ttl, text)]
            case (b"svc" | b"pod",) | (b"dns",):
                return []
            case (namespace, b"svc" | b"pod"):
                return [] if namespace in self._namespaces else None
            case (address, namespace, b"pod"):
                return self._pod(address, namespace)
            case (*front, service, namespace, b"svc"):
                key = (namespace.decode(errors="replace"), service.decode(errors="replace"))
                return self._service(tuple(front), key)
            case _:
                return None

    def _pod(self, text: bytes, namespace: bytes) -> list[Record] | None:
        address = _dashed_address(text)
        if address is None or namespace not in self._namespaces:
            return None
        return self._address_records((text, namespace, b"pod", *self._domain), [address])

    # --- Services --------------------------------------------------------------------------------

    def _service(self, front: Name, key: Key) -> list[Record] | None:
        service = self._services.get(key)
        if service is None:
            return None
        name = (*front, *self._service_name(key))
        if service.spec.type == "ExternalName":
            target = pack_name(name_of(service.spec.external_name))
            return None if front else [Record(name, Type.CNAME, self._ttl, target)]
        headless = service.spec.cluster_ip == "None"
        match front:
            case ():
                return self._whole(service, key, name, headless=headless)
            case (protocol,) if protocol in (b"_tcp", b"_udp", b"_sctp"):
                ports = self._ports(service, key, None, protocol, name, headless=headless)
                return [] if ports else None
            case (port, protocol) if port[:1] == b"_" and protocol[:1] == b"_":
                found = self._ports(service, key, port, protocol, name, headless=headless)
                return found or None
            case (hostname,) if headless:
                addresses = [
                    address
                    for label, endpoint, _ in self._endpoints(key)
                    if label == hostname
                    for address in _addresses_of(endpoint)
                ]
                return self._address_records(name, addresses) if addresses else None
            case _:
                return None

    def _whole(
        self, service: Service, key: Key, name: Name, *, headless: bool
    ) -> list[Record] | None:
        ports = self._ports(service, key, None, None, name, headless=headless)
        if not headless:
            return self._address_records(name, _cluster_ips(service)) + ports
        addresses = [a for _, endpoint, _ in self._endpoints(key) for a in _addresses_of(endpoint)]
        if not addresses:
            return None  # the specification wants NXDOMAIN without ready endpoints
        return self._address_records(name, list(dict.fromkeys(addresses))) + ports

    def _endpoints(self, key: Key) -> Iterator[tuple[bytes, Endpoint, EndpointSlice]]:
        """The ready endpoints of a Service with the label that names each."""
        for piece in self._slices.get(key, {}).values():
            for endpoint in piece.endpoints or ():
                if _is_ready(endpoint) and endpoint.addresses:
                    yield _label_of(endpoint), endpoint, piece

    def _ports(
        self,
        service: Service,
        key: Key,
        port: bytes | None,
        protocol: bytes | None,
        name: Name,
        *,
        headless: bool,
    ) -> list[Record]:
        """SRV records of the named ports that match; None matches all."""

        def wanted(found: str, kind: str) -> bool:
            return (
                bool(found)
                and port in (None, b"_" + found.lower().encode())
                and protocol in (None, b"_" + kind.lower().encode())
            )

        base = self._service_name(key)
        if not headless:
            return [
                self._srv(name, one.port, base)
                for one in service.spec.ports
                if wanted(one.name, one.protocol)
            ]
        records = [
            self._srv(name, one.port or 0, (label, *base))
            for label, _, piece in self._endpoints(key)
            for one in piece.ports or ()
            if wanted(one.name or "", one.protocol or "TCP")
        ]
        return list(dict.fromkeys(records))

    def _srv(self, name: Name, port: int, target: Name) -> Record:
        data = struct.pack("!HHH", 0, 100, port) + pack_name(target)
        return Record(name, Type.SRV, self._ttl, data)

    def _targets(self, answers: list[Record]) -> Iterator[Record]:
        """Addresses of what SRV records point at, so that nobody has to ask again."""
        size = len(self._domain)
        for data in dict.fromkeys(record.data[6:] for record in answers):
            target = _unpack_name(data)
            records = self._records(target[:-size]) or []
            yield from (one for one in records if one.type in (Type.A, Type.AAAA))

    def _alias(self, cname: Record, type: int) -> list[Record]:
        """What an ExternalName in our own domain stands for; other names are not ours to say."""
        target, size = _unpack_name(cname.data), len(self._domain)
        if target in self._hosts:
            return self._address_records(target, self._hosts[target], type)
        if target[-size:] != self._domain:
            return []
        records = self._records(target[:-size]) or []
        return [one for one in records if one.type == type]

    # --- addresses -------------------------------------------------------------------------------

    def _address_records(
        self, name: Name, addresses: Sequence[Address], type: int = Type.ANY
    ) -> list[Record]:
        records = [
            Record(name, Type.A if len(address) == 4 else Type.AAAA, self._ttl, address)
            for address in addresses
        ]
        return [record for record in records if type in (record.type, Type.ANY)]

    def _reverse(self, query: Query) -> tuple[Code, list[Record], list[Record]]:
        address = _reverse_address(query.name)
        names = self._by_address.get(address, {}) if address else {}
        records = [Record(query.name, Type.PTR, self._ttl, pack_name(name)) for name in names]
        if not records:
            return Code.NO_NAME, [], []
        return Code.OK, _chosen(records, query.type), []


def _chosen(records: list[Record], type: int) -> list[Record]:
    if type == Type.ANY:
        return records
    return [record for record in records if record.type in (type, Type.CNAME)]


def _cluster_ips(service: Service | None) -> tuple[Address, ...]:
    if service is None:
        return ()
    return parse_addresses(service.spec.cluster_ips or [service.spec.cluster_ip])  # or "None"


def _addresses_of(endpoint: Endpoint) -> tuple[Address, ...]:
    """None for an FQDN."""
    return parse_addresses(endpoint.addresses[:1])


def _is_ready(endpoint: Endpoint) -> bool:
    return endpoint.conditions.ready is not False


def _label_of(endpoint: Endpoint) -> bytes:
    if endpoint.hostname:
        return endpoint.hostname.lower().encode()
    return endpoint.addresses[0].replace(".", "-").replace(":", "-").lower().encode()


def _service_of(piece: EndpointSlice) -> Key:
    return (piece.metadata.namespace, piece.metadata.labels.get(SERVICE_NAME, ""))


def _dashed_address(text: bytes) -> Address | None:
    """``10-1-2-3`` or ``fd00--1``."""
    dashed = text.decode(errors="replace")
    for candidate in (dashed.replace("-", "."), dashed.replace("-", ":")):
        try:
            return parse_address(candidate)
        except InvalidObject:
            continue
    return None


def _reverse_address(name: Name) -> Address | None:
    labels = name[-3::-1]
    try:
        if name[-2:] == _REVERSE_4 and len(labels) == 4:
            return bytes(int(label) for label in labels)
        if name[-2:] == _REVERSE_6 and len(labels) == 32:
            return bytes.fromhex(b"".join(labels).decode())
    except ValueError:
        return None
    return None


def _unpack_name(data: bytes) -> Name:
    labels: list[bytes] = []
    while size := data[0]:
        labels.append(data[1 : 1 + size])
        data = data[1 + size :]
    return tuple(labels)
