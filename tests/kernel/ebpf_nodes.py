"""Two nodes and a client on one network, for what eBPF does between nodes.

client ─┐
node a ─┼─ fabric (a bridge)
node b ─┘   └ behind b: a pod
"""

import contextlib
import os
import socket
import time
import uuid

from podwire.datapath.ebpf.balancing import Balancing
from podwire.datapath.ebpf.layout import CONNECTION, FLOW
from podwire.datapath.ebpf.nodes import NodesPart
from podwire.datapath.ebpf.pods import EbpfPods, PodLink
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.errors import KernelError
from podwire.kernel import netns
from podwire.kernel.bpf import pins
from podwire.net import Prefix, parse_address, parse_mac, parse_prefix
from podwire.nodes import RouteTable
from tests.kernel.ebpf_spaces import Spaces

CLIENT = {4: "198.18.0.9", 6: "fd18::9"}
NODES = {"a": {4: "198.18.0.1", 6: "fd18::1"}, "b": {4: "198.18.0.2", 6: "fd18::2"}}
POD = {4: "10.244.2.5", 6: "fd44:2::5"}
POD_CIDRS = {
    "a": ("10.244.1.0/24", "fd44:1::/64"),
    "b": ("10.244.2.0/24", "fd44:2::/64"),
}
VIP = {4: "192.0.2.7", 6: "fd00:7::7"}
GATEWAY = {4: "169.254.1.1", 6: "fe80::1"}
HOST_MAC, POD_MAC = "02:00:00:00:05:01", "02:00:00:00:05:02"
MACS = {name: f"02:00:00:00:04:0{number}" for number, name in enumerate(("client", "a", "b"), 1)}
ROOM = 8192  # for entries of connections, and no more
ADDRESSES = {"client": CLIENT, **NODES}


class Node:
    """The eBPF data path of one node, Services balanced as told."""

    def __init__(self, name, space, balancing):
        self.space = space
        self.programs = Programs(name, space, connections=ROOM, room={"connections": ROOM})
        self.services = ServicesPart(programs=self.programs, balancing=balancing)
        self.nodes = NodesPart(self.programs)
        self.programs.enable("services", "pods", "masquerade")

    def apply(self, table):
        self.services.apply(table)

    def outcomes(self):
        return self.programs.outcomes()


