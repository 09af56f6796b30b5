"""A small cluster's names, and entries in it."""

from __future__ import annotations

from podwire.conntrack.names import Names, Place, Role
from podwire.kernel.ctnetlink import Entry, Status, TcpState, Tuple
from podwire.net import Protocol, parse_address, parse_prefix
from podwire.services import (
    Frontend,
    FrontendKind,
    NodeFacts,
    ProxyConfig,
    ServicePort,
    ServicePortName,
    ServiceTable,
    backend,
)
from tests.service_objects import service_table as table_of

A = parse_address
NODE, OTHER_NODE, OUTSIDE = "192.0.2.1", "192.0.2.2", "203.0.113.9"
WEB, DNS, CLIENT, GONE = "10.244.0.2", "10.244.1.3", "10.244.0.4", "10.244.0.99"
WEB_IP, DNS_IP, NODE_PORT = "10.96.0.10", "10.96.0.53", 30053


def service_port(
    name: str, protocol: Protocol, address: str, port: int, *backends: tuple[str, int],
    node_port: int = 0,
) -> ServicePort:  # fmt: skip
    frontends = [Frontend(FrontendKind.CLUSTER_IP, A(address), port)]
    if node_port:
        frontends.append(Frontend(FrontendKind.NODE_PORT, b"", node_port))
    packed = tuple(backend(A(a), p) for a, p in backends)
    return ServicePort(
        name=ServicePortName("default", name, "", protocol, 4),
        frontends=tuple(frontends),
        cluster=packed,
        serving=packed if protocol is Protocol.UDP else (),
        has_endpoints=bool(backends),
    )


def service_table(*ports: ServicePort) -> ServiceTable:
    config = ProxyConfig(service_cidrs=(parse_prefix("10.96.0.0/16"),))
    return table_of(ports, NodeFacts("n1", (A(NODE),)), config)


SERVICES = service_table(
    service_port("web", Protocol.TCP, WEB_IP, 80, (WEB, 8080)),
    service_port("dns", Protocol.UDP, DNS_IP, 53, (DNS, 5353), node_port=NODE_PORT),
)

NAMES = Names(
    {
        A(WEB): Place(Role.POD, "default/web"),
        A(DNS): Place(Role.POD, "kube-system/dns"),
        A(CLIENT): Place(Role.POD, "default/client"),
        A(OTHER_NODE): Place(Role.NODE, "n2"),
    },
    [parse_prefix("10.244.0.0/16")],
    [A(NODE)],
    SERVICES,
    "n1",
)


def entry(
    source: str,
    destination: str,
    port: int,
    *,
    via: tuple[str, int] | None = None,
    snat: str = "",
    protocol: Protocol = Protocol.TCP,
    source_port: int = 4000,
    answered: bool = True,
) -> Entry:
    """`via`: who answers; `snat`: the address that it went out by."""
    server, server_port = via or (destination, port)
    status = Status.CONFIRMED
    status |= Status.SEEN_REPLY | Status.ASSURED if answered else Status(0)
    status |= Status.DST_NAT if via else Status(0)
    status |= Status.SRC_NAT if snat else Status(0)
    return Entry(
        Tuple(A(source), A(destination), protocol, source_port, port),
        Tuple(A(server), A(snat or source), protocol, server_port, source_port),
        status,
        timeout_s=60,
        state=TcpState.ESTABLISHED if protocol is Protocol.TCP else None,
    )
