"""What leaves the cluster from pods on eBPF, also where it is too long for the way out."""

import socket

import pytest

from podwire.kernel import netns
from tests.conformance import service_packets as packets
from tests.kernel.ebpf_node import CLIENT, whole_node
from tests.kernel.ebpf_runs import REDIRECT
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, OUTSIDE, POD

pytestmark = NEEDS_EBPF
GRE = 47


@pytest.fixture(scope="module")
def node():
    with whole_node() as made:
        yield made


@pytest.fixture(autouse=True)
def afresh(node):
    node.programs.connections.clear()


def test_protocols_without_ports_are_masqueraded_and_answered(node):
    packet = packets._ip(POD[1][4], CLIENT[4], GRE, bytes(24))
    verdict, out = node.run(packet)
    assert (verdict, packets.parse(out).source) == (REDIRECT, NODE[4])
    verdict, out = node.run(packets._ip(CLIENT[4], NODE[4], GRE, bytes(24)), "up0")
    assert (verdict, packets.parse(out).destination) == (REDIRECT, POD[1][4])


@pytest.mark.parametrize("family", [4, 6])
def test_long_echoes_come_back_in_pieces(node, family):
    target = OUTSIDE[family]
    command = ["ping", "-c2", "-i0.1", "-W2", "-s3000", target]
    done = netns.run(node.world.spaces["pod1"], command, timeout_s=10)
    assert " 0% packet loss" in done.stdout, done.stdout


@pytest.mark.parametrize("family", [4, 6])
def test_the_first_hop_of_what_is_masqueraded_answers(node, family):
    command = ["ping", "-c1", "-W2", "-t1", OUTSIDE[family]]
    done = netns.run(node.world.spaces["pod1"], command, timeout_s=10)
    assert "exceeded" in done.stdout or "limit" in done.stdout, done.stdout


@pytest.fixture(params=["link", "route"])
def narrow(node, request):
    before = node.count("too_big")
    routes = [f"{OUTSIDE[4]}/32 dev up0", f"{OUTSIDE[6]}/128 dev up0"]
    if request.param == "link":
        node.world.batch(node.world.spaces["node"], "link set up0 mtu 1300")
    else:
        node.world.batch(
            node.world.spaces["node"], *(f"route add {each} mtu lock 1300" for each in routes)
        )
    yield
    told = node.count("too_big") - before
    if request.param == "link":
        node.world.batch(node.world.spaces["node"], "link set up0 mtu 1500")
    else:
        node.world.batch(node.world.spaces["node"], *(f"route del {each}" for each in routes))
    for family in (4, 6):
        for space in ("pod1", "node", "outside"):
            netns.run(node.world.spaces[space], ["ip", f"-{family}", "route", "flush", "cache"])
    assert told > 0


@pytest.mark.parametrize("family", [4, 6])
def test_what_is_too_long_for_the_way_out_is_cut_or_refused(node, narrow, family):
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    spaces = node.world.spaces
    with (
        netns.socket(spaces["outside"], kind, socket.SOCK_STREAM) as listener,
        netns.socket(spaces["pod1"], kind, socket.SOCK_STREAM) as client,
    ):
        listener.bind((OUTSIDE[family], 0))
        listener.listen()
        client.settimeout(5)
        client.connect(listener.getsockname())
        server, peer = listener.accept()
        assert peer[0] == NODE[family]
        with server:
            server.settimeout(5)
            client.sendall(bytes(30000))
            left = 30000
            while left:
                left -= len(server.recv(65536))


def test_a_datagram_that_may_be_cut_is(node, narrow):
    spaces = node.world.spaces
    with (
        netns.socket(spaces["outside"], socket.AF_INET, socket.SOCK_DGRAM) as server,
        netns.socket(spaces["pod1"], socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        server.bind((OUTSIDE[4], 0))
        server.settimeout(5)
        client.setsockopt(socket.IPPROTO_IP, 10, 0)  # IP_MTU_DISCOVER: IP_PMTUDISC_DONT
        client.sendto(bytes(1400), server.getsockname())
        data, peer = server.recvfrom(2000)
        assert (len(data), peer[0]) == (1400, NODE[4])