class Nodes(Spaces):
    """Namespaces by name (`client`, `a`, `b`, `pod`); closed at the end of the test."""

    def __init__(self):
        super().__init__(("fabric", "client", "a", "b", "pod"))
        self.batch(self.spaces["fabric"], "link add br0 type bridge", "link set br0 up")
        for name in MACS:
            self._plug(name)
        self._wire_pod()
        for name in ("a", "b"):
            for key in ("ipv4.ip_forward", "ipv6.conf.all.forwarding", "ipv4.conf.lo.accept_local"):
                self.run(self.spaces[name], "sysctl", "-qw", f"net.{key}=1")
            self.run(self.spaces[name], "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=2")
        self._known()

    def start(self, name, balancing=None):
        """The data path of node `name`, which knows the other node."""
        pin = f"pwt-{os.getpid()}-{uuid.uuid4().hex[:6]}-{name}"
        self._closing.callback(self._unpin, pin)
        node = Node(pin, self.spaces[name], balancing or Balancing(mode="dsr"))
        self._closing.callback(node.programs.close)
        owners = {parse_prefix(cidr): each for each in NODES for cidr in POD_CIDRS[each]}
        own = {parse_prefix(cidr) for cidr in POD_CIDRS[name]}
        everybody = {parse_address(text) for each in NODES.values() for text in each.values()}
        hosts = {Prefix(each, len(each) * 8) for each in everybody}
        node.nodes.apply(
            RouteTable(
                name,
                "direct",
                pod_prefixes=frozenset(own),
                cluster_prefixes=frozenset(owners) | hosts,
                node_addresses=frozenset(everybody),
                owners=owners,
            )
        )
        if name == "b":
            addresses = tuple(parse_address(text) for text in POD.values())
            macs = map(parse_mac, (HOST_MAC, POD_MAC))
            pods = EbpfPods(node.programs)
            pods.add(PodLink(self.ifindex("b", "pod0"), *macs, addresses))
        return node

    @staticmethod
    def _unpin(pin):
        if (pins.ROOT / "podwire" / pin).exists():
            pins.remove(pins.ROOT / "podwire" / pin)

    def ifindex(self, space, name):
        return netns.call(self.spaces[space], lambda: socket.if_nametoindex(name))

    def _plug(self, name):
        fabric, space = self.spaces["fabric"], self.spaces[name]
        self.batch(
            fabric,
            f"link add to-{name} type veth peer name up0 address {MACS[name]} "
            f"netns /proc/{os.getpid()}/fd/{space}",
            f"link set to-{name} master br0 up",
        )
        self.batch(
            space,
            f"addr add {ADDRESSES[name][4]}/24 dev up0",
            f"addr add {ADDRESSES[name][6]}/64 dev up0 nodad",
            "link set up0 up",
        )

    def _known(self):
        """Permanent neighbours, and each one's way to the others' pods and to the Service."""
        for name in MACS:
            others = [other for other in MACS if other != name]
            self.batch(
                self.spaces[name],
                *(
                    f"neigh add {ADDRESSES[other][f]} lladdr {MACS[other]} dev up0"
                    for other in others
                    for f in (4, 6)
                ),
            )
        for name in ("a", "client"):
            self.batch(
                self.spaces[name],
                *(
                    f"route add {cidr} via {NODES['b'][f]}"
                    for f, cidr in zip((4, 6), POD_CIDRS["b"], strict=True)
                ),
            )
        self.batch(
            self.spaces["client"],
            *(f"route add {VIP[f]} via {NODES['a'][f]}" for f in (4, 6)),
        )

    def _wire_pod(self):
        node, pod = self.spaces["b"], self.spaces["pod"]
        self.batch(
            node,
            f"link add pod0 address {HOST_MAC} type veth peer name eth0 address {POD_MAC} "
            f"netns /proc/{os.getpid()}/fd/{pod}",
            "link set pod0 up",
            f"route add {POD[4]}/32 dev pod0",
            f"route add {POD[6]}/128 dev pod0",
            *(f"neigh add {POD[f]} lladdr {POD_MAC} dev pod0 nud permanent" for f in (4, 6)),
        )
        self.batch(
            pod,
            f"addr add {POD[4]}/32 dev eth0",
            f"addr add {POD[6]}/128 dev eth0 nodad",
            "link set eth0 up",
            *(f"neigh add {GATEWAY[f]} lladdr {HOST_MAC} dev eth0 nud permanent" for f in (4, 6)),
            *(f"route add default via {GATEWAY[f]} dev eth0 onlink" for f in (4, 6)),
        )

    def serve(self, space, address, port, kind=socket.SOCK_STREAM):
        """Answer every message with the client's address and the same again (see `ask`)."""

        def talk(client, seen):
            while True:
                _send(client, f"{seen} ".encode() + _receive(client))

        if kind == socket.SOCK_STREAM:
            self.accept(space, address, port, talk)
        else:
            self.answer(space, address, port, lambda data, seen: f"{seen} ".encode() + data)

    def connect(self, address, port, kind=socket.SOCK_STREAM, *, space="client", source_port=0):
        """A connected socket of the client; the caller closes it."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        client = netns.socket(self.spaces[space], family, kind)
        client.settimeout(5)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if source_port:
            client.bind(("", source_port))
        client.connect((address, port))
        return client


def fill_up(programs):
    """Leave no room in the connection table of a node, which cannot grow."""
    table = programs.growing["connections"].map
    room = table.info.max_entries
    flows = (FLOW.pack(n.to_bytes(16, "big"), bytes(16), b"", b"", 0) for n in range(room + 1))
    value = CONNECTION.pack(bytes(FLOW.size), int(time.monotonic()), 0, 0, 0)
    with contextlib.suppress(KernelError):  # full
        table.update_batch((flow, value) for flow in flows)
    assert len(list(table.keys())) == room


def ask(client, data=b"who"):
    """``(client as the server saw it, bytes that it sent back)``. Streams frame their messages."""
    if client.type == socket.SOCK_DGRAM:
        client.send(data)
        answer = client.recv(1 << 16)
    else:
        _send(client, data)
        answer = _receive(client)
    seen, echoed = answer.split(b" ", 1)
    assert echoed == data
    return seen.decode(), len(echoed)


def _send(stream, data):
    stream.sendall(len(data).to_bytes(4, "big") + data)


def _receive(stream):
    """A whole message. Raises ConnectionError at the end of the stream."""
    size = int.from_bytes(_exactly(stream, 4), "big")
    return _exactly(stream, size)


def _exactly(stream, size):
    data = b""
    while len(data) < size:
        some = stream.recv(size - len(data))
        if not some:
            raise ConnectionError("closed")
        data += some
    return data
