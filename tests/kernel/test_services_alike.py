"""Rare traffic through Services, on nftables and on eBPF in the same world: clients see the same.

Each case returns what clients observe, from outside by a node port, from a pod and from the node by
the ClusterIP. All run on one data path, then on the other.
"""

import contextlib
import errno
import os
import socket
import struct
import threading

import msgspec
import pytest

from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart as EbpfPart
from podwire.datapath.nftables.services import ServicesPart as NftablesPart
from podwire.kernel import netns
from podwire.net import Protocol, parse_address
from podwire.services import backend
from tests.kernel.ebpf_services import VIP, make_port, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, OUTSIDE, POD, REMOTE, World

pytestmark = NEEDS_EBPF

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
PROTOCOLS = {TCP: Protocol.TCP, UDP: Protocol.UDP}
BACKENDS = {"pod1": POD[1], "outside": REMOTE}  # on this node, and on another
SO_NO_CHECK = 11
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
MTU_DISCOVER = {4: (socket.IPPROTO_IP, 10), 6: (socket.IPPROTO_IPV6, 23)}
MTU = {4: (socket.IPPROTO_IP, 14), 6: (socket.IPPROTO_IPV6, 24)}
ERRORS = {4: (socket.IPPROTO_IP, 11), 6: (socket.IPPROTO_IPV6, 25)}
HOPS = {4: (socket.IPPROTO_IP, 2), 6: (socket.IPPROTO_IPV6, 16)}


class Side:
    """One data path; `family` is that of the case that runs."""

    def __init__(self, world, part, forget):
        self.world, self.part, self._forget = world, part, forget
        self.family = 4

    def serve(self, kind, backend_address, number=80, port=80):
        """A Service of its own at `number`, and 30000 more on the node."""
        made = make_port("s", number, [backend_address], family=self.family,
                         protocol=PROTOCOLS[kind])  # fmt: skip
        chosen = (backend(parse_address(backend_address), port),)
        return msgspec.structs.replace(
            made, cluster=chosen, on_node=() if backend_address == REMOTE[self.family] else chosen
        )

    def apply(self, *ports):
        named = [
            msgspec.structs.replace(port, name=port.name._replace(name=f"s{number}"))
            for number, port in enumerate(ports)
        ]
        self.part.apply(make_table(named))
        self.part.flush()
        self._forget()

    def ways(self, number=80):
        node, vip = NODE[self.family], VIP[self.family]
        return [
            ("outside", (node, 30000 + number)),
            ("pod2", (vip, number)),
            ("node", (vip, number)),
        ]

    @contextlib.contextmanager
    def socket(self, space, kind, family=None):
        family = family or (socket.AF_INET if self.family == 4 else socket.AF_INET6)
        with netns.socket(self.world.spaces[space], family, kind) as made:
            made.settimeout(3)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            yield made


def outcome(function):
    """What it returns, or the error's name."""
    try:
        return function()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)


def exchange(side, space, target, data, *options):
    """Whom the server saw, and whether it got and sent back all."""
    with side.socket(space, UDP) as client:
        for option in options:
            client.setsockopt(*option)
        client.connect(target)
        client.send(data)
        seen, _, back = client.recv(65536).partition(b" ")
        return seen.decode(), back == data


# --- cases: what clients observe, by where the backend is -----------------------------------------


def datagrams_in_pieces(side, where, address):
    side.apply(side.serve(UDP, address))
    return [exchange(side, *way, os.urandom(9000)) for way in side.ways()]


def datagrams_without_a_checksum(side, where, address):
    side.apply(side.serve(UDP, address))
    option = (socket.SOL_SOCKET, SO_NO_CHECK, 1)
    return [outcome(lambda w=way: exchange(side, *w, b"hello", option)) for way in side.ways()]


def a_closed_port(side, where, address):
    side.apply(side.serve(UDP, address, port=81), side.serve(TCP, address, port=81))
    answers = [outcome(lambda w=way: exchange(side, *w, b"hello")) for way in side.ways()]
    for space, target in side.ways():
        with side.socket(space, TCP) as client:
            answers.append(outcome(lambda c=client, t=target: c.connect(t)))
    return answers


def a_backend_that_asks_itself(side, where, address):
    if where != "pod1":
        return []
    side.apply(side.serve(UDP, address), side.serve(TCP, address))
    targets = [side.ways()[0][1], side.ways()[1][1]]
    seen = [exchange(side, "pod1", target, b"hello") for target in targets]
    return seen + [side.world.ask("pod1", *target) for target in targets]


