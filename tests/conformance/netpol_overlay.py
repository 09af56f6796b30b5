"""The way between the nodes of a case by VXLAN, as an agent with `--routing vxlan` makes it.

The pod CIDRs of a node are the networks of the pods that it has had.
"""

from __future__ import annotations

from collections import defaultdict

import msgspec

from podwire.datapath import Part
from podwire.datapath.ebpf.nodes import NodesPart as EbpfNodesPart
from podwire.datapath.ebpf.overlay import OverlayPart
from podwire.datapath.ebpf.policy import PolicyPart as EbpfPolicyPart
from podwire.datapath.iptables.nodes import NodesPart as IptablesNodesPart
from podwire.datapath.iptables.policy import PolicyPart as IptablesPolicyPart
from podwire.datapath.nftables.nodes import NodesPart as NftablesNodesPart
from podwire.kube.objects import Node
from podwire.kube.store import Store
from podwire.net import Prefix
from podwire.nodes import RouteCompiler, RouteTable
from podwire.policy import PolicyTable
from podwire.wiring.routes import NodeRoutes
from tests.conformance.netpol_fabric import pod_network
from tests.conformance.netpol_world import World


class Tunnels:
    """One node's device and routes, and what its data path knows of the other nodes."""

    def __init__(self, netns_fd: int, policy: Part[PolicyTable], *, masquerade: bool) -> None:
        self.parts: list[Part[RouteTable]] = []
        self.routes = NodeRoutes(netns_fd)
        if isinstance(policy, EbpfPolicyPart):
            programs = policy._programs
            self.routes = NodeRoutes(netns_fd, guard=programs.sync_links)
            self.parts += [OverlayPart(programs=programs)]
            if masquerade:
                self.parts += [EbpfNodesPart(programs)]
        elif isinstance(policy, IptablesPolicyPart):
            flavour = policy.status()["flavour"]
            self.parts += [IptablesNodesPart(netns_fd, flavour, masquerade=masquerade)]
        else:
            self.parts += [NftablesNodesPart(netns_fd, masquerade=masquerade)]
        for part in self.parts:
            part.start()

    def apply(self, compiler: RouteCompiler, nodes: Store) -> None:
        table = compiler.update(nodes.take())
        for part in (*self.parts, self.routes):
            part.apply(table)
        problems = self.routes.status()["problems"]
        assert not problems, problems

    def verify(self) -> list[str]:
        return [repair for part in (*self.parts, self.routes) for repair in part.verify()]

    def close(self) -> None:
        self.routes.close()
        for part in self.parts:
            if isinstance(part, NftablesNodesPart):
                part.close()


class NodeObjects:
    """The Nodes of a world as the API would show them, with their pod CIDRs."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._networks: dict[str, dict[Prefix, None]] = defaultdict(dict)
        self._stores = {name: Store() for name in world.nodes}
        self._compilers = {name: RouteCompiler(name, "vxlan") for name in world.nodes}

    def update(self, tunnels: dict[str, Tunnels]) -> None:
        """Bring all nodes' tables and kernels to where the world is."""
        for pod in self._world.present().values():
            for text in pod["ips"]:
                self._networks[pod["node"]][pod_network(str(text))] = None
        for name, store in self._stores.items():
            for node, ips in self._world.nodes.items():
                store.put(self._node(node, ips))
            tunnels[name].apply(self._compilers[name], store)

    def _node(self, name: str, ips: list[str]) -> Node:
        cidrs = [str(prefix) for prefix in self._networks[name]]
        addresses = [{"type": "InternalIP", "address": ip} for ip in ips]
        source = {
            "metadata": {"name": name},
            "spec": {"podCIDRs": cidrs},
            "status": {"addresses": addresses},
        }
        return msgspec.convert(source, Node)
