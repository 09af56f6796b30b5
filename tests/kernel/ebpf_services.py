"""Tables of Services for eBPF tests, with the addresses of `World`."""

import socket

from podwire.net import Protocol, format_address, parse_address, parse_prefix
from podwire.services import (
    DetectLocal,
    Frontend,
    FrontendKind,
    NodeFacts,
    ProxyConfig,
    ServicePort,
    ServicePortName,
    backend,
)
from tests.kernel.ebpf_world import NODE, REMOTE
from tests.service_objects import service_table

VIP = {4: "10.96.0.1", 6: "fd96::1"}


EXTERNAL = {4: "192.0.2.7", 6: "fd00:7::7"}


KINDS = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}


def make_port(name, number, backends, *, family, protocol, local=(), external=True, **fields):
    vip = Frontend(FrontendKind.CLUSTER_IP, parse_address(VIP[family]), number)
    outside = (
        Frontend(FrontendKind.NODE_PORT, b"", 30000 + number),
        Frontend(FrontendKind.LOAD_BALANCER, parse_address(EXTERNAL[family]), number),
    )
    packed = [
        tuple(sorted(backend(parse_address(text), 80) for text in some))
        for some in (backends, local)
    ]
    return ServicePort(
        name=ServicePortName("default", name, "", protocol, family),
        frontends=(vip, *outside) if external else (vip,),
        cluster=packed[0],
        local=packed[1],
        on_node=tuple(b for b in packed[0] + packed[1] if format_address(b[:-2]) != REMOTE[family]),
        serving=packed[0] if protocol == Protocol.UDP else (),
        has_endpoints=bool(backends),
        **fields,
    )


def make_table(ports):
    config = ProxyConfig(
        detect_local=DetectLocal(
            prefixes=(parse_prefix("10.244.0.0/24"), parse_prefix("fd44::/64"))
        ),
        service_cidrs=(parse_prefix("10.96.0.0/16"), parse_prefix("fd96::/112")),
    )
    node = NodeFacts("node", tuple(parse_address(text) for text in NODE.values()))
    return service_table(ports, node, config)
