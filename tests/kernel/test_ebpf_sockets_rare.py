"""Sockets that do more than connect, send and receive: disconnect, send to several, open fast."""

import ctypes
import errno
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from podwire.kernel.bpf import features
from podwire.net import Protocol
from tests.kernel.ebpf_services import VIP, make_port, make_table
from tests.kernel.ebpf_world import POD, REMOTE
from tests.kernel.test_ebpf_sockets import inside, kernel_peer, opened, pytestmark, world

__all__ = ["pytestmark", "world"]

MSG_FASTOPEN = 0x20000000


def serve(world, *ports):
    world.part.apply(make_table(ports))


def disconnect(client):
    """connect(2) with AF_UNSPEC, which Python's socket module cannot say."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.connect(client.fileno(), bytes(16), 16) == 0


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("space", ["pod2", "node"])
def test_udp_is_refused_by_packets_and_not_before(world, family, space):
    """A socket that talks to many would else fail for one of them."""
    serve(world, make_port("none", 82, [], family=family, protocol=Protocol.UDP))

    def talk():
        with opened(family, socket.SOCK_DGRAM) as many, opened(family, socket.SOCK_DGRAM) as one:
            for port in (82, 99):
                many.sendto(b"who", (VIP[family], port))
            one.connect((VIP[family], 82))
            one.send(b"who")
            try:
                return one.recv(100)
            except OSError as error:
                return error.errno

    assert inside(world, space, talk) == errno.ECONNREFUSED


@pytest.mark.skipif(not features.has_kfunc("bpf_sock_destroy"), reason="no bpf_sock_destroy")
def test_a_socket_that_was_disconnected_is_its_owners_again(world):
    both = {"family": 4, "protocol": Protocol.UDP}
    serve(world, make_port("dns", 80, [POD[1][4]], **both))
    (paused, pause), (go_on, resume) = os.pipe(), os.pipe()

    def talk():
        with opened(4, socket.SOCK_DGRAM) as client:
            client.connect((VIP[4], 80))
            client.send(b"who")
            client.recv(100)
            disconnect(client)
            os.write(pause, b"x")
            os.read(go_on, 1)
            client.sendto(b"who", (POD[1][4], 80))
            return client.recvfrom(100)[1]

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(inside, world, "pod2", talk)
        os.read(paused, 1)
        serve(world, make_port("dns", 80, [REMOTE[4]], **both))
        os.write(resume, b"x")
        sender = answer.result(timeout=20)
    for fd in (paused, pause, go_on, resume):
        os.close(fd)
    assert sender == (POD[1][4], 80)


@pytest.mark.parametrize("space", ["pod2", "node"])
def test_one_socket_for_many_also_through_ipv6(world, space):
    serve(
        world,
        make_port("dns", 80, [POD[1][4]], family=4, protocol=Protocol.UDP),
        make_port("dns", 80, [REMOTE[6]], family=6, protocol=Protocol.UDP),
    )

    def talk():
        seen = []
        with opened(6, socket.SOCK_DGRAM) as client:
            for target in (f"::ffff:{VIP[4]}", VIP[6], f"::ffff:{REMOTE[4]}", POD[1][6]):
                client.sendto(b"who", (target, 80))
                data, sender = client.recvfrom(100)
                seen.append((data.decode().split()[0], sender[0] == target))
        return seen

    servers = [POD[1][4], REMOTE[6], REMOTE[4], POD[1][6]]
    assert inside(world, space, talk) == [(server, True) for server in servers]


def test_a_socket_connected_anew_forgets_where_it_was_led(world):
    serve(world, make_port("dns", 80, [POD[1][4]], family=4, protocol=Protocol.UDP))

    def talk():
        seen = []
        with opened(4, socket.SOCK_DGRAM) as client:
            for target in (VIP[4], POD[1][4], REMOTE[4], VIP[4]):
                client.connect((target, 80))
                client.send(b"who")
                seen.append((client.recvfrom(100)[1][0], client.getpeername()[0]))
        return seen

    assert inside(world, "pod2", talk) == [(t, t) for t in (VIP[4], POD[1][4], REMOTE[4], VIP[4])]


@pytest.mark.parametrize("family", [4, 6])
def test_bound_open_fast_and_not_waiting(world, family):
    serve(world, make_port("web", 80, [POD[1][family]], family=family, protocol=Protocol.TCP))

    def talk():
        with (
            opened(family, socket.SOCK_STREAM) as fast,
            opened(family, socket.SOCK_STREAM) as bound,
        ):
            fast.settimeout(None)
            fast.sendto(b"who", MSG_FASTOPEN, (VIP[family], 80))
            answer = fast.recv(100).decode().split()[0]
            bound.bind((POD[2][family], 47123))
            bound.setblocking(False)
            code = bound.connect_ex((VIP[family], 80))
            bound.settimeout(3)
            bound.send(b"who")
            bound.recv(100)
            return answer, code, bound.getsockname()[1], kernel_peer(bound, socket.SOCK_STREAM)[0]

    assert inside(world, "pod2", talk) == (
        POD[1][family], errno.EINPROGRESS, 47123, POD[1][family],
    )  # fmt: skip


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("space", ["pod2", "node"])
def test_affinity_is_the_clients_also_where_no_hook_sees_it(world, family, space):
    """What the socket hooks chose for a client holds for its packets, and the other way round."""
    both = {"family": family, "protocol": Protocol.TCP, "affinity_timeout_s": 100}
    serve(world, make_port("sticky", 80, [POD[1][family], REMOTE[family]], **both))

    def talk():
        with opened(family, socket.SOCK_STREAM) as client:
            client.connect((VIP[family], 80))
            client.send(b"who")
            return client.recv(100).decode().split()[0]

    affinities = world.part._programs.maps["affinities"]
    for _ in range(6):
        affinities.delete_batch([key for key, _ in affinities.items()])
        first = inside(world, space, talk)
        assert world.ask(space, VIP[family], 80)[0] == first
        assert inside(world, space, talk) == first
