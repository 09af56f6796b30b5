"""What a node must know about the others: where their pods are, and what leaves the cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

from podwire.net import Address, Prefix

Routing: TypeAlias = Literal["direct", "vxlan"]

TunnelProtocol: TypeAlias = Literal["vxlan", "geneve"]

OVERLAY_DEVICES: Mapping[TunnelProtocol, str] = {
    "vxlan": "podwire.vxlan",
    "geneve": "podwire.geneve",
}
OVERLAY_PORTS: Mapping[TunnelProtocol, int] = {"vxlan": 8472, "geneve": 6081}
OVERLAY_ID = 4096
"""The VNI of packets that say nothing about who sent them (flannel's and Cilium's are 1 and 2)."""

# Outer IP; then UDP, VXLAN (RFC 7348) or Geneve without options (RFC 8926), and inner Ethernet.
_OVERHEAD = {4: 20 + 8 + 8 + 14, 16: 40 + 8 + 8 + 14}


class NodeRoute(NamedTuple):
    """The pods in `prefix` are behind `gateway`: another node's address, or its tunnel address.

    On the overlay, `remote` is the underlay's address of that node.
    """

    prefix: Prefix
    gateway: Address
    remote: Address = b""


class Neighbour(NamedTuple):
    """The tunnel address `address` of another node has this MAC on the overlay's device."""

    address: Address
    mac: bytes


class Tunnel(NamedTuple):
    """The overlay's device with this MAC is the one of the node `remote`."""

    mac: bytes
    remote: Address


class Way(NamedTuple):
    """What happens to a packet that this node routes.

    `node` is who gets it ("" for the world), `gateway` whom it is handed to (b"": this machine's
    other routes decide), `masquerade` whether it leaves with this node's address.
    """

    node: str
    gateway: Address
    overlay: bool
    masquerade: bool
    reason: str


@dataclass(frozen=True)
class RouteTable:
    """All that one node needs. Empty until the node's own object is known.

    `tunnel_addresses` (one per family) and `tunnel_mac` are this node's own inside the overlay of
    `protocol`, `underlay` is its address there and for direct routing. `cluster_prefixes` are what
    pods reach with their own address, `pod_prefixes` this node's own pods, `node_addresses` are all
    nodes'. `owners` says whose a prefix is.
    """

    node: str
    routing: Routing
    underlay: Address = b""
    routes: frozenset[NodeRoute] = frozenset()
    neighbours: frozenset[Neighbour] = frozenset()
    fdb: frozenset[Tunnel] = frozenset()
    tunnel_mac: bytes = b""
    tunnel_addresses: frozenset[Address] = frozenset()
    pod_prefixes: frozenset[Prefix] = frozenset()
    cluster_prefixes: frozenset[Prefix] = frozenset()
    node_addresses: frozenset[Address] = frozenset()
    owners: Mapping[Prefix, str] = field(default_factory=lambda: MappingProxyType({}))
    problems: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    protocol: TunnelProtocol = "vxlan"

    @property
    def overhead(self) -> int:
        """Bytes that the way to other nodes takes from the underlay's MTU."""
        return _OVERHEAD.get(len(self.underlay), 0) if self.routing == "vxlan" else 0

    def way(self, source: Address, destination: Address) -> Way:
        """What this node does with a packet from `source` to `destination` (after DNAT)."""
        own = _longest(self.pod_prefixes, destination)
        prefix = self._by_length.find(destination)
        if own and (prefix is None or prefix.length <= own.length):
            return Way(self.node, b"", False, False, f"{own} is this node's own")
        if prefix is not None:
            node = self.owners[prefix]
            overlay = self.routing == "vxlan"
            reason = f"{prefix} are the pods of {node}"
            return Way(node, self._gateways[prefix], overlay, False, reason)
        if not _longest(self.pod_prefixes, source):
            return Way("", b"", False, False, "not from a pod of this node")
        near = _longest(self.cluster_prefixes, destination)
        if near:
            return Way("", b"", False, False, f"{near} is reached without masquerading")
        return Way("", b"", False, True, "leaves the cluster")

    @cached_property
    def _gateways(self) -> dict[Prefix, Address]:
        return {route.prefix: route.gateway for route in self.routes}

    @cached_property
    def _by_length(self) -> _PrefixIndex:
        return _PrefixIndex(self._gateways)


class _PrefixIndex:
    """Longest-prefix match in as many look-ups as there are different lengths."""

    def __init__(self, prefixes: Iterable[Prefix]) -> None:
        self._prefixes = frozenset(prefixes)
        lengths = {(len(p.address), p.length) for p in self._prefixes}
        self._lengths = sorted(lengths, key=lambda pair: -pair[1])

    def find(self, address: Address) -> Prefix | None:
        number = int.from_bytes(address, "big")
        for size, length in self._lengths:
            if size == len(address):
                host = size * 8 - length
                candidate = Prefix((number >> host << host).to_bytes(size, "big"), length)
                if candidate in self._prefixes:
                    return candidate
        return None


def _longest(prefixes: Iterable[Prefix], address: Address) -> Prefix | None:
    return max((p for p in prefixes if address in p), key=lambda p: p.length, default=None)
