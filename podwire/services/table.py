"""What must hold for Services on one node: the table every data path spells, with its evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from podwire.net import Address, Protocol
from podwire.services.model import (
    Family,
    Frontend,
    FrontendKind,
    HealthCheck,
    ServicePort,
    ServicePortName,
    Settings,
)
from podwire.services.resolve import Packet, Resolution, resolve
from podwire.services.shared_map import SharedMap


class ServiceDelta(NamedTuple):
    """From one table to the next: only what changed."""

    ports: Mapping[ServicePortName, tuple[ServicePort | None, ServicePort | None]]
    """Old and new; None where the port is new or gone."""
    settings: bool
    """Whether the settings differ."""


@dataclass(frozen=True)
class ServiceTable:
    """All Services as seen from one node. Versions share what did not change."""

    settings: Settings
    ports: SharedMap[ServicePortName, ServicePort]
    health_checks: Mapping[tuple[str, str], HealthCheck] = field(
        default_factory=dict[tuple[str, str], HealthCheck]
    )
    """By ``(namespace, name)`` of the Service."""
    problems: Mapping[str, str] = field(default_factory=dict[str, str])
    """``Service ns/name`` or ``EndpointSlice ns/name``: what was set aside, and why."""
    without_local: Mapping[tuple[Family, str], int] = field(
        default_factory=dict[tuple[Family, str], int]
    )
    """By family and policy (internal, external): ports with endpoints elsewhere but not here."""

    def delta(self, old: ServiceTable | None) -> ServiceDelta:
        """What changed since `old` (None: the empty table). Costs what it holds."""
        before = old.ports if old else SharedMap[ServicePortName, ServicePort]()
        ports = {name: (was, now) for name, was, now in self.ports.differences(before)}
        return ServiceDelta(ports, old is None or old.settings != self.settings)

    def resolve(self, packet: Packet) -> Resolution:
        """What becomes of a new connection, and why."""
        return resolve(self, packet)

    @cached_property
    def frontends(self) -> Mapping[tuple[Address, Protocol, int], tuple[Frontend, ServicePort]]:
        """Who owns ``(address, protocol, port)``, node ports excepted."""
        return {
            (frontend.address, port.name.protocol, frontend.port): (frontend, port)
            for port in self.ports.values()
            for frontend in port.frontends
            if frontend.address
        }

    @cached_property
    def node_ports(self) -> Mapping[tuple[Family, Protocol, int], ServicePort]:
        """Who owns a node port."""
        return {
            (port.name.family, port.name.protocol, frontend.port): port
            for port in self.ports.values()
            for frontend in port.frontends
            if not frontend.address
        }

    @cached_property
    def cluster_ips(self) -> Mapping[Address, str]:
        """Live ClusterIPs and the ``namespace/name`` of their Services."""
        return {
            frontend.address: f"{name.namespace}/{name.name}"
            for name, port in self.ports.items()
            for frontend in port.frontends
            if frontend.kind == FrontendKind.CLUSTER_IP
        }
