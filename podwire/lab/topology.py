"""The lab's network outside the nodes: the underlay between them and the world beyond it.

                            outside   203.0.113.10, 2001:db8:113::10
                               │eth0
                               │world  203.0.113.1
       ┌──────────── underlay: a router and a bridge ───────────┐
       │                       │nodes  172.18.0.1, fd00:18::1   │
       └────────┬──────────────┴─────────────┬──────────────────┘
                │node1                       │node2
                │eth0 172.18.0.11            │eth0 172.18.0.12
              node1                        node2

The router knows the nodes and the load balancer addresses (`lab.runtime.balancer`) but no pod
addresses, as networks around real clusters do not: what leaves the cluster must be masqueraded.
All of it is in namespaces; the machine's own network is not touched.
"""

from __future__ import annotations

import os
from ipaddress import IPv4Network, IPv6Network, ip_network

from podwire.errors import ConfigError, KernelError
from podwire.kernel import address, ethtool, link, netns, route, sysctl
from podwire.kernel.address import InterfaceAddress
from podwire.kernel.bpf import Link, Program
from podwire.kernel.link import End
from podwire.kernel.netlink import NetlinkSocket, Request
from podwire.kernel.route import Route
from podwire.lab.state import LabDir, Node
from podwire.net import parse_address, parse_prefix

UNDERLAY = ("172.18.0.0/16", "fd00:18::/64")
ROUTER = ("172.18.0.1", "fd00:18::1")
WORLD = ("203.0.113.0/24", "2001:db8:113::/64")
WORLD_ROUTER = ("203.0.113.1", "2001:db8:113::1")
OUTSIDE = ("203.0.113.10", "2001:db8:113::10")
POD_RANGE = ("10.244.0.0/16", "fd00:10:244::/48")
POD_PREFIX_LENGTH = (22, 64)  # room for 1,000 pods on a node
SERVICE_RANGE = ("10.96.0.0/16", "fd00:10:96::/112")
LOAD_BALANCER_RANGE = ("198.51.100.0/24", "2001:db8:51::/64")
MOST_NODES = 64

_DEFAULT = (parse_prefix("0.0.0.0/0"), parse_prefix("::/0"))


def families(dual_stack: bool) -> tuple[int, ...]:
    """Indexes into the pairs above: IPv4, and IPv6 if the lab has both."""
    return (0, 1) if dual_stack else (0,)


def make_node(name: str, index: int, dual_stack: bool, host: int = 0) -> Node:
    """The plan of a node. `index` counts from 1; `host` is the number within the underlay.

    Raises ConfigError when there is no room for another node.
    """
    if not 1 <= index <= MOST_NODES:
        raise ConfigError(f"a lab has at most {MOST_NODES} nodes")
    host = host or 10 + index
    addresses: list[str] = []
    cidrs: list[str] = []
    for family in families(dual_stack):
        addresses.append(str(_network(UNDERLAY[family])[host]))
        pods, length = _network(POD_RANGE[family]), POD_PREFIX_LENGTH[family]
        step = 1 << (pods.max_prefixlen - length)
        first = pods.network_address + step * (index - 1 + family)
        cidrs.append(f"{first}/{length}")
    return Node(name, index, tuple(addresses), tuple(cidrs))


def _network(text: str) -> IPv4Network | IPv6Network:
    return ip_network(text)


def build(lab: LabDir, dual_stack: bool) -> None:
    """Make the underlay and the outside world. Raises KernelError."""
    underlay = netns.create_named(lab.netns("underlay"))
    outside = netns.create_named(lab.netns("outside"))
    try:
        with NetlinkSocket(netns_fd=underlay) as sock:
            _build_router(sock, underlay, outside, dual_stack)
        with NetlinkSocket(netns_fd=outside) as sock:
            number(sock, outside, "eth0", OUTSIDE, WORLD, dual_stack)
            default_route(sock, "eth0", WORLD_ROUTER, dual_stack)
    finally:
        os.close(underlay)
        os.close(outside)


def _build_router(sock: NetlinkSocket, underlay: int, outside: int, dual_stack: bool) -> None:
    sysctl.write(
        {
            "net.ipv4.ip_forward": 1,
            "net.ipv6.conf.all.forwarding": 1,
            "net.ipv4.conf.all.rp_filter": 0,
            "net.ipv4.conf.default.rp_filter": 0,
            "net.ipv4.fib_multipath_hash_policy": 1,  # by connection, not by host
            "net.ipv6.fib_multipath_hash_policy": 1,
            "net.ipv4.icmp_ratelimit": 0,  # "no route" is said to everyone who asks
            "net.ipv6.icmp.ratelimit": 0,
        },
        underlay,
    )
    sock.run(
        link.change("lo", up=True),
        link.add_bridge(End("nodes", mac=b"\x02\x00\xac\x12\x00\x01"), up=True),
        link.add_veth(End("world"), End("eth0", outside), up=True),
    )
    number(sock, underlay, "nodes", ROUTER, UNDERLAY, dual_stack)
    number(sock, underlay, "world", WORLD_ROUTER, WORLD, dual_stack)
    for family in families(dual_stack):
        # the world forgets packets to private addresses without a word
        nowhere = Route(parse_prefix(POD_RANGE[family]), kind=route.BLACKHOLE)
        sock.run(route.add(nowhere))


