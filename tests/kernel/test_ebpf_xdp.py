"""NodePort traffic for other nodes at the driver: there and back, and the rest left to tcx."""

import contextlib
import socket
import struct

import pytest

from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.kernel import ethtool, netns
from podwire.kernel.bpf import features
from podwire.net import Protocol
from tests.conformance import service_packets as packets
from tests.kernel.ebpf_runs import assert_sound, make_frame, ones_complement, run_xdp
from tests.kernel.ebpf_services import KINDS, make_port, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, OUTSIDE, POD, REMOTE, UPLINK_MAC, World

pytestmark = [
    NEEDS_EBPF,
    pytest.mark.skipif(not features.has_xdp_link(), reason="the kernel lacks XDP links"),
]

DROP, PASS, TX = 1, 2, 3
SOL_PACKET, PACKET_AUXDATA, TP_STATUS_CSUMNOTREADY = 263, 8, 8


@pytest.fixture(scope="module")
def world():
    with World() as made:
        programs = Programs(made.name, made.spaces["node"])
        made.part = ServicesPart(programs=programs)
        made.part.start()
        programs.accelerate(made.ifindex("up0"), generic=True)
        made.programs = programs
        for family in (4, 6):
            for kind in KINDS.values():
                made.serve("outside", REMOTE[family], 80, kind)
                made.serve("pod1", POD[1][family], 80, kind)
        yield made
        programs.close()


def run(world, packet, *, macs=UPLINK_MAC):
    """``(verdict, frame)``."""
    program = world.programs.program("from_driver")
    frame = make_frame(packet, macs)
    return run_xdp(world.spaces["node"], program, world.ifindex("up0"), frame)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP, Protocol.SCTP])
def test_a_packet_bounces_to_the_backend_and_its_answer_back(world, family, protocol):
    both = {"family": family, "protocol": protocol}
    port = make_port("far", 80, [REMOTE[family]], **both)
    world.part.apply(make_table([port]))
    client = {4: "198.51.100.9", 6: "fd51::9"}[family]
    ports = (5000 + protocol, 30080)
    verdict, frame = run(world, packets.first(client, NODE[family], protocol, ports, 1))
    there = packets.parse(frame[14:])
    assert verdict == TX
    assert frame[:6].hex(":") == UPLINK_MAC[1]
    assert (there.source, there.destination) == (NODE[family], REMOTE[family])
    assert there.destination_port == 80
    assert_sound(frame[14:])
    answer = (80, there.source_port)
    verdict, frame = run(world, packets.first(REMOTE[family], NODE[family], protocol, answer, 2))
    back = packets.parse(frame[14:])
    assert verdict == TX
    assert (back.source, back.destination) == (NODE[family], client)
    assert (back.source_port, back.destination_port) == (30080, ports[0])
    assert_sound(frame[14:])
    assert [seen for _, seen in world.part.counts(port).frontends.values()] == [0, 1, 0]
    assert list(world.part.counts(port).backends.values()) == [1]


def test_what_stays_on_the_node_is_passed_on_untouched(world):
    both = {"family": 4, "protocol": Protocol.TCP}
    table = make_table(
        [make_port("near", 80, [POD[1][4]], **both), make_port("no", 81, [], **both)]
    )
    world.part.apply(table)
    for target, port in ((NODE[4], 30080), (NODE[4], 30081), (NODE[4], 22), (POD[1][4], 80)):
        packet = packets.first(OUTSIDE[4], target, Protocol.TCP, (5000, port), 1)
        verdict, frame = run(world, packet)
        assert (verdict, frame[14:]) == (PASS, packet)


def test_what_the_link_carries_for_others_is_left_alone(world):
    both = {"family": 4, "protocol": Protocol.TCP}
    world.part.apply(make_table([make_port("far", 80, [REMOTE[4]], **both)]))
    packet = packets.first("198.51.100.9", NODE[4], Protocol.TCP, (5000, 30080), 1)
    for other in ("02:00:00:00:07:07", "ff:ff:ff:ff:ff:ff"):
        assert run(world, packet, macs=(other, UPLINK_MAC[1]))[0] == PASS
    assert run(world, packet)[0] == TX


@pytest.mark.parametrize("computed", [True, False], ids=["whole sums", "partial sums"])
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", list(KINDS))
def test_real_clients_do_not_notice(world, family, protocol, computed):
    """Also those whose checksums somebody else is to make: what arrives says so, and is right."""
    both = {"family": family, "protocol": protocol}
    backends = [POD[1][family], REMOTE[family]]
    world.part.apply(make_table([make_port("web", 80, backends, **both)]))
    ethtool.offload_checksums("eth0", not computed, world.spaces["outside"])
    before = world.programs.outcomes()["translated"]
    with netns.socket(world.spaces["outside"], socket.AF_PACKET, socket.SOCK_RAW) as capture:
        capture.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        capture.bind(("eth0", {4: 0x0800, 6: 0x86DD}[family]))
        seen = world.observe("outside", NODE[family], 30080, KINDS[protocol], tries=16)
        captured = list(frames(capture))
    assert seen == {(backend, NODE[family]) for backend in backends}
    assert world.programs.outcomes()["translated"] > before
    assert captured
    for packet, unmade in captured:
        assert_sound(with_sum(packet) if unmade else packet)


def frames(capture):
    """IP packets that have come, and whether their checksums are still to be made."""
    capture.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            data, ancillary, *_ = capture.recvmsg(2000, 100)
            status = struct.unpack_from("=I", ancillary[0][2])[0]
            yield data[14:], bool(status & TP_STATUS_CSUMNOTREADY)


def with_sum(packet):
    """The packet as its driver would complete it; TCP's and UDP's checksum cover the rest."""
    start = 20 if packet[0] >> 4 == 4 else 40
    protocol = packet[9] if start == 20 else packet[6]
    at = start + (16 if protocol == Protocol.TCP else 6)
    total = ones_complement(packet[start:]) ^ 0xFFFF
    return packet[:at] + struct.pack(">H", total or 0xFFFF) + packet[at + 2 :]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", list(KINDS))
def test_a_packet_whose_checksum_is_to_be_made_is_left_to_tcx(world, family, protocol):
    both = {"family": family, "protocol": protocol}
    world.part.apply(make_table([make_port("far", 80, [REMOTE[family]], **both)]))
    client = {4: "198.51.100.9", 6: "fd51::9"}[family]
    whole = packets.first(client, NODE[family], protocol, (5000, 30080), 1)
    start = 20 if family == 4 else 40
    addresses = whole[12:20] if family == 4 else whole[8:40]
    pseudo = ones_complement(addresses + struct.pack(">II", len(whole) - start, protocol))
    at = start + (16 if protocol == Protocol.TCP else 6)
    partial = whole[:at] + struct.pack(">H", pseudo) + whole[at + 2 :]
    assert_sound(with_sum(partial))
    verdict, frame = run(world, partial)
    assert (verdict, frame[14:]) == (PASS, partial)
    assert run(world, whole)[0] == TX
