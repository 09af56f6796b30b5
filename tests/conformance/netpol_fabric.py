"""Nodes, pods and outside hosts as network namespaces, kept in step with a World.

Every node has a bridge with its pods' links, and br_netfilter on; nodes and outside hosts share one
segment. With an overlay, the ways from node to pods of other nodes are somebody else's. Namespaces
are anonymous and end with the process. All neighbours are known for good: the kernel's table of
those that must be found is one for all namespaces of the machine, and small.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from podwire.kernel import address, bridge, link, neighbour, netns, route, sysctl
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.link import End
from podwire.kernel.neighbour import Neighbour
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import Address, Prefix, parse_address
from podwire.policy import Attachment
from tests.conformance.netpol_world import World

BRIDGE = "cni0"
_POD_LENGTH = {4: 24, 16: 64}
_NODE_SYSCTLS = {
    "net.ipv4.ip_forward": 1,
    "net.ipv6.conf.all.forwarding": 1,
    "net.ipv4.conf.all.rp_filter": 0,
    "net.ipv4.conf.default.rp_filter": 0,
    "net.bridge.bridge-nf-call-iptables": 1,
    "net.bridge.bridge-nf-call-ip6tables": 1,
}


@dataclass
class Place:
    """A namespace and what is known about it."""

    fd: int
    sock: NetlinkSocket
    addresses: tuple[Address, ...] = ()
    node: str = ""
    link: str = ""
    mac: bytes = b""
    bridge_mac: bytes = b""
    neighbours: set[Address] = field(default_factory=set)

    def index(self, name: str) -> int:
        found = link.find(self.sock, name)
        assert found is not None, name
        return found.index

    def close(self) -> None:
        self.sock.close()
        os.close(self.fd)


def _place() -> Place:
    fd = netns.create()
    sock = NetlinkSocket(netns_fd=fd)
    sock.run(link.change("lo", up=True))
    return Place(fd, sock)


def _prefix(one: Address, length: int) -> Prefix:
    bits = len(one) * 8
    number = int.from_bytes(one, "big") >> (bits - length) << (bits - length)
    return Prefix(number.to_bytes(len(one), "big"), length)


def pod_network(text: str) -> Prefix:
    """The network that a pod of this address is in: its node has one of each family."""
    one = parse_address(text)
    return _prefix(one, _POD_LENGTH[len(one)])


def _gateway(one: Address) -> Address:
    """The first address of the pod's network: the bridge has it."""
    prefix = _prefix(one, _POD_LENGTH[len(one)])
    return (int.from_bytes(prefix.address, "big") + 1).to_bytes(len(one), "big")


