"""Services at the socket, in a cgroup of the test's own: TCP and UDP, both families."""

import contextlib
import errno
import os
import signal
import socket
import uuid
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from podwire.datapath.ebpf.pods import EbpfPods
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.kernel import netns
from podwire.kernel.bpf import features
from podwire.net import Protocol, parse_address
from podwire.services import backend
from tests.kernel.ebpf_services import EXTERNAL, KINDS, VIP, make_port, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, POD, REMOTE, World

pytestmark = [
    NEEDS_EBPF,
    pytest.mark.skipif(features.has_cgroup2() is None, reason="no cgroup v2"),
]


@pytest.fixture(scope="module")
def world():
    group = features.has_cgroup2() / f"pwt-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    group.mkdir()
    with contextlib.ExitStack() as closing:
        closing.callback(group.rmdir)
        made = closing.enter_context(World())
        made.group = group
        programs = Programs(made.name, made.spaces["node"], cgroup=group)
        made.part = ServicesPart(programs=programs)
        closing.callback(made.part.cleanup)
        made.part.start()
        pods = EbpfPods(programs)
        pods.start()
        pods.replace(made.pod_link(n, with_sockets=True) for n in (1, 2))
        for family in (4, 6):
            for kind in KINDS.values():
                for space, addresses in (("pod1", POD[1]), ("outside", REMOTE), ("node", NODE)):
                    made.serve(space, addresses[family], 80, kind)
        yield made


class Pause:
    """A process inside waits at `wait` while the test does something `meanwhile`."""

    def __init__(self):
        (self._paused, self._pause), (self._go_on, self._resume) = os.pipe(), os.pipe()

    def wait(self):
        os.write(self._pause, b"x")
        os.read(self._go_on, 1)

    def meanwhile(self, world, space, function, change):
        """What `function` returns in `inside`, with `change` called while it waits."""
        try:
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(inside, world, space, function)
                os.read(self._paused, 1)
                change()
                os.write(self._resume, b"x")
                return answer.result(timeout=20)
        finally:
            for fd in (self._paused, self._pause, self._go_on, self._resume):
                os.close(fd)


