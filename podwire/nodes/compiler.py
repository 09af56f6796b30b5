"""Node objects → RouteTable.

Direct: the other nodes' pod CIDRs by their InternalIP of the same family; the nodes must share a
link. Overlay: each node has one tunnel address per family, the network address of its pod CIDR
(which no pool hands out), and a MAC derived from its name. So every entry follows from the Node
object alone, and a node that returns needs no learning.

Source: Kubernetes API, Node.spec.podCIDRs and Node.status.addresses; flannel's vxlan backend.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from podwire.errors import InvalidObject
from podwire.kube.objects import Node
from podwire.kube.store import ChangeSet
from podwire.net import Address, Prefix, host_prefix, parse_address, parse_prefix
from podwire.nodes.table import Neighbour, NodeRoute, RouteTable, Routing, Tunnel, TunnelProtocol


class _Facts(NamedTuple):
    """What counts of a Node: its first InternalIP of each family and its pod CIDRs."""

    addresses: tuple[Address, ...] = ()
    prefixes: tuple[Prefix, ...] = ()
    problems: tuple[str, ...] = ()

    def address(self, size: int) -> Address:
        return next((a for a in self.addresses if len(a) == size), b"")


class RouteCompiler:
    """Keeps the facts of all nodes; each `update` gives the table that follows from them.

    `no_masquerade` are further destinations that pods reach with their own address (as
    ip-masq-agent's nonMasqueradeCIDRs). `masquerade_to_nodes` says whether nodes see a foreign pod
    under its node's address; by default they do with VXLAN, where the underlay between the nodes
    does not know pod addresses, and do not with direct routing. `protocol` is the overlay's, where
    the routing is "vxlan".
    """

    def __init__(
        self,
        node_name: str,
        routing: Routing,
        *,
        no_masquerade: Iterable[Prefix] = (),
        masquerade_to_nodes: bool | None = None,
        protocol: TunnelProtocol = "vxlan",
    ) -> None:
        self._node = node_name
        self._routing: Routing = routing
        self._protocol: TunnelProtocol = protocol
        self._no_masquerade = frozenset(no_masquerade)
        self._masquerade_to_nodes = (
            routing == "vxlan" if masquerade_to_nodes is None else masquerade_to_nodes
        )
        self._facts: dict[str, _Facts] = {}
        self._table = RouteTable(node_name, routing, protocol=protocol)

    def update(self, changes: ChangeSet) -> RouteTable:
        """The new table; the same object as before when nothing that counts has changed."""
        changed = False
        for (_, name), change in changes.of(Node).items():
            facts = _read(change.new) if change.new is not None else None
            if facts == self._facts.get(name):
                continue
            changed = True
            if facts is None:
                del self._facts[name]
            else:
                self._facts[name] = facts
        if changed:
            self._table = self._compile()
        return self._table

    def _compile(self) -> RouteTable:
        own = self._facts.get(self._node, _Facts())
        owners, problems = self._owners(own)
        underlay = own.addresses[0] if own.addresses else b""
        routes: set[NodeRoute] = set()
        neighbours: set[Neighbour] = set()
        fdb: set[Tunnel] = set()
        others = (name for name in self._facts if name != self._node and underlay)
        for name in others:
            peer = self._facts[name]
            prefixes = [prefix for prefix in peer.prefixes if owners[prefix] == name]
            if self._routing == "direct":
                routes |= _direct(prefixes, own, peer, name, problems)
                continue
            remote = peer.address(len(underlay))
            if not remote:
                problems[name] = f"Node {name}: no InternalIP of the family this node's tunnel uses"
                continue
            mac = tunnel_mac(name)
            fdb.add(Tunnel(mac, remote))
            for prefix in prefixes:
                gateway = _tunnel_address(prefixes, len(prefix.address))
                routes.add(NodeRoute(prefix, gateway, remote))
                neighbours.add(Neighbour(gateway, mac))
        own_prefixes = [prefix for prefix in own.prefixes if owners[prefix] == self._node]
        vxlan = self._routing == "vxlan" and bool(underlay)
        return RouteTable(
            self._node,
            self._routing,
            underlay,
            frozenset(routes),
            frozenset(neighbours),
            frozenset(fdb),
            tunnel_mac(self._node) if vxlan else b"",
            frozenset(_tunnel_addresses(own_prefixes)) if vxlan else frozenset(),
            frozenset(own_prefixes),
            self._cluster_prefixes(owners),
            self._node_addresses(),
            MappingProxyType(owners),
            MappingProxyType(problems),
            self._protocol,
        )

    def _owners(self, own: _Facts) -> tuple[dict[Prefix, str], dict[str, str]]:
        """Whose each pod CIDR is: one that two nodes claim belongs to the first by name."""
        owners: dict[Prefix, str] = {}
        problems: dict[str, str] = {}
        for name in sorted(self._facts):
            facts = self._facts[name]
            if facts.problems:
                problems[name] = "; ".join(facts.problems)
            for prefix in facts.prefixes:
                owner = owners.setdefault(prefix, name)
                if owner != name:
                    problems[name] = f"Node {name}: pod CIDR {prefix} is taken by node {owner}"
        if self._facts and not own.addresses:
            problems[self._node] = f"Node {self._node}: no InternalIP: no routes to other nodes"
        return owners, problems

    def _cluster_prefixes(self, owners: Mapping[Prefix, str]) -> frozenset[Prefix]:
        prefixes = self._no_masquerade | owners.keys()
        if not self._masquerade_to_nodes:
            prefixes |= set(map(host_prefix, self._node_addresses()))
        return frozenset(prefixes)

    def _node_addresses(self) -> frozenset[Address]:
        return frozenset(a for facts in self._facts.values() for a in facts.addresses)


def tunnel_mac(node: str) -> bytes:
    """The MAC of a node's device: locally administered, derived from the name alone."""
    return b"\x0a" + hashlib.sha1(f"podwire.vxlan {node}".encode()).digest()[:5]


def _tunnel_address(prefixes: Iterable[Prefix], size: int) -> Address:
    """The network address of the first pod CIDR of the family."""
    return next(prefix.address for prefix in prefixes if len(prefix.address) == size)


def _tunnel_addresses(prefixes: list[Prefix]) -> set[Address]:
    return {_tunnel_address(prefixes, len(prefix.address)) for prefix in prefixes}


def _direct(
    prefixes: list[Prefix], own: _Facts, peer: _Facts, name: str, problems: dict[str, str]
) -> set[NodeRoute]:
    routes: set[NodeRoute] = set()
    for prefix in prefixes:
        size = len(prefix.address)
        gateway = peer.address(size)
        if gateway and own.address(size):
            routes.add(NodeRoute(prefix, gateway))
        else:
            lacking = name if own.address(size) else "this node"
            problems[name] = f"Node {name}: no way to {prefix}: {lacking} has no such InternalIP"
    return routes


def _read(node: Node) -> _Facts:
    problems: list[str] = []
    addresses: list[Address] = []
    for entry in node.status.addresses:
        if entry.type != "InternalIP":
            continue
        try:
            address = parse_address(entry.address)
        except InvalidObject as error:
            problems.append(f"Node {node.metadata.name} status.addresses: {error}")
            continue
        if len(address) not in map(len, addresses):
            addresses.append(address)
    prefixes: list[Prefix] = []
    for text in node.spec.pod_cidrs or filter(None, [node.spec.pod_cidr]):
        try:
            prefixes.append(parse_prefix(text))
        except InvalidObject as error:
            problems.append(f"Node {node.metadata.name} spec.podCIDRs: {error}")
    return _Facts(tuple(addresses), tuple(dict.fromkeys(prefixes)), tuple(problems))
