"""What `podwire policy why` asks: whether one end reaches another, and what decides.

Ends are written as people do: a pod ``namespace/name``, an address, ``node:NAME``, and as
destination a Service ``namespace/name``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from podwire.agent.control import Query
from podwire.errors import InvalidObject
from podwire.kube.labels import SERVICE_NAME
from podwire.kube.objects import EndpointSlice, Service
from podwire.kube.store import Store
from podwire.net import Address, Protocol, format_address, parse_address
from podwire.policy import Decision, Packet, PolicyTable
from podwire.policy.explain import explain
from podwire.policy.model import Key


class End(NamedTuple):
    """One end of a connection, of one family."""

    name: str
    address: Address
    pod: Key | None = None
    node: str | None = None
    port: int = 0
    via_service: bool = False


def why(store: Store, table: PolicyTable, query: Query) -> list[dict[str, Any]]:
    """`src`, `dst`, `port`, `protocol`, and optionally `family` (IPv4, IPv6): one answer per
    destination address. Raises InvalidObject.
    """
    try:
        protocol = Protocol[query.get("protocol", "TCP").upper()]
        port = int(query.get("port", "0"))
    except (KeyError, ValueError):
        raise InvalidObject("needs a protocol and a port number") from None
    bits = {"IPv4": (32,), "IPv6": (128,)}.get(query.get("family", ""), (32, 128))
    sources = _ends(store, table, query.get("src", ""), port, protocol, source=True)
    destinations = _ends(store, table, query.get("dst", ""), port, protocol, source=False)
    answers = [
        _answer(table, source, destination, protocol)
        for destination in destinations
        for source in sources
        if len(source.address) == len(destination.address) and len(source.address) * 8 in bits
    ]
    if not answers:
        raise InvalidObject("the two ends have no address family in common")
    return answers


def _answer(
    table: PolicyTable, source: End, destination: End, protocol: Protocol
) -> dict[str, Any]:
    icmp_type = {Protocol.ICMP: 8, Protocol.ICMPV6: 128}.get(protocol)
    packet = Packet(
        source.address,
        destination.address,
        protocol,
        destination.port,
        icmp_type,
        destination.via_service,
        source.pod,
        destination.pod,
        source.node,
    )
    found = explain(table, packet)
    hints = dict(found.hints)
    return {
        "source": source.name,
        "source_address": format_address(source.address),
        "destination": destination.name,
        "destination_address": format_address(destination.address),
        "protocol": protocol.name,
        "port": destination.port,
        "verdict": found.judgement.verdict.value,
        "directions": [
            {**_decision(each), "hints": list(hints[each.direction])}
            for each in (found.judgement.egress, found.judgement.ingress)
        ],
    }


def _decision(each: Decision) -> dict[str, Any]:
    """One direction's verdict and reason."""
    return {
        "direction": each.direction.value,
        "verdict": each.verdict.value,
        "why": each.why.value,
        "policy": str(each.policy) if each.policy else None,
        "rule": each.rule,
        "field": each.field,
        "isolating": [str(ref) for ref in each.isolating],
        "text": str(each),
    }


def _ends(
    store: Store, table: PolicyTable, text: str, port: int, protocol: Protocol, *, source: bool
) -> list[End]:
    if text.startswith("node:"):
        name = text[5:]
        if name not in table.nodes:
            raise InvalidObject("no such Node", object=f"Node {name}")
        _, addresses = table.nodes[name]
        return [End(text, one, node=name if source else None, port=port) for one in addresses]
    namespace, slash, name = text.partition("/")
    if not slash:
        try:
            address = parse_address(text)
        except InvalidObject:
            what = "neither an address nor a pod's NAMESPACE/NAME nor node:NAME"
            raise InvalidObject(what, object=text) from None
        host = table.host(address)
        label = f"{text} ({host})" if host.kind != "world" else text
        node = host.name if source and host.kind == "node" else None
        return [End(label, address, node=node, port=port)]
    key = (namespace, name)
    facts = table.pods.get(key)
    if facts is not None:
        node = facts.node if source and facts.host_network else None
        addresses = table.pod_addresses(key)
        return [End(f"pod {text}", one, key, node, port) for one in addresses]
    service = store.get(Service, key)
    if source or service is None:
        raise InvalidObject("no such pod" + ("" if source else " and no such Service"), object=text)
    found = list(_backends(store, table, service, port, protocol))
    if not found:
        raise InvalidObject(
            f"no endpoint for port {port}/{protocol.name}", object=f"Service {text}"
        )
    return found


def _backends(
    store: Store, table: PolicyTable, service: Service, port: int, protocol: Protocol
) -> Iterator[End]:
    names = {p.name for p in service.spec.ports if p.port == port and p.protocol == protocol.name}
    namespace, name = service.key
    for piece in store.all(EndpointSlice).values():
        if piece.metadata.namespace != namespace:
            continue
        if piece.metadata.labels.get(SERVICE_NAME) != name:
            continue
        for one in piece.ports or ():
            if (one.name or "") not in names or one.port is None:
                continue
            for endpoint in piece.endpoints or ():
                for text in endpoint.addresses:
                    address = parse_address(text)
                    label = f"Service {namespace}/{name} → {table.host(address)}"
                    yield End(label, address, port=one.port, via_service=True)
