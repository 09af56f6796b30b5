"""Pod CIDRs for nodes, addresses for load balancers, and the end of pods whose node is gone."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

from podwire.lab import tree
from podwire.lab.api.registry import DeleteOptions, Registry
from podwire.lab.api.storage import Event, Key, Record
from podwire.lab.controllers.base import Controller

_NODE_BITS = {4: 24, 6: 64}


class NodeController(Controller):
    """Gives each node one pod CIDR per family, cut from `cluster_cidrs` (/24 and /64)."""

    kinds = ("Node",)

    def __init__(self, registry: Registry, cluster_cidrs: Sequence[str]) -> None:
        super().__init__(registry)
        self._nodes = registry.resource("Node")
        self._pods = registry.resource("Pod")
        self._ranges = [ipaddress.ip_network(cidr) for cidr in cluster_cidrs]
        self._taken: dict[str, str] = {}  # CIDR → node

    def wants(self, event: Event) -> Iterable[Key]:
        if event.resource == self._nodes:
            yield event.record.key

    def reconcile(self, key: Key) -> None:
        node = self.registry.find(self._nodes, *key)
        name = key[1]
        if node is None:
            self._taken = {cidr: owner for cidr, owner in self._taken.items() if owner != name}
            self._end_pods(name)
            return
        given = tree.texts(node.obj, "spec", "podCIDRs")
        if not given:
            given = [self._cut(cluster) for cluster in self._ranges]
            spec = {**tree.mapping(node.obj, "spec"), "podCIDR": given[0], "podCIDRs": given}
            self.registry.amend(self._nodes, key, spec=spec)
        for cidr in given:
            self._taken[cidr] = name

    def _cut(self, cluster: ipaddress.IPv4Network | ipaddress.IPv6Network) -> str:
        size = max(_NODE_BITS[cluster.version], cluster.prefixlen)
        for subnet in cluster.subnets(new_prefix=size):
            if str(subnet) not in self._taken:
                return str(subnet)
        raise RuntimeError(f"the cluster CIDR {cluster} has no room for another node")

    def _end_pods(self, node: str) -> None:
        for pod in list(self.registry.storage.collection(self._pods).records.values()):
            if tree.text(pod.obj, "spec", "nodeName") == node:
                self.delete(self._pods, pod.key, DeleteOptions(grace_period_s=0))


class LoadBalancerController(Controller):
    """Gives Services of type LoadBalancer an address per family from `ranges`.

    A Service with a loadBalancerClass belongs to somebody else.
    """

    kinds = ("Service",)

    def __init__(self, registry: Registry, ranges: Sequence[str]) -> None:
        super().__init__(registry)
        self._services = registry.resource("Service")
        networks = [ipaddress.ip_network(cidr) for cidr in ranges]
        self._ranges = {f"IPv{network.version}": network for network in networks}
        self._taken: dict[str, Key] = {}
        self._had: dict[Key, list[str]] = {}

    def wants(self, event: Event) -> Iterable[Key]:
        if event.resource != self._services:
            return
        kinds = [tree.text(r.obj, "spec", "type") for r in (event.record, event.old) if r]
        if "LoadBalancer" in kinds:
            yield event.record.key

    def reconcile(self, key: Key) -> None:
        service = self.registry.find(self._services, *key)
        wanted = (
            service is not None
            and tree.text(service.obj, "spec", "type") == "LoadBalancer"
            and not tree.text(service.obj, "spec", "loadBalancerClass")
        )
        addresses = self._addresses(service, key) if service and wanted else []
        for address in self._had.pop(key, []):
            if address not in addresses:
                del self._taken[address]
        if addresses:
            self._had[key] = addresses
            self._taken.update(dict.fromkeys(addresses, key))
        if service is None or (not wanted and tree.text(service.obj, "spec", "loadBalancerClass")):
            return
        ingress = [{"ip": address, "ipMode": "VIP"} for address in addresses]
        balancer = {"ingress": ingress} if ingress else {}
        status = {**tree.mapping(service.obj, "status"), "loadBalancer": balancer}
        self.registry.amend(self._services, key, status=status)

    def _addresses(self, service: Record, key: Key) -> list[str]:
        """The addresses it has, as far as they still fit, and new ones."""
        spec = tree.mapping(service.obj, "spec")
        had, asked = self._had.get(key, []), tree.text(spec, "loadBalancerIP")
        out: list[str] = []
        for family in tree.texts(spec, "ipFamilies"):
            network = self._ranges.get(family)
            if network is None:
                continue
            mine = [one for one in had if ipaddress.ip_address(one) in network]
            if asked and self._may_have(asked, network, key):
                out.append(asked)
            elif mine and not asked:
                out.append(mine[0])
            elif free := next((str(a) for a in network.hosts() if str(a) not in self._taken), ""):
                out.append(free)
        return out

    def _may_have(
        self, asked: str, network: ipaddress.IPv4Network | ipaddress.IPv6Network, key: Key
    ) -> bool:
        try:
            inside = ipaddress.ip_address(asked) in network
        except ValueError:
            return False
        return inside and self._taken.get(asked, key) == key
