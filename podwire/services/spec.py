"""A Service object's own words: its ports, and the addresses at which it wants to be served."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import msgspec

from podwire.errors import InvalidObject
from podwire.kube.objects import Service
from podwire.kube.objects import ServicePort as ApiPort
from podwire.net import Address, Prefix, disjoint, host_prefix, parse_address, parse_prefix
from podwire.services.endpoints import PROTOCOLS
from podwire.services.model import (
    Algorithm,
    Family,
    Frontend,
    FrontendKind,
    ServicePortName,
    Settings,
)

ALGORITHM = "service.podwire.io/lb-algorithm"
_PROXY_NAME = "service.kubernetes.io/service-proxy-name"
_DEFAULT_AFFINITY_S = 10800
_MAX_AFFINITY_S = 86400


class PortSpec(msgspec.Struct, frozen=True, gc=False):
    """One port in one family, before endpoints are chosen and contested addresses decided."""

    name: ServicePortName
    created: str
    frontends: tuple[Frontend, ...]
    internal_local: bool
    external_local: bool
    affinity_timeout_s: int
    source_ranges: tuple[Prefix, ...] | None
    health_check_node_port: int
    algorithm: Algorithm | Literal[""]


class _Problems(list[str]):
    """What was set aside of a Service, each sentence once."""

    def add(self, text: str) -> None:
        if text not in self:
            self.append(text)

    def __str__(self) -> str:
        return "; ".join(self)


def _is_served(service: Service) -> bool:
    """Whether a proxy has anything to do with the Service at all."""
    spec = service.spec
    return (
        spec.type != "ExternalName"
        and spec.cluster_ip not in ("", "None")
        and _PROXY_NAME not in service.metadata.labels
    )


def read(service: Service, settings: Settings) -> tuple[tuple[PortSpec, ...], str]:
    """The Service's ports, and what of it was set aside (empty: nothing)."""
    if not _is_served(service):
        return (), ""
    problems = _Problems()
    ports = _valid_ports(service, problems)
    affinity_s = _affinity(service, problems)
    out: list[PortSpec] = []
    for family, cluster_ip in _cluster_ips(service, problems):
        vips = _load_balancer_ips(service, family, problems)
        external_ips = _external_ips(service, family, settings, problems)
        ranges = _source_ranges(service, family, vips, settings, problems)
        for port in ports:
            name = ServicePortName(
                service.metadata.namespace,
                service.metadata.name,
                port.name,
                PROTOCOLS[port.protocol],
                family,
            )
            out.append(
                PortSpec(
                    name,
                    service.metadata.creation_timestamp,
                    _frontends(port, cluster_ip, vips, external_ips),
                    service.spec.internal_traffic_policy == "Local",
                    service.spec.external_traffic_policy == "Local",
                    affinity_s,
                    ranges if vips else None,
                    _health_check_port(service, problems),
                    _algorithm(service, problems),
                )
            )
    return tuple(out), str(problems)


def _frontends(
    port: ApiPort, cluster_ip: Address, vips: list[Address], external_ips: list[Address]
) -> tuple[Frontend, ...]:
    """Where the port is addressed; of an address that is named twice the first kind counts."""
    frontends = {cluster_ip: Frontend(FrontendKind.CLUSTER_IP, cluster_ip, port.port)}
    for address in vips:
        frontends.setdefault(address, Frontend(FrontendKind.LOAD_BALANCER, address, port.port))
    for address in external_ips:
        frontends.setdefault(address, Frontend(FrontendKind.EXTERNAL_IP, address, port.port))
    if port.node_port:
        frontends[b""] = Frontend(FrontendKind.NODE_PORT, b"", port.node_port)
    return tuple(frontends.values())


def _valid_ports(service: Service, problems: _Problems) -> list[ApiPort]:
    ports: list[ApiPort] = []
    seen: set[tuple[str, str]] = set()
    for port in service.spec.ports:
        label = f"port {port.name or port.port}"
        if port.protocol not in PROTOCOLS:
            problems.add(f"{label} set aside: protocol {port.protocol!r} is not served")
        elif not 0 < port.port < 65536:
            problems.add(f"{label} set aside: {port.port} is not a port number")
        elif (port.name, port.protocol) in seen:
            problems.add(f"{label} set aside: its name is taken by another port")
        elif not 0 <= port.node_port < 65536:
            problems.add(f"{label}: node port {port.node_port} is not a port number")
            ports.append(msgspec.structs.replace(port, node_port=0))
            seen.add((port.name, port.protocol))
        else:
            ports.append(port)
            seen.add((port.name, port.protocol))
    return ports


