"""The way between the nodes of a case by VXLAN, as an agent with `--routing vxlan` makes it.

The pod CIDRs of a node are the networks of the pods that it has had.
"""

from __future__ import annotations

from collections import defaultdict

import msgspec

from podwire.datapath.ebpf.overlay import OverlayPart
from podwire.datapath.ebpf.policy import PolicyPart as EbpfPolicyPart
from podwire.kube.objects import Node
from podwire.kube.store import Store
from podwire.net import Prefix
from podwire.nodes import RouteCompiler
from podwire.wiring.routes import NodeRoutes
from tests.conformance.netpol_fabric import pod_network
from tests.conformance.netpol_world import World


class Tunnels:
    """One node's device and routes and, on eBPF, what the programs know of them."""

    def __init__(self, netns_fd: int, policy: object) -> None:
        self._overlay: OverlayPart | None = None
        if isinstance(policy, EbpfPolicyPart):
            self._overlay = OverlayPart(policy._programs)
            self._overlay.start()
            self._routes = NodeRoutes(netns_fd, guard=policy._programs.sync_links)
        else:
            self._routes = NodeRoutes(netns_fd)

    def apply(self, compiler: RouteCompiler, nodes: Store) -> None:
        table = compiler.update(nodes.take())
        self._routes.apply(table)
        if self._overlay is not None:
            self._overlay.apply(table)
        problems = self._routes.status()["problems"]
        assert not problems, problems

    def close(self) -> None:
        self._routes.close()


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
