"""A node in namespaces for the eBPF tests: routed pods, an uplink, and the world behind it.

pod1, pod2 ── node ── outside (a client, and pods of another node)
"""

import os
import socket
import uuid

import pytest

from podwire.datapath.ebpf.pods import PodLink
from podwire.datapath.ebpf.programs import missing
from podwire.kernel import netns
from podwire.kernel.bpf import pins
from podwire.net import parse_address, parse_mac
from tests.kernel.ebpf_spaces import Spaces

GATEWAY = {4: "169.254.1.1", 6: "fe80::1"}
NODE = {4: "192.168.9.10", 6: "fd09::10"}
OUTSIDE = {4: "192.168.9.1", 6: "fd09::1"}
REMOTE = {4: "10.244.1.5", 6: "fd44:1::5"}
_NUMBERS = range(1, 6)
POD = {n: {4: f"10.244.0.{n + 1}", 6: f"fd44::{n + 1}"} for n in _NUMBERS}
MAC = {n: f"02:00:00:00:01:{n:02x}" for n in _NUMBERS}
UPLINK_MAC = ("02:00:00:00:03:01", "02:00:00:00:03:02")
HOST_MAC = {n: f"02:00:00:00:02:{n:02x}" for n in _NUMBERS}


NEEDS_EBPF = pytest.mark.skipif(
    bool(missing()), reason=f"no eBPF data path here: {', '.join(missing())}"
)


class World(Spaces):
    """Namespaces by name (`node`, `outside`, `pod1`…); closed at the end of the test."""

    def __init__(self, pods=2):
        self.name = f"pwt-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        numbers = range(1, pods + 1)
        names = ("node", "outside", *(f"pod{number}" for number in numbers))
        super().__init__(names)
        self._wire_uplink()
        for number in numbers:
            self._wire_pod(number)
        node = self.spaces["node"]
        for key, value in (
            ("net.ipv4.ip_forward", 1),
            ("net.ipv6.conf.all.forwarding", 1),
            ("net.ipv4.conf.all.rp_filter", 2),
            ("net.ipv4.conf.lo.accept_local", 1),
            ("net.ipv4.conf.lo.route_localnet", 1),
        ):
            self.run(node, "sysctl", "-qw", f"{key}={value}")

    def __exit__(self, *_):
        super().__exit__()
        folder = pins.ROOT / "podwire" / self.name
        if folder.exists():
            pins.remove(folder)

    def _wire_uplink(self):
        node, outside = self.spaces["node"], self.spaces["outside"]
        self.batch(
            node,
            f"link add up0 address {UPLINK_MAC[0]} type veth peer name eth0 "
            f"address {UPLINK_MAC[1]} netns /proc/{os.getpid()}/fd/{outside}",
            f"addr add {NODE[4]}/24 dev up0",
            f"addr add {NODE[6]}/64 dev up0 nodad",
            "link set up0 up",
        )
        self.batch(
            outside,
            f"addr add {OUTSIDE[4]}/24 dev eth0",
            f"addr add {OUTSIDE[6]}/64 dev eth0 nodad",
            "link set eth0 up",
            f"addr add {REMOTE[4]}/32 dev lo",
            f"addr add {REMOTE[6]}/128 dev lo nodad",
            f"route add 10.0.0.0/8 via {NODE[4]}",
            f"route add 192.0.2.0/24 via {NODE[4]}",
            f"route add fd00::/8 via {NODE[6]}",
        )
        # permanent: the neighbour table has 1,024 places for all namespaces of the machine
        self.batch(
            node,
            *(f"neigh add {OUTSIDE[f]} lladdr {UPLINK_MAC[1]} dev up0" for f in (4, 6)),
            *(f"route add default via {OUTSIDE[f]}" for f in (4, 6)),
        )
        self.batch(
            outside, *(f"neigh add {NODE[f]} lladdr {UPLINK_MAC[0]} dev eth0" for f in (4, 6))
        )

    def _wire_pod(self, number):
        node, pod = self.spaces["node"], self.spaces[f"pod{number}"]
        address, host = POD[number], f"pod{number}"
        self.batch(
            node,
            f"link add {host} address {HOST_MAC[number]} type veth peer name eth0 "
            f"address {MAC[number]} netns /proc/{os.getpid()}/fd/{pod}",
            f"link set {host} up",
            f"route add {address[4]}/32 dev {host}",
            f"route add {address[6]}/128 dev {host}",
            f"neigh add {address[4]} lladdr {MAC[number]} dev {host} nud permanent",
            f"neigh add {address[6]} lladdr {MAC[number]} dev {host} nud permanent",
        )
        self.batch(
            pod,
            f"addr add {address[4]}/32 dev eth0",
            f"addr add {address[6]}/128 dev eth0 nodad",
            "link set eth0 up",
            f"neigh add {GATEWAY[4]} lladdr {HOST_MAC[number]} dev eth0 nud permanent",
            f"neigh add {GATEWAY[6]} lladdr {HOST_MAC[number]} dev eth0 nud permanent",
            f"route add default via {GATEWAY[4]} dev eth0 onlink",
            f"route add default via {GATEWAY[6]} dev eth0 onlink",
        )

    def pod_link(self, number, *more, with_sockets=False):
        """What the agent tells eBPF of a pod, which may have `more` addresses.

        With its sockets Services are balanced at the socket where cgroups allow it.
        """
        space = f"/proc/{os.getpid()}/fd/{self.spaces[f'pod{number}']}"
        return PodLink(
            self.ifindex(f"pod{number}"),
            parse_mac(HOST_MAC[number]),
            parse_mac(MAC[number]),
            tuple(map(parse_address, (*POD[number].values(), *more))),
            space if with_sockets else "",
        )

    def ifindex(self, name):
        return netns.call(self.spaces["node"], lambda: socket.if_nametoindex(name))

    def serve(self, space, address, port, kind=socket.SOCK_STREAM):
        """Answer every client with the address that the server sees."""

        def talk(client, seen):
            client.recv(100)
            client.sendall(f"{address} {seen}".encode())

        if kind == socket.SOCK_STREAM:
            self.accept(space, address, port, talk)
        else:
            self.answer(space, address, port, lambda _, seen: f"{address} {seen}".encode())

    def echo(self, space, address, port):
        """Send back whatever comes on TCP connections."""

        def talk(client, _):
            while data := client.recv(65536):
                client.sendall(data)

        self.accept(space, address, port, talk)

    def observe(self, space, address, port, kind=socket.SOCK_STREAM, *, tries=12, **options):
        """What many clients saw: ``(server, client)`` pairs, ``refused`` or ``silence``."""
        seen = set()
        for _ in range(tries):
            try:
                seen.add(self.ask(space, address, port, kind, **options))
            except ConnectionRefusedError:
                seen.add("refused")
            except TimeoutError:
                seen.add("silence")
        return seen

    def ask(self, space, address, port, kind=socket.SOCK_STREAM, *, source=None, timeout=3):
        """``(server, client as the server saw it)``. Raises OSError as the socket does."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with netns.socket(self.spaces[space], family, kind) as client:
            client.settimeout(timeout)
            if source:
                client.bind(source)
            client.connect((address, port))
            client.send(b"who")
            server, seen = client.recv(100).decode().split()
            return server, seen