def inside(world, space, function):
    """What `function` returns in a child process in the cgroup and the namespace."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            (world.group / "cgroup.procs").write_text(str(os.getpid()))
            netns.enter(world.spaces[space])
            answer = repr(function())
        except BaseException as error:
            answer = repr(repr(error))
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return eval(answer)


def opened(family, kind):
    client = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind)
    client.settimeout(3)
    return client


def kernel_peer(client, kind):
    """The remote end as /proc/net knows it, which no hook embellishes."""
    table = {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}[kind]
    name = table if client.family == socket.AF_INET else f"{table}6"
    inode = os.fstat(client.fileno()).st_ino
    with open(f"/proc/thread-self/net/{name}") as file:
        row = next(line.split() for line in file if line.split()[9] == str(inode))
    address, _, port = row[2].partition(":")
    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
    return socket.inet_ntop(client.family, b"".join(words)), int(port, 16)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", list(KINDS))
@pytest.mark.parametrize("space", ["pod2", "node"])
def test_a_socket_is_connected_to_the_backend_and_does_not_know(world, family, protocol, space):
    kind = KINDS[protocol]
    both = {"family": family, "protocol": protocol}
    world.part.apply(make_table([make_port("web", 80, [REMOTE[family]], **both)]))

    def talk():
        with opened(family, kind) as client:
            client.connect((VIP[family], 80))
            client.send(b"who")
            answer = client.recvfrom(100)[0].decode().split()[0]
            return answer, client.getpeername()[:2], kernel_peer(client, kind)

    answer, peer, wire = inside(world, space, talk)
    assert answer == REMOTE[family]
    assert peer == (VIP[family], 80)
    assert wire == (REMOTE[family], 80)


@pytest.mark.parametrize("family", [4, 6])
def test_an_unconnected_socket_stays_with_one_backend_until_it_goes(world, family):
    both = {"family": family, "protocol": Protocol.UDP}
    world.part.apply(make_table([make_port("dns", 80, [POD[1][family], REMOTE[family]], **both)]))
    pause = Pause()

    def talk():
        seen = []
        with opened(family, socket.SOCK_DGRAM) as client:
            for turn in range(12):
                if turn == 6:
                    pause.wait()
                client.sendto(b"who", (VIP[family], 80))
                data, sender = client.recvfrom(100)
                seen.append((data.decode().split()[0], sender[:2]))
        return seen

    def change():
        world.part.apply(make_table([make_port("dns", 80, [POD[1][family]], **both)]))

    seen = pause.meanwhile(world, "pod2", talk, change)
    assert {sender for _, sender in seen} == {(VIP[family], 80)}
    assert len({server for server, _ in seen[:6]}) == 1
    assert {server for server, _ in seen[6:]} == {POD[1][family]}


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("backend", [POD[1], REMOTE], ids=["here", "elsewhere"])
def test_one_socket_may_ask_two_services_with_one_backend(world, family, backend):
    """Their answers look alike, unless the second Service goes by another port."""
    world.part.connections.clear()
    both = {"family": family, "protocol": Protocol.UDP}
    numbers = (53, 54, 55)
    ports = [make_port(f"dns{number}", number, [backend[family]], **both) for number in numbers]
    world.part.apply(make_table(ports))

    def talk():
        seen = []
        with opened(family, socket.SOCK_DGRAM) as client:
            for number in (*numbers, *reversed(numbers)):
                client.sendto(b"who", (VIP[family], number))
                seen.append(client.recvfrom(100)[1][:2] == (VIP[family], number))
            for number in numbers:  # all answers under way at once
                client.sendto(b"who", (VIP[family], number))
            seen.append(sorted(client.recvfrom(100)[1][1] for _ in numbers) == list(numbers))
        return seen

    assert inside(world, "pod2", talk) == [True] * 7


def test_refused_at_once_without_endpoints(world):
    both = {"family": 4, "protocol": Protocol.TCP}
    world.part.apply(make_table([make_port("none", 82, [], **both)]))

    def attempt():
        with opened(4, socket.SOCK_STREAM) as client:
            return client.connect_ex((VIP[4], 82))

    assert inside(world, "pod2", attempt) == 111


def test_an_ipv6_socket_reaches_an_ipv4_service(world):
    both = {"family": 4, "protocol": Protocol.TCP}
    world.part.apply(make_table([make_port("web", 80, [POD[1][4]], **both)]))

    def talk():
        with opened(6, socket.SOCK_STREAM) as client:
            client.connect((f"::ffff:{VIP[4]}", 80))
            client.send(b"who")
            return client.recv(100).decode().split()[0], client.getpeername()[0]

    assert inside(world, "node", talk) == (POD[1][4], f"::ffff:{VIP[4]}")


def test_what_needs_masquerading_is_left_to_the_packet_path(world):
    both = {"family": 4, "protocol": Protocol.TCP}
    world.part.apply(make_table([make_port("web", 80, [POD[1][4]], **both)]))

    def talk():
        with opened(4, socket.SOCK_STREAM) as client:
            client.connect((NODE[4], 30080))
            client.send(b"who")
            return client.recv(100).decode().split(), kernel_peer(client, socket.SOCK_STREAM)

    (server, seen), wire = inside(world, "pod2", talk)
    assert (server, wire) == (POD[1][4], (NODE[4], 30080))
    assert seen != POD[2][4]


def test_a_pod_that_gets_itself_sees_the_node_and_strangers_are_left_alone(world):
    both = {"family": 4, "protocol": Protocol.TCP}
    world.part.apply(make_table([make_port("web", 80, [POD[1][4]], **both)]))

    def talk():
        with opened(4, socket.SOCK_STREAM) as client:
            client.connect((VIP[4], 80))
            client.send(b"who")
            seen = client.recv(100).decode().split()[1]
            return seen, kernel_peer(client, socket.SOCK_STREAM)[0]

    assert inside(world, "pod1", talk) == (NODE[4], VIP[4])
    assert inside(world, "outside", talk)[1] == VIP[4]


@pytest.mark.skipif(not features.has_kfunc("bpf_sock_destroy"), reason="no bpf_sock_destroy")
@pytest.mark.parametrize("space", ["pod2", "node"])
def test_a_connected_udp_socket_is_closed_when_its_backend_goes(world, space):
    both = {"family": 4, "protocol": Protocol.UDP}
    world.part.apply(make_table([make_port("dns", 80, [POD[1][4]], **both)]))
    pause = Pause()

    def talk():
        with opened(4, socket.SOCK_DGRAM) as led, opened(4, socket.SOCK_DGRAM) as direct:
            led.connect((VIP[4], 80))
            direct.connect((POD[1][4], 80))
            pause.wait()
            direct.send(b"who")
            answer = direct.recv(100).decode().split()[0]
            try:
                led.send(b"who")
                return answer, led.recv(100)
            except OSError as error:
                return answer, error.errno

    def change():
        world.part.apply(make_table([make_port("dns", 80, [REMOTE[4]], **both)]))

    direct, led = pause.meanwhile(world, space, talk, change)
    assert direct == POD[1][4]
    assert led in (errno.ECONNABORTED, errno.ENOTCONN, errno.EDESTADDRREQ)


@pytest.mark.skipif(not features.has_kfunc("bpf_sock_destroy"), reason="no bpf_sock_destroy")
def test_of_connected_udp_sockets_only_those_close_that_lead_nowhere(world):
    """Led by a Service that is gone, or by an address that it has no more."""
    both = {"family": 4, "protocol": Protocol.UDP}
    shared = [make_port(name, number, [POD[1][4]], **both) for name, number in
              (("one", 80), ("two", 81), ("three", 82))]  # fmt: skip
    world.part.apply(make_table(shared))
    pause = Pause()
    targets = [(VIP[4], 80), (VIP[4], 81), (VIP[4], 82), (EXTERNAL[4], 82)]

    def talk():
        with contextlib.ExitStack() as closing:
            clients = [closing.enter_context(opened(4, socket.SOCK_DGRAM)) for _ in targets]
            for client, target in zip(clients, targets, strict=True):
                client.connect(target)
            pause.wait()
            return [asks(client) for client in clients]

    def change():
        inward = make_port("three", 82, [POD[1][4]], external=False, **both)
        world.part.apply(make_table([shared[1], inward]))

    assert pause.meanwhile(world, "node", talk, change) == [False, True, True, False]


def asks(client):
    """Whether a connected UDP socket is answered."""
    try:
        client.send(b"who")
        return bool(client.recv(100))
    except OSError:
        return False


def test_an_unconnected_socket_stays_with_a_backend_that_terminates_and_serves(world):
    both = {"family": 4, "protocol": Protocol.UDP}
    world.part.apply(make_table([make_port("dns", 80, [POD[1][4]], **both)]))
    pause = Pause()

    def talk():
        seen = []
        with opened(4, socket.SOCK_DGRAM) as client:
            for _ in range(2):
                client.sendto(b"who", (VIP[4], 80))
                seen.append(client.recv(100).decode().split()[0])
                if len(seen) == 1:
                    pause.wait()
        return seen

    def change():
        leaving = make_port("dns", 80, [REMOTE[4]], **both)
        serving = tuple(sorted(backend(parse_address(text), 80) for text in (POD[1][4], REMOTE[4])))
        world.part.apply(make_table([msgspec.structs.replace(leaving, serving=serving)]))

    assert pause.meanwhile(world, "pod2", talk, change) == [POD[1][4]] * 2


def test_sockets_count_connections_and_unconnected_ones_their_first_datagram(world):
    ports = [
        make_port("counted", 91, [POD[1][4]], family=4, protocol=p, external=False)
        for p in (Protocol.TCP, Protocol.UDP)
    ]
    none = make_port("none", 92, [], family=4, protocol=Protocol.TCP, external=False)
    world.part.apply(make_table([*ports, none]))

    def talk():
        for kind in KINDS.values():
            with socket.socket(socket.AF_INET, kind) as client:
                client.settimeout(3)
                client.connect((VIP[4], 91))
                client.send(b"who")
                client.recv(100)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(3)
            for _ in range(4):
                client.sendto(b"who", (VIP[4], 91))
                client.recvfrom(100)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            return client.connect_ex((VIP[4], 92))

    assert inside(world, "pod2", talk) == errno.ECONNREFUSED
    tcp, udp, refused = (
        [seen for _, seen in world.part.counts(port).frontends.values()] for port in (*ports, none)
    )
    assert (tcp, udp, refused) == ([1], [2], [1])
    assert [sum(world.part.counts(port).backends.values()) for port in ports] == [1, 2]
