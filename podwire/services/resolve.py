"""The evaluator: what the Service rules do with the first packet of a connection, and why.

It is the reference for every data path (kube-proxy's nftables mode where its modes differ), and
what `podwire services resolve` prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from podwire.net import Address, Protocol, format_address
from podwire.services.model import (
    Backend,
    Family,
    Frontend,
    FrontendKind,
    ServicePort,
    ServicePortName,
    backend_address,
    is_loopback,
)

if TYPE_CHECKING:
    from podwire.services.table import ServiceTable

Verdict: TypeAlias = Literal["dnat", "accept", "reject", "drop"]


@dataclass(frozen=True)
class Packet:
    """The first packet of a connection, as it meets the node.

    `interface` is where it comes in; empty for what a process on the node sends. Ports are 0 for
    protocols without.
    """

    source: Address
    destination: Address
    protocol: Protocol
    destination_port: int = 0
    interface: str = ""


@dataclass(frozen=True)
class Resolution:
    """What becomes of the connection.

    With verdict ``dnat`` it goes to one of `backends`, each as likely as the others (or to the
    one that session affinity remembers). ``accept`` means that the proxy has nothing to say.
    """

    verdict: Verdict
    reason: str
    backends: tuple[Backend, ...] = ()
    masquerade: bool = False
    hairpin: tuple[Backend, ...] = ()
    """Backends that are the client itself: masqueraded, whatever `masquerade` says."""
    delivered: tuple[Backend, ...] = ()
    """Backends that are the node itself: nothing is masqueraded on the way to a local process."""
    service: ServicePortName | None = None
    frontend: Frontend | None = None
    affinity_timeout_s: int = 0

    def masquerades(self, backend: Backend) -> bool:
        """Whether this backend sees an address of the node instead of the client's."""
        return (self.masquerade and backend not in self.delivered) or backend in self.hairpin


def resolve(table: ServiceTable, packet: Packet) -> Resolution:
    """See `ServiceTable.resolve`."""
    if packet.interface and (is_loopback(packet.destination) or is_loopback(packet.source)):
        return Resolution("drop", "only the node itself may use its loopback addresses")
    found = _find(table, packet)
    if found is None:
        return _unclaimed(table, packet)
    frontend, port = found
    name = port.name
    if not _is_admitted(port, frontend, packet.source):
        why = f"{format_address(packet.source)} is outside loadBalancerSourceRanges"
        return Resolution("drop", why, service=name, frontend=frontend)
    backends, masquerade, why = _policy(table, packet, frontend, port)
    if not port.has_endpoints:
        return Resolution("reject", "no usable endpoints", service=name, frontend=frontend)
    if not backends:
        why = "no usable endpoints on this node, and the traffic policy is Local"
        return Resolution("drop", why, service=name, frontend=frontend)
    itself = [b for b in port.on_node if backend_address(b) == packet.source and b in backends]
    delivered = [b for b in port.on_node if packet.interface and _is_own(table, backend_address(b))]
    return Resolution(
        "dnat",
        why,
        backends,
        masquerade,
        tuple(itself),
        tuple(delivered),
        name,
        frontend,
        port.affinity_timeout_s,
    )


def _find(table: ServiceTable, packet: Packet) -> tuple[Frontend, ServicePort] | None:
    """The frontend that the packet addresses, an exact address before a node port."""
    destination, protocol, number = packet.destination, packet.protocol, packet.destination_port
    found = table.frontends.get((destination, protocol, number))
    if found:
        return found
    family = _family(destination)
    port = table.node_ports.get((family, protocol, number))
    if port is None or not _is_own(table, destination):
        return None
    if not table.settings.nodeports[family].serves(destination):
        return None
    return Frontend(FrontendKind.NODE_PORT, b"", number), port


def _is_admitted(port: ServicePort, frontend: Frontend, source: Address) -> bool:
    """Whether source ranges, which guard load balancer addresses only, let the client in."""
    if frontend.kind != FrontendKind.LOAD_BALANCER or port.source_ranges is None:
        return True
    return any(source in prefix for prefix in port.source_ranges)


def _policy(
    table: ServiceTable, packet: Packet, frontend: Frontend, port: ServicePort
) -> tuple[tuple[Backend, ...], bool, str]:
    """Backends, masquerade and why, by the traffic policy for this kind of frontend."""
    config = table.settings.config
    local = port.is_local(frontend.kind)
    if frontend.kind == FrontendKind.CLUSTER_IP:
        masquerade = config.masquerade_all or (
            config.detect_local.exists and not _is_pod(table, packet)
        )
        what = "ClusterIP, policy Local" if local else "ClusterIP"
        return (port.local if local else port.cluster), masquerade, what
    kind = frontend.kind.name.lower().replace("_", " ")
    if not local:
        return port.cluster, True, f"{kind}, policy Cluster"
    if config.detect_local.exists and _is_pod(table, packet):
        return port.cluster, False, f"{kind}, policy Local: pods use all endpoints"
    if _is_own(table, packet.source):
        return port.cluster, True, f"{kind}, policy Local: the node itself uses all endpoints"
    return port.local, False, f"{kind}, policy Local"


def _unclaimed(table: ServiceTable, packet: Packet) -> Resolution:
    """No frontend: refuse what can only be a mistake, leave the rest alone."""
    owner = table.cluster_ips.get(packet.destination)
    if owner:
        return Resolution("reject", f"{owner} does not serve this port on its ClusterIP")
    if any(packet.destination in prefix for prefix in table.settings.service_cidrs):
        return Resolution("drop", "no Service has this address of the service range")
    return Resolution("accept", "not an address of a Service")


def _is_pod(table: ServiceTable, packet: Packet) -> bool:
    """Whether the packet counts as coming from a pod (detect-local)."""
    detect = table.settings.config.detect_local
    if detect.interface.endswith("*"):
        return packet.interface.startswith(detect.interface[:-1])
    if detect.interface:
        return packet.interface == detect.interface
    return any(packet.source in prefix for prefix in detect.prefixes)


def _is_own(table: ServiceTable, address: Address) -> bool:
    return address in table.settings.node.addresses or is_loopback(address)


def _family(address: Address) -> Family:
    return 4 if len(address) == 4 else 6
