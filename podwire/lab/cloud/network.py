"""The VPC as a network: a router that knows every address, an internet gateway, ENIs as links.

                             outside   203.0.113.10
                                │
                               igw     passes public addresses only: those of primary ENIs
                                │
        ┌──────── underlay: the VPC router, 10.0.0.1, 169.254.169.254 (metadata) ────────┐
        │                │                                  │                │
        │eth0 10.0.0.11  │eth1 …                            │eth0 10.0.0.12  │eth1 …
        └───── node1 ────┘                                  └───── node2 ────┘

As in EC2 nothing is learned: the router sends each address to the ENI that has it, answers every
question about a neighbour with itself, and drops what an ENI sends with an address that is not its
own (source check). What the operating system does on an instance is done here too: the primary ENI
is numbered and has the default route; further ones appear without anything.
"""

from __future__ import annotations

import os
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from podwire.errors import ConfigError
from podwire.kernel import address, link, neighbour, netns, nftables, route, sysctl
from podwire.kernel.address import F_NOPREFIXROUTE, InterfaceAddress
from podwire.kernel.link import End
from podwire.kernel.neighbour import Neighbour
from podwire.kernel.netlink import NetlinkSocket, Request
from podwire.kernel.route import Route
from podwire.lab import topology
from podwire.lab.cloud.model import Eni, Model
from podwire.lab.state import LabDir, Node
from podwire.lab.topology import index_of
from podwire.net import Prefix, parse_address, parse_mac, parse_prefix

VPC = ("10.0.0.0/16", "fd00:10::/56")
SUBNET = ("10.0.0.0/20", "fd00:10::/64")
ROUTER = ("10.0.0.1", "fe80:ec2::1")
METADATA = "169.254.169.254"
EC2 = "169.254.169.250"
MTU = 9001
_FIRST_NODE = 10
_UPLINK = ("100.64.0.0", "100.64.0.1", "fd00:64::", "fd00:64::1")  # router and gateway, /31, /127
_PROTOCOL = 81  # of routes that are ENIs' addresses
_DEFAULT = (parse_prefix("0.0.0.0/0"), parse_prefix("::/0"))

_SOURCE_CHECK = """
table inet source-check {
  chain prerouting {
    type filter hook prerouting priority raw; policy accept;
    iifname "e-*" ip6 saddr fe80::/10 accept
    iifname "e-*" fib saddr . iif oif missing counter drop
  }
}
"""
_GATEWAY = f"""
table inet igw {{
  set public {{ type ipv4_addr; }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    oifname "vpc" ip daddr {topology.LOAD_BALANCER_RANGE[0]} accept
    iifname "vpc" ip saddr {topology.LOAD_BALANCER_RANGE[0]} accept
    iifname "vpc" ip saddr != @public counter drop
    oifname "vpc" ip daddr != @public counter drop
  }}
}}
"""
_PUBLIC = nftables.Set(nftables.INET, "igw", "public")


def make_node(name: str, index: int, dual_stack: bool, host: int = 0) -> Node:
    """The plan of a node: the address of its primary ENI; the VPC has no pod ranges of nodes."""
    if not 1 <= index <= topology.MOST_NODES:
        raise ConfigError(f"a lab has at most {topology.MOST_NODES} nodes")
    number = host or _FIRST_NODE + index
    families = topology.families(dual_stack)
    addresses = [str(ip_network(SUBNET[family])[number]) for family in families]
    return Node(name, index, tuple(addresses), ())


def build(lab: LabDir, dual_stack: bool) -> None:
    """Make the router, the internet gateway and the outside world. Raises KernelError."""
    router, igw, outside = (
        netns.create_named(lab.netns(name)) for name in ("underlay", "igw", "outside")
    )
    try:
        _build_router(router, igw, dual_stack)
        _build_gateway(igw, outside, dual_stack)
        with NetlinkSocket(netns_fd=outside) as sock:
            topology.number(sock, outside, "eth0", topology.OUTSIDE, topology.WORLD, dual_stack)
            topology.default_route(sock, "eth0", topology.WORLD_ROUTER, dual_stack)
    finally:
        for fd in (router, igw, outside):
            os.close(fd)