def ports_used_again(side, where, address):
    """At once: after the server closed first, and after a reset."""
    side.apply(side.serve(TCP, address))
    seen = []
    for number in range(6):
        with side.socket("outside", TCP) as client:
            client.bind((OUTSIDE[side.family], 6100 + number // 3))
            client.connect(side.ways()[0][1])
            client.send(b"who")
            seen.append(client.recv(100))
            if number < 3:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            else:
                assert client.recv(100) == b""
    return seen


def ipv4_through_ipv6_sockets(side, where, address):
    if side.family == 6:
        return []
    side.apply(side.serve(UDP, address), side.serve(TCP, address))
    seen = []
    for space, (target, port) in side.ways():
        there = (f"::ffff:{target}", port)
        with side.socket(space, TCP, socket.AF_INET6) as client:
            client.connect(there)
            client.send(b"who")
            seen.append((client.recv(100), client.getpeername()[:2] == there))
        with side.socket(space, UDP, socket.AF_INET6) as client:
            client.sendto(b"who", there)
            data, peer = client.recvfrom(100)
            seen.append((data, peer[:2] == there))
    return seen


def a_node_port_that_a_process_has_bound(side, where, address):
    side.apply(side.serve(TCP, address))
    with side.socket("node", TCP) as listener:
        listener.bind(side.ways()[0][1])
        listener.listen()
        return [side.world.ask(space, *side.ways()[0][1]) for space in ("outside", "pod2", "node")]


def a_narrower_way_to_the_backend(side, where, address):
    """Senders that do not fragment hear of it, TCP goes on."""
    if where != "outside":
        return []
    side.apply(side.serve(UDP, address), side.serve(TCP, address))
    node, via = side.world.spaces["node"], f"{address} via {OUTSIDE[side.family]} mtu lock 1300"
    side.world.batch(node, f"route add {via}")
    told = []
    try:
        for space, target in side.ways()[:2]:
            with side.socket(space, UDP) as client:
                client.setsockopt(*MTU_DISCOVER[side.family], 2)
                client.connect(target)
                client.send(b"x" * 1400)
                with contextlib.suppress(TimeoutError):
                    told.append(outcome(lambda c=client: c.recv(100)))
                told.append(client.getsockopt(*MTU[side.family]))
        told += [stream(side, "outside", way) for way in side.ways()]
    finally:
        side.world.batch(node, f"route del {via}")
        for space in side.world.spaces.values():
            side.world.run(space, "ip", f"-{side.family}", "route", "flush", "cache")
    return told


def hops_that_run_out(side, where, address):
    """The node answers for itself; no hop behind it is told of."""
    side.apply(side.serve(UDP, address))
    seen = []
    for space, target in side.ways()[:2]:
        with side.socket(space, UDP) as client:
            client.setsockopt(*ERRORS[side.family], 1)
            client.setsockopt(*HOPS[side.family], 1)
            client.connect(target)
            client.send(b"x")
            seen.append(outcome(lambda c=client: c.recv(100)))
            _, ancillary, _, asked = client.recvmsg(500, 500, socket.MSG_ERRQUEUE)
            raw = ancillary[0][2]  # struct sock_extended_err, and who says so
            kind = struct.unpack_from("=IBBB", raw)[1:]
            size = 4 if side.family == 4 else 16
            at = 20 if side.family == 4 else 24
            says = socket.inet_ntop(client.family, raw[at : at + size])
            seen.append((kind, says, asked[:2] == target))
    return seen


def stream(side, where, way):
    """How much comes back after the client has said all and closed its half."""
    address = BACKENDS[where][side.family]
    side.apply(side.serve(TCP, address, port=85))
    space, target = way
    with side.socket(where, TCP) as listener, side.socket(space, TCP) as client:
        listener.bind((address, 85))
        listener.listen()
        client.connect(target)
        server = listener.accept()[0]
        threading.Thread(target=lambda: send_all(client), daemon=True).start()
        with server:
            size = len(b"".join(iter(lambda: server.recv(65536), b"")))
            server.sendall(bytes(size))
        return len(b"".join(iter(lambda: client.recv(65536), b"")))


def send_all(client):
    client.sendall(bytes(200_000))
    client.shutdown(socket.SHUT_WR)


def half_closed_streams(side, where, address):
    return [stream(side, where, way) for way in side.ways()]


def resets_in_the_middle(side, where, address):
    side.apply(side.serve(TCP, address, port=85))
    seen = []
    with side.socket(where, TCP) as listener:
        listener.bind((address, 85))
        listener.listen()
        for space, target in side.ways():
            for by_client in (True, False):
                with side.socket(space, TCP) as client:
                    client.connect(target)
                    server = listener.accept()[0]
                    server.settimeout(3)
                    one, other = (client, server) if by_client else (server, client)
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    one.close()
                    seen.append(outcome(lambda o=other: o.recv(10)))
                    other.close()
    return seen


def one_port_for_two_services(side, where, address):
    """And for their backend itself: each answer comes from where it was asked."""
    side.apply(side.serve(UDP, address), side.serve(UDP, address, number=90))
    seen = []
    for (space, first), (_, second) in zip(side.ways(), side.ways(90), strict=True):
        with side.socket(space, UDP) as client:
            for target in (first, second, first, second, (address, 80), first):
                client.sendto(b"who", target)
                seen.append(client.recvfrom(100)[1][:2] == target)
    return seen


CASES = [
    datagrams_in_pieces,
    datagrams_without_a_checksum,
    a_closed_port,
    a_backend_that_asks_itself,
    ports_used_again,
    ipv4_through_ipv6_sockets,
    a_node_port_that_a_process_has_bound,
    a_narrower_way_to_the_backend,
    hops_that_run_out,
    half_closed_streams,
    resets_in_the_middle,
    one_port_for_two_services,
]
EVERYTHING = [(case, where, family) for case in CASES for where in BACKENDS for family in (4, 6)]


@contextlib.contextmanager
def on_nftables(world):
    node = world.spaces["node"]
    part = NftablesPart(make_table([]).settings.config, node)
    part.start()
    try:
        yield Side(world, part, lambda: netns.run(node, ["conntrack", "-F"], timeout_s=10))
    finally:
        part.cleanup()


@contextlib.contextmanager
def on_ebpf(world):
    programs = Programs(world.name, world.spaces["node"])
    part = EbpfPart(programs=programs)
    part.start()
    try:
        yield Side(world, part, programs.connections.clear)
    finally:
        programs.cleanup()


@pytest.fixture(scope="module")
def seen():
    """What each case saw, by data path."""
    with World() as world:
        for space in world.spaces.values():  # or ICMP errors are told once a second
            for key in ("ipv4.icmp_ratelimit", "ipv6.icmp.ratelimit"):
                world.run(space, "sysctl", "-qw", f"net.{key}=0")
        for space, addresses in BACKENDS.items():
            for family in (4, 6):
                world.serve(space, addresses[family], 80, TCP)
                echo(world, space, addresses[family])
        found = {}
        for name, path in (("nftables", on_nftables), ("ebpf", on_ebpf)):
            with path(world) as side:
                found[name] = {each: observe(side, *each) for each in EVERYTHING}
        yield found


def observe(side, case, where, family):
    side.family = family
    return outcome(lambda: case(side, where, BACKENDS[where][family]))


def echo(world, space, address):
    """Send datagrams back, the client's address in front."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = netns.socket(world.spaces[space], family, UDP)
    server.bind((address, 80))

    def loop():
        with contextlib.suppress(OSError):
            while True:
                data, peer = server.recvfrom(65536)
                if peer is None:
                    return
                server.sendto(peer[0].encode() + b" " + data, peer)

    def stop():
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()

    threading.Thread(target=loop, daemon=True).start()
    world._closing.callback(stop)


@pytest.mark.parametrize(("case", "where", "family"), EVERYTHING)
def test_both_data_paths_look_the_same(seen, case, where, family):
    each = (case, where, family)
    assert seen["ebpf"][each] == seen["nftables"][each]
    assert isinstance(seen["ebpf"][each], list), "the case itself came to its end"


def test_the_cases_see_what_they_are_about(seen):
    ebpf = seen["ebpf"]
    for where in BACKENDS:
        for family in (4, 6):
            assert {whole for _, whole in ebpf[datagrams_in_pieces, where, family]} == {True}
            assert set(ebpf[a_closed_port, where, family]) == {"ECONNREFUSED"}
            assert set(ebpf[half_closed_streams, where, family]) == {200_000}
            assert set(ebpf[resets_in_the_middle, where, family]) == {"ECONNRESET"}
            assert set(ebpf[one_port_for_two_services, where, family]) == {True}
    for family in (4, 6):
        narrow = ebpf[a_narrower_way_to_the_backend, "outside", family]
        assert narrow[:4:2] == ["EMSGSIZE"] * 2
        assert narrow[1:4:2] == [1300] * 2
