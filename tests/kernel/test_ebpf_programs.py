"""The tcx program by test runs: a packet in, a packet and a verdict out."""

import struct

import pytest

from podwire.datapath.ebpf.connections import Connections
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.net import Protocol, parse_address
from tests.conformance import service_packets as packets
from tests.kernel.ebpf_runs import (
    DROP,
    NEXT,
    REDIRECT,
    assert_sound,
    grow_older,
    ones_complement,
    run,
    sctp,
)
from tests.kernel.ebpf_services import VIP, make_port, make_table
from tests.kernel.ebpf_world import NEEDS_EBPF, NODE, POD, REMOTE, World

pytestmark = NEEDS_EBPF


@pytest.fixture(scope="module")
def world():
    with World() as made:
        programs = Programs(made.name, made.spaces["node"], connections=256)
        made.part = ServicesPart(programs=programs)
        made.part.start()
        programs._housekeeping.stop()  # tests do it when it is time
        made.programs = programs
        made.connections = Connections(programs)
        yield made
        programs.close()


@pytest.fixture(autouse=True)
def no_connections(world):
    world.connections.clear()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("size", [4, 17, 700, 1301])
def test_sctp_gets_a_right_checksum_when_its_port_changes(world, family, size):
    both = {"family": family, "protocol": Protocol.SCTP}
    world.part.apply(make_table([make_port("sctp", 3868, [POD[2][family]], **both)]))
    payload = bytes(range(256)) * 6
    sent = sctp(POD[1][family], VIP[family], (4444, 3868), payload[:size])
    assert_sound(sent)
    verdict, out = run(world, sent)
    assert verdict == NEXT
    wire = packets.parse(out)
    assert (wire.destination, wire.destination_port) == (POD[2][family], 80)
    assert wire.payload[12:] == payload[:size]
    assert_sound(out)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
def test_there_and_back_with_right_checksums(world, family, protocol):
    both = {"family": family, "protocol": protocol}
    world.part.apply(make_table([make_port("web", 80, [POD[2][family]], **both)]))
    client, vip, pod = POD[1][family], VIP[family], POD[2][family]
    verdict, there = run(world, packets.first(client, vip, protocol, (5000, 80), 1))
    assert verdict == NEXT
    assert packets.parse(there).destination == pod
    assert_sound(there)
    verdict, back = run(world, packets.first(pod, client, protocol, (80, 5000), 2), "pod2")
    assert verdict == REDIRECT
    wire = packets.parse(back)
    assert (wire.source, wire.source_port) == (vip, 80)
    assert_sound(back)


@pytest.mark.parametrize("family", [4, 6])
def test_icmp_errors_are_translated_in_both_directions(world, family):
    both = {"family": family, "protocol": Protocol.UDP}
    world.part.apply(make_table([make_port("dns", 80, [POD[2][family]], **both)]))
    client, vip, pod = POD[1][family], VIP[family], POD[2][family]
    request = packets.first(client, vip, Protocol.UDP, (5000, 80), 1)
    there = run(world, request)[1]
    verdict, error = run(world, packets.icmp_port_unreachable(there, pod, client), "pod2")
    assert verdict == REDIRECT
    assert packets.parse(error).destination == client
    assert_sound(error)
    quoted = packets.parse(error).quoted
    assert (quoted.source, quoted.source_port) == (client, 5000)
    assert (quoted.destination, quoted.destination_port) == (vip, 80)

    answer = packets.first(pod, client, Protocol.UDP, (80, 5000), 2)
    back = run(world, answer, "pod2")[1]
    verdict, error = run(world, packets.icmp_port_unreachable(back, client, vip))
    assert verdict == REDIRECT
    assert packets.parse(error).destination == pod
    assert_sound(error)
    quoted = packets.parse(error).quoted
    assert (quoted.source, quoted.source_port) == (pod, 80)
    assert (quoted.destination, quoted.destination_port) == (client, 5000)


def fragments(packet, first_size):
    """An IPv4 packet in two."""
    head, body = packet[:20], packet[20:]
    for start, piece, more in ((0, body[:first_size], 0x2000), (first_size, body[first_size:], 0)):
        new = head[:2] + struct.pack(">HHH", 20 + len(piece), 77, more | start // 8) + head[8:10]
        check = ones_complement(new + bytes(2) + head[12:])
        yield new + struct.pack(">H", check ^ 0xFFFF) + head[12:] + piece


def test_later_fragments_follow_the_first(world):
    both = {"family": 4, "protocol": Protocol.UDP}
    backends = [POD[2][4], REMOTE[4]]
    world.part.apply(make_table([make_port("big", 80, backends, **both)]))
    body = struct.pack(">HHHH", 5000, 80, 808, 0) + bytes(800)
    first, later = fragments(packets._ip(POD[1][4], VIP[4], Protocol.UDP, body), 400)
    lost = world.programs.outcomes()["fragment_lost"]
    assert run(world, later)[0] == DROP
    assert world.programs.outcomes()["fragment_lost"] == lost + 1
    out = [run(world, piece)[1] for piece in (first, later)]
    assert len({packets.parse(piece).destination for piece in out}) == 1
    assert packets.parse(out[0]).destination in backends
    assert out[1][20:] == later[20:]
    assert all(ones_complement(piece[:20]) == 0xFFFF for piece in out)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP, Protocol.SCTP])
