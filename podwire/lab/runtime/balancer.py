"""The lab's load balancer: routes for the addresses of Services of type LoadBalancer.

As routers in front of a cluster do (or a cloud's balancer), the underlay's router sends a balancer
address to all nodes, by connection; for ``externalTrafficPolicy: Local`` only to nodes that have
an endpoint, which a real balancer learns from the health check node port.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping

from podwire.kernel import link, netns, route
from podwire.kernel.netlink import NetlinkSocket
from podwire.kernel.route import NextHop, Route
from podwire.kube.labels import SERVICE_NAME
from podwire.kube.objects import EndpointSlice, Service
from podwire.lab.state import LabDir, Node
from podwire.net import Address, host_prefix, parse_address


def wanted(
    services: Iterable[Service], slices: Iterable[EndpointSlice], nodes: Mapping[str, Node]
) -> dict[Address, tuple[Address, ...]]:
    """The nodes to which each balancer address goes, as addresses of the same family. Pure."""
    local: dict[tuple[str, str], set[str]] = {}
    for one in slices:
        key = (one.metadata.namespace, one.metadata.labels.get(SERVICE_NAME, ""))
        for endpoint in one.endpoints or ():
            if endpoint.node_name and endpoint.conditions.ready is not False:
                local.setdefault(key, set()).add(endpoint.node_name)
    found: dict[Address, tuple[Address, ...]] = {}
    for service in services:
        chosen = list(nodes.values())
        if service.spec.external_traffic_policy == "Local":
            chosen = [node for node in chosen if node.name in local.get(service.key, ())]
        for ingress in service.status.load_balancer.ingress:
            if not ingress.ip:
                continue
            address = parse_address(ingress.ip)
            gateways = (parse_address(text) for node in chosen for text in node.addresses)
            same = tuple(sorted(g for g in gateways if len(g) == len(address)))
            if same:
                found[address] = same
    return found


class Balancer:
    """Keeps the router at what is wanted."""

    def __init__(self, lab: LabDir) -> None:
        fd = netns.open_path(lab.netns("underlay"))
        try:
            self._socket = NetlinkSocket(netns_fd=fd)
        finally:
            os.close(fd)
        bridge = link.find(self._socket, "nodes")
        self._bridge = bridge.index if bridge else 0  # a VPC has none: by the nodes' own routes
        self._present: dict[Address, tuple[Address, ...]] = {}
        for known in route.dump(self._socket, protocol=route.PROTOCOL_STATIC):
            self._socket.run(route.delete(known).tolerating(errno.ESRCH))

    def apply(self, table: Mapping[Address, tuple[Address, ...]]) -> None:
        """Change the routes that differ. Raises KernelError."""
        for address in set(self._present) - set(table):
            self._socket.run(route.delete(self._route(address, ())).tolerating(errno.ESRCH))
            del self._present[address]
        for address, gateways in table.items():
            if self._present.get(address) == gateways:
                continue
            if address in self._present and len(address) == 16:
                # replacing an IPv6 multipath route changes one next hop only
                self._socket.run(route.delete(self._route(address, ())).tolerating(errno.ESRCH))
            self._socket.run(route.add(self._route(address, gateways), replace=True))
            self._present[address] = gateways

    def _route(self, address: Address, gateways: tuple[Address, ...]) -> Route:
        hops = tuple(NextHop(gateway, self._bridge, 1) for gateway in gateways)
        prefix = host_prefix(address)
        return Route(prefix, protocol=route.PROTOCOL_STATIC, nexthops=hops)