def _cluster_ips(service: Service, problems: _Problems) -> list[tuple[Family, Address]]:
    """The ClusterIP of each family."""
    spec = service.spec
    found: dict[Family, Address] = {}
    for address in _addresses(spec.cluster_ips or [spec.cluster_ip], "clusterIP", problems):
        found.setdefault(_family(address), address)
    return sorted(found.items())


def _load_balancer_ips(service: Service, family: Family, problems: _Problems) -> list[Address]:
    ingress = service.status.load_balancer.ingress
    if not ingress:
        return []
    texts = [entry.ip for entry in ingress if entry.ip and entry.ip_mode in (None, "", "VIP")]
    return _of_family(family, _addresses(texts, "load balancer IP", problems))


def _external_ips(
    service: Service, family: Family, settings: Settings, problems: _Problems
) -> list[Address]:
    """externalIPs, as far as the operator lets Services choose them (CVE-2020-8554)."""
    texts, allowed = service.spec.external_ips, settings.config.external_ips
    out: list[Address] = []
    for address in _of_family(family, _addresses(texts, "externalIP", problems)) if texts else ():
        if allowed is None or any(address in prefix for prefix in allowed):
            out.append(address)
        else:
            problems.add("externalIPs outside the allowed ranges set aside")
    return out


def _source_ranges(
    service: Service,
    family: Family,
    vips: Sequence[Address],
    settings: Settings,
    problems: _Problems,
) -> tuple[Prefix, ...] | None:
    """Who may use the load balancer addresses; None is everybody.

    A range of size zero means no restriction. A list in which nothing can be read shuts everybody
    out rather than letting everybody in. Where the node itself may, so may the load balancer
    addresses: a node that holds one uses it as its source.
    """
    ranges = service.spec.load_balancer_source_ranges
    if not ranges:
        return None
    prefixes, bad = parse_prefixes(ranges)
    if bad:
        problems.add(f"loadBalancerSourceRanges set aside: {bad}")
    mine = [prefix for prefix in prefixes if _family(prefix.address) == family]
    if any(prefix.length == 0 for prefix in mine) or not (mine or (bad and not prefixes)):
        return None
    internal = settings.node.internal_ip(family)
    if internal and any(internal in prefix for prefix in mine):
        mine += map(host_prefix, vips)
    return disjoint(mine)


def _affinity(service: Service, problems: _Problems) -> int:
    if service.spec.session_affinity != "ClientIP":
        return 0
    config = service.spec.session_affinity_config
    timeout = config.client_ip.timeout_seconds if config and config.client_ip else None
    if timeout is None:
        return _DEFAULT_AFFINITY_S
    if not 0 < timeout <= _MAX_AFFINITY_S:
        problems.add(f"session affinity of {timeout} s taken as {_DEFAULT_AFFINITY_S} s")
        return _DEFAULT_AFFINITY_S
    return timeout


def _algorithm(service: Service, problems: _Problems) -> Algorithm | Literal[""]:
    text = service.metadata.annotations.get(ALGORITHM, "")
    if not text:
        return ""
    for known in get_args(Algorithm):
        if text == known:
            return known
    problems.add(f"annotation {ALGORITHM}: {text!r} is neither random nor maglev")
    return ""


def _health_check_port(service: Service, problems: _Problems) -> int:
    spec = service.spec
    if spec.type != "LoadBalancer" or spec.external_traffic_policy != "Local":
        return 0
    if not 0 <= spec.health_check_node_port < 65536:
        problems.add(f"healthCheckNodePort {spec.health_check_node_port} is not a port number")
        return 0
    return spec.health_check_node_port


def _addresses(texts: Iterable[str], what: str, problems: _Problems) -> list[Address]:
    out: list[Address] = []
    for text in texts:
        if text == "":
            continue
        try:
            address = parse_address(text)
        except InvalidObject:
            problems.add(f"{what} {text!r} is not an address")
            continue
        if _is_impossible(address):
            problems.add(f"{what} {text!r} is not an address to serve on")
        else:
            out.append(address)
    return out


def _is_impossible(address: Address) -> bool:
    """Loopback and unspecified addresses: a Service must not take the node's own traffic."""
    if len(address) == 4:
        return address[0] in (0, 127)
    return address[:15] == bytes(15) and address[15] < 2


def _family(address: Address) -> Family:
    return 4 if len(address) == 4 else 6


def _of_family(family: Family, addresses: Iterable[Address]) -> list[Address]:
    return [address for address in addresses if _family(address) == family]


def parse_prefixes(texts: Iterable[str]) -> tuple[list[Prefix], str]:
    """The CIDRs among `texts`, and the others as one text."""
    prefixes: list[Prefix] = []
    bad: list[str] = []
    for text in texts:
        try:
            prefixes.append(parse_prefix(text))
        except InvalidObject:
            bad.append(repr(text))
    return prefixes, ", ".join(bad)
