"""Nobody but a node speaks for pods in the overlay: the same packets on all data paths.

Two nodes with a pod each, and a host outside. A forged packet says that it comes out of a tunnel;
what is inside is a datagram for pod b.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest

from podwire.datapath.ebpf.programs import missing
from podwire.kernel import netns
from podwire.kube.objects import EndpointSlice, Service
from podwire.kube.store import Store
from podwire.net import Protocol, format_address, parse_address
from podwire.nodes import OVERLAY_ID, OVERLAY_PORTS
from podwire.nodes.compiler import tunnel_mac
from podwire.services import NodeFacts, ProxyConfig, ServiceCompiler
from tests.conformance.netpol_packets import Lab, PacketBackend
from tests.conformance.netpol_world import World
from tests.traffic import udp_source

NODES = {
    "n1": {4: "192.0.2.11", 6: "2001:db8:100::11"},
    "n2": {4: "192.0.2.12", 6: "2001:db8:100::12"},
}
A, B, OTHER = "10.244.1.9", "10.244.2.9", "10.244.2.77"
FORGED = "10.244.1.77"  # a pod of n1, and none of those here
PORT = 9999


class Net:
    """The places by the cases' names."""

    def __init__(self, datapath: str, underlay: int) -> None:
        self.underlay = underlay
        order = (underlay, 10 - underlay)
        self.world = World.of(
            {
                "namespaces": [{"name": "x"}],
                "nodes": [
                    {"name": name, "ips": [ips[family] for family in order]}
                    for name, ips in NODES.items()
                ],
                "external": [{"name": "host", "ips": ["198.51.100.7", "2001:db8:51::7"]}],
                "pods": [
                    {"namespace": "x", "name": n, "node": node, "ips": [text, f"fd00:{i}::9"]}
                    for i, (n, node, text) in enumerate((("a", "n1", A), ("b", "n2", B)), 1)
                ],
            }
        )
        self.lab = Lab(datapath, "vxlan", masquerade=True)
        PacketBackend(self.world, self.lab).update()
        self.tunnels = [self.lab.tunnels(node) for node in NODES]
        for each in self.tunnels:  # eBPF knows the device's addresses from now on
            each.verify()

    def fd(self, name: str) -> int:
        return self.lab.fabric.place(name).fd

    def node(self, name: str) -> str:
        return NODES[name][self.underlay]

    def arrives(
        self, sender: str, node: str, inner: str, *, port: int = 0, wait_s: float = 0.3
    ) -> bool:
        """Whether pod b gets what the sender forges for the tunnel's end of a node, or for another
        of its ports.
        """
        family = socket.AF_INET if self.underlay == 4 else socket.AF_INET6
        with (
            netns.socket(self.fd("x/b"), socket.AF_INET, socket.SOCK_DGRAM) as server,
            netns.socket(self.fd(sender), family, socket.SOCK_DGRAM) as client,
        ):
            server.bind((B, PORT))
            to = (self.node(node), port or OVERLAY_PORTS["vxlan"])
            client.sendto(forge(inner, tunnel_mac("n2")), to)
            if not select.select([server], [], [], wait_s)[0]:
                return False
            return server.recvfrom(100)[1][0] == inner

    def serve(self, ports: dict[int, int]) -> None:
        """Node n1 leads these node ports to those ports of node n2, by a Service."""
        vip = {4: "10.96.0.5", 6: "fd00:96::5"}[self.underlay]
        kind = f"IPv{self.underlay}"
        store = Store()
        spec = {
            "type": "NodePort",
            "clusterIP": vip,
            "clusterIPs": [vip],
            "ipFamilies": [kind],
            "ports": [
                {"name": f"p{to}", "port": to, "nodePort": at, "protocol": "UDP"}
                for at, to in ports.items()
            ],
        }
        metadata = {"name": "lead", "namespace": "x"}
        store.put(msgspec.convert({"metadata": metadata, "spec": spec}, Service))
        labels = {"kubernetes.io/service-name": "lead"}
        ends = {
            "metadata": metadata | {"labels": labels},
            "addressType": kind,
            "endpoints": [{"addresses": [self.node("n2")], "conditions": {"ready": True}}],
            "ports": [{"name": f"p{to}", "port": to, "protocol": "UDP"} for to in ports.values()],
        }
        store.put(msgspec.convert(ends, EndpointSlice))
        addresses = self.lab.fabric.place("node:n1").addresses
        part = self.lab.services("n1")
        part.start()
        part.apply(ServiceCompiler(NodeFacts("n1", addresses), ProxyConfig()).update(store.take()))