def add_node(lab: LabDir, node: Node, dual_stack: bool) -> None:
    """Make a node's namespace and plug it into the underlay. Raises KernelError."""
    node_fd = netns.create_named(lab.netns(f"node-{node.name}"))
    underlay = netns.open_path(lab.netns("underlay"))
    try:
        sysctl.write({"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1}, node_fd)
        with NetlinkSocket(netns_fd=underlay) as sock:
            bridge = index_of(sock, "nodes")
            port = End(f"node{node.index}")
            sock.run(link.add_veth(port, End("eth0", node_fd), up=True, master=bridge))
        with NetlinkSocket(netns_fd=node_fd) as sock:
            number(sock, node_fd, "eth0", node.addresses, UNDERLAY, dual_stack)
            default_route(sock, "eth0", ROUTER, dual_stack)
    finally:
        os.close(node_fd)
        os.close(underlay)


def serve_xdp(lab: LabDir, node: Node) -> Link:
    """Be to the node's XDP what a cable is, as long as the link is held. Raises KernelError.

    A veth takes what its peer's XDP sends back only when it runs XDP itself; and it hands over
    packets whose checksums nobody has computed yet, which no wire carries and no XDP can mend.
    """
    underlay = netns.open_path(lab.netns("underlay"))
    program, port = Program.xdp_pass(), f"node{node.index}"
    try:
        ethtool.offload_checksums(port, False, underlay)
        with NetlinkSocket(netns_fd=underlay) as sock, netns.entered(underlay):
            return Link.xdp(program, index_of(sock, port))
    finally:
        program.close()
        os.close(underlay)


def remove_node(lab: LabDir, node: Node) -> None:
    """Pull the node's cable and take its namespace's name away."""
    underlay = netns.open_path(lab.netns("underlay"))
    try:
        with NetlinkSocket(netns_fd=underlay) as sock:
            sock.run(link.delete(f"node{node.index}"))
    finally:
        os.close(underlay)
    netns.remove_named(lab.netns(f"node-{node.name}"))


def readdress_node(lab: LabDir, old: Node, new: Node, dual_stack: bool) -> None:
    """Give a node's uplink other addresses."""
    node_fd = netns.open_path(lab.netns(f"node-{old.name}"))
    try:
        with NetlinkSocket(netns_fd=node_fd) as sock:
            index = index_of(sock, "eth0")
            for family, text in enumerate(old.addresses):
                length = parse_prefix(UNDERLAY[family]).length
                sock.run(address.delete(InterfaceAddress(index, parse_address(text), length)))
            number(sock, node_fd, "eth0", new.addresses, UNDERLAY, dual_stack)
            default_route(sock, "eth0", ROUTER, dual_stack)
    finally:
        os.close(node_fd)


def index_of(sock: NetlinkSocket, name: str) -> int:
    """The link of that name. Raises KernelError."""
    found = link.find(sock, name)
    if found is None:
        raise KernelError(f"no link {name} in this namespace")
    return found.index


def number(
    sock: NetlinkSocket,
    fd: int,
    name: str,
    addresses: tuple[str, ...],
    networks: tuple[str, ...],
    dual_stack: bool,
) -> None:
    """Bring a link up with its addresses (and the loopback, for it is the namespace's first)."""
    ipv6 = f"net.ipv6.conf.{sysctl.interface(name)}"
    if dual_stack:
        # the router would not solicit neighbours for a second while it checks its own address
        sysctl.write({f"{ipv6}.accept_dad": 0}, fd)
    else:
        sysctl.write({f"{ipv6}.disable_ipv6": 1}, fd)
    index = index_of(sock, name)
    requests: list[Request] = [link.change("lo", up=True), link.change(index, up=True)]
    for family in families(dual_stack):
        length = parse_prefix(networks[family]).length
        packed = parse_address(addresses[family])
        requests.append(address.add(InterfaceAddress(index, packed, length)))
    sock.run(*requests)


def default_route(
    sock: NetlinkSocket, name: str, gateways: tuple[str, ...], dual_stack: bool
) -> None:
    index = index_of(sock, name)
    for family in families(dual_stack):
        via = route.via(_DEFAULT[family], parse_address(gateways[family]), index)
        sock.run(route.add(via, replace=True))