class Fabric:
    """`sync` makes the namespaces match the world, at the cost of the difference."""

    def __init__(
        self, leaving: Callable[[int], None] = lambda fd: None, *, overlay: bool = False
    ) -> None:
        """`leaving` hears of namespaces that are about to be closed."""
        self._leaving = leaving
        self._overlay = overlay
        self._segment = _place()
        self._segment.sock.run(link.add_bridge(End("segment"), up=True))
        self.nodes: dict[str, Place] = {}
        self.external: dict[str, Place] = {}
        self.pods: dict[str, Place] = {}
        self._count = 0

    def close(self) -> None:
        for places in (self.pods, self.external, self.nodes):
            for name in list(places):
                self._close(places.pop(name))
        self._segment.close()

    def _close(self, place: Place) -> None:
        self._leaving(place.fd)
        place.close()

    def place(self, endpoint: str) -> Place:
        """By the cases' names."""
        if endpoint.startswith("node:"):
            return self.nodes[endpoint[5:]]
        if endpoint.startswith("ext:"):
            return self.external[endpoint[4:]]
        return self.pods[endpoint]

    def attachments(self, node: str) -> list[Attachment]:
        """The pods of a node, with their real links."""
        out: list[Attachment] = []
        for name, place in self.pods.items():
            if place.node == node:
                namespace, _, short = name.partition("/")
                out.append(Attachment((namespace, short), place.link, place.addresses))
        return out

    def sync(self, world: World) -> None:
        for name, texts in world.nodes.items():
            self._outside(self.nodes, name, texts, node=True)
        for name, texts in world.external.items():
            self._outside(self.external, name, texts, node=False)
        wanted = {
            name: (pod["node"], tuple(parse_address(str(ip)) for ip in pod.get("ips", ())))
            for name, pod in world.present().items()
        }
        for name, place in list(self.pods.items()):
            if wanted.get(name) != (place.node, place.addresses):
                self.remove_pod(name)
        for name, (node, addresses) in wanted.items():
            if name not in self.pods:
                self.add_pod(name, node, addresses)

    def _outside(self, places: dict[str, Place], name: str, texts: list[str], node: bool) -> None:
        addresses = tuple(parse_address(text) for text in texts)
        if name in places:
            if places[name].addresses == addresses:
                return
            self._close(places.pop(name))
        place = places[name] = _place()
        place.addresses = addresses
        if node:
            sysctl.write(_NODE_SYSCTLS, place.fd)
        self._count += 1
        port = End(f"port{self._count}", self._segment.fd)
        place.mac = b"\x0a\x59" + addresses[0][-4:]
        place.bridge_mac = b"\x0a\x5a" + addresses[0][-4:]
        place.sock.run(link.add_veth(End("eth0", mac=place.mac), port, up=True))
        segment = self._segment.index("segment")
        self._segment.sock.run(link.change(port.name, up=True, master=segment))
        index = place.index("eth0")
        for one in addresses:
            place.sock.run(address.add(InterfaceAddress(index, one, len(one) * 8)))
        if node:
            place.sock.run(link.add_bridge(End(BRIDGE, mac=place.bridge_mac), up=True))
        self._route_outside()

    def _route_outside(self) -> None:
        """Everybody on the segment reaches everybody's addresses there, and all pods."""
        everybody = [*self.nodes.values(), *self.external.values()]
        for place in everybody:
            for other in everybody:
                for one in other.addresses:
                    if other is place or one in place.neighbours:
                        continue
                    index = place.index("eth0")
                    to = route.direct(Prefix(one, len(one) * 8), index)
                    place.sock.run(route.add(to, replace=True))
                    place.sock.run(neighbour.add(Neighbour(index, one, other.mac)))
                    place.neighbours.add(one)
        for pod in self.pods.values():
            self._route_pod(pod)

    def _route_pod(self, pod: Place) -> None:
        nodes = {} if self._overlay else self.nodes
        for name, place in (*nodes.items(), *self.external.items()):
            if name == pod.node and place is self.nodes.get(name):
                continue
            for one in pod.addresses:
                gateways = [a for a in self.nodes[pod.node].addresses if len(a) == len(one)]
                if gateways:
                    prefix = Prefix(one, len(one) * 8)
                    to = route.via(prefix, gateways[0], place.index("eth0"), onlink=True)
                    place.sock.run(route.add(to, replace=True))

    def next_link(self) -> str:
        """The name of the link that the next pod will get."""
        return f"pod{self._count + 1}"

    def add_pod(self, name: str, node: str, addresses: tuple[Address, ...]) -> Place:
        """A namespace with a link on the node's bridge."""
        place = self.pods[name] = _place()
        place.node, place.addresses, place.link = node, addresses, self.next_link()
        self._count += 1
        home = self.nodes[node]
        end = End(place.link, home.fd)
        place.mac = b"\x0a\x58" + addresses[0][-4:]
        place.sock.run(link.add_veth(End("eth0", mac=place.mac), end, up=True))
        master = home.index(BRIDGE)
        home.sock.run(link.change(place.link, up=True, master=master))
        home.sock.run(bridge.change_port(place.link, hairpin=True))
        index = place.index("eth0")
        for one in addresses:
            gateway, length = _gateway(one), _POD_LENGTH[len(one)]
            assert gateway not in addresses
            home.sock.run(address.add(InterfaceAddress(master, gateway, length)))
            home.sock.run(neighbour.add(Neighbour(master, one, place.mac)))
            place.sock.run(neighbour.add(Neighbour(index, gateway, home.bridge_mac)))
            place.sock.run(address.add(InterfaceAddress(index, one, length)))
            default = Prefix(bytes(len(one)), 0)
            place.sock.run(route.add(route.via(default, gateway, index), replace=True))
        for other in self.pods.values():
            if other.node == node and other is not place:
                self._meet(place, other)
                self._meet(other, place)
        self._route_pod(place)
        return place

    def _meet(self, one: Place, other: Place) -> None:
        index = one.index("eth0")
        for each in other.addresses:
            one.sock.run(neighbour.add(Neighbour(index, each, other.mac)))

    def remove_pod(self, name: str) -> None:
        place = self.pods.pop(name)
        self.nodes[place.node].sock.run(link.delete(place.link))
        self._close(place)
