"""Which UDP connection-table entries point nowhere any more.

A UDP flow never ends by itself while its client sends, so an entry that leads to an endpoint which
no longer serves would blackhole that client for good. TCP and SCTP notice by themselves. Policies
and topology make no flow stale, and neither does an endpoint that terminates but still serves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from podwire.net import Address, Protocol
from podwire.services.model import (
    Backend,
    Family,
    NodePortScope,
    ServicePort,
    Settings,
    backend,
    is_loopback,
)


class Flow(NamedTuple):
    """A UDP entry: what the client addressed, and who answers it."""

    destination: Address
    destination_port: int
    reply_source: Address
    reply_source_port: int


class StaleFlows:
    """Tells stale entries; made from the ports that changed, so that only their flows are judged.

    `frontends` maps the addresses and ports concerned to the backends whose flows stay, and
    `node_ports` does so for any of the node's own addresses in scope: a data path that can filter
    in the kernel asks for just these.
    """

    def __init__(
        self,
        changes: Iterable[tuple[ServicePort | None, ServicePort | None]],
        settings: Settings,
    ) -> None:
        self.frontends: dict[tuple[Address, int], frozenset[Backend]] = {}
        self.node_ports: dict[tuple[Family, int], frozenset[Backend]] = {}
        self._own = frozenset(settings.node.addresses)
        self._scopes: Mapping[Family, NodePortScope] = settings.nodeports
        udp = [pair for pair in changes if any(p and _is_udp(p) for p in pair)]
        for old, _ in udp:
            self._enter(old, frozenset())
        for _, new in udp:
            self._enter(new, frozenset(new.serving) if new else frozenset())

    def __bool__(self) -> bool:
        return bool(self.frontends or self.node_ports)

    def __contains__(self, flow: Flow) -> bool:
        """Whether the entry is stale."""
        serving = self.frontends.get((flow.destination, flow.destination_port))
        if serving is None:
            serving = self._serving_node_port(flow)
        if serving is None:
            return False
        return backend(flow.reply_source, flow.reply_source_port) not in serving

    def _enter(self, port: ServicePort | None, serving: frozenset[Backend]) -> None:
        if port is None:
            return
        for frontend in port.frontends:
            if frontend.address:
                self.frontends[frontend.address, frontend.port] = serving
            else:
                self.node_ports[port.name.family, frontend.port] = serving

    def _serving_node_port(self, flow: Flow) -> frozenset[Backend] | None:
        """A node port is one of ours only at an address that serves node ports."""
        family: Family = 4 if len(flow.destination) == 4 else 6
        if flow.destination not in self._own and not is_loopback(flow.destination):
            return None
        if not self._scopes[family].serves(flow.destination):
            return None
        return self.node_ports.get((family, flow.destination_port))


def _is_udp(port: ServicePort) -> bool:
    return port.name.protocol == Protocol.UDP