def forge(source: str, mac: bytes) -> bytes:
    """A VXLAN packet (RFC 7348) with a datagram for pod b in it; the UDP checksum is left out."""
    ends = parse_address(source), parse_address(B)
    udp = struct.pack(">HHHH", 4000, PORT, 8 + 2, 0) + b"hi"
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, Protocol.UDP, 0, *ends)
    total = sum(struct.unpack(">10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack(">H", ~(total + (total >> 16)) & 0xFFFF) + head[12:]
    ethernet = mac + tunnel_mac("n1") + struct.pack(">H", 0x0800)
    return struct.pack(">II", 1 << 27, OVERLAY_ID << 8) + ethernet + head + udp


@pytest.fixture(params=["nftables", "iptables-nft", "ebpf"], scope="module")
def datapath(request: pytest.FixtureRequest) -> str:
    if request.param == "ebpf" and missing():
        pytest.skip(f"this machine lacks {', '.join(missing())}")
    return request.param


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"], scope="module")
def net(request: pytest.FixtureRequest, datapath: str) -> Iterator[Net]:
    made = Net(datapath, request.param)
    yield made
    made.lab.close()


def test_pods_reach_each_other_by_the_tunnel(net: Net) -> None:
    assert udp_source(net.fd("x/a"), net.fd("x/b"), B) == A
    assert udp_source(net.fd("x/b"), net.fd("x/a"), A) == B


def test_a_node_speaks_for_its_own_pods(net: Net) -> None:
    """So what the others send would arrive, were it not for who they are."""
    assert net.arrives("node:n1", "n2", FORGED, wait_s=4)


def test_a_pod_does_not_get_at_the_tunnel_of_another_node(net: Net) -> None:
    """Although what it sends to nodes bears its own node's address."""
    seen = udp_source(net.fd("x/a"), net.fd("node:n2"), net.node("n2"))
    assert seen == net.node("n1")
    assert not net.arrives("x/a", "n2", FORGED)
    assert not net.arrives("x/a", "n2", A)


def test_nor_at_that_of_its_own(net: Net) -> None:
    assert udp_source(net.fd("x/b"), net.fd("node:n2"), net.node("n2"))
    assert not net.arrives("x/b", "n2", FORGED)


def test_nor_does_a_host_outside(net: Net) -> None:
    assert udp_source(net.fd("ext:host"), net.fd("node:n2"), net.node("n2"))
    assert not net.arrives("ext:host", "n2", FORGED)


def test_nor_does_it_by_a_service_that_leads_there(net: Net) -> None:
    """Although what a Service leads to another node is masqueraded."""
    net.serve({30081: 8081, 30472: OVERLAY_PORTS["vxlan"]})
    family = socket.AF_INET if net.underlay == 4 else socket.AF_INET6
    with (
        netns.socket(net.fd("node:n2"), family, socket.SOCK_DGRAM) as server,
        netns.socket(net.fd("ext:host"), family, socket.SOCK_DGRAM) as client,
    ):
        server.bind((net.node("n2"), 8081))
        server.settimeout(4)
        client.sendto(b"hi", (net.node("n1"), 30081))
        assert server.recvfrom(10)[1][0] == net.node("n1")
    assert not net.arrives("ext:host", "n1", FORGED, port=30472)
    assert not net.arrives("x/a", "n1", FORGED, port=30472)


def test_no_node_speaks_for_pods_of_the_receiver(net: Net) -> None:
    assert not net.arrives("node:n1", "n2", OTHER)


def test_all_is_as_it_was_made(net: Net) -> None:
    assert [repair for each in net.tunnels for repair in each.verify()] == []


def test_a_datagram_for_that_port_of_a_pod_is_nobodys_tunnel(net: Net) -> None:
    with netns.socket(net.fd("x/b"), socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((B, OVERLAY_PORTS["vxlan"]))
        server.settimeout(4)
        with netns.socket(net.fd("x/a"), socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"hi", (B, OVERLAY_PORTS["vxlan"]))
        assert server.recvfrom(10)[1][0] == format_address(parse_address(A))