def add_node(lab: LabDir, node: Node, dual_stack: bool) -> None:
    """Make a node's namespace; the cloud plugs its ENIs in."""
    fd = netns.create_named(lab.netns(f"node-{node.name}"))
    try:
        sysctl.write({"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1}, fd)
        with NetlinkSocket(netns_fd=fd) as sock:
            sock.run(link.change("lo", up=True))
    finally:
        os.close(fd)


def remove_node(lab: LabDir, node: Node) -> None:
    """Take its namespace's name away; the cloud unplugs its ENIs."""
    netns.remove_named(lab.netns(f"node-{node.name}"))


def readdress_node(lab: LabDir, old: Node, new: Node, dual_stack: bool) -> None:
    raise ConfigError("the primary address of an instance cannot be changed")


def _build_router(fd: int, igw: int, dual_stack: bool) -> None:
    forwarding = {"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1}
    loose = {"net.ipv4.conf.all.rp_filter": 0, "net.ipv4.conf.default.rp_filter": 0}
    sysctl.write({**forwarding, **loose, "net.ipv4.icmp_ratelimit": 0}, fd)
    own = [ROUTER[0], METADATA, EC2, topology.ROUTER[0]]
    if dual_stack:
        own.append(topology.ROUTER[1])
    with NetlinkSocket(netns_fd=fd) as sock:
        sock.run(
            link.change("lo", up=True),
            link.add_veth(End("igw", mtu=MTU), End("vpc", igw, mtu=MTU), up=True),
        )
        _unnumbered(sock, "lo", own)
        _join(sock, "igw", _UPLINK[0], _UPLINK[1], _UPLINK[2], _UPLINK[3])
    with nftables.NfTables(fd) as nft:
        nft.run(_SOURCE_CHECK)


def _build_gateway(fd: int, outside: int, dual_stack: bool) -> None:
    sysctl.write({"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1}, fd)
    with NetlinkSocket(netns_fd=fd) as sock:
        sock.run(link.add_veth(End("world"), End("eth0", outside), up=True))
        topology.number(sock, fd, "world", topology.WORLD_ROUTER, topology.WORLD, dual_stack)
        _join(sock, "vpc", _UPLINK[1], _UPLINK[0], _UPLINK[3], _UPLINK[2], default=False)
        index = index_of(sock, "vpc")
        for family, gateway in enumerate((_UPLINK[0], _UPLINK[2])):
            for text in (VPC[family], topology.LOAD_BALANCER_RANGE[family]):
                inwards = route.via(parse_prefix(text), parse_address(gateway), index)
                sock.run(route.add(inwards))
    with nftables.NfTables(fd) as nft:
        nft.run(_GATEWAY)


def _join(
    sock: NetlinkSocket, name: str, own: str, other: str, own6: str, other6: str,
    *, default: bool = True,
) -> None:  # fmt: skip
    """One end of the link between router and gateway."""
    index = index_of(sock, name)
    sock.run(
        link.change(index, up=True),
        address.add(InterfaceAddress(index, parse_address(own), 31)),
        address.add(InterfaceAddress(index, parse_address(own6), 127)),
    )
    if default:
        for prefix, gateway in zip(_DEFAULT, (other, other6), strict=True):
            sock.run(route.add(route.via(prefix, parse_address(gateway), index)))


def _unnumbered(sock: NetlinkSocket, name: str, texts: list[str]) -> None:
    index = index_of(sock, name)
    packed = [parse_address(text) for text in texts]
    sock.run(*(address.add(InterfaceAddress(index, each, len(each) * 8)) for each in packed))


class _Plugged(NamedTuple):
    """An ENI that is a link now."""

    port: int
    instance_id: str
    routes: frozenset[Route]


class CloudNetwork:
    """Makes links, neighbours and routes follow the model. One thread."""

    def __init__(self, lab: LabDir, model: Model) -> None:
        self._model = model
        self._lab = lab
        self._router_fd = netns.open_path(lab.netns("underlay"))
        self._igw_fd = netns.open_path(lab.netns("igw"))
        self._sock = NetlinkSocket(netns_fd=self._router_fd)
        self._gateway = nftables.NfTables(self._igw_fd)
        self._plugged: dict[str, _Plugged] = {}
        self._public: frozenset[bytes] = frozenset()
        self.nodes: dict[str, str] = {}  # instance → node

    def sync(self) -> float | None:
        """Make the network what the model says; returns when an attachment will be ready."""
        now, later = self._model.clock(), list[float]()
        wanted: dict[str, Eni] = {}
        for eni in self._model.enis.values():
            if eni.attachment is None or eni.attachment.instance_id not in self.nodes:
                continue
            if eni.attachment.ready_at > now:
                later.append(eni.attachment.ready_at)
            else:
                wanted[eni.id] = eni
        for id in self._plugged.keys() - wanted.keys():
            gone = self._plugged.pop(id)
            self._sock.attempt([link.delete(gone.port)])
        for eni in wanted.values():
            self._plug(eni)
        self._publish()
        return min(later, default=None)

    def _plug(self, eni: Eni) -> None:
        known = self._plugged.get(eni.id)
        port = known.port if known else self._make_link(eni)
        routes = frozenset(_routes(eni, port))
        held = known.routes if known else frozenset[Route]()
        requests: list[Request] = [route.delete(each) for each in held - routes]
        requests += [route.add(each, replace=True) for each in routes - held]
        self._sock.run(*requests)
        assert eni.attachment is not None
        self._plugged[eni.id] = _Plugged(port, eni.attachment.instance_id, routes)

    def _make_link(self, eni: Eni) -> int:
        """The pair, the router's end of it, and what the operating system does with a new one."""
        assert eni.attachment is not None
        name = f"e-{eni.id[-8:]}"
        node = self.nodes[eni.attachment.instance_id]
        node_fd = netns.open_path(self._lab.netns(f"node-{node}"))
        mac = parse_mac(eni.mac)
        device = f"eth{eni.attachment.device_index}"
        try:
            self._sock.run(
                link.add_veth(End(name, mtu=MTU), End(device, node_fd, mac, MTU)),
            )
            conf = sysctl.interface(name)
            sysctl.write(
                {
                    f"net.ipv4.conf.{conf}.proxy_arp": 1,
                    f"net.ipv4.neigh.{conf}.proxy_delay": 0,
                    f"net.ipv6.conf.{conf}.accept_dad": 0,
                },
                self._router_fd,
            )
            port = index_of(self._sock, name)
            self._sock.run(
                link.change(port, up=True),
                neighbour.add(Neighbour(port, parse_address(eni.primary), mac)),
                *(neighbour.add(Neighbour(port, parse_address(a), mac)) for a in eni.ipv6),
                address.add(
                    InterfaceAddress(port, parse_address(ROUTER[1]), 64, scope=address.SCOPE_LINK)
                ),
            )
            if eni.attachment.device_index == 0:
                _boot(node_fd, eni)
        finally:
            os.close(node_fd)
        return port

    def _publish(self) -> None:
        """Primary addresses of primary ENIs are those with a public one."""
        public = frozenset(
            parse_address(eni.primary)
            for id, eni in self._model.enis.items()
            if id in self._plugged and eni.attachment and eni.attachment.device_index == 0
        )
        transaction = nftables.Transaction()
        transaction.delete(_PUBLIC, [nftables.Element(each) for each in self._public - public])
        transaction.add(_PUBLIC, [nftables.Element(each) for each in public - self._public])
        self._gateway.commit(transaction)
        self._public = public


def _routes(eni: Eni, port: int) -> list[Route]:
    """Every address of the ENI leads to it: the primary ones are its neighbours."""
    own = parse_address(eni.primary)
    found = [route.direct(Prefix(own, 32), port, protocol=_PROTOCOL)]
    for text in (*eni.secondary, *eni.prefixes):
        prefix = parse_prefix(text)
        found.append(route.via(prefix, own, port, onlink=True, protocol=_PROTOCOL))
    own6 = [parse_address(text) for text in eni.ipv6]
    found += [route.direct(Prefix(each, 128), port, protocol=_PROTOCOL) for each in own6]
    for text in eni.ipv6_prefixes if own6 else ():
        prefix = parse_prefix(text)
        found.append(route.via(prefix, own6[0], port, onlink=True, protocol=_PROTOCOL))
    return found


def _boot(node_fd: int, eni: Eni) -> None:
    """Number the primary ENI from the subnet, as DHCP and router advertisements do."""
    subnet = eni.subnet
    with NetlinkSocket(netns_fd=node_fd) as sock:
        index = index_of(sock, "eth0")
        sysctl.write({"net.ipv6.conf.eth0.accept_dad": 0}, node_fd)
        sock.run(
            link.change(index, up=True),
            address.add(
                InterfaceAddress(index, parse_address(eni.primary), subnet.network.prefixlen)
            ),
        )
        router = str(ip_address(int(subnet.network.network_address) + 1))
        sock.run(route.add(route.via(_DEFAULT[0], parse_address(router), index), replace=True))
        for text in eni.ipv6:
            own = InterfaceAddress(index, parse_address(text), 128, flags=F_NOPREFIXROUTE)
            sock.run(address.add(own))
        if eni.ipv6:
            sock.run(route.add(route.via(_DEFAULT[1], parse_address(ROUTER[1]), index)))