def test_a_refusal_is_a_sound_packet(world, family, protocol):
    world.part.apply(make_table([make_port("web", 80, [], family=family, protocol=protocol)]))
    sent = packets.first(POD[1][family], VIP[family], protocol, (5000, 80), 3)
    verdict, out = run(world, sent)
    assert verdict == REDIRECT
    wire = packets.parse(out)
    assert (wire.source, wire.destination) == (VIP[family], POD[1][family])
    assert wire.is_error
    assert_sound(out)


def with_head(packet, size):
    """The packet with that many bytes of IP options (no-operations) or extensions."""
    if packet[0] >> 4 == 6:
        padding = bytes([1, size - 4]) + bytes(size - 4)
        more = struct.pack(">BB", packet[6], size // 8 - 1) + padding
        length = struct.pack(">H", len(packet) - 40 + size)
        return packet[:4] + length + bytes([60]) + packet[7:40] + more + packet[40:]
    head = bytes([0x45 + size // 4, 0]) + struct.pack(">H", len(packet) + size)
    head += packet[4:10] + bytes(2) + packet[12:20] + bytes([1]) * size
    check = struct.pack(">H", ones_complement(head) ^ 0xFFFF)
    return head[:10] + check + head[12:] + packet[20:]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
@pytest.mark.parametrize("size", [8, 40])
def test_what_bears_ip_options_is_served_and_refused_as_any_other(world, family, protocol, size):
    both = {"family": family, "protocol": protocol}
    world.part.apply(make_table([make_port("web", 80, [POD[2][family]], **both)]))
    plain = packets.first(POD[1][family], VIP[family], protocol, (5000, 80), 3)
    verdict, out = run(world, with_head(plain, size))
    destination = out[16:20] if family == 4 else out[24:40]
    assert (verdict, destination) == (NEXT, parse_address(POD[2][family]))
    assert out[-len(plain) + (20 if family == 4 else 40) :][:4] == struct.pack(">HH", 5000, 80)

    world.part.apply(make_table([make_port("web", 80, [], **both)]))
    plain = packets.first(POD[1][family], VIP[family], protocol, (5001, 80), 3)
    verdict, out = run(world, with_head(plain, size))
    assert verdict == REDIRECT
    wire = packets.parse(out)
    assert (wire.source, wire.destination) == (VIP[family], POD[1][family])
    assert wire.is_error
    assert_sound(out)
    if protocol is Protocol.UDP:
        quoted = packets.parse(out).quoted
        assert (quoted.source, quoted.source_port) == (POD[1][family], 5001)
        assert (quoted.destination, quoted.destination_port) == (VIP[family], 80)


def test_masquerading_gives_every_client_its_own_port_and_says_when_there_are_no_more(world):
    both = {"family": 4, "protocol": Protocol.UDP}
    world.part.apply(make_table([make_port("dns", 80, [REMOTE[4]], **both)]))
    seen = set()
    for number in range(60):
        packet = packets.first("192.0.2.9", NODE[4], Protocol.UDP, (5000 + number, 30080), number)
        wire = packets.parse(run(world, packet, "up0")[1])
        assert (wire.source, wire.destination) == (NODE[4], REMOTE[4])
        seen.add(wire.source_port)
    assert len(seen) == 60
    assert all(10000 <= port < 30000 for port in seen)


def test_a_full_table_is_counted_and_grows_without_losing_connections(world):
    both = {"family": 4, "protocol": Protocol.UDP}
    world.part.apply(make_table([make_port("dns", 80, [POD[2][4], REMOTE[4]], **both)]))
    where = {}
    number = 0
    full = world.programs.outcomes()["connections_full"]
    while world.programs.outcomes()["connections_full"] == full:
        packet = packets.first(POD[1][4], VIP[4], Protocol.UDP, (2000 + number, 80), number)
        verdict, out = run(world, packet)
        if verdict == NEXT:
            where[number] = packets.parse(out).destination
        number += 1
    assert len(where) >= 120
    before = world.connections.capacity
    world.connections.maintain()
    assert world.connections.capacity == 2 * before
    for number, backend in where.items():
        packet = packets.first(POD[1][4], VIP[4], Protocol.UDP, (2000 + number, 80), number)
        assert packets.parse(run(world, packet)[1]).destination == backend


def test_connections_age(world):
    both = {"family": 4, "protocol": Protocol.UDP}
    world.part.apply(make_table([make_port("dns", 80, [POD[2][4]], **both)]))
    run(world, packets.first(POD[1][4], VIP[4], Protocol.UDP, (5000, 80), 1))
    table = world.programs.growing["connections"].map
    assert world.connections.expire().removed == 0
    grow_older(world, 40)
    done = world.connections.expire()
    assert done.removed == 2
    assert list(table.items()) == []


def test_odd_packets_are_dropped_or_left_alone(world):
    assert run(world, bytes([0x45]) + bytes(9) + b"\6" + bytes(9))[0] in (DROP, NEXT)
    assert run(world, packets.first(POD[1][4], "224.0.0.251", Protocol.UDP, (1, 2), 1))[0] == NEXT
